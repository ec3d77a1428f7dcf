"""Memory plans of the configurations for one GPU, and what saves memory.

python -m benchmarks.memory fills the tables of docs/examples.md and docs/models.md. The numbers are
computed by rlkl/explain/footprint.py, as a run prints them, and not measured. The shapes of Qwen2.5
are written down here, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from benchmarks.pages import fill, table
from rlkl.explain import footprint
from rlkl.explain.footprint import Memory
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.schema import Config
from rlkl.supervised.schema import Scratch
from rlkl.supervised.scratch import architecture, character_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("examples", "models")]
# Hidden size, layers, heads and MLP size.
QWEN = {"0.5B": (896, 24, 14, 4864), "1.5B": (1536, 28, 12, 8960), "3B": (2048, 36, 16, 11008)}
QWEN_PROMPT = 256  # tokens of the longest prompt, where a configuration does not give it
SCRATCH = Scratch(layers=12, hidden=768, heads=12, context=64)  # of configs/scratch-sft.yaml
SCRATCH_PROMPT = 20
CONFIGS = (
    "gsm8k-ppo",
    "gsm8k-grpo",
    "gsm8k-1.5b-ppo",
    "gsm8k-1.5b-grpo",
    "gsm8k-lora-24gb",
    "countdown-3b",
    "rlhf-0.5b",
    "scratch-countdown",
)
ROLLOUT = (
    "model.name=Qwen/Qwen2.5-1.5B",
    "model.dtype=bfloat16",
    "sampling.prompts=32",
    "sampling.group_size=8",
    "sampling.max_new_tokens=512",
    "optim.micro_tokens=8192",
)
SAVINGS = {  # a row of docs/models.md → its options
    "all weights, `optim.micro_tokens=8192`": (),
    "and `model.gradient_checkpointing=true optim.offload=true`": (
        "model.gradient_checkpointing=true",
        "optim.offload=true",
    ),
    "`lora.r=32 optim.micro_tokens=4096`": ("lora.r=32", "optim.micro_tokens=4096"),
    "`lora.r=32 optim.micro_tokens=8192 model.gradient_checkpointing=true`": (
        "lora.r=32",
        "model.gradient_checkpointing=true",
    ),
}


def shape(name: str) -> Qwen2Config | LlamaConfig:
    """The architecture of a Qwen2.5, or of the model that scratch-sft trains."""
    size = next((size for size in QWEN if f"Qwen2.5-{size}" in name), None)
    if size is None:
        return architecture(character_tokenizer(), SCRATCH)
    hidden, layers, heads, mlp = QWEN[size]
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=mlp,
        tie_word_embeddings=True,
    )


def plan(cfg: Config) -> Memory:
    """The memory plan of a configuration on a GPU."""
    longest = QWEN_PROMPT if "Qwen" in cfg.model.name else SCRATCH_PROMPT
    return footprint.memory(
        cfg,
        shape(cfg.model.name),
        cfg.sampling.max_prompt_tokens or longest,
        footprint.width_of(cfg, cuda=True),
        resolve_algorithm(cfg).exact_kl,
        cuda=True,
    )


def gigabytes(memory: Memory) -> list[str]:
    """The four totals of a plan, in GB."""
    totals = memory.resident, memory.sampling, memory.learning, memory.peak
    return [f"{total / 1e9:.1f}" for total in totals]


def sections() -> dict[str, str]:
    """The tables `plans` and `savings`."""
    plans = {
        f"[{name}](../configs/{name}.yaml)": config.load([str(ROOT / "configs" / f"{name}.yaml")])
        for name in CONFIGS
    }
    savings = {title: config.load([*ROLLOUT, *changes]) for title, changes in SAVINGS.items()}
    return {"plans": plan_table(plans), "savings": plan_table(savings)}


def plan_table(configs: dict[str, Config]) -> str:
    """One row for each configuration, by title."""
    lines = [[title, *gigabytes(plan(cfg))] for title, cfg in configs.items()]
    return table(["", "always", "sampling", "learning", "peak, GB"], lines)


if __name__ == "__main__":
    fill(PAGES, sections())
