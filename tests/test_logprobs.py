"""token_logprobs: what softmax(logits / temperature) says of sampled ids, against sums over the vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from rlkl.logprobs import head_logits, token_logprobs
from rlkl.types import Head

M, D, V = 7, 5, 13
HEADS = {  # what models do to h @ W.T before the softmax
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 1.5},
    "padded": {"vocab_size": V - 3},
    "one padding row": {"vocab_size": V - 1},
    "not padded": {"vocab_size": V},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.5, "vocab_size": V - 3},
}
TEMPERATURES = {"1": 1.0, "0.7": 0.7, "per row": torch.linspace(0.4, 2.2, M, dtype=torch.float64)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(options: dict, seed: int = 0, width: int = D) -> tuple[Tensor, Head, Tensor]:
    """(hidden, head, ids); the ids include the last one that is not padding."""
    options = dict(options)
    bias = normal(V, seed=seed + 2) if options.pop("bias", False) else None
    ids = (torch.arange(M) * 5 + 2) % (options.get("vocab_size") or V)
    ids[0] = (options.get("vocab_size") or V) - 1
    return normal(M, width, seed=seed), Head(normal(V, width, seed=seed + 1), bias, **options), ids


def by_hand(hidden: Tensor, head: Head, temperature: float) -> list[float]:
    """The probabilities of one row as Python numbers, without torch: the twin of everything tested here."""
    n = len(head.weight) if head.vocab_size is None else head.vocab_size
    logits = [sum(w * h for w, h in zip(row, hidden.tolist(), strict=True)) for row in head.weight.tolist()[:n]]
    if head.bias is not None:
        logits = [x + b for x, b in zip(logits, head.bias.tolist()[:n], strict=True)]
    logits = [x * head.scale for x in logits]
    if head.softcap is not None:
        logits = [head.softcap * math.tanh(x / head.softcap) for x in logits]
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def row_temperatures(temperature: float | Tensor) -> list[float]:
    return temperature.tolist() if isinstance(temperature, Tensor) else [temperature] * M


def tensors_of(head: Head) -> list[Tensor]:
    """Weight and, where there is one, bias."""
    return [x for x in (head.weight, head.bias) if x is not None]


@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
def test_logprobs_entropy_and_both_kls_are_the_sums_over_the_vocabulary(options, temperature, backend):
    hidden, head, ids = problem(options)
    ref_hidden, ref_head, _ = problem(options, seed=10, width=D + 2)  # the reference may be another, wider model
    got = token_logprobs(
        hidden, head, ids, temperature=temperature, ref_hidden=ref_hidden, ref_head=ref_head, backend=backend
    )
    for m, tau in enumerate(row_temperatures(temperature)):
        p, q = by_hand(hidden[m], head, tau), by_hand(ref_hidden[m], ref_head, tau)
        want = (
            math.log(p[ids[m]]),
            -sum(a * math.log(a) for a in p),
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        )
        assert [x[m].item() for x in got] == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_output_is_float32_and_float64_stays_float64(name, dtype):
    hidden, head, ids = problem(HEADS["all"])
    hidden, head = hidden.to(dtype), head._replace(weight=head.weight.to(dtype), bias=head.bias.to(dtype))
    stats = token_logprobs(hidden, head, ids, ref_hidden=hidden, ref_head=head, backend=name)
    assert {x.dtype for x in stats} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert {tuple(x.shape) for x in stats} == {(M,)}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_bf16_operands_give_the_float64_logprobs_of_the_same_operands(options):
    """Logits rounded to bf16 would be off by 0.4 % of a logit here, 0.05 nats; float32 products are not."""
    rows, width = 50, 257
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=g).bfloat16()
    weight = (torch.randn(V, width, generator=g) * 6 / width**0.5).bfloat16()
    options = {k: v for k, v in options.items() if k != "bias"} | {"bias": torch.randn(V, generator=g).bfloat16()}
    head, wide = Head(weight, **options), Head(weight.double(), **options | {"bias": options["bias"].double()})
    ids = torch.randint(V - 3, (rows,), generator=g)
    got = token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=-hidden, ref_head=head)
    want = token_logprobs(hidden.double(), wide, ids, temperature=0.7, ref_hidden=-hidden.double(), ref_head=wide)
    assert (got.logprobs - want.logprobs).abs().max() <= 2e-5
    assert (got.entropy - want.entropy).abs().max() <= 2e-5
    torch.testing.assert_close(got.kl_pi_ref.double(), want.kl_pi_ref, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.kl_ref_pi.double(), want.kl_ref_pi, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("output", [0, 1, 2, 3], ids=["logprobs", "entropy", "kl_pi_ref", "kl_ref_pi"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradient_of_every_output_in_states_and_head(output, options):
    hidden, head, ids = problem(options)
    ref_hidden, ref_head, _ = problem(options, seed=10)
    leaves = [x.requires_grad_() for x in (hidden, *tensors_of(head))]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        mine = head._replace(weight=weight, bias=bias)
        tau = TEMPERATURES["per row"]
        return token_logprobs(hidden, mine, ids, temperature=tau, ref_hidden=ref_hidden, ref_head=ref_head)[output]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_rows_are_finite_in_value_and_gradient_and_never_move(dtype):
    """-inf columns: 0·inf must not reach entropy, KL or any gradient, and the padding rows of W get none at all."""
    hidden, head, ids = problem({"vocab_size": V - 3, "bias": True})
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, head.weight, head.bias))
    head = head._replace(weight=weight, bias=bias)
    ref_hidden, ref_head, _ = problem({"vocab_size": V - 3}, seed=10)
    ref_head = ref_head._replace(weight=ref_head.weight.to(dtype))
    stats = token_logprobs(hidden, head, ids, ref_hidden=ref_hidden.to(dtype), ref_head=ref_head)
    assert all(x.isfinite().all() for x in stats)
    assert (stats.entropy < math.log(V - 3)).all()
    for i, x in enumerate(stats):
        for grad in torch.autograd.grad(x.sum(), (hidden, weight, bias), retain_graph=True):
            assert grad.isfinite().all(), stats._fields[i]
            assert grad.any()
            if len(grad) == V:
                assert not grad[V - 3 :].any()


def test_an_id_of_probability_zero_counts_zero():
    """A distribution so peaked that float32 gives every other id probability exactly 0: H = 0, all gradients finite."""
    hidden = torch.full((2, 1), 1000.0, requires_grad=True)
    head = Head(torch.tensor([[3.0], [1.0], [-2.0], [9.0]]), vocab_size=3)
    stats = token_logprobs(hidden, head, torch.tensor([0, 1]), ref_hidden=-hidden.detach(), ref_head=head)
    assert stats.logprobs.tolist() == [0.0, -2000.0]
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.kl_pi_ref.tolist() == [5000.0, 5000.0]  # the reference is sure of the id with logit -2
    sum(x.sum() for x in stats).backward()
    assert hidden.grad.isfinite().all()


def test_probabilities_over_the_true_vocabulary_add_up_to_one_and_padding_has_none():
    hidden, head, _ = problem(HEADS["all"])
    every = torch.stack([token_logprobs(hidden, head, torch.full((M,), v)).logprobs for v in range(V)])
    assert every[: V - 3].exp().sum(0) == pytest.approx(1.0, abs=1e-12)
    assert (every[V - 3 :] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_kl_to_itself_is_exactly_zero(options, dtype):
    hidden, head, ids = problem(options)
    bias = None if head.bias is None else head.bias.to(dtype)
    hidden, head = hidden.to(dtype), head._replace(weight=head.weight.to(dtype), bias=bias)
    stats = token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=hidden.clone(), ref_head=head)
    assert not stats.kl_pi_ref.any()
    assert not stats.kl_ref_pi.any()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_reference_is_a_constant(backend):
    """The gradient goes through the policy alone; the reference's states and head get none, though they ask."""
    hidden, head, ids = problem({})
    ref_hidden, ref_head, _ = problem({}, seed=10)
    hidden.requires_grad_(), ref_hidden.requires_grad_(), ref_head.weight.requires_grad_()
    stats = token_logprobs(hidden, head, ids, ref_hidden=ref_hidden, ref_head=ref_head, backend=backend)
    leaves = (hidden, ref_hidden, ref_head.weight)
    grad, *others = torch.autograd.grad(stats.kl_ref_pi.sum(), leaves, allow_unused=True)
    q, p = head_logits(ref_hidden, ref_head).softmax(-1), head_logits(hidden, head).softmax(-1)
    torch.testing.assert_close(grad, ((p - q) @ head.weight).detach())  # d KL(q || softmax z) / dz = p - q
    assert others == [None, None]


def test_two_vocabularies_are_refused():
    hidden, head, ids = problem({})
    with pytest.raises(ValueError, match="vocabularies of 13 and, in the reference, 10 ids"):
        token_logprobs(hidden, head, ids, ref_hidden=hidden, ref_head=head._replace(vocab_size=10))


def test_what_was_not_asked_for_is_none_and_changes_nothing_else():
    hidden, head, ids = problem(HEADS["all"])
    full, less = token_logprobs(hidden, head, ids), token_logprobs(hidden, head, ids, entropy=False)
    assert full.entropy is not None
    assert less.entropy is None
    assert (full.kl_pi_ref, full.kl_ref_pi) == (None, None)
    assert torch.equal(full.logprobs, less.logprobs)
    ref = token_logprobs(hidden, head, ids, entropy=False, ref_hidden=-hidden, ref_head=head)
    assert ref.entropy is None
    assert (ref.kl_pi_ref > 0).all()


def test_no_rows_at_all():
    hidden, head, ids = problem(HEADS["padded"])
    stats = token_logprobs(hidden[:0], head, ids[:0], ref_hidden=hidden[:0], ref_head=head)
    assert {tuple(x.shape) for x in stats} == {(0,)}


def test_a_row_does_not_depend_on_the_others():
    hidden, head, ids = problem(HEADS["all"])
    tau = TEMPERATURES["per row"]
    whole = token_logprobs(hidden, head, ids, temperature=tau)
    for m in range(M):
        alone = token_logprobs(hidden[[m]], head, ids[[m]], temperature=tau[[m]])
        assert alone.logprobs.item() == pytest.approx(whole.logprobs[m].item(), abs=1e-14)
        assert alone.entropy.item() == pytest.approx(whole.entropy[m].item(), abs=1e-14)


def test_arguments_are_not_written_to():
    hidden, head, ids = problem(HEADS["all"])
    before = [x.clone() for x in (hidden, *tensors_of(head), ids)]
    token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=hidden, ref_head=head)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, *tensors_of(head), ids), strict=True))


def test_an_unknown_backend_is_refused_with_the_choices():
    hidden, head, ids = problem({})
    with pytest.raises(ValueError, match=r"'fast'.*auto.*reference"):
        token_logprobs(hidden, head, ids, backend="fast")


@pytest.mark.parametrize("given", ["ref_hidden", "ref_head"])
def test_half_a_reference_is_refused(given):
    hidden, head, ids = problem({})
    with pytest.raises(ValueError, match="ref_hidden and ref_head"):
        token_logprobs(hidden, head, ids, **{given: {"ref_hidden": hidden, "ref_head": head}[given]})
