"""What `make mutants` found that no other test noticed."""

from types import SimpleNamespace

import pytest
import torch
from runs_fixture import train

from rlkl import heldout, logprobs
from rlkl.advantages import ADVANTAGES
from rlkl.logprobs import token_logprobs
from rlkl.model import encode, left_pad
from rlkl.schema import Config
from rlkl.tiny import character_tokenizer
from rlkl.types import Example, Head, Sampling


@pytest.mark.parametrize("name", ["maxrl", "pass_at_k"])
def test_pay_on_the_last_token_but_one_is_refused_too(name):
    rewards = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="one score per reply"):
        ADVANTAGES[name](rewards, None, torch.ones(2, 3, dtype=torch.bool), group_size=2)


def test_a_prompt_may_hold_the_pad_id_and_it_is_attended_there():
    ids, mask = left_pad([[4, 5, 4], [6]], pad_id=4)
    assert ids.tolist() == [[4, 5, 4], [4, 4, 6]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_a_prompt_is_encoded_whole_however_long():
    assert len(encode(character_tokenizer(), "12345+" * 50)) == 300


@pytest.mark.parametrize(("correct", "expected"), [(0, 0.0), (1, 0.5), (2, 5 / 6), (3, 1.0), (4, 1.0)])
def test_pass_at_2_of_4_is_the_share_of_the_6_pairs_that_hold_a_right_one(correct, expected):
    assert heldout.pass_at_k(4, correct, 2) == pytest.approx(expected)


def test_two_copies_of_a_prompt_are_two_prompts_to_pass_at_k(monkeypatch):
    found = [(0, True, {}), (0, False, {}), (1, True, {}), (1, False, {})]
    monkeypatch.setattr(heldout, "replies", lambda *_: iter(found))
    parts = SimpleNamespace(rule=Sampling(), tokenizer=None, heldout=[Example("1+1=", "2"), Example("1+1=", "2")])
    result = heldout.accuracy(Config(), parts, samples=2)
    assert result["accuracy"] == 0.5
    assert result["pass@2"] == 1.0


def rows(count: int = 3) -> tuple[torch.Tensor, Head, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (count, 7))
    return hidden.requires_grad_(), Head(weight), torch.arange(count)


def test_a_second_backward_finds_the_kept_logits_as_they_were():
    hidden, head, ids = rows()
    found = token_logprobs(hidden, head, ids, ref_hidden=hidden.detach() + 1, ref_head=head, backend="tiled",
                           keep_bytes=10**6)
    loss = found.logprobs.sum() + found.kl_pi_ref.sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_an_entropy_that_was_not_asked_for_is_none(backend):
    hidden, head, ids = rows()
    assert token_logprobs(hidden, head, ids, entropy=False, backend=backend).entropy is None


def test_the_budget_of_the_plain_way_is_in_bytes_of_float32():
    head = Head(torch.empty(1024, 1, device="meta"))
    fits = logprobs.LOGITS_BUDGET // (1024 * 4)
    assert [logprobs.chosen(n, head) for n in (fits, fits + 1)] == ["reference", "tiled"]


def test_fused_takes_the_functions_of_triton(monkeypatch):
    pytest.importorskip("triton")
    from rlkl.kernels.logits import TRITON

    monkeypatch.setattr(logprobs, "in_tiles", lambda *_, functions: functions)
    assert logprobs.fused() is TRITON


def test_the_learning_rate_that_is_reported_is_the_one_of_the_step():
    optim = SimpleNamespace(lr=1e-2, steps=10, warmup=3, schedule="linear", critic_warmup=0, epochs=0, minibatch=None)
    cfg = SimpleNamespace(optim=optim, kl_old=SimpleNamespace(stop=None, target=None))
    row = train.learn(cfg, None, train.State(0.0, 0.0, step=2), None, None, None)
    assert row["lr"] == pytest.approx(1e-2 * 3 / 4 * 8 / 10)
