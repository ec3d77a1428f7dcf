"""Preference files are refused by line; Bradley-Terry and DPO are their formulas, and DPO ends where RLHF ends."""

import itertools
import json
import math

import pytest
import torch
from models import forced, ragged, tiny_policy

from rlkl.errors import UserError
from rlkl.explain.optimum import tilted, total_variation
from rlkl.explain.tabular import BANDIT, TREE, policy_of, probabilities
from rlkl.model import reference_of
from rlkl.preferences import Pair, bradley_terry, calibration, dpo, pair_of, read_pairs, right, split

ROW = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def write(path, *rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


# The file
def test_a_file_is_read_row_by_row_with_text_or_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    said = {"prompt": chat, "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"}
    path = write(tmp_path / "p.jsonl", ROW, "", said, ROW | {"chosen": "a\u2028b", "truncated": [False, True], "id": 3})
    assert read_pairs(path) == [Pair("p", "good", "bad"), Pair(chat, "yes", "no"),
                                Pair("p", "a\u2028b", "bad", (False, True))]


@pytest.mark.parametrize("pair", [
    Pair("p", "c", "r"), Pair([{"role": "user", "content": "q"}], "", "r", (True, False))])
def test_a_pair_is_written_and_read_back(pair):
    assert pair_of(json.loads(json.dumps(pair.row)), "here") == pair


@pytest.mark.parametrize(("bad", "words"), [
    ("{", ["not JSON"]), ("[1]", ["not a JSON object"]), ({"prompt": "p", "chosen": "c"}, ["'rejected'"]),
    (ROW | {"prompt": ""}, ["prompt must be"]), (ROW | {"prompt": 3}, ["prompt must be"]),
    (ROW | {"chosen": 3}, ["chosen must be text"]), (ROW | {"rejected": [{"role": "user"}]}, ["rejected must be text"]),
    (ROW | {"truncated": True}, ["truncated must be"])])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, words):
    path = write(tmp_path / "p.jsonl", ROW, bad)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert all(w in str(error.value) for w in [f"{path}:2", *words]), error.value


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path):
    for path in (str(tmp_path / "gone.jsonl"), write(tmp_path / "empty.jsonl", "", "")):
        with pytest.raises(UserError, match=r"data='.*(gone.jsonl': no such|empty.jsonl': the file holds no rows)"):
            read_pairs(path)


def test_no_prompt_is_on_both_sides_and_an_empty_side_is_refused():
    pairs = [Pair(f"prompt {i % 400}", f"c{i}", "r") for i in range(800)]
    train, heldout = split(pairs, 0.25, "p.jsonl")
    assert len(train) + len(heldout) == 800
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert 150 < len(heldout) < 250
    with pytest.raises(UserError, match=r"none of the 9 pairs falls on the (training|held-out) side"):
        split([Pair("always the same", "c", "r")] * 9, 0.5, "p.jsonl")


# Bradley-Terry
def test_bradley_terry_is_minus_the_log_of_the_probability_that_chosen_wins():
    losses, measures = bradley_terry(torch.tensor([1.0, -1.0, 0.0, 3.0, 0.5, 0.5], dtype=torch.float64))
    wins = [1 / (1 + math.exp(-m)) for m in (2.0, -3.0, 0.0)]
    torch.testing.assert_close(losses, torch.tensor([-math.log(p) for p in wins], dtype=torch.float64))
    assert measures["margin"].tolist() == [2.0, -3.0, 0.0]
    assert measures["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert losses[2].item() == pytest.approx(math.log(2))


def test_bradley_terry_does_not_see_a_constant_and_stays_finite_at_any_margin():
    r = torch.tensor([1e4, -1e4, -1e4, 1e4], dtype=torch.float64, requires_grad=True)
    losses = bradley_terry(r)[0]
    torch.testing.assert_close(bradley_terry(r + 7.0)[0], losses)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4]
    assert r.grad.tolist() == [0.0, 0.0, -1.0, 1.0]


def test_the_gradients_are_those_of_the_values():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    reference = x.detach().roll(1, 0)
    assert torch.autograd.gradcheck(lambda y: bradley_terry(y[:, 0])[0], x)
    assert torch.autograd.gradcheck(lambda y: dpo(y, reference, 0.3)[0], x)


# DPO
def pairs_batch(extra=(0, 0), pad=0):
    return forced(ragged(), extra=extra, pad=pad)


def losses_of(policy, reference, batch, beta=0.1):
    with torch.no_grad():
        ref = reference.evaluate(batch).logprobs
    return dpo(policy.evaluate(batch).logprobs, ref, beta)


def moved(policy, by=0.05):
    """Another policy, near this one."""
    other, g = reference_of(policy), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other.requires_grad_(True)


def test_dpo_starts_at_log_2_whatever_the_pairs_and_beta():
    policy = tiny_policy("llama", torch.float64)
    for beta in (0.01, 1.0, 50.0):
        losses, measures = losses_of(policy, reference_of(policy), pairs_batch(), beta)
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-9, rtol=0)
        assert measures["accuracy"].tolist() == [0.5, 0.5]


def test_dpo_is_its_formula():
    """-log sigmoid(beta (u_w - u_l)), u summed over the reply: not averaged, and beta once."""
    logp = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -2.5], [-1.0, 0.0]], dtype=torch.float64)
    losses, measures = dpo(logp, ref, 0.5)
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * (1.0 - -2.0)))))
    assert (measures["reward_chosen"].item(), measures["reward_rejected"].item()) == (0.5, -1.0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dpo_does_not_see_padding_or_what_stands_in_it(name):
    policy = tiny_policy(name, torch.float64)
    other = moved(policy)
    expected = losses_of(other, policy, pairs_batch())[0]
    assert (expected - math.log(2)).abs().max() > 1e-3
    for extra, pad in (((3, 5), 0), ((1, 2), 60)):
        torch.testing.assert_close(losses_of(other, policy, pairs_batch(extra, pad))[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("game", [BANDIT, TREE], ids=["bandit", "tree"])
def test_on_all_pairs_of_exact_preferences_dpo_ends_at_the_optimum_of_rlhf(game, beta):
    """pi* ∝ ref · exp(r/beta): the same policy that PPO and GRPO with k1 in the reward end at."""
    pairs = torch.tensor(list(itertools.permutations(range(len(game.replies)), 2)))
    wins = torch.sigmoid(game.scores[pairs[:, 0]] - game.scores[pairs[:, 1]])  # P(chosen wins) of each ordered pair
    batch, reference, policy = game.batch, policy_of(game.table), policy_of(game.table)
    ref = reference.evaluate(batch).logprobs.detach()[pairs.flatten()]
    table = policy.lm.unembedding.weight
    optimizer = torch.optim.LBFGS([table], lr=1.0, max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-16,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (wins * dpo(policy.evaluate(batch).logprobs[pairs.flatten()], ref, beta)[0]).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    found = probabilities(game, table.detach())
    assert total_variation(found, tilted(probabilities(game, game.table), game.scores, beta)) < 1e-6
    assert total_variation(found, probabilities(game, game.table)) > 0.05


# Calibration
def test_calibration_by_hand():
    """Two pairs the model is 0.88 sure of, one of them wrongly; one it is 0.62 sure of, rightly."""
    error, table = calibration(torch.tensor([2.0, -2.0, 0.5]))
    sure, less = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5))
    assert [b.pairs for b in table] == [1, 2]
    assert [b.accuracy for b in table] == [1.0, 0.5]
    assert error == pytest.approx((2 * abs(sure - 0.5) + abs(less - 1)) / 3)
    assert all(b.low <= b.confidence <= b.high for b in table)


def test_labels_drawn_from_the_model_are_calibrated_and_a_scale_of_3_is_not():
    g = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, generator=g)
    labels = torch.where(torch.rand(20_000, generator=g) < margins.sigmoid(), 1.0, -1.0)
    assert calibration(margins * labels)[0] < 0.015
    assert calibration(3 * margins * labels)[0] > 0.1


def test_a_model_that_says_nothing_is_right_half_the_time_and_calibrated():
    error, table = calibration(torch.zeros(5))
    assert (error, table[0].accuracy, right(torch.zeros(1)).item()) == (0.0, 0.5, 0.5)
