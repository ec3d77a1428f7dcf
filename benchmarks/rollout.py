"""Rollouts against Hugging Face's, on identical work:  python -m benchmarks.rollout [--quick] [--out FILE]

CPU seconds of one thread, seconds on CUDA; runs alternate, and the ratio is the median of the pairs' ratios. Replies
are all of full length ("fixed"), or end by chance, which makes them 30 % as long on average ("ragged").
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from benchmarks.machine import clock, where
from rlkl.model import Policy, left_pad
from rlkl.rollout import cached, engine
from rlkl.rollout.engine import Run
from rlkl.rollout.sample import draw_uniforms, sampling_mode
from rlkl.terminal import console
from rlkl.types import Sampling


class Work(NamedTuple):
    name: str
    config: dict
    prompts: int
    group: int
    tokens: int
    lengths: tuple[int, int] = (16, 64)  # of prompts


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, ffn: int) -> dict:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn,
            "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 2048,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


CPU = [Work("5.6M", qwen2(256, 6, 8, 2, 4096, 768), 32, 8, 128)]
QUICK = [Work("0.1M", qwen2(64, 2, 4, 2, 512, 192), 4, 4, 24)]
CUDA = [  # the shapes of Qwen2.5 with random weights: 256 replies of up to 512 tokens at once
    Work("0.5B", qwen2(896, 24, 14, 2, 151_936, 4864), 64, 8, 512, (64, 256)),
    Work("1.5B", qwen2(1536, 28, 12, 2, 151_936, 8960), 64, 8, 512, (64, 256)),
    Work("3B", qwen2(2048, 36, 16, 2, 151_936, 11008), 64, 8, 512, (64, 256)),
    Work("7B", qwen2(3584, 28, 28, 4, 152_064, 18944) | {"tie_word_embeddings": False}, 64, 8, 512, (64, 256)),
]
ONCE = {"generate_batch"}  # too slow to be run in each pair
GOALS = {"0.5B": 110_000, "1.5B": 65_000, "3B": 45_000, "7B": 25_000}  # tokens a second on an H200


class Setting:
    """One model, its prompts, and the set of ids that end a reply."""

    def __init__(self, work: Work, ragged: bool) -> None:
        self.work, device = work, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            self.lm = AutoModelForCausalLM.from_config(Qwen2Config(**work.config), attn_implementation="sdpa",
                                                       dtype=dtype).eval()
        vocabulary = work.config["vocab_size"]
        # a random model is nearly uniform: ending with chance 3.2/T makes replies 30 % as long as T on average
        ends = round(vocabulary * 3.2 / work.tokens) if ragged else 0
        self.policy, self.rule = Policy(self.lm), Sampling(eos_ids=tuple(range(vocabulary - ends, vocabulary)))
        g = torch.Generator().manual_seed(1)
        lengths = torch.randint(work.lengths[0], work.lengths[1] + 1, (work.prompts,), generator=g).tolist()
        self.prompts = [torch.randint(1, vocabulary - ends, (n,), generator=g).tolist() for n in lengths]
        self.ids, self.mask = left_pad(self.prompts, 0, device)
        self.eos = torch.tensor(self.rule.eos_ids, dtype=torch.long, device=device)

    def uniforms(self, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return draw_uniforms(self.work.prompts * self.work.group, self.work.tokens, rng, self.ids.device)

    def ours(self, sampler: Callable, seed: int, **options) -> int:
        return int(sampler(self.policy, self.ids, self.mask, self.uniforms(seed), self.rule, **options).mask.sum())

    def generate(self, seed: int) -> int:
        """transformers' generate: padded, as long as the slowest row."""
        torch.manual_seed(seed)
        with torch.no_grad():
            out = self.lm.generate(
                input_ids=self.ids, attention_mask=self.mask.long(), num_return_sequences=self.work.group,
                max_new_tokens=self.work.tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=list(self.rule.eos_ids) or None, pad_token_id=0)[:, self.ids.shape[1] :]
        ended = torch.isin(out, self.eos)
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())

    def generate_batch(self, seed: int) -> int:
        """transformers' continuous batching, a request a sample."""
        torch.manual_seed(seed)
        config = GenerationConfig(max_new_tokens=self.work.tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                  eos_token_id=list(self.rule.eos_ids) or -1, pad_token_id=0)
        asked = [p for p in self.prompts for _ in range(self.work.group)]
        own = self.lm.config._attn_implementation
        try:
            found = self.lm.generate_batch(inputs=asked, generation_config=config, progress_bar=False)
        finally:
            self.lm.set_attn_implementation(own)
        return sum(len(x.generated_tokens) for x in found.values())

    def slot_use(self) -> float:
        """Tokens for each step of a slot: 1 if none ever works in vain."""
        with sampling_mode(self.policy):
            run = Run(self.policy, self.prompts, self.uniforms(0), self.rule, 128, None)
            run.to_the_end(4, graphs=False, compile=False)
        return int(run.length[:-1].sum()) / run.slot_steps

    def matmuls(self, rows: int) -> float:
        """Seconds of all matrix products of one decoding step alone: what no decoder of `rows` rows can go below."""
        linears = [m for m in self.lm.modules() if isinstance(m, nn.Linear)]
        inputs = [torch.randn(rows, m.in_features, dtype=m.weight.dtype, device=m.weight.device) for m in linears]
        times = []
        with torch.no_grad():
            for _ in range(7):
                start = clock()
                for linear, x in zip(linears, inputs, strict=True):
                    linear(x)
                times.append(clock() - start)
        return statistics.median(times)


def measure(work: Work, ragged: bool, pairs: int) -> dict:
    """Alternating runs of every backend; medians of tokens a second and of the ratios to generate's."""
    setting = Setting(work, ragged)
    runs = {"engine": lambda seed: setting.ours(engine, seed), "cached": lambda seed: setting.ours(cached, seed),
            "generate": setting.generate, "generate_batch": setting.generate_batch}
    if torch.cuda.is_available():
        runs["engine, compiled"] = lambda seed: setting.ours(engine, seed, compile=True)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for pair in range(-1, pairs):  # the first round warms up
        for name, run in runs.items():
            if name in failed or (name in ONCE and pair):
                continue
            start = clock()
            try:
                tokens = run(max(pair, 0))
            except Exception as error:  # somebody else's code
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            if pair >= 0:
                found[name].append((tokens / (clock() - start), tokens))
    rates = {name: [rate for rate, _ in rows] for name, rows in found.items() if rows}
    floor = setting.matmuls(128)
    return {
        "tokens_per_second": {name: statistics.median(x) for name, x in rates.items()},
        "ratio_to_generate": {name: statistics.median(a / b for a, b in zip(x, rates["generate"], strict=False))
                              for name, x in rates.items()},
        "slot_use": setting.slot_use(), "row_use_of_generate": found["generate"][0][1] / (
            work.prompts * work.group * work.tokens),
        "share_of_matmul_roofline": statistics.median(rates["engine"]) / (128 / floor), "failed": failed,
        "tokens": found["engine"][0][1]}


def markdown(found: dict) -> str:
    """The table of docs/rollout.md."""
    lines = ["| work | backend | tokens a second | × `generate` |", "|---|---|---|---|"]
    for name, row in found["results"].items():
        lines += [f"| {name} | {backend} | {rate:,.0f} | {row['ratio_to_generate'][backend]:.2f} |"
                  for backend, rate in row["tokens_per_second"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one pair")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    works = QUICK if args.quick else CUDA if cuda else CPU
    results = {f"{work.name}, {kind}": measure(work, kind == "ragged", 1 if args.quick else args.pairs)
               for work in works for kind in ("fixed", "ragged")}
    table = Table("", "backend", "tokens/s", "× generate", title="rollouts, medians of alternating runs")
    for name, row in results.items():
        for backend, rate in row["tokens_per_second"].items():
            table.add_row(name, backend, f"{rate:,.0f}", f"{row['ratio_to_generate'][backend]:.2f}")
        for backend, why in row["failed"].items():
            table.add_row(name, backend, "—", why)
    console.print(table)
    found = {**where("transformers"), "clock": "seconds" if cuda else "CPU seconds", "goals_on_h200": GOALS,
             "measured_on_cuda": cuda, "results": results}
    out = args.out or Path(f"benchmarks/results/rollout-{'cuda' if cuda else 'cpu'}.json")
    out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
