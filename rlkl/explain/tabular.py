"""Games small enough to enumerate: every reply, every rollout, every expected gradient, exactly and in float64.

The policy is a table of logits, one row a prefix, dressed as a language model: its final hidden state is the one-hot of
the prefix and its unembedding is the table. So it goes through the same Policy, Batch and losses as any other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from rlkl.model import Policy
from rlkl.types import Batch

IMPOSSIBLE = -1e4  # a logit whose probability is exactly 0, and so is its gradient


class Game(NamedTuple):
    """All R replies there are, what each scores, and the reference's logits."""

    name: str
    replies: Tensor  # (R, T) ids
    mask: Tensor  # (R, T) bool
    scores: Tensor  # (R,)
    table: Tensor  # (V, D) log ref(a | prefix)

    @property
    def batch(self) -> Batch:
        """Every reply once, to a prompt of one token behind one of padding."""
        ids = torch.zeros(len(self.replies), 2, dtype=torch.long)
        return Batch(ids, ids.new_tensor([[0, 1]]).bool().expand_as(ids), self.replies, self.mask,
                     torch.zeros(self.mask.shape, dtype=torch.float64), torch.zeros(len(ids), dtype=torch.bool))


def game(
    name: str, ref: Mapping[tuple[int, ...], Mapping[int, float]], scores: Mapping[tuple[int, ...], float]
) -> Game:
    """From {prefix: {token: probability}} and {reply: score}, a reply being a path that leads to no further prefix."""
    vocabulary, width = 1 + max(a for choices in ref.values() for a in choices), max(map(len, scores))
    table = torch.full((vocabulary, (vocabulary + 1) ** (width + 1)), IMPOSSIBLE, dtype=torch.float64)
    for prefix, choices in ref.items():
        column = 1  # the prompt
        for token in prefix:
            column = column * (vocabulary + 1) + token + 1
        for token, p in choices.items():
            table[token, column] = math.log(p)
    ids, mask = torch.zeros(len(scores), width, dtype=torch.long), torch.zeros(len(scores), width, dtype=torch.bool)
    for row, reply in enumerate(scores):
        ids[row, : len(reply)], mask[row, : len(reply)] = torch.tensor(reply), True
    return Game(name, ids, mask, torch.tensor(list(scores.values()), dtype=torch.float64), table)


def bandit(scores: tuple[float, ...], ref: tuple[float, ...], name: str = "bandit") -> Game:
    """Replies of one token."""
    return game(name, {(): dict(enumerate(ref))}, {(a,): r for a, r in enumerate(scores)})


REF = (0.35, 0.25, 0.20, 0.15, 0.05)
BANDIT = bandit((0.0, 0.5, 1.0, -0.5, 2.0), REF, "five replies of one token")
BINARY = bandit((0.0, 1.0, 0.0, 1.0, 0.0), REF, "five replies of one token, right or wrong")
LEAVES = ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8))


def tree(scores: tuple[tuple[float, ...], ...], name: str) -> Game:
    """Two tokens, three choices each: what the first one costs shows only at the second."""
    ref = {(): dict(enumerate((0.5, 0.3, 0.2)))} | {(a,): dict(enumerate(p, 3)) for a, p in enumerate(LEAVES)}
    return game(name, ref, {(a, b): r for a, row in enumerate(scores) for b, r in enumerate(row, 3)})


TREE = tree(((1.0, 0.0, 2.0), (0.0, 1.5, 0.0), (0.5, 0.5, 1.0)), "nine replies of two tokens")
BINARY_TREE = tree(((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), "nine replies of two tokens, right or wrong")


class Prefixes(nn.Module):
    """The backbone: (B, L) ids → (B, L, D) one-hot of all attended tokens so far."""

    def __init__(self, vocabulary: int, prefixes: int) -> None:
        super().__init__()
        self.vocabulary, self.prefixes = vocabulary, prefixes

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        column, columns = torch.zeros_like(input_ids[:, 0]), []
        for token, seen in zip(input_ids.unbind(1), attention_mask.bool().unbind(1), strict=True):
            column = torch.where(seen, column * (self.vocabulary + 1) + token + 1, column)
            columns.append(column % self.prefixes)  # behind the last token there is nothing to choose
        states = F.one_hot(torch.stack(columns, 1), self.prefixes)
        return SimpleNamespace(last_hidden_state=states.to(torch.float64))


class TabularLM(nn.Module):
    """What Policy asks of a language model."""

    config = PretrainedConfig()

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.base_model = Prefixes(*table.shape)
        self.unembedding = nn.Linear(table.shape[1], table.shape[0], bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.unembedding.weight.copy_(table)

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembedding

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device


def policy_of(table: Tensor) -> Policy:
    return Policy(TabularLM(table))


def visited(game: Game) -> Tensor:
    """(R, T) the column of the table that each token is chosen from."""
    return policy_of(game.table).states(game.batch).argmax(-1)


def probabilities(game: Game, table: Tensor) -> Tensor:
    """(R,) the probability of each reply; differentiable."""
    return reply_logprobs(game, table).exp()


def reply_logprobs(game: Game, table: Tensor) -> Tensor:
    """(R,) log pi of each reply; differentiable."""
    chosen = table.log_softmax(0)[game.replies, visited(game)]
    return chosen.masked_fill(~game.mask, 0.0).sum(1)


def table_of(game: Game, joint: Tensor) -> Tensor:
    """(R,) probabilities of replies → the (V, D) table that gives them."""
    columns = visited(game)
    mass = torch.zeros_like(game.table)
    for t in range(columns.shape[1]):
        inside = game.mask[:, t]
        mass.index_put_((game.replies[inside, t], columns[inside, t]), joint[inside], accumulate=True)
    return torch.where(mass > 0, (mass / mass.sum(0).clamp_min(1e-300)).clamp_min(1e-300).log(), game.table)


def multisets(kinds: int, size: int) -> tuple[Tensor, Tensor]:
    """All unordered samples (E, size) of `size` out of `kinds`, and the log (E,) of how many orders each comes in."""
    rows = list(itertools.combinations_with_replacement(range(kinds), size))
    orders = [math.lgamma(size + 1) - sum(math.lgamma(row.count(k) + 1) for k in set(row)) for row in rows]
    return torch.tensor(rows), torch.tensor(orders, dtype=torch.float64)


def exact_values(game: Game, joint: Tensor, rewards: Tensor) -> Tensor:
    """(R, T) V(s_t): the mean, under the joint (R,), of what is still to be paid to replies that share the prefix."""
    to_go = rewards.flip(1).cumsum(1).flip(1)
    columns = visited(game)
    values = torch.zeros_like(rewards)
    for t in range(columns.shape[1]):
        same = (columns[:, t, None] == columns[None, :, t]) & game.mask[:, t]
        weight = same * joint
        values[:, t] = (weight @ to_go[:, t]) / weight.sum(1).clamp_min(1e-300)
    return values.masked_fill(~game.mask, 0.0)
