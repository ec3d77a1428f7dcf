"""What a configuration really optimises: found out by calling its functions, and followed to where it leads.

tabular, games small enough to enumerate → verify, the exact expected update on them → measure, what each function does
→ optimum and predict, where that ends in closed form → words, all of it in sentences and numbers; and footprint, what a
step takes.
"""

from rlkl.explain.words import Explanation, explain, on_cuda, traps

__all__ = ["Explanation", "explain", "on_cuda", "traps"]
