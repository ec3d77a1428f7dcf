"""Every option of the commands about a run of train.py: rlkl eval, chat, report and export."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from rlkl.schema import STRICT


def number_or_name(value: Any) -> str:
    """Of a checkpoint: "12", "last" or "best"."""
    if str(value).isdecimal():
        return str(int(value))
    if value not in ("last", "best"):
        raise ValueError("choose last, best, or a number")
    return value


@dataclass(config=STRICT)
class Chosen:
    step: Annotated[str, BeforeValidator(number_or_name)] = "last"
    """of the checkpoint: its number, the last one, or the best one by held-out accuracy"""


@dataclass(config=STRICT)
class Chat(Chosen):
    temperature: NonNegativeFloat | None = None
    """of sampling, 0 = greedy; by default that of the run's rollouts"""
    max_new_tokens: PositiveInt | None = None
    """room for a reply; by default that of the run's rollouts"""
    seed: NonNegativeInt = 0
    """of the uniforms that both policies sample with"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""


@dataclass(config=STRICT)
class Report:
    out: str | None = None
    """folder for report-compare.md and report-compare.png; by default the table is only printed"""


@dataclass(config=STRICT)
class Export(Chosen):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the weights that are written"""
