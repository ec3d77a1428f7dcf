"""A whole GRPO step against TRL's GRPOTrainer, on identical work.

    python -m benchmarks.trl_step [--steps N] [--size 0.5B] [--vocabulary 32768] …

Both have the same first weights, dtype, prompts, group size, reward, lengths, AdamW, no KL and one
update per rollout. Both run in this process: a step of ours follows each step of TRL's. CPU seconds
of one thread, or wall seconds on CUDA. Prompts have between half of `--prompt` tokens and all of
them. Responses are all of `--response` tokens ("fixed"), or end by chance at each token, after 43 %
of that on average ("ragged").

With bfloat16 both keep the weights in it. Ours steps float32 copies of them, TRL's AdamW the
weights themselves. This benchmark needs `pip install trl==1.16.0`, which is no dependency of the
project.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers import TrainerCallback

import train
from benchmarks.machine import clock, commit_of, where
from benchmarks.synthetic import qwen2, qwen2_5, random_digits, save_random_model, task_options
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.run.terminal import console

KINDS = ("fixed", "ragged")
SIZES = ("5M", "0.5B", "1.5B")
# The mean length of ragged responses is (1 - e^-ENDS) / ENDS of the longest.
ENDS = 2.0
# So small that the chance to end stays what it is: a step takes as long with any other.
LEARNING_RATE = 1e-8


class Work(NamedTuple):
    """A model, and the tokens of a step."""

    size: str = "5M"  # parameters
    vocabulary: int = 8192
    dtype: str = "float32"
    prompt: int = 128  # tokens of the longest prompt
    response: int = 128  # tokens of the longest response
    prompts: int = 16
    group: int = 8
    micro_batches: int = 1  # passes through the model per update

    @property
    def model(self) -> dict:
        """Options of Qwen2Config. The small one has 5.2M parameters with 8,192 tokens."""
        if self.size == "5M":
            return qwen2(256, 6, 4, 2, self.vocabulary, 512)
        return qwen2_5(self.size, self.vocabulary)

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def texts(self) -> list[str]:
        """2048 prompts, one token a character."""
        return random_digits(2048, self.prompt // 2, self.prompt)


def save_model(folder: Path, work: Work, kind: str) -> Any:
    """Save the model that both sides start from. Returns its tokenizer."""
    end = ENDS / work.response if kind == "ragged" else 0.0
    return save_random_model(folder, work.model, work.dtype, work.vocabulary, end)


class Ours:
    """Our training step, as train.py runs it."""

    def __init__(self, folder: Path, work: Work, kind: str) -> None:
        tokens = work.rows * (work.prompt + work.response)
        self.cfg = config.load(
            [
                f"model.name={folder}/model",
                f"model.dtype={work.dtype}",
                "model.reference=false",
                *task_options(folder, work.texts()),
                "sampling.backend.name=engine",
                f"sampling.prompts={work.prompts}",
                f"sampling.group_size={work.group}",
                f"sampling.max_new_tokens={work.response}",
                f"optim.lr={LEARNING_RATE}",
                "optim.warmup=0",
                f"optim.micro_tokens={tokens // work.micro_batches}",
                "eval.prompts=1",
            ]
        )
        self.models, self.algorithm, self.data = build(self.cfg, train.generate_and_score)
        if kind == "fixed":
            self.models.params = self.models.params._replace(eos_ids=())
        self.state = State(kl_ref_coef=0.0, kl_old_coef=0.0)

    def step(self) -> tuple[float, int]:
        """Run one step. Returns its seconds and the number of sampled tokens."""
        start = clock()
        prompts, rng = step_inputs(self.cfg, self.data, self.state)
        metrics, _ = train.training_step(
            self.cfg, self.models, self.algorithm, self.data, self.state, prompts, rng
        )
        self.state.step += 1
        return clock() - start, int(metrics["tokens"])


def trainer(folder: Path, tokenizer: Any, work: Work, kind: str, steps: int) -> Any:
    """TRL's GRPOTrainer for the same work."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]

    args = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=work.rows // work.micro_batches,
        gradient_accumulation_steps=work.micro_batches,
        num_generations=work.group,
        max_completion_length=work.response,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        bf16=False,  # no autocast: the weights have the dtype
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        model_init_kwargs={"dtype": work.dtype},
        generation_kwargs={"suppress_tokens": [0, 1]} if kind == "fixed" else None,
    )
    return GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=share,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": work.texts()}),
    )


def measure(work: Work, kind: str, steps: int) -> dict[str, Any]:
    """Medians over the steps and over the ratios of neighbours, without the first step of each."""
    our_steps: list[tuple[float, int]] = []  # seconds, tokens
    trl_steps: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        tokenizer = save_model(folder / "model", work, kind)
        ours = Ours(folder, work, kind)
        trl = trainer(folder, tokenizer, work, kind, steps + 1)
        dtypes = ours.models.policy.lm.dtype, trl.model.dtype
        if dtypes != (getattr(torch, work.dtype),) * 2:
            raise RuntimeError(f"both sides are to be {work.dtype}: {dtypes}")
        generate = trl._generate
        tokens = 0  # of TRL's last rollout

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            out = generate(*args, **kwargs)
            tokens = sum(len(ids) for ids in out[1])
            return out

        class Alternate(TrainerCallback):
            """A step of ours after each step of TRL's."""

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.start = clock()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                trl_steps.append((clock() - self.start, tokens))
                with ours.data.scoring:
                    our_steps.append(ours.step())

        trl._generate = counting
        trl.add_callback(Alternate())
        trl.train()
    return summary(our_steps[1:], trl_steps[1:])


def summary(ours: list[tuple[float, int]], trl: list[tuple[float, int]]) -> dict[str, Any]:
    """Medians of (seconds, tokens), and of the ratio of seconds per token, TRL's to ours."""
    per_token = [
        (trl_seconds / trl_tokens) / (our_seconds / our_tokens)
        for (our_seconds, our_tokens), (trl_seconds, trl_tokens) in zip(ours, trl, strict=True)
    ]
    both = {"rlkl": ours, "trl": trl}
    return {
        "seconds": {name: statistics.median(s for s, _ in steps) for name, steps in both.items()},
        "tokens": {name: statistics.median(n for _, n in steps) for name, steps in both.items()},
        "ratio_per_token": statistics.median(per_token),
        "steps": len(ours),
    }


def markdown(measured: dict[str, Any]) -> str:
    """The table of docs/rollout.md."""
    lines = ["| responses | rlkl, s a step | TRL, s a step | × TRL, a token |", "|---|---|---|---|"]
    for kind, row in measured["results"].items():
        seconds, ratio = row["seconds"], row["ratio_per_token"]
        lines.append(f"| {kind} | {seconds['rlkl']:.2f} | {seconds['trl']:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Each field of Work is an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Work()
    parser.add_argument("--size", choices=SIZES, default=default.size)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype)
    for name in ("vocabulary", "prompt", "response", "prompts", "group", "micro_batches"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(f"benchmarks/results/trl-step-{device}.json")
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a line for each kind and write the results after it. Returns what it wrote."""
    args = parse(argv)
    work = Work(**{name: getattr(args, name) for name in Work._fields})
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    measured: dict[str, Any] = {
        **where("transformers", "trl"),
        "clock": "seconds" if torch.cuda.is_available() else "CPU seconds",
        "commit": commit_of(Path(__file__).parents[1]),
        **work._asdict(),
        "results": {},
    }
    for kind in args.kinds:
        row = measure(work, kind, args.steps)
        measured["results"][kind] = row
        args.out.write_text(json.dumps(measured, indent=1) + "\n")
        seconds, tokens = row["seconds"], row["tokens"]
        console.print(
            f"{kind}: rlkl {seconds['rlkl']:.2f} s a step of {tokens['rlkl']:.0f} tokens, TRL "
            f"{seconds['trl']:.2f} s of {tokens['trl']:.0f}: {row['ratio_per_token']:.2f} × a token"
        )
    return measured


if __name__ == "__main__":
    main()
