"""One training step in float64: the gradient depends on configuration and rollout, and on nothing
else.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from one_step import float64_llama
from runs_fixture import ROOT, arguments
from torch.nn import functional as F

import train
from rlkl.advantages import ADVANTAGES, token_rewards
from rlkl.kl import KL, KL_LOSSES
from rlkl.losses import LOSSES
from rlkl.run import config
from rlkl.run.algorithm import Algorithm
from rlkl.run.build import Data, Models, build
from rlkl.run.metrics import Meters
from rlkl.run.schema import Config
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")

WEIGHTS = ("token", "sequence", "constant")
PLAIN = ("model.dtype=float64", "task=jsonl", "task.path=prompts.jsonl", "kl_ref.coef=0")
PPO = ("advantage=gae", "critic.kind=head")
CONFIGS = {  # two epochs, so that the ratio is not 1 in the second one
    "grpo": (
        "optim.epochs=2",
        "kl_ref.place=loss",
        "kl_ref.estimator=k2",
        "kl_ref.coef=0.1",
        "entropy.coef=0.01",
    ),
    "ppo": (
        *PPO,
        "optim.epochs=2",
        "kl_ref.coef=0.1",
        "kl_old.coef=0.3",
        "truncation=bootstrap",
        "advantage.gamma=0.9",
    ),
    "ppo, its own critic": ("advantage=gae", "critic.kind=network", "truncation=mask"),
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


class Recorder:
    """Stands for the optimizer: keeps the gradient of every update, then lets it happen."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.gradients, self.losses = optimizer, [], []

    def named_gradients(self) -> dict[str, torch.Tensor | None]:
        return {
            f"{name}.{i}": None if p.grad is None else p.grad.clone()
            for name, parameters in self.optimizer.groups.items()
            for i, p in enumerate(parameters)
        }

    def step(self, scale, loss=0.0, frozen=()):
        self.gradients.append(self.named_gradients())
        self.losses.append(loss)
        return self.optimizer.step(scale, loss, frozen)

    def zero(self):
        self.optimizer.zero()


@pytest.fixture(autouse=True)
def float64_everywhere(monkeypatch) -> None:
    """Else Llama's norms round to float32, and the order of additions would show."""
    float64_llama(monkeypatch)


@dataclass
class Setup:
    """A float64 run before its first step, whose critic and reference are not where they start."""

    cfg: Config
    models: Models
    algorithm: Algorithm
    data: Data
    state: State

    @property
    def optimizer(self) -> Any:
        return self.models.optimizer

    @property
    def policy(self):
        return self.models.policy

    def step(self) -> dict[str, float]:
        inputs = step_inputs(self.cfg, self.data, self.state)
        metrics, _ = train.training_step(
            self.cfg, self.models, self.algorithm, self.data, self.state, *inputs
        )
        return metrics

    def after_sampling(self, change) -> None:
        """Let `change(batch)` alter what the sampler returns."""
        sampler = self.models.sampler
        self.models.sampler = lambda *args: change(sampler(*args))


def setup(base, *options) -> Setup:
    cfg = config.load(arguments(base, *PLAIN, *options))
    models, algorithm, data = build(cfg, train.generate_and_score)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if models.policy.critic is not None:  # the zero head sends no gradient into the backbone
            for p in models.policy.critic.head.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        if models.reference is not None:
            for p in models.reference.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    models.optimizer = Recorder(models.optimizer)
    return Setup(cfg, models, algorithm, data, State(cfg.kl_ref.coef, cfg.kl_old.coef))


def gradients(base, *options, change=None) -> list[dict]:
    """The gradient of each update of one step; `change(batch) -> batch` alters the rollout."""
    run = setup(base, *options)
    if change:
        run.after_sampling(change)
    run.step()
    return run.optimizer.gradients


def check_equal(found: list[dict], expected: list[dict], tolerance: float = 1e-10) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, x in other.items():
            assert (one[name] is None) == (x is None), name
            if x is not None:
                assert (one[name] - x).abs().max() <= tolerance, name
    largest = [
        max(x.abs().max().item() for x in update.values() if x is not None) for update in expected
    ]
    assert min(largest) > 1e-3, f"gradients of {largest} would agree whatever they are"


def rollout(base, *options) -> tuple[Setup, Batch]:
    """A rollout with its advantages, as `update_policy` gets it."""
    run = setup(base, *options)
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update_policy", lambda *args: caught.append(args[4]) or {})
        run.step()
    return run, caught[0]


def update_gradient(run: Setup, batch: Batch) -> tuple[float, dict]:
    """Loss and gradient of one update on all rows of a batch."""
    run.optimizer.zero()
    args = (run.cfg, run.models, run.algorithm, run.state, batch, Meters())
    loss, _ = train.accumulate_gradient(*args)
    named = run.optimizer.named_gradients()
    run.optimizer.zero()
    return loss, {name: x for name, x in named.items() if x is not None}


def weights_of(module) -> dict:
    return {name: x.clone() for name, x in module.state_dict().items()}


def moved(module, old: dict) -> list[str]:
    return [name for name, x in module.state_dict().items() if not torch.equal(x, old[name])]


# Invariances


def test_the_rollout_of_these_tests_is_ragged_on_both_sides(base):
    """Else no test of padding or of truncation below could fail."""
    _, batch = rollout(base)
    assert len(set(batch.prompt_mask.sum(1).tolist())) > 1
    assert len(set(batch.mask.sum(1).tolist())) > 2
    assert 0 < batch.truncated.sum() < len(batch)
    assert batch.advantages[batch.mask].std() > 0.1


@every_config
def test_the_gradient_does_not_depend_on_how_a_rollout_is_cut(base, options):
    for weights in WEIGHTS:
        options = (*options, f"optim.weights={weights}")
        whole = gradients(base, *options)
        for tokens in (1, 37, 90):
            check_equal(gradients(base, *options, f"optim.micro_tokens={tokens}"), whole)


def widened(batch: Batch) -> Batch:
    """Three more prompt columns on the left and two more response columns on the right, with random
    ids in them.
    """
    g = torch.Generator().manual_seed(1)

    def pad(x, left, right, ids=False):
        x = F.pad(x, (left, right))
        return (
            torch.where(F.pad(mask, (left, right)), x, torch.randint(3, 90, x.shape, generator=g))
            if ids
            else x
        )

    mask = batch.prompt_mask
    prompt_ids, prompt_mask = pad(batch.prompt_ids, 3, 0, ids=True), pad(mask, 3, 0)
    mask = batch.mask
    return replace(
        batch,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=pad(batch.response_ids, 0, 2, ids=True),
        mask=pad(mask, 0, 2),
        sampler_logprobs=pad(batch.sampler_logprobs, 0, 2),
    )


@every_config
def test_the_gradient_does_not_depend_on_padding_or_on_what_stands_in_it(base, options):
    for weights in WEIGHTS:
        options = (*options, f"optim.weights={weights}")
        check_equal(gradients(base, *options, change=widened), gradients(base, *options))


def regrouped(batch: Batch) -> Batch:
    """The groups in another order, and the rows of each group in another order."""
    rows = torch.arange(16).view(4, 4)[[2, 0, 3, 1]][:, [1, 3, 0, 2]].flatten()
    return batch[rows]


@every_config
def test_the_gradient_does_not_depend_on_the_order_of_rows(base, options, monkeypatch):
    """Neither on the order in which they were sampled, nor on that in which an epoch takes them."""
    options = (*options, "optim.micro_tokens=40")
    expected = {w: gradients(base, *options, f"optim.weights={w}") for w in WEIGHTS}
    for weights, gradient in expected.items():
        options_of = (*options, f"optim.weights={weights}")
        check_equal(gradients(base, *options_of, change=regrouped), gradient)
    monkeypatch.setattr(
        train,
        "shuffled_minibatches",
        lambda batch, epochs, size, group_size, rng: (
            batch[list(range(len(batch)))[::-1]] for _ in range(epochs)
        ),
    )
    for weights, gradient in expected.items():
        check_equal(gradients(base, *options, f"optim.weights={weights}"), gradient)


def behind(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~mask, math.nan)


def poison(run: Setup, patch: pytest.MonkeyPatch) -> set[str]:
    """Let sampler, rewards and advantages return NaN behind the mask; the set of those that did."""
    advantage, poisoned = run.algorithm.advantage, set()

    def sampled(batch):
        poisoned.add("sampler")
        batch = widened(batch)
        return replace(batch, sampler_logprobs=behind(batch.sampler_logprobs, batch.mask))

    def placed(scores, mask):
        poisoned.add("reward")
        return behind(token_rewards(scores, mask), mask)

    def estimated(rewards, values, mask, group_size):
        poisoned.add("advantage")
        advantages, returns = advantage(rewards, values, mask, group_size=group_size)
        return behind(advantages, mask), None if returns is None else behind(returns, mask)

    run.algorithm.advantage = estimated
    run.after_sampling(sampled)
    patch.setattr(train, "token_rewards", placed)
    return poisoned


@every_config
def test_nan_behind_the_mask_reaches_no_gradient(base, options, monkeypatch):
    """In what user code returns: the sampler's log-probs, rewards, advantages, value targets."""
    for weights in WEIGHTS:
        options = (*options, f"optim.weights={weights}")
        expected = gradients(base, *options)
        run = setup(base, *options)
        with monkeypatch.context() as patch:
            poisoned = poison(run, patch)
            metrics = run.step()
        assert poisoned == {"sampler", "reward", "advantage"}
        check_equal(run.optimizer.gradients, expected)
        assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize(
    "options", [CONFIGS["ppo"], CONFIGS["ppo, its own critic"]], ids=["head", "network"]
)
def test_nan_that_the_critic_gives_behind_the_mask_reaches_no_gradient(base, options):
    expected = gradients(base, *options)
    run = setup(base, *options)
    run.after_sampling(widened)
    calls = []

    def valued(module, args, output):
        calls.append(bool((~args[1].mask).any()))
        return behind(output[0], args[1].mask), output[1]

    run.policy.critic.register_forward_hook(valued)
    run.step()
    assert any(calls)
    check_equal(run.optimizer.gradients, expected)


# The old policy


def old_passes(base, *options) -> int:
    """Forward passes of the policy without gradients, in one step, after the rollout."""
    run = setup(base, *options)
    calls = []
    run.policy.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run.step()
    assert any(calls)
    return calls.count(False)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ([], False),
        (["optim.minibatch=16"], False),
        (["kl_ref.place=loss", "kl_ref.estimator=k2", "kl_ref.coef=0.1"], False),
        (["kl_old.coef=0.1"], False),
        (["optim.epochs=2"], True),
        (["optim.minibatch=8"], True),
        (["kl_ref.coef=0.1"], True),
        ([*PPO], True),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_old_pass_is_skipped_with_one_update_a_rollout_and_only_then(base, options, needed):
    assert (old_passes(base, *options) > 0) == needed


def test_the_update_is_the_same_with_and_without_the_old_pass(base, monkeypatch):
    options = ("kl_old.coef=0.3", "entropy.coef=0.01", "optim.micro_tokens=60")
    skipped = {w: gradients(base, *options, f"optim.weights={w}") for w in WEIGHTS}
    evaluate_logprobs = train.evaluate_logprobs

    def with_old_logprobs(cfg, models, algorithm, state, batch):
        evaluate_logprobs(cfg, models, algorithm, state, batch)
        assert batch.old_logprobs is None
        with torch.no_grad():
            batch.fill(old_logprobs=models.policy(batch).logprobs)

    monkeypatch.setattr(train, "evaluate_logprobs", with_old_logprobs)
    for weights, gradient in skipped.items():
        check_equal(gradients(base, *options, f"optim.weights={weights}"), gradient)


@pytest.mark.parametrize("options", [(), CONFIGS["ppo"]], ids=["grpo", "ppo"])
def test_a_learning_rate_of_zero_keeps_the_ratio_at_one(base, options):
    """Over epochs and minibatches: the sampled, the scored and the trained policy are one."""
    options = (
        *options,
        "optim.epochs=3",
        "optim.minibatch=8",
        "optim.lr=0",
        "critic.lr=0",
        "kl_old.coef=0",
    )
    run = setup(base, *options)
    old = weights_of(run.policy)
    row = run.step()
    assert row["updates"] == 6
    assert abs(row["ratio"] - 1) < 1e-12
    assert abs(row["ratio_max"] - 1) < 1e-12
    assert abs(row["kl_old_pi"]) < 1e-12
    assert row["sampler_gap_max"] < 1e-12
    assert row["clip_fraction"] == 0
    assert moved(run.policy, old) == []


def test_the_reported_learning_rate_is_the_one_of_the_step(base):
    schedule = ("optim.steps=10", "optim.warmup=3", "optim.schedule=linear")
    run = setup(base, "optim.lr=1e-2", *schedule)
    run.state.step = 2
    lr = run.step()["lr"]
    assert lr == pytest.approx(1e-2 * 3 / 4 * 8 / 10)
    assert lr == run.optimizer.optimizer.adamw.param_groups[0]["lr"]


# Warm-up, failures, early stop


@pytest.mark.parametrize("critic", ["head", "network"])
def test_in_the_critic_warm_up_no_policy_weight_moves_by_one_bit_while_the_critic_does(
    base, critic
):
    """Weight decay and momentum are on: neither may move a frozen weight."""
    run = setup(
        base,
        "advantage=gae",
        f"critic.kind={critic}",
        "critic.warmup=2",
        "optim.weight_decay=0.1",
    )
    for step in range(3):
        policy, value = weights_of(run.policy.lm), weights_of(run.policy.critic)
        row = run.step()
        run.state.step += 1
        assert moved(run.policy.critic, value), step
        assert bool(moved(run.policy.lm, policy)) == (step >= 2), step
        assert ("grad_norm/policy" in row) == (step >= 2)
        assert row["updates"] == 1


def broken_value(new, batch):
    return -new.logprobs * batch.advantages * math.nan, {}


def broken_gradient(new, batch):
    """A finite value whose gradient is 0 · inf."""
    return -new.logprobs * batch.advantages + (
        new.logprobs - new.logprobs.detach()
    ).abs().sqrt(), {}


@pytest.mark.parametrize("loss", [broken_value, broken_gradient])
def test_an_update_that_is_not_finite_never_steps_and_is_counted(base, loss):
    run = setup(base, "optim.max_skips=3", "optim.weight_decay=0.1")
    sound, run.algorithm.policy_loss = run.algorithm.policy_loss, loss
    old, adam = weights_of(run.policy), run.optimizer.optimizer.state_dict()["adamw"]["state"]
    for skips in (1, 2):
        row = run.step()
        assert (row["updates"], row["skipped_updates"], run.state.skips) == (0, 1, skips)
        assert (math.isfinite(run.optimizer.losses[-1])) == (loss is broken_gradient)
        assert moved(run.policy, old) == []
        assert adam == {}
    run.algorithm.policy_loss = sound
    row = run.step()
    assert (row["updates"], row["skipped_updates"], run.state.skips) == (1, 0, 0)
    run.algorithm.policy_loss = loss
    old = weights_of(run.policy)
    for _ in range(2):
        run.step()
    run.step()
    assert run.state.skips == 3, "the count at which train.train gives up"
    assert moved(run.policy, old) == []


def test_kl_old_stop_ends_the_epochs_before_the_update_that_would_go_further(base):
    options = ("optim.epochs=4", "optim.lr=0.03")
    run = setup(base, *options)
    row = run.step()
    assert row["updates"] == 4
    free = row["kl_old_pi"]
    assert free > 1e-3
    run = setup(base, *options, "kl_old.stop=1e-6")
    row = run.step()
    assert row["updates"] == 1, "the first update starts at pi_old, the second one is beyond 1e-6"
    assert row["skipped_updates"] == 0
    assert all(p.grad is None for p in run.policy.parameters()), (
        "the gradient of the update left out stays behind"
    )
    run = setup(base, *options, "kl_old.stop=1e6")
    assert run.step()["updates"] == 4


# What is paid


def paid(base, *options) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The rollout, its token rewards as the advantage function gets them, and V after the last
    token.
    """
    run, batch = rollout(base, *options)
    last = run.policy(batch).last_values if run.policy.critic is not None else None
    return batch, batch.rewards, last


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_changes_each_token_reward_by_minus_coef_times_the_estimate(
    base, estimator
):
    plain, without, _ = paid(base, "optim.epochs=2")
    batch, with_kl, _ = paid(
        base, "optim.epochs=2", "kl_ref.coef=0.25", f"kl_ref.estimator={estimator}"
    )
    assert torch.equal(batch.response_ids, plain.response_ids)
    penalty = KL[estimator](batch.old_logprobs, batch.ref_logprobs)
    assert penalty.abs().max() > 0.01
    assert torch.equal(with_kl, without - 0.25 * penalty)
    if estimator == "k1":
        assert torch.equal(penalty, batch.old_logprobs - batch.ref_logprobs)
    assert not torch.equal(batch.advantages, plain.advantages)


def test_the_score_is_paid_on_the_last_token_of_each_response_and_nowhere_else(base):
    batch, rewards, _ = paid(base)
    last = batch.mask.sum(1) - 1
    for row, (column, response) in enumerate(zip(last.tolist(), batch.response_ids, strict=True)):
        digits = sum(3 <= i < 13 for i in response[: column + 1].tolist())  # ids 3–12 are 0–9
        assert rewards[row, column].item() == pytest.approx(digits / 6)
        assert rewards[row].count_nonzero() == (digits > 0)
    assert rewards.any()


def test_bootstrap_pays_gamma_times_the_value_after_the_last_token_of_a_truncated_response(base):
    options = (*PPO, "advantage.gamma=0.9")
    plain, without, _ = paid(base, *options, "truncation=terminal")
    batch, with_value, last_values = paid(base, *options, "truncation=bootstrap")
    assert torch.equal(batch.response_ids, plain.response_ids)
    assert 0 < batch.truncated.sum() < len(batch)
    expected, column = without.double(), batch.mask.sum(1) - 1
    for row in range(len(batch)):
        if batch.truncated[row]:
            expected[row, column[row]] += 0.9 * last_values[row]
    assert last_values[batch.truncated].abs().min() > 1e-3
    assert (with_value - expected).abs().max() < 1e-7  # scores are float32


@pytest.mark.parametrize("options", [CONFIGS["grpo"], CONFIGS["ppo"]], ids=["grpo", "ppo"])
def test_masked_truncated_responses_leave_the_numerator_and_the_denominator(base, options):
    """The update is that of a rollout in which they never were."""
    for weights in WEIGHTS:
        run, batch = rollout(base, *options, f"optim.weights={weights}", "truncation=mask")
        assert 0 < batch.truncated.sum() < len(batch)
        masked = update_gradient(run, batch)
        kept = update_gradient(run, batch[~batch.truncated])
        run.cfg = replace(run.cfg, truncation="terminal")
        everything = update_gradient(run, batch)
        assert masked[0] == pytest.approx(kept[0], abs=1e-10)
        check_equal([masked[1]], [kept[1]])
        with pytest.raises(AssertionError):
            check_equal([everything[1]], [kept[1]], tolerance=1e-4)


def test_dropped_groups_leave_the_numerator_and_the_denominator(base, monkeypatch):
    """The batch is the other groups, in their order; where all have zero variance, all are kept."""
    compute_scores = train.compute_scores

    def one_group_alike(reward, examples, responses, batch):
        scores, parts = compute_scores(reward, examples, responses, batch)
        assert (scores.view(4, 4).amax(1) > scores.view(4, 4).amin(1)).all()
        return torch.cat([scores[:4], torch.full((4,), 0.7), scores[8:]]), parts

    rows = torch.tensor([*range(4), *range(8, 16)])
    for weights in WEIGHTS:
        options = (f"optim.weights={weights}",)
        _, everything = rollout(base, *options)
        with monkeypatch.context() as patch:
            patch.setattr(train, "compute_scores", one_group_alike)
            run, batch = rollout(base, *options, "sampling.zero_variance=drop")
        assert torch.equal(batch.mask, everything.mask[rows])
        assert torch.equal(batch.response_ids, everything.response_ids[rows])
        dropped, chosen = update_gradient(run, batch), update_gradient(run, everything[rows])
        check_equal([dropped[1]], [chosen[1]])
    monkeypatch.setattr(train, "compute_scores", lambda *_: (torch.full((16,), 0.7), {}))
    assert len(rollout(base, "sampling.zero_variance=drop")[1]) == 16


@pytest.mark.parametrize("options", [(), PPO], ids=["grpo", "ppo"])
def test_the_control_of_make_learn_gives_the_same_advantages_to_other_responses(base, options):
    """Row by row a permutation of the real ones; the value targets stay where they are."""
    run, real = rollout(base, *options)
    name = "gae" if options else "grpo"
    shuffled = f"advantage.name={ROOT / 'tests' / 'shuffled.py'}:{name}"
    control, batch = rollout(base, *options, shuffled)
    assert torch.equal(batch.response_ids, real.response_ids)
    assert not torch.equal(batch.advantages, real.advantages)
    assert torch.equal(batch.advantages, batch.advantages * batch.mask)
    assert sorted(batch.advantages[:, 0].tolist()) == sorted(real.advantages[:, 0].tolist())
    assert control.algorithm.advantage.keywords == run.algorithm.advantage.keywords
    if options:
        assert torch.equal(batch.returns, real.returns)
    else:
        rows = zip(batch.advantages, batch.mask, strict=True)
        assert all(len(row[m].unique()) == 1 for row, m in rows)


def test_any_policy_loss_trains_with_a_critic_or_without(base):
    """The value loss and the entropy bonus are terms of their own: their gradients just add up."""
    for name in ("clip", "gspo", "reinforce"):
        loss = f"loss={name}"
        both = gradients(base, *PPO, loss, "critic.coef=0.7", "entropy.coef=0.1")[0]
        policy = gradients(base, *PPO, loss, "critic.coef=0")[0]
        value = gradients(base, *PPO, "loss=reinforce", "critic.coef=0.7")[0]
        bonus = gradients(base, *PPO, "loss=reinforce", "critic.coef=0", "entropy.coef=0.1")[0]
        plain = gradients(base, *PPO, "loss=reinforce", "critic.coef=0")[0]
        for key, gradient in both.items():
            terms = policy[key] + (value[key] - plain[key]) + (bonus[key] - plain[key])
            difference = (gradient - terms).abs().max()  # the model's norms are float32
            assert difference < 1e-6 * gradient.abs().max(), (name, key)


# What train.py is


def test_train_py_names_no_algorithm():
    """PPO and GRPO differ by their config alone: there is nothing that the loop could compare a
    name with.
    """
    names = {*LOSSES, *ADVANTAGES, *KL, *KL_LOSSES, "dapo", "reinforce"}
    tree = ast.parse((ROOT / "train.py").read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    strings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]
    assert len(docstrings) > 5
    assert len(strings) > 20
    assert [
        f"line {s.lineno}: {s.value!r}"
        for s in strings
        if set(s.value.lower().replace("-", "_").split()) & names
    ] == []
