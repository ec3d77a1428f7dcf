"""The sum of two numbers: the synthetic task of the tiny configs.

Its difficulty is graded by the number of digits and of carries.
"""

from __future__ import annotations

from rlkl.tasks.split import is_heldout_tenth
from rlkl.types import Example


class Addition:
    """All a + b with a, b < 10^digits. 1 in 10 is held out, together with its mirror image b + a.

    Numbers are padded to one length. The answer is written as one adds by hand, units first: the
    answer of `47+05=` is `25`. The typical mistake is to forget every carry: `24`.
    digits: of each number.
    """

    def __init__(self, split: str, *, digits: int = 2) -> None:
        self.digits = digits
        numbers = range(10**digits)
        pairs = [(a, b) for a in numbers for b in numbers]
        self.pairs = [p for p in pairs if is_heldout(*p) == (split == "heldout")]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        a, b = self.pairs[index]
        prompt = f"{a:0{self.digits}}+{b:0{self.digits}}="
        mistake = str(sum_without_carries(a, b))[::-1]
        return Example(prompt, str(a + b)[::-1], {"mistake": mistake})

    def score(self, example: Example, response: str) -> float:
        """1 if the response is the answer, else 0."""
        return float(response == example.answer)


def sum_without_carries(a: int, b: int) -> int:
    """The sum of each column by itself: 47 + 85 gives 22, and 12 + 34 rightly 46."""
    total, place = 0, 1
    while a or b:
        total += (a + b) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total


def is_heldout(a: int, b: int) -> bool:
    """The same for a + b and b + a."""
    return is_heldout_tenth(f"{min(a, b)}+{max(a, b)}")
