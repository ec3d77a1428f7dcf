"""Every option of the commands about a run: rlkl eval, chat, report and export."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from rlkl.run.schema import STRICT


def step_or_name(value: Any) -> str:
    """The step of a checkpoint as text, "12", or "last" or "best"."""
    if str(value).isdecimal():
        return str(int(value))
    if value not in ("last", "best"):
        raise ValueError("choose last, best, or a number")
    return value


@dataclass(config=STRICT)
class OfCheckpoint:
    step: Annotated[str, BeforeValidator(step_or_name)] = "last"
    """which checkpoint: its step, the last one, or the best one by held-out accuracy"""


@dataclass(config=STRICT)
class Chat(OfCheckpoint):
    temperature: NonNegativeFloat | None = None
    """sampling temperature, 0 = greedy; by default that of the run's rollouts"""
    max_new_tokens: PositiveInt | None = None
    """the longest response, in tokens; by default that of the run's rollouts"""
    seed: NonNegativeInt = 0
    """of the uniform random numbers that both policies sample with"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""


@dataclass(config=STRICT)
class Report:
    out: str | None = None
    """folder for report-compare.md and report-compare.png; by default the table is only printed"""


@dataclass(config=STRICT)
class Export(OfCheckpoint):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the weights in the files"""
