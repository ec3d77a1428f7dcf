"""Preference files, the Bradley-Terry and DPO losses, calibration."""

import itertools
import json
import math

import pytest
import torch
from models import forced, ragged, tiny_policy

from rlkl.errors import UserError
from rlkl.explain.optimum import tilted, total_variation
from rlkl.explain.tabular import BANDIT, TREE, policy_of, probabilities
from rlkl.policy.policy import reference_of
from rlkl.supervised.preferences import (
    Pair,
    accuracy,
    bradley_terry,
    calibration,
    dpo,
    parse_pair,
    read_pairs,
    split,
)
from rlkl.tasks.split import hash_fraction as task_fraction

ROW = {"prompt": "p", "chosen": "good", "rejected": "bad"}
CHAT = [{"role": "user", "content": "hi"}]


def write(path, *rows) -> str:
    """A JSONL file of these rows; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


# ------------------------------------------------------------------ the file


def test_a_file_is_read_row_by_row_with_text_or_messages(tmp_path):
    message = [{"role": "assistant", "content": "yes"}]
    path = write(
        tmp_path / "p.jsonl",
        ROW,
        "",
        {"prompt": CHAT, "chosen": message, "rejected": "no"},
        ROW | {"chosen": "a\u2028b", "truncated": [False, True], "id": 3},
    )
    assert read_pairs(path) == [
        Pair("p", "good", "bad"),
        Pair(CHAT, "yes", "no"),
        Pair("p", "a\u2028b", "bad", (False, True)),
    ]


def test_the_messages_that_two_conversations_share_are_their_prompt(tmp_path):
    """The rows of TRL, without a prompt, and those of UltraFeedback, with its text."""
    user = [{"role": "user", "content": "2+2?"}]
    earlier = [*CHAT, {"role": "assistant", "content": "yes"}, *user]
    rows = []
    for prompt in (user, earlier):
        chosen, rejected = (
            [*prompt, {"role": "assistant", "content": text}] for text in ("4", "5")
        )
        row = {"chosen": chosen, "rejected": rejected}
        rows += [row, row | {"prompt": prompt}, row | {"prompt": "2+2?"}]
    pairs = read_pairs(write(tmp_path / "p.jsonl", *rows))
    assert pairs == [Pair(user, "4", "5")] * 3 + [Pair(earlier, "4", "5")] * 3


def test_a_pair_is_written_and_read_back():
    for pair in (Pair("p", "c", "r"), Pair(CHAT, "", "r", (True, False))):
        assert parse_pair(json.loads(json.dumps(pair.row)), "here") == pair


YES = {"role": "assistant", "content": "yes"}
BAD_ROWS = [  # a row, and what the message must say
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ({"prompt": "p", "chosen": "c"}, "'rejected'"),
    (ROW | {"prompt": ""}, "prompt must be"),
    (ROW | {"prompt": 3}, "prompt must be"),
    (ROW | {"chosen": 3}, "chosen must be text"),
    (ROW | {"rejected": [{"role": "user"}]}, "rejected must be text"),
    ({"chosen": [*CHAT, YES], "rejected": "no"}, "rejected must be a list of chat messages"),
    ({"chosen": CHAT * 2, "rejected": CHAT * 2}, "the assistant's response"),
    ({"chosen": [*CHAT, YES], "rejected": [YES, YES]}, "differ in their last message alone"),
    (ROW | {"chosen": [*CHAT, YES], "rejected": [*CHAT, YES]}, "prompt is not the one"),
    (ROW | {"truncated": True}, "truncated must be"),
    (ROW | {"truncated": [1, 0]}, "truncated must be"),
]


def test_a_bad_row_is_reported_with_file_and_line(tmp_path):
    for row, words in BAD_ROWS:
        path = write(tmp_path / "p.jsonl", ROW, row)
        with pytest.raises(UserError) as error:
            read_pairs(path)
        assert f"{path}:2" in str(error.value)
        assert words in str(error.value)


def test_a_file_that_is_missing_or_empty_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"data='.*gone.jsonl': no such"):
        read_pairs(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"data='.*empty.jsonl': the file holds no rows"):
        read_pairs(write(tmp_path / "empty.jsonl", "", ""))


def test_no_prompt_is_on_both_sides_and_an_empty_side_is_refused():
    pairs = [Pair(f"prompt {i % 400}", f"c{i}", "r") for i in range(800)]
    train, heldout = split(pairs, 0.25, "p.jsonl")
    assert len(train) + len(heldout) == 800
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert 150 < len(heldout) < 250
    message = r"none of the 9 pairs is on the (training|held-out) side"
    with pytest.raises(UserError, match=message):
        split([Pair("always the same", "c", "r")] * 9, 0.5, "p.jsonl")


def test_the_split_of_pairs_is_independent_of_the_split_of_the_task_that_labelled_them():
    """By the task's own hash no prompt of its training side would be held out here."""
    prompts = [f"prompt {i}" for i in range(1000)]
    pairs = [Pair(p, "c", "r") for p in prompts if task_fraction(p) >= 0.1]
    heldout = split(pairs, 0.1, "p.jsonl")[1]
    assert len(heldout) / len(pairs) == pytest.approx(0.1, abs=0.03)


def test_the_split_is_the_same_on_every_machine():
    """A file that was split before keeps its sides."""
    prompts = ["1+1=", "hello", CHAT, [{"content": "hi", "role": "user"}], "0", "1", "2", "3"]
    heldout = split([Pair(prompt, "c", "r") for prompt in prompts], 0.5, "p.jsonl")[1]
    assert [pair.prompt for pair in heldout] == ["0", "1", "3"]


# ------------------------------------------------------------------ Bradley-Terry


def test_bradley_terry_is_minus_the_log_of_the_probability_that_chosen_wins():
    rewards = torch.tensor([1.0, -1.0, 0.0, 3.0, 0.5, 0.5], dtype=torch.float64)
    losses, metrics = bradley_terry(rewards)
    wins = [1 / (1 + math.exp(-margin)) for margin in (2.0, -3.0, 0.0)]
    assert losses.tolist() == pytest.approx([-math.log(p) for p in wins])
    assert metrics["margin"].tolist() == [2.0, -3.0, 0.0]
    assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.5]


def test_bradley_terry_ignores_a_constant_and_is_finite_at_any_margin():
    rewards = torch.tensor([1e4, -1e4, -1e4, 1e4], dtype=torch.float64, requires_grad=True)
    losses = bradley_terry(rewards)[0]
    torch.testing.assert_close(bradley_terry(rewards + 7.0)[0], losses)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4]
    assert rewards.grad.tolist() == [0.0, 0.0, -1.0, 1.0]


def test_the_gradients_are_those_of_the_values():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    reference = x.detach().roll(1, 0)
    assert torch.autograd.gradcheck(lambda y: bradley_terry(y[:, 0])[0], x)
    assert torch.autograd.gradcheck(lambda y: dpo(y, reference, 0.3)[0], x)


# ------------------------------------------------------------------ DPO


def dpo_losses(policy, reference, batch, beta=0.1):
    with torch.no_grad():
        ref_logprobs = reference(batch).logprobs
    return dpo(policy(batch).logprobs, ref_logprobs, beta)


def perturbed(policy, by=0.05):
    """A copy of the policy with noise on every weight."""
    other, rng = reference_of(policy), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return other.requires_grad_(True)


def test_dpo_starts_at_log_2_for_any_pairs_and_any_beta():
    policy = tiny_policy("llama", torch.float64)
    for beta in (0.01, 1.0, 50.0):
        losses, metrics = dpo_losses(policy, reference_of(policy), forced(ragged()), beta)
        assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-9)
        assert metrics["accuracy"].tolist() == [0.5, 0.5]


def test_dpo_is_its_formula():
    """-log sigmoid(beta (u_w - u_l)): u is summed over the response, not averaged."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64)
    ref_logprobs = torch.tensor([[-1.5, -2.5], [-1.0, 0.0]], dtype=torch.float64)
    losses, metrics = dpo(logprobs, ref_logprobs, 0.5)
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * (1.0 - -2.0)))))
    assert metrics["reward_chosen"].item() == 0.5
    assert metrics["reward_rejected"].item() == -1.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dpo_does_not_depend_on_padding(name):
    policy = tiny_policy(name, torch.float64)
    other = perturbed(policy)
    expected = dpo_losses(other, policy, forced(ragged()))[0]
    assert (expected - math.log(2)).abs().max() > 1e-3
    for extra, pad in (((3, 5), 0), ((1, 2), 60)):
        losses = dpo_losses(other, policy, forced(ragged(), extra=extra, pad=pad))[0]
        torch.testing.assert_close(losses, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("game", [BANDIT, TREE], ids=["bandit", "tree"])
def test_on_all_pairs_of_exact_preferences_dpo_ends_at_the_optimum_of_rlhf(game, beta):
    """pi* ∝ ref · exp(r / beta), at which PPO and GRPO with k1 in the reward end too."""
    pairs = torch.tensor(list(itertools.permutations(range(len(game.responses)), 2)))
    chosen, rejected = pairs.unbind(1)
    wins = torch.sigmoid(game.scores[chosen] - game.scores[rejected])  # P(chosen wins)
    batch, reference, policy = game.batch, policy_of(game.table), policy_of(game.table)
    ref_logprobs = reference(batch).logprobs.detach()[pairs.flatten()]
    table = policy.lm.unembedding.weight
    optimizer = torch.optim.LBFGS(
        [table],
        lr=1.0,
        max_iter=400,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        losses = dpo(policy(batch).logprobs[pairs.flatten()], ref_logprobs, beta)[0]
        loss = (wins * losses).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    start, end = probabilities(game, game.table), probabilities(game, table.detach())
    assert total_variation(end, tilted(start, game.scores, beta)) < 1e-6
    assert total_variation(end, start) > 0.05


# ------------------------------------------------------------------ calibration


def test_calibration_by_hand():
    """Two pairs at confidence 0.88, one of them wrong; one at 0.62, which is right."""
    error, table = calibration(torch.tensor([2.0, -2.0, 0.5]))
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5))
    assert [b.pairs for b in table] == [1, 2]
    assert [b.accuracy for b in table] == [1.0, 0.5]
    assert [b.confidence for b in table] == pytest.approx([low, high])
    assert error == pytest.approx((2 * abs(high - 0.5) + abs(low - 1)) / 3)
    assert all(b.low <= b.confidence <= b.high for b in table)


def test_labels_drawn_from_the_model_are_calibrated_and_margins_times_3_are_not():
    rng = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, generator=rng)
    labels = torch.where(torch.rand(20_000, generator=rng) < margins.sigmoid(), 1.0, -1.0)
    assert calibration(margins * labels)[0] < 0.015
    assert calibration(3 * margins * labels)[0] > 0.1


def test_a_model_without_preferences_is_right_half_the_time_and_calibrated():
    error, table = calibration(torch.zeros(5))
    assert error == 0.0
    assert table[0].accuracy == 0.5
    assert accuracy(torch.zeros(1)).item() == 0.5
