"""Triton: the only importer of it. `TRITON` are the two functions on a tile of logits, for rlkl/tiles.py."""

from rlkl.kernels.logits import TRITON, accumulate, dlogits

__all__ = ["TRITON", "accumulate", "dlogits"]
