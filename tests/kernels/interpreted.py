"""The Triton kernels in Triton's interpreter, on the CPU: against `reference_logprobs` in float64,
and each against its twin in torch.

tests/test_kernels.py runs this file in a process of its own:
TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py
"""

import itertools
from dataclasses import fields

import numpy as np
import pytest
import test_tiles
import torch
from test_tiles import (
    EVERYTHING,
    HEADS,
    OUTPUTS,
    RAGGED,
    REFERENCES,
    SUBSETS,
    Case,
    M,
    V,
    case,
    gradients,
    normal,
    per_row,
    relative,
    specified,
)
from torch import Tensor

from rlkl.logprobs import tile_torch, tile_triton, token_logprobs
from rlkl.logprobs.tile_torch import LogitTransform, Sums, TileInputs, Totals, Upstream
from rlkl.logprobs.tile_triton import TRITON
from rlkl.logprobs.tiled import Shape, tiled_logprobs
from rlkl.rollout import sampling_triton
from rlkl.rollout.one_pass import inverse_cdf
from rlkl.rollout.sampling import pick
from rlkl.types import SamplingParams

np.seterr(all="ignore")  # the interpreter computes both sides of a tl.where
DTYPES = [torch.float32, torch.bfloat16]
VALUE = 2e-5  # nats
# Relative. The interpreter truncates ∂loss/∂products to bfloat16 instead of rounding.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def use_blocks_of(columns: int, monkeypatch) -> None:
    for name in ("ACCUMULATE", "ACCUMULATE_BOTH", "DLOGITS"):
        options = getattr(tile_triton, name) | {"BLOCK": columns}
        monkeypatch.setattr(tile_triton, name, options)


@pytest.fixture(autouse=True)
def _several_blocks_per_row(monkeypatch):
    use_blocks_of(8, monkeypatch)


def compare(
    c: Case,
    dtype: torch.dtype,
    subset: tuple[int, ...] | None = None,
    tile: Shape = RAGGED,
    loose: float = 1.0,
    **options,
) -> None:
    """Outputs and gradients of the kernels are those of `reference_logprobs` in float64."""
    subset = subset or c.all_outputs
    narrow = c.to(dtype)
    outputs = tiled_logprobs(*narrow, functions=TRITON, tile=tile, **options)
    expected, expected_gradients = specified(narrow, subset)
    given = [x for x in outputs if x is not None]
    for a, b in zip(given, expected, strict=True):
        assert (a - b).abs().max() <= VALUE * loose
    for a, b in zip(gradients(outputs, narrow, subset), expected_gradients, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) <= GRADIENT[dtype] * loose


def test_this_is_the_interpreter():
    assert type(tile_triton.accumulate_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_and_gradients_are_the_specification(options):
    compare(per_row(case(options, rows=5)), torch.float32)
    compare(per_row(case(options, rows=5)), torch.bfloat16)
    compare(per_row(case(options, "none", rows=5)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_the_specification_for_every_reference(dtype):
    for ref in REFERENCES:
        compare(per_row(case(HEADS["all"], ref, rows=5)), dtype)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
def test_every_subset_of_the_outputs(subset):
    compare(case(HEADS["all"], rows=5), torch.float32, subset)


@pytest.mark.parametrize("ref", ["wider", "same head", "none"])
def test_kept_logits(ref):
    compare(case(HEADS["all"], ref, rows=5), torch.float32, keep_bytes=300)
    compare(case(HEADS["all"], ref, rows=5), torch.float32, keep_bytes=EVERYTHING)
    compare(case(HEADS["all"], ref, rows=5), torch.bfloat16, keep_bytes=EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_shape(dtype):
    for tile in (Shape(M, V), Shape(64, 64), Shape(1, 19), Shape(5, 5)):
        compare(case(HEADS["all"], rows=7), dtype, tile=tile)


def test_a_target_may_be_the_first_and_the_last_of_a_tile_and_of_a_block():
    for ids in ([0] * M, [V - 1] * M, list(range(6, 17)), list(range(26, V))):
        compare(case({}, "none")._replace(ids=torch.tensor(ids)), torch.float32)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("ref", ["wider", "none"])
def test_logits_that_are_all_negative_and_blocks_that_do_not_divide_the_tile(
    monkeypatch, ref, block
):
    """A column too many would be a logit of 0, e⁵⁰ times everything else."""
    use_blocks_of(block, monkeypatch)
    for tile in (RAGGED, Shape(M, V)):
        # A float32 logit of -133 / 0.7 is off by 1e-5 before anything is done with it.
        compare(test_tiles.all_negative(ref), torch.float32, tile=tile, loose=30)


@pytest.mark.parametrize(
    ("ref", "dtype"), [("wider", DTYPES[0]), ("same head", DTYPES[1]), ("none", DTYPES[0])]
)
def test_a_banned_id_has_probability_and_gradient_zero(ref, dtype):
    c, allowed = test_tiles.with_banned(ref)
    compare(c, dtype)
    narrow = c.to(dtype)
    outputs = tiled_logprobs(*narrow, functions=TRITON, tile=RAGGED)
    assert all(x.isfinite().all() for x in outputs if x is not None)
    for grad in gradients(outputs, narrow, c.all_outputs)[1:]:
        assert {i for i in range(V) if grad[i].any()} == set(allowed.tolist())


@pytest.mark.parametrize("ref", ["wider", "none"])
def test_no_rows_and_one_row(ref):
    compare(case(HEADS["all"], ref, rows=1), torch.float32)
    c = case(HEADS["all"], ref, rows=0).to(torch.float32)
    sum(x.sum() for x in tiled_logprobs(*c, functions=TRITON) if x is not None).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in c.leaves)


def test_a_second_backward_gives_the_same_gradients():
    for dtype, keep_bytes in ((torch.float32, 0), *((d, EVERYTHING) for d in DTYPES)):
        c = case(HEADS["all"], rows=5).to(dtype)
        outputs = tiled_logprobs(*c, functions=TRITON, tile=RAGGED, keep_bytes=keep_bytes)
        first = gradients(outputs, c, (0, 1, 2, 3), retain_graph=True)
        second = gradients(outputs, c, (0, 1, 2, 3), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fused_is_tiled_with_these_functions():
    c = case(HEADS["all"]).to(torch.float32)
    options = {"temperature": 0.7, "ref_hidden": c.ref_hidden, "ref_head": c.ref_head}
    fused = token_logprobs(*c[:3], backend="fused", **options)
    plain = token_logprobs(*c[:3], backend="tiled", **options)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=VALUE)


# ---------------------------------------------------------------- each function against its twin

ROWS, WIDTH = 5, 11


def tile_inputs(capped: bool, biased: bool, dtype: torch.dtype, valid: int = WIDTH) -> TileInputs:
    def transform(scale: float, softcap: float, seed: int) -> LogitTransform:
        bias = normal(WIDTH, seed=seed).to(dtype) if biased else None
        return LogitTransform(scale, softcap if capped else None, bias)

    # In the tile before, in this one, in the padding or the next one.
    ids = torch.tensor([-1, 0, valid - 1, valid, 4])
    inverse_temperature = torch.linspace(0.5, 2.0, ROWS).to(dtype)
    transforms = transform(1.3, 2.0, 20), transform(0.7, 3.0, 21)
    return TileInputs(ids, inverse_temperature, *transforms, valid)


def products(dtype: torch.dtype, valid: int = WIDTH) -> tuple[Tensor, Tensor]:
    """A tile of products and one of the reference's: the same float32 numbers in every dtype.

    Padding holds logits that would win.
    """
    z, r = (normal(ROWS, WIDTH, seed=seed).mul(3).float().to(dtype) for seed in (0, 1))
    z[:, valid:] = r[:, valid:] = 90.0
    return z, r


def partial_sums(reference: bool, dtype: torch.dtype) -> Sums:
    """Sums of earlier tiles; those of the first row are still empty."""
    sums = Sums.start(ROWS, torch.empty(0, dtype=dtype), reference)
    for i, f in enumerate(fields(sums)):
        value = getattr(sums, f.name)
        if value is not None:
            value[1:] = (normal(ROWS - 1, seed=30 + i).abs() + 0.5).to(dtype)
    return sums


@pytest.mark.parametrize("reference", [False, True])
def test_accumulate_adds_what_its_twin_adds(reference):
    for capped, biased, valid in itertools.product((False, True), (False, True), (1, 9, WIDTH)):
        sums = []
        for dtype, functions in ((torch.float32, TRITON), (torch.float64, tile_torch.TORCH)):
            z, r = products(dtype, valid)
            before = z.clone(), r.clone()
            sums.append(partial_sums(reference, dtype))
            inputs = tile_inputs(capped, biased, dtype, valid)
            functions.accumulate(z, r if reference else None, inputs, sums[-1])
            if not functions.accumulate_overwrites:
                assert torch.equal(z, before[0])
                assert torch.equal(r, before[1])
        for f in fields(Sums):
            a, b = (getattr(x, f.name) for x in sums)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def dlogits_of(
    functions: tile_torch.TileFunctions,
    subset: tuple[int, ...],
    capped: bool,
    wide: torch.dtype,
    out: torch.dtype,
    valid: int,
) -> tuple[Tensor, bool]:
    """∂loss/∂products for upstream gradients of a subset, and whether it lies in the tile."""
    entropy, kl = normal(ROWS, seed=41), normal(ROWS, seed=42)
    lse, ref_lse = normal(ROWS, seed=43).abs() + 6, normal(ROWS, seed=44).abs() + 6
    totals = Totals(*(x.to(wide) for x in (lse, entropy, entropy, ref_lse, kl, kl)))
    grads = test_tiles.upstream(subset, torch.empty(ROWS, dtype=wide))
    by_index = dict(zip(subset, grads, strict=True))
    g = Upstream(*(by_index.get(i) for i in range(4)))
    z, r = products(wide, valid)
    address = z.data_ptr()
    of_kl = subset[-1] >= 2
    inputs = tile_inputs(capped, True, wide, valid)
    d = functions.dlogits(z, r if of_kl else None, inputs, totals, g, out)
    return d, d.data_ptr() == address


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
def test_dlogits_is_its_twins_in_the_memory_of_the_tile(subset):
    for capped, dtype, valid in (
        (True, torch.float32, WIDTH),
        (True, torch.bfloat16, 9),
        (False, torch.float32, 1),
    ):
        d, in_place = dlogits_of(TRITON, subset, capped, torch.float32, dtype, valid)
        twin, _ = dlogits_of(tile_torch.TORCH, subset, capped, torch.float64, torch.float64, valid)
        assert in_place
        assert not d[:, valid:].any()
        assert not twin[:, valid:].any()
        assert (d.dtype, d.shape) == (dtype, twin.shape)
        # bf16 is rounded once; the interpreter rounds towards zero.
        rtol = 5e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(d.double(), twin, rtol=rtol, atol=5e-6)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("width", [1, 33, 97, 700])
def test_sampling_gives_the_tokens_of_its_twin_and_of_pick(width, monkeypatch):
    """Rows wider than the vocabulary, ids of probability 0, uniforms at both ends.

    The padding columns hold logits that would win.
    """
    g = torch.Generator().manual_seed(width)
    rows = 3 * torch.randn(20, width + 7, generator=g)
    rows[:, 1:width:3] = -torch.inf
    rows[:, width:] = 50.0
    logits = rows[:, :width]
    u = torch.rand(20, generator=g, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    for block, temperature in ((16, 0.7), (64, 1.0), (4096, 0.7)):
        monkeypatch.setattr(sampling_triton, "SAMPLE", {"BLOCK": block, "num_warps": 4})
        ids, logprobs = sampling_triton.inverse_cdf(logits, u, temperature)
        twin_ids, twin_logprobs = inverse_cdf(logits / temperature, u)
        pick_ids, pick_logprobs = pick(logits, u, SamplingParams(temperature))
        assert ids.tolist() == twin_ids.tolist() == pick_ids.tolist()
        assert ids.dtype == torch.long
        assert (logprobs - twin_logprobs).abs().max() <= 2e-6
        assert (logprobs - pick_logprobs).abs().max() <= 2e-6


def test_sampling_stays_within_the_last_block_that_has_any_probability(monkeypatch):
    monkeypatch.setattr(sampling_triton, "SAMPLE", {"BLOCK": 16, "num_warps": 4})
    rows = torch.full((3, 100), -torch.inf)
    rows[:, [20, 35]] = 0.0
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ids, logprobs = sampling_triton.inverse_cdf(rows, u, 1.0)
    assert ids.tolist() == [20, 35, 35]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())
