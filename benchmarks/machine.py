"""The machine of a measurement, and its clock."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import Any

import torch


def where(*libraries: str) -> dict[str, Any]:
    """Device, threads, and the versions of Python, torch and `libraries`."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", *libraries)}
    versions["python"] = platform.python_version()
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions}


def clock() -> float:
    """Wall seconds on CUDA; elsewhere CPU seconds, so that other programs do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
