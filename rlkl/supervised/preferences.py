"""Preferences, which of two responses to a prompt is better: the file, the losses, calibration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from rlkl.errors import UserError
from rlkl.tasks.messages import last_turn, response_text
from rlkl.tasks.read_jsonl import is_prompt, json_rows

# ------------------------------------------------------------------ the file


@dataclass(frozen=True)
class Pair:
    """One row of a preference file."""

    prompt: str | list[dict]
    chosen: str
    rejected: str
    truncated: tuple[bool, bool] = (False, False)  # chosen, rejected: ran out of room, no EOS

    @property
    def row(self) -> dict:
        """The pair as a JSON object."""
        row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row | {"truncated": self.truncated} if any(self.truncated) else row


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a JSONL file. Raises UserError, which names file and line, on a bad row."""
    return [parse_pair(row, where) for where, row in json_rows(path, "data")]


def parse_pair(row: dict, where: str) -> Pair:
    """One row as a Pair. Raises UserError, which starts with `where`, on a bad row.

    chosen and rejected may also be whole conversations that differ in their last message alone:
    what comes before it is the prompt.
    """
    if isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        row = without_shared_prompt(row, where)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing:
        raise UserError(
            f"{where}: the row has no {missing[0]!r}; it needs prompt, chosen and rejected"
        )
    prompt = row["prompt"]
    if not is_prompt(prompt):
        raise UserError(f"{where}: prompt must be text or chat messages")
    truncated = row.get("truncated", (False, False))
    if not isinstance(truncated, list | tuple) or [type(x) for x in truncated] != [bool, bool]:
        raise UserError(f"{where}: truncated must be two booleans, for chosen and for rejected")
    chosen = response_text(row["chosen"], f"{where}: chosen")
    rejected = response_text(row["rejected"], f"{where}: rejected")
    return Pair(prompt, chosen, rejected, tuple(truncated))


def without_shared_prompt(row: dict, where: str) -> dict:
    """The row with the messages that chosen and rejected share as its prompt.

    Where the row has a prompt, it must be these messages, or the text of the last of them.
    """
    prompt, chosen = last_turn(row["chosen"], f"{where}: chosen")
    other_prompt, rejected = last_turn(row.get("rejected"), f"{where}: rejected")
    if prompt != other_prompt:
        raise UserError(f"{where}: chosen and rejected must differ in their last message alone")
    if row.get("prompt", prompt) not in (prompt, prompt[-1].get("content")):
        raise UserError(f"{where}: the prompt is not the one of the conversations")
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def split(pairs: list[Pair], heldout: float, path: str) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): about a share `heldout` of the prompts is held out, with all their pairs.

    A hash of the prompt decides, so no prompt is on both sides. Raises UserError where a side is
    empty.
    """
    sides = {
        "training": [p for p in pairs if hash_fraction(p.prompt) >= heldout],
        "held-out": [p for p in pairs if hash_fraction(p.prompt) < heldout],
    }
    for name, side in sides.items():
        if not side:
            raise UserError(
                f"data={path!r}: none of the {len(pairs)} pairs is on the {name} side with "
                f"heldout={heldout}, which is a share of the prompts: change it, or give more "
                "prompts"
            )
    return sides["training"], sides["held-out"]


def hash_fraction(prompt: str | list[dict]) -> float:
    """A number in [0, 1) that depends on the prompt alone, and not on which side a task has it.

    The hash must differ from that of tasks (CRC-32, rlkl.tasks.split). `rlkl label` samples prompts
    of a task's training side: by the same hash none of them would be held out here.
    """
    text = json.dumps(prompt, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) / 2**32


# ------------------------------------------------------------------ losses


def bradley_terry(rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(2n,) rewards of chosen, rejected, chosen, … → (n,) -log sigmoid(r_chosen - r_rejected).

    The loss of a reward model (Ouyang et al. 2022, arXiv:2203.02155, eq. 1): Bradley and Terry's
    -log P(chosen wins). Also returns the (n,) metrics accuracy and margin, in nats.
    """
    chosen, rejected = rearrange(rewards, "(n two) -> two n", two=2)
    margin = chosen - rejected
    return -F.logsigmoid(margin), {"accuracy": accuracy(margin), "margin": margin}


def dpo(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(2n, T) log-probs of chosen, rejected, chosen, …, 0 outside the mask → (n,) DPO losses.

    -log sigmoid(beta · (u_chosen - u_rejected)), u = Σ_t log pi - log ref (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7). It is Bradley-Terry on the implicit rewards beta · u, which are
    metrics too.
    """
    implicit = beta * (logprobs - ref_logprobs).sum(1)
    losses, metrics = bradley_terry(implicit)
    chosen, rejected = rearrange(implicit, "(n two) -> two n", two=2)
    return losses, metrics | {"reward_chosen": chosen, "reward_rejected": rejected}


def accuracy(margin: Tensor) -> Tensor:
    """(n,) 1 where the chosen response has the higher reward, 1/2 at a tie, else 0."""
    return (1 + margin.sign()) / 2


# ------------------------------------------------------------------ calibration


class Bin(NamedTuple):
    """Pairs for which a reward model has about the same confidence."""

    low: float  # the bin's confidences are from low to high
    high: float
    pairs: int
    confidence: float  # mean probability that it gives to the response it prefers
    accuracy: float  # how often that response is the chosen one


def calibration(margins: Tensor, bins: int = 10) -> tuple[float, list[Bin]]:
    """(n,) r_chosen - r_rejected → expected calibration error of sigmoid(margin), and its bins.

    Guo et al. 2017, arXiv:1706.04599, eq. 3. Confidence is that in the response which the model
    prefers, from 1/2 to 1, since the order of two responses is arbitrary.
    """
    confidences = margins.double().abs().sigmoid()
    hits = accuracy(margins.double())
    bin_of = ((confidences - 0.5) * 2 * bins).long().clamp_max(bins - 1)
    error = 0.0
    table = []
    for i in bin_of.unique().tolist():
        inside = bin_of == i
        pairs = int(inside.sum())
        confidence = confidences[inside].mean().item()
        hit_rate = hits[inside].mean().item()
        low, high = (1 + i / bins) / 2, (1 + (i + 1) / bins) / 2
        table.append(Bin(low, high, pairs, confidence, hit_rate))
        error += abs(confidence - hit_rate) * pairs / len(margins)
    return error, table
