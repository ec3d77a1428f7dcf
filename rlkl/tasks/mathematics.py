"""MATH (Hendrycks et al. 2021, arXiv:2103.03874), with math-verify as the judge."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

from rlkl.errors import UserError
from rlkl.tasks.bounded import bounded
from rlkl.tasks.extract import boxed
from rlkl.tasks.hub import load, load_side, require_columns, user_message
from rlkl.tasks.listed import Listed
from rlkl.types import Example

MATH_500 = "HuggingFaceH4/MATH-500"
PROMPT = "{problem}\nLet's think step by step and output the final answer within \\boxed{}."
MAX_CHARACTERS = 300  # that are parsed: of a box, or of the end of a response without one


class Mathematics(Listed):
    r"""Rows of problem, solution, level and perhaps answer.

    Without an answer column the answer is the \boxed{} of the solution. `levels` selects some of
    the five levels. Held out is the `test` split of `heldout_path`. That is by default `path` where
    it is local, and MATH-500 where it is on the hub. A single file is divided by a hash of the
    problem.
    """

    def __init__(
        self,
        split: str,
        *,
        path: str = "DigitalLearningGmbH/MATH-lighteval",
        heldout_path: str | None = None,
        levels: list[int] | None = None,
        prompt: str = PROMPT,
        chat: bool = True,
        heldout: float = 0.1,
    ) -> None:
        math_verify()  # raises now if it is not installed
        option = "task.path"
        if heldout_path is None:
            heldout_path = path if Path(path).exists() else MATH_500
        if heldout_path == path:
            rows = load_side(split, path, None, ("train", "test"), heldout, key="problem")
        elif split == "train":
            rows = load(path, None, "train")
        else:
            option, path = "task.heldout_path", heldout_path
            rows = load(path, None, "test", option)
        columns = ["problem", "answer" if "answer" in rows[0] else "solution"]
        if levels:
            columns.append("level")
        require_columns(rows, columns, path, option)
        if levels:
            rows = [row for row in rows if level(row) in levels]
        examples = [parse(row, prompt, chat) for row in rows]
        self.examples = [e for e in examples if e is not None]
        if not self.examples:
            of_levels = f" of levels {levels}" if levels else ""
            raise UserError(
                f"{option}={path!r}: no problem with an answer{of_levels} on the {split} side"
            )

    def score(self, example: Example, response: str) -> float:
        r"""1 if the last \boxed{…} equals the answer, else 0.

        Without a box the end of the response is compared.
        """
        has_box = re.search(r"\\(boxed|fbox)", response) is not None
        if has_box:
            final = boxed(response, MAX_CHARACTERS)
        else:
            final = response[-MAX_CHARACTERS:].strip()
        if not final:
            return 0.0
        if without_spaces(final) == without_spaces(example.answer):
            return 1.0
        math_verify()  # loaded in this process before the clock runs
        return bounded(is_equal, example.answer, final, has_box, otherwise=0.0)


def parse(row: dict[str, Any], prompt: str, chat: bool) -> Example | None:
    """One row as an Example; None if it has no answer."""
    answer = row.get("answer") or boxed(row.get("solution") or "", MAX_CHARACTERS)
    if not answer:
        return None
    text = prompt.replace("{problem}", row["problem"])
    info = {name: row[name] for name in ("solution", "level") if row.get(name)}
    return Example(user_message(text) if chat else text, str(answer), info)


def level(row: dict[str, Any]) -> int | None:
    """5 for "Level 5", as in MATH, and for 5, as in MATH-500."""
    digits = re.search(r"[0-9]+", str(row["level"]))
    return int(digits[0]) if digits else None


def without_spaces(text: str) -> str:
    """The text without white space. Most right answers are equal then, and need no parser."""
    return re.sub(r"\s+|\\[,;! ]", "", text)


def is_equal(answer: str, final: str, has_box: bool) -> float:
    """The verdict of math-verify, 0 or 1.

    Its own time limits are off: they ring an alarm, which `bounded` does not need.
    """
    parse_latex, verify = math_verify()
    text = rf"\boxed{{{final}}}" if has_box else final
    parsed = parse_latex(text, parsing_timeout=None)
    return float(verify(list(parsed_answer(answer)), parsed, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def parsed_answer(answer: str) -> tuple:
    """An answer as math-verify reads it.

    It is cached: a problem returns for every response of its group, and in every epoch.
    """
    parse_latex, _ = math_verify()
    return tuple(parse_latex(rf"\boxed{{{answer}}}", parsing_timeout=None))


@functools.cache
def math_verify() -> tuple[Any, Any]:
    """math-verify's parse and verify, warmed up. Raises UserError if it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("task=math judges with math-verify: pip install 'rlkl[tasks]'") from error
    # It warns about the time limits, which are switched off on purpose.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # The first calls build tables, which must not count against a response.
    texts = ("$(x+1)^2$", r"\boxed{x^2 + 1}", "so 0.5")
    # None switches the time limit off, which its annotation does not say.
    square, polynomial, half = (
        parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for text in texts
    )
    verify(square, polynomial, timeout_seconds=None)
    verify(square, half, timeout_seconds=None)
    return parse, verify
