"""The frozen numbers of TRL, verl and NeMo-RL, and comparisons that are counted as defined."""

import functools
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from rlkl.types import Batch, PolicyOutput


def read(peer: str) -> dict:
    packed = (Path(__file__).parent / f"{peer}.json.gz").read_bytes()
    return json.loads(gzip.decompress(packed))


TRL, VERL, NEMO = read("trl"), read("verl"), read("nemo")

# Tolerances. The default is EXACT; the others are where a peer is less exact.
EXACT = {"atol": 1e-9, "rtol": 1e-9}
EPS_1E_8 = {"atol": 2e-8, "rtol": 2e-8}  # verl divides a response's sum by its length + 1e-8
BESSEL32 = {"atol": 1e-7, "rtol": 1e-7}  # TRL computes n / (n - 1) in float32
FLOAT32 = {"atol": 2e-6, "rtol": 2e-6}  # the peer computes in float32, whatever it is given
FLOAT32_SUMS = {"atol": 1e-5, "rtol": 1e-5}  # over a vocabulary: TRL's chunk sizes differ by 5e-6

DEFINED: Counter[tuple[str, str]] = Counter()  # (peer, quantity) → comparisons


def compared(
    peer: str,
    quantity: str,
    cases: dict[str, dict],
    names: Iterable[str] | Callable[[dict], Iterable[str]],
) -> Callable:
    """Turn test(case, same) into one test over a table of cases, by name.

    In each case the test must compare exactly these names, each once. All cases run, and a failure
    names every case that fails.
    """

    def names_of(case: dict) -> list[str]:
        return sorted(names(case) if callable(names) else names)

    assert cases
    DEFINED[peer, quantity] += sum(len(names_of(case)) for case in cases.values())

    def decorate(test: Callable) -> Callable:
        def run() -> None:
            failures = []
            for name, case in cases.items():
                same = Comparisons()
                try:
                    test(case, same)
                    assert sorted(same.names) == names_of(case), f"compared {same.names}"
                except AssertionError as error:
                    failures.append(f"case {name}: {error}")
                except Exception as error:
                    error.add_note(f"in case {name}")
                    raise
            assert not failures, "\n\n".join(failures)

        functools.update_wrapper(run, test)
        del run.__wrapped__  # pytest would ask for its arguments
        return run

    return decorate


class Comparisons:
    """Compares numbers, and keeps the names of what was compared."""

    def __init__(self) -> None:
        self.names = []

    def __call__(self, name: str, ours: object, theirs: object, tolerance: dict = EXACT) -> None:
        """Two tensors or numbers; a mismatch names the quantity."""
        torch.testing.assert_close(
            float64(ours), float64(theirs), **tolerance, msg=lambda m: f"{name}: {m}"
        )
        self.names.append(name)


def tensor(x: object) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def float64(x: object) -> torch.Tensor:
    return x.detach().double() if isinstance(x, torch.Tensor) else tensor(x)


def gradient(total: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def label(**options: object) -> str:
    """A short name of a case: an option that is None, False or empty is left out."""
    given = {name: x for name, x in options.items() if x not in (None, False, "")}
    return "-".join(x if isinstance(x, str) else f"{name}{x}" for name, x in given.items())


class Inputs:
    """The fixed inputs of verl and NeMo-RL by name, in float64; junk outside the mask."""

    def __init__(self, name: str) -> None:
        raw = VERL["inputs"][name]
        self.tensors = {n: tensor(x) for n, x in raw.items() if n != "groups"}
        self.mask = self.tensors["response_mask"].bool()
        bounds = [*starts(raw["groups"]), len(raw["groups"])]
        self.groups = [slice(a, b) for a, b in pairwise(bounds)]
        sizes = torch.tensor([rows.stop - rows.start for rows in self.groups])
        self.alone = sizes.repeat_interleave(sizes) == 1  # (B,) the only response to its prompt

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def grouped(
        self, estimator: Callable, rewards: torch.Tensor, **options: object
    ) -> torch.Tensor:
        """(B,) one advantage a response, prompt by prompt: the groups are of 1, 2 and 3 samples."""
        parts = []
        for rows in self.groups:
            size = rows.stop - rows.start
            advantages, _ = estimator(
                rewards[rows], None, self.mask[rows], group_size=size, **options
            )
            parts.append(advantages)
        return torch.cat(parts)[:, 0]

    def batch(
        self, advantages: torch.Tensor, old: str = "old_log_prob", sampler: str = "old_log_prob"
    ) -> Batch:
        return plain_batch(self.mask, self[old], advantages, self[sampler])


def plain_batch(
    mask: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, sampler: torch.Tensor
) -> Batch:
    """A batch with junk outside the mask set to 0, as train.py fills it."""
    batch = Batch(
        prompt_ids=mask.long(),
        prompt_mask=torch.ones_like(mask),
        response_ids=mask.long(),
        mask=mask,
        sampler_logprobs=sampler,
        truncated=mask[:, -1],
        old_logprobs=old,
        advantages=advantages,
    )
    batch.zero_padding()
    return batch


def policy_output(logprobs: torch.Tensor) -> PolicyOutput:
    return PolicyOutput(logprobs.clone().requires_grad_(), torch.zeros_like(logprobs))


def starts(names: Sequence[str]) -> list[int]:
    """Where each run of equal names begins."""
    return [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


INPUTS = {name: Inputs(name) for name in ("padded", "edge")}


def verl_cases(key: str, *losses: str) -> dict[str, dict]:
    """verl's cases of one kind on both inputs, each with the name of its input.

    losses: only these.
    """
    cases = {}
    for name in INPUTS:
        for i, case in enumerate(VERL["results"][name][key]):
            if not losses or case["loss"] in losses:
                parts = label(loss=case.get("loss", ""), agg=case.get("agg", ""))
                cases[f"{name}-{parts}-{i}"] = case | {"input": name}
    return cases


def each_input(key: str) -> dict[str, dict]:
    return {name: {"input": name, "theirs": VERL["results"][name][key]} for name in INPUTS}
