"""Closed forms of the optimal tabular policy of an objective. Derivations: docs/explain.md.

ref and r are (R,) probabilities of the reference and scores; beta is the coefficient of the KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlkl.explain.tabular import MIN_PROBABILITY, Game, visited


def tilted(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """(R,) pi* ∝ ref · exp(r/beta): the maximum of E[r] - beta KL(pi || ref).

    With beta = 0 its limit: ref, restricted to the responses with the best score.
    """
    if beta == 0:
        best = torch.where(r >= r.max() - 1e-9, ref, torch.zeros_like(ref))
        return best / best.sum()
    return (ref.log() + r / beta).softmax(0)


def forward_tilted(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """(R,) beta · ref / (λ - r): the maximum of E[r] - beta KL(ref || pi). It sums to 1 by λ."""
    low = float(r.max()) + beta * float(ref[r.argmax()])
    high = float(r.max()) + beta
    level = bisect(lambda x: float((beta * ref / (x - r)).sum()) - 1, low * (1 - 1e-15), high)
    return beta * ref / (level - r)


def token_level(game: Game, r: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(R,) the policy that solves each state by itself, from the last token back.

    solve(ref, q) → pi, each of the choices in one state; q is the mean score that follows under pi.
    No state is charged for the KL of later ones: with a KL at each token in the loss, the first
    token has ref · exp(E[r | a]/beta), where the KL of the sequence would have the soft value.
    """
    columns = visited(game)
    ref = game.table.softmax(0)
    table = game.table.clone()
    value = r.clone()  # of each row: the mean score given its first t tokens
    for t in reversed(range(columns.shape[1])):
        for column in columns[game.mask[:, t], t].unique():
            rows = (columns[:, t] == column) & game.mask[:, t]
            tokens = game.responses[rows, t].unique()
            q = torch.stack([value[rows & (game.responses[:, t] == a)][0] for a in tokens])
            pi = solve(ref[tokens, column], q)
            table[tokens, column] = pi.clamp_min(MIN_PROBABILITY).log()
            value = torch.where(rows, (pi * q).sum(), value)
    logprobs = table[game.responses, columns]
    return logprobs.masked_fill(~game.mask, 0.0).sum(1).exp()


# ------------------------------------------------------------------ binary scores over their std


def binary_threshold(p_ref: float) -> float:
    """beta_c: the smallest beta at which the reverse KL in the loss still constrains the policy.

    2 asinh(beta) - logit p_ref = (2/beta) · sqrt(1 + beta²); 1.508879561538 for p_ref = 1/2.
    """
    return bisect(
        lambda b: 2 * math.asinh(b) - logit(p_ref) - 2 / b * math.sqrt(1 + b * b), 1e-9, 1e9
    )


def binary_reverse(p_ref: float, beta: float) -> float:
    """P(right) with the reverse KL in the loss; 1 below the threshold.

    The lower root of l - logit p_ref = (2/beta) cosh(l/2), where l = logit p.
    """
    top = 2 * math.asinh(beta)  # where the two sides are closest

    def gap(x: float) -> float:
        return x - logit(p_ref) - 2 / beta * math.cosh(x / 2)

    if top < logit(p_ref) or gap(top) < 0:
        return 1.0
    return 1 / (1 + math.exp(-bisect(gap, logit(p_ref), top)))


def binary_forward(p_ref: float, beta: float) -> float:
    """P(right) with k3 in the loss: p - p_ref = sqrt(p (1-p)) / beta, always inside (0, 1)."""
    square = beta**-2
    a = 1 + square
    b = 2 * p_ref + square
    return (b + math.sqrt(b * b - 4 * a * p_ref**2)) / (2 * a)


# ------------------------------------------------------------------ distances and roots


def total_variation(p: Tensor, q: Tensor) -> float:
    """Σ |p - q| / 2."""
    return float((p - q).abs().sum() / 2)


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """Σ p log(p/q), nats."""
    log_ratio = (p.clamp_min(MIN_PROBABILITY) / q).log()
    return float(torch.where(p > 0, p * log_ratio, 0.0).sum())


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """The root of a monotone f between low and high."""
    rising = f(high) > f(low)
    for _ in range(200):
        middle = (low + high) / 2
        if (f(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2
