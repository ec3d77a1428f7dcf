"""Preferences: which of two replies to a prompt is the better one. Their file, the two losses on them, calibration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from rlkl.errors import UserError
from rlkl.rows import json_rows


@dataclass(frozen=True)
class Pair:
    """One row of a preference file."""

    prompt: str | list[dict]
    chosen: str
    rejected: str
    truncated: tuple[bool, bool] = (False, False)  # which of them ran out of room: it ends without an EOS

    @property
    def row(self) -> dict:
        row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row | ({"truncated": self.truncated} if any(self.truncated) else {})


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a file. Replies may be text, or lists of one assistant message. UserError naming file and line."""
    return [pair_of(row, where) for where, row in json_rows(path, "data")]


def pair_of(row: dict, where: str) -> Pair:
    if missing := [name for name in ("prompt", "chosen", "rejected") if name not in row]:
        raise UserError(f"{where}: the row has no {missing[0]!r}; it needs prompt, chosen and rejected")
    prompt, truncated = row["prompt"], row.get("truncated", (False, False))
    if not isinstance(prompt, str | list) or not prompt:
        raise UserError(f"{where}: prompt must be text or chat messages")
    if not (isinstance(truncated, list | tuple) and [type(x) for x in truncated] == [bool, bool]):
        raise UserError(f"{where}: truncated must be two of true and false, of chosen and of rejected")
    chosen, rejected = (reply_text(row[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    return Pair(prompt, chosen, rejected, (truncated[0], truncated[1]))


def reply_text(reply: object, where: str) -> str:
    if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], dict):
        reply = reply[0].get("content")
    if not isinstance(reply, str):
        raise UserError(f"{where} must be text, or a list of one assistant message")
    return reply


def split(pairs: list[Pair], heldout: float, path: str) -> tuple[list[Pair], list[Pair]]:
    """Train and held out, by a hash of the prompt: no prompt is on both sides. UserError where one is empty."""
    def share(pair: Pair) -> float:
        text = json.dumps(pair.prompt, sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) / 2**32

    sides = [p for p in pairs if share(p) >= heldout], [p for p in pairs if share(p) < heldout]
    for side, name in zip(sides, ("training", "held-out"), strict=True):
        if not side:
            raise UserError(f"data={path!r}: none of the {len(pairs)} pairs falls on the {name} side with "
                            f"heldout={heldout}, which is a share of the prompts")
    return sides


def bradley_terry(rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(2n,) rewards of chosen, rejected, chosen, … → (n,) -log sigmoid(r_c - r_r): Ouyang et al. 2022, eq. 1.

    Bradley and Terry's P(chosen wins), as in Christiano et al. 2017. Beside it accuracy and margin, in nats.
    """
    chosen, rejected = rearrange(rewards, "(n two) -> two n", two=2)
    margin = chosen - rejected
    return -F.logsigmoid(margin), {"accuracy": right(margin), "margin": margin}


def dpo(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(2n, T) of chosen, rejected, chosen, …, 0 outside the mask → (n,) DPO losses (Rafailov et al. 2023, eq. 7).

    -log sigmoid(beta u_c - beta u_r), u = Σ_t log pi - log ref: Bradley-Terry on the implicit rewards beta · u.
    """
    implicit = beta * (logprobs - ref_logprobs).sum(1)
    losses, measures = bradley_terry(implicit)
    chosen, rejected = rearrange(implicit, "(n two) -> two n", two=2)
    return losses, measures | {"reward_chosen": chosen, "reward_rejected": rejected}


def right(margin: Tensor) -> Tensor:
    """1 where the chosen reply has more, 1/2 where the two tie: a model that says nothing is right half the time."""
    return (1 + margin.sign()) / 2


class Bin(NamedTuple):
    """Pairs that a reward model is about equally sure of."""

    low: float
    high: float
    pairs: int
    confidence: float  # the mean probability it gives to the reply it prefers
    accuracy: float  # how often the label agrees


def calibration(margins: Tensor, bins: int = 10) -> tuple[float, list[Bin]]:
    """(n,) r_c - r_r → expected calibration error of sigmoid(margin), and its bins (Guo et al. 2017, arXiv:1706.04599).

    Which of two replies stands first is arbitrary: confidence is in the one the model prefers, from 1/2 to 1.
    """
    confidence, hits = margins.double().abs().sigmoid(), right(margins.double())
    place = ((confidence - 0.5) * 2 * bins).long().clamp_max(bins - 1)
    table, error = [], 0.0
    for i in place.unique().tolist():
        inside = place == i
        sure, agrees = confidence[inside].mean().item(), hits[inside].mean().item()
        table.append(Bin((1 + i / bins) / 2, (1 + (i + 1) / bins) / 2, int(inside.sum()), sure, agrees))
        error += abs(sure - agrees) * int(inside.sum()) / len(margins)
    return error, table
