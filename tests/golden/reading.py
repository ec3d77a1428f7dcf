"""What the test_golden files share: the frozen numbers, and comparisons that are counted as they are defined."""

import functools
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rlkl.types import Batch, Evaluation

TRL, VERL, NEMO = (
    json.loads(gzip.decompress((Path(__file__).parent / f"{n}.json.gz").read_bytes())) for n in ("trl", "verl", "nemo"))
EXACT = {"atol": 1e-9, "rtol": 1e-9}
EPS_1E_8 = {"atol": 2e-8, "rtol": 2e-8}  # verl divides a reply's sum by its length + 1e-8
BESSEL32 = {"atol": 1e-7, "rtol": 1e-7}  # TRL takes n / (n - 1) in float32
FLOAT32 = {"atol": 2e-6, "rtol": 2e-6}  # what a peer computes in float32, whatever it is given
FLOAT32_SUMS = {"atol": 1e-5, "rtol": 1e-5}  # and sums over a vocabulary: its own chunk sizes differ by 5e-6

DEFINED: Counter[tuple[str, str]] = Counter()  # (peer, quantity) → comparisons


def compared(peer: str, kind: str, cases: dict[str, object], names: Iterable[str] | Callable[[dict], Iterable[str]]):
    """Parametrise test(c, same) by cases; in each it must compare exactly these names, each once."""

    def named(c: object) -> list[str]:
        return list(names(c) if callable(names) else names)

    assert cases
    DEFINED[peer, kind] += sum(len(named(c)) for c in cases.values())

    def decorate(test: Callable) -> Callable:
        def run(c: object) -> None:
            same = Comparisons()
            test(c, same)
            assert sorted(same.names) == sorted(named(c))

        functools.update_wrapper(run, test)
        del run.__wrapped__  # pytest would ask for its arguments
        return pytest.mark.parametrize("c", list(cases.values()), ids=list(cases))(run)

    return decorate


class Comparisons:
    def __init__(self) -> None:
        self.names = []

    def __call__(self, name: str, got: object, expected: object, tolerance: dict = EXACT) -> None:
        """Two tensors or numbers; a mismatch says which of the case's quantities it is."""
        got, expected = (x.detach().double() if isinstance(x, torch.Tensor) else tensor(x) for x in (got, expected))
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda m: f"{name}: {m}")
        self.names.append(name)


def tensor(x: object) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def gradient(total: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def label(**options: object) -> str:
    """A short id of a case: what is None, False or empty is not named."""
    named = {k: v for k, v in options.items() if v not in (None, False, "")}
    return "-".join(v if isinstance(v, str) else f"{k}{v}" for k, v in named.items())


class Inputs:
    """verl's and NeMo-RL's fixed inputs by name, float64, garbage behind the mask."""

    def __init__(self, name: str) -> None:
        raw = VERL["inputs"][name]
        self.mask = tensor(raw["response_mask"]).bool()
        self.groups = [slice(a, b) for a, b in pairwise([*starts(raw["groups"]), len(raw["groups"])])]
        self.alone = torch.tensor([g.stop - g.start == 1 for g in self.groups for _ in range(g.start, g.stop)])
        self.x = {n: tensor(x) for n, x in raw.items() if n != "groups"}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.x[name]

    def grouped(self, estimator: Callable, rewards: torch.Tensor, **options: object) -> torch.Tensor:
        """One number a reply, prompt by prompt: their groups are of 1, 2 and 3 samples."""
        parts = [
            estimator(rewards[rows], None, self.mask[rows], group_size=rows.stop - rows.start, **options)[0]
            for rows in self.groups]
        return torch.cat(parts)[:, 0]

    def batch(self, advantages: torch.Tensor, old: str = "old_log_prob", sampler: str = "old_log_prob") -> Batch:
        return plain_batch(self.mask, self[old], advantages, self[sampler])


def plain_batch(mask: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, sampler: torch.Tensor) -> Batch:
    return Batch(
        mask.long(), mask | True, mask.long(), mask, sampler, mask[:, -1], old_logprobs=old, advantages=advantages)


def evaluation(logprobs: torch.Tensor) -> Evaluation:
    return Evaluation(logprobs.clone().requires_grad_(), torch.zeros_like(logprobs))


def starts(names: Sequence[str]) -> list[int]:
    return [i for i, n in enumerate(names) if i == 0 or names[i - 1] != n]


INPUTS = {name: Inputs(name) for name in ("padded", "edge")}


def verl_cases(key: str, *wanted: str) -> dict[str, dict]:
    """verl's cases of one kind on both inputs, each with the name of its input; perhaps only of some losses."""
    found = [(name, i, c) for name in INPUTS for i, c in enumerate(VERL["results"][name][key])]
    return {f"{name}-{label(loss=c.get('loss', ''), agg=c.get('agg', ''))}-{i}": c | {"input": name}
        for name, i, c in found if not wanted or c["loss"] in wanted}


def each_input(key: str) -> dict[str, dict]:
    return {name: {"input": name, "theirs": VERL["results"][name][key]} for name in INPUTS}
