"""Where the real functions converge, against closed forms that are derived here.

Every placement of the KL, estimator and baseline that has a closed form, the wrong ones included.
Exact expected gradients in float64; nothing is sampled.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlkl.explain import verify
from rlkl.explain.optimum import binary_forward, binary_reverse, binary_threshold
from rlkl.explain.tabular import BANDIT, BINARY, TREE, bandit, game, table_of
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL_LOSSES, k1, wk3_token
from rlkl.losses import LOSSES, clip, surrogate
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.types import PolicyOutput

# One token: five responses. Two tokens: three first ones, and three after each.
REF = np.array([0.35, 0.25, 0.20, 0.15, 0.05])
R = np.array([0.0, 0.5, 1.0, -0.5, 2.0])
BETA = 0.7
ROOT = np.array([0.5, 0.3, 0.2])
LEAVES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
SCORES = np.array([[1.0, 0.0, 2.0], [0.0, 1.5, 0.0], [0.5, 0.5, 1.0]])
TIGHT = 1e-9
REVERSE = ("k2", "k3+", "wk3_token", "wk3_prefix", "k2_sequence", "exact_pi_ref", "rao_blackwell")
FORWARD = ("k3", "exact_ref_pi")
IN_LOSS = [("loss", name) for name in REVERSE + FORWARD]
CELLS = [("reward", "k1"), *IN_LOSS]
RLOO = ("advantage=rloo", "loss=surrogate")
GAE = ("advantage=gae", "critic.kind=head")
PLUGINS = '''
def swapped(new, batch):
    u = new.logprobs - batch.ref_logprobs
    return u.exp() - 1 - u
def k1(new, batch):
    return new.logprobs - batch.ref_logprobs
def absolute(new, batch):
    return (new.logprobs - batch.ref_logprobs).abs()
def absolute_paid(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).abs()
def immediate(new, batch):
    """k1 in the advantage of its own token alone."""
    return (new.logprobs - batch.old_logprobs).exp() * k1(new, batch).detach()
def to_go(new, batch):
    """k1 in the advantage of a token and of all tokens before it (FRPO)."""
    u = (k1(new, batch) * batch.mask).detach()
    return (new.logprobs - batch.old_logprobs).exp() * u.flip(1).cumsum(1).flip(1)
def k1_prefix(new, batch):
    return ((new.logprobs - batch.old_logprobs) * batch.mask).cumsum(1).exp() * k1(new, batch)
def k3_sequence(new, batch):
    u = (k1(new, batch) * batch.mask).sum(1, keepdim=True)
    return ((-u).exp() - 1 + u) * (batch.mask.long().cumsum(1) == 1)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("estimators") / "estimators.py"
    path.write_text(PLUGINS)
    return f"{path}:"


def expected(*options, on=BANDIT, beta=BETA) -> Expected:
    cfg = config.load([f"kl_ref.coef={beta}", *options])
    return Expected(cfg, resolve_algorithm(cfg), on)


def end(*options, on=BANDIT, beta=BETA) -> np.ndarray:
    """(R,) the policy that the options converge to from the reference."""
    e = expected(*options, on=on, beta=beta)
    return e.probability(converge(e)[0]).detach().numpy()


def charged(place: str, estimator: str) -> tuple[str, str]:
    return f"kl_ref.place={place}", f"kl_ref.estimator={estimator}"


def tv(p, q) -> float:
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)


# The closed forms


def tilted(ref, r, beta) -> np.ndarray:
    """Reverse KL: ref · exp(r/beta)."""
    x = ref * np.exp((r - r.max()) / beta)
    return x / x.sum()


def root(f, low: float, high: float) -> float:
    """The root of a falling f."""
    for _ in range(200):
        middle = (low + high) / 2
        if f(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def forward(ref, r, beta) -> np.ndarray:
    """Forward KL: beta · ref/(λ - r), where λ makes it sum to 1."""
    level = root(lambda x: (beta * ref / (x - r)).sum() - 1, r.max() + 1e-12, r.max() + beta)
    return beta * ref / (level - r)


def chi_squared(ref, r, beta) -> np.ndarray:
    """chi²: ref · max(0, r - λ)/beta."""
    level = root(lambda x: (ref * np.maximum(0, r - x)).sum() / beta - 1, r.min() - beta, r.max())
    return ref * np.maximum(0, r - level) / beta


def optimum(place: str, estimator: str, ref, a, beta) -> np.ndarray:
    return (forward if estimator in FORWARD else tilted)(ref, a, beta)


def kl(p, q) -> float:
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


# Advantages of the first of n rows, (M, n) scores → (M,), and their mean over all other rows


def std(x):
    return x.std(1, ddof=1)


def of_pairs(x):
    """pass@2: mean over the pairs with the first row of (passes - mean) / std of all pairs."""
    n = x.shape[1]
    passes = np.stack([np.maximum(x[:, i], x[:, j]) for i in range(n) for j in range(i + 1, n)], 1)
    spread = passes.std(1)
    centred_passes = passes[:, : n - 1].mean(1) - passes.mean(1)
    return np.where(spread > 0, centred_passes / np.where(spread > 0, spread, 1), 0)


def of_two_groups(x):
    """Two prompts of two responses: centred by prompt, then whitened together."""
    first = (x[:, 0] - x[:, 1]) / 2
    second = (x[:, 2] - x[:, 3]) / 2
    centred_rows = np.stack([first, -first, second, -second], 1)
    return first / np.sqrt(centred_rows.var(1, ddof=1) + 1e-8)


def centred(x):
    return x[:, 0] - x.mean(1)


ADVANTAGES = {
    "rloo": lambda x: x[:, 0] - x[:, 1:].mean(1),
    "dr_grpo": centred,
    "opo": centred,
    "grpo": lambda x: centred(x) / (std(x) + 1e-6),
    "maxrl": lambda x: centred(x) / np.where(x.mean(1) > 0, x.mean(1), 1),
    "best_only": lambda x: np.maximum(0, x[:, 0] - x[:, 1:].max(1)),
    "pass_at_k": of_pairs,
    "whiten": lambda x: centred(x) / np.sqrt(x.var(1, ddof=1) + 1e-8),
    "two groups": of_two_groups,
    "scale=batch": lambda x: (x[:, 0] - x[:, 1]) / 2 / (std(x) + 1e-6),
}


def mean_advantage(pi, r, advantage, n: int) -> np.ndarray:
    """(R,) E[A | response], the other n - 1 rows drawn from pi."""
    others = np.indices((len(r),) * (n - 1)).reshape(n - 1, -1).T
    weight = pi[others].prod(1)
    return np.array([weight @ advantage(np.c_[np.full(len(others), x), r[others]]) for x in r])


# 1. One token


def test_the_games_are_those_of_the_theory():
    """So that the closed forms below are about what converges."""
    joint = expected(on=TREE).probability(TREE.table).numpy()
    assert tv(joint, (ROOT[:, None] * LEAVES).ravel()) < 1e-15
    assert np.array_equal(TREE.scores.numpy(), SCORES.ravel())
    assert np.allclose(BANDIT.table.softmax(0)[:, 1].numpy(), REF, atol=1e-15)
    assert np.array_equal(BANDIT.scores.numpy(), R)


def test_the_numbers_of_the_optimum_are_those_of_the_theory():
    """pi* = ref · exp(r/beta), E[r] - beta KL = beta log Z."""
    p = end(*RLOO)
    assert p == pytest.approx([0.132614, 0.193495, 0.316207, 0.027823, 0.329862], abs=6e-7)
    assert p @ R == pytest.approx(1.058765910, abs=6e-10)
    assert kl(p, REF) == pytest.approx(0.542029763, abs=6e-10)
    assert p @ R - BETA * kl(p, REF) == pytest.approx(0.679345076, abs=6e-10)
    assert math.log((REF * np.exp(R / BETA)).sum()) == pytest.approx(0.970492966, abs=6e-10)


@pytest.mark.parametrize(
    ("estimator", "policy", "score", "divergence", "distance"),
    [
        ("k3", [0.119003, 0.112267, 0.132228, 0.041035, 0.595467], 1.3588, 1.1490, 0.2788),
        ("swapped", [0.161765, 0.294118, 0.378151, 0, 0.165966], 0.8571, 0.3630, 0.1917),
        ("wk2_token", [0, 0.346408, 0.438609, 0, 0.214983], 1.0418, 0.7710, 0.2753),
        ("k1", [0, 0, 0, 0, 1], 2.0, 2.9957, 0.6701),
    ],
)
def test_the_wrong_ones_land_on_the_numbers_of_the_theory(
    plugin, estimator, policy, score, divergence, distance
):
    """k3 → forward KL, swapped k3 → chi², k1 as a loss → no constraint, w·k2 → E[u²]/2."""
    name = plugin + estimator if estimator in ("swapped", "k1") else estimator
    p = end(*RLOO, *charged("loss", name))
    assert p == pytest.approx(policy, abs=1e-4 if estimator == "wk2_token" else 6e-7)
    assert [p @ R, kl(p, REF), tv(p, tilted(REF, R, BETA))] == pytest.approx(
        [score, divergence, distance], abs=6e-5
    )


@pytest.mark.parametrize(
    ("estimator", "form"),
    [
        ("swapped", chi_squared),
        ("k1", lambda *_: np.eye(5)[4]),
        ("to_go", tilted),
        ("immediate", tilted),
        ("k1_prefix", tilted),
        ("k3_sequence", forward),
    ],
)
def test_an_estimator_from_a_file_lands_where_its_gradient_says(plugin, estimator, form):
    """E[∇f(u)] = ∇ Σ ref F(pi/ref), F'(x) = f'(log x): swapped k3 is chi²/2; k1 has no gradient."""
    p = end(*RLOO, *charged("loss", plugin + estimator))
    assert tv(p, form(REF, R, BETA)) < TIGHT
    assert (p[3] < 1e-12) == (estimator in ("swapped", "k1"))


def test_the_absolute_value_in_the_loss_is_twice_the_total_variation_and_chatters(plugin):
    """Mass pays 2 beta = 1.4 to move: responses within 1.4 of the best stay at ref.

    The gradient jumps there, so no step size comes to rest.
    """
    e = expected(*RLOO, *charged("loss", plugin + "absolute"))
    table = e.game.table.clone()
    for rate in [1.0] * 250 + [0.05] * 100 + [0.002] * 100:
        direction, left = e.ascent(table)
        table = table + rate * direction
    assert tv(e.probability(table).detach(), [0, 0, 0.2, 0, 0.8]) < 2e-3
    assert left > 0.01


def test_without_a_kl_the_best_response_takes_all():
    assert tv(end(*RLOO, beta=0), np.eye(5)[4]) < TIGHT


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_each_placement_estimator_baseline_and_group_size_lands_on_its_closed_form(cell, size):
    """In the reward pi*, whatever the scale. In the loss rloo keeps beta.

    A mean that includes the response makes it beta·G/(G-1), and a std gives ref · exp(A/beta), A(a)
    the mean advantage under that policy itself.
    """
    for advantage in ("rloo", "dr_grpo", "grpo"):
        options = (f"advantage={advantage}", f"sampling.group_size={size}")
        p = end("loss=surrogate", *options, *charged(*cell))
        a = {"rloo": R, "dr_grpo": R * (size - 1) / size}.get(advantage)
        if cell[0] == "reward":
            a = R
        elif a is None:
            a = mean_advantage(p, R, ADVANTAGES[advantage], size)
        assert tv(p, optimum(*cell, REF, a, BETA)) < TIGHT, advantage
        if cell[0] == "loss" and advantage != "rloo":
            assert tv(p, optimum(*cell, REF, R, BETA)) > 0.02, advantage


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo"])
def test_the_mean_advantage_is_linear_in_the_score(advantage, size):
    """E[A given a] = r - E r, times (G-1)/G if the mean includes the response."""
    slope = 1 if advantage == "rloo" else (size - 1) / size
    mean = mean_advantage(REF, R, ADVANTAGES[advantage], size)
    assert mean == pytest.approx(slope * (R - REF @ R), abs=1e-12)


@pytest.mark.parametrize("cell", [("loss", "k2"), ("loss", "k3")], ids=" ".join)
@pytest.mark.parametrize(
    ("options", "rule", "rows"),
    [
        (("advantage=opo", "sampling.group_size=4"), "opo", 4),
        (("advantage=best_only", "sampling.group_size=2"), "best_only", 2),
        (("advantage=best_only", "sampling.group_size=4"), "best_only", 4),
        (("advantage=reinforce_pp", "sampling.group_size=2"), "whiten", 3),
        (("advantage=reinforce_pp", "sampling.group_size=1"), "whiten", 3),
        (("advantage=reinforce_pp_baseline", "sampling.group_size=2"), "two groups", 4),
        (("advantage=grpo", "advantage.scale=batch", "sampling.group_size=2"), "scale=batch", 4),
        ((*GAE, "sampling.group_size=2"), "whiten", 3),
        ((*GAE, "advantage.whiten=false"), None, 1),
        (("advantage=remax", "sampling.baseline=greedy"), None, 1),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_any_other_baseline_beside_a_kl_in_the_loss_leads_to_ref_tilted_by_its_mean_advantage(
    cell, options, rule, rows
):
    """A std over the batch follows the same law.

    A baseline that does not see the response, a critic's or a greedy one, keeps r.
    """
    p = end("loss=surrogate", *options, *charged(*cell))
    a = R if rule is None else mean_advantage(p, R, ADVANTAGES[rule], rows)
    assert tv(p, optimum(*cell, REF, a, BETA)) < TIGHT


@pytest.mark.parametrize("cell", [("loss", "k2"), ("loss", "k3")], ids=" ".join)
@pytest.mark.parametrize("advantage", ["maxrl", "pass_at_k", "best_only", "grpo"])
def test_with_right_and_wrong_responses_it_is_the_same_law(advantage, cell):
    """The fixed point is ref tilted by E[A | response], groups enumerated."""
    for size in (3, 6):
        options = (f"advantage={advantage}", f"sampling.group_size={size}")
        p = end("loss=surrogate", *options, *charged(*cell), on=BINARY)
        a = mean_advantage(p, BINARY.scores.numpy(), ADVANTAGES[advantage], size)
        assert tv(p, optimum(*cell, REF, a, BETA)) < TIGHT, size
        assert tv(p, REF) > 0.008, size


@pytest.mark.parametrize(
    "options",
    [
        ("advantage=opo",),
        ("advantage=grpo", "advantage.scale=batch", "sampling.group_size=2"),
        ("advantage=reinforce_pp", "sampling.group_size=2"),
        ("advantage=reinforce_pp_baseline", "sampling.group_size=2"),
        ("advantage=remax", "sampling.baseline=greedy"),
        GAE,
        (*GAE, "advantage.whiten=false"),
    ],
    ids=" ".join,
)
def test_with_k1_in_the_reward_every_baseline_leads_to_the_optimum(options):
    """There all responses have the same reward, and no shift or scale moves a zero."""
    assert tv(end("loss=surrogate", *options), tilted(REF, R, BETA)) < TIGHT


@pytest.mark.parametrize(
    ("cell", "on"),
    [(("reward", "k1"), BANDIT), (("reward", "k1"), TREE), (("loss", "k2_sequence"), TREE)],
    ids=["reward k1, one token", "reward k1, two", "loss k2_sequence, two"],
)
def test_a_trust_region_moves_no_fixed_point(cell, on):
    """T4: at pi = pi_old every loss has the gradient of REINFORCE, with a factor of 1.

    The losses with a selector leave tokens out.
    """
    ref = REF if on is BANDIT else (ROOT[:, None] * LEAVES).ravel()
    for loss in sorted(set(LOSSES) - {"top_entropy", "clip_cov", "kl_cov"}):
        options = ("advantage=rloo", f"loss={loss}", "sampling.group_size=2")
        p = end(*options, *charged(*cell), on=on)
        assert tv(p, tilted(ref, on.scores.numpy(), BETA)) < TIGHT, loss


@pytest.mark.parametrize(("advantage", "slope"), [("rloo", 1.0), ("dr_grpo", 0.5)])
@pytest.mark.parametrize("cell", [("reward", "k1"), ("loss", "k2")], ids=" ".join)
def test_an_entropy_bonus_flattens_what_the_kl_leaves(cell, advantage, slope):
    """(ref^beta · e^r)^(1/(beta + c)); the slope multiplies what passes through the advantage."""
    p = end(
        f"advantage={advantage}",
        "loss=surrogate",
        "entropy.coef=0.3",
        "sampling.group_size=2",
        *charged(*cell),
    )
    b = BETA * slope if cell[0] == "reward" else BETA
    assert tv(p, tilted(np.ones(5), slope * R + b * np.log(REF), b + 0.3)) < TIGHT


def test_three_resets_of_the_reference_are_one_run_at_a_third_of_beta():
    """ref ← pi at each round is a slow trust region, and no anchor."""
    on = BANDIT
    for _ in range(3):
        p = end(*RLOO, on=on)
        on = on._replace(table=table_of(on, torch.from_numpy(p)))
    assert tv(p, tilted(REF, R, BETA / 3)) < TIGHT


# 2. From ref, where there is more than one fixed point


@pytest.mark.parametrize(
    ("cell", "policy"),
    [
        (("reward", "k2"), [0, 0, 0.618335, 0, 0.381665]),
        (("loss", "wk2_token"), [0, 0.346408, 0.438609, 0, 0.214983]),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_from_the_reference_the_traps_run_away_as_the_theory_says(cell, policy):
    """k2 in the reward lacks the factor u; w·k2 in the loss is E[u²]/2: what is below ref dies."""
    assert end(*RLOO, *charged(*cell)) == pytest.approx(policy, abs=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3", "absolute_paid"])
def test_all_but_k1_in_the_reward_ends_far_from_the_optimum(plugin, estimator):
    """The missing gradient through the samples would constrain it: responses below ref are lost."""
    name = estimator if estimator in ("k2", "k3") else plugin + estimator
    p = end(*RLOO, *charged("reward", name))
    assert tv(p, tilted(REF, R, BETA)) > 0.3
    assert p[[0, 1, 3]].max() < 1e-6


# 3. Two tokens


def by_token(form, beta=0.5) -> np.ndarray:
    """(9,) each state by itself: the root is tilted by the mean score to come, not soft values."""
    leaves = np.stack([form(ref, r, beta) for ref, r in zip(LEAVES, SCORES, strict=True)])
    return (form(ROOT, (leaves * SCORES).sum(1), beta)[:, None] * leaves).ravel()


JOINT = (ROOT[:, None] * LEAVES).ravel()
FUTURE = ("to_go", "k1_prefix")  # plug-ins
WHOLE = tilted(JOINT, SCORES.ravel(), 0.5)


def worth(p) -> float:
    return float(p @ SCORES.ravel() - 0.5 * kl(p, JOINT))


@pytest.mark.parametrize(
    "cell",
    [
        ("reward", "k1"),
        ("loss", "wk3_prefix"),
        ("loss", "k2_sequence"),
        ("loss", "rao_blackwell"),
        *(("loss", name) for name in FUTURE),
    ],
    ids=" ".join,
)
def test_these_have_the_kl_of_the_whole_response_and_its_optimum(plugin, cell):
    """J* = beta log Z; a token is charged for the KL of all later tokens."""
    place, name = cell
    estimator = plugin + name if name in FUTURE else name
    p = end(*RLOO, *charged(place, estimator), on=TREE, beta=0.5)
    assert tv(p, WHOLE) < TIGHT
    assert worth(p) == pytest.approx(1.128293358, abs=6e-10)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_a_converged_critic_changes_nothing_of_it(lam):
    """With exact values every λ has the same expected advantage."""
    p = end(*GAE, "advantage.whiten=false", f"advantage.lam={lam}", on=TREE, beta=0.5)
    assert tv(p, WHOLE) < TIGHT


@pytest.mark.parametrize("estimator", ["k2", "k3+", "wk3_token", "exact_pi_ref", "immediate"])
def test_a_kl_at_each_token_does_not_charge_for_what_it_leads_into(plugin, estimator):
    """The leaves are right, the root is ref · exp(E[r | a]/beta).

    So it is with k1 in the advantage of its own token alone.
    """
    name = plugin + estimator if estimator == "immediate" else estimator
    p = end(*RLOO, *charged("loss", name), on=TREE, beta=0.5)
    assert tv(p, by_token(tilted)) < TIGHT
    assert p.reshape(3, 3).sum(1) == pytest.approx([0.606938, 0.311976, 0.081086], abs=1e-6)
    assert worth(p) == pytest.approx(1.119277, abs=6e-7)
    assert tv(p, WHOLE) == pytest.approx(0.0733, abs=6e-5)


@pytest.mark.parametrize("estimator", FORWARD)
def test_k3_at_each_token_is_forward_state_by_state(estimator):
    p = end(*RLOO, *charged("loss", estimator), on=TREE, beta=0.5)
    assert tv(p, by_token(forward)) < TIGHT
    assert tv(p, WHOLE) == pytest.approx(0.200, abs=6e-4)


def test_k3_of_the_whole_response_is_forward_for_it(plugin):
    p = end(*RLOO, *charged("loss", plugin + "k3_sequence"), on=TREE, beta=0.5)
    assert tv(p, forward(JOINT, SCORES.ravel(), 0.5)) < TIGHT
    assert tv(p, WHOLE) == pytest.approx(0.314, abs=6e-4)


# 4. Right or wrong: std-normalised advantages


@pytest.mark.parametrize(
    ("p_ref", "threshold"),
    [
        (0.01, 0.400742),
        (0.05, 0.571194),
        (0.1, 0.697006),
        (0.2, 0.895701),
        (0.3, 1.081878),
        (0.5, 1.508880),
        (0.7, 2.184934),
        (0.9, 4.136987),
        (0.99, 13.5417),
    ],
)
def test_below_a_threshold_of_beta_the_right_kl_cannot_hold_the_policy(p_ref, threshold):
    """2 asinh(beta) - logit p_ref = (2/beta) sqrt(1 + beta²); 1 over the Laplace limit for 1/2."""
    beta_c = binary_threshold(p_ref)
    assert beta_c == pytest.approx(threshold, abs=6e-5 if p_ref == 0.99 else 6e-7)
    assert binary_reverse(p_ref, 0.999 * beta_c) == 1
    assert p_ref < binary_reverse(p_ref, 1.001 * beta_c) < 1


def test_the_threshold_of_a_fair_reference_is_that_of_the_theory():
    beta_c = binary_threshold(0.5)
    assert beta_c == pytest.approx(1.508879561538, abs=6e-13)
    assert beta_c == pytest.approx(1 / 0.662743419349, abs=3e-12)
    assert binary_reverse(0.5, beta_c * (1 + 1e-13)) == pytest.approx(0.916778, abs=6e-7)


@pytest.mark.parametrize(
    ("p_ref", "beta", "reverse", "forward_end"),
    [
        (0.5, 1.6, 0.855232049, 0.764999470),
        (0.5, 1.0, 1, 0.853553391),
        (0.5, 0.04, 1, 0.999600479),
        (0.1, 1.0, 0.453051419, 0.591547595),
    ],
)
def test_the_closed_forms_for_right_and_wrong_have_the_numbers_of_the_theory(
    p_ref, beta, reverse, forward_end
):
    """l - l_ref = (2/beta) cosh(l/2) for the reverse KL, p - p_ref = sqrt(p (1-p))/beta for k3."""
    p, q = binary_reverse(p_ref, beta), binary_forward(p_ref, beta)
    assert [p, q] == pytest.approx([reverse, forward_end], abs=6e-10)
    assert q - p_ref == pytest.approx(math.sqrt(q * (1 - q)) / beta, abs=1e-12)
    if p < 1:
        log_odds, log_odds_ref = (math.log(x / (1 - x)) for x in (p, p_ref))
        assert log_odds - log_odds_ref == pytest.approx(
            2 / beta * math.cosh(log_odds / 2), abs=1e-9
        )


def drive(p: float, size: int, advantage) -> np.ndarray:
    """(2,) E[A | wrong], E[A | right] in groups of G: a binomial number of others is right."""
    k = np.arange(size)
    chance = np.array([math.comb(size - 1, i) * p**i * (1 - p) ** (size - 1 - i) for i in k])
    groups = (np.arange(size - 1)[None] < k[:, None]).astype(float)
    return np.array([chance @ advantage(np.c_[np.full(size, x), groups]) for x in (0.0, 1.0)])


def coin(advantage: str, estimator: str, beta: float, size: int) -> float:
    """P(right) where the real functions converge; checks its closed form at this group size too."""
    half = np.array([0.5, 0.5])
    on = bandit((0.0, 1.0), (0.5, 0.5))
    e = expected(
        f"advantage={advantage}",
        "loss=surrogate",
        f"sampling.group_size={size}",
        *charged("loss", estimator),
        on=on,
        beta=beta,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "MAX_ROWS", 20_000)  # rows: all of G = 128
        p = e.probability(converge(e)[0]).detach().numpy()
    assert e.rollouts[2] == size
    closed = optimum("loss", estimator, half, drive(p[1], size, ADVANTAGES[advantage]), beta)
    assert tv(p, closed) < TIGHT
    return p[1]


@pytest.mark.parametrize(
    ("estimator", "beta", "limit"),
    [
        ("k2", 1.6, 0.855232049),
        ("wk3_token", 1.6, 0.855232049),
        ("k2", 1.0, 1.0),
        ("k3", 1.6, 0.764999470),
        ("k3", 1.0, 0.853553391),
    ],
)
def test_large_groups_tend_to_the_closed_form_of_infinite_ones(estimator, beta, limit):
    """The reverse KL below its threshold tends to 1; k3 has a fixed point at any beta."""
    gaps = [limit - coin("grpo", estimator, beta, size) for size in (8, 32, 128)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0
    assert gaps[2] < 0.012


def test_dividing_by_the_mean_has_a_fixed_point_at_any_beta():
    """l - l_ref = (1 - (1-p)^(G-1)) / (beta p): 0.782188294 at beta 1 for infinite groups."""
    for size in (2, 8, 32):
        p = coin("maxrl", "k2", 1.0, size)
        assert math.log(p / (1 - p)) == pytest.approx((1 - (1 - p) ** (size - 1)) / p, abs=1e-9)
    assert p == pytest.approx(0.782188294, abs=6e-10)


def test_across_the_threshold_the_policy_is_held_or_lost():
    """One tenth above it and one tenth below it, for groups of 128; k3 has no threshold."""
    beta_c = binary_threshold(0.5)
    assert 1 - coin("grpo", "k2", 1.1 * beta_c, 128) > 0.1
    assert 1 - coin("grpo", "k2", 0.9 * beta_c, 128) < 0.01
    above = 1 - coin("grpo", "k3", 1.1 * beta_c, 128)
    below = 1 - coin("grpo", "k3", 0.9 * beta_c, 128)
    assert above / below < 1.5


# 5. Explicit and implicit


LOG_REF = torch.from_numpy(np.log(REF))


def slope(table, old, kind: str, loss=surrogate, prox: float = 0.0) -> torch.Tensor:
    """(5,) gradient at `table` of the loss + prox · KL(pi || old), expected on samples of old."""
    leaf = table.clone().requires_grad_()
    batch = BANDIT.batch
    batch.old_logprobs = old[:, None]
    batch.ref_logprobs = LOG_REF[:, None]
    rewards = BANDIT.scores[:, None]
    if kind == "k1 in the reward":
        rewards = rewards - BETA * k1(batch.old_logprobs, batch.ref_logprobs)
    batch.advantages = rewards - old.exp() @ rewards
    new = PolicyOutput(leaf.log_softmax(0)[:, None], torch.zeros_like(rewards))
    per_token = loss(new, batch)[0]
    if kind in KL_LOSSES:
        per_token = per_token + BETA * KL_LOSSES[kind](new, batch)
    batch.ref_logprobs = batch.old_logprobs
    per_token = per_token + prox * wk3_token(new, batch)
    return torch.autograd.grad((old.exp()[:, None] * per_token).sum(), leaf)[0]


@pytest.mark.parametrize("b", [0.34, 0.36, 0.7, 3.0])
@pytest.mark.parametrize("kind", ["k1 in the reward", "wk3_token"])
def test_the_kl_in_the_reward_is_explicit_and_the_kl_in_the_loss_implicit(kind, b):
    """T1, T2. Each rollout is solved exactly with b · KL(pi || pi_old).

    Where the KL is frozen in the reward, the distance to pi* in log-probs is multiplied by
    1 - beta/b, and grows for b < beta/2; where it is live in the loss, by b/(b + beta).
    """
    if kind == "k1 in the reward":
        factor, rate = 1 - BETA / b, 1 / b
    else:
        factor, rate = b / (b + BETA), 1 / (b + BETA)
    star = torch.from_numpy(np.log(tilted(REF, R, BETA)))
    old = LOG_REF
    for k in range(60):
        table = (old - rate * slope(old, old, kind) / old.exp()).log_softmax(0)
        if k < 3:  # it is the solution
            assert slope(table, old, kind, prox=b).abs().max() < 1e-12
            before, after = (x - star - (x - star).mean() for x in (old, table))
            assert (after - factor * before).abs().max() < TIGHT
        old = table
    distance = tv(old.exp(), star.exp())
    if abs(factor) > 1:
        assert factor == pytest.approx(-1.059, abs=6e-4)
        assert distance == pytest.approx(0.97, abs=6e-3)
    else:
        assert distance < max(TIGHT, abs(factor) ** 60)


def test_a_trust_region_alone_only_sets_the_speed_of_the_drift():
    """T3. Without a KL to the reference log pi_k = log ref + k · r / b: nothing ever stops it."""
    b, old, divergence = 3.0, LOG_REF, {}
    for k in range(1, 401):
        table = (old - slope(old, old, "none") / old.exp() / b).log_softmax(0)
        if k <= 5:
            assert slope(table, old, "none", prox=b).abs().max() < 1e-12
            assert tv(table.exp(), (LOG_REF + k * BANDIT.scores / b).softmax(0)) < TIGHT
        old = table
        divergence[k] = float(old.exp() @ (old - LOG_REF))
    assert [divergence[k] for k in (1, 5, 20, 400)] == pytest.approx(
        [0.023, 0.750, 2.954, 2.9957], abs=6e-4
    )
    assert divergence[400] == pytest.approx(-np.log(REF[R.argmax()]), abs=1e-9)


def outer(table, kind: str, steps: int, loss=surrogate) -> torch.Tensor:
    """One rollout and `steps` updates on it, plain descent at rate 1."""
    old = table.log_softmax(0)
    for _ in range(steps):
        table = table - slope(table, old, kind, loss)
    return table - table.mean()


def radius(kind: str, steps: int, at) -> float:
    """Spectral radius of `outer` at its fixed point, by central differences."""
    table, columns = torch.from_numpy(np.log(at)), []
    for d in 1e-5 * (torch.eye(5, dtype=torch.float64) - 0.2):
        columns.append((outer(table + d, kind, steps) - outer(table - d, kind, steps)) / 2e-5)
    return float(np.abs(np.linalg.eigvals(torch.stack(columns, 1).numpy())).max())


@pytest.mark.parametrize(
    ("kind", "radii"),
    [
        ("k1 in the reward", {1: 0.976, 4: 0.906, 8: 0.812, 9: 1.035, 16: 2.62}),
        ("k2", {1: 0.976, 4: 0.914, 7: 0.889, 8: 1.233, 9: 1.599}),
        ("wk3_token", {1: 0.976, 4: 0.909, 8: 0.826, 9: 0.807, 64: 0.218}),
        ("k3", {1: 0.885, 4: 0.657, 8: 0.515, 9: 0.495, 64: 0.419}),
    ],
)
def test_several_updates_a_rollout_are_stable_or_not_as_the_theory_says(kind, radii):
    """k1 in the reward up to 8, k2 without a ratio up to 7, w·k3 and k3 for any number of them."""
    at = (forward if kind == "k3" else tilted)(REF, R, BETA)
    measured = {steps: radius(kind, steps, at) for steps in radii}
    assert measured == pytest.approx(radii, abs=6e-3 if 16 in radii else 6e-4)
    for steps, x in measured.items():
        assert (x > 1) == (radii[steps] > 1)


def test_a_clip_holds_what_is_unstable_without_it():
    """16 updates per rollout: k1 in the reward cycles, much less with a clip; w·k3 converges."""
    star = tilted(REF, R, BETA)

    def circle(kind, loss):
        table, distances = LOG_REF, []
        for _ in range(80):
            table = outer(table, kind, 16, loss)
            distances.append(tv(table.softmax(0), star))
        return max(distances[-30:])

    assert circle("k1 in the reward", surrogate) > 0.4
    assert 0.03 < circle("k1 in the reward", clip) < 0.12
    assert circle("wk3_token", clip) < TIGHT


# 6. Length


@pytest.mark.parametrize(
    ("scores", "constant", "sequence"),
    [((0.0, 1.0), 0.880797, 0.899651), ((1.0, 0.0), 0.119203, 0.146864), ((1.0, 1.0), 0.5, 0.5)],
)
def test_dividing_by_the_length_moves_the_fixed_point_where_lengths_differ(
    scores, constant, sequence
):
    """Each of two tokens gets half the gradient of a single one, and the first half the KL."""
    on = game(
        "one token or two",
        {(): {0: 0.5, 1: 0.5}, (1,): {2: 1.0}},
        {(0,): scores[0], (1, 2): scores[1]},
    )

    def net_gradient(p: float, weight: float) -> float:
        mean = (1 - p) * scores[0] + p * scores[1]
        long, short = (
            r - mean - 0.5 * math.log(x / 0.5)
            for r, x in zip(scores[::-1], (p, 1 - p), strict=True)
        )
        return weight * long - short

    for weights, weight, number in (
        ("constant", 1, constant),
        ("token", 1, constant),
        ("sequence", 0.5, sequence),
    ):
        p = end(*RLOO, f"optim.weights={weights}", *charged("loss", "k2"), on=on, beta=0.5)[1]
        assert p == pytest.approx(number, abs=6e-7)
        assert p == pytest.approx(
            root(lambda x, w=weight: net_gradient(x, w), 1e-12, 1 - 1e-12), abs=TIGHT
        )


@pytest.mark.parametrize("cell", [("reward", "k1"), ("loss", "k2"), ("loss", "k3")], ids=" ".join)
@pytest.mark.parametrize("unit", [0.1, 10.0])
def test_scores_and_beta_in_another_unit_lead_to_the_same_policy(unit, cell):
    """Only score/beta counts, where the advantage has the unit of the score."""
    plain = end(*RLOO, *charged(*cell))
    scaled = BANDIT._replace(scores=unit * BANDIT.scores)
    assert tv(end(*RLOO, *charged(*cell), on=scaled, beta=unit * BETA), plain) < TIGHT
    assert tv(end(*RLOO, *charged(*cell), on=scaled), plain) > 0.05
