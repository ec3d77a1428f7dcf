"""token_logprobs against sums over the vocabulary, in every backend that needs no GPU.

tests/test_tiles.py compares the tiles with the reference more closely.
"""

import math

import pytest
import torch
from torch import Tensor

from rlkl import logprobs
from rlkl.logprobs import choose_backend, token_logprobs
from rlkl.logprobs.reference import head_logits
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
PER_ROW = torch.linspace(0.4, 2.2, M, dtype=torch.float64)
OUTPUTS = ("logprobs", "entropy", "kl_pi_ref", "kl_ref_pi")
each_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
each_backend = pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])


def normal(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def problem(options: dict, seed: int = 0, width: int = D) -> tuple[Tensor, Head, Tensor]:
    """(hidden, head, ids) in float64; the ids include the last one that is not padding."""
    options = dict(options)
    bias = normal(V, seed=seed + 2) if options.pop("bias", False) else None
    vocabulary = options.get("vocab_size") or V
    ids = (torch.arange(M) * 5 + 2) % vocabulary
    ids[0] = vocabulary - 1
    return normal(M, width, seed=seed), Head(normal(V, width, seed=seed + 1), bias, **options), ids


def cast(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.to(dtype)
    return head._replace(weight=head.weight.to(dtype), bias=bias)


def tensors_of(head: Head) -> list[Tensor]:
    """Weight and, where there is one, bias."""
    return [x for x in (head.weight, head.bias) if x is not None]


def probabilities(hidden: Tensor, head: Head, temperature: float) -> list[float]:
    """The distribution of one row in plain Python: what everything here is compared with."""
    n = len(head.weight) if head.vocab_size is None else head.vocab_size
    row = hidden.tolist()
    weights = head.weight.tolist()[:n]
    bias = [0.0] * n if head.bias is None else head.bias.tolist()[:n]
    logits = []
    for w, b in zip(weights, bias, strict=True):
        x = (sum(a * h for a, h in zip(w, row, strict=True)) + b) * head.scale
        logits.append(x if head.softcap is None else head.softcap * math.tanh(x / head.softcap))
    exponentials = [math.exp(x / temperature) for x in logits]
    return [e / sum(exponentials) for e in exponentials]


# ---------------------------------------------------------------- values


@each_head
def test_logprobs_entropy_and_both_kls_are_sums_over_the_vocabulary(options):
    hidden, head, ids = problem(options)
    # The reference may be another, wider model.
    ref_hidden, ref_head, _ = problem(options, seed=10, width=D + 2)
    for temperature in (1.0, 0.7, PER_ROW):
        taus = temperature.tolist() if isinstance(temperature, Tensor) else [temperature] * M
        expected = []
        for m, tau in enumerate(taus):
            p = probabilities(hidden[m], head, tau)
            q = probabilities(ref_hidden[m], ref_head, tau)
            logprob = math.log(p[ids[m]])
            entropy = -sum(a * math.log(a) for a in p)
            kl_pi_ref = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            kl_ref_pi = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            expected.append((logprob, entropy, kl_pi_ref, kl_ref_pi))
        for backend in ("auto", "reference", "tiled"):
            stats = token_logprobs(
                hidden,
                head,
                ids,
                temperature=temperature,
                ref_hidden=ref_hidden,
                ref_head=ref_head,
                backend=backend,
            )
            for m in range(M):
                row = [x[m].item() for x in stats]
                assert row == pytest.approx(expected[m], rel=1e-12, abs=1e-12), (backend, m)


def test_every_output_is_float32_and_float64_stays_float64():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        hidden, head, ids = problem(HEADS["all"])
        hidden, head = hidden.to(dtype), cast(head, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for backend in ("auto", "reference"):
            stats = token_logprobs(
                hidden, head, ids, ref_hidden=hidden, ref_head=head, backend=backend
            )
            assert {x.dtype for x in stats} == {wide}
            assert {tuple(x.shape) for x in stats} == {(M,)}


@each_head
def test_bf16_operands_give_the_float64_logprobs_of_the_same_operands(options):
    """Logits rounded to bf16 would be off by 0.4 %, that is 0.05 nats here."""
    rows, width = 50, 257
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=g).bfloat16()
    weight = (torch.randn(V, width, generator=g) * 6 / width**0.5).bfloat16()
    bias = torch.randn(V, generator=g).bfloat16()
    head = Head(weight, **(options | {"bias": bias}))
    wide = cast(head, torch.float64)
    ids = torch.randint(V - 3, (rows,), generator=g)
    stats = token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=-hidden, ref_head=head)
    hidden = hidden.double()
    exact = token_logprobs(hidden, wide, ids, temperature=0.7, ref_hidden=-hidden, ref_head=wide)
    assert (stats.logprobs - exact.logprobs).abs().max() <= 2e-5
    assert (stats.entropy - exact.entropy).abs().max() <= 2e-5
    torch.testing.assert_close(stats.kl_pi_ref.double(), exact.kl_pi_ref, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(stats.kl_ref_pi.double(), exact.kl_ref_pi, rtol=1e-5, atol=2e-5)


def test_bf16_logits_for_sampling_are_not_rounded_to_bf16():
    hidden, head, _ = problem(HEADS["all"])
    hidden, head = hidden.bfloat16(), cast(head, torch.bfloat16)
    exact = head_logits(hidden.double(), cast(head, torch.float64))
    with torch.no_grad():
        sampled = head_logits(hidden, head)
    assert sampled.dtype == torch.float32
    torch.testing.assert_close(sampled, head_logits(hidden, head), rtol=0, atol=0)
    torch.testing.assert_close(sampled.double(), exact, rtol=1e-6, atol=1e-6)


def test_an_id_of_probability_zero_counts_zero():
    """So peaked that float32 gives all other ids probability 0: H = 0 and all gradients finite."""
    hidden = torch.full((2, 1), 1000.0, requires_grad=True)
    head = Head(torch.tensor([[3.0], [1.0], [-2.0], [9.0]]), vocab_size=3)
    ids = torch.tensor([0, 1])
    stats = token_logprobs(hidden, head, ids, ref_hidden=-hidden.detach(), ref_head=head)
    assert stats.logprobs.tolist() == [0.0, -2000.0]
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.kl_pi_ref.tolist() == [5000.0, 5000.0]  # the reference puts all mass on logit -2
    sum(x.sum() for x in stats).backward()
    assert hidden.grad.isfinite().all()


def test_probabilities_over_the_true_vocabulary_add_up_to_one_and_padding_has_none():
    hidden, head, _ = problem(HEADS["all"])
    per_id = [token_logprobs(hidden, head, torch.full((M,), v)).logprobs for v in range(V)]
    logp = torch.stack(per_id)
    assert logp[: V - 3].exp().sum(0) == pytest.approx(1.0, abs=1e-12)
    assert (logp[V - 3 :] == -torch.inf).all()


@each_head
def test_kl_to_itself_is_exactly_zero(options):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden, head, ids = problem(options)
        hidden, head = hidden.to(dtype), cast(head, dtype)
        copy = hidden.clone()
        stats = token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=copy, ref_head=head)
        assert not stats.kl_pi_ref.any()
        assert not stats.kl_ref_pi.any()


def test_a_row_does_not_depend_on_the_others():
    hidden, head, ids = problem(HEADS["all"])
    together = token_logprobs(hidden, head, ids, temperature=PER_ROW)
    for m in range(M):
        alone = token_logprobs(hidden[[m]], head, ids[[m]], temperature=PER_ROW[[m]])
        assert alone.logprobs.item() == pytest.approx(together.logprobs[m].item(), abs=1e-14)
        assert alone.entropy.item() == pytest.approx(together.entropy[m].item(), abs=1e-14)


def test_no_rows_at_all():
    hidden, head, ids = problem(HEADS["padded"])
    stats = token_logprobs(hidden[:0], head, ids[:0], ref_hidden=hidden[:0], ref_head=head)
    assert {tuple(x.shape) for x in stats} == {(0,)}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("output", range(4), ids=OUTPUTS)
@each_head
def test_gradient_of_every_output_in_states_and_head(output, options):
    hidden, head, ids = problem(options)
    ref_hidden, ref_head, _ = problem(options, seed=10)
    leaves = [x.requires_grad_() for x in (hidden, *tensors_of(head))]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return token_logprobs(
            hidden,
            head._replace(weight=weight, bias=bias),
            ids,
            temperature=PER_ROW,
            ref_hidden=ref_hidden,
            ref_head=ref_head,
        )[output]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_rows_are_finite_in_value_and_gradient_and_never_move(dtype):
    """Logits of -inf: 0·inf reaches no output and no gradient, and padding rows of W get none."""
    hidden, head, ids = problem({"vocab_size": V - 3, "bias": True})
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, head.weight, head.bias))
    head = head._replace(weight=weight, bias=bias)
    ref_hidden, ref_head, _ = problem({"vocab_size": V - 3}, seed=10)
    ref_hidden, ref_head = ref_hidden.to(dtype), cast(ref_head, dtype)
    stats = token_logprobs(hidden, head, ids, ref_hidden=ref_hidden, ref_head=ref_head)
    assert all(x.isfinite().all() for x in stats)
    assert (stats.entropy < math.log(V - 3)).all()
    for name, x in stats._asdict().items():
        for grad in torch.autograd.grad(x.sum(), (hidden, weight, bias), retain_graph=True):
            assert grad.isfinite().all(), name
            assert grad.any(), name
            if len(grad) == V:
                assert not grad[V - 3 :].any(), name


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_reference_gets_no_gradient(backend):
    """Even where its states and head require one."""
    hidden, head, ids = problem({})
    ref_hidden, ref_head, _ = problem({}, seed=10)
    leaves = hidden, ref_hidden, ref_head.weight
    for leaf in leaves:
        leaf.requires_grad_()
    stats = token_logprobs(
        hidden, head, ids, ref_hidden=ref_hidden, ref_head=ref_head, backend=backend
    )
    grad, *ref_grads = torch.autograd.grad(stats.kl_ref_pi.sum(), leaves, allow_unused=True)
    q = head_logits(ref_hidden, ref_head).softmax(-1)
    p = head_logits(hidden, head).softmax(-1)
    # d KL(q || softmax z) / dz = p - q
    torch.testing.assert_close(grad, ((p - q) @ head.weight).detach())
    assert ref_grads == [None, None]


def test_a_second_backward_reads_the_kept_logits_unchanged():
    hidden, head, ids = problem({})
    hidden.requires_grad_()
    stats = token_logprobs(
        hidden,
        head,
        ids,
        ref_hidden=hidden.detach() + 1,
        ref_head=head,
        backend="tiled",
        keep_bytes=10**6,
    )
    loss = stats.logprobs.sum() + stats.kl_pi_ref.sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---------------------------------------------------------------- arguments


@each_backend
def test_what_was_not_requested_is_none_and_changes_nothing_else(backend):
    hidden, head, ids = problem(HEADS["all"])
    full = token_logprobs(hidden, head, ids, backend=backend)
    without = token_logprobs(hidden, head, ids, entropy=False, backend=backend)
    assert full.entropy is not None
    assert without.entropy is None
    assert (full.kl_pi_ref, full.kl_ref_pi) == (None, None)
    assert torch.equal(full.logprobs, without.logprobs)
    ref = token_logprobs(
        hidden, head, ids, entropy=False, ref_hidden=-hidden, ref_head=head, backend=backend
    )
    assert ref.entropy is None
    assert (ref.kl_pi_ref > 0).all()


def test_arguments_are_not_written_to():
    hidden, head, ids = problem(HEADS["all"])
    arguments = (hidden, *tensors_of(head), ids)
    before = [x.clone() for x in arguments]
    token_logprobs(hidden, head, ids, temperature=0.7, ref_hidden=hidden, ref_head=head)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


def test_the_budget_of_the_reference_is_in_bytes_of_float32():
    head = Head(torch.empty(1024, 1, device="meta"))
    fits = logprobs.LOGITS_BUDGET // (1024 * 4)
    assert choose_backend(fits, head) == "reference"
    assert choose_backend(fits + 1, head) == "tiled"


def test_fused_uses_the_triton_kernels(monkeypatch):
    pytest.importorskip("triton")
    from rlkl.logprobs.tile_triton import TRITON

    monkeypatch.setattr(logprobs, "in_tiles", lambda *_, functions: functions)
    assert logprobs.fused() is TRITON


def test_an_unknown_backend_is_refused_with_the_choices():
    hidden, head, ids = problem({})
    with pytest.raises(ValueError, match=r"'fast'; choose auto, reference, tiled, fused"):
        token_logprobs(hidden, head, ids, backend="fast")


def test_half_a_reference_is_refused():
    hidden, head, ids = problem({})
    for half in ({"ref_hidden": hidden}, {"ref_head": head}):
        with pytest.raises(ValueError, match="ref_hidden and ref_head come together"):
            token_logprobs(hidden, head, ids, **half)


@each_backend
def test_two_vocabularies_are_refused(backend):
    hidden, head, ids = problem({})

    def score(ref_head: Head) -> Tensor:
        return token_logprobs(
            hidden, head, ids, ref_hidden=hidden, ref_head=ref_head, backend=backend
        ).kl_pi_ref

    for other in (head._replace(vocab_size=V - 1), Head(head.weight[:-1])):
        with pytest.raises(ValueError, match=f"has {V} ids, the reference's {V - 1}"):
            score(other)
    assert score(head._replace(vocab_size=V)).isfinite().all()  # the same in other words
