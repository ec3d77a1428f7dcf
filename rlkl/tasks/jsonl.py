"""A file of rows, one JSON object a line: {"prompt": …, "answer": …}, or a conversation."""

from __future__ import annotations

from rlkl.errors import UserError
from rlkl.tasks.answers import NO_ANSWERS
from rlkl.tasks.listed import Listed
from rlkl.tasks.messages import last_turn, response_text
from rlkl.tasks.read_jsonl import is_prompt, json_rows
from rlkl.tasks.split import select_side
from rlkl.types import Example


class Jsonl(Listed):
    """The rows of `path`; keys other than prompt and answer go to Example.info.

    The rows of TRL's SFT are read too: {"prompt": …, "completion": …}, and {"messages": […]}, where
    the last message is the answer and all before it are the prompt. Where no row has an answer, a
    reward of one's own scores.
    About a share `heldout` of the prompts is held out, by a hash of the prompt.
    """

    def __init__(self, split: str, *, path: str, heldout: float = 0.1) -> None:
        rows = list(json_rows(path, "task.path"))
        has_answers = any(has_answer(row) for _, row in rows)
        examples = [parse(row, where, has_answers) for where, row in rows]
        source = f"task.path={path!r}"
        self.examples = select_side(examples, split, heldout, lambda e: e.prompt, source)

    def score(self, example: Example, response: str) -> float:
        """1 if the response equals the answer, except for white space around it.

        Raises UserError where the rows have no answers.
        """
        if not example.has_answer:
            raise UserError(NO_ANSWERS)
        return float(response.strip() == example.answer.strip())


def has_answer(row: dict) -> bool:
    """Does a row hold the answer to its prompt?"""
    return "answer" in row or "completion" in row or ("messages" in row and "prompt" not in row)


def parse(row: dict, where: str, has_answers: bool = True) -> Example:
    """One row as an Example. Raises UserError naming the line.

    has_answers: the row must have one.
    """
    if "messages" in row and "prompt" not in row:
        prompt, answer = last_turn(row.pop("messages"), f"{where}: messages")
        return Example(prompt, answer, row)
    if "completion" in row and "answer" not in row:
        row["answer"] = response_text(row.pop("completion"), f"{where}: completion")
    needs = ("prompt", "answer") if has_answers else ("prompt",)
    if missing := [name for name in needs if name not in row]:
        others = ", though other rows have one" if missing[0] == "answer" else ""
        raise UserError(
            f"{where}: the row has no {missing[0]!r}{others}; a row has prompt and answer, prompt "
            "and completion, messages, or, where a reward scores, prompt alone. Other names are "
            "given by task=datasets task.prompt=NAME"
        )
    prompt = row.pop("prompt")
    answer = row.pop("answer", "")
    if not is_prompt(prompt) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: prompt must be text or chat messages, answer text or a number")
    return Example(prompt, str(answer), row, has_answers)
