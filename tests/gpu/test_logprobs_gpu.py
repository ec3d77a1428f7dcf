"""The fused backend on CUDA, against float64 at awkward and at real shapes.

Also memory, repeatability, CUDA graphs and bf16 products.
"""

import itertools
import math

import pytest
import test_tiles
import torch
from test_tiles import (
    EVERYTHING,
    HEADS,
    RAGGED,
    REFERENCES,
    Case,
    case,
    gradients,
    per_row,
    relative,
    specified,
)
from torch import Tensor

from rlkl.logprobs import LOGITS_BUDGET, choose_backend, token_logprobs
from rlkl.logprobs.reference import product
from rlkl.logprobs.tile_torch import LogitTransform, Sums, TileInputs, Upstream, finish
from rlkl.logprobs.tiled import Shape, add_product, tile_for, tiled_logprobs
from rlkl.types import Head

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16]
VALUE = 5e-5  # nats
# Relative. Rounding to bf16 is 1.7e-3 by itself.
GRADIENT = {torch.float32: 5e-5, torch.bfloat16: 4e-3}
GB = 2**30


def fused(c: Case, **options) -> tuple:
    from rlkl.logprobs.tile_triton import TRITON

    return tiled_logprobs(*c, functions=TRITON, **options)


def without_none(outputs: tuple) -> list[Tensor]:
    return [x for x in outputs if x is not None]


def compare(c: Case, dtype: torch.dtype, loose: float = 1.0, **options) -> None:
    """Outputs and gradients on CUDA are those of `reference_logprobs` in float64."""
    on_cuda = c.to(dtype, "cuda")
    outputs = fused(on_cuda, **options)
    expected, expected_gradients = specified(on_cuda, c.all_outputs)
    for a, b in zip(without_none(outputs), expected, strict=True):
        assert a.is_cuda
        assert (a - b).abs().max() <= VALUE * loose
    computed = gradients(outputs, on_cuda, c.all_outputs)
    for a, b in zip(computed, expected_gradients, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) <= GRADIENT[dtype] * loose


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def large(rows: int, width: int, columns: int, reference: bool = False, std: float = 3.0) -> Case:
    """bf16 operands made on the GPU; ids sampled from the policy's own softmax."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

    hidden, weight = normal(rows, width) * std, normal(columns, width) / math.sqrt(width)
    ids = [
        product(part, weight).softmax(-1).multinomial(1, generator=g).squeeze(1)
        for part in hidden.split(1024)
    ]
    ref_hidden = ref_head = None
    if reference:
        ref_hidden = normal(rows, width) * std
        ref_head = Head(normal(columns, width) / math.sqrt(width))
    return Case(
        hidden.requires_grad_(),
        Head(weight.requires_grad_()),
        torch.cat(ids),
        torch.ones(rows, device="cuda"),
        ref_hidden,
        ref_head,
    )


# ---------------------------------------------------------------- against float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_every_head_is_the_specification(options, dtype):
    compare(per_row(case(options)), dtype, tile=RAGGED)
    compare(per_row(case(options, "none")), dtype)


@pytest.mark.parametrize("keep_bytes", [0, 500, EVERYTHING])
@pytest.mark.parametrize("ref", REFERENCES)
def test_every_reference_and_kept_logits_are_the_specification(ref, keep_bytes):
    for dtype in DTYPES:
        compare(case(HEADS["all"], ref), dtype, tile=RAGGED, keep_bytes=keep_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [
        (1, 64, 252),
        (123, 64, 507),
        (252, 123, 1003),
        (507, 252, 4099),
        (300, 129, 16_385),
        (129, 896, 20_001),
    ],
)
def test_awkward_shapes_are_float64(rows, width, columns, dtype):
    for options, ref in (
        ({}, "none"),
        ({"bias": True, "softcap": 20.0, "vocab_size": columns - 5}, "wider"),
    ):
        c = case(options, ref, rows=rows, width=width, columns=columns)
        compare(c, dtype)
        compare(c, dtype, tile=Shape(min(rows, 100), 300))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_odd_vocabulary_within_a_padded_embedding_is_float64(dtype):
    for ref in ("wider", "same head", "none"):
        options = {"bias": True, "vocab_size": 16_401}
        c = case(options, ref, rows=300, width=128, columns=16_512)
        compare(c, dtype)
        compare(c, dtype, tile=Shape(128, 4096), keep_bytes=EVERYTHING)


@pytest.mark.parametrize("ref", ["wider", "none"])
def test_all_negative_and_banned_logits(ref):
    compare(test_tiles.all_negative(ref), torch.float32, loose=20, tile=RAGGED)
    compare(test_tiles.with_banned(ref)[0], torch.float32, tile=RAGGED)


SHAPES = {  # kernels of real models with fewer rows
    "S1": (1024, 896, 151_936, True),
    "S2": (1024, 1536, 151_936, False),
    "S3": (1024, 2048, 151_936, True),
    "S4": (1024, 4096, 151_936, False),
    "S5": (1024, 4096, 128_256, False),
    "S6": (2048, 4096, 151_936, False),
    "S7": (1024, 4096, 131_072, False),
}


def check_large(c: Case) -> None:
    outputs = fused(c)
    computed = gradients(outputs, c, c.all_outputs)
    expected, expected_gradients = specified(c, c.all_outputs)
    gap = (outputs[0] - expected[0]).abs()
    assert gap.max() <= 1e-4
    assert gap.mean() <= 1e-5
    for a, b in zip(without_none(outputs), expected, strict=True):
        assert (a - b).abs().max() <= 2e-4
    for a, b in zip(computed, expected_gradients, strict=True):
        assert relative(a, b) <= GRADIENT[torch.bfloat16]


@pytest.mark.parametrize(("rows", "width", "columns", "reference"), SHAPES.values(), ids=SHAPES)
def test_real_vocabularies_are_float64(rows, width, columns, reference):
    needs(60)
    check_large(large(rows, width, columns, reference))


def test_real_vocabularies_with_three_quarters_of_the_rows_masked():
    needs(60)
    c = large(2048, 2048, 151_936)
    unmasked = torch.arange(2048, device="cuda") % 4 == 1
    hidden = c.hidden.detach()[unmasked].requires_grad_()
    temperature = c.temperature[unmasked]
    check_large(c._replace(hidden=hidden, ids=c.ids[unmasked], temperature=temperature))


def test_the_two_kernels_by_themselves():
    """On a tile of whole rows, without products."""
    needs(16)
    from rlkl.logprobs.tile_triton import TRITON

    rows, columns = 512, 151_936
    g = torch.Generator("cuda").manual_seed(0)
    z = 3 * torch.randn(rows, columns, generator=g, device="cuda")
    ids = torch.randint(columns, (rows,), generator=g, device="cuda")
    transform = LogitTransform(1.0, None, None)
    inputs = TileInputs(ids, torch.ones(rows, device="cuda"), transform, transform, columns)
    sums = Sums.start(rows, z, reference=False)
    TRITON.accumulate(z.clone(), None, inputs, sums)
    totals, logp = finish(sums), z.double().log_softmax(1)
    expected = logp.gather(1, ids[:, None]).squeeze(1)
    assert (totals.logprobs - expected).abs().max() <= 1e-5
    assert (totals.entropy + (logp.exp() * logp).sum(1)).abs().max() <= 2e-5
    g_logprobs = torch.randn(rows, generator=g, device="cuda")
    exact = -logp.exp() * g_logprobs.double()[:, None]
    exact[torch.arange(rows, device="cuda"), ids] += g_logprobs.double()
    upstream = Upstream(g_logprobs, None, None, None)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        tile = z.clone()
        d = TRITON.dlogits(tile, None, inputs, totals, upstream, dtype)
        assert d.data_ptr() == tile.data_ptr()
        assert relative(d, exact) <= tolerance


def test_more_logits_than_an_int32_can_count_in_one_tile():
    needs(40)
    rows, columns, last = 16_400, 131_072, 64
    assert rows * columns > 2**31
    c = large(rows, 16, columns)
    c = c._replace(head=Head(c.head.weight.detach()))
    logprobs, entropy, *_ = fused(c, tile=Shape(rows, columns))
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), c.hidden)
    for few in (slice(0, last), slice(rows - last, rows)):
        hidden = c.hidden.detach()[few].double().requires_grad_()
        head = Head(c.head.weight.double())
        stats = token_logprobs(hidden, head, c.ids[few], backend="reference")
        (expected,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), hidden)
        assert (logprobs[few] - stats.logprobs).abs().max() <= VALUE
        assert (entropy[few] - stats.entropy).abs().max() <= VALUE
        assert relative(grad[few], expected) <= GRADIENT[torch.bfloat16]


# ---------------------------------------------------------------- memory, repeatability, graphs


def peak(compute) -> int:
    """Bytes allocated at the highest point of compute(), above what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("reference", [False, True])
def test_memory_is_one_tile_and_the_states_gradient(reference):
    needs(12)
    rows, width, columns = 8192, 1024, 65_536
    c = large(rows, width, columns, reference)
    subset = (0, 1, 2) if reference else (0, 1)
    tile = tile_for(rows, columns, 4, True)
    assert tile == Shape(8192, 16_384)

    def compute() -> list[Tensor]:
        return gradients(fused(c), c, subset)

    # The first call also compiles the kernels, and cuBLAS takes its workspace.
    gradient_bytes = sum(x.nbytes for x in compute())
    logits = tile.rows * tile.columns * 4 * (1 + reference)
    plan = logits + rows * width * 4
    assert peak(compute) <= gradient_bytes + 1.1 * plan
    with torch.no_grad():
        assert peak(lambda: fused(c)) <= 1.1 * logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref", ["wider", "same head", "none"])
def test_two_runs_have_the_same_bits(ref, dtype):
    c = case({"bias": True}, ref, rows=1000, width=256, columns=5000).to(dtype, "cuda")

    def compute() -> list[Tensor]:
        outputs = fused(c, tile=Shape(512, 2048))
        return without_none(outputs) + gradients(outputs, c, c.all_outputs)

    first = compute()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, compute(), strict=True))


def test_kept_logits_give_the_same_bits_as_logits_computed_again():
    c = case({}, rows=1000, width=256, columns=5000).to(torch.bfloat16, "cuda")
    results = []
    for keep_bytes in (0, 10**7, EVERYTHING):
        outputs = fused(c, tile=Shape(512, 2048), keep_bytes=keep_bytes)
        results.append(gradients(outputs, c, (0, 1, 2, 3)))
    for a, b in itertools.pairwise(results):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cuda_graph_of_forward_and_backward_replays_what_eager_computes():
    c = case({}, rows=512, width=256, columns=5000).to(torch.bfloat16, "cuda")
    up = [torch.randn(512, device="cuda") for _ in range(4)]

    def compute() -> list[Tensor]:
        outputs = fused(c, tile=Shape(256, 2048))
        return [*outputs, *torch.autograd.grad(outputs, c.leaves, up)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for seed in (1, 2):
        with torch.no_grad():
            c.hidden.copy_(torch.randn(512, 256, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        for i, (a, b) in enumerate(zip(captured, compute(), strict=True)):
            assert a.isfinite().all()
            assert relative(a, b.double()) <= (1e-5 if i < 4 else 1e-3)


# ---------------------------------------------------------------- products, choice of backend


@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(512, 1024, 2048), (123, 252, 507), (8192, 896, 1024)]
)
def test_products_of_bf16_are_summed_and_returned_in_float32(rows, width, columns):
    """Rounded to bf16 they would be off by 1e-4 of Σ|a||b|."""
    g = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(rows, width, generator=g, device="cuda").bfloat16()
    b = torch.randn(columns, width, generator=g, device="cuda").bfloat16()
    total = torch.randn(rows, columns, generator=g, device="cuda")
    exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    for x in (product(a, b), product(a.float(), b.float())):
        assert x.dtype == torch.float32
        assert ((x - exact).abs() / size).max() <= 2e-6
    added = total.clone()
    add_product(added, a, b.T.contiguous(), first=False)
    assert ((added - total.double() - exact).abs() / size).max() <= 2e-6

    # ∂loss/∂products lie in the memory of a float32 tile.
    tile = torch.zeros(rows, columns, device="cuda")
    narrow = tile.view(torch.bfloat16)[:, :columns]
    narrow.copy_(total)
    exact = narrow.double().T @ a.double()
    size = narrow.double().abs().T @ a.double().abs()
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
        weight_gradient = torch.full((columns, width), torch.nan, device="cuda", dtype=dtype)
        add_product(weight_gradient, narrow.T, a, first=True)
        assert ((weight_gradient - exact).abs() / size).max() <= bound


def test_auto_is_fused_beyond_the_budget():
    head = Head(torch.empty(65_536, 8, device="cuda", dtype=torch.bfloat16))
    most = LOGITS_BUDGET // (4 * 65_536)
    backends = [choose_backend(rows, head) for rows in (1, most, most + 1)]
    assert backends == ["reference", "reference", "fused"]
    c = large(most + 1, 8, 65_536)
    auto = token_logprobs(*c[:3], backend="auto")
    fused_stats = token_logprobs(*c[:3], backend="fused")
    assert torch.equal(auto.logprobs, fused_stats.logprobs)
    assert torch.equal(auto.entropy, fused_stats.entropy)
    plain = token_logprobs(*c[:3], backend="tiled")
    assert (auto.logprobs - plain.logprobs).abs().max() <= VALUE


def test_no_rows_give_a_differentiable_zero():
    c = case({}, rows=0).to(torch.bfloat16, "cuda")
    sum(x.sum() for x in fused(c)).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in c.leaves)
