"""The peak of CUDA memory in a few steps of training, against the memory plan.

A model of the shape of Qwen2.5-1.5B with random weights, which never ends a response, so that the
step is as large as the plan assumes. The cases are the rows of the table in docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks.machine import where
from benchmarks.memory import QWEN_PROMPT, ROLLOUT, SAVINGS
from benchmarks.synthetic import qwen2, qwen2_5, random_digits, save_random_model, task_options
from rlkl.explain import footprint
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.schema import Config
from rlkl.run.session import step_inputs
from rlkl.run.state import State

CASES = dict(zip(("all", "checkpointing", "lora", "lora-checkpointing"), SAVINGS, strict=True))
TOKENS = 151_665  # of Qwen2.5's tokenizer; its models have a few more rows
TINY = (
    "model.dtype=float32",
    "sampling.prompts=2",
    "sampling.group_size=2",
    "sampling.max_new_tokens=4",
)


def measure(folder: Path, case: str, steps: int, tiny: bool) -> dict[str, Any]:
    """Bytes that the plan says and that torch's allocator counted, and the metrics of each step.

    Without CUDA nothing is counted: None.
    """
    model = qwen2(16, 1, 2, 1, 64, 32) if tiny else qwen2_5("1.5B")
    prompt = 8 if tiny else QWEN_PROMPT
    save_random_model(folder / "model", model, "bfloat16", 64 if tiny else TOKENS)
    cfg = config.load(
        [
            *ROLLOUT,
            *SAVINGS[CASES[case]],
            f"model.name={folder}/model",
            *task_options(folder, random_digits(256, prompt, prompt)),
            "optim.lr=1e-6",
            "eval.prompts=1",
            *(TINY if tiny else ()),
        ]
    )
    models, algorithm, data = build(cfg, train.generate_and_score)
    models.params = models.params._replace(eos_ids=())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()  # what making the model left there
        torch.cuda.reset_peak_memory_stats()
    state = State(kl_ref_coef=0.0, kl_old_coef=0.0)
    rows = []
    with data.scoring:
        for _ in range(steps):
            prompts, rng = step_inputs(cfg, data, state)
            metrics, _ = train.training_step(cfg, models, algorithm, data, state, prompts, rng)
            state.step += 1
            rows.append(metrics)
    counted = {
        "resident": torch.cuda.memory_allocated(),  # after a step: moments too
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
    planned = plan(cfg, models.policy.lm.config, prompt, algorithm.exact_kl, cuda)
    return {
        "options": [*ROLLOUT[1:], *SAVINGS[CASES[case]]],
        "planned": planned,
        "counted": counted if cuda else None,
        "steps": rows,
    }


def plan(cfg: Config, lm_config: Any, prompt: int, exact: bool, cuda: bool) -> dict[str, int]:
    """Bytes of the memory plan, by purpose and in total."""
    width = footprint.width_of(cfg, cuda)
    memory = footprint.memory(cfg, lm_config, prompt, width, exact, cuda)
    totals = ("resident", "sampling", "learning", "peak")
    return memory._asdict() | {name: getattr(memory, name) for name in totals}


def main() -> None:
    """Measure one case and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and rollout")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), args.case, args.steps, args.tiny)
    args.out.write_text(json.dumps({**where("transformers"), **row}, indent=1) + "\n")
    print(json.dumps({"planned": row["planned"], "counted": row["counted"]}, indent=1))


if __name__ == "__main__":
    main()
