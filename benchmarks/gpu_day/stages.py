"""The stages of a GPU day, in the order of their value, and the commands that each consists of."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

# Imported name → distribution, of what is not on every machine that has torch and transformers.
RUN = {
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "pebble": "pebble",
    "rich": "rich",
    "yaml": "PyYAML",
}
TRL = RUN | {
    "trl": "trl",
    "datasets": "datasets",
    "dill": "dill",
    "multiprocess": "multiprocess",
    "accelerate": "accelerate",
    "pyarrow": "pyarrow",
    "pandas": "pandas",
    "xxhash": "xxhash",
    "jinja2": "jinja2",
}
BASE = {"einops": "einops", "rich": "rich", "triton": "triton"}
TESTS = BASE | {"pytest": "pytest", "peft": "peft"}
PEERS = {
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "verl": "verl",
    "trl": "trl",
}


class Part(NamedTuple):
    """A command that measures one thing.

    In the arguments of python, {out} is the JSON file that it writes, and {runs} a folder of
    training runs that the next call finds again.
    """

    name: str
    arguments: tuple[str, ...]


class Stage(NamedTuple):
    """Parts that belong together, each of which is run once."""

    name: str
    purpose: str
    minutes: float  # at most
    parts: tuple[Part, ...]
    tiny: tuple[Part, ...]  # the same with shrunk shapes, for a CPU
    needs: dict[str, str]  # imported name → distribution
    wants: dict[str, str]  # without them, rows of the results say that they are missing


def module(part: str, name: str, *arguments: str) -> Part:
    """A part that runs a module of the benchmarks, which writes {out}."""
    return Part(part, ("-m", f"benchmarks.{name}", *arguments, "--out", "{out}"))


def tests(*names: str) -> tuple[Part, ...]:
    """A part for each file of tests/gpu."""
    options = ("--tb=short", "-p", "no:cacheprovider")
    return tuple(Part(name, ("-m", "pytest", f"tests/gpu/{name}.py", *options)) for name in names)


def shapes(*names: str, repetitions: int) -> tuple[Part, ...]:
    """Log-probs at each shape."""
    options = ("--repetitions", str(repetitions))
    return tuple(module(name, "logprobs", "--shapes", name, *options) for name in names)


def rollouts(
    *works: str, pairs: int, kinds: Sequence[str] = ("fixed", "ragged")
) -> tuple[Part, ...]:
    """Rollouts of each work, in which all responses have full length, or end by chance.

    Not by `generate_batch`, which takes most of the memory for its pages.
    """
    options = ("--pairs", str(pairs), "--without", "generate_batch")
    return tuple(
        module(f"{work}-{kind}", "rollout", "--works", work, "--kinds", kind, *options)
        for work in works
        for kind in kinds
    )


def scratch(steps: int, *options: str) -> tuple[Part, ...]:
    arguments = ("--folder", "{runs}", "--steps", str(steps), *options)
    return (module("scratch", "gpu_day.scratch", *arguments),)


def memory(*cases: str, options: Sequence[str] = ()) -> tuple[Part, ...]:
    return tuple(module(case, "gpu_day.memory", "--case", case, *options) for case in cases)


def attention(*works: str, repetitions: int) -> tuple[Part, ...]:
    options = ("--repetitions", str(repetitions))
    return tuple(module(work, "gpu_day.attention", "--works", work, *options) for work in works)


def trl(*options: str, kinds: Sequence[str] = ("fixed", "ragged")) -> tuple[Part, ...]:
    return tuple(module(kind, "trl_step", "--kinds", kind, *options) for kind in kinds)


# 128 responses of 512 tokens to prompts of up to 256, in 8 passes: what TRL keeps for the backward
# pass of 0.5B parameters then fits in 80 GB.
HALF_BILLION = (
    *("--size", "0.5B", "--vocabulary", "32768", "--dtype", "bfloat16"),
    *("--prompt", "256", "--response", "512", "--micro-batches", "8", "--steps", "3"),
)
SMALLEST = (
    *("--vocabulary", "64", "--prompt", "8", "--response", "4"),
    *("--prompts", "2", "--group", "2", "--steps", "1"),
)

STAGES = (
    Stage(
        name="tests",
        purpose="tests/gpu: kernels, log-probs, policy, rollouts",
        minutes=6,
        parts=tests("test_policy", "test_logprobs_gpu", "test_engine_gpu"),
        tiny=tests("test_policy"),
        needs=TESTS,
        wants={},
    ),
    Stage(
        name="attention",
        purpose="attention over shared prompts: flash against padded parts, numbers and times",
        minutes=2,
        parts=attention("0.5B", "1.5B", repetitions=20),
        tiny=attention("tiny", repetitions=1),
        needs=BASE,
        wants={},
    ),
    Stage(
        name="logprobs",
        purpose="log-probs, entropy and KL at S4 and S1, against other implementations",
        minutes=8,
        parts=shapes("S4", "S1", repetitions=20),
        tiny=shapes("Q1", repetitions=1),
        needs=BASE,
        wants=PEERS,
    ),
    Stage(
        name="rollouts",
        purpose="rollouts of 0.5B and 1.5B against generate",
        minutes=8,
        parts=rollouts("0.5B", "1.5B", pairs=3),
        tiny=rollouts("0.1M", pairs=1, kinds=("ragged",)),
        needs=BASE,
        wants={},
    ),
    Stage(
        name="learning",
        purpose="scratch-sft, then 30 steps of scratch-countdown: a learning run, no download",
        minutes=8,
        parts=scratch(30),
        tiny=scratch(1, "--tiny"),
        needs=BASE | RUN,
        wants={},
    ),
    Stage(
        name="memory",
        purpose="3 steps at the shape of Qwen2.5-1.5B: measured CUDA peak against the memory plan",
        minutes=8,
        parts=memory("all", "checkpointing", "lora", "lora-checkpointing"),
        tiny=memory("all", options=("--steps", "1", "--tiny")),
        needs=BASE | RUN | {"peft": "peft"},
        wants={},
    ),
    Stage(
        name="rollouts-large",
        purpose="rollouts of 3B and 7B",
        minutes=8,
        parts=rollouts("3B", "7B", pairs=2),
        tiny=rollouts("0.1M", pairs=1, kinds=("fixed",)),
        needs=BASE,
        wants={},
    ),
    Stage(
        name="trl",
        purpose="a whole GRPO step against TRL, 0.5B",
        minutes=8,
        parts=trl(*HALF_BILLION),
        tiny=trl(*SMALLEST, kinds=("ragged",)),
        needs=BASE | TRL,
        wants={},
    ),
)


def missing(packages: dict[str, str]) -> list[str]:
    """The distributions of those that cannot be imported."""
    return [distribution for name, distribution in packages.items() if not installed(name)]


def installed(name: str) -> bool:
    return find_spec(name) is not None
