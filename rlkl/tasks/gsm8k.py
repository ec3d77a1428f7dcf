"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school problems whose answer is a whole number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from rlkl.errors import UserError
from rlkl.tasks.extract import LONGEST, NUMBER, number
from rlkl.tasks.hub import message, require, side
from rlkl.tasks.listed import Listed
from rlkl.types import Example

PROMPT = '{question} Let\'s think step by step and output the final answer after "####".'  # the words of verl's recipe


class GSM8K(Listed):
    """The training split to train on, the 1319 problems of the test split held out; a single file is cut by a hash.

    Two scores, and both are reported before and after: **strict**, the number right after the last `####`, and
    **flexible**, the last number of the reply. `paid` chooses the one that is the reward.
    """

    def __init__(self, split: str, *, path: str = "openai/gsm8k", config: str | None = "main", prompt: str = PROMPT,
                 chat: bool = True, paid: Literal["strict", "flexible"] = "strict", heldout: float = 0.1) -> None:
        rows = side(split, path, config, ("train", "test"), heldout, key="question")
        require(rows, ("question", "answer"), path)
        self.paid = paid
        self.examples = [example(row, prompt, chat, path) for row in rows]

    def score(self, example: Example, reply: str) -> float:
        return self.grade(example, reply)[self.paid]

    def grade(self, example: Example, reply: str) -> dict[str, float]:
        """{"strict": 0 or 1, "flexible": 0 or 1}."""
        wanted = Decimal(example.answer)
        return {"strict": float(strict(reply) == wanted), "flexible": float(flexible(reply) == wanted)}


def example(row: dict, prompt: str, chat: bool, path: str) -> Example:
    """The answer is the number after ####; the worked solution goes to info."""
    answer = strict(str(row["answer"]))
    if answer is None:
        raise UserError(f"task.path={path!r}: no number after #### in the answer {str(row['answer'])[-60:]!r}")
    text = prompt.replace("{question}", str(row["question"]))
    return Example(message(text) if chat else text, str(answer), {"solution": row["answer"]})


def strict(reply: str) -> Decimal | None:
    """The number that stands right after the last ####, be there a $, thousands commas or a full stop; None if none.

    verl reads the same place, but compares text: it wants one space after ####, no $, and takes "42." and "42.0" for
    wrong; and it looks at the last 300 characters alone.
    """
    _, marked, said = reply.rpartition("####")
    found = re.match(rf"\s{{0,9}}\$?\s?({NUMBER.pattern})", said[: 2 * LONGEST]) if marked else None
    return number(found[1]) if found else None


def flexible(reply: str) -> Decimal | None:
    """The last number of the reply. verl keeps its commas, so that it takes "1,000" for wrong where 1000 is right."""
    found = NUMBER.findall(reply)
    return number(found[-1]) if found else None
