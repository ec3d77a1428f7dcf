"""fused on CUDA: against float64 at awkward and at real shapes; memory, repeatability, CUDA graphs, bf16 products."""

import itertools
import math

import pytest
import test_tiles
import torch
from test_tiles import HEADS, RAGGED, REFERENCES, Case, case, per_row, relative, run, specified
from torch import Tensor

from rlkl.kernels.plain import Caps, Sums, Upstream, Work, finish
from rlkl.logprobs import LOGITS_BUDGET, chosen, token_logprobs
from rlkl.tiles import Shape, add_product, product, tile_for, tiled
from rlkl.types import Head

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16]
VALUE = 5e-5  # nats
GRADIENT = {torch.float32: 5e-5, torch.bfloat16: 4e-3}  # relative; rounding to bf16 is 1.7e-3 by itself
GB = 2**30


def fused(c: Case, **kw) -> tuple:
    from rlkl.kernels.logits import TRITON

    return tiled(*c, functions=TRITON, **kw)


def compare(c: Case, dtype: torch.dtype, loose: float = 1.0, **kw) -> None:
    mine = c.to(dtype, "cuda")
    subset = (0, 1) if c.ref_hidden is None else (0, 1, 2, 3)
    found = fused(mine, **kw)
    outputs, grads = specified(mine, subset)
    for a, b in zip([x for x in found if x is not None], outputs, strict=True):
        assert a.is_cuda
        assert (a - b).abs().max() <= VALUE * loose
    for a, b in zip(run(found, mine, subset), grads, strict=True):
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
    ids = torch.cat([product(part, weight).softmax(-1).multinomial(1, generator=g).squeeze(1)
                     for part in hidden.split(1024)])
    other = (normal(rows, width) * std, Head(normal(columns, width) / math.sqrt(width))) if reference else (None, None)
    return Case(hidden.requires_grad_(), Head(weight.requires_grad_()), ids, torch.ones(rows, device="cuda"), *other)


# ---------------------------------------------------------------- float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_every_head_is_the_specification(options, dtype):
    compare(per_row(case(options)), dtype, tile=RAGGED)
    compare(per_row(case(options, "none")), dtype)


@pytest.mark.parametrize("keep_bytes", [0, 500, test_tiles.EVERYTHING])
@pytest.mark.parametrize("ref", REFERENCES)
def test_every_reference_and_kept_logits_are_the_specification(ref, keep_bytes):
    for dtype in DTYPES:
        compare(case(HEADS["all"], ref), dtype, tile=RAGGED, keep_bytes=keep_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "columns"), [
    (1, 64, 252), (123, 64, 507), (252, 123, 1003), (507, 252, 4099), (300, 129, 16_385), (129, 896, 20_001)])
def test_awkward_shapes_are_float64(rows, width, columns, dtype):
    for options, ref in (({}, "none"), ({"bias": True, "softcap": 20.0, "vocab_size": columns - 5}, "wider")):
        c = case(options, ref, rows=rows, width=width, columns=columns)
        compare(c, dtype)
        compare(c, dtype, tile=Shape(min(rows, 100), 300))


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


def check_large(c: Case, tile: Shape | None = None) -> None:
    subset = (0, 1) if c.ref_hidden is None else (0, 1, 2, 3)
    found = fused(c, tile=tile)
    grads = run(found, c, subset)
    outputs, want = specified(c, subset)
    gap = (found[0] - outputs[0]).abs()
    assert gap.max() <= 1e-4
    assert gap.mean() <= 1e-5
    for a, b in zip([x for x in found if x is not None], outputs, strict=True):
        assert (a - b).abs().max() <= 2e-4
    assert all(relative(a, b) <= GRADIENT[torch.bfloat16] for a, b in zip(grads, want, strict=True))


@pytest.mark.parametrize(("rows", "width", "columns", "reference"), SHAPES.values(), ids=SHAPES)
def test_real_vocabularies_are_float64(rows, width, columns, reference):
    needs(60)
    check_large(large(rows, width, columns, reference))


def test_s8_three_quarters_masked():
    needs(60)
    c = large(2048, 2048, 151_936)
    left = torch.arange(2048, device="cuda") % 4 == 1
    check_large(Case(c.hidden.detach()[left].requires_grad_(), c.head, c.ids[left], c.temperature[left], None, None))


def test_l1_from_logits_in_one_tile():
    """The two kernels by themselves, on a tile of whole rows."""
    needs(16)
    from rlkl.kernels.logits import TRITON

    rows, columns = 512, 151_936
    g = torch.Generator("cuda").manual_seed(0)
    z = 3 * torch.randn(rows, columns, generator=g, device="cuda")
    ids = torch.randint(columns, (rows,), generator=g, device="cuda")
    caps, sums = Caps(1.0, None, None), Sums.start(rows, z, False)
    work = Work(ids, torch.ones(rows, device="cuda"), caps, caps)
    TRITON.accumulate(z.clone(), None, work, sums)
    done, logp = finish(sums), z.double().log_softmax(1)
    want = logp.gather(1, ids[:, None]).squeeze(1)
    assert (done.logprobs - want).abs().max() <= 1e-5
    assert (done.entropy + (logp.exp() * logp).sum(1)).abs().max() <= 2e-5
    up = torch.randn(rows, generator=g, device="cuda")
    p = logp.exp()
    exact = -p * up.double()[:, None]
    exact[torch.arange(rows, device="cuda"), ids] += up.double()
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        tile = z.clone()
        d = TRITON.dlogits(tile, None, work, done, Upstream(up, None, None, None), dtype)
        assert d.data_ptr() == tile.data_ptr()
        assert relative(d, exact) <= most


def test_more_logits_than_an_int32_can_count_in_one_tile():
    needs(40)
    rows, columns, last = 16_400, 131_072, 64
    assert rows * columns > 2**31
    c = large(rows, 16, columns)
    c = c._replace(head=Head(c.head.weight.detach()))
    found = fused(c, tile=Shape(rows, columns))
    (grad,) = torch.autograd.grad(found[0].sum() + found[1].sum(), c.hidden)
    for few in (slice(0, last), slice(rows - last, rows)):
        hidden = c.hidden.detach()[few].double().requires_grad_()
        stats = token_logprobs(hidden, Head(c.head.weight.double()), c.ids[few], backend="reference")
        (want,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), hidden)
        assert (found[0][few] - stats.logprobs).abs().max() <= VALUE
        assert (found[1][few] - stats.entropy).abs().max() <= VALUE
        assert relative(grad[few], want) <= GRADIENT[torch.bfloat16]


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
def test_memory_is_one_tile_the_states_gradient_and_one_tile_of_the_weights_gradient(reference):
    needs(12)
    rows, width, columns = 8192, 1024, 65_536
    c = large(rows, width, columns, reference)
    subset = (0, 1, 2) if reference else (0, 1)
    tile = tile_for(rows, columns, 4, True)
    assert tile == Shape(8192, 16_384)

    def compute() -> list[Tensor]:
        return run(fused(c), c, subset)

    gradients = sum(x.nbytes for x in compute())  # also: kernels are compiled, cuBLAS takes its workspace
    plan = tile.rows * tile.columns * 4 * (1 + reference) + rows * width * 4 + tile.columns * width * 4
    assert peak(compute) <= gradients + 1.1 * plan
    with torch.no_grad():
        assert peak(lambda: fused(c)) <= 1.1 * tile.rows * tile.columns * 4 * (1 + reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref", ["wider", "same head", "none"])
def test_two_runs_have_the_same_bits(ref, dtype):
    c = case({"bias": True}, ref, rows=1000, width=256, columns=5000).to(dtype, "cuda")
    subset = (0, 1) if ref == "none" else (0, 1, 2, 3)

    def compute() -> list[Tensor]:
        found = fused(c, tile=Shape(512, 2048))
        return [x for x in found if x is not None] + run(found, c, subset)

    first = compute()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, compute(), strict=True))


def test_kept_logits_give_the_same_bits_as_logits_made_again():
    c = case({}, rows=1000, width=256, columns=5000).to(torch.bfloat16, "cuda")
    tile, kept = Shape(512, 2048), (0, 10**7, test_tiles.EVERYTHING)
    runs = [run(fused(c, tile=tile, keep_bytes=k), c, (0, 1, 2, 3)) for k in kept]
    for a, b in itertools.pairwise(runs):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cuda_graph_of_forward_and_backward_replays_what_eager_computes():
    c = case({}, rows=512, width=256, columns=5000).to(torch.bfloat16, "cuda")
    up = [torch.randn(512, device="cuda") for _ in range(4)]

    def compute() -> list[Tensor]:
        found = fused(c, tile=Shape(256, 2048))
        return [*found, *torch.autograd.grad(found, c.leaves, up)]

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


# ---------------------------------------------------------------- products, and who computes


@pytest.mark.parametrize(("rows", "width", "columns"), [(512, 1024, 2048), (123, 252, 507), (8192, 896, 1024)])
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
    add_product(added, a, b.T.contiguous())
    assert ((added - total.double() - exact).abs() / size).max() <= 2e-6
    narrow = torch.zeros(rows, columns, device="cuda").view(torch.bfloat16)[:, :columns]  # ∂loss/∂products in a tile
    narrow.copy_(total)
    weight_gradient = torch.zeros(columns, width, device="cuda")
    add_product(weight_gradient, narrow.T, a)
    want = narrow.double().T @ a.double()
    assert ((weight_gradient - want).abs() / (narrow.double().abs().T @ a.double().abs())).max() <= 2e-6


def test_auto_is_fused_beyond_the_budget():
    head = Head(torch.empty(65_536, 8, device="cuda", dtype=torch.bfloat16))
    most = LOGITS_BUDGET // (4 * 65_536)
    assert [chosen(rows, head) for rows in (1, most, most + 1)] == ["reference", "reference", "fused"]
    c = large(most + 1, 8, 65_536)
    a, b = (token_logprobs(*c[:3], backend=name) for name in ("auto", "fused"))
    assert torch.equal(a.logprobs, b.logprobs)
    assert torch.equal(a.entropy, b.entropy)
    plain = token_logprobs(*c[:3], backend="tiled")
    assert (a.logprobs - plain.logprobs).abs().max() <= VALUE


def test_no_rows_give_a_differentiable_zero():
    c = case({}, rows=0).to(torch.bfloat16, "cuda")
    sum(x.sum() for x in fused(c)).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in c.leaves)
