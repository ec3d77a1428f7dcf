"""What a loss, an advantage, a KL, a reward and a task must keep, yours as well as ours.

pytest tests/contract.py --loss my_loss.py:sapo --advantage my_advantage.py:mine     (any of the five, by its defaults)
pytest tests/contract.py --kl my_kl.py:mine          an estimator (logprobs, ref_logprobs), or a loss term (new, batch)
pytest tests/contract.py --reward my_reward.py:mine --task my_task.py:Mine           the reward then judges that task
pytest tests/contract.py                             every built-in one, and every selector
"""

import contextlib
import copy
import inspect
import json
import math
import signal
import time
import warnings

import pytest
import torch

from rlkl.advantages import ADVANTAGES
from rlkl.algorithm import Algorithm
from rlkl.config import load, resolve
from rlkl.explain.optimum import tilted, total_variation
from rlkl.explain.tabular import BANDIT, TREE, Game, probabilities
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES
from rlkl.preflight import needs_exact_kl
from rlkl.rewards import REWARDS, from_task, judge
from rlkl.rewards.scoring import Scoring, assemble
from rlkl.selectors import SELECTORS
from rlkl.tasks import TASKS
from rlkl.types import Batch, Evaluation, Example

B, T, G = 6, 5, 3  # two prompts, three replies each, of 5, 1, 3, 2, 4 and 3 tokens
LENGTHS = (5, 1, 3, 2, 4, 3)
TERMS = {f"ref-{name}": f for name, f in KL_LOSSES.items()} | {f"old-{name}": f for name, f in KL_OLD_LOSSES.items()}
TABLES = {
    "loss": LOSSES, "advantage": ADVANTAGES, "estimator": KL, "term": TERMS, "reward": REWARDS, "task": TASKS,
    "selector": SELECTORS}
OPTIONS = {"estimator": "kl", "term": "kl"}  # the option of the command line that names one; else --KIND
GIVEN = ("loss", "advantage", "kl", "reward", "task")
STOPS_GRADIENT = {  # detached: their gradient is not that of their value
    "gspo", "cispo", "dppo_tv", "dppo_kl", "topr", "vespo", "k2_sequence", "ref_k3_straight_through"}
NOT_REINFORCE = {"top_entropy", "clip_cov"}  # at ratio 1 their gradient is not -A: some tokens are left out by design
DEMONSTRATIONS = {"Reviews"}  # their answers show what may be said, not what is best
LEADS_ELSEWHERE = {  # not to the optimum of E[score] - beta KL(pi || ref): another KL, or none
    "k2", "k3", "ref_k3", "exact_ref_pi", "wk2_token", "old_k2", "old_k3",
    "reinforce_pp",  # whitened over a rollout of 3 replies, each of which is in its own baseline
    "best_only"}  # punishes nothing, so that it is still on its way after so many steps


def pytest_generate_tests(metafunc):
    """Each kind is what the command line names, or every entry of its table."""
    given = {option: metafunc.config.getoption(f"--{option}", default=None) for option in GIVEN}
    for kind, table in TABLES.items():
        if kind in metafunc.fixturenames:
            name = given.get(OPTIONS.get(kind, kind))
            names = [name] if name else [] if any(given.values()) else list(table)
            if name and kind in OPTIONS and kind_of_kl(resolve({"name": name}, KL | TERMS, "kl").func) != kind:
                names = []
            if kind == "reward" and not any(given.values()):
                names += [f"task {name}" for name in TASKS]  # what a run without a reward is judged by
            metafunc.parametrize(kind, names, indirect=True)


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
    """split -> task, with the options it needs, and a small file of problems for the one that reads files."""
    rows = [{"prompt": f"What is {n} + {n}? ", "answer": 2 * n, "level": n % 3} for n in range(40)]
    grade_school = [{"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
                    for n in range(40)]
    halves = [{"problem": f"Halve ${n}$", "level": "Level 1", "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$."}
              for n in range(1, 40, 2)]
    files = {"jsonl": rows, "datasets": rows, "gsm8k": grade_school, "math": halves}
    options = {"countdown": {"problems": 200}, "reasoning_gym": {"dataset": "chain_sum", "problems": 100},
               "math": {"heldout_path": None}}.get(name, {})
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
    """Examples for a reward, two of them: those of --task, else sums."""
    made = make_task(request.config.getoption("--task", default=None) or "addition", tmp_path)("train")
    return [made[0], made[len(made) - 1]]


def needed(name: str, folder) -> dict[str, str]:
    """The options that a built-in reward cannot do without: models of a few thousand weights."""
    from preference_models import classifier, judge_of

    made = {"reward_model": lambda: {"path": str(classifier(folder))},
            "judge": lambda: {"path": str(judge_of(folder)), "principle": "Be right."}}
    return made[name]() if name in made else {}


@pytest.fixture
def reward(request, tmp_path):
    what, _, name = request.param.partition(" ")
    if what != "task":  # any style of docs/rewards.md; in this process, so that a failure can be looked into
        scoring = Scoring(0, seconds=10.0, failed=0.0, memory_gb=4.0, steps=1, say=warnings.warn)
        section = {"name": request.param} | needed(request.param, tmp_path)
        return assemble([section], from_task(lambda example, reply: 0.0), scoring)
    return from_task(make_task(name, tmp_path)("train").score)


def report(message: str, function, exempt: set[str] = frozenset()) -> None:
    """A property that a sound one may lack: one of ours is held to it, a user's is told and marked as expected."""
    found = getattr(function, "func", function)
    ours = any(found is f for table in TABLES.values() for f in table.values())
    assert not ours or found.__name__ in exempt, message
    warnings.warn(message, stacklevel=2)
    pytest.xfail(message)


def options_are_keywords(function, positional: int) -> None:
    """The first `positional` parameters are the data; what follows is an option, and an option has a name."""
    parameters = list(inspect.signature(getattr(function, "func", function)).parameters.values())
    assert [p.kind for p in parameters[:positional]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[positional:])


def problem(seed: int = 0, sigma: float = 0.5, per_row: bool = False) -> tuple[Evaluation, Batch]:
    """Ragged float64 rows with all that a loss may read, pi `sigma` nats away from pi_old, leaves in `new`."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]

    def normal(columns: int = T) -> torch.Tensor:
        return torch.randn(B, columns, generator=g, dtype=torch.float64)

    ids, old = torch.randint(3, 9, (B, T), generator=g), -normal().abs() - 0.2
    batch = Batch(ids[:, :2], mask[:, :1].expand(B, 2), ids, mask, old + 0.01 * normal(), mask[:, -1], old_logprobs=old)
    batch.ref_logprobs, batch.values, batch.returns = old + 0.3 * normal(), normal(), normal()
    batch.advantages = normal(1).expand(B, T) if per_row else normal()
    batch.rewards, batch.old_entropy = normal(), normal().abs()
    batch.weights, batch.selected = mask / mask.sum(), mask & (torch.rand(B, T, generator=g) > 0.3)
    new = (batch.old_logprobs + sigma * normal(), normal().abs(), batch.values + sigma * normal())
    leaves = [x.masked_fill(~mask, 0.0).requires_grad_() for x in new]
    kls = ((normal().abs() * mask).requires_grad_() for _ in range(2))
    return Evaluation(*leaves, normal(1)[:, 0], *kls), batch


def rows_of(new: Evaluation, rows: list[int], columns: int = T) -> Evaluation:
    return Evaluation(*(x[rows] if x.dim() == 1 else x[rows, :columns] for x in new))


def widened(new: Evaluation, batch: Batch, more: int = 4) -> tuple[Evaluation, Batch]:
    """The same with `more` columns of padding, and other ids and numbers wherever no token is."""
    wide = torch.nn.functional.pad(batch.mask, (0, more))

    def widen(x: torch.Tensor, junk: float) -> torch.Tensor:
        return torch.nn.functional.pad(x.detach(), (0, more)).masked_fill(~wide, junk)

    other = {n: widen(x, 7) for n, x in vars(batch).items() if torch.is_tensor(x) and x.shape == batch.mask.shape}
    other |= {"mask": wide, "prompt_ids": batch.prompt_ids, "prompt_mask": batch.prompt_mask}
    junk = Evaluation(*(x if x.dim() == 1 else widen(x, 3.0).requires_grad_() for x in new))
    return junk, Batch(**other, truncated=batch.truncated, temperature=batch.temperature)


def contents(*holders: object) -> list[torch.Tensor]:
    """Every tensor that an evaluation or a batch holds."""
    parts = [list(h) if isinstance(h, tuple) else list(vars(h).values()) for h in holders]
    return [x for part in parts for x in part if isinstance(x, torch.Tensor)]


def gradient(loss, new: Evaluation, batch: Batch) -> torch.Tensor:
    """Of the summed loss inside the mask, in the log-probs."""
    return torch.autograd.grad(loss(new, batch)[0][batch.mask].sum(), new.logprobs)[0]


# Losses
def test_a_loss_gives_one_finite_number_a_token_and_diagnostics_alike(loss):
    new, batch = problem()
    per_token, stats = loss(new, batch)
    assert per_token.shape == batch.mask.shape, "an unreduced (B, T) loss; train.py weighs and sums it"
    assert per_token[batch.mask].isfinite().all()
    assert gradient(loss, new, batch)[batch.mask].abs().sum() > 0, "the loss must depend on new.logprobs"
    for name, x in stats.items():
        assert x.shape == batch.mask.shape, f"the diagnostic {name} must be (B, T)"


def test_the_options_of_a_loss_are_keywords(loss):
    options_are_keywords(loss, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_of_a_loss_is_that_of_its_value(loss, seed):
    """gradcheck in float64: log-probs, entropy and values."""
    new, batch = problem(seed)

    def f(logprobs, entropy, values):
        return loss(new._replace(logprobs=logprobs, entropy=entropy, values=values), batch)[0][batch.mask]

    inputs = (new.logprobs, new.entropy, new.values)
    if not torch.autograd.gradcheck(f, inputs, raise_exception=False):
        message = "its gradient is not that of its value: right with a detach (CISPO, TOPR …), else a mistake"
        report(message, loss, STOPS_GRADIENT)


def test_a_loss_writes_to_nothing_it_is_given(loss):
    new, batch = problem()
    before = [x.detach().clone() for x in contents(new, batch)]
    loss(new, batch)[0].sum().backward()
    for was, x in zip(before, contents(new, batch), strict=True):
        assert torch.equal(was, x.detach())


def test_what_lies_behind_the_mask_changes_no_loss_and_no_gradient(loss):
    """Other ids, other numbers and four more columns of padding."""
    new, batch = problem()
    junk, other = widened(new, batch)
    wide = other.mask
    torch.testing.assert_close(loss(junk, other)[0][wide], loss(new, batch)[0][batch.mask], atol=1e-12, rtol=0)
    narrow, wider = gradient(loss, new, batch), gradient(loss, junk, other)
    torch.testing.assert_close(wider[wide], narrow[batch.mask], atol=1e-12, rtol=0)
    assert wider[~wide].eq(0).all()


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2, 3, 4, 5]], [[5, 1], [3, 0, 2], [4]]], ids=len)
def test_a_loss_compares_no_rows(loss, cut):
    """Each micro-batch, trimmed, gives its rows the loss that the whole batch gives them."""
    new, batch = problem()
    whole = loss(new, batch)[0]
    for rows in cut:
        micro = batch[rows].trim()
        got = loss(rows_of(new, rows, micro.mask.shape[1]), micro)[0]
        torch.testing.assert_close(got[micro.mask], whole[rows][batch.mask[rows]], atol=1e-12, rtol=0)


def test_at_ratio_one_a_loss_is_reinforce(loss):
    """∂loss/∂log pi = -A where pi = pi_old, A the same on all tokens of a reply: no fixed point moves."""
    new, batch = problem(sigma=0.0, per_row=True)
    g, a = gradient(loss, new, batch), batch.advantages
    if not torch.allclose(g, -a, atol=1e-12):
        message = f"at ratio 1 its policy gradient is not -A: off by up to {float((g + a).abs().max()):.3g}"
        report(message, loss, NOT_REINFORCE)


def test_the_policy_term_of_a_loss_scales_with_the_advantage(loss):
    """loss(c A) - loss(0) = c (loss(A) - loss(0)) for c > 0: importance weights may be folded into A."""
    new, batch = problem()
    a = batch.advantages
    at = {}
    for c in (0.0, 1.0, 0.25, 3.0):
        batch.advantages = c * a
        at[c] = loss(new, batch)[0].detach()[batch.mask]
    assert not torch.allclose(at[1.0], at[0.0])
    for c in (0.25, 3.0):
        torch.testing.assert_close(at[c] - at[0.0], c * (at[1.0] - at[0.0]), atol=1e-12, rtol=0)


# Advantages
def credit(seed: int = 0, scored: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 rewards and values with NaN behind the mask, and a mask with a hole in one row.

    `scored`: rewards are 0, and 0 or 1 on a row's last token, instead of anything anywhere.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[4, 1] = False
    rewards, values = torch.randn(2, B, T, generator=g, dtype=torch.float64).masked_fill(~mask, float("nan"))
    if scored:
        right = torch.tensor([[1.0], [0.0], [0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
        rewards = (right * (torch.arange(T) == torch.tensor(LENGTHS)[:, None] - 1)).masked_fill(~mask, float("nan"))
    return rewards, values, mask


@pytest.fixture
def scored(advantage):
    """Whether the advantage refuses rewards on every token, as a KL in the reward gives, and may: with a ValueError."""
    try:
        advantage(*credit(), group_size=G)
    except ValueError:
        return True
    return False


def test_an_advantage_gives_one_number_a_token_and_zero_behind_the_mask(advantage, scored):
    rewards, values, mask = credit(scored=scored)
    advantages, targets = advantage(rewards, values, mask, group_size=G)
    for x in (advantages, targets):
        if x is not None:
            assert x.shape == mask.shape
            assert x.isfinite().all()
            assert x[~mask].eq(0).all()
            assert x[mask].abs().sum() > 0
            assert not x.requires_grad


def test_the_options_of_an_advantage_are_keywords(advantage):
    options_are_keywords(advantage, 3)
    assert "group_size" in inspect.signature(advantage.func).parameters


def test_an_advantage_writes_to_nothing_it_is_given(advantage, scored):
    given = credit(scored=scored)
    before = [x.clone() for x in given]
    advantage(*given, group_size=G)
    for was, x in zip(before, given, strict=True):
        assert torch.equal(was.nan_to_num(99.0), x.nan_to_num(99.0))


@pytest.mark.parametrize("junk", [0.0, -1e6, float("inf"), float("nan")])
def test_what_lies_behind_the_mask_changes_no_advantage(advantage, junk, scored):
    """Other numbers there, and three more columns."""
    rewards, values, mask = credit(scored=scored)
    wide = torch.nn.functional.pad(mask, (0, 3))
    other = [torch.nn.functional.pad(x, (0, 3)).masked_fill(~wide, junk) for x in (rewards, values)]
    expected = advantage(rewards, values, mask, group_size=G)
    for x, y in zip(advantage(*other, wide, group_size=G), expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x[:, :T], y, atol=1e-12, rtol=0)
            assert x[:, T:].eq(0).all()


def test_the_order_of_the_groups_does_not_matter(advantage, scored):
    rewards, values, mask = credit(scored=scored)
    order = [3, 4, 5, 0, 1, 2]
    expected = advantage(rewards, values, mask, group_size=G)
    for x, y in zip(advantage(rewards[order], values[order], mask[order], group_size=G), expected, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_degenerate_groups_stay_finite(advantage, group_size, scored):
    """Groups of one, equal scores (float32, 0.7), one token a row, rows without a token, one row alone."""
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    equal = torch.zeros(B, T).index_put((torch.arange(B), mask.sum(1) - 1), torch.tensor(1.0 if scored else 0.7))
    first, none = torch.arange(T).expand(B, T) < 1, torch.zeros(B, T, dtype=torch.bool)
    empty_row = mask & (torch.arange(B) != 2)[:, None]
    for m in (mask, first, first[:group_size], empty_row, none, mask[:group_size]):
        r, v = equal[: len(m)], torch.linspace(-1, 1, len(m) * T).view(-1, T)
        advantages, targets = advantage(r, v, m, group_size=group_size)
        for x in (advantages, targets):
            if x is not None:
                assert x.isfinite().all()
                assert x[~m].eq(0).all()
                assert x.abs().max() < 1e3, "a group without spread must not be blown up"


# KL as a number: for the reward and the meters
def log_policies(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 log-probs of the policy (a leaf) and of the reference, and the mask that neither is given."""
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
    assert estimator(torch.full((1, 1), -1e4), torch.zeros(1, 1)).isfinite().all(), "of one broken token"


def test_the_options_of_an_estimator_are_keywords(estimator):
    options_are_keywords(estimator, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_of_an_estimator_is_that_of_its_value(estimator, seed):
    pi, ref, _ = log_policies(seed)
    if not torch.autograd.gradcheck(lambda x: estimator(x, ref), pi, raise_exception=False):
        report("its gradient is not that of its value: harmless in the reward, where no gradient is taken", estimator,
            STOPS_GRADIENT)


def test_an_estimator_writes_to_nothing_it_is_given(estimator):
    pi, ref, _ = log_policies()
    before = pi.detach().clone(), ref.clone()
    estimator(pi.detach(), ref)
    assert torch.equal(pi.detach(), before[0])
    assert torch.equal(ref, before[1])


@pytest.mark.parametrize("junk", [0.0, 7.0, float("nan")])
def test_an_estimator_looks_at_no_other_token(estimator, junk):
    """It is given no mask, so it cannot know which of the others are padding: other numbers there, and more columns."""
    pi, ref, mask = log_policies()
    wide = torch.nn.functional.pad(mask, (0, 3))
    other = [torch.nn.functional.pad(x.detach(), (0, 3)).masked_fill(~wide, junk) for x in (pi, ref)]
    torch.testing.assert_close(estimator(*other)[wide], estimator(pi, ref)[mask].detach(), atol=1e-12, rtol=0)
    rows = [4, 1]
    torch.testing.assert_close(estimator(pi[rows], ref[rows]), estimator(pi, ref)[rows], atol=1e-12, rtol=0)


def test_an_estimator_is_zero_where_the_policies_are_equal(estimator):
    pi, _, _ = log_policies()
    assert estimator(pi, pi.detach().clone()).eq(0).all()


# KL as a loss term
def equal_policies() -> tuple[Evaluation, Batch]:
    new, batch = problem()
    batch.old_logprobs = batch.ref_logprobs = new.logprobs.detach().clone()
    zero = [torch.zeros_like(x, requires_grad=True) for x in (new.kl_pi_ref, new.kl_ref_pi)]
    return new._replace(kl_pi_ref=zero[0], kl_ref_pi=zero[1]), batch


def test_a_term_gives_one_finite_number_a_token_that_depends_on_the_policy(term):
    new, batch = problem()
    value = term(new, batch)
    assert value.shape == batch.mask.shape, "an unreduced (B, T) term; train.py weighs and sums it"
    assert value[batch.mask].isfinite().all()
    assert value.requires_grad, "a term without a gradient does nothing"
    leaves = (new.logprobs, new.kl_pi_ref, new.kl_ref_pi)
    found = torch.autograd.grad(value[batch.mask].sum(), leaves, allow_unused=True)
    assert any(g is not None and g[batch.mask].abs().sum() > 0 for g in found), "a term without a gradient does nothing"


def test_the_options_of_a_term_are_keywords(term):
    options_are_keywords(term, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_of_a_term_is_that_of_its_value(term, seed):
    """gradcheck in float64: log-probs and the exact KLs."""
    new, batch = problem(seed)

    def f(logprobs, pi_ref, ref_pi):
        return term(new._replace(logprobs=logprobs, kl_pi_ref=pi_ref, kl_ref_pi=ref_pi), batch)[batch.mask]

    if not torch.autograd.gradcheck(f, (new.logprobs, new.kl_pi_ref, new.kl_ref_pi), raise_exception=False):
        report("its gradient is not that of its value: right with a detach (k3+ …), else a mistake", term,
            STOPS_GRADIENT)


def test_a_term_writes_to_nothing_it_is_given(term):
    new, batch = problem()
    before = [x.detach().clone() for x in contents(new, batch)]
    term(new, batch).sum().backward()
    for was, x in zip(before, contents(new, batch), strict=True):
        assert torch.equal(was, x.detach())


def term_gradient(term, new: Evaluation, batch: Batch) -> list[torch.Tensor]:
    leaves = (new.logprobs, new.kl_pi_ref, new.kl_ref_pi)
    return torch.autograd.grad(term(new, batch)[batch.mask].sum(), leaves, allow_unused=True, materialize_grads=True)


def test_what_lies_behind_the_mask_changes_no_term_and_no_gradient(term):
    """Other ids, other numbers and four more columns of padding."""
    new, batch = problem()
    junk, other = widened(new, batch)
    wide = other.mask
    torch.testing.assert_close(term(junk, other)[wide], term(new, batch)[batch.mask], atol=1e-12, rtol=0)
    for wider, narrow in zip(term_gradient(term, junk, other), term_gradient(term, new, batch), strict=True):
        torch.testing.assert_close(wider[wide], narrow[batch.mask], atol=1e-12, rtol=0)
        assert wider[~wide].eq(0).all()


@pytest.mark.parametrize("cut", [[[0], [1, 2, 3, 4, 5]], [[5, 1], [3, 0, 2], [4]]], ids=len)
def test_a_term_compares_no_rows(term, cut):
    """Each micro-batch, trimmed, gives its rows the term that the whole batch gives them."""
    new, batch = problem()
    whole = term(new, batch)
    for rows in cut:
        micro = batch[rows].trim()
        got = term(rows_of(new, rows, micro.mask.shape[1]), micro)
        torch.testing.assert_close(got[micro.mask], whole[rows][batch.mask[rows]], atol=1e-12, rtol=0)


def test_a_term_is_zero_where_the_policies_are_equal(term):
    """The value exactly; and no noise: ∂term/∂log pi = 0 there, sample by sample."""
    new, batch = equal_policies()
    assert term(new, batch)[batch.mask].eq(0).all()
    g = term_gradient(term, new, batch)[0]
    if g.abs().max() > 1e-12:
        report(f"noise: where the policies are equal its gradient is not 0, but up to {float(g.abs().max()):.3g}", term)


# Selectors
def selection(seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A batch with covariances of every size, and uniforms."""
    _, batch = problem(seed)
    batch.advantages = 3 * batch.advantages
    return batch, torch.rand(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_a_selector_picks_sampled_tokens_at_least_one(selector, seed):
    batch, uniforms = selection(seed)
    selected = selector(batch, uniforms)
    assert selected.shape == batch.mask.shape
    assert selected.dtype == torch.bool
    assert not (selected & ~batch.mask).any()
    assert selected.any()
    batch.selected = selected  # the shape that Batch accepts


def test_the_options_of_a_selector_are_keywords(selector):
    options_are_keywords(selector, 2)


def test_a_selector_writes_to_nothing_it_is_given(selector):
    batch, uniforms = selection()
    before = [x.clone() for x in (*contents(batch), uniforms)]
    selector(batch, uniforms)
    for was, x in zip(before, (*contents(batch), uniforms), strict=True):
        assert torch.equal(was, x)


def test_a_selector_sees_neither_padding_nor_the_order_of_rows(selector):
    """Four more columns, other numbers behind the mask, NaN among the uniforms there; and the rows the other way."""
    batch, uniforms = selection()
    expected = selector(batch, uniforms)
    _, other = widened(problem()[0], batch)
    junk = torch.nn.functional.pad(uniforms, (0, 4)).masked_fill(~other.mask, float("nan"))
    assert torch.equal(selector(other, junk)[:, :T], expected)
    assert not selector(other, junk)[:, T:].any()
    rows = list(range(B))[::-1]
    assert torch.equal(selector(batch[rows], uniforms[rows]), expected[rows])


# Tasks
GARBAGE = (
    "", " ", "\n\n", "0", "-", "nan", "inf", "1e999", "1/0", "None", "{}", '{"answer": ', "\\boxed{", "</think>",
    "####", "π ≈ 3,14 · 10⁻² ½ ٣ 四", "\u202e\u200b\x00\ufffd", "💥" * 50)
LONG = ("9", "a", " ", "(", "1+", "\\boxed{", "<think>", "1,", "0.", "\n", "ab ", "{[", "-")  # repeated
SLOW = 3.0  # seconds: what runs away takes minutes, and a loaded machine is no bug


@contextlib.contextmanager
def within(seconds: float, what: str):
    """AssertionError if it takes longer; where the system has timers, in the midst of a runaway search too."""
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


def some(made) -> list[Example]:
    """Up to five examples from all over a task."""
    return [made[i] for i in sorted({round(k * (len(made) - 1) / 4) for k in range(5)})]


def total(score: float | dict[str, float]) -> float:
    return sum(score.values()) if isinstance(score, dict) else score


def check_score(score) -> None:
    named = score if isinstance(score, dict) else {"score": score}
    assert named, "a dict of parts must have one"
    for name, x in named.items():
        assert isinstance(name, str)
        assert isinstance(x, int | float), f"{name} is {x!r}, not a number"
        assert math.isfinite(x), f"{name} is {x!r}"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_task_is_a_list_of_examples(task, split):
    """Each a prompt that is not empty, the same whenever it is asked for."""
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
    made = [task(split) for split in ("train", "heldout")]
    train, heldout = ({json.dumps(m[i].prompt, sort_keys=True) for i in range(len(m))} for m in made)
    assert not train & heldout


def test_a_score_is_a_finite_number_whatever_the_reply(task):
    """Or a dict of them; a policy can write anything, and one exception would end the run."""
    made = task("train")
    for example in some(made):
        for reply in (*GARBAGE, example.answer, example.answer[:-1], f"{example.answer} or {example.answer}\n"):
            with within(SLOW, f"the score of {reply[:20]!r}"):
                check_score(made.score(example, reply))


@pytest.mark.parametrize("piece", LONG)
def test_a_score_takes_no_time_however_long_the_reply(task, piece):
    """10 000 characters, in seconds: no regular expression that runs away, no int() of ten thousand digits."""
    made = task("train")
    example = made[0]
    made.score(example, piece)  # what is loaded at the first call is not counted
    for reply in (piece * (10_000 // len(piece)), piece * (10_000 // len(piece)) + "!"):
        with within(SLOW, f"the score of ten thousand characters of {piece!r}"):
            check_score(made.score(example, reply))


def test_a_score_depends_on_nothing_but_the_example_and_the_reply(task):
    """The same whatever was scored before, by either split's task; and the example is left as it was."""
    made, other = task("train"), task("heldout")
    cases = [(e, reply) for e in some(made) for reply in (e.answer, "", "7", "💥")]
    before = copy.deepcopy([e for e, _ in cases])
    first = [copy.deepcopy(made.score(*case)) for case in cases]
    assert [made.score(*case) for case in cases[::-1]] == first[::-1]
    assert [other.score(*case) for case in cases] == first
    assert before == [e for e, _ in cases]


def test_the_right_answer_scores_one_and_an_empty_reply_less(task):
    """heldout/accuracy counts a reply as right from a score of 1. A task that wants more than the bare answer shows a
    whole right reply in info["solution"]."""
    made = task("train")
    for example in some(made):
        if example.answer:
            reply = example.info.get("solution", example.answer)
            right, wrong = (total(made.score(example, reply)) for reply in (reply, ""))
            assert wrong < 1, "an empty reply is right"
            if right < 1:
                report(f"the bare answer {reply!r} scores {right}: right if the format is scored too", task,
                       DEMONSTRATIONS)


# Rewards
def judged(problems: list[Example], seed: int = 0) -> tuple[list[Example], list[str], Batch]:
    """Two groups of replies: right, nearly right, and garbage."""
    _, batch = problem(seed)
    a, b = problems[0], problems[-1]
    replies = [a.answer, f"{a.answer} ", "", "💥 not at all", b.answer, f"so it is {b.answer}"]
    return [a] * G + [b] * G, replies, batch


def scores_of(reward, examples, replies, batch) -> dict[str, torch.Tensor]:
    """The scores and their parts by name, as the loop reads them (UserError where they make no sense)."""
    scores, parts = judge(reward, examples, replies, batch)
    return {"the score": scores} | {name: torch.as_tensor(x) for name, x in parts.items()}


def test_a_reward_gives_one_finite_score_a_reply_and_parts_alike(reward, problems):
    for name, x in scores_of(reward, *judged(problems)).items():
        assert x.shape == (B,), f"{name} must be (B,)"
        assert usable(reward, name, x), f"{name} must be finite, and no reply may fail"
    examples, _, batch = judged(problems)
    for i in range(0, len(GARBAGE), B):
        replies = (*GARBAGE, *GARBAGE)[i : i + B]
        assert all(usable(reward, name, x) for name, x in scores_of(reward, examples, replies, batch).items())


def usable(reward, name: str, x: torch.Tensor) -> bool:
    """Finite, but for the NaN of a reply that a text reward says None of (judge refuses any other); none has failed."""
    text = not hasattr(reward, "func")  # a built-in one or one that takes the Batch is a partial
    return not (x.isinf() | (x.isnan() & (not text))).any() and not (name == "failed" and x.any())


def test_the_options_of_a_reward_are_keywords(reward):
    if hasattr(reward, "func"):  # that of a task is made by from_task, and takes none
        options_are_keywords(reward, 3)


@pytest.mark.parametrize("order", [[3, 4, 5, 0, 1, 2], [2, 0, 1, 4, 5, 3]], ids=["groups", "within groups"])
def test_the_scores_follow_their_rows(reward, problems, order):
    """In another order, which keeps groups together, every reply has the score that it had."""
    examples, replies, batch = judged(problems)
    expected = scores_of(reward, examples, replies, batch)
    got = scores_of(reward, [examples[i] for i in order], [replies[i] for i in order], batch[order])
    assert set(got) == set(expected)
    for name, x in got.items():
        torch.testing.assert_close(
            x, expected[name][order], equal_nan=True, msg=f"{name} depends on the order of the rows")


def test_a_reward_writes_to_nothing_it_is_given(reward, problems):
    examples, replies, batch = judged(problems)
    before = copy.deepcopy((examples, replies)), [x.clone() for x in contents(batch)]
    judge(reward, examples, replies, batch)
    assert (examples, replies) == before[0]
    for was, x in zip(before[1], contents(batch), strict=True):
        assert torch.equal(was, x)


def test_what_lies_behind_the_mask_changes_no_score(reward, problems):
    """Other ids and four more columns: a reply is as long as its mask says."""
    examples, replies, batch = judged(problems)
    _, other = widened(problem()[0], batch)
    expected = scores_of(reward, examples, replies, batch)
    for name, x in scores_of(reward, examples, replies, other).items():
        torch.testing.assert_close(x, expected[name], equal_nan=True, msg=f"{name} depends on padding")


# Where it leads: the exact expected gradient on an enumerated game, from the reference to where it ends
BETA = 0.7


def leads_to(game: Game, place: str, **parts) -> tuple[torch.Tensor, torch.Tensor]:
    """(R,) the policy that the parts converge to beside rloo, the unclipped surrogate and k1; and pi*."""
    cfg = load(["model.critic=head", "advantage=gae", "loss=ppo", "sampling.group_size=3", f"kl_ref.place={place}",
                f"kl_ref.coef={BETA}"])
    term = parts.get("kl_ref", KL["k1"])
    chosen = {"advantage": resolve({"name": "rloo"}, ADVANTAGES), "selector": None, "loss": LOSSES["surrogate"],
              "kl_ref": term, "kl_old": KL_OLD_LOSSES["k3"], "exact": place == "loss" and needs_exact_kl(term)} | parts
    expected = Expected(cfg, Algorithm(**chosen), game)
    reached = expected.probability(converge(expected, steps=600)[0]).detach()
    return reached, tilted(probabilities(game, game.table), game.scores, BETA)


def held_to_the_optimum(name: str, function, place: str, game: Game = TREE, exempt=frozenset(), **parts) -> None:
    reached, star = leads_to(game, place, **parts)
    if (far := total_variation(reached, star)) > 1e-4:
        report(f"the {name} does not lead to pi* ∝ ref · exp(score/beta): TV {far:.2g}, mean score "
               f"{float(reached @ game.scores):.6g} for {float(star @ game.scores):.6g}", function, exempt)


def test_a_loss_leads_to_the_optimum(loss):
    """With k1 in the reward, whatever its trust region: that moves no fixed point."""
    try:
        held_to_the_optimum("loss", loss, "reward", loss=loss)
    except ValueError as error:
        pytest.skip(str(error))  # it needs a selector, which an enumeration has not


def test_an_advantage_leads_to_the_optimum(advantage):
    """With k1 in the reward; if it takes none there, to a better mean score than the reference's, held by k2."""
    try:
        held_to_the_optimum("advantage", advantage, "reward", exempt=LEADS_ELSEWHERE, advantage=advantage)
    except ValueError:
        game = BANDIT._replace(scores=torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64))
        reached, _ = leads_to(game, "loss", advantage=advantage, kl_ref=KL_LOSSES["k2"])
        assert reached @ game.scores > probabilities(game, game.table) @ game.scores + 0.05


def test_an_estimator_in_the_reward_leads_to_the_optimum(estimator):
    held_to_the_optimum("estimator in the reward", estimator, "reward", BANDIT, LEADS_ELSEWHERE, kl_ref=estimator)


def test_a_term_in_the_loss_leads_to_the_optimum(term):
    """On replies of one token, where token and sequence are the same."""
    held_to_the_optimum("term in the loss", term, "loss", BANDIT, LEADS_ELSEWHERE, kl_ref=term)
