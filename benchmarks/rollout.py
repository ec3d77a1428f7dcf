"""Rollouts against those of Hugging Face's transformers, on identical work.

    python -m benchmarks.rollout [--quick] [--works NAME ...] [--kinds fixed] [--out FILE]

CPU seconds of one thread, or wall seconds on CUDA. Runs alternate, and a ratio is the median of
the pairs' ratios. Responses are all of full length ("fixed"), or end at random, which makes them
30 % as long on average ("ragged").
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from benchmarks.machine import clock, where
from benchmarks.synthetic import qwen2, qwen2_5
from rlkl.policy.policy import Policy
from rlkl.rollout import cached, engine
from rlkl.rollout.engine import ContinuousBatch
from rlkl.rollout.sampling import draw_uniforms, left_pad, sampling_mode
from rlkl.run.terminal import console
from rlkl.types import SamplingParams


class Work(NamedTuple):
    """A model and a rollout of `prompts * group` responses."""

    name: str
    config: dict  # of Qwen2Config
    prompts: int
    group: int
    tokens: int  # the longest response
    lengths: tuple[int, int] = (16, 64)  # of prompts


CPU = [Work("5.6M", qwen2(256, 6, 8, 2, 4096, 768), 32, 8, 128)]
QUICK = [Work("0.1M", qwen2(64, 2, 4, 2, 512, 192), 4, 4, 24)]
# The shapes of Qwen2.5 with random weights: 512 responses of up to 512 tokens.
CUDA = [Work(size, qwen2_5(size), 64, 8, 512, (64, 256)) for size in ("0.5B", "1.5B", "3B", "7B")]
WORKS = {work.name: work for work in [*QUICK, *CPU, *CUDA]}
KINDS = ("fixed", "ragged")
OPTIONAL = ("cached", "generate_batch", "engine, compiled")  # ratios need the others
ONCE = {"generate_batch"}  # too slow to be run in each pair
# Tokens per second on an H200 that are aimed at.
GOALS = {"0.5B": 110_000, "1.5B": 65_000, "3B": 45_000, "7B": 25_000}
ENGINE_SLOTS = 128


class Setting:
    """A model with random weights, its prompts, and the set of ids that end a response."""

    def __init__(self, work: Work, ragged: bool) -> None:
        self.work = work
        cuda = torch.cuda.is_available()
        device = "cuda" if cuda else "cpu"
        torch.manual_seed(0)
        with torch.device(device):
            self.lm = AutoModelForCausalLM.from_config(
                Qwen2Config(**work.config),
                attn_implementation="sdpa",
                dtype=torch.bfloat16 if cuda else torch.float32,
            ).eval()
        vocabulary = work.config["vocab_size"]
        # A random model is nearly uniform: a chance of 3.2/T per token to end makes responses 30 %
        # as long as T on average.
        ends = round(vocabulary * 3.2 / work.tokens) if ragged else 0
        self.policy = Policy(self.lm)
        self.params = SamplingParams(eos_ids=tuple(range(vocabulary - ends, vocabulary)))
        rng = torch.Generator().manual_seed(1)
        shortest, longest = work.lengths
        lengths = torch.randint(shortest, longest + 1, (work.prompts,), generator=rng).tolist()
        self.prompts = [
            torch.randint(1, vocabulary - ends, (n,), generator=rng).tolist() for n in lengths
        ]
        self.ids, self.mask = left_pad(self.prompts, 0, device)
        self.eos = torch.tensor(self.params.eos_ids, dtype=torch.long, device=device)

    def uniforms(self, seed: int) -> Tensor:
        """(B, T) the randomness of our rollouts."""
        rng = torch.Generator().manual_seed(seed)
        rows = self.work.prompts * self.work.group
        return draw_uniforms(rows, self.work.tokens, rng, self.ids.device)

    def ours(self, sampler: Callable, seed: int, **options: Any) -> int:
        """Run one of our rollout backends. Returns the number of sampled tokens."""
        uniforms = self.uniforms(seed)
        batch = sampler(self.policy, self.ids, self.mask, uniforms, self.params, **options)
        return int(batch.mask.sum())

    def generate(self, seed: int) -> int:
        """transformers' generate: padded, as long as the longest row. Returns sampled tokens."""
        torch.manual_seed(seed)
        with torch.no_grad():
            out = self.lm.generate(
                input_ids=self.ids,
                attention_mask=self.mask.long(),
                num_return_sequences=self.work.group,
                max_new_tokens=self.work.tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=list(self.params.eos_ids) or None,
                pad_token_id=0,
            )[:, self.ids.shape[1] :]
        ended = torch.isin(out, self.eos)
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())

    def generate_batch(self, seed: int) -> int:
        """transformers' continuous batching, one request per sample. Returns sampled tokens."""
        torch.manual_seed(seed)
        config = GenerationConfig(
            max_new_tokens=self.work.tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(self.params.eos_ids) or -1,
            pad_token_id=0,
        )
        requests = [p for p in self.prompts for _ in range(self.work.group)]
        attention = self.lm.config._attn_implementation
        try:
            outputs = self.lm.generate_batch(
                inputs=requests, generation_config=config, progress_bar=False
            )
        finally:
            self.lm.set_attn_implementation(attention)
        return sum(len(output.generated_tokens) for output in outputs.values())

    def slot_use(self) -> float:
        """Tokens per step of a slot of the engine: 1 if no slot ever waits."""
        with sampling_mode(self.policy):
            batch = ContinuousBatch(
                self.policy, self.prompts, self.uniforms(0), self.params, ENGINE_SLOTS
            )
            batch.decode(4)
        return int(batch.state.lengths[:-1].sum()) / batch.slot_steps

    def matmuls(self, rows: int) -> float:
        """Seconds of the matrix products of one decoding step of `rows` rows: a lower bound."""
        linears = [m for m in self.lm.modules() if isinstance(m, nn.Linear)]
        inputs = [
            torch.randn(rows, m.in_features, dtype=m.weight.dtype, device=m.weight.device)
            for m in linears
        ]
        times = []
        with torch.no_grad():
            for _ in range(7):
                start = clock()
                for linear, x in zip(linears, inputs, strict=True):
                    linear(x)
                times.append(clock() - start)
        return statistics.median(times)


def measure(work: Work, ragged: bool, pairs: int, without: Sequence[str] = ()) -> dict:
    """Alternating runs of every backend: medians of tokens per second and of ratios to generate.

    without: names of backends that are not run.
    """
    setting = Setting(work, ragged)
    runs = {
        "engine": lambda seed: setting.ours(engine, seed),
        "cached": lambda seed: setting.ours(cached, seed),
        "generate": setting.generate,
        "generate_batch": setting.generate_batch,
    }
    if torch.cuda.is_available():
        runs["engine, compiled"] = lambda seed: setting.ours(engine, seed, compile=True)
    runs = {name: run for name, run in runs.items() if name not in without}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, int] = {}  # of the first measured run
    failed: dict[str, str] = {}
    for pair in range(-1, pairs):  # the first round warms up
        for name, run in runs.items():
            if name in failed or (name in ONCE and pair):
                continue
            start = clock()
            try:
                count = run(max(pair, 0))
            except Exception as error:  # a backend of transformers may fail in any way
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            if pair >= 0:
                rates[name].append(count / (clock() - start))
                tokens.setdefault(name, count)
    rates = {name: x for name, x in rates.items() if x}
    roofline = ENGINE_SLOTS / setting.matmuls(ENGINE_SLOTS)  # tokens per second
    return {
        "tokens_per_second": {name: statistics.median(x) for name, x in rates.items()},
        "ratio_to_generate": {name: ratio(x, rates["generate"]) for name, x in rates.items()},
        "slot_use": setting.slot_use(),
        "row_use_of_generate": tokens["generate"] / (work.prompts * work.group * work.tokens),
        "share_of_matmul_roofline": statistics.median(rates["engine"]) / roofline,
        "failed": failed,
        "tokens": tokens["engine"],
    }


def ratio(rates: list[float], others: list[float]) -> float:
    """The median of the ratios of runs that were next to each other."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=False))


def markdown(measured: dict) -> str:
    """The table of docs/rollout.md."""
    lines = ["| work | backend | tokens a second | × `generate` |", "|---|---|---|---|"]
    for name, row in measured["results"].items():
        for backend, rate in row["tokens_per_second"].items():
            relative = row["ratio_to_generate"][backend]
            lines.append(f"| {name} | {backend} | {rate:,.0f} | {relative:.2f} |")
    return "\n".join(lines)


def show(results: dict) -> None:
    """Print a table of all results."""
    title = "rollouts, medians of alternating runs"
    table = Table("", "backend", "tokens/s", "× generate", title=title)
    for name, row in results.items():
        for backend, rate in row["tokens_per_second"].items():
            table.add_row(name, backend, f"{rate:,.0f}", f"{row['ratio_to_generate'][backend]:.2f}")
        for backend, reason in row["failed"].items():
            table.add_row(name, backend, "—", reason)
    console.print(table)


def parse(argv: list[str] | None, cuda: bool) -> argparse.Namespace:
    """The command line, with what it leaves out filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one pair")
    parser.add_argument("--works", nargs="+", choices=WORKS, help="default: all of this device")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--without", nargs="+", choices=OPTIONAL, default=[])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.works is None:
        works = QUICK if args.quick else CUDA if cuda else CPU
        args.works = [work.name for work in works]
    if args.quick:
        args.pairs = 1
    if args.out is None:
        args.out = Path(f"benchmarks/results/rollout-{'cuda' if cuda else 'cpu'}.json")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Measure, write the results after each work, and print a table. Returns what was written."""
    cuda = torch.cuda.is_available()
    args = parse(argv, cuda)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    measured = {
        **where("transformers"),
        "clock": "seconds" if cuda else "CPU seconds",
        "goals_on_h200": GOALS,
        "measured_on_cuda": cuda,
        "results": {},
    }
    for name in args.works:
        for kind in args.kinds:
            row = measure(WORKS[name], kind == "ragged", args.pairs, args.without)
            measured["results"][f"{name}, {kind}"] = row
            args.out.write_text(json.dumps(measured, indent=1) + "\n")
    show(measured["results"])
    return measured


if __name__ == "__main__":
    main()
