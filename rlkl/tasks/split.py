"""Train or held out: a hash of the prompt decides, so equal prompts are always on one side.

The hash is CRC-32, which is the same in every process and on every machine. Python's own hash of a
string is not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlkl.errors import UserError

T = TypeVar("T")


def select_side(
    rows: Sequence[T],
    split: str,
    heldout: float,
    key: Callable[[T], str | list[dict]],
    source: str,
) -> list[T]:
    """The rows of one side. About a share `heldout` of all keys is held out.

    key(row): what is hashed, text or chat messages; the order of keys in a message does not matter.
    source: the option that the rows come from, for the error message. Raises UserError where no row
    is on this side.
    """
    side = [row for row in rows if (hash_fraction(key(row)) < heldout) == (split == "heldout")]
    if not side:
        raise UserError(
            f"{source}: none of {len(rows)} rows is on the {split} side with "
            f"task.heldout={heldout}; choose a share between 0 and 1 that leaves rows on both sides"
        )
    return side


def hash_fraction(key: str | list[dict]) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return crc32(json.dumps(key, sort_keys=True)) / 2**32


def is_heldout_tenth(key: str) -> bool:
    """Is this key in the tenth that the synthetic tasks hold out?"""
    return crc32(key) % 10 == 0


def crc32(text: str) -> int:
    """The 32-bit checksum of a text."""
    return zlib.crc32(text.encode())
