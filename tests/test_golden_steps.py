"""One step of every shipped configuration, and of variants, against numbers of version 0.1.

Together they name every loss, advantage, KL term, selector and correction. Compared are rollout,
batch, the gradients of each update, metrics and weights; one_step.py says how they are taken.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from one_step import digest, float64_llama, furnish, golden_base, one_step
from runs_fixture import ROOT

import train
from rlkl.types import Batch

GOLDEN = json.loads(gzip.decompress((ROOT / "tests/golden/steps.json.gz").read_bytes()))
ENTRIES = GOLDEN["entries"]
HOW = ("kind", "config", "overrides", "noisy")  # the other fields of an entry are numbers
FIRST, LATER = 1e-12, 1e-11  # before the first update; after it, rounding has been through AdamW
REWARD_MODEL = 1e-5  # it is float32 where it is normalised
SHOWN = 5  # mismatches of an entry

groups: dict[str, list[str]] = defaultdict(list)
for entry in ENTRIES:
    groups[entry.partition("/")[0]].append(entry)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        float64_llama(monkeypatch)
        yield golden_base(tmp_path_factory.mktemp("golden") / "base")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "shuffled_minibatches", shuffled_rows)


def shuffled_rows(batch, epochs, size, group_size, rng) -> Iterator[Batch]:
    """Minibatches as version 0.1 drew them: rows were shuffled, not groups."""
    for _ in range(epochs):
        order = torch.randperm(len(batch), generator=rng)
        for rows in order.split(size or len(order)):
            yield batch[rows]


def test_the_base_is_the_same_on_every_cpu(base):
    assert digest(base) == GOLDEN["base"]


@pytest.mark.parametrize("group", groups)
def test_the_numbers_are_those_of_version_0_1(base, group):
    found = [line for name in groups[group] for line in mismatches(base, name)]
    assert not found, "\n".join(found)


def mismatches(base: Path, name: str) -> list[str]:
    """A line for each number of an entry that has changed, the first few of them."""
    entry = ENTRIES[name]
    try:
        got = leaves(one_step(base, entry))
    except Exception as error:  # the entry has to be named
        return [f"{name}: {type(error).__name__}: {error}"]
    was = leaves({field: x for field, x in entry.items() if field not in HOW})
    found = [f"{name}: {place(path)} is new" for path in got.keys() - was.keys()]
    found += [f"{name}: {place(path)} is gone" for path in was.keys() - got.keys()]
    for path in was.keys() & got.keys():
        allowed = tolerance(entry["kind"], path) * scale(entry, path, was[path])
        if not same(got[path], was[path], allowed):
            found.append(f"{name}: {place(path)} is {got[path]}, was {was[path]}")
    more = [f"{name}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return sorted(found)[:SHOWN] + more


def leaves(x: object, path: tuple = ()) -> dict[tuple, object]:
    """{path: number, text or None} of nested dictionaries and lists."""
    if not isinstance(x, dict | list):
        return {path: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {p: leaf for key, value in items for p, leaf in leaves(value, (*path, key)).items()}


def place(path: tuple) -> str:
    return "[" + "][".join(map(str, path)) + "]"


def tolerance(kind: str, path: tuple) -> float:
    if kind == "reward-model":
        return REWARD_MODEL
    first = path[0] in ("rounds", "scores", "batch", "rows") or path[:2] == ("updates", 0)
    return FIRST if first else LATER


def scale(entry: dict, path: tuple, was: object) -> float:
    """What a difference is compared with: 1 or the number; of a gradient, the norm of its group."""
    if path[0] == "updates" and path[2] == "gradients":
        _, update, _, group, _, *which = path
        gradients = entry["updates"][update]["gradients"][group].values()
        norm = math.sqrt(sum(squares for _, squares in filter(None, gradients)))
        return norm**2 if which == [1] else norm  # of [Σ x cos(i), Σ x²]
    return max(1.0, abs(was)) if isinstance(was, int | float) else 1.0


def same(got: object, was: object, allowed: float) -> bool:
    if isinstance(got, int | float) and isinstance(was, int | float):
        return abs(got - was) <= allowed
    return got == was
