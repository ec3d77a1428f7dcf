"""The tables, from the file of results alone."""

from __future__ import annotations


def show(rows: list[dict]) -> None:
    for row in rows:
        print(row["key"], row["final"])
