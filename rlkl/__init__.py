"""PPO and GRPO for language models, from scratch in raw PyTorch. Start reading at train.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkl.run.session import Session

__all__ = ["train"]


def train(*config: str, steps: int | None = None, **options: Any) -> Session:
    """Train as `rlkl train` does. Returns the run: folder, rows, before, after, model, tokenizer.

        run = rlkl.train("tiny-grpo", "optim.lr=1e-4", loss=my_loss, steps=100)

    config: as on the command line, the names of shipped configurations, files, and a.b=c. steps:
    optim.steps. options: any option or section by its name, for example kl_ref={"coef": 0.05}. A
    function of your own stands where a configuration has a name: loss=my_loss, or with options
    loss={"name": my_loss, "epsilon": 0.1}; reward=my_reward, advantage=, task=, … alike. Rewards
    and tasks from Python score in this process, without a time limit. Raises UserError on any
    mistake.
    """
    from rlkl.run.from_python import train  # torch is loaded here, not by `import rlkl`

    return train(config, steps, options)
