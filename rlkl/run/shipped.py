"""The trainer and the configurations that come with rlkl: train.py and configs/.

In a clone they are at the top, where a reader finds them. In a wheel the same files are in
rlkl/shipped, where pyproject.toml puts them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rlkl.plugins import load_module

PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """The folder of train.py and configs/."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


@functools.cache
def trainer() -> Any:
    """train.py as a module, wherever it is."""
    return load_module(str(shipped_folder() / "train.py"))


def shipped_configs() -> dict[str, Path]:
    """{name: file}: "tiny-grpo" is configs/tiny-grpo.yaml."""
    files = sorted((shipped_folder() / "configs").glob("*.yaml"))
    return {file.stem: file for file in files}
