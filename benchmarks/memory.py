"""The memory plan of every configuration for one GPU, and of what saves memory:  python -m benchmarks.memory

Computed, not measured: by rlkl/explain/footprint.py, as a run prints it, with the shapes of Qwen2.5 by hand instead
of a download. Fills the tables of docs/examples.md and docs/models.md.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from benchmarks.pages import fill, table
from rlkl import config
from rlkl.algorithm import algorithm
from rlkl.explain import footprint
from rlkl.explain.footprint import Memory
from rlkl.schema import Config
from rlkl.schema_supervised import Scratch
from rlkl.scratch import architecture, character_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("examples", "models")]
PROMPT = 256  # tokens of the longest one, where a config does not say
QWEN = {"0.5B": (896, 24, 14, 4864), "1.5B": (1536, 28, 12, 8960), "3B": (2048, 36, 16, 11008)}
SCRATCH, SCRATCH_PROMPT = Scratch(layers=12, hidden=768, heads=12, context=64), 20  # of configs/scratch-sft.yaml
CONFIGS = ("gsm8k-ppo", "gsm8k-grpo", "gsm8k-1.5b-ppo", "gsm8k-1.5b-grpo", "gsm8k-lora-24gb", "countdown-3b",
           "rlhf-0.5b", "scratch-countdown")
ROLLOUT = ("model.name=Qwen/Qwen2.5-1.5B", "model.dtype=bfloat16", "sampling.prompts=32", "sampling.group_size=8",
           "sampling.max_new_tokens=512", "optim.micro_tokens=8192")
SAVINGS = {  # the options of a row of docs/models.md
    "all weights, `optim.micro_tokens=8192`": (),
    "and `model.checkpointing=true optim.offload=true`": ("model.checkpointing=true", "optim.offload=true"),
    "`lora.r=32 optim.micro_tokens=4096`": ("lora.r=32", "optim.micro_tokens=4096"),
    "`lora.r=32 optim.micro_tokens=8192 model.checkpointing=true`": ("lora.r=32", "model.checkpointing=true")}


def shape(name: str) -> Qwen2Config | LlamaConfig:
    """Of Qwen2.5, or of the model that scratch-sft leaves."""
    size = next((size for size in QWEN if f"Qwen2.5-{size}" in name), None)
    if size is None:
        return architecture(character_tokenizer(), SCRATCH)
    hidden, layers, heads, wide = QWEN[size]
    return Qwen2Config(vocab_size=151_936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=2, intermediate_size=wide, tie_word_embeddings=True)


def plan(cfg: Config) -> Memory:
    """On a GPU."""
    known = PROMPT if "Qwen" in cfg.model.name else SCRATCH_PROMPT
    return footprint.memory(cfg, shape(cfg.model.name), cfg.sampling.max_prompt_tokens or known,
                            footprint.width_of(cfg, cuda=True), algorithm(cfg).exact, cuda=True)


def numbers(found: Memory) -> list[str]:
    """In GB."""
    return [f"{x / 1e9:.1f}" for x in (found.resident, found.sampling, found.learning, found.peak)]


def sections() -> dict[str, str]:
    head = ["always", "sampling", "learning", "peak, GB"]
    plans = {f"[{name}](../configs/{name}.yaml)": config.load([str(ROOT / "configs" / f"{name}.yaml")])
             for name in CONFIGS}
    savings = {name: config.load([*ROLLOUT, *changes]) for name, changes in SAVINGS.items()}
    return {name: table(["", *head], [[title, *numbers(plan(cfg))] for title, cfg in rows.items()])
            for name, rows in (("plans", plans), ("savings", savings))}


if __name__ == "__main__":
    fill(PAGES, sections())
