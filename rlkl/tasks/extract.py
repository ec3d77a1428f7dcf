"""Find the answer in a response: in a tag, in a box, or as a number.

Every function takes time linear in the length of the response, whatever it holds.
"""

from __future__ import annotations

import re
from decimal import Decimal

# ASCII digits, with or without thousands commas
NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")
MAX_NUMBER_CHARACTERS = 40  # the answers of problems are far shorter


def tagged(response: str) -> str | None:
    """The text inside the last <answer>…</answer>; None if there is none."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else response[start + len("<answer>") : end].strip()


def boxed(response: str, max_characters: int) -> str | None:
    r"""The content of the last \boxed{…}, \fbox{…} or \boxed 7.

    None if there is none, if it is empty or not closed, or if it is too long.
    """
    start = max(response.rfind(r"\boxed"), response.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\(boxed|fbox)", "", response[start : start + max_characters])
    if without_braces := re.match(r"\s+([^\s{}$\\]*[^\s{}$\\.,;])", rest):
        return without_braces[1]
    rest = rest.lstrip()
    depth = 0
    for i, character in enumerate(rest):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth <= 0:
            return rest[1:i].strip() or None
    return None


def number(text: str) -> Decimal | None:
    """The value of a text that is one number; None for any other text, and for a longer one."""
    text = text.strip()
    if len(text) > MAX_NUMBER_CHARACTERS or not NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))
