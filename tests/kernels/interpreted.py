"""The Triton kernels on the CPU, in Triton's interpreter: against `reference` in float64, and each against its twin.

tests/test_kernels.py runs it in a process of its own: TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py
"""

from dataclasses import fields

import numpy as np
import pytest
import test_tiles
import torch
from test_tiles import HEADS, OUTPUTS, RAGGED, REFERENCES, SUBSETS, Case, M, V, case, normal, relative, run, specified
from torch import Tensor

from rlkl.kernels import logits, plain, sampling
from rlkl.kernels.logits import TRITON
from rlkl.kernels.plain import Caps, Finished, Sums, Upstream, Work
from rlkl.logprobs import token_logprobs
from rlkl.rollout.one_pass import inverse_cdf
from rlkl.rollout.sample import pick
from rlkl.tiles import Shape, tiled
from rlkl.types import Sampling

np.seterr(all="ignore")  # both sides of a tl.where are computed
DTYPES = [torch.float32, torch.bfloat16]
VALUE = 2e-5
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 6e-3}  # relative; the interpreter cuts ∂loss/∂product off at 2⁻⁷


@pytest.fixture(autouse=True)
def _several_blocks_a_row(monkeypatch):
    for name in ("ACCUMULATE", "ACCUMULATE_BOTH", "DLOGITS"):
        monkeypatch.setattr(logits, name, getattr(logits, name) | {"BLOCK": 8})


def compare(c: Case, dtype: torch.dtype, subset: tuple[int, ...] | None = None, tile: Shape = RAGGED,
            loose: float = 1.0, **kw) -> None:
    subset = subset or ((0, 1) if c.ref_hidden is None else (0, 1, 2, 3))
    mine = c.to(dtype)
    found = tiled(*mine, functions=TRITON, tile=tile, **kw)
    outputs, grads = specified(mine, subset)
    for a, b in zip([x for x in found if x is not None], outputs, strict=True):
        assert (a - b).abs().max() <= VALUE * loose
    for a, b in zip(run(found, mine, subset), grads, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) <= GRADIENT[dtype] * loose


def test_this_is_the_interpreter():
    assert type(logits.accumulate_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref", REFERENCES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_the_specification(options, ref, dtype):
    compare(test_tiles.per_row(case(options, ref, rows=5)), dtype)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
def test_every_subset_of_the_outputs(subset):
    compare(case(HEADS["all"], rows=5), torch.float32, subset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_bytes", [300, test_tiles.EVERYTHING])
@pytest.mark.parametrize("ref", ["wider", "same head", "none"])
def test_kept_logits(ref, keep_bytes, dtype):
    compare(case(HEADS["all"], ref, rows=5), dtype, keep_bytes=keep_bytes)


@pytest.mark.parametrize("tile", [Shape(M, V), Shape(64, 64), Shape(1, 19), Shape(5, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cut(tile, dtype):
    compare(case(HEADS["all"], rows=7), dtype, tile=tile)


@pytest.mark.parametrize("ids", [[0] * M, [V - 1] * M, list(range(6, 17)), list(range(26, V))])
def test_a_target_may_be_the_first_and_the_last_of_a_tile_and_of_a_block(ids):
    compare(case({})._replace(ids=torch.tensor(ids)), torch.float32)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("ref", ["wider", "none"])
def test_logits_that_are_all_negative_and_blocks_that_do_not_divide_the_tile(monkeypatch, ref, block):
    """A column too many would be a logit of 0, e⁵⁰ times everything else."""
    for name in ("ACCUMULATE", "ACCUMULATE_BOTH", "DLOGITS"):
        monkeypatch.setattr(logits, name, getattr(logits, name) | {"BLOCK": block})
    for tile in (RAGGED, Shape(M, V)):  # a float32 logit of -133 / 0.7 is off by 1e-5 before anything is done to it
        compare(test_tiles.all_negative(ref), torch.float32, tile=tile, loose=30)


@pytest.mark.parametrize(("ref", "dtype"), [("wider", DTYPES[0]), ("same head", DTYPES[1]), ("none", DTYPES[0])])
def test_a_banned_id_has_probability_and_gradient_zero(ref, dtype):
    c, left = test_tiles.with_banned(ref)
    compare(c, dtype)
    mine = c.to(dtype)
    found = [x for x in tiled(*mine, functions=TRITON, tile=RAGGED) if x is not None]
    assert all(x.isfinite().all() for x in found)
    for x in run(found, mine, tuple(range(len(found))))[1:]:
        assert {i for i in range(V) if x[i].any()} == set(left.tolist())


@pytest.mark.parametrize("ref", ["wider", "none"])
def test_no_rows_and_one_row(ref):
    compare(case(HEADS["all"], ref, rows=1), torch.float32)
    c = case(HEADS["all"], ref, rows=0).to(torch.float32)
    sum(x.sum() for x in tiled(*c, functions=TRITON) if x is not None).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in c.leaves)


@pytest.mark.parametrize("keep_bytes", [0, test_tiles.EVERYTHING])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_gives_the_same_twice(dtype, keep_bytes):
    c = case(HEADS["all"], rows=5).to(dtype)
    found = tiled(*c, functions=TRITON, tile=RAGGED, keep_bytes=keep_bytes)
    a, b = (run(found, c, (0, 1, 2, 3), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_fused_is_tiled_with_these_functions():
    c = case(HEADS["all"]).to(torch.float32)
    kw = {"temperature": 0.7, "ref_hidden": c.ref_hidden, "ref_head": c.ref_head}
    a, b = (token_logprobs(c.hidden, c.head, c.ids, backend=name, **kw) for name in ("fused", "tiled"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=VALUE)


# ---------------------------------------------------------------- each function against its twin in torch

ROWS, WIDTH = 5, 11


def work(capped: bool, biased: bool, dtype: torch.dtype) -> Work:
    def caps(scale: float, softcap: float, seed: int) -> Caps:
        bias = normal(WIDTH, seed=seed).to(dtype) if biased else None
        return Caps(scale, softcap if capped else None, bias)

    ids = torch.tensor([-1, 0, WIDTH - 1, WIDTH, 4])  # in the tile before, in this one, in the next
    return Work(ids, torch.linspace(0.5, 2.0, ROWS).to(dtype), caps(1.3, 2.0, 20), caps(0.7, 3.0, 21))


def started(reference: bool, dtype: torch.dtype) -> Sums:
    """Sums that have seen something: rows of nothing yet among them."""
    x = Sums.start(ROWS, torch.empty(0, dtype=dtype), reference)
    for i, f in enumerate(fields(x)):
        value = getattr(x, f.name)
        if value is not None:
            value[1:] = (normal(ROWS - 1, seed=30 + i).abs() + 0.5).to(dtype)
    return x


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_accumulate_adds_what_its_twin_adds(reference, capped, biased):
    sums = {}
    for dtype, function in ((torch.float32, TRITON.accumulate), (torch.float64, plain.accumulate)):
        z, r = (normal(ROWS, WIDTH, seed=s).mul(3).float().to(dtype) for s in (0, 1))
        sums[dtype] = started(reference, dtype)
        function(z, r if reference else None, work(capped, biased, dtype), sums[dtype])
    for f in fields(Sums):
        a, b = (getattr(x, f.name) for x in sums.values())
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
def test_dlogits_is_its_twins_in_the_memory_of_the_tile(subset, capped, dtype):
    def finished(wide: torch.dtype) -> Finished:
        h, kl = normal(ROWS, seed=41), normal(ROWS, seed=42)
        lse, ref_lse = normal(ROWS, seed=43).abs() + 6, normal(ROWS, seed=44).abs() + 6
        return Finished(*(x.to(wide) for x in (lse, h, h, ref_lse, kl, kl)))

    def given(wide: torch.dtype) -> Upstream:
        found = dict(zip(subset, test_tiles.upstream(subset, torch.empty(ROWS, dtype=wide)), strict=True))
        return Upstream(*(found.get(i) for i in range(4)))

    got: dict[torch.dtype, Tensor] = {}
    for wide, function in ((torch.float32, TRITON.dlogits), (torch.float64, plain.dlogits)):
        z, r = (normal(ROWS, WIDTH, seed=s).mul(3).float().to(wide) for s in (0, 1))
        there = z.data_ptr()
        r = r if subset[-1] >= 2 else None
        out = dtype if wide == torch.float32 else wide
        got[wide] = function(z, r, work(capped, True, wide), finished(wide), given(wide), out)
        if wide == torch.float32:
            assert got[wide].data_ptr() == there
    a, b = got.values()
    assert (a.dtype, a.shape) == (dtype, b.shape)
    if dtype == torch.float32:
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=5e-6)
    else:  # rounded once; the interpreter rounds towards zero
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=5e-6)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("width", [1, 33, 97, 700])
@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_its_twin_and_the_rule(width, block, temperature, monkeypatch):
    """Rows wider than the vocabulary, ids of probability 0, uniforms at both ends; the padding holds what would win."""
    monkeypatch.setattr(sampling, "SAMPLE", {"BLOCK": block, "num_warps": 4})
    g = torch.Generator().manual_seed(width)
    rows = 3 * torch.randn(40, width + 7, generator=g)
    rows[:, 1:width:3] = -torch.inf
    rows[:, width:] = 50.0
    u = torch.rand(40, generator=g, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    ids, logprobs = sampling.inverse_cdf(rows[:, :width], u, temperature)
    twin = inverse_cdf(rows[:, :width] / temperature, u)
    rule = pick(rows[:, :width], u, Sampling(temperature))
    assert ids.tolist() == twin[0].tolist() == rule[0].tolist()
    assert ids.dtype == torch.long
    for other in (twin, rule):
        assert (logprobs - other[1]).abs().max() <= 2e-6


def test_sampling_keeps_to_the_last_block_that_has_any_probability(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE", {"BLOCK": 16, "num_warps": 4})
    rows = torch.full((3, 100), -torch.inf)
    rows[:, [20, 35]] = 0.0
    ids, logprobs = sampling.inverse_cdf(rows, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 1.0)
    assert ids.tolist() == [20, 35, 35]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())
