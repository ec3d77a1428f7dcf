"""Where training ends: closed forms of the tabular policy that an objective leads to. All probabilities, all exact.

r are scores, beta the coefficient of the KL, ref the reference's probabilities. Derivations: docs/explain.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlkl.explain.tabular import Game, visited


def tilted(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """pi* ∝ ref · exp(r/beta): the maximum of E[r] - beta KL(pi || ref). With beta = 0 its limit, ref on the best r."""
    if beta == 0:
        best = torch.where(r >= r.max() - 1e-9, ref, torch.zeros_like(ref))
        return best / best.sum()
    return (ref.log() + r / beta).softmax(0)


def forward_tilted(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """beta · ref / (λ - r), λ such that it sums to 1: the maximum of E[r] - beta KL(ref || pi)."""
    low, high = float(r.max()) + beta * float(ref[r.argmax()]), float(r.max()) + beta
    level = bisect(lambda x: float((beta * ref / (x - r)).sum()) - 1, low * (1 - 1e-15), high)
    return beta * ref / (level - r)


def token_level(game: Game, r: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(R,) the policy that solves each prefix for itself, from the last token back: solve(ref, q) → pi, all (choices,).

    q(a) is the mean score of what follows under pi. The KL that is still to come is charged to nobody: with a KL at
    each token in the loss, the root is ref · exp(E[r|a]/beta) where the sequence's KL wants the soft value.
    """
    columns, ref = visited(game), game.table.softmax(0)
    table, value = game.table.clone(), r.clone()  # value[row]: mean score given the row's first t tokens
    for t in reversed(range(columns.shape[1])):
        for column in columns[game.mask[:, t], t].unique():
            rows = (columns[:, t] == column) & game.mask[:, t]
            tokens = game.replies[rows, t].unique()
            q = torch.stack([value[rows & (game.replies[:, t] == a)][0] for a in tokens])
            pi = solve(ref[tokens, column], q)
            table[tokens, column] = pi.clamp_min(1e-300).log()
            value = torch.where(rows, (pi * q).sum(), value)
    chosen = table[game.replies, columns]
    return chosen.masked_fill(~game.mask, 0.0).sum(1).exp()


def binary_threshold(p_ref: float) -> float:
    """beta_c: with scores 0 and 1 over their std, and reverse KL in the loss, a smaller beta cannot hold the policy.

    2 asinh(beta) - logit p_ref = (2/beta) · sqrt(1 + beta²); 1.508879561538 for p_ref = 1/2.
    """
    return bisect(lambda b: 2 * math.asinh(b) - logit(p_ref) - 2 / b * math.sqrt(1 + b * b), 1e-9, 1e9)


def binary_reverse(p_ref: float, beta: float) -> float:
    """P(right) there: l - logit p_ref = (2/beta) cosh(l/2), l = logit p, its lower root; 1 below the threshold."""
    top = 2 * math.asinh(beta)  # where the two sides are closest

    def gap(x: float) -> float:
        return x - logit(p_ref) - 2 / beta * math.cosh(x / 2)

    if top < logit(p_ref) or gap(top) < 0:
        return 1.0
    return 1 / (1 + math.exp(-bisect(gap, logit(p_ref), top)))


def binary_forward(p_ref: float, beta: float) -> float:
    """P(right) with k3 in the loss instead: p - p_ref = sqrt(p (1-p)) / beta, always inside (0, 1)."""
    square = beta**-2
    b, a = 2 * p_ref + square, 1 + square
    return (b + math.sqrt(b * b - 4 * a * p_ref**2)) / (2 * a)


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """Σ p log(p/q), nats."""
    return float(torch.where(p > 0, p * (p.clamp_min(1e-300) / q).log(), 0.0).sum())


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """The root of a monotone f between low and high."""
    rising = f(high) > f(low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (f(middle) > 0) == rising else (middle, high)
    return (low + high) / 2
