"""Two numbers to add: the synthetic task of the tiny configs. Difficulty is graded by length and by carries."""

from __future__ import annotations

import zlib

from rlkl.types import Example


class Addition:
    """All a + b with a, b < 10^digits; 1 in 10 is held out, together with its mirror image b + a.

    Numbers are padded to one length, and the answer is written as one adds by hand, units first: 47+05= wants 25.
    """

    def __init__(self, split: str, *, digits: int = 2) -> None:
        self.digits, numbers = digits, range(10**digits)
        self.pairs = [(a, b) for a in numbers for b in numbers if held_out(a, b) == (split == "heldout")]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        a, b = self.pairs[index]
        return Example(f"{a:0{self.digits}}+{b:0{self.digits}}=", str(a + b)[::-1])

    def score(self, example: Example, reply: str) -> float:
        """1 if the reply is the answer, else 0."""
        return float(reply == example.answer)


def held_out(a: int, b: int) -> bool:
    """One pair in ten, by a hash that does not see the order."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0
