"""The machine of a measurement, and its clock."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def where(*libraries: str) -> dict[str, Any]:
    """Device, threads, and the versions of Python, torch and `libraries`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    versions = {name: version(name) for name in ("torch", *libraries)}
    versions["python"] = platform.python_version()
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions}


def processor() -> str:
    """The name of the CPU, or at least its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, with "-dirty" where files differ from it; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def clock() -> float:
    """Wall seconds on CUDA; elsewhere CPU seconds, so that other programs do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
