"""Fill the tables of pages from results, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def filled(page: str, sections: Mapping[str, str]) -> str:
    """The page with every section that it has markers for; other markers are left alone."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        if name not in sections:
            return match[0]
        return f"<!-- {name} -->\n{sections[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def fill(pages: Sequence[Path], sections: Mapping[str, str]) -> None:
    """Write the sections into the pages, and print the pages' names."""
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), sections), encoding="utf-8")
        print(page)
