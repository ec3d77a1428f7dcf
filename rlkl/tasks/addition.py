"""Two numbers to add: the synthetic task of the tiny configs. Difficulty is graded by length and by carries."""

from __future__ import annotations

import zlib

from rlkl.types import Example


class Addition:
    """All a + b with a, b < 10^digits; 1 in 10 is held out, together with its mirror image b + a."""

    def __init__(self, split: str, *, digits: int = 2) -> None:
        size = 10**digits
        pairs = ((a, b) for a in range(size) for b in range(size))
        self.pairs = [
            (a, b)
            for a, b in pairs
            if (zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0) == (split == "heldout")
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        a, b = self.pairs[index]
        return Example(f"{a}+{b}=", str(a + b))

    def score(self, example: Example, reply: str) -> float:
        return float(reply == example.answer)
