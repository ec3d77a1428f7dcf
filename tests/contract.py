"""What a loss and an advantage must keep, yours as well as ours.

pytest tests/contract.py --loss my_loss.py:sapo --advantage my_advantage.py:mine     (either or both; options: defaults)
pytest tests/contract.py                                                             every built-in one
"""

import inspect
import warnings

import pytest
import torch

from rlkl.advantages import ADVANTAGES
from rlkl.config import resolve
from rlkl.losses import LOSSES
from rlkl.types import Batch, Evaluation

B, T, G = 6, 5, 3  # two prompts, three replies each, of 5, 1, 3, 2, 4 and 3 tokens
LENGTHS = (5, 1, 3, 2, 4, 3)
TABLES = {"loss": LOSSES, "advantage": ADVANTAGES}
STOPS_GRADIENT = {"gspo", "cispo", "dppo_tv", "dppo_kl", "topr"}  # detached: their gradient is not that of their value
NOT_REINFORCE: set[str] = set()  # built-in losses whose gradient at ratio 1 is not -A


def pytest_generate_tests(metafunc):
    """`loss` and `advantage` are what the command line names, or every entry of their table."""
    given = {kind: metafunc.config.getoption(f"--{kind}", default=None) for kind in TABLES}
    for kind, table in TABLES.items():
        if kind in metafunc.fixturenames:
            names = [given[kind]] if given[kind] else [] if any(given.values()) else list(table)
            metafunc.parametrize(kind, names, indirect=True)


@pytest.fixture
def loss(request):
    return resolve({"name": request.param}, LOSSES, "loss")


@pytest.fixture
def advantage(request):
    return resolve({"name": request.param}, ADVANTAGES, "advantage")


def report(message: str, function, exempt: set[str]) -> None:
    """A property that a sound loss may lack: one of ours is held to it, a user's is told and marked as expected."""
    name = function.func.__name__
    assert LOSSES.get(name) is not function.func or name in exempt, message
    warnings.warn(message, stacklevel=2)
    pytest.xfail(message)


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
    kls = (normal().abs() * mask, normal().abs() * mask)
    return Evaluation(*leaves, normal(1)[:, 0], *kls), batch


def rows_of(new: Evaluation, rows: list[int], columns: int = T) -> Evaluation:
    return Evaluation(*(x[rows] if x.dim() == 1 else x[rows, :columns] for x in new))


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
    kinds = [p.kind for p in inspect.signature(loss.func).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert all(k is inspect.Parameter.KEYWORD_ONLY for k in kinds[2:])


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
    more = 4
    wide = torch.nn.functional.pad(batch.mask, (0, more))

    def widen(x: torch.Tensor, junk: float) -> torch.Tensor:
        return torch.nn.functional.pad(x.detach(), (0, more)).masked_fill(~wide, junk)

    other = {n: widen(x, 7) for n, x in vars(batch).items() if torch.is_tensor(x) and x.shape == (B, T)}
    other |= {"mask": wide, "prompt_ids": batch.prompt_ids, "prompt_mask": batch.prompt_mask}
    junk = Evaluation(*(x if x.dim() == 1 else widen(x, 3.0).requires_grad_() for x in new))
    other = Batch(**other, truncated=batch.truncated, temperature=batch.temperature)
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
    parameters = list(inspect.signature(advantage.func).parameters.values())
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters[:3])
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[3:])
    assert "group_size" in {p.name for p in parameters[3:]}


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
