"""Where the answer stands in a reply: in a tag, in a box, as a number. Linear in the reply, whatever it holds."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")  # ASCII digits, with or without thousands commas
LONGEST = 40  # characters of a number: those of a problem are shorter by far


def tagged(reply: str) -> str | None:
    """What stands in the last <answer>…</answer>; None if there is none."""
    end = reply.rfind("</answer>")
    start = reply.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else reply[start + len("<answer>") : end].strip()


def boxed(reply: str, longest: int) -> str | None:
    r"""What the last \boxed{…} (or \fbox{…}, or \boxed 7) holds; None if there is none, it is open or too long."""
    start = max(reply.rfind(r"\boxed"), reply.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\(boxed|fbox)", "", reply[start : start + longest])
    if bare := re.match(r"\s+([^\s{}$\\]*[^\s{}$\\.,;])", rest):
        return bare[1]
    rest, depth = rest.lstrip(), 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth <= 0:
            return rest[1:i].strip() or None
    return None


def number(text: str) -> Decimal | None:
    """The value of a text that is one number; None if it is not, or is longer than any answer."""
    text = text.strip()
    whole = len(text) <= LONGEST and NUMBER.fullmatch(text)
    return Decimal(text.replace(",", "")) if whole else None
