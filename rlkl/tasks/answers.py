"""Tasks whose rows are only prompts: what they cannot do."""

from __future__ import annotations

from typing import Any

NO_ANSWERS = (
    "the task's rows have no answer, so a response can only be scored by a reward: give one "
    "(reward=file.py:function, or from Python a function), or name the column that has the answer "
    "(task.answer=COLUMN of task=datasets)"
)


def has_answers(task: Any) -> bool:
    """Can the task score a response? Not where its examples have no answer."""
    return len(task) == 0 or task[0].has_answer
