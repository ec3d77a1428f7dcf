"""The base class of tasks that hold their examples in a list. A task of yours does not need it."""

from __future__ import annotations

from rlkl.types import Example


class Listed:
    """`__len__` and `__getitem__` of a list of examples."""

    examples: list[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
