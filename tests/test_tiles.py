"""Tiles against the specification, which holds all logits: values, gradients, memory, products.

The cases and the comparison also serve tests/kernels/ and tests/gpu/.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from memory_meter import MemoryMeter
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlkl import logprobs
from rlkl.logprobs import choose_backend, tiled, token_logprobs
from rlkl.logprobs.reference import head_logits, product, reference_logprobs, vocabulary
from rlkl.logprobs.tile_torch import TORCH, TileFunctions
from rlkl.logprobs.tiled import (
    Plan,
    Shape,
    add_product,
    aligned_columns,
    column_spans,
    products_of_bf16,
    tile_for,
    tiled_logprobs,
)
from rlkl.policy.microbatches import pack_groups
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
FLOATS = (torch.bfloat16, torch.float32, torch.float64)
HOLLOW = TileFunctions(  # allocates nothing and does not overwrite a tile, as Triton's
    lambda z, r, inputs, sums: None,
    lambda z, r, inputs, totals, g, dtype: z,
    accumulate_overwrites=False,
)


class Case(NamedTuple):
    """The arguments of `reference_logprobs` and `tiled_logprobs`."""

    hidden: Tensor
    head: Head
    ids: Tensor
    temperature: float | Tensor
    ref_hidden: Tensor | None
    ref_head: Head | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """A copy whose hidden, weight and bias are leaves.

        A head that is also the reference's stays one object.
        """

        def copied(x: Any) -> Any:
            return x.detach().to(device, dtype, copy=True) if isinstance(x, Tensor) else x

        def copied_head(head: Head) -> Head:
            return head._replace(weight=copied(head.weight), bias=copied(head.bias))

        head = copied_head(self.head)
        for x in (head.weight, head.bias):
            if x is not None:
                x.requires_grad_()
        ref_head = self.ref_head
        if ref_head is self.head:
            ref_head = head
        elif ref_head is not None:
            ref_head = copied_head(ref_head)
        temperature = self.temperature
        if isinstance(temperature, Tensor):  # it is no operand of a product: at least float32
            temperature = temperature.to(device, torch.promote_types(dtype, torch.float32))
        return Case(
            copied(self.hidden).requires_grad_(),
            head,
            self.ids.to(device),
            temperature,
            copied(self.ref_hidden),
            ref_head,
        )

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is computed for."""
        trained = (self.hidden, self.head.weight, self.head.bias)
        return [x for x in trained if x is not None and x.requires_grad]

    @property
    def all_outputs(self) -> tuple[int, ...]:
        """The indices of the outputs that this case has."""
        return (0, 1) if self.ref_hidden is None else (0, 1, 2, 3)


def normal(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def case(
    options: dict,
    ref: str = "wider",
    rows: int = M,
    width: int = D,
    columns: int = V,
    seed: int = 0,
    std: float = 2.0,
) -> Case:
    """A case in float64 whose logits have standard deviation `std`.

    options: of HEADS. ref: of REFERENCES. The ids are those at the edges of the ragged tile and at
    both ends of the vocabulary.
    """
    options = dict(options)
    biased = options.pop("bias", False)
    last = (options.get("vocab_size") or columns) - 1

    def head(width: int, seed: int) -> Head:
        bias = normal(columns, seed=seed + 1) if biased else None
        return Head(normal(columns, width, seed=seed) * (std / width**0.5), bias, **options)

    edges = [0, last]
    for edge in range(RAGGED.columns, last + 1, RAGGED.columns):
        edges += [edge, edge - 1]
    ids = torch.tensor([edges[i % len(edges)] for i in range(rows)], dtype=torch.long)
    policy_head = head(width, seed + 1)
    ref_width = width + 3 if ref == "wider" else width
    hidden, ref_hidden = normal(rows, width, seed=seed), normal(rows, ref_width, seed=seed + 5)
    if ref == "none":
        return Case(hidden, policy_head, ids, 0.7, None, None)
    ref_head = policy_head if ref == "same head" else head(ref_width, seed + 6)
    return Case(hidden, policy_head, ids, 0.7, ref_hidden, ref_head)


def per_row(c: Case) -> Case:
    """The case with another temperature for each row."""
    return c._replace(temperature=torch.linspace(0.4, 2.2, len(c.hidden), dtype=torch.float64))


def upstream(subset: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """Random gradients of some outputs."""
    return [normal(len(like), seed=100 + i).to(like) for i in subset]


def gradients(outputs: tuple, c: Case, subset: tuple[int, ...], **options: Any) -> list[Tensor]:
    """Of the leaves, for random upstream gradients of a subset of the outputs."""
    some = [outputs[i] for i in subset]
    return list(torch.autograd.grad(some, c.leaves, upstream(subset, outputs[0]), **options))


def specified(c: Case, subset: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of `reference_logprobs` in float64."""
    c = c.to(torch.float64, c.hidden.device.type)
    outputs = reference_logprobs(*c, True, 0)
    return [x for x in outputs if x is not None], gradients(outputs, c, subset)


def compare(c: Case, subset: tuple[int, ...] | None = None, **options: Any) -> None:
    """Outputs and gradients of `tiled_logprobs` in float64 are those of `reference_logprobs`."""
    subset = subset or c.all_outputs
    wide = c.to(torch.float64)
    outputs = tiled_logprobs(*wide, **options)
    expected, expected_gradients = specified(c, subset)
    given = [x for x in outputs if x is not None]
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    computed = gradients(outputs, wide, subset)
    torch.testing.assert_close(computed, expected_gradients, rtol=1e-12, atol=1e-12)


def all_negative(ref: str) -> Case:
    """Every logit is below -50."""
    c = case({}, ref)
    c = c._replace(hidden=c.hidden.abs() + 1, head=Head(-c.head.weight.abs() - 9))
    if c.ref_hidden is None:
        return c
    ref_head = Head(-c.ref_head.weight.abs() - 9)
    return c._replace(ref_hidden=c.ref_hidden.abs() + 1, ref_head=ref_head)


def with_banned(ref: str) -> tuple[Case, Tensor]:
    """A case with ids banned by a bias of -inf, among them the whole first ragged tile.

    And the ids that are not banned.
    """
    c = case({"bias": True}, ref)
    banned = torch.tensor([*range(13), 20, V - 1])
    allowed = torch.tensor([i for i in range(V) if i not in banned])
    for head in (c.head, c.ref_head):
        if head is not None:
            head.bias[banned] = -torch.inf
    return c._replace(ids=allowed[torch.arange(M) * 2]), allowed


def relative(a: Tensor, b: Tensor) -> float:
    """The relative error of a, in the Frobenius norm."""
    return float((a.double() - b).norm() / b.norm())


each_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
each_reference = pytest.mark.parametrize("ref", REFERENCES)


# ---------------------------------------------------------------- equal to the specification


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(OUTPUTS[i] for i in s))
def test_values_and_gradients_of_every_subset_of_outputs_are_the_specification(subset):
    for options in HEADS.values():
        compare(per_row(case(options)), subset, tile=RAGGED)


@each_reference
@each_head
def test_no_tile_shape_no_reference_and_no_kept_logits_change_anything(options, ref):
    for tile, keep_bytes in itertools.product(TILES.values(), (0, 500, EVERYTHING)):
        compare(case(options, ref), tile=tile, keep_bytes=keep_bytes)


@each_reference
def test_a_temperature_is_a_number_or_one_per_row(ref):
    c = case(HEADS["all"], ref)
    for temperature in (1.0, 0.3, 3, torch.tensor(0.8)):
        compare(c._replace(temperature=temperature), tile=RAGGED)
    compare(per_row(c), tile=RAGGED, keep_bytes=500)
    compare(per_row(c), tile=RAGGED)


def test_the_reference_may_have_other_options_than_the_policy():
    c = case(HEADS["all"])
    for options in (
        {"scale": 0.5, "softcap": None, "bias": None},
        {"softcap": 1.0},
        {"scale": 1.0},
    ):
        compare(c._replace(ref_head=c.ref_head._replace(**options)), tile=RAGGED)
        compare(c._replace(head=c.head._replace(**options)), tile=RAGGED)


def test_the_reference_may_be_padded_to_another_length():
    c = case(HEADS["padded"])
    longer = c.ref_head._replace(weight=torch.cat([c.ref_head.weight, normal(9, D + 3, seed=50)]))
    expected, outputs = (
        tiled_logprobs(*c, tile=RAGGED),
        tiled_logprobs(*c._replace(ref_head=longer), tile=RAGGED),
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


def test_a_target_may_be_the_first_and_the_last_of_a_tile():
    for ids in ([0] * M, [V - 1] * M, list(range(9, 20)), list(range(26, V))):
        compare(case({})._replace(ids=torch.tensor(ids)), tile=RAGGED)


@each_reference
def test_one_row(ref):
    compare(case(HEADS["all"], ref, rows=1), tile=RAGGED)
    compare(case(HEADS["all"], ref, rows=1))


@each_reference
@each_head
def test_no_rows_give_a_differentiable_zero(options, ref):
    for keep_bytes in (0, EVERYTHING):
        c = case(options, ref, rows=0).to(torch.float64)
        outputs = [x for x in tiled_logprobs(*c, keep_bytes=keep_bytes) if x is not None]
        assert {tuple(x.shape) for x in outputs} == {(0,)}
        sum(x.sum() for x in outputs).backward()
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
    head = c.head._replace(weight=c.head.weight.sign() * 1e4)
    c = c._replace(head=head, hidden=c.hidden.sign(), temperature=0.5)
    c = c._replace(ref_head=c.head) if ref == "same head" else c
    assert head_logits(c.hidden, c.head).abs().max() >= 1e4
    expected, expected_gradients = specified(c, c.all_outputs)
    wide = c.to(torch.float64)
    outputs = tiled_logprobs(*wide, tile=RAGGED)
    given = [x for x in outputs if x is not None]
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-10)
    pairs = zip(gradients(outputs, wide, c.all_outputs), expected_gradients, strict=True)
    for a, b in pairs:  # products of numbers of 1e4 that cancel
        assert (a - b).abs().max() <= 2e-11 * max(b.abs().max().item(), 1e5)
    narrow = c.to(torch.float32)
    outputs = tiled_logprobs(*narrow, tile=RAGGED)
    computed = gradients(outputs, narrow, c.all_outputs)
    assert all(x.isfinite().all() for x in (*outputs, *computed) if x is not None)


@pytest.mark.parametrize("keep_bytes", [0, EVERYTHING])
@each_reference
def test_a_banned_id_has_probability_and_gradient_zero(ref, keep_bytes):
    c, allowed = with_banned(ref)
    banned = [i for i in range(V) if i not in allowed]
    compare(c, tile=RAGGED, keep_bytes=keep_bytes)
    wide = c.to(torch.float64)
    outputs = tiled_logprobs(*wide, tile=RAGGED, keep_bytes=keep_bytes)
    _, weight, bias = gradients(outputs, wide, c.all_outputs)
    assert not weight[banned].any()
    assert not bias[banned].any()
    outputs = [x for x in outputs if x is not None]
    assert all(x.isfinite().all() for x in outputs)

    def without_banned(head: Head | None) -> Head | None:
        return None if head is None else Head(head.weight[allowed], head.bias[allowed])

    smaller = c._replace(
        head=without_banned(c.head),
        ref_head=without_banned(c.ref_head),
        ids=torch.arange(M) * 2,
    )
    torch.testing.assert_close(outputs, specified(smaller, (0,))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("output", range(4), ids=OUTPUTS)
@each_head
def test_gradcheck(options, output):
    options = options | ({"vocab_size": 5} if "vocab_size" in options else {})
    for ref, keep_bytes in itertools.product(("wider", "same head"), (0, EVERYTHING)):
        c = per_row(case(options, ref, rows=3, width=2, columns=7)).to(torch.float64)

        def compute(
            hidden: Tensor,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            c: Case = c,
            keep_bytes: int = keep_bytes,
        ) -> Tensor:
            head = c.head if weight is None else c.head._replace(weight=weight, bias=bias)
            moved = c._replace(hidden=hidden, head=head)
            return tiled_logprobs(*moved, tile=Shape(2, 3), keep_bytes=keep_bytes)[output]

        # With one head for both, a change of the weight would change the reference too.
        leaves = c.leaves[:1] if ref == "same head" else c.leaves
        assert torch.autograd.gradcheck(compute, leaves)


# ---------------------------------------------------------------- what is not computed


@pytest.fixture
def count(monkeypatch):
    """By name, the shape of the first argument of each product and of each add_product."""
    shapes: dict[str, list] = {}

    def record(name: str) -> None:
        function = getattr(tiled, name)
        shapes[name] = []

        def recorded(*args: Tensor, **options: Any) -> Any:
            shapes[name].append(tuple(args[0].shape))
            return function(*args, **options)

        monkeypatch.setattr(tiled, name, recorded)

    record("product")
    record("add_product")
    return shapes


GRID = math.ceil(M / RAGGED.rows) * math.ceil(V / RAGGED.columns)  # ragged tiles


@pytest.mark.parametrize(
    ("ref", "forward"), [("wider", 2 * GRID), ("same width", 2 * GRID), ("same head", GRID)]
)
def test_the_reference_is_multiplied_again_only_for_the_gradient_of_a_kl(count, ref, forward):
    for subset in SUBSETS:
        c = case({}, ref).to(torch.float64)
        count["product"].clear()
        outputs = tiled_logprobs(*c, tile=RAGGED)
        assert len(count["product"]) == forward
        count["product"].clear()
        gradients(outputs, c, subset)
        of_kl = 2 in subset or 3 in subset
        assert len(count["product"]) == (forward if of_kl else GRID)
        # The rows of all row tiles add up to M; a column of tiles costs that, or twice that.
        rows_of_a_column = 2 * M if of_kl else M
        assert sum(rows for rows, _ in count["product"]) == rows_of_a_column * GRID // 3


def test_no_upstream_gradient_at_all_costs_nothing(count):
    c = case({}).to(torch.float64)
    outputs = tiled_logprobs(*c, tile=RAGGED)
    products = len(count["product"])
    assert outputs[0].grad_fn.apply(None, None, None, None) == (None,) * 9
    assert len(count["product"]) == products


@each_reference
def test_kept_logits_are_not_multiplied_again_and_stay_within_their_bytes(count, ref):
    for keep_bytes in (0, 799, 800, 2000, 10_000, EVERYTHING):
        c = case({}, ref).to(torch.float64)
        count["product"].clear()
        outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=keep_bytes)
        tiles = outputs[0].grad_fn.kept.values()
        kept = [x for pair in tiles for x in pair if x is not None]
        assert sum(x.nbytes for x in kept) <= keep_bytes
        assert sum(x.untyped_storage().nbytes() for x in kept) <= keep_bytes
        forward, again = len(count["product"]), GRID - len(tiles)
        gradients(outputs, c, c.all_outputs)
        assert len(count["product"]) - forward == again * forward // GRID
        assert (again == GRID) == (keep_bytes == 0)
        if keep_bytes == EVERYTHING:
            assert again == 0
            assert sum(x.nbytes for x in kept) == M * V * 8 * (1 if ref == "none" else 2)


def test_the_products_themselves_are_kept_where_accumulate_leaves_them_alone(monkeypatch):
    """A copy only where it overwrites them. The backward pass lets go of each tile it has used."""
    for functions, copied in ((HOLLOW, False), (TORCH, True)):
        products = []

        def recorded(*args: Tensor, products: list = products) -> Tensor:
            products.append(product(*args))
            return products[-1]

        monkeypatch.setattr(tiled, "product", recorded)
        c = case({}).to(torch.float64)
        outputs = tiled_logprobs(*c, functions=functions, tile=RAGGED, keep_bytes=EVERYTHING)
        kept = [x for pair in outputs[0].grad_fn.kept.values() for x in pair]
        assert len(kept) == len(products) == 2 * GRID
        for x, z in zip(kept, products, strict=True):
            assert (x.data_ptr() != z.data_ptr()) == copied
        gradients(outputs, c, c.all_outputs, retain_graph=True)
        assert not outputs[0].grad_fn.kept


@each_reference
def test_a_second_backward_gives_the_same_gradients(ref):
    for keep_bytes in (0, 2000, EVERYTHING):
        c = case(HEADS["all"], ref).to(torch.float64)
        outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=keep_bytes)
        first = gradients(outputs, c, c.all_outputs, retain_graph=True)
        second = gradients(outputs, c, c.all_outputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for i in c.all_outputs:  # and each output by itself, after all together
            one = gradients(outputs, c, (i,), retain_graph=True)
            torch.testing.assert_close(one, specified(c, (i,))[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
def test_a_frozen_head_and_frozen_states_cost_no_product(count, options):
    trained = case(options).to(torch.float64)
    expected = gradients(tiled_logprobs(*trained, tile=RAGGED), trained, (0, 1, 2, 3))
    for frozen, keep_bytes in itertools.product(("head", "hidden"), (0, EVERYTHING)):
        c = case(options).to(torch.float64)
        for x in (c.head.weight, c.head.bias) if frozen == "head" else (c.hidden,):
            if x is not None:
                x.requires_grad_(False)
        count["add_product"].clear()
        outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=keep_bytes)
        computed = gradients(outputs, c, (0, 1, 2, 3))
        assert len(count["add_product"]) == GRID
        # dh has M rows for each of GRID / 3 column tiles, dW has the columns for each row tile.
        sizes = M * GRID // 3 if frozen == "head" else V * GRID // 4
        assert sum(shape[0] for shape in count["add_product"]) == sizes
        of_leaves = expected[:1] if frozen == "head" else expected[1:]
        torch.testing.assert_close(computed, of_leaves, rtol=0, atol=0)


def test_nothing_is_kept_where_no_gradient_is_needed(monkeypatch):
    contexts: list = []
    forward = tiled.Tiled.forward

    def recorded(ctx: Any, *args: Any) -> Any:
        contexts.append(ctx)
        return forward(ctx, *args)

    monkeypatch.setattr(tiled.Tiled, "forward", recorded)
    c = case({}).to(torch.float64)
    with torch.no_grad():
        tiled_logprobs(*c, tile=RAGGED, keep_bytes=EVERYTHING)
    for x in c.leaves:
        x.requires_grad_(False)
    outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=EVERYTHING)
    assert not any(x.requires_grad for x in outputs)
    assert [ctx.kept for ctx in contexts] == [{}, {}]


def test_a_second_derivative_is_refused():
    c = case({}, "none").to(torch.float64)
    (grad,) = torch.autograd.grad(
        tiled_logprobs(*c, tile=RAGGED)[0].sum(), c.hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), c.hidden)


def test_the_reference_gets_no_gradient():
    for ref in ("wider", "same width", "same head"):
        c = case(HEADS["all"], ref).to(torch.float64)
        c.ref_hidden.requires_grad_()
        kl = tiled_logprobs(*c, tile=RAGGED)[2].sum()
        assert torch.autograd.grad(kl, c.ref_hidden, allow_unused=True) == (None,)


def test_padding_rows_of_the_embedding_get_a_gradient_of_exactly_zero():
    for dtype, keep_bytes in itertools.product(FLOATS, (0, EVERYTHING)):
        c = case(HEADS["all"]).to(dtype)
        outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=keep_bytes)
        _, weight, bias = gradients(outputs, c, (0, 1, 2, 3))
        assert not weight[V - 5 :].any()
        assert not bias[V - 5 :].any()
        assert weight[: V - 5].any(1).all()
        assert bias[: V - 5].all()


@pytest.mark.parametrize("ref", ["wider", "none"])
def test_what_lies_in_the_padding_rows_of_the_embedding_changes_nothing(ref):
    def with_padding(head: Head | None, value: float) -> Head | None:
        if head is None:
            return None
        weight, bias = head.weight.clone(), head.bias.clone()
        weight[V - 5 :] = bias[V - 5 :] = value
        return head._replace(weight=weight, bias=bias)

    results = []
    for value in (0.0, 1e4):
        c = case(HEADS["all"], ref)
        c = c._replace(
            head=with_padding(c.head, value), ref_head=with_padding(c.ref_head, value)
        ).to(torch.float64)
        outputs = tiled_logprobs(*c, tile=RAGGED)
        results.append([x for x in outputs if x is not None])
        results[-1] += gradients(outputs, c, c.all_outputs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("total", "operands"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_first_product_is_written_and_the_next_ones_are_added(total, operands):
    a, b = normal(5, 7, seed=0).to(operands), normal(7, 3, seed=1).to(operands)
    once = torch.full((5, 3), torch.nan, dtype=total)
    add_product(once, a, b, first=True)
    assert torch.equal(once, (a @ b).to(total))
    if total == operands:
        twice = once.clone()
        add_product(twice, a, b, first=False)
        torch.testing.assert_close(twice, 2 * (a @ b), rtol=1e-6, atol=1e-6)


@each_reference
@each_head
def test_arguments_and_upstream_gradients_are_not_written_to(options, ref):
    for keep_bytes in (0, EVERYTHING):
        c = per_row(case(options, ref)).to(torch.float64)
        grads = upstream(c.all_outputs, c.hidden)
        arguments = [x for x in tree_leaves((c, grads)) if isinstance(x, Tensor)]
        before = [(x.detach().clone(), x._version) for x in arguments]
        outputs = tiled_logprobs(*c, tile=RAGGED, keep_bytes=keep_bytes)
        torch.autograd.grad([outputs[i] for i in c.all_outputs], c.leaves, grads)
        for x, (value, version) in zip(arguments, before, strict=True):
            assert torch.equal(x, value)
            assert x._version == version


def test_outputs_are_at_least_float32_and_gradients_have_the_dtype_of_their_tensor():
    for dtype in (torch.float16, *FLOATS):
        c = case(HEADS["all"]).to(dtype)
        outputs = tiled_logprobs(*c, tile=RAGGED)
        assert {x.dtype for x in outputs} == {torch.promote_types(dtype, torch.float32)}
        for grad, leaf in zip(gradients(outputs, c, (0, 1)), c.leaves, strict=True):
            assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kl_to_a_copy_is_exactly_zero_and_to_the_same_head_zero_up_to_rounding(dtype):
    for options in HEADS.values():
        same_head = case(options, "same head").to(dtype)
        same_head = same_head._replace(ref_hidden=same_head.hidden.detach().clone())
        copy = same_head.head._replace(weight=same_head.head.weight.detach().clone())
        for c, bound in ((same_head._replace(ref_head=copy), 0.0), (same_head, 1e-6)):
            outputs = tiled_logprobs(*c, tile=RAGGED)
            assert outputs[2].abs().max() <= bound
            assert outputs[3].abs().max() <= bound
            assert all(x.abs().max() < 1e-5 for x in gradients(outputs, c, (2, 3)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_whatever_the_other_rows_are(dtype):
    """At the same place in a row tile of the same size."""
    rows, tile = 48, Shape(16, 300)
    options = HEADS["all"] | {"vocab_size": 995}
    c = per_row(case(options, rows=rows, width=96, columns=1000)).to(dtype)
    other = case({}, rows=rows, width=96, seed=50).to(dtype)
    with torch.no_grad():
        expected = tiled_logprobs(*c, tile=tile)
        for fixed in (slice(0, 1), slice(7, 9), slice(15, 17), slice(20, 48)):
            is_fixed = torch.zeros(rows, 1, dtype=torch.bool)
            is_fixed[fixed] = True
            changed = c._replace(
                hidden=torch.where(is_fixed, c.hidden, other.hidden),
                ref_hidden=torch.where(is_fixed, c.ref_hidden, other.ref_hidden),
            )
            # Once among all rows, once with only those row tiles that hold the fixed rows.
            first = fixed.start // 16 * 16
            last = first + 16 * math.ceil((fixed.stop - first) / 16)
            fewer = Case(*(x[first:last] if isinstance(x, Tensor) else x for x in changed))
            for among, offset in ((changed, 0), (fewer, first)):
                outputs = tiled_logprobs(*among, tile=tile)
                here = slice(fixed.start - offset, fixed.stop - offset)
                for a, b in zip(expected, outputs, strict=True):
                    assert torch.equal(a[fixed], b[here])


# ---------------------------------------------------------------- memory and rounding at real sizes


def peak_bytes(compute, c: Case, subset: tuple[int, ...]) -> tuple[int, list[Tensor], list[Tensor]]:
    """Most bytes held at once, without the gradients; log-prob and entropy; gradients."""
    with MemoryMeter() as meter:
        outputs = compute(c)
        grads = gradients(outputs, c, subset)
    return meter.most - sum(x.nbytes for x in grads), list(outputs[:2]), grads


def test_the_memory_meter_counts_what_is_alive():
    with MemoryMeter() as meter:
        x = torch.zeros(100)
        y = x[:10]
        del x
        z = y + 1
        assert (meter.now, meter.most) == (440, 440)
        del y, z
        assert (meter.now, meter.most) == (0, 440)


@pytest.mark.parametrize("ref", ["none", "wider"])
def test_one_tile_of_logits_at_a_time_and_the_weights_gradient_is_summed_in_place(ref):
    """The loops with functions that allocate nothing, as Triton's: a tile and dh."""
    tile = Shape(16, 1024)
    c = case({}, ref, rows=64, width=32, columns=4096).to(torch.float32)
    subset = (0, 1) if ref == "none" else (0, 2)
    logits = tile.rows * tile.columns * 4 * (1 if ref == "none" else 2)
    states = 64 * 32 * 4
    used, *_ = peak_bytes(lambda c: tiled_logprobs(*c, functions=HOLLOW, tile=tile), c, subset)
    assert used <= 1.1 * (logits + states)
    with MemoryMeter() as forward, torch.no_grad():
        tiled_logprobs(*c, functions=HOLLOW, tile=tile)
    assert forward.most <= 1.1 * logits


def vocabulary_of_32000(rows: int) -> Case:
    c = case({}, "none", rows=rows, width=256, columns=32_000, std=3.0)
    ids = torch.randint(32_000, (rows,), generator=torch.Generator().manual_seed(1))
    return c._replace(ids=ids, temperature=1.0)


def test_a_real_vocabulary_takes_an_eighth_of_the_memory():
    c = vocabulary_of_32000(512).to(torch.float32)
    naive, _, expected = peak_bytes(lambda c: reference_logprobs(*c, True, 0), c, (0, 1))
    used, _, grads = peak_bytes(lambda c: tiled_logprobs(*c), c, (0, 1))
    assert used <= naive / 8
    assert max(relative(a, b.double()) for a, b in zip(grads, expected, strict=True)) <= 1e-5


def test_float32_at_a_real_vocabulary_is_float64_to_1e_5():
    c = vocabulary_of_32000(96)
    narrow = c.to(torch.float32)
    outputs = tiled_logprobs(*narrow, tile=Shape(64, 4096))
    expected, expected_gradients = specified(c, (0, 1))
    for a, b in zip(outputs[:2], expected, strict=True):
        assert (a - b).abs().max() <= 1e-5
    for a, b in zip(gradients(outputs, narrow, (0, 1)), expected_gradients, strict=True):
        assert relative(a, b) <= 1e-5


def peaked(rows: int, width: int, columns: int) -> Case:
    """bf16 operands, logits of standard deviation 6, ids sampled from their softmax."""
    g = torch.Generator().manual_seed(0)
    weight = torch.empty(columns, width, dtype=torch.bfloat16)
    for part in weight.split(4000):
        part.copy_(torch.randn(part.shape, generator=g) / width**0.5)
    hidden = (torch.randn(rows, width, generator=g) * 6).bfloat16()
    ids = (product(hidden, weight).softmax(-1)).multinomial(1, generator=g).squeeze(1)
    return Case(hidden, Head(weight), ids, 1.0, None, None)


@pytest.mark.parametrize(("rows", "width", "columns"), [(384, 896, 32_000), (64, 4096, 8_000)])
def test_logprobs_of_bf16_operands_are_those_of_float64_to_2e_5(rows, width, columns):
    c = peaked(rows, width, columns)
    assert 5.5 < product(c.hidden[:64], c.head.weight).std() < 6.5
    with torch.no_grad():
        logprobs, entropy, *_ = tiled_logprobs(*c)
        hidden = c.hidden.double()
        z = torch.cat([hidden @ part.double().T for part in c.head.weight.split(8000)], 1)
        logp = z.log_softmax(1)
    expected = logp.gather(1, c.ids[:, None]).squeeze(1)
    gap = (logprobs - expected).abs()
    assert gap.max() <= 2e-5
    assert gap.mean() <= 2e-6
    assert (entropy + (logp.exp() * logp).sum(1)).abs().max() <= 2e-5


@pytest.mark.parametrize(("rows", "width"), [(128, 896), (32, 2048)])
def test_gradients_of_bf16_operands_are_those_of_float64_to_3e_3(rows, width):
    c = peaked(rows, width, 8_000)
    narrow = c.to(torch.bfloat16)
    outputs = tiled_logprobs(*narrow, tile=Shape(rows // 2, 2500))
    expected = specified(c, (0, 1))[1]
    for a, b in zip(gradients(outputs, narrow, (0, 1)), expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a, b) <= 3e-3
        rounded_once = relative(b.bfloat16(), b)
        assert relative(a, b) <= 2 * rounded_once


# ---------------------------------------------------------------- the choice of backend and tile


def test_auto_takes_the_reference_up_to_the_budget_and_tiles_beyond(monkeypatch):
    head = Head(torch.empty(150_000, 1, device="meta"), vocab_size=128_000)
    most = logprobs.LOGITS_BUDGET // (4 * 128_000)
    for rows in (0, 1, most):
        assert choose_backend(rows, head) == "reference"
    assert choose_backend(most + 1, head) == "tiled"
    unpadded = head._replace(vocab_size=None)
    assert choose_backend(most * 150_000 // 128_000 + 1, unpadded) == "tiled"

    calls = []

    def record(name: str) -> None:
        backend = logprobs.BACKENDS[name]

        def recorded(*args: Any) -> Any:
            calls.append(name)
            return backend(*args)

        monkeypatch.setitem(logprobs.BACKENDS, name, recorded)

    for name in list(logprobs.BACKENDS):
        record(name)
    c = case({})
    for budget in (M * V * 4, M * V * 4 - 1):
        monkeypatch.setattr(logprobs, "LOGITS_BUDGET", budget)
        token_logprobs(*c[:3], ref_hidden=c.ref_hidden, ref_head=c.ref_head)
    assert calls == ["reference", "tiled"]


def test_keep_bytes_reach_the_tiles():
    c = case({}).to(torch.float64)
    for keep_bytes, kept in ((0, 0), (EVERYTHING, 1)):
        stats = token_logprobs(
            *c[:3],
            ref_hidden=c.ref_hidden,
            ref_head=c.ref_head,
            backend="tiled",
            keep_bytes=keep_bytes,
        )
        assert len(stats.logprobs.grad_fn.kept) == kept


def test_a_cpu_multiplies_bf16_as_bf16_and_loses_nothing():
    """Into float32: against float64, log-probs are as exact as those of float32 products."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 64, generator=g).bfloat16()
    weight = (0.3 * torch.randn(700, 64, generator=g)).bfloat16()
    ids = torch.randint(700, (50,), generator=g)
    exact = reference_logprobs(hidden.double(), Head(weight.double()), ids, 1.0, None, None, True)
    before = torch.backends.mkldnn.matmul.fp32_precision = "none"
    stats = token_logprobs(hidden, Head(weight), ids)
    assert (stats.logprobs - exact.logprobs).abs().max() < 1e-5
    assert (stats.entropy - exact.entropy).abs().max() < 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    leaf = weight.clone().requires_grad_()
    token_logprobs(hidden, Head(leaf), ids).logprobs.sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(IndexError), products_of_bf16(torch.bfloat16):
        raise IndexError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert choose_backend(50, Head(weight)) == "tiled"


@pytest.mark.parametrize("cuda", [False, True])
def test_a_tile_fits_its_bytes_and_the_problem(cuda):
    budget = tiled.TILE_BYTES if cuda else tiled.TILE_BYTES_CPU
    all_rows = (0, 1, 7, 512, 9000, 10**6)
    all_columns = (1, 255, 256, 32_000, 151_936)
    for rows, columns, bytes_each in itertools.product(all_rows, all_columns, (4, 8)):
        tile = tile_for(rows, columns, bytes_each, cuda)
        assert 1 <= tile.rows <= max(rows, 1)
        assert 1 <= tile.columns <= columns
        assert tile.rows * tile.columns * bytes_each <= budget
        assert tile.columns == columns or tile.columns.bit_count() == 1
        assert 2 * tile.rows * tile.columns * bytes_each > budget or tile.columns == columns


WEIGHTS = {  # rows of W, ids
    "Qwen2.5": (151_936, 151_665),
    "Llama 3": (128_256, 128_256),
    "GPT-2": (50_257, 50_257),
    "Llama 2": (32_000, 32_000),
}


def widths(rows: int, weight: int, vocab_size: int) -> set[int]:
    """The columns of all tiles on a GPU: Triton compiles its kernels for each."""
    head = Head(torch.empty(weight, 1, device="meta"), vocab_size=vocab_size)
    columns = aligned_columns(head, None)
    plan = Plan(TORCH, tile_for(rows, columns, 4, cuda=True), columns)
    return {x.stop - x.start for x in column_spans(vocab_size, plan)}


@pytest.mark.parametrize(("weight", "vocab_size"), WEIGHTS.values(), ids=WEIGHTS)
def test_a_thousand_microbatches_compile_at_most_eight_widths(weight, vocab_size):
    """With lengths like those of GSM8K."""
    rng = torch.Generator().manual_seed(0)
    rows = 40_960
    prompts = (100 * torch.randn(rows // 8, generator=rng).mul(0.35).exp()).long().clamp(40, 400)
    prompts = prompts.repeat_interleave(8)
    responses = (180 * torch.randn(rows, generator=rng).mul(0.6).exp()).long().clamp(8, 1024)
    token_counts = []
    for micro_tokens, rows_of_a_step in ((8_192, 256), (16_384, 512), (32_768, 1024)):
        for start in range(0, rows, rows_of_a_step):
            step = slice(start, start + rows_of_a_step)
            of_step = prompts[step].tolist(), responses[step].tolist()
            first_rows = [i - i % 8 for i in range(rows_of_a_step)]
            for indices in pack_groups(first_rows, *of_step, micro_tokens):
                token_counts.append(sum(of_step[1][i] for i in indices))
    assert len(token_counts) >= 1000
    assert len(set(token_counts)) >= 500
    found = set().union(*(widths(n, weight, vocab_size) for n in token_counts))
    assert len(found) <= 8


@pytest.mark.parametrize(("weight", "vocab_size"), WEIGHTS.values(), ids=WEIGHTS)
def test_columns_are_aligned_where_the_weight_has_the_rows(weight, vocab_size):
    for rows in (1, 700, 3000, 8192, 50_000):
        assert all(n % 128 == 0 for n in widths(rows, weight, vocab_size)) or weight % 128
        head = Head(torch.empty(weight, 1, device="meta"), vocab_size=vocab_size)
        plan = Plan(TORCH, tile_for(rows, weight, 4, cuda=True), aligned_columns(head, None))
        assert plan.columns < vocab_size + 128
        ends = [0]
        for columns in column_spans(vocab_size, plan):
            assert columns.start == ends[-1] < min(columns.stop, vocab_size)
            ends.append(columns.stop)
        assert vocab_size <= ends[-1] <= weight
    shorter = Head(torch.empty(vocab_size, 1, device="meta"))
    assert aligned_columns(head, shorter) == vocab_size


def test_the_vocabulary_is_the_columns_that_are_not_padding():
    weight = torch.empty(10, 1)
    sizes = [vocabulary(Head(weight, vocab_size=n)) for n in (None, 1, 9, 10, 11)]
    assert sizes == [10, 1, 9, 10, 10]
