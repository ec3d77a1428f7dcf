"""The Triton kernels without a GPU: in the interpreter, and compiled ahead of time.

Each in a process of its own, because TRITON_INTERPRET is read when a kernel is defined, and with a
clean environment, so that nothing is cached or preset.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux",
    reason="needs triton, which exists for Linux only",
)


@pytest.mark.parametrize(("name", "interpret"), [("interpreted", "1"), ("ahead_of_time", "0")])
def test_kernels(name, interpret, tmp_path):
    inherited = ("PATH", "HOME", "LD_LIBRARY_PATH")
    environment = {key: os.environ[key] for key in inherited if key in os.environ}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/{name}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
