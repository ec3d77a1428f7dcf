"""The Triton kernels without a GPU: in the interpreter, and compiled ahead of time. A process each, as
TRITON_INTERPRET is read when a kernel is; a clean environment each, so that nothing is cached or preset."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux", reason="needs triton, which there is for Linux")


@pytest.mark.parametrize(("name", "interpret"), [("interpreted", "1"), ("ahead_of_time", "0")])
def test_kernels(name, interpret, tmp_path):
    environment = {k: os.environ[k] for k in ("PATH", "HOME", "LD_LIBRARY_PATH") if k in os.environ} | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
