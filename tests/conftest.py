"""One thread, no network, and small models that the tests make themselves."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

from rlkl.tasks.bounded import bounded

torch.set_num_threads(1)


@pytest.fixture
def no_time_limit(monkeypatch):
    """Judges are not stopped: a test of a verdict must not depend on the speed of the machine."""
    monkeypatch.setitem(bounded.__kwdefaults__, "seconds", 60.0)


def pytest_addoption(parser):
    """For tests/contract.py: a loss, advantage, KL, reward or task of your own."""
    for kind in ("loss", "advantage", "kl", "reward", "task"):
        parser.addoption(
            f"--{kind}",
            metavar="FILE.py:FUNCTION",
            help=f"the {kind} that tests/contract.py checks",
        )
