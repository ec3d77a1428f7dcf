"""What a loss, an advantage, a KL, a reward and a task must satisfy: yours, and the built-in ones.

    pytest tests/contract.py --loss my_loss.py:sapo --advantage my_advantage.py:median
    pytest tests/contract.py --kl my_kl.py:chi2
    pytest tests/contract.py --reward my_reward.py:brevity --task my_task.py:Vowels
    pytest tests/contract.py

Any of the five can be given alone; it is checked with its default options. A KL is an estimator
(logprobs, ref_logprobs) or a loss term (new, batch). With --task the reward scores that task.
Without an option every built-in entry is checked, and every selector.
"""

import contextlib
import copy
import inspect
import json
import math
import signal
import time
import warnings
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rlkl.advantages import ADVANTAGES
from rlkl.explain.optimum import tilted, total_variation
from rlkl.explain.tabular import BANDIT, TREE, Game, probabilities
from rlkl.explain.verify import Expected, compares_groups, converge
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES, SELECTORS
from rlkl.plugins import resolve
from rlkl.rewards import REWARDS, compute_scores, from_task
from rlkl.rewards.scoring import Scoring, assemble
from rlkl.run.algorithm import Algorithm
from rlkl.run.check_plugins import needs_exact_kl
from rlkl.run.config import load
from rlkl.tasks import TASKS
from rlkl.types import Batch, Example, PolicyOutput

B, T, G = 6, 5, 3  # two prompts, three responses each
LENGTHS = (5, 1, 3, 2, 4, 3)  # of the responses, in tokens
REF_TERMS = {f"ref-{name}": f for name, f in KL_LOSSES.items()}
OLD_TERMS = {f"old-{name}": f for name, f in KL_OLD_LOSSES.items()}
TERMS = REF_TERMS | OLD_TERMS
TABLES = {
    "loss": LOSSES,
    "advantage": ADVANTAGES,
    "estimator": KL,
    "term": TERMS,
    "reward": REWARDS,
    "task": TASKS,
    "selector": SELECTORS,
}
OPTION_OF = {"estimator": "kl", "term": "kl"}  # the command-line option of a kind, else --KIND
GIVEN = ("loss", "advantage", "kl", "reward", "task")

# The built-in ones that lack a property on purpose.
STOPS_GRADIENT = {  # they detach something, so their gradient is not that of their value
    "gspo",
    "cispo",
    "dppo_tv",
    "dppo_kl",
    "topr",
    "vespo",
    "k2_sequence",
    "ref_k3_straight_through",
}
NOT_REINFORCE = {"top_entropy", "clip_cov"}  # at ratio 1 their gradient is not -A on all tokens
DEMONSTRATIONS = {"Reviews"}  # their answers show a possible response, not the best one
LEADS_ELSEWHERE = {  # not to the optimum of E[score] - beta KL(pi || ref)
    "k2",
    "k3",
    "ref_k3",
    "exact_ref_pi",
    "wk2_token",
    "old_k2",
    "old_k3",
    "best_only",  # it pushes no response down, so it has not arrived after 600 steps
}
SLOW = 3.0  # seconds to score a response: a runaway takes minutes, a loaded machine does not


def pytest_generate_tests(metafunc):
    """Each kind is what the command line names, or every entry of its table."""
    given = {option: metafunc.config.getoption(f"--{option}", default=None) for option in GIVEN}
    for kind in TABLES:
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, names_to_check(kind, given), indirect=True)


def names_to_check(kind: str, given: dict[str, str | None]) -> list[str]:
    """Of one kind. given: what each option of the command line names."""
    if not any(given.values()):
        names = list(TABLES[kind])
        if kind == "reward":  # a run without a reward is scored by its task
            names += [f"task {name}" for name in TASKS]
        return names
    name = given.get(OPTION_OF.get(kind, kind))
    if not name:
        return []
    if kind in OPTION_OF and kind_of_kl(resolve({"name": name}, KL | TERMS, "kl").func) != kind:
        return []
    return [name]


def kind_of_kl(function) -> str:
    """A loss term takes (new, batch), an estimator of a value (logprobs, ref_logprobs)."""
    return "term" if {"new", "batch"} & set(inspect.signature(function).parameters) else "estimator"


@pytest.fixture
def loss(request):
    return resolve({"name": request.param}, LOSSES, "loss")


@pytest.fixture
def advantage(request):
    return resolve({"name": request.param}, ADVANTAGES, "advantage")


@pytest.fixture
def estimator(request):
    return resolve({"name": request.param}, KL, "kl")


@pytest.fixture
def term(request):
    return resolve({"name": request.param}, TERMS, "kl")


@pytest.fixture
def selector(request):
    return resolve({"name": request.param}, SELECTORS, "selector")


def make_task(name: str, folder):
    """split -> task, with the options it needs, and a small file for those that read files."""
    rows = [{"prompt": f"What is {n} + {n}? ", "answer": 2 * n, "level": n % 3} for n in range(40)]
    grade_school = [
        {
            "question": f"What is {n} + {n}?",
            "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
        }
        for n in range(40)
    ]
    halves = [
        {
            "problem": f"Halve ${n}$",
            "level": "Level 1",
            "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
        }
        for n in range(1, 40, 2)
    ]
    files = {"jsonl": rows, "datasets": rows, "gsm8k": grade_school, "math": halves}
    options = {
        "countdown": {"problems": 200},
        "reasoning_gym": {"dataset": "chain_sum", "problems": 100},
    }.get(name, {})
    if name in files:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, files[name])), encoding="utf-8")
        options |= {"path": str(path)}
    return resolve({"name": name, **options}, TASKS, "task")


@pytest.fixture
def task(request, tmp_path):
    return make_task(request.param, tmp_path)


@pytest.fixture
def problems(request, tmp_path):
    """Two examples for a reward: those of --task, else sums."""
    name = request.config.getoption("--task", default=None) or "addition"
    examples = make_task(name, tmp_path)("train")
    return [examples[0], examples[len(examples) - 1]]


def required_options(name: str, folder) -> dict[str, str]:
    """The options that a built-in reward needs: models of a few thousand weights."""
    from preference_models import classifier, judge_of

    if name == "reward_model":
        return {"path": str(classifier(folder))}
    if name == "judge":
        return {"path": str(judge_of(folder)), "principle": "Be right."}
    return {}


@pytest.fixture
def reward(request, tmp_path):
    """A reward in any style of docs/rewards.md, or that of a task."""
    if request.param.startswith("task "):
        task = make_task(request.param.removeprefix("task "), tmp_path)("train")
        return from_task(task.score)
    # in this process, so that a failure can be debugged
    scoring = Scoring(0, seconds=10.0, failed=0.0, memory_gb=4.0, steps=1, say=warnings.warn)
    section = {"name": request.param} | required_options(request.param, tmp_path)
    return assemble([section], from_task(lambda example, response: 0.0), scoring)


def report(message: str, function, exempt: Collection[str] = ()) -> None:
    """A property that a sound function may lack: a warning and an expected failure.

    A built-in one must have it, unless it is exempt.
    """
    function = getattr(function, "func", function)
    builtin = any(function is f for table in TABLES.values() for f in table.values())
    assert not builtin or function.__name__ in exempt, message
    warnings.warn(message, stacklevel=2)
    pytest.xfail(message)


def options_are_keywords(function, positional: int) -> None:
    """The first `positional` parameters are the data; all others are keyword-only options."""
    parameters = list(inspect.signature(getattr(function, "func", function)).parameters.values())
    data, options = parameters[:positional], parameters[positional:]
    assert len(data) == positional
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in data)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in options)


def problem(seed: int = 0, sigma: float = 0.5, per_row: bool = False) -> tuple[PolicyOutput, Batch]:
    """Ragged float64 rows with all that a loss may read; `new` holds leaves.

    sigma: how far pi is from pi_old, in nats. per_row: one advantage for each response.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]

    def normal(columns: int = T) -> torch.Tensor:
        return torch.randn(B, columns, generator=g, dtype=torch.float64)

    ids = torch.randint(3, 9, (B, T), generator=g)
    old = -normal().abs() - 0.2
    batch = Batch(
        prompt_ids=ids[:, :2],
        prompt_mask=mask[:, :1].expand(B, 2),
        response_ids=ids,
        mask=mask,
        sampler_logprobs=old + 0.01 * normal(),
        truncated=mask[:, -1],
        old_logprobs=old,
        old_entropy=normal().abs(),
        ref_logprobs=old + 0.3 * normal(),
        values=normal(),
        rewards=normal(),
        advantages=normal(1).expand(B, T) if per_row else normal(),
        returns=normal(),
        weights=mask / mask.sum(),
        selected=mask & (torch.rand(B, T, generator=g) > 0.3),
    )
    batch.zero_padding()

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~mask, 0.0).requires_grad_()

    new = PolicyOutput(
        logprobs=leaf(batch.old_logprobs + sigma * normal()),
        entropy=leaf(normal().abs()),
        values=leaf(batch.values + sigma * normal()),
        last_values=normal(1)[:, 0],
        kl_pi_ref=leaf(normal().abs()),
        kl_ref_pi=leaf(normal().abs()),
    )
    return new, batch


def rows_of(new: PolicyOutput, rows: list[int], columns: int = T) -> PolicyOutput:
    return PolicyOutput(*(x[rows] if x.dim() == 1 else x[rows, :columns] for x in new))


def widened(new: PolicyOutput, batch: Batch, more: int = 4) -> tuple[PolicyOutput, Batch]:
    """The same with `more` columns of padding, and other ids and numbers outside the mask.

    The floats of a batch are 0 there, as train.py fills it.
    """
    wide = F.pad(batch.mask, (0, more))

    def widen(x: torch.Tensor, junk: float) -> torch.Tensor:
        return F.pad(x.detach(), (0, more)).masked_fill(~wide, junk)

    per_token = {
        name: widen(x, 7) for name, x in batch.tensors().items() if x.shape == batch.mask.shape
    }
    other = replace(batch, **per_token | {"mask": wide})
    other.zero_padding()
    junk = PolicyOutput(*(x if x.dim() == 1 else widen(x, 3.0).requires_grad_() for x in new))
    return junk, other


def contents(*holders: PolicyOutput | Batch) -> list[torch.Tensor]:
    """Every tensor that a policy's output or a batch holds."""
    parts = [list(h) if isinstance(h, tuple) else list(h.tensors().values()) for h in holders]
    return [x for part in parts for x in part if x is not None]


def gradient(loss, new: PolicyOutput, batch: Batch) -> torch.Tensor:
    """(B, T) of the summed loss inside the mask, in the log-probs."""
    return torch.autograd.grad(loss(new, batch)[0][batch.mask].sum(), new.logprobs)[0]


CUTS = (
    [[0, 1, 2, 3, 4, 5]],
    [[0], [1, 2, 3, 4, 5]],
    [[5, 1], [3, 0, 2], [4]],
)  # into micro-batches


# ------------------------------------------------------------------ policy losses
# loss(new, batch, *, options) -> (B, T) loss of each token, {name: (B, T)} diagnostics


def test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike(loss):
    new, batch = problem()
    per_token, diagnostics = loss(new, batch)
    assert per_token.shape == batch.mask.shape, (
        "return an unreduced (B, T) loss; train.py weighs and sums it"
    )
    assert per_token[batch.mask].isfinite().all()
    moved = gradient(loss, new, batch)[batch.mask].abs().sum()
    assert moved > 0, "the loss must depend on new.logprobs"
    for name, x in diagnostics.items():
        assert x.shape == batch.mask.shape, f"the diagnostic {name} must be (B, T)"


def test_the_options_of_a_loss_are_keywords(loss):
    options_are_keywords(loss, 2)


def test_a_loss_is_the_policy_term_alone(loss):
    """No value loss, no entropy bonus and no KL: train.py adds those. It needs no critic."""
    new, batch = problem()
    per_token, _ = loss(new, batch)
    others = (new.entropy, new.values, new.kl_pi_ref, new.kl_ref_pi)
    gradients = torch.autograd.grad(per_token[batch.mask].sum(), others, allow_unused=True)
    if any(g is not None and g.any() for g in gradients):
        message = "it has a gradient in new.entropy, new.values or the exact KLs: a term of its own"
        report(
            f"{message}, which entropy.coef, critic.coef and kl_ref.coef cannot switch off", loss
        )
    actor, no_critic = new._replace(values=None, last_values=None), replace(batch)
    no_critic.values = no_critic.returns = None
    assert torch.equal(loss(actor, no_critic)[0], per_token), "it must not need a critic"


def test_the_gradient_of_a_loss_is_that_of_its_value(loss):
    """gradcheck in float64."""
    for seed in (0, 1):
        new, batch = problem(seed)

        def inside(logprobs, new=new, batch=batch):
            return loss(new._replace(logprobs=logprobs), batch)[0][batch.mask]

        if not torch.autograd.gradcheck(inside, new.logprobs, raise_exception=False):
            message = "its gradient is not that of its value: right if you detach, as CISPO does"
            report(f"{message}, else a mistake", loss, STOPS_GRADIENT)


def test_a_loss_writes_to_nothing_it_is_given(loss):
    new, batch = problem()
    before = [x.detach().clone() for x in contents(new, batch)]
    loss(new, batch)[0].sum().backward()
    for x, after in zip(before, contents(new, batch), strict=True):
        assert torch.equal(x, after.detach())


def test_padding_changes_no_loss_and_no_gradient(loss):
    """Other ids and other numbers outside the mask, and four more columns."""
    new, batch = problem()
    junk, other = widened(new, batch)
    expected, wide = loss(new, batch)[0][batch.mask], other.mask
    torch.testing.assert_close(loss(junk, other)[0][wide], expected, atol=1e-12, rtol=0)
    narrow, wider = gradient(loss, new, batch), gradient(loss, junk, other)
    torch.testing.assert_close(wider[wide], narrow[batch.mask], atol=1e-12, rtol=0)
    assert wider[~wide].eq(0).all()


def test_a_loss_compares_no_rows(loss):
    """Each micro-batch, trimmed, gives its rows the loss that the whole batch gives them."""
    new, batch = problem()
    whole = loss(new, batch)[0]
    for rows in (rows for cut in CUTS for rows in cut):
        micro = batch[rows].trim()
        per_token = loss(rows_of(new, rows, micro.mask.shape[1]), micro)[0]
        expected = whole[rows][batch.mask[rows]]
        torch.testing.assert_close(per_token[micro.mask], expected, atol=1e-12, rtol=0)


def test_at_ratio_one_a_loss_is_reinforce(loss):
    """∂loss/∂log pi = -A where pi = pi_old, with one A for each response: no fixed point moves."""
    new, batch = problem(sigma=0.0, per_row=True)
    g, advantages = gradient(loss, new, batch), batch.advantages
    if not torch.allclose(g, -advantages, atol=1e-12):
        most = float((g + advantages).abs().max())
        message = f"at ratio 1 its policy gradient is not -A: off by up to {most:.3g}"
        report(message, loss, NOT_REINFORCE)


def test_a_loss_scales_with_the_advantage(loss):
    """loss(c A) - loss(0) = c (loss(A) - loss(0)) for c > 0: so weights may be folded into A."""
    new, batch = problem()
    advantages = batch.advantages
    at = {}
    for c in (0.0, 1.0, 0.25, 3.0):
        batch.advantages = c * advantages
        at[c] = loss(new, batch)[0].detach()[batch.mask]
    assert not torch.allclose(at[1.0], at[0.0])
    for c in (0.25, 3.0):
        expected = c * (at[1.0] - at[0.0])
        torch.testing.assert_close(at[c] - at[0.0], expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------ advantages
# advantage(rewards, values, mask, *, group_size, options) -> (advantages, returns or None)


def rewards_and_values(
    seed: int = 0, outcome_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 rewards and values with NaN outside the mask, and a mask with a hole in one row.

    outcome_only: rewards are 0 or 1 on a row's last token and 0 elsewhere, not anything anywhere.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[4, 1] = False
    both = torch.randn(2, B, T, generator=g, dtype=torch.float64)
    rewards, values = both.masked_fill(~mask, math.nan)
    if outcome_only:
        scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        last = torch.arange(T) == torch.tensor(LENGTHS)[:, None] - 1
        rewards = (scores[:, None] * last).masked_fill(~mask, math.nan)
    return rewards, values, mask


@pytest.fixture
def outcome_only(advantage):
    """Does the advantage refuse rewards on every token, as a KL in the reward gives? It may."""
    try:
        advantage(*rewards_and_values(), group_size=G)
    except ValueError:
        return True
    return False


def test_an_advantage_gives_one_number_a_token_and_zero_outside_the_mask(advantage, outcome_only):
    rewards, values, mask = rewards_and_values(outcome_only=outcome_only)
    advantages, returns = advantage(rewards, values, mask, group_size=G)
    for x in (advantages, returns):
        if x is not None:
            assert x.shape == mask.shape
            assert x.isfinite().all()
            assert x[~mask].eq(0).all()
            assert x[mask].abs().sum() > 0
            assert not x.requires_grad


def test_the_options_of_an_advantage_are_keywords(advantage):
    options_are_keywords(advantage, 3)
    assert "group_size" in inspect.signature(advantage.func).parameters


def test_an_advantage_writes_to_nothing_it_is_given(advantage, outcome_only):
    given = rewards_and_values(outcome_only=outcome_only)
    before = [x.clone() for x in given]
    advantage(*given, group_size=G)
    for was, x in zip(before, given, strict=True):
        assert torch.equal(was.nan_to_num(99.0), x.nan_to_num(99.0))


def test_padding_changes_no_advantage(advantage, outcome_only):
    """Other numbers outside the mask, and three more columns."""
    rewards, values, mask = rewards_and_values(outcome_only=outcome_only)
    wide = F.pad(mask, (0, 3))
    expected = advantage(rewards, values, mask, group_size=G)
    for junk in (0.0, -1e6, math.inf, math.nan):
        other = [F.pad(x, (0, 3)).masked_fill(~wide, junk) for x in (rewards, values)]
        for x, y in zip(advantage(*other, wide, group_size=G), expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x[:, :T], y, atol=1e-12, rtol=0)
                assert x[:, T:].eq(0).all()


def test_the_order_of_the_groups_does_not_matter(advantage, outcome_only):
    given = rewards_and_values(outcome_only=outcome_only)
    order = [3, 4, 5, 0, 1, 2]
    expected = advantage(*given, group_size=G)
    reordered = advantage(*(x[order] for x in given), group_size=G)
    for x, y in zip(reordered, expected, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y[order], atol=1e-12, rtol=0)


def test_degenerate_groups_stay_finite(advantage, outcome_only):
    """Groups of one, equal scores (float32, 0.7), one token a row, empty rows, one group alone."""
    full = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    last = torch.arange(T) == torch.tensor(LENGTHS)[:, None] - 1
    rewards = last * (1.0 if outcome_only else 0.7)
    one_token = (torch.arange(T) < 1).expand(B, T)
    with_an_empty_row = full & (torch.arange(B) != 2)[:, None]
    for group_size in (1, 2, 3, 6):
        alone = full[:group_size]
        empty = torch.zeros_like(full)
        for mask in (full, one_token, one_token[:group_size], with_an_empty_row, empty, alone):
            values = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
            outputs = advantage(rewards[: len(mask)], values, mask, group_size=group_size)
            for x in outputs:
                if x is not None:
                    assert x.isfinite().all()
                    assert x[~mask].eq(0).all()
                    assert x.abs().max() < 1e3, "a group of zero variance must not be blown up"


# ------------------------------------------------------------------ KL estimators
# estimator(logprobs, ref_logprobs, *, options) -> (B, T): for the reward and the metrics


def log_policies(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 log-probs of the policy (a leaf) and the reference, 0 outside the mask; the mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    pi, ref = -torch.randn(2, B, T, generator=g, dtype=torch.float64).abs() - 0.1
    return (pi * mask).requires_grad_(), ref * mask, mask


def test_an_estimator_gives_one_finite_number_a_token(estimator):
    pi, ref, _ = log_policies()
    value = estimator(pi, ref)
    assert value.shape == pi.shape
    assert value.isfinite().all()
    assert value.detach().abs().sum() > 0, "it must depend on what it is given"
    broken = estimator(torch.full((1, 1), -1e4), torch.zeros(1, 1))
    assert broken.isfinite().all(), "one broken token must not overflow"


def test_the_options_of_an_estimator_are_keywords(estimator):
    options_are_keywords(estimator, 2)


def test_the_gradient_of_an_estimator_is_that_of_its_value(estimator):
    for seed in (0, 1):
        pi, ref, _ = log_policies(seed)
        if not torch.autograd.gradcheck(
            lambda x, ref=ref: estimator(x, ref), pi, raise_exception=False
        ):
            message = "its gradient is not that of its value: harmless in the reward"
            report(f"{message}, where no gradient is taken", estimator, STOPS_GRADIENT)


def test_an_estimator_writes_to_nothing_it_is_given(estimator):
    pi, ref, _ = log_policies()
    before = pi.detach().clone(), ref.clone()
    estimator(pi.detach(), ref)
    assert torch.equal(pi.detach(), before[0])
    assert torch.equal(ref, before[1])


def test_an_estimator_looks_at_no_other_token(estimator):
    """It is given no mask, so it cannot know what is padding: other numbers, and more columns."""
    pi, ref, mask = log_policies()
    expected, wide = estimator(pi, ref).detach(), F.pad(mask, (0, 3))
    for junk in (0.0, 7.0, math.nan):
        other = [F.pad(x.detach(), (0, 3)).masked_fill(~wide, junk) for x in (pi, ref)]
        torch.testing.assert_close(estimator(*other)[wide], expected[mask], atol=1e-12, rtol=0)
    rows = [4, 1]
    some_rows = estimator(pi[rows], ref[rows]).detach()
    torch.testing.assert_close(some_rows, expected[rows], atol=1e-12, rtol=0)


def test_an_estimator_is_zero_where_the_policies_are_equal(estimator):
    pi, _, _ = log_policies()
    assert estimator(pi, pi.detach().clone()).eq(0).all()


# ------------------------------------------------------------------ KL loss terms
# term(new, batch, *, options) -> (B, T)


def equal_policies() -> tuple[PolicyOutput, Batch]:
    new, batch = problem()
    batch.old_logprobs = batch.ref_logprobs = new.logprobs.detach().clone()
    zero = [torch.zeros_like(x, requires_grad=True) for x in (new.kl_pi_ref, new.kl_ref_pi)]
    return new._replace(kl_pi_ref=zero[0], kl_ref_pi=zero[1]), batch


def test_a_term_gives_one_finite_number_a_token_that_depends_on_the_policy(term):
    new, batch = problem()
    value = term(new, batch)
    assert value.shape == batch.mask.shape, (
        "return an unreduced (B, T) term; train.py weighs and sums it"
    )
    assert value[batch.mask].isfinite().all()
    assert value.requires_grad, "a term without a gradient does nothing"
    gradients = term_gradient(term, new, batch)
    moved = sum(g[batch.mask].abs().sum() for g in gradients)
    assert moved > 0, "a term without a gradient does nothing"


def test_the_options_of_a_term_are_keywords(term):
    options_are_keywords(term, 2)


def test_the_gradient_of_a_term_is_that_of_its_value(term):
    """gradcheck in float64: log-probs and the exact KLs."""
    for seed in (0, 1):
        new, batch = problem(seed)

        def inside(logprobs, pi_ref, ref_pi, new=new, batch=batch):
            output = new._replace(logprobs=logprobs, kl_pi_ref=pi_ref, kl_ref_pi=ref_pi)
            return term(output, batch)[batch.mask]

        leaves = (new.logprobs, new.kl_pi_ref, new.kl_ref_pi)
        if not torch.autograd.gradcheck(inside, leaves, raise_exception=False):
            message = "its gradient is not that of its value: right if you detach, as k3+ does"
            report(f"{message}, else a mistake", term, STOPS_GRADIENT)


def test_a_term_writes_to_nothing_it_is_given(term):
    new, batch = problem()
    before = [x.detach().clone() for x in contents(new, batch)]
    term(new, batch).sum().backward()
    for was, x in zip(before, contents(new, batch), strict=True):
        assert torch.equal(was, x.detach())


def term_gradient(term, new: PolicyOutput, batch: Batch) -> list[torch.Tensor]:
    """Of the summed term inside the mask, in the log-probs and in both exact KLs."""
    total = term(new, batch)[batch.mask].sum()
    leaves = (new.logprobs, new.kl_pi_ref, new.kl_ref_pi)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def test_padding_changes_no_term_and_no_gradient(term):
    """Other ids and other numbers outside the mask, and four more columns."""
    new, batch = problem()
    junk, other = widened(new, batch)
    expected, wide = term(new, batch)[batch.mask], other.mask
    torch.testing.assert_close(term(junk, other)[wide], expected, atol=1e-12, rtol=0)
    narrow, wider = term_gradient(term, new, batch), term_gradient(term, junk, other)
    for x, y in zip(narrow, wider, strict=True):
        torch.testing.assert_close(y[wide], x[batch.mask], atol=1e-12, rtol=0)
        assert y[~wide].eq(0).all()


def test_a_term_compares_no_rows(term):
    """Each micro-batch, trimmed, gives its rows the term that the whole batch gives them."""
    new, batch = problem()
    whole = term(new, batch)
    for rows in (rows for cut in CUTS for rows in cut):
        micro = batch[rows].trim()
        value = term(rows_of(new, rows, micro.mask.shape[1]), micro)
        expected = whole[rows][batch.mask[rows]]
        torch.testing.assert_close(value[micro.mask], expected, atol=1e-12, rtol=0)


def test_a_term_is_zero_where_the_policies_are_equal(term):
    """The value exactly; and no noise: ∂term/∂log pi = 0 there, sample by sample."""
    new, batch = equal_policies()
    assert term(new, batch)[batch.mask].eq(0).all()
    g = term_gradient(term, new, batch)[0]
    if g.abs().max() > 1e-12:
        most = float(g.abs().max())
        report(f"noise: where pi = ref its gradient is not 0, but up to {most:.3g}", term)


# ------------------------------------------------------------------ selectors
# select(batch, uniforms, *, options) -> (B, T) bool


def selection(seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A batch with covariances of every size, and uniforms."""
    _, batch = problem(seed)
    batch.advantages = 3 * batch.advantages
    rng = torch.Generator().manual_seed(seed)
    return batch, torch.rand(B, T, generator=rng, dtype=torch.float64)


def test_a_selector_picks_sampled_tokens_at_least_one(selector):
    for seed in range(4):
        batch, uniforms = selection(seed)
        selected = selector(batch, uniforms)
        assert selected.shape == batch.mask.shape
        assert selected.dtype == torch.bool
        assert not (selected & ~batch.mask).any()
        assert selected.any()


def test_the_options_of_a_selector_are_keywords(selector):
    options_are_keywords(selector, 2)


def test_a_selector_writes_to_nothing_it_is_given(selector):
    batch, uniforms = selection()
    before = [x.clone() for x in (*contents(batch), uniforms)]
    selector(batch, uniforms)
    for was, x in zip(before, (*contents(batch), uniforms), strict=True):
        assert torch.equal(was, x)


def test_a_selector_sees_neither_padding_nor_the_order_of_rows(selector):
    """Four more columns, junk outside the mask, NaN among the uniforms; the rows in reverse."""
    batch, uniforms = selection()
    expected = selector(batch, uniforms)
    _, other = widened(problem()[0], batch)
    junk = F.pad(uniforms, (0, 4)).masked_fill(~other.mask, float("nan"))
    assert torch.equal(selector(other, junk)[:, :T], expected)
    assert not selector(other, junk)[:, T:].any()
    rows = list(range(B))[::-1]
    assert torch.equal(selector(batch[rows], uniforms[rows]), expected[rows])


# ------------------------------------------------------------------ tasks

GARBAGE = (
    "",
    " ",
    "\n\n",
    "0",
    "-",
    "nan",
    "inf",
    "1e999",
    "1/0",
    "None",
    "{}",
    '{"answer": ',
    "\\boxed{",
    "</think>",
    "####",
    "π ≈ 3,14 · 10⁻² ½ ٣ 四",
    "\u202e\u200b\x00\ufffd",
    "💥" * 50,
)
LONG = (
    "9",
    "a",
    " ",
    "(",
    "1+",
    "\\boxed{",
    "<think>",
    "1,",
    "0.",
    "\n",
    "ab ",
    "{[",
    "-",
)  # repeated


@contextlib.contextmanager
def within(seconds: float, what: str):
    """AssertionError if it takes longer. Where the system has timers, a runaway is interrupted."""
    message, start = f"{what} took longer than {seconds} s", time.perf_counter()

    def late(number, frame):
        raise AssertionError(message)

    timer = hasattr(signal, "setitimer")
    if timer:
        was = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, was)
    assert time.perf_counter() - start < seconds, message


def spread_examples(task) -> list[Example]:
    """Up to five examples from all over a task."""
    return [task[i] for i in sorted({round(k * (len(task) - 1) / 4) for k in range(5)})]


def total(score: float | dict[str, float]) -> float:
    return sum(score.values()) if isinstance(score, dict) else score


def check_score(score) -> None:
    parts = score if isinstance(score, dict) else {"score": score}
    assert parts, "a dict of parts must have one"
    for name, x in parts.items():
        assert isinstance(name, str)
        assert isinstance(x, int | float), f"{name} is {x!r}, not a number"
        assert math.isfinite(x), f"{name} is {x!r}"


def test_a_task_is_a_list_of_examples(task):
    """Each has a prompt that is not empty, and is the same whenever it is asked for."""
    for split in ("train", "heldout"):
        made, again = task(split), task(split)
        assert len(made) == len(again) > 0
        for i in sorted({0, len(made) // 2, len(made) - 1}):
            example = made[i]
            assert isinstance(example, Example)
            assert isinstance(example.answer, str)
            assert isinstance(example.info, dict)
            if isinstance(example.prompt, str):
                assert example.prompt.strip()
            else:
                assert example.prompt
                assert all({"role", "content"} <= set(message) for message in example.prompt)
            assert example == made[i] == again[i]


def test_the_options_of_a_task_are_keywords(task):
    options_are_keywords(task, 1)


def test_no_prompt_is_both_trained_on_and_held_out(task):
    train, heldout = (prompts_of(task(split)) for split in ("train", "heldout"))
    assert not train & heldout


def prompts_of(task) -> set[str]:
    return {json.dumps(task[i].prompt, sort_keys=True) for i in range(len(task))}


def test_a_score_is_a_finite_number_whatever_the_response(task):
    """Or a dict of them. A policy can write anything, and one exception would end the run."""
    made = task("train")
    for example in spread_examples(made):
        answer = example.answer
        for response in (*GARBAGE, answer, answer[:-1], f"{answer} or {answer}\n"):
            with within(SLOW, f"the score of {response[:20]!r}"):
                check_score(made.score(example, response))


def test_a_score_takes_no_time_however_long_the_response(task):
    """10,000 characters: no regular expression that runs away, no int() of thousands of digits."""
    made = task("train")
    example = made[0]
    for piece in LONG:
        made.score(example, piece)  # what is loaded at the first call is not counted
        long = piece * (10_000 // len(piece))
        for response in (long, long + "!"):
            with within(SLOW, f"the score of ten thousand characters of {piece!r}"):
                check_score(made.score(example, response))


def test_a_score_depends_on_nothing_but_the_example_and_the_response(task):
    """The same whatever was scored before, by either split's task. The example is unchanged."""
    made, other = task("train"), task("heldout")
    cases = [(e, response) for e in spread_examples(made) for response in (e.answer, "", "7", "💥")]
    before = copy.deepcopy([e for e, _ in cases])
    first = [copy.deepcopy(made.score(*case)) for case in cases]
    assert [made.score(*case) for case in cases[::-1]] == first[::-1]
    assert [other.score(*case) for case in cases] == first
    assert before == [e for e, _ in cases]


def test_the_right_answer_scores_one_and_an_empty_response_less(task):
    """eval/accuracy counts a response as right from a score of 1.

    A task that wants more than the bare answer has a whole correct response in info["solution"].
    """
    made = task("train")
    for example in spread_examples(made):
        if example.answer:
            response = example.solution
            assert total(made.score(example, "")) < 1, "an empty response is right"
            score = total(made.score(example, response))
            if score < 1:
                message = f"the bare answer {response!r} scores {score}"
                report(f"{message}: right if the format is scored too", task, DEMONSTRATIONS)


# ------------------------------------------------------------------ rewards
# reward(examples, responses, batch, *, options) -> (scores, parts); other styles: docs/rewards.md


def responses_to(problems: list[Example], seed: int = 0) -> tuple[list[Example], list[str], Batch]:
    """(examples, responses, batch): two groups of responses, right, nearly right, and garbage."""
    _, batch = problem(seed)
    a, b = problems[0], problems[-1]
    responses = [a.answer, f"{a.answer} ", "", "💥 not at all", b.answer, f"so it is {b.answer}"]
    return [a] * G + [b] * G, responses, batch


def scores_of(reward, examples, responses, batch) -> dict[str, torch.Tensor]:
    """The scores and their parts by name, as train.py reads them. UserError if they are wrong."""
    scores, parts = compute_scores(reward, examples, responses, batch)
    return {"the score": scores} | {name: torch.as_tensor(x) for name, x in parts.items()}


def test_a_reward_gives_one_finite_score_a_response_and_parts_alike(reward, problems):
    for name, x in scores_of(reward, *responses_to(problems)).items():
        assert x.shape == (B,), f"{name} must be (B,)"
        assert usable(reward, name, x), f"{name} must be finite, and no response may fail"
    examples, _, batch = responses_to(problems)
    for i in range(0, len(GARBAGE), B):
        responses = (*GARBAGE, *GARBAGE)[i : i + B]
        for name, x in scores_of(reward, examples, responses, batch).items():
            assert usable(reward, name, x), f"{name} must be finite, and no response may fail"


def usable(reward, name: str, x: torch.Tensor) -> bool:
    """Finite, and no response has failed. A text reward may give None, which is NaN here."""
    if name == "failed" and x.any():
        return False
    is_text_reward = not hasattr(reward, "func")  # any other is a functools.partial
    return not x.isinf().any() and (is_text_reward or not x.isnan().any())


def test_the_options_of_a_reward_are_keywords(reward):
    if hasattr(reward, "func"):  # that of a task is made by from_task, and has no options
        options_are_keywords(reward, 3)


def test_the_scores_follow_their_rows(reward, problems):
    """In another order, of groups or within groups, every response keeps its score."""
    examples, responses, batch = responses_to(problems)
    expected = scores_of(reward, examples, responses, batch)
    for order in ([3, 4, 5, 0, 1, 2], [2, 0, 1, 4, 5, 3]):
        reordered = [examples[i] for i in order], [responses[i] for i in order], batch[order]
        scores = scores_of(reward, *reordered)
        assert set(scores) == set(expected)
        for name, x in scores.items():
            message = f"{name} depends on the order of the rows"
            torch.testing.assert_close(x, expected[name][order], equal_nan=True, msg=message)


def test_a_reward_writes_to_nothing_it_is_given(reward, problems):
    examples, responses, batch = responses_to(problems)
    before = copy.deepcopy((examples, responses)), [x.clone() for x in contents(batch)]
    compute_scores(reward, examples, responses, batch)
    assert (examples, responses) == before[0]
    for was, x in zip(before[1], contents(batch), strict=True):
        assert torch.equal(was, x)


def test_padding_changes_no_score(reward, problems):
    """Other ids and four more columns: a response is as long as its mask says."""
    examples, responses, batch = responses_to(problems)
    _, other = widened(problem()[0], batch)
    expected = scores_of(reward, examples, responses, batch)
    for name, x in scores_of(reward, examples, responses, other).items():
        torch.testing.assert_close(
            x, expected[name], equal_nan=True, msg=f"{name} depends on padding"
        )


# ------------------------------------------------------------------ where it leads
# The exact expected gradient on an enumerated game, followed from the reference to where it ends.

BETA = 0.7


def configured(place: str, game: Game = TREE, **parts) -> Expected:
    """The expected update of the parts on a game, beside rloo, the unclipped surrogate and k1.

    The game is BANDIT where the advantage compares prompts, as that takes many more rollouts.
    """
    options = ["critic.kind=head", "advantage=gae", "loss=clip", "sampling.group_size=3"]
    cfg = load([*options, f"kl_ref.place={place}", f"kl_ref.coef={BETA}"])
    kl_ref = parts.get("kl_ref", KL["k1"])
    defaults = {
        "advantage": resolve({"name": "rloo"}, ADVANTAGES),
        "policy_loss": LOSSES["surrogate"],
        "kl_ref": kl_ref,
        "kl_old": KL_OLD_LOSSES["k3"],
        "selector": None,
        "exact_kl": place == "loss" and needs_exact_kl(kl_ref),
        "reads_old_logprobs": True,
        "only_advantages": False,
        "gamma": 1.0,
    }
    algorithm = Algorithm(**defaults | parts)
    return Expected(cfg, algorithm, BANDIT if compares_groups(algorithm, cfg) else game)


def converged(expected: Expected) -> torch.Tensor:
    """(R,) the probabilities of the responses where training ends."""
    return expected.probability(converge(expected, steps=600)[0]).detach()


def held_to_the_optimum(
    name: str, function, expected: Expected, exempt: Collection[str] = ()
) -> None:
    game = expected.game
    pi = converged(expected)
    optimum = tilted(probabilities(game, game.table), game.scores, BETA)
    distance = total_variation(pi, optimum)
    if distance > 1e-4:
        means = [float(p @ game.scores) for p in (pi, optimum)]
        report(
            f"the {name} does not lead to pi* ∝ ref · exp(score/beta): total variation "
            f"{distance:.2g}, mean score {means[0]:.6g} and not {means[1]:.6g}",
            function,
            exempt,
        )


def test_a_loss_leads_to_the_optimum(loss):
    """With k1 in the reward, whatever its trust region is: that moves no fixed point."""
    try:
        held_to_the_optimum("loss", loss, configured("reward", policy_loss=loss))
    except ValueError as error:
        pytest.skip(str(error))  # it needs a selector, which an enumeration has not


def test_an_advantage_leads_to_the_optimum(advantage):
    """With k1 in the reward. If it refuses that: to a better mean score, with k2 in the loss."""
    try:
        expected = configured("reward", advantage=advantage)
        held_to_the_optimum("advantage", advantage, expected, LEADS_ELSEWHERE)
    except ValueError:
        scores = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        game = BANDIT._replace(scores=scores)
        expected = configured("loss", game, advantage=advantage, kl_ref=KL_LOSSES["k2"])
        before = probabilities(game, game.table) @ scores
        assert converged(expected) @ scores > before + 0.05


def test_an_estimator_in_the_reward_leads_to_the_optimum(estimator):
    expected = configured("reward", BANDIT, kl_ref=estimator)
    held_to_the_optimum("estimator in the reward", estimator, expected, LEADS_ELSEWHERE)


def test_a_term_in_the_loss_leads_to_the_optimum(term):
    """On responses of one token, where token and sequence are the same."""
    expected = configured("loss", BANDIT, kl_ref=term)
    held_to_the_optimum("term in the loss", term, expected, LEADS_ELSEWHERE)
