"""Games that are small enough to enumerate: every response and every rollout, in float64.

The policy is a table of logits, one column per prefix, in the form of a language model: its final
hidden state is the one-hot vector of the prefix, and its unembedding is the table. So the same
Policy, Batch and losses work on it as on any other model.

Shapes: R responses, T tokens, V vocabulary, D prefixes (columns of the table).
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

from rlkl.policy.policy import Policy
from rlkl.types import Batch

IMPOSSIBLE = -1e4  # a logit whose probability is exactly 0, and so is its gradient
# A probability is clamped here before it divides, or its logarithm is taken.
MIN_PROBABILITY = 1e-300


class Game(NamedTuple):
    """All R responses of a game, their scores, and the reference policy."""

    name: str
    responses: Tensor  # (R, T) ids
    mask: Tensor  # (R, T) bool
    scores: Tensor  # (R,)
    table: Tensor  # (V, D) log ref(a | prefix)

    @property
    def batch(self) -> Batch:
        """Every response once, to a prompt of one token after one of padding."""
        rows = len(self.responses)
        prompt_mask = torch.tensor([[False, True]]).expand(rows, 2)
        return Batch(
            prompt_ids=torch.zeros(rows, 2, dtype=torch.long),
            prompt_mask=prompt_mask,
            response_ids=self.responses,
            mask=self.mask,
            sampler_logprobs=torch.zeros(self.mask.shape, dtype=torch.float64),
            truncated=torch.zeros(rows, dtype=torch.bool),
        )


def game(
    name: str,
    ref: Mapping[tuple[int, ...], Mapping[int, float]],
    scores: Mapping[tuple[int, ...], float],
) -> Game:
    """A game from {prefix: {token: probability under ref}} and {response: score}.

    A response is a path that ends where `ref` has no further prefix.
    """
    vocabulary = 1 + max(token for choices in ref.values() for token in choices)
    width = max(len(response) for response in scores)
    columns = (vocabulary + 1) ** (width + 1)
    table = torch.full((vocabulary, columns), IMPOSSIBLE, dtype=torch.float64)
    for prefix, choices in ref.items():
        column = 1  # the prompt
        for token in prefix:
            column = column * (vocabulary + 1) + token + 1
        for token, probability in choices.items():
            table[token, column] = math.log(probability)
    ids = torch.zeros(len(scores), width, dtype=torch.long)
    mask = torch.zeros(len(scores), width, dtype=torch.bool)
    for row, response in enumerate(scores):
        ids[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return Game(name, ids, mask, torch.tensor(list(scores.values()), dtype=torch.float64), table)


def bandit(scores: tuple[float, ...], ref: tuple[float, ...], name: str = "bandit") -> Game:
    """A game whose responses are single tokens."""
    return game(name, {(): dict(enumerate(ref))}, {(a,): r for a, r in enumerate(scores)})


REF = (0.35, 0.25, 0.20, 0.15, 0.05)
BANDIT = bandit((0.0, 0.5, 1.0, -0.5, 2.0), REF, "five responses of one token")
BINARY = bandit((0.0, 1.0, 0.0, 1.0, 0.0), REF, "five responses of one token, right or wrong")
ROOT = (0.5, 0.3, 0.2)
LEAVES = ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.1, 0.1, 0.8))


def tree(scores: tuple[tuple[float, ...], ...], name: str) -> Game:
    """A game of two tokens with three choices each: scores[first][second - 3].

    What the first token costs in KL shows only at the second.
    """
    ref = {(): dict(enumerate(ROOT))}
    ref |= {(first,): dict(enumerate(leaf, 3)) for first, leaf in enumerate(LEAVES)}
    by_response = {
        (first, second): score
        for first, row in enumerate(scores)
        for second, score in enumerate(row, 3)
    }
    return game(name, ref, by_response)


TREE = tree(((1.0, 0.0, 2.0), (0.0, 1.5, 0.0), (0.5, 0.5, 1.0)), "nine responses of two tokens")
BINARY_TREE = tree(
    ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "nine responses of two tokens, right or wrong",
)


# ------------------------------------------------------------------ a table as a language model


class Prefixes(nn.Module):
    """The backbone: (B, L) ids → (B, L, D), the one-hot vector of all tokens so far."""

    def __init__(self, vocabulary: int, prefixes: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.prefixes = prefixes

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        column = torch.zeros_like(input_ids[:, 0])
        columns = []
        for token in input_ids.unbind(1):
            column = column * (self.vocabulary + 1) + token + 1
            # the number of a whole response may be too large, but nothing is predicted after it
            columns.append(column % self.prefixes)
        states = F.one_hot(torch.stack(columns, 1), self.prefixes)
        return SimpleNamespace(last_hidden_state=states.to(torch.float64))


class TabularLM(nn.Module):
    """The parts of a Hugging Face causal LM that `Policy` reads."""

    config = PretrainedConfig()

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        vocabulary, prefixes = table.shape
        self.base_model = Prefixes(vocabulary, prefixes)
        self.unembedding = nn.Linear(prefixes, vocabulary, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.unembedding.weight.copy_(table)

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembedding

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device


def policy_of(table: Tensor) -> Policy:
    """The policy whose logits are the (V, D) table."""
    return Policy(TabularLM(table))


# ------------------------------------------------------------------ probabilities


def visited(game: Game) -> Tensor:
    """(R, T) the column of the table from which each token is chosen."""
    return policy_of(game.table).states(game.batch).argmax(-1)


def probabilities(game: Game, table: Tensor) -> Tensor:
    """(R,) the probability of each response; differentiable."""
    return response_logprobs(game, table).exp()


def response_logprobs(game: Game, table: Tensor) -> Tensor:
    """(R,) log pi of each response; differentiable."""
    logprobs = table.log_softmax(0)[game.responses, visited(game)]
    return logprobs.masked_fill(~game.mask, 0.0).sum(1)


def table_of(game: Game, joint: Tensor) -> Tensor:
    """The (V, D) table of the policy with these (R,) probabilities of responses."""
    columns = visited(game)
    mass = torch.zeros_like(game.table)
    for t in range(columns.shape[1]):
        inside = game.mask[:, t]
        index = (game.responses[inside, t], columns[inside, t])
        mass.index_put_(index, joint[inside], accumulate=True)
    conditional = mass / mass.sum(0).clamp_min(MIN_PROBABILITY)
    return torch.where(mass > 0, conditional.clamp_min(MIN_PROBABILITY).log(), game.table)


def multisets(kinds: int, size: int) -> tuple[Tensor, Tensor]:
    """All unordered samples (E, size) from `kinds`, and the log (E,) of each one's orderings."""
    rows = list(itertools.combinations_with_replacement(range(kinds), size))
    log_orderings = [
        math.lgamma(size + 1) - sum(math.lgamma(row.count(k) + 1) for k in set(row)) for row in rows
    ]
    return torch.tensor(rows), torch.tensor(log_orderings, dtype=torch.float64)


def exact_values(game: Game, joint: Tensor, rewards: Tensor) -> Tensor:
    """(R, T) V(s_t): the mean reward to go of the responses that share the prefix.

    joint: (R,) their probabilities. rewards: (R, T).
    """
    rewards_to_go = rewards.flip(1).cumsum(1).flip(1)
    columns = visited(game)
    values = torch.zeros_like(rewards)
    for t in range(columns.shape[1]):
        same_prefix = (columns[:, t, None] == columns[None, :, t]) & game.mask[:, t]
        weight = same_prefix * joint
        values[:, t] = (weight @ rewards_to_go[:, t]) / weight.sum(1).clamp_min(MIN_PROBABILITY)
    return values.masked_fill(~game.mask, 0.0)
