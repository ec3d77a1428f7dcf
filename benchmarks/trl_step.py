"""A whole GRPO step against TRL's GRPOTrainer, on identical work:  python -m benchmarks.trl_step [--steps N]

Same first weights, prompts, group, reward, length of replies, AdamW, float32, no KL, one update a rollout. Both run in
this process, by turns: a step of ours after each step of TRL's. CPU seconds of one thread, seconds on CUDA.
Needs `trl` (pip install trl==1.16.0), which the project itself does not.
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
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import train as ours
from benchmarks.machine import clock, where
from rlkl import config
from rlkl.build import build, pick_device
from rlkl.terminal import console

PROMPTS, GROUP, VOCABULARY = 16, 8, 64
KINDS = {  # tokens of a reply; a random model ends with chance 1/64 a token: 205 of them are 30 % used
    "fixed": 128, "ragged": 205}
REWARD = """
def share(examples, replies, batch):
    digits = ((batch.response_ids >= 30) & (batch.response_ids < 40) & batch.mask).sum(1)
    return digits / batch.mask.sum(1), {}
"""


def checkpoint(folder: Path) -> Any:
    """A Qwen2 of 4M parameters with a tokenizer of single characters, saved as any other."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-=*?.,"]
    names += [f"<extra{i}>" for i in range(VOCABULARY - len(names))]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                        unk_token="<unk>", padding_side="left")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        tie_word_embeddings=False))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prompts() -> list[str]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (2048,), generator=g).tolist()
    return ["".join(str(d) for d in torch.randint(0, 10, (n,), generator=g).tolist()) for n in lengths]


class Ours:
    """Our step, as train.py runs it."""

    def __init__(self, folder: Path, kind: str) -> None:
        (folder / "share.py").write_text(REWARD)
        rows = [json.dumps({"prompt": p, "answer": "0"}) for p in prompts()]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        self.cfg = config.load([
            f"model.name={folder}/model", "model.reference=false", "task.name=jsonl",
            f"task.path={folder}/prompts.jsonl", f"reward.name={folder}/share.py:share", "sampling.backend.name=engine",
            f"sampling.prompts={PROMPTS}", f"sampling.group_size={GROUP}", f"sampling.max_new_tokens={KINDS[kind]}",
            "optim.lr=1e-5", "optim.warmup=0", "eval.prompts=1"])
        self.parts = build(self.cfg, pick_device("auto"), Console(quiet=True))
        if kind == "fixed":
            self.parts.rule = self.parts.rule._replace(eos_ids=())
        self.state = ours.State(0.0, 0.0)

    def step(self) -> tuple[float, int]:
        """(seconds, tokens)"""
        start = clock()
        row, _ = ours.training_step(self.cfg, self.parts, self.state)
        self.state.step += 1
        return clock() - start, int(row["tokens"])


def trainer(folder: Path, tokenizer: Any, kind: str, steps: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def share(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(30 <= t < 40 for t in ids) / max(len(ids), 1) for ids in completion_ids]

    cuda = torch.cuda.is_available()
    args = GRPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=PROMPTS * GROUP, gradient_accumulation_steps=1,
        num_generations=GROUP, max_completion_length=KINDS[kind], max_steps=steps, learning_rate=1e-5, beta=0.0,
        loss_type="dapo", temperature=1.0, use_cpu=not cuda, gradient_checkpointing=False, report_to="none", bf16=False,
        save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0, model_init_kwargs={"dtype": "float32"},
        generation_kwargs={"suppress_tokens": [0, 1]} if kind == "fixed" else None)
    return GRPOTrainer(model=str(folder / "model"), reward_funcs=share, args=args, processing_class=tokenizer,
                       train_dataset=Dataset.from_dict({"prompt": prompts()}))


def measure(kind: str, steps: int) -> dict[str, Any]:
    """Medians over the steps, the first of each left out, and of the ratios of neighbours."""
    mine: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        tokenizer = checkpoint(folder / "model")
        us, them = Ours(folder, kind), trainer(folder, tokenizer, kind, steps + 1)
        counted, generate = [0], them._generate

        def counting(*args: Any, **kwargs: Any) -> Any:
            out = generate(*args, **kwargs)
            counted[0] = sum(len(ids) for ids in out[1])
            return out

        them._generate = counting

        class Turns(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.start = clock()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                theirs.append((clock() - self.start, counted[0]))
                with us.parts.scoring:
                    mine.append(us.step())

        them.add_callback(Turns())
        them.train()
    mine, theirs = mine[1:], theirs[1:]
    per_token = [(b / m) / (a / n) for (a, n), (b, m) in zip(mine, theirs, strict=True)]
    return {"seconds": {"rlkl": statistics.median(a for a, _ in mine), "trl": statistics.median(b for b, _ in theirs)},
            "tokens": {"rlkl": statistics.median(n for _, n in mine), "trl": statistics.median(m for _, m in theirs)},
            "ratio_per_token": statistics.median(per_token), "steps": len(mine)}


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/rollout.md."""
    lines = ["| replies | rlkl, s a step | TRL, s a step | × TRL, a token |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {kind} | {r['seconds']['rlkl']:.2f} | {r['seconds']['trl']:.2f} | "
                                f"{r['ratio_per_token']:.2f} |" for kind, r in found["results"].items())])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {kind: measure(kind, args.steps) for kind in KINDS}
    for kind, row in results.items():
        seconds, tokens = row["seconds"], row["tokens"]
        console.print(f"{kind}: rlkl {seconds['rlkl']:.2f} s a step of {tokens['rlkl']:.0f} tokens, TRL "
                      f"{seconds['trl']:.2f} s of {tokens['trl']:.0f}: {row['ratio_per_token']:.2f} × a token")
    cuda = torch.cuda.is_available()
    found = {**where("transformers", "trl"), "clock": "seconds" if cuda else "CPU seconds", "prompts": PROMPTS,
             "group": GROUP, "results": results}
    out = args.out or Path(f"benchmarks/results/trl-step-{'cuda' if cuda else 'cpu'}.json")
    out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
