"""Tables of a page that are filled from a file of results, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def filled(page: str, sections: Mapping[str, str]) -> str:
    """A page with the sections it has room for; what stands between other markers stays."""
    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", lambda m: m[0] if m[1] not in sections else (
        f"<!-- {m[1]} -->\n{sections[m[1]]}\n<!-- /{m[1]} -->"), page, flags=re.DOTALL)


def fill(pages: Sequence[Path], sections: Mapping[str, str]) -> None:
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), sections), encoding="utf-8")
        print(page)
