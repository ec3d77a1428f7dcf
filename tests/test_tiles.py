"""tiles.py against `reference`, which holds all logits: values, every gradient, memory, and what is not computed.

The cases and the comparison serve tests/kernels/ and tests/gpu/ too.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlkl import logprobs, tiles
from rlkl.logprobs import chosen, head_logits, reference, token_logprobs
from rlkl.tiles import Functions, Shape, product, tile_for, tiled, vocabulary
from rlkl.types import Head

M, D, V = 11, 6, 37
OUTPUTS = ("logprobs", "entropy", "kl_pi_ref", "kl_ref_pi")
HEADS = {  # what models do to h @ W.T before the softmax
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 1.5},
    "padded": {"vocab_size": V - 5},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.5, "vocab_size": V - 5},
}
TILES = {
    "ragged": Shape(4, 10),
    "one": Shape(M, V),
    "larger than all": Shape(64, 64),
    "a row at a time": Shape(1, 9),
    "a column at a time": Shape(5, 1),
}
RAGGED = TILES["ragged"]
REFERENCES = ("wider", "same width", "same head", "none")
SUBSETS = [s for n in (1, 2, 3, 4) for s in itertools.combinations(range(4), n)]
EVERYTHING = 10**9  # bytes of kept logits


class Case(NamedTuple):
    hidden: Tensor
    head: Head
    ids: Tensor
    temperature: float | Tensor
    ref_hidden: Tensor | None
    ref_head: Head | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """A copy whose hidden, weight and bias are leaves; a head that is also the reference's stays one."""
        def wide(x: Any) -> Any:
            return x.detach().to(device, dtype, copy=True) if isinstance(x, Tensor) else x

        head = self.head._replace(weight=wide(self.head.weight).requires_grad_(), bias=wide(self.head.bias))
        if head.bias is not None:
            head.bias.requires_grad_()
        ref_head = self.ref_head
        if ref_head is self.head:
            ref_head = head
        elif ref_head is not None:
            ref_head = ref_head._replace(weight=wide(ref_head.weight), bias=wide(ref_head.bias))
        tau = self.temperature  # a number of float32 or more: it is no operand of a product
        if isinstance(tau, Tensor):
            tau = tau.to(device, torch.promote_types(dtype, torch.float32))
        return Case(wide(self.hidden).requires_grad_(), head, self.ids.to(device), tau, wide(self.ref_hidden), ref_head)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None and x.requires_grad]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(options: dict, ref: str = "wider", rows: int = M, width: int = D, columns: int = V, seed: int = 0,
         std: float = 2.0) -> Case:
    """Logits of standard deviation `std`; ids at the edges of the ragged tile and at both ends of the vocabulary."""
    options = dict(options)
    biased, n = options.pop("bias", False), options.get("vocab_size") or columns

    def head(width: int, seed: int) -> Head:
        bias = normal(columns, seed=seed + 1) if biased else None
        return Head(normal(columns, width, seed=seed) * (std / width**0.5), bias, **options)

    edges = [0, n - 1, *(i for e in range(RAGGED.columns, n, RAGGED.columns) for i in (e, e - 1))]
    ids = torch.tensor([edges[i % len(edges)] for i in range(rows)], dtype=torch.long)
    mine, other = head(width, seed + 1), width + 3 if ref == "wider" else width
    hidden, ref_hidden = normal(rows, width, seed=seed), normal(rows, other, seed=seed + 5)
    if ref == "none":
        return Case(hidden, mine, ids, 0.7, None, None)
    return Case(hidden, mine, ids, 0.7, ref_hidden, mine if ref == "same head" else head(other, seed + 6))


def per_row(c: Case) -> Case:
    return c._replace(temperature=torch.linspace(0.4, 2.2, len(c.hidden), dtype=torch.float64))


def upstream(subset: tuple[int, ...], like: Tensor) -> list[Tensor]:
    return [normal(len(like), seed=100 + i).to(like) for i in subset]


def run(found: tuple, c: Case, subset: tuple[int, ...], **kw: Any) -> list[Tensor]:
    """Gradients of random sums of a subset of the outputs."""
    return list(torch.autograd.grad([found[i] for i in subset], c.leaves, upstream(subset, found[0]), **kw))


def specified(c: Case, subset: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of `reference` in float64."""
    c = c.to(torch.float64, c.hidden.device.type)
    found = reference(*c, True, 0)
    return [x for x in found if x is not None], run(found, c, subset)


def compare(c: Case, subset: tuple[int, ...] | None = None, atol: float = 1e-12, **kw: Any) -> None:
    subset = subset or ((0, 1) if c.ref_hidden is None else (0, 1, 2, 3))
    mine = c.to(torch.float64)
    found = tiled(*mine, **kw)
    outputs, grads = specified(c, subset)
    torch.testing.assert_close([x for x in found if x is not None], outputs, rtol=1e-12, atol=atol)
    torch.testing.assert_close(run(found, mine, subset), grads, rtol=1e-12, atol=atol)


def all_negative(ref: str) -> Case:
    """Every logit is below -50."""
    c = case({}, ref)
    low = [Head(-h.weight.abs() - 9) for h in (c.head, c.ref_head) if h is not None]
    if c.ref_hidden is not None:
        c = c._replace(ref_hidden=c.ref_hidden.abs() + 1, ref_head=low[1])
    return c._replace(hidden=c.hidden.abs() + 1, head=low[0])


def with_banned(ref: str) -> tuple[Case, Tensor]:
    """Ids banned by a bias of -inf, the first ragged tile as a whole; and the ids that are left."""
    c = case({"bias": True}, ref)
    banned = torch.tensor([*range(13), 20, V - 1])
    left = torch.tensor([i for i in range(V) if i not in banned])
    for head in (c.head, c.ref_head):
        if head is not None:
            head.bias[banned] = -torch.inf
    return c._replace(ids=left[torch.arange(M) * 2]), left


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


each_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
each_reference = pytest.mark.parametrize("ref", REFERENCES)


# ---------------------------------------------------------------- equal to the specification


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
@each_head
def test_values_and_gradients_of_every_subset_of_outputs_are_the_specification(options, subset):
    compare(per_row(case(options)), subset, tile=RAGGED)


@pytest.mark.parametrize("keep_bytes", [0, 500, EVERYTHING])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@each_reference
@each_head
def test_no_cut_into_tiles_no_reference_and_no_kept_logits_change_anything(options, ref, tile, keep_bytes):
    compare(case(options, ref), tile=tile, keep_bytes=keep_bytes)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 3, torch.tensor(0.8)])
@each_reference
def test_a_temperature_is_a_number_or_one_a_row(ref, temperature):
    c = case(HEADS["all"], ref)
    compare(c._replace(temperature=temperature), tile=RAGGED)
    compare(per_row(c), tile=RAGGED, keep_bytes=500)


def test_the_reference_may_have_other_options_than_the_policy():
    c = case(HEADS["all"])
    for options in ({"scale": 0.5, "softcap": None, "bias": None}, {"softcap": 1.0}, {"scale": 1.0}):
        compare(c._replace(ref_head=c.ref_head._replace(**options)), tile=RAGGED)
        compare(c._replace(head=c.head._replace(**options)), tile=RAGGED)


def test_the_reference_may_be_padded_to_another_length():
    c = case(HEADS["padded"])
    longer = c.ref_head._replace(weight=torch.cat([c.ref_head.weight, normal(9, D + 3, seed=50)]))
    want, same = tiled(*c, tile=RAGGED), tiled(*c._replace(ref_head=longer), tile=RAGGED)
    assert all(torch.equal(a, b) for a, b in zip(want, same, strict=True))


@pytest.mark.parametrize("ids", [[0] * M, [V - 1] * M, list(range(9, 20)), list(range(26, V))])
def test_a_target_may_be_the_first_and_the_last_of_a_tile(ids):
    compare(case({})._replace(ids=torch.tensor(ids)), tile=RAGGED)


@each_reference
def test_one_row(ref):
    compare(case(HEADS["all"], ref, rows=1), tile=RAGGED)
    compare(case(HEADS["all"], ref, rows=1))


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@each_reference
@each_head
def test_no_rows_give_a_differentiable_zero(options, ref, keep_bytes):
    c = case(options, ref, rows=0).to(torch.float64)
    found = tiled(*c, keep_bytes=keep_bytes)
    assert {tuple(x.shape) for x in found if x is not None} == {(0,)}
    sum(x.sum() for x in found if x is not None).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in c.leaves)


@pytest.mark.parametrize("ref", ["wider", "none"])
def test_logits_that_are_all_negative_and_a_last_tile_that_is_narrower(ref):
    """A column too many would be a logit of 0, e⁵⁰ times everything else."""
    c = all_negative(ref)
    assert head_logits(c.hidden, c.head).max() < -50
    compare(c, tile=RAGGED)
    compare(c)


@each_reference
def test_logits_of_ten_thousand(ref):
    c = case({}, ref)
    c = c._replace(head=c.head._replace(weight=c.head.weight.sign() * 1e4), hidden=c.hidden.sign(), temperature=0.5)
    c = c._replace(ref_head=c.head) if ref == "same head" else c
    assert head_logits(c.hidden, c.head).abs().max() >= 1e4
    subset = (0, 1) if ref == "none" else (0, 1, 2, 3)
    outputs, grads = specified(c, subset)
    wide = c.to(torch.float64)
    found = tiled(*wide, tile=RAGGED)
    torch.testing.assert_close([x for x in found if x is not None], outputs, rtol=1e-12, atol=1e-10)
    for a, b in zip(run(found, wide, subset), grads, strict=True):  # products of numbers of 1e4 that cancel
        assert (a - b).abs().max() <= 2e-11 * max(b.abs().max().item(), 1e5)
    sharp = c.to(torch.float32)
    found = [x for x in tiled(*sharp, tile=RAGGED) if x is not None]
    assert all(x.isfinite().all() for x in (*found, *run(found, sharp, tuple(range(len(found))))))


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@each_reference
def test_a_banned_id_has_probability_and_gradient_zero(ref, keep_bytes):
    c, left = with_banned(ref)
    banned = [i for i in range(V) if i not in left]
    compare(c, tile=RAGGED, keep_bytes=keep_bytes)
    mine = c.to(torch.float64)
    found = [x for x in tiled(*mine, tile=RAGGED, keep_bytes=keep_bytes) if x is not None]
    _, weight, bias = run(found, mine, tuple(range(len(found))))
    assert not weight[banned].any()
    assert not bias[banned].any()
    assert all(x.isfinite().all() for x in found)

    def without(head: Head | None) -> Head | None:
        return head and Head(head.weight[left], head.bias[left])

    rest = c._replace(head=without(c.head), ref_head=without(c.ref_head), ids=torch.arange(M) * 2)
    torch.testing.assert_close(found, specified(rest, (0,))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", range(4), ids=OUTPUTS)
@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("ref", ["wider", "same head"])
@each_head
def test_gradcheck(options, ref, keep_bytes, output):
    options = options | ({"vocab_size": 5} if "vocab_size" in options else {})
    c = per_row(case(options, ref, rows=3, width=2, columns=7)).to(torch.float64)
    if ref == "same head":  # moving the weight would move the reference too
        assert torch.autograd.gradcheck(
            lambda x: tiled(*c._replace(hidden=x), tile=Shape(2, 3), keep_bytes=keep_bytes)[output], c.hidden)
        return

    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mine = c._replace(hidden=hidden, head=c.head._replace(weight=weight, bias=bias))
        return tiled(*mine, tile=Shape(2, 3), keep_bytes=keep_bytes)[output]

    assert torch.autograd.gradcheck(of, c.leaves)


# ---------------------------------------------------------------- what is not computed


@pytest.fixture
def count(monkeypatch):
    """Shapes of the products made, and dtypes, shapes of the sums that gradients were added to."""
    made = {"product": [], "add_product": []}

    def counted(name: str) -> None:
        was = getattr(tiles, name)
        monkeypatch.setattr(tiles, name, lambda *args: (made[name].append(tuple(args[0].shape)), was(*args))[1])

    counted("product")
    counted("add_product")
    return made


GRID = math.ceil(M / RAGGED.rows) * math.ceil(V / RAGGED.columns)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(("ref", "forward"), [("wider", 2 * GRID), ("same width", 2 * GRID), ("same head", GRID)])
def test_the_reference_is_multiplied_again_only_for_the_gradient_of_a_kl(count, ref, forward, subset):
    c = case({}, ref).to(torch.float64)
    found = tiled(*c, tile=RAGGED)
    assert len(count["product"]) == forward
    count["product"].clear()
    run(found, c, subset)
    of_kl = 2 in subset or 3 in subset
    assert len(count["product"]) == (forward if of_kl else GRID)
    rows = 2 * M if ref == "same head" and of_kl else M
    assert sum(r for r, _ in count["product"]) == rows * GRID // 3 * (2 if forward > GRID and of_kl else 1)


def test_no_upstream_gradient_at_all_costs_nothing(count):
    c = case({}).to(torch.float64)
    found = tiled(*c, tile=RAGGED)
    made = len(count["product"])
    assert found[0].grad_fn.apply(None, None, None, None) == (None,) * 9
    assert len(count["product"]) == made


@pytest.mark.parametrize("keep_bytes", [0, 799, 800, 2000, 10_000, EVERYTHING])
@each_reference
def test_kept_logits_are_not_multiplied_again_and_stay_within_their_bytes(count, ref, keep_bytes):
    c = case({}, ref).to(torch.float64)
    found = tiled(*c, tile=RAGGED, keep_bytes=keep_bytes)
    kept = [x for pair in found[0].grad_fn.kept.values() for x in pair if x is not None]
    assert sum(x.nbytes for x in kept) <= keep_bytes
    assert sum(x.untyped_storage().nbytes() for x in kept) <= keep_bytes
    forward, again = len(count["product"]), GRID - len(found[0].grad_fn.kept)
    run(found, c, tuple(range(2 if ref == "none" else 4)))
    assert len(count["product"]) - forward == again * forward // GRID
    assert (again == GRID) == (keep_bytes == 0)
    if keep_bytes == EVERYTHING:
        assert again == 0
        assert sum(x.nbytes for x in kept) == M * V * 8 * (1 if ref == "none" else 2)


@pytest.mark.parametrize("keep_bytes", [0, 2000, EVERYTHING])
@each_reference
def test_backward_twice_gives_the_same_twice(ref, keep_bytes):
    c = case(HEADS["all"], ref).to(torch.float64)
    found = tiled(*c, tile=RAGGED, keep_bytes=keep_bytes)
    subset = (0, 1) if ref == "none" else (0, 1, 2, 3)
    first = run(found, c, subset, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, run(found, c, subset, retain_graph=True), strict=True))
    for i in subset:  # and each output by itself, after all together
        grads = run(found, c, (i,), retain_graph=True)
        torch.testing.assert_close(grads, specified(c, (i,))[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_a_frozen_head_gets_no_product_and_frozen_states_get_none(count, options, keep_bytes):
    whole = case(options).to(torch.float64)
    want = run(tiled(*whole, tile=RAGGED), whole, (0, 1, 2, 3))
    for frozen in ("head", "hidden"):
        c = case(options).to(torch.float64)
        for x in (c.head.weight, c.head.bias) if frozen == "head" else (c.hidden,):
            if x is not None:
                x.requires_grad_(False)
        count["add_product"].clear()
        found = run(tiled(*c, tile=RAGGED, keep_bytes=keep_bytes), c, (0, 1, 2, 3))
        assert len(count["add_product"]) == GRID
        across = M * GRID // 3 if frozen == "head" else vocabulary(c.head) * GRID // 4
        assert sum(s[0] for s in count["add_product"]) == across
        torch.testing.assert_close(found, want[:1] if frozen == "head" else want[1:], rtol=0, atol=0)


def test_nothing_to_differentiate_keeps_nothing():
    c = case({}).to(torch.float64)
    for x in c.leaves:
        x.requires_grad_(False)
    found = tiled(*c, tile=RAGGED, keep_bytes=EVERYTHING)
    assert not any(x.requires_grad for x in found)


def test_without_gradients_nothing_is_kept(monkeypatch):
    made: list = []
    was = tiles.Tiled.forward
    monkeypatch.setattr(tiles.Tiled, "forward", lambda ctx, *args: (made.append(ctx), was(ctx, *args))[1])
    with torch.no_grad():
        tiled(*case({}).to(torch.float64), tile=RAGGED, keep_bytes=EVERYTHING)
    assert [ctx.kept for ctx in made] == [{}]


def test_a_second_derivative_is_refused():
    c = case({}, "none").to(torch.float64)
    (grad,) = torch.autograd.grad(tiled(*c, tile=RAGGED)[0].sum(), c.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), c.hidden)


@each_reference
def test_the_reference_gets_no_gradient(ref):
    if ref == "none":
        return
    c = case(HEADS["all"], ref).to(torch.float64)
    c.ref_hidden.requires_grad_()
    found = tiled(*c, tile=RAGGED)
    assert torch.autograd.grad(found[2].sum(), c.ref_hidden, allow_unused=True) == (None,)


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_padding_rows_of_the_embedding_get_a_gradient_of_exactly_zero(dtype, keep_bytes):
    c = case(HEADS["all"]).to(dtype)
    _, weight, bias = run(tiled(*c, tile=RAGGED, keep_bytes=keep_bytes), c, (0, 1, 2, 3))
    assert not weight[V - 5 :].any()
    assert not bias[V - 5 :].any()
    assert weight[: V - 5].any(1).all()
    assert bias[: V - 5].all()


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@each_reference
@each_head
def test_arguments_and_upstream_gradients_are_not_written_to(options, ref, keep_bytes):
    c = per_row(case(options, ref)).to(torch.float64)
    subset = (0, 1) if ref == "none" else (0, 1, 2, 3)
    given = upstream(subset, c.hidden)
    held = [x for x in tree_leaves((c, given)) if isinstance(x, Tensor)]
    before = [(x.detach().clone(), x._version) for x in held]
    found = tiled(*c, tile=RAGGED, keep_bytes=keep_bytes)
    torch.autograd.grad([found[i] for i in subset], c.leaves, given)
    assert all(torch.equal(x, y) and x._version == v for x, (y, v) in zip(held, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_float32_or_more_and_gradients_are_what_they_belong_to(dtype):
    c = case(HEADS["all"]).to(dtype)
    found = tiled(*c, tile=RAGGED)
    assert {x.dtype for x in found} == {torch.promote_types(dtype, torch.float32)}
    assert [(x.dtype, x.shape) for x in run(found, c, (0, 1))] == [(x.dtype, x.shape) for x in c.leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@each_head
def test_kl_to_a_copy_is_exactly_zero_and_to_the_same_head_zero_up_to_rounding(options, dtype):
    c = case(options, "same head").to(dtype)
    c = c._replace(ref_hidden=c.hidden.detach().clone())
    copy = c._replace(ref_head=c.head._replace(weight=c.head.weight.detach().clone()))
    for mine, most in ((copy, 0.0), (c, 1e-6)):
        found = tiled(*mine, tile=RAGGED)
        assert found[2].abs().max() <= most
        assert found[3].abs().max() <= most
        assert all(x.abs().max() < 1e-5 for x in run(found, mine, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_row_has_the_same_bits_in_every_company_of_the_same_size(dtype):
    """In its place in a row tile of one size: who wants the bits of a row alone pads the tile."""
    rows, tile = 48, Shape(16, 300)
    c = per_row(case(HEADS["all"] | {"vocab_size": 995}, rows=rows, width=96, columns=1000)).to(dtype)
    other = case({}, rows=rows, width=96, seed=50).to(dtype)
    with torch.no_grad():
        whole = tiled(*c, tile=tile)
        for kept in (slice(0, 1), slice(7, 9), slice(15, 17), slice(20, 48)):
            stay = torch.zeros(rows, dtype=torch.bool)
            stay[kept] = True
            company = c._replace(hidden=torch.where(stay[:, None], c.hidden, other.hidden),
                                 ref_hidden=torch.where(stay[:, None], c.ref_hidden, other.ref_hidden))
            first = kept.start // 16 * 16  # the row tiles that hold the kept rows, without the others
            last = first + 16 * -(-(kept.stop - first) // 16)
            few = Case(*(x[first:last] if isinstance(x, Tensor) else x for x in company))
            for mine, offset in ((company, 0), (few, first)):
                found = tiled(*mine, tile=tile)
                here = slice(kept.start - offset, kept.stop - offset)
                assert all(torch.equal(a[kept], b[here]) for a, b in zip(whole, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ref", REFERENCES)
def test_padded_tiles_give_a_row_the_same_bits_in_a_company_of_any_size(ref, dtype):
    tile = Shape(16, 300)
    c = per_row(case(HEADS["all"] | {"vocab_size": 995}, ref, rows=48, width=96, columns=1000)).to(dtype)
    with torch.no_grad():
        whole = tiled(*c, tile=tile, pad=True)
        for n in (1, 5, 16, 17, 47):
            few = Case(*(x[:n] if isinstance(x, Tensor) else x for x in c))
            for a, b in zip(whole, tiled(*few, tile=tile, pad=True), strict=True):
                assert a is b is None or torch.equal(a[:n], b)


@pytest.mark.parametrize("keep_bytes", [0, 500, EVERYTHING])
@each_reference
@each_head
def test_padded_tiles_change_no_value_and_no_gradient(options, ref, keep_bytes):
    compare(case(options, ref), tile=RAGGED, keep_bytes=keep_bytes, pad=True)


# ---------------------------------------------------------------- memory and rounding at real sizes


class Held(TorchDispatchMode):
    """Bytes of the storages alive, made under this mode, at the highest point."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if id(storage) not in self.seen and id(storage) not in given:
                    self.seen[id(storage)] = weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return found

    def gone(self, key: int, nbytes: int) -> None:
        del self.seen[key]
        self.now -= nbytes


def held(compute, c: Case, subset: tuple[int, ...]) -> tuple[int, list[Tensor], list[Tensor]]:
    """Most bytes held at once, without the gradients; outputs; gradients."""
    with Held() as mode:
        found = compute(c)
        grads = run(found, c, subset)
    return mode.most - sum(x.nbytes for x in grads), list(found[:2]), grads


def test_memory_is_counted_as_what_is_alive():
    with Held() as mode:
        x = torch.zeros(100)
        y = x[:10]
        del x
        z = y + 1
        assert (mode.now, mode.most) == (440, 440)
        del y, z
        assert (mode.now, mode.most) == (0, 440)


@pytest.mark.parametrize("ref", ["none", "wider"])
def test_one_tile_of_logits_at_a_time_and_one_of_the_weights_gradient(ref):
    """The loops of forward and backward with functions that need nothing, as Triton's: one tile, dh, one tile of dW."""
    hollow = Functions(lambda z, r, work, sums: None, lambda z, r, work, done, g, dtype: z)
    c, tile = case({}, ref, rows=64, width=32, columns=4096).to(torch.float32), Shape(16, 1024)
    logits, rows_of_w, states = tile.rows * tile.columns * 4, tile.columns * 32 * 4, 64 * 32 * 4
    used, *_ = held(lambda c: tiled(*c, functions=hollow, tile=tile), c, (0, 1) if ref == "none" else (0, 2))
    assert used <= 1.1 * (logits * (1 if ref == "none" else 2) + rows_of_w + states)
    with Held() as forward, torch.no_grad():
        tiled(*c, functions=hollow, tile=tile)
    assert forward.most <= 1.1 * logits * (1 if ref == "none" else 2)


def test_float32_at_a_real_vocabulary_is_float64_to_1e_5_in_an_eighth_of_the_memory():
    c = case({}, "none", rows=512, width=256, columns=32_000, std=3.0)
    ids = torch.randint(32_000, (512,), generator=torch.Generator().manual_seed(1))
    c = c._replace(ids=ids, temperature=1.0)
    naive, _, _ = held(lambda c: reference(*c, True, 0), c.to(torch.float32), (0, 1))
    used, found, grads = held(lambda c: tiled(*c), c.to(torch.float32), (0, 1))
    want, want_grads = specified(c, (0, 1))
    assert max((a - b).abs().max().item() for a, b in zip(found, want, strict=True)) <= 1e-5
    assert max(relative(a, b) for a, b in zip(grads, want_grads, strict=True)) <= 1e-5
    assert used <= naive / 8


def peaked(rows: int, width: int, columns: int = 32_000) -> Case:
    """bf16 states and unembedding, logits of standard deviation 6, ids sampled from their softmax."""
    g = torch.Generator().manual_seed(0)
    weight = torch.empty(columns, width, dtype=torch.bfloat16)
    for part in weight.split(4000):
        part.copy_(torch.randn(part.shape, generator=g) / width**0.5)
    hidden = (torch.randn(rows, width, generator=g) * 6).bfloat16()
    ids = (product(hidden, weight).softmax(-1)).multinomial(1, generator=g).squeeze(1)
    return Case(hidden, Head(weight), ids, 1.0, None, None)


@pytest.mark.parametrize(("rows", "width"), [(1792, 896), (256, 4096)])
def test_logprobs_of_bf16_operands_are_those_of_float64_to_2e_5(rows, width):
    c = peaked(rows, width)
    assert 5.5 < product(c.hidden[:64], c.head.weight).std() < 6.5
    with torch.no_grad():
        got, entropy, *_ = tiled(*c)
        wide = c.hidden.double()
        z = torch.cat([wide @ part.double().T for part in c.head.weight.split(8000)], 1)
        chosen_logits, lse = z.gather(1, c.ids[:, None]).squeeze(1), z.logsumexp(1)
        want = chosen_logits - lse
        z -= lse[:, None]
        want_entropy = -z.exp().mul_(z).sum(1)
    gap = (got - want).abs()
    assert gap.max() <= 2e-5
    assert gap.mean() <= 2e-6
    assert (entropy - want_entropy).abs().max() <= 2e-5


@pytest.mark.parametrize(("rows", "width"), [(128, 896), (64, 2048)])
def test_gradients_of_bf16_operands_are_those_of_float64_to_3e_3(rows, width):
    c = peaked(rows, width, 16_000)
    mine = c.to(torch.bfloat16)
    got = run(tiled(*mine, tile=Shape(rows // 2, 5000)), mine, (0, 1))
    for a, b in zip(got, specified(c, (0, 1))[1], strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) <= 3e-3
        assert relative(a, b) <= 2 * relative(b.bfloat16(), b)  # nothing is rounded more than once more


# ---------------------------------------------------------------- who computes


def test_auto_takes_the_plain_way_up_to_the_budget_and_tiles_beyond(monkeypatch):
    head = Head(torch.empty(150_000, 1, device="meta"), vocab_size=128_000)
    most = logprobs.LOGITS_BUDGET // (4 * 128_000)
    assert [chosen(rows, head) for rows in (0, 1, most, most + 1)] == ["reference"] * 3 + ["tiled"]
    assert chosen(most * 150_000 // 128_000 + 1, head._replace(vocab_size=None)) == "tiled"
    c, called = case({}), []
    for name, was in logprobs.BACKENDS.items():
        monkeypatch.setitem(logprobs.BACKENDS, name, lambda *a, name=name, was=was: (called.append(name), was(*a))[1])
    for budget in (M * V * 4, M * V * 4 - 1):
        monkeypatch.setattr(logprobs, "LOGITS_BUDGET", budget)
        token_logprobs(*c[:3], ref_hidden=c.ref_hidden, ref_head=c.ref_head)
    assert called == ["reference", "tiled"]


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
def test_two_vocabularies_are_refused(backend):
    c = case({})
    kw = {"ref_hidden": c.ref_hidden, "backend": backend}
    for other in (c.ref_head._replace(vocab_size=V - 1), Head(c.ref_head.weight[:-1])):
        with pytest.raises(ValueError, match=f"vocabularies of {V} and, in the reference, {V - 1} ids"):
            token_logprobs(c.hidden, c.head, c.ids, ref_head=other, **kw)
    same = c.ref_head._replace(vocab_size=V)
    assert token_logprobs(c.hidden, c.head, c.ids, ref_head=same, **kw).kl_pi_ref.isfinite().all()


def test_keep_bytes_reach_the_tiles_and_an_entropy_not_asked_for_is_none():
    c = case({}).to(torch.float64)
    kw = {"ref_hidden": c.ref_hidden, "ref_head": c.ref_head, "backend": "tiled"}
    for keep_bytes, kept in ((0, 0), (EVERYTHING, 1)):
        stats = token_logprobs(c.hidden, c.head, c.ids, entropy=False, keep_bytes=keep_bytes, **kw)
        assert stats.entropy is None
        assert len(stats.logprobs.grad_fn.kept) == kept


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("bytes_each", [4, 8])
def test_a_tile_fits_its_bytes_and_the_problem(cuda, bytes_each):
    budget = tiles.TILE_BYTES if cuda else tiles.TILE_BYTES_CPU
    for rows, columns in itertools.product((0, 1, 7, 512, 9000, 10**6), (1, 255, 256, 32_000, 151_936)):
        tile = tile_for(rows, columns, bytes_each, cuda)
        assert 1 <= tile.rows <= max(rows, 1)
        assert 1 <= tile.columns <= columns
        assert tile.rows * tile.columns * bytes_each <= budget
        assert tile.columns == columns or tile.columns % 256 == 0


def test_the_vocabulary_is_the_columns_that_are_not_padding():
    weight = torch.empty(10, 1)
    assert [vocabulary(Head(weight, vocab_size=n)) for n in (None, 1, 9, 10, 11)] == [10, 1, 9, 10, 10]
