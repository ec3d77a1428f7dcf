"""MATH (Hendrycks et al. 2021, arXiv:2103.03874), with math-verify as the judge."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from rlkl.errors import UserError
from rlkl.tasks.bounded import bounded
from rlkl.tasks.extract import boxed
from rlkl.tasks.hub import load, message, require, side
from rlkl.tasks.listed import Listed
from rlkl.types import Example

PROMPT = "{problem}\nLet's think step by step and output the final answer within \\boxed{}."
LONGEST = 300  # characters that are parsed: of a box, or of the end of a reply without one


class Mathematics(Listed):
    r"""Rows of problem, solution, level and perhaps answer; without that column the answer is the solution's \boxed{}.

    Held out: the `test` split of `heldout_path`, by default MATH-500. `levels` keeps some of the five.
    """

    def __init__(self, split: str, *, path: str = "DigitalLearningGmbH/MATH-lighteval",
                 heldout_path: str | None = "HuggingFaceH4/MATH-500", levels: list[int] | None = None,
                 prompt: str = PROMPT, chat: bool = True, heldout: float = 0.1) -> None:
        judge()  # if it is missing, that is said now
        if split == "heldout" and heldout_path is not None:
            path, rows = heldout_path, load(heldout_path, None, "test")
        else:
            rows = side(split, path, None, ("train", "test"), heldout, key="problem")
        require(rows, ("problem", "level" if levels else "problem"), path)
        require(rows, ("answer",) if "answer" in rows[0] else ("solution",), path)
        rows = [row for row in rows if not levels or level(row) in levels]
        self.examples = [e for row in rows if (e := example(row, prompt, chat)) is not None]
        if not self.examples:
            raise UserError(f"task.path={path!r}: no problem with an answer"
                            f"{f' of levels {levels}' if levels else ''} on the {split} side")

    def score(self, example: Example, reply: str) -> float:
        r"""1 if the last \boxed{…}, or without one the end of the reply, equals the answer, else 0."""
        in_box = re.search(r"\\(boxed|fbox)", reply) is not None
        said = boxed(reply, LONGEST) if in_box else reply[-LONGEST:].strip()
        if not said or same(said) == same(example.answer):
            return float(bool(said))
        judge()  # loaded in this process, before the clock runs
        return bounded(equal, example.answer, said, in_box, otherwise=0.0)


def example(row: dict[str, Any], prompt: str, chat: bool) -> Example | None:
    """None for a row without an answer that can be found."""
    answer = row.get("answer") or boxed(row.get("solution") or "", LONGEST)
    if not answer:
        return None
    text = prompt.replace("{problem}", row["problem"])
    info = {name: row[name] for name in ("solution", "level") if row.get(name)}
    return Example(message(text) if chat else text, str(answer), info)


def level(row: dict[str, Any]) -> int | None:
    """5 of "Level 5", as MATH writes it, and of 5, as MATH-500 does."""
    found = re.search(r"[0-9]+", str(row["level"]))
    return int(found[0]) if found else None


def same(text: str) -> str:
    """But for white space: spares most right replies the parser."""
    return re.sub(r"\s+|\\[,;! ]", "", text)


def equal(answer: str, said: str, in_box: bool) -> float:
    """math-verify's verdict; its own time limits are off, they ring an alarm that `bounded` does not need."""
    parse, verify = judge()
    found = parse(rf"\boxed{{{said}}}" if in_box else said, parsing_timeout=None)
    return float(verify(list(gold(answer)), found, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def gold(answer: str) -> tuple:
    """An answer as math-verify reads it; a problem comes up again in every epoch and for every reply of its group."""
    parse, _ = judge()
    return tuple(parse(rf"\boxed{{{answer}}}", parsing_timeout=None))


@functools.cache
def judge() -> tuple[Any, Any]:
    """math-verify's parse and verify, with their tables made. UserError if it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("task=math judges with math-verify: pip install 'rlkl[tasks]'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of the time limit that is switched off
    square, sum_, half = (parse(text, parsing_timeout=None) for text in ("$(x+1)^2$", r"\boxed{x^2 + 1}", "so 0.5"))
    for said in (sum_, half):
        verify(square, said, timeout_seconds=None)
    return parse, verify
