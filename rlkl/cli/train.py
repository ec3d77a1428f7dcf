"""`rlkl train`: train.py, the same file that `python train.py` runs in a clone."""

from __future__ import annotations

from rlkl.run.shipped import trainer


def main(argv: list[str]) -> None:
    trainer().main(argv)
