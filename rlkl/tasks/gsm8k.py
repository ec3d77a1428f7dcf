"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school problems, answered by a number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from rlkl.errors import UserError
from rlkl.tasks.extract import MAX_NUMBER_CHARACTERS, NUMBER, number
from rlkl.tasks.hub import load_side, require_columns, user_message
from rlkl.tasks.listed import Listed
from rlkl.types import Example

# The words of verl's recipe.
PROMPT = '{question} Let\'s think step by step and output the final answer after "####".'


class GSM8K(Listed):
    """Trains on the train split and holds out the 1319 problems of the test split.

    A single file is divided by a hash of the question. There are two scores, and both are reported
    before and after training: **strict**, the number right after the last `####`, and **flexible**,
    the last number of the response. `method` (verl's name) chooses the one that is the reward.
    """

    def __init__(
        self,
        split: str,
        *,
        path: str = "openai/gsm8k",
        config: str | None = "main",
        prompt: str = PROMPT,
        chat: bool = True,
        method: Literal["strict", "flexible"] = "strict",
        heldout: float = 0.1,
    ) -> None:
        rows = load_side(split, path, config, ("train", "test"), heldout, key="question")
        require_columns(rows, ("question", "answer"), path)
        self.method = method
        self.examples = [parse(row, prompt, chat, path) for row in rows]

    def score(self, example: Example, response: str) -> float:
        """The score that `method` names, 0 or 1."""
        return self.grade(example, response)[self.method]

    def grade(self, example: Example, response: str) -> dict[str, float]:
        """{"strict": 0 or 1, "flexible": 0 or 1}."""
        answer = Decimal(example.answer)
        return {
            "strict": float(strict(response) == answer),
            "flexible": float(flexible(response) == answer),
        }


def parse(row: dict, prompt: str, chat: bool, path: str) -> Example:
    """One row as an Example. The answer is the number after ####; the solution goes to info."""
    answer = strict(str(row["answer"]))
    if answer is None:
        raise UserError(
            f"task.path={path!r}: no number after #### in the answer {str(row['answer'])[-60:]!r}"
        )
    text = prompt.replace("{question}", str(row["question"]))
    return Example(user_message(text) if chat else text, str(answer), {"solution": row["answer"]})


def strict(response: str) -> Decimal | None:
    """The number right after the last ####, with or without $, thousands commas and full stop.

    None if there is none. verl reads the same place but compares text: it wants one space after
    ####, no $, and takes "42." and "42.0" for wrong. It also looks at the last 300 characters only.
    """
    _, marker, rest = response.rpartition("####")
    if not marker:
        return None
    match = re.match(rf"\s{{0,9}}\$?\s?({NUMBER.pattern})", rest[: 2 * MAX_NUMBER_CHARACTERS])
    return number(match[1]) if match else None


def flexible(response: str) -> Decimal | None:
    """The last number of the response, None if there is none.

    verl keeps the commas of a number, so it takes "1,000" for wrong where 1000 is right.
    """
    numbers = NUMBER.findall(response)
    return number(numbers[-1]) if numbers else None
