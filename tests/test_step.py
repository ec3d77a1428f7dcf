"""One training step, through train.py's own functions, in float64: the gradient depends on the configuration and the
rollout, and on nothing else."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from runs_fixture import ROOT, arguments
from torch.nn import functional as F

import train
from rlkl import config
from rlkl.advantages import ADVANTAGES
from rlkl.build import build
from rlkl.kl import KL, KL_LOSSES
from rlkl.losses import LOSSES
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")

WEIGHTS = ("token", "sequence", "constant")
PLAIN = ("model.dtype=float64", "task=jsonl", "task.path=prompts.jsonl", "kl_ref.coef=0")
CONFIGS = {  # two epochs, so that the ratio is not 1 in the second one
    "grpo": ("optim.epochs=2", "kl_ref.place=loss", "kl_ref.estimator=k2", "kl_ref.coef=0.1", "loss.entropy_coef=0.01"),
    "ppo": (
        "advantage=gae",
        "loss=ppo",
        "model.critic=head",
        "optim.epochs=2",
        "kl_ref.coef=0.1",
        "kl_old.coef=0.3",
        "truncation=bootstrap",
        "advantage.gamma=0.9",
    ),
    "ppo, its own critic": ("advantage=gae", "loss=ppo", "model.critic=network", "truncation=mask"),
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
every_weights = pytest.mark.parametrize("weights", WEIGHTS)


class Recorder:
    """Stands for the optimizer: keeps the gradient of every update, then lets it happen."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.gradients, self.losses = optimizer, [], []

    def step(self, scale, loss=0.0, frozen=()):
        groups = self.optimizer.groups.items()
        self.gradients.append(
            {f"{n}.{i}": None if p.grad is None else p.grad.clone() for n, ps in groups for i, p in enumerate(ps)}
        )
        self.losses.append(loss)
        return self.optimizer.step(scale, loss, frozen)

    def zero(self):
        self.optimizer.zero()


def setup(base, *options):
    """Config, parts and state of a float64 run whose critic and reference are not where they start."""
    cfg = config.load(arguments(base, *PLAIN, *options))
    parts = build(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if parts.policy.critic is not None:  # the zero head sends no gradient into the backbone
            for p in parts.policy.critic.head.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        if parts.reference is not None:
            for p in parts.reference.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    parts.optimizer = Recorder(parts.optimizer)
    return cfg, parts, train.State(cfg.kl_ref.coef, cfg.kl_old.coef)


def before(parts, name: str, change):
    """Let `change(batch)` see what the sampler returns, before anything else does."""
    real = getattr(parts, name)
    setattr(parts, name, lambda *args, **options: change(real(*args, **options)))


def gradients(base, *options, change=None) -> list[dict]:
    """The gradient of each update of one step; `change(batch) -> batch` alters the rollout."""
    cfg, parts, state = setup(base, *options)
    if change:
        before(parts, "sampler", change)
    train.training_step(cfg, parts, state)
    return parts.optimizer.gradients


def check_equal(found: list[dict], expected: list[dict], tolerance: float = 1e-10) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, x in other.items():
            assert (one[name] is None) == (x is None), name
            if x is not None:
                assert (one[name] - x).abs().max() <= tolerance, name
    largest = [max(x.abs().max().item() for x in update.values() if x is not None) for update in expected]
    assert min(largest) > 1e-3, f"gradients of {largest} would agree whatever they are"


def rollout(base, *options):
    """Config, parts, state and a rollout with its credit, as `learn` gets it."""
    cfg, parts, state = setup(base, *options)
    caught = []
    real = train.learn
    try:
        train.learn = lambda cfg, parts, state, batch, rng, meters: caught.append(batch) or {}
        train.training_step(cfg, parts, state)
    finally:
        train.learn = real
    return cfg, parts, state, caught[0]


def update_gradient(cfg, parts, state, batch) -> tuple[float, dict]:
    parts.optimizer.zero()
    loss, _ = train.backward(cfg, parts, state, batch, train.Meters())
    groups = parts.optimizer.optimizer.groups.items()
    found = {f"{n}.{i}": p.grad.clone() for n, ps in groups for i, p in enumerate(ps) if p.grad is not None}
    parts.optimizer.zero()
    return loss, found


def weights_of(module) -> dict:
    return {name: x.clone() for name, x in module.state_dict().items()}


def moved(module, old: dict) -> list[str]:
    return [name for name, x in module.state_dict().items() if not torch.equal(x, old[name])]


# Invariances


def test_the_rollout_of_these_tests_is_ragged_on_both_sides(base):
    """Else no test of padding or of truncation below could fail."""
    batch = rollout(base)[3]
    assert len(set(batch.prompt_mask.sum(1).tolist())) > 1
    assert len(set(batch.mask.sum(1).tolist())) > 2
    assert 0 < batch.truncated.sum() < len(batch)
    assert batch.advantages[batch.mask].std() > 0.1


@every_config
@every_weights
def test_the_gradient_does_not_depend_on_how_a_rollout_is_cut(base, options, weights):
    options = (*options, f"optim.weights={weights}")
    whole = gradients(base, *options)
    for tokens in (1, 37, 90):
        check_equal(gradients(base, *options, f"optim.micro_tokens={tokens}"), whole)


def widened(batch: Batch) -> Batch:
    """Three more prompt columns on the left and two more reply columns on the right, with random ids in them."""
    g = torch.Generator().manual_seed(1)

    def pad(x, left, right, ids=False):
        x = F.pad(x, (left, right))
        return torch.where(F.pad(mask, (left, right)), x, torch.randint(3, 90, x.shape, generator=g)) if ids else x

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
@every_weights
def test_the_gradient_does_not_depend_on_padding_or_on_what_stands_in_it(base, options, weights):
    options = (*options, f"optim.weights={weights}")
    check_equal(gradients(base, *options, change=widened), gradients(base, *options))


def regrouped(batch: Batch) -> Batch:
    """The groups in another order, and the rows of each group in another order."""
    rows = torch.arange(16).view(4, 4)[[2, 0, 3, 1]][:, [1, 3, 0, 2]].flatten()
    return batch[rows]


@every_config
@every_weights
def test_the_gradient_does_not_depend_on_the_order_of_rows(base, options, weights, monkeypatch):
    """Neither on the order in which they were sampled nor on that in which an epoch goes through them."""
    options = (*options, f"optim.weights={weights}", "optim.micro_tokens=40")
    expected = gradients(base, *options)
    check_equal(gradients(base, *options, change=regrouped), expected)
    monkeypatch.setattr(Batch, "shuffle", lambda self, generator: self[torch.arange(len(self) - 1, -1, -1)])
    check_equal(gradients(base, *options), expected)


def behind(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~mask, math.nan)


@every_config
@every_weights
def test_nan_behind_the_mask_reaches_no_gradient(base, options, weights, monkeypatch):
    """In what somebody else's code returns: the sampler's log-probs, rewards, advantages and value targets."""
    options = (*options, f"optim.weights={weights}")
    expected = gradients(base, *options)
    cfg, parts, state = setup(base, *options)
    credit, place, poisoned = parts.advantage, train.token_rewards, set()

    def sampled(batch):
        poisoned.add("sampler")
        batch = widened(batch)
        return replace(batch, sampler_logprobs=behind(batch.sampler_logprobs, batch.mask))

    def placed(scores, mask):
        poisoned.add("reward")
        return behind(place(scores, mask), mask)

    def credited(rewards, values, mask, group_size):
        poisoned.add("advantage")
        found, returns = credit(rewards, values, mask, group_size=group_size)
        return behind(found, mask), returns if returns is None else behind(returns, mask)

    credited.keywords = credit.keywords
    parts.advantage = credited
    before(parts, "sampler", sampled)
    monkeypatch.setattr(train, "token_rewards", placed)
    row, _ = train.training_step(cfg, parts, state)
    assert poisoned == {"sampler", "reward", "advantage"}
    check_equal(parts.optimizer.gradients, expected)
    assert all(map(math.isfinite, row.values()))


@pytest.mark.parametrize("options", [CONFIGS["ppo"], CONFIGS["ppo, its own critic"]], ids=["head", "network"])
def test_nan_that_the_critic_gives_behind_the_mask_reaches_no_gradient(base, options):
    expected = gradients(base, *options)
    cfg, parts, state = setup(base, *options)
    before(parts, "sampler", widened)
    calls = []

    def valued(module, args, output):
        calls.append(bool((~args[1].mask).any()))
        return behind(output[0], args[1].mask), output[1]

    parts.policy.critic.register_forward_hook(valued)
    train.training_step(cfg, parts, state)
    assert any(calls)
    check_equal(parts.optimizer.gradients, expected)


# The old policy


def old_passes(base, *options) -> int:
    """Forward passes of the policy without gradients, in one step, after the rollout."""
    cfg, parts, state = setup(base, *options)
    real, calls = parts.policy.evaluate, []

    def counted(batch, reference=None):
        calls.append(torch.is_grad_enabled())
        return real(batch, reference)

    parts.policy.evaluate = counted
    train.training_step(cfg, parts, state)
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
        (["model.critic=head", "advantage=gae", "loss=ppo"], True),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_old_pass_is_skipped_with_one_update_a_rollout_and_only_then(base, options, needed):
    assert (old_passes(base, *options) > 0) == needed


@every_weights
def test_the_update_is_the_same_with_and_without_the_old_pass(base, weights, monkeypatch):
    options = (f"optim.weights={weights}", "kl_old.coef=0.3", "loss.entropy_coef=0.01", "optim.micro_tokens=60")
    skipped = gradients(base, *options)
    real = train.evaluate

    def filled(cfg, parts, batch):
        last_values = real(cfg, parts, batch)
        assert batch.old_logprobs is None
        with torch.no_grad():
            batch.old_logprobs = parts.policy.evaluate(batch).logprobs
        return last_values

    monkeypatch.setattr(train, "evaluate", filled)
    check_equal(gradients(base, *options), skipped)


@pytest.mark.parametrize("options", [(), CONFIGS["ppo"]], ids=["grpo", "ppo"])
def test_a_learning_rate_of_zero_keeps_the_ratio_at_one(base, options):
    """Over epochs and minibatches: the sampled, the scored and the trained policy are one."""
    options = (*options, "optim.epochs=3", "optim.minibatch=8", "optim.lr=0", "optim.critic_lr=0", "kl_old.coef=0")
    cfg, parts, state = setup(base, *options)
    old = weights_of(parts.policy)
    row, _ = train.training_step(cfg, parts, state)
    assert row["updates"] == 6
    assert abs(row["ratio"] - 1) < 1e-12
    assert abs(row["ratio_max"] - 1) < 1e-12
    assert abs(row["kl_old_pi"]) < 1e-12
    assert row["sampler_gap_max"] < 1e-12
    assert row["clip_fraction"] == 0
    assert moved(parts.policy, old) == []


# Warm-up, failures, early stop


@pytest.mark.parametrize("critic", ["head", "network"])
def test_in_the_critic_warm_up_no_policy_weight_moves_by_one_bit_while_the_critic_does(base, critic):
    """Weight decay and momentum are on: neither may move a frozen weight."""
    cfg, parts, state = setup(
        base, "advantage=gae", "loss=ppo", f"model.critic={critic}", "optim.critic_warmup=2", "optim.weight_decay=0.1"
    )
    for step in range(3):
        policy, value = weights_of(parts.policy.lm), weights_of(parts.policy.critic)
        row, _ = train.training_step(cfg, parts, state)
        state.step += 1
        assert moved(parts.policy.critic, value), step
        assert bool(moved(parts.policy.lm, policy)) == (step >= 2), step
        assert ("grad_norm/policy" in row) == (step >= 2)
        assert row["updates"] == 1


def broken_value(new, batch):
    return -new.logprobs * batch.advantages * math.nan, {}


def broken_gradient(new, batch):
    """A finite value whose gradient is 0 · inf."""
    return -new.logprobs * batch.advantages + (new.logprobs - new.logprobs.detach()).abs().sqrt(), {}


@pytest.mark.parametrize("loss", [broken_value, broken_gradient])
def test_an_update_that_is_not_finite_never_steps_and_is_counted(base, loss):
    cfg, parts, state = setup(base, "optim.max_skips=3", "optim.weight_decay=0.1")
    sound, parts.loss = parts.loss, loss
    old, adam = weights_of(parts.policy), parts.optimizer.optimizer.state_dict()["adamw"]["state"]
    for skips in (1, 2):
        row, _ = train.training_step(cfg, parts, state)
        assert (row["updates"], row["skipped"], state.skips) == (0, 1, skips)
        assert (math.isfinite(parts.optimizer.losses[-1])) == (loss is broken_gradient)
        assert moved(parts.policy, old) == []
        assert adam == {}
    parts.loss = sound
    row, _ = train.training_step(cfg, parts, state)
    assert (row["updates"], row["skipped"], state.skips) == (1, 0, 0)
    parts.loss, old = loss, weights_of(parts.policy)
    for _ in range(2):
        train.training_step(cfg, parts, state)
    train.training_step(cfg, parts, state)
    assert state.skips == 3, "the count at which train.train gives up"
    assert moved(parts.policy, old) == []


def test_kl_old_stop_ends_the_epochs_before_the_update_that_would_go_further(base):
    options = ("optim.epochs=4", "optim.lr=0.03")
    cfg, parts, state = setup(base, *options)
    row, _ = train.training_step(cfg, parts, state)
    assert row["updates"] == 4
    free = row["kl_old_pi"]
    assert free > 1e-3
    cfg, parts, state = setup(base, *options, "kl_old.stop=1e-6")
    row, _ = train.training_step(cfg, parts, state)
    assert row["updates"] == 1, "the first update starts at pi_old, the second one is beyond 1e-6"
    assert row["skipped"] == 0
    assert all(p.grad is None for p in parts.policy.parameters()), "the gradient of the update left out stays behind"
    cfg, parts, state = setup(base, *options, "kl_old.stop=1e6")
    assert train.training_step(cfg, parts, state)[0]["updates"] == 4


# What is paid


def paid(base, *options) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The rollout, its token rewards as the advantage function gets them, and V after the last token."""
    _, parts, _, batch = rollout(base, *options)
    assert isinstance(batch.rewards, torch.Tensor)
    last = parts.policy.evaluate(batch).last_values if parts.policy.critic is not None else None
    return batch, batch.rewards, last


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_changes_each_token_reward_by_minus_coef_times_the_estimate_and_nothing_else(base, estimator):
    plain, without, _ = paid(base, "optim.epochs=2")
    batch, with_kl, _ = paid(base, "optim.epochs=2", "kl_ref.coef=0.25", f"kl_ref.estimator={estimator}")
    assert torch.equal(batch.response_ids, plain.response_ids)
    penalty = KL[estimator](batch.old_logprobs, batch.ref_logprobs)
    assert penalty.abs().max() > 0.01
    assert torch.equal(with_kl, without - 0.25 * penalty)
    if estimator == "k1":
        assert torch.equal(penalty, batch.old_logprobs - batch.ref_logprobs)
    assert not torch.equal(batch.advantages, plain.advantages)


def test_the_score_is_paid_on_the_last_token_of_each_reply_and_nowhere_else(base):
    batch, rewards, _ = paid(base)
    last = batch.mask.sum(1) - 1
    for row, (column, reply) in enumerate(zip(last.tolist(), batch.response_ids, strict=True)):
        digits = sum(3 <= i < 13 for i in reply[: column + 1].tolist())  # ids 3–12 are 0–9
        assert rewards[row, column].item() == pytest.approx(digits / 6)
        assert rewards[row].count_nonzero() == (digits > 0)
    assert rewards.any()


def test_bootstrap_pays_gamma_times_the_value_after_the_last_token_of_a_truncated_reply(base):
    options = ("advantage=gae", "loss=ppo", "model.critic=head", "advantage.gamma=0.9")
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
@every_weights
def test_masked_truncated_replies_leave_the_numerator_and_the_denominator(base, options, weights):
    """The update is that of a rollout in which they never were."""
    cfg, parts, state, batch = rollout(base, *options, f"optim.weights={weights}", "truncation=mask")
    assert 0 < batch.truncated.sum() < len(batch)
    masked = update_gradient(cfg, parts, state, batch)
    kept = update_gradient(cfg, parts, state, batch[~batch.truncated])
    everything = update_gradient(replace(cfg, truncation="terminal"), parts, state, batch)
    assert masked[0] == pytest.approx(kept[0], abs=1e-10)
    check_equal([masked[1]], [kept[1]])
    with pytest.raises(AssertionError):
        check_equal([everything[1]], [kept[1]], tolerance=1e-4)


@every_weights
def test_dropped_unanimous_groups_leave_the_numerator_and_the_denominator(base, weights, monkeypatch):
    """The batch learned from is the other groups, in their order; where all are unanimous, all are kept."""
    options = (f"optim.weights={weights}", "sampling.unanimous=drop")
    real = train.judge

    def judged(reward, asked, replies, batch):
        scores, named = real(reward, asked, replies, batch)
        assert (scores.view(4, 4).amax(1) > scores.view(4, 4).amin(1)).all()
        return torch.cat([scores[:4], torch.full((4,), 0.7), scores[8:]]), named

    everything = rollout(base, f"optim.weights={weights}")[3]
    monkeypatch.setattr(train, "judge", judged)
    cfg, parts, state, batch = rollout(base, *options)
    rows = torch.tensor([*range(4), *range(8, 16)])
    assert torch.equal(batch.mask, everything.mask[rows])
    assert torch.equal(batch.response_ids, everything.response_ids[rows])
    check_equal(
        [update_gradient(cfg, parts, state, batch)[1]], [update_gradient(cfg, parts, state, everything[rows])[1]]
    )
    monkeypatch.setattr(train, "judge", lambda *args: (torch.full((16,), 0.7), {}))
    assert len(rollout(base, *options)[3]) == 16


@pytest.mark.parametrize("options", [(), ("advantage=gae", "loss=ppo", "model.critic=head")], ids=["grpo", "ppo"])
def test_the_control_of_make_learn_gives_the_same_advantages_to_other_replies(base, options):
    """Row by row a permutation of the real ones, zero outside the mask; the value targets stay where they are."""
    real = rollout(base, *options)[3]
    name = "gae" if options else "grpo"
    _, parts, _, batch = rollout(base, *options, f"advantage.name={ROOT / 'tests' / 'shuffled.py'}:{name}")
    assert torch.equal(batch.response_ids, real.response_ids)
    assert not torch.equal(batch.advantages, real.advantages)
    assert torch.equal(batch.advantages, batch.advantages * batch.mask)
    assert sorted(batch.advantages[:, 0].tolist()) == sorted(real.advantages[:, 0].tolist())
    assert parts.advantage.keywords == setup(base, *options)[1].advantage.keywords
    if options:
        assert torch.equal(batch.returns, real.returns)
    else:
        assert all(len(row[m].unique()) == 1 for row, m in zip(batch.advantages, batch.mask, strict=True))


# What train.py is


def test_train_py_names_no_algorithm():
    """PPO and GRPO differ by their config alone: there is nothing that the loop could compare a name with."""
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
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    assert len(docstrings) > 5
    assert len(strings) > 20
    assert [
        f"line {s.lineno}: {s.value!r}" for s in strings if set(s.value.lower().replace("-", "_").split()) & names
    ] == []


@functools.cache
def code_lines(path: Path) -> set[tuple[str, int]]:
    """The lines of a file that hold code: not blank, not a comment, not in a docstring."""
    source = path.read_text(encoding="utf-8")
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    numbered = enumerate(source.splitlines(), 1)
    return {(str(path), n) for n, line in numbered if line.strip() and line.strip()[0] != "#" and n not in docs}


def executed(call) -> dict[str, set[tuple[str, int]]]:
    """The lines of code of every function of ours that runs in `call()`, by file and function."""
    codes = set()

    def watch(frame, event, arg):
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    lines = defaultdict(set)
    for code in codes:
        path = Path(code.co_filename)
        if path == ROOT / "train.py" or ROOT / "rlkl" in path.parents:
            source, first = inspect.getsourcelines(code)
            outer = code.co_qualname.split(".<locals>")[0]
            if outer.startswith("<"):  # a lambda or a comprehension of the module
                continue
            whole = {(str(path), first + i) for i in range(len(source))}
            lines[f"{path.relative_to(ROOT)} {outer}"] |= whole & code_lines(path)
    return lines


def line_table(base, *options) -> tuple[int, str]:
    cfg, parts, state = setup(base, *options)
    parts.optimizer = parts.optimizer.optimizer  # the recorder is not ours to read
    lines = executed(lambda: train.training_step(cfg, parts, state))
    counts = {name: len(found) for name, found in lines.items()}
    total, files = len(set().union(*lines.values())), defaultdict(int)
    for name, count in counts.items():
        files[name.split()[0]] += count
    tables = [[f"{count:4d}  {name}" for name, count in sorted(x.items())] for x in (counts, files)]
    return total, "\n".join([*tables[0], "", *tables[1], f"{total:4d}  in all"])


@pytest.mark.parametrize(("config", "limit"), [("tiny-grpo", 450), ("tiny-ppo", 470)])
def test_one_training_step_is_read_in_ten_minutes(base, config, limit):
    """Every function of ours that a step of the config runs, whole: at most so many lines of code."""
    file = str(ROOT / "configs" / f"{config}.yaml")
    total, table = line_table(base, file, f"model.name={base}", "optim.minibatch=4", "sampling.prompts=8")
    assert "train.py training_step" in table
    assert "rlkl/rollout/cached.py cached" in table
    assert total <= limit, f"\n{table}"
