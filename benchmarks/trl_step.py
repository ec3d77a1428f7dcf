"""A whole GRPO step against TRL's GRPOTrainer, on identical work.

    python -m benchmarks.trl_step [--steps N]

Both have the same first weights, prompts, group size, reward, response lengths, AdamW, float32, no
KL and one update per rollout. Both run in this process: a step of ours follows each step of TRL's.
CPU seconds of one thread, or wall seconds on CUDA. This benchmark needs `pip install trl==1.16.0`,
which is no dependency of the project.
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
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import train
from benchmarks.machine import clock, where
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.run.terminal import console

PROMPTS = 16
GROUP = 8
VOCABULARY = 64
# The longest response in tokens. A random model ends a response with a chance of 1/64 per token, so
# ragged responses are 30 % as long on average.
KINDS = {"fixed": 128, "ragged": 205}
FIRST_DIGIT = 30  # the ids of the digits, which the reward counts
REWARD = f"""
def share(examples, responses, batch):
    ids = batch.response_ids
    digits = ((ids >= {FIRST_DIGIT}) & (ids < {FIRST_DIGIT + 10}) & batch.mask).sum(1)
    return digits / batch.mask.sum(1), {{}}
"""


def checkpoint(folder: Path) -> Any:
    """Save a Qwen2 of 4M parameters with a tokenizer of characters. Returns the tokenizer."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-=*?.,"]
    names += [f"<extra{i}>" for i in range(VOCABULARY - len(names))]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prompts() -> list[str]:
    """2048 prompts of 16 to 64 digits."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (2048,), generator=rng).tolist()
    return [random_digits(length, rng) for length in lengths]


def random_digits(length: int, rng: torch.Generator) -> str:
    digits = torch.randint(0, 10, (length,), generator=rng).tolist()
    return "".join(str(digit) for digit in digits)


class Ours:
    """Our training step, as train.py runs it."""

    def __init__(self, folder: Path, kind: str) -> None:
        (folder / "share.py").write_text(REWARD)
        rows = [json.dumps({"prompt": p, "answer": "0"}) for p in prompts()]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        self.cfg = config.load(
            [
                f"model.name={folder}/model",
                "model.reference=false",
                "task.name=jsonl",
                f"task.path={folder}/prompts.jsonl",
                f"reward.name={folder}/share.py:share",
                "sampling.backend.name=engine",
                f"sampling.prompts={PROMPTS}",
                f"sampling.group_size={GROUP}",
                f"sampling.max_new_tokens={KINDS[kind]}",
                "optim.lr=1e-5",
                "optim.warmup=0",
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


def trainer(folder: Path, tokenizer: Any, kind: str, steps: int) -> Any:
    """TRL's GRPOTrainer for the same work."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        digits = range(FIRST_DIGIT, FIRST_DIGIT + 10)
        return [sum(t in digits for t in ids) / max(len(ids), 1) for ids in completion_ids]

    cuda = torch.cuda.is_available()
    args = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=KINDS[kind],
        max_steps=steps,
        learning_rate=1e-5,
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        report_to="none",
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
        generation_kwargs={"suppress_tokens": [0, 1]} if kind == "fixed" else None,
    )
    return GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=share,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts()}),
    )


def measure(kind: str, steps: int) -> dict[str, Any]:
    """Medians over the steps and over the ratios of neighbours, without the first step of each."""
    our_steps: list[tuple[float, int]] = []  # seconds, tokens
    trl_steps: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        tokenizer = checkpoint(folder / "model")
        ours = Ours(folder, kind)
        trl = trainer(folder, tokenizer, kind, steps + 1)
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a line for each kind and write the results. Returns what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {kind: measure(kind, args.steps) for kind in KINDS}
    for kind, row in results.items():
        seconds, tokens = row["seconds"], row["tokens"]
        console.print(
            f"{kind}: rlkl {seconds['rlkl']:.2f} s a step of {tokens['rlkl']:.0f} tokens, TRL "
            f"{seconds['trl']:.2f} s of {tokens['trl']:.0f}: {row['ratio_per_token']:.2f} × a token"
        )
    cuda = torch.cuda.is_available()
    measured = {
        **where("transformers", "trl"),
        "clock": "seconds" if cuda else "CPU seconds",
        "prompts": PROMPTS,
        "group": GROUP,
        "results": results,
    }
    out = args.out or Path(f"benchmarks/results/trl-step-{'cuda' if cuda else 'cpu'}.json")
    out.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


if __name__ == "__main__":
    main()
