"""What a configuration really optimises, measured on its own functions.

    tabular.py      games that are small enough to enumerate
    verify.py       the exact expected update on them, followed to where it converges
    measure.py      what each function of a configuration does
    optimum.py      optimal policies in closed form
    predict.py      which closed form a configuration has
    report_text.py  the report of `rlkl explain`
    footprint.py    tokens and memory of a step
    activations.py  bytes that a forward pass saves for its backward pass

A run imports only `print_warnings` from here.
"""

from typing import Any

import torch

from rlkl.explain.footprint import plan
from rlkl.explain.report_text import Explanation, explain, on_cuda, traps
from rlkl.run.algorithm import Algorithm
from rlkl.run.schema import Config
from rlkl.run.terminal import log_line, note

__all__ = ["Explanation", "explain", "on_cuda", "print_warnings", "traps"]


def print_warnings(cfg: Config, algorithm: Algorithm, task: Any, device: torch.device) -> None:
    """Print what a configuration does that its author may not expect, and its memory plan."""
    for trap in traps(cfg, algorithm):
        note(trap)
    for line in plan(cfg, algorithm.exact_kl, device, task):
        log_line(line)
