"""Our losses against frozen numbers of verl (August 2026), in float64: docs/oracles.md.

Where we differ on purpose the test says why, and asserts what both sides give.
"""

import torch
from golden.reading import (
    EPS_1E_8,
    EXACT,
    INPUTS,
    Inputs,
    compared,
    each_input,
    gradient,
    policy_output,
    tensor,
    verl_cases,
)

from rlkl.kl import KL, KL_OLD_LOSSES
from rlkl.losses import (
    LOSSES,
    SELECTORS,
    accepted,
    clip,
    clipped_tokens,
    importance_ratio,
    reinforce,
    token_weights,
    truncated_importance_weights,
    value_loss,
)
from rlkl.types import Batch, PolicyOutput

AGGREGATIONS = {
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum-norm": "constant",
}


def tolerance_of(agg: str) -> dict:
    return EPS_1E_8 if agg == "seq-mean-token-mean" else EXACT


def weights(mask: torch.Tensor, agg: str) -> torch.Tensor:
    """(B, T) our weights for verl's aggregation.

    verl's norm is the width of the padded batch; its seq-mean-token-sum has no norm, which is
    constant with L = 1.
    """
    length = 1 if agg == "seq-mean-token-sum" else mask.shape[1]
    return token_weights(mask, AGGREGATIONS.get(agg, "constant"), length)


def reduced(loss: torch.Tensor, mask: torch.Tensor, agg: str) -> torch.Tensor:
    return (weights(mask, agg) * loss)[mask].sum()


def value_and_gradient(
    same, case: dict, loss: torch.Tensor, new: PolicyOutput, mask: torch.Tensor
) -> None:
    agg = case["agg"]
    total = reduced(loss, mask, agg)
    same("value", total, case["value"], tolerance_of(agg))
    same("gradient", gradient(total, new.logprobs), case["grad"], tolerance_of(agg))


def policy_case(case: dict) -> tuple[Inputs, torch.Tensor, PolicyOutput]:
    """Inputs, advantages and the policy's output.

    Rollout importance weights are folded into A: our policy losses are positively homogeneous in A.
    """
    inputs = INPUTS[case["input"]]
    advantages = inputs[case["advantages"]]
    if case["is_weights"]:
        advantages = advantages * inputs["rollout_is_weights"]
    return inputs, advantages, policy_output(inputs["log_prob"])


# ------------------------------------------------------------------ policy losses


OURS = {
    "vanilla": "clip",
    "gspo": "gspo",
    "sapo": "sapo",
    "gpg": "reinforce",
    "geo_mean": "gmpo",
    "cispo": "cispo",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
}
OPTIONS = {
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "clip_ratio_c": "delta",
    "tau_pos": "tau",
    "tau_neg": "tau_negative",
}
HAVE_CLIP_FRACTION = ("vanilla", "gspo", "dppo_tv", "dppo_kl")


def raises_small_ratios(case: dict) -> bool:
    """CISPO with verl's lower clip, which ours has not."""
    return case["loss"] == "cispo" and case["config"].get("clip_ratio_low", 0.2) < 1


POLICY_CASES = {
    name: case
    for name, case in verl_cases("policy_loss", *OURS).items()
    if not raises_small_ratios(case)
}
CISPO_WITH_LOWER_CLIP = {
    name: case
    for name, case in verl_cases("policy_loss", "cispo").items()
    if raises_small_ratios(case)
}


def has_clip_fraction(case: dict) -> bool:
    return "metrics" in case and case["loss"] in HAVE_CLIP_FRACTION


def policy_quantities(case: dict) -> list[str]:
    return ["value", "gradient"] + ["clip fraction"] * has_clip_fraction(case)


@compared("verl", "policy losses", POLICY_CASES, policy_quantities)
def test_policy_losses(case, same):
    """PPO with a dual clip, GSPO, GMPO, CISPO without its lower clip, SAPO, DPPO, GPG.

    1 + clip_ratio_high of verl's CISPO is our cap. In `edge` two tokens are 25.5 and -24.5 nats
    away. verl counts tokens above the dual clip apart: the sum of both counts is ours.
    """
    name = case["loss"]
    inputs, advantages, new = policy_case(case)
    options = {OPTIONS[k]: x for k, x in case["config"].items() if k in OPTIONS}
    if name == "geo_mean" and case["is_weights"]:
        factor = geometric_mean(inputs["rollout_is_weights"], inputs.mask)
        advantages = inputs[case["advantages"]] * factor
    if name == "vanilla":
        options = {"epsilon": 0.2, "epsilon_high": 0.2, "delta": 3.0} | options
    if name == "cispo":
        options = {"cap": 1 + options["epsilon_high"]}
    if name.startswith("dppo") and "delta" in options:
        options["cap"] = options.pop("delta")
    loss, diagnostics = LOSSES[OURS[name]](new, inputs.batch(advantages), **options)
    value_and_gradient(same, case, loss, new, inputs.mask)
    if has_clip_fraction(case):
        theirs = case["metrics"]["actor/pg_clipfrac"]
        if name == "vanilla":
            theirs += case["metrics"]["actor/pg_clipfrac_lower"]
        same("clip fraction", diagnostics["clip_fraction"][inputs.mask].mean(), theirs)


def geometric_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, 1) over the tokens of each response."""
    logs = (x.log() * mask).nan_to_num()
    return (logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()


def test_importance_weights_of_gmpo():
    """verl multiplies the response by the geometric mean of its weights, and by the mean of its A.

    Where A differs from token to token, folding the weights into A gives another loss.
    """
    cases = [c for c in verl_cases("policy_loss", "geo_mean").values() if c["is_weights"]]
    assert cases
    for case in cases:
        inputs, advantages, new = policy_case(case)
        low, high = case["config"]["clip_ratio_low"], case["config"]["clip_ratio_high"]
        batch = inputs.batch(advantages)
        loss, _ = LOSSES["gmpo"](new, batch, epsilon=low, epsilon_high=high)
        ours = float(reduced(loss, inputs.mask, case["agg"]).detach())
        assert abs(ours - case["value"]) > 1e-3


@compared("verl", "policy losses", CISPO_WITH_LOWER_CLIP, ["value", "gradient", "ours"])
def test_cispo_with_a_lower_clip(case, same):
    """verl's CISPO raises a small w to 1 - clip_ratio_low, so a token that pi left pulls harder.

    Ours only caps, as ScaleRL and TRL do. verl's is reinforce with the clipped w in A; where no w
    is small both are one loss.
    """
    inputs, advantages, new = policy_case(case)
    mask, theirs = inputs.mask, tensor(case["grad"])
    ratio = importance_ratio(inputs["log_prob"], inputs["old_log_prob"])
    loss, _ = reinforce(new, inputs.batch(advantages * ratio.clamp(0.8, 1.2)))
    value_and_gradient(same, case, loss, new, mask)
    ours, _ = LOSSES["cispo"](new, inputs.batch(advantages), cap=1.2)
    small = mask & (ratio < 0.8)
    our_gradient = gradient(reduced(ours, mask, case["agg"]), new.logprobs)
    same("ours", our_gradient[~small], theirs[~small], tolerance_of(case["agg"]))
    assert small.any()
    assert (our_gradient[small].abs() < theirs[small].abs()).all()


@compared("verl", "policy losses", verl_cases("policy_loss", "dro"), ["value", "gradient"])
def test_dro(case, same):
    """-A log pi + β k2 to pi_old: reinforce and kl_old.

    verl's importance weights multiply the k2 too, ours only A, as the k2 constrains the policy
    whatever the sampler was. So both terms are given the weight here.
    """
    inputs, advantages, new = policy_case(case)
    batch = inputs.batch(advantages)
    factor = inputs["rollout_is_weights"] if case["is_weights"] else 1.0
    kl = case["config"]["policy_loss"]["dro_beta"] * KL_OLD_LOSSES["k2"](new, batch)
    policy, _ = reinforce(new, batch)
    value_and_gradient(same, case, policy + factor * kl, new, inputs.mask)
    ours = float(reduced(policy + kl, inputs.mask, case["agg"]).detach())
    assert (abs(ours - case["value"]) > 1e-3) == case["is_weights"]


def selection_batch(case: dict) -> Batch:
    """What verl's covariance reads: the current log-probs and A without importance weights."""
    inputs = INPUTS[case["input"]]
    return inputs.batch(inputs[case["advantages"]], old="log_prob")


def without_a_clamp(
    same, case: dict, ours: torch.Tensor, theirs: torch.Tensor, new: PolicyOutput
) -> None:
    """Compare clip_cov and kl_cov, which in verl do not clamp log w to ±20.

    Beyond that (two tokens of `edge`) verl's own loss and gradient are asserted. Ours is e^20
    there, and its gradient is that of |log w|, or zero.
    """
    inputs, agg = INPUTS[case["input"]], case["agg"]
    mask = inputs.mask
    far = mask & ((inputs["log_prob"] - inputs["old_log_prob"]).abs() > 20)
    value_and_gradient(same, case, torch.where(far, theirs, ours), new, mask)
    our_gradient = gradient(reduced(ours, mask, agg), new.logprobs)
    same("ours", our_gradient[~far], tensor(case["grad"])[~far], tolerance_of(agg))
    assert (our_gradient[far].abs() < 2).all()
    assert far.any() == (case["input"] == "edge")


KL_COV_CASES = verl_cases("policy_loss", "kl_cov")
CLIP_COV_CASES = verl_cases("policy_loss", "clip_cov")


@compared("verl", "policy losses", KL_COV_CASES, ["value", "gradient", "ours"])
def test_kl_cov(case, same):
    """Our selector picks the tokens, given the current log-probs, as verl's covariance is of those.

    Ours is of pi_old, so that tokens are selected once a step. Importance weights multiply verl's
    |log w| too, ours only A.
    """
    inputs, advantages, new = policy_case(case)
    config, batch = case["config"]["policy_loss"], inputs.batch(advantages)
    coef, fraction = config["ppo_kl_coef"], config["kl_cov_ratio"]
    uniforms = torch.zeros(inputs.mask.shape)
    batch.selected = SELECTORS["kl_cov"](selection_batch(case), uniforms, fraction=fraction)
    ours, diagnostics = LOSSES["kl_cov"](new, batch, coef=coef)
    kl = coef * diagnostics["moved"]
    weighted, weighted_kl = ours, kl
    if case["is_weights"]:
        weighted_kl = inputs["rollout_is_weights"] * kl
        weighted = ours - kl + weighted_kl
    unclamped = weighted_kl - advantages * (new.logprobs - batch.old_logprobs).exp()
    without_a_clamp(same, case, weighted, unclamped, new)
    assert torch.equal(ours, weighted) != case["is_weights"]


@compared("verl", "policy losses", CLIP_COV_CASES, ["value", "gradient", "ours"])
def test_clip_cov(case, same):
    """All candidates are taken (clip_cov_ratio = 1), so nothing is drawn.

    verl never takes a token whose gradient is clipped already. Ours may, and drops its constant
    value: the gradient is the same.
    """
    inputs, advantages, new = policy_case(case)
    mask, batch = inputs.mask, inputs.batch(advantages)
    config = case["config"]["policy_loss"]
    bounds = {"low": config["clip_cov_lb"], "high": config["clip_cov_ub"]}
    selected, at_pi_old = (
        SELECTORS["clip_cov"](b, torch.zeros(mask.shape), fraction=1.0, **bounds)
        for b in (selection_batch(case), inputs.batch(inputs[case["advantages"]]))
    )
    # verl's covariance is of the current log-probs, ours of pi_old
    assert not torch.equal(selected, at_pi_old)
    ratio = importance_ratio(inputs["log_prob"], inputs["old_log_prob"])
    clipped = clipped_tokens(ratio, advantages, 0.2, 0.2).bool()
    batch.selected = selected
    with_clipped, _ = LOSSES["clip_cov"](new, batch)
    batch.selected = selected & ~clipped
    loss, _ = LOSSES["clip_cov"](new, batch)
    gradients = [
        gradient(reduced(x, mask, case["agg"]), new.logprobs) for x in (with_clipped, loss)
    ]
    torch.testing.assert_close(*gradients)
    w = (new.logprobs - batch.old_logprobs).exp()
    unclamped = -torch.minimum(w * advantages, w.clamp(0.8, 1.2) * advantages)
    unclamped = unclamped.masked_fill(batch.selected, 0.0)
    without_a_clamp(same, case, loss, unclamped, new)


# ------------------------------------------------------------------ value loss, aggregation


@compared("verl", "value loss", verl_cases("value_loss"), ["value", "gradient"])
def test_value_loss(case, same):
    """At ε_v = 0.05, 0.2, 0.5 and 1e9 (none), in four aggregations."""
    inputs, tolerance = INPUTS[case["input"]], tolerance_of(case["agg"])
    values = inputs["vpreds"].clone().requires_grad_()
    loss = value_loss(values, inputs["values"], inputs["returns"], case["cliprange_value"])
    total = reduced(loss, inputs.mask, case["agg"])
    same("value", total, case["value"], tolerance)
    same("gradient", gradient(total, values), case["grad"], tolerance)


@compared("verl", "aggregation", each_input("aggregation"), lambda case: list(case["theirs"]))
def test_aggregation(case, same):
    """Four aggregations, as a whole and as two micro-batches with the counts of the whole step.

    That is what verl's new engine and ours do. Its older actor takes the mean of the micro-batches'
    own values, which is another loss where responses differ in length. Two halves of our weights,
    counted half by half, reproduce it.
    """
    inputs = INPUTS[case["input"]]
    mask, loss = inputs.mask, inputs["advantages"]
    half = len(mask) // 2
    halves = slice(0, half), slice(half, None)
    assert len(case["theirs"]) == 13
    for name, theirs in case["theirs"].items():
        agg, _, way = name.partition("|")
        w = weights(mask, agg)
        exact = (w * loss)[mask].sum()
        ours = exact
        if way == "two_microbatches_sum":
            ours = sum((w[rows] * loss[rows])[mask[rows]].sum() for rows in halves)
        elif way == "naive_mean_of_microbatches":
            ours = sum(reduced(loss[rows], mask[rows], agg) for rows in halves) / 2
            differs = (agg == "token-mean") == (case["input"] == "padded")
            assert (abs(float(exact) - theirs) > 1e-3) == differs
        elif way:
            ours = (token_weights(mask, "constant", 100) * loss)[mask].sum()
        same(name, ours, theirs, tolerance_of(agg))


# ------------------------------------------------------------------ the sampler is not the trainer


CORRECTIONS = verl_cases("correction")
TRUNCATIONS = {name: case for name, case in CORRECTIONS.items() if "rollout_is" in case}
LEVELS = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "mean"}
REJECTIONS = {name: case for name, case in CORRECTIONS.items() if case.get("rollout_rs") in LEVELS}


@compared("verl", "mismatch", TRUNCATIONS, ["weights"])
def test_truncated_importance_sampling(case, same):
    """By token and by response; batch_normalize divides by the mean over tokens, or responses."""
    inputs, level = INPUTS[case["input"]], case["rollout_is"]
    mask = inputs.mask
    batch = inputs.batch(inputs["advantages"], sampler="rollout_log_prob")
    ours = truncated_importance_weights(batch, level, case["threshold"]) * mask
    if case["batch_normalize"]:
        over_tokens, over_responses = ours[mask].mean(), (ours.sum(1) / mask.sum(1)).mean()
        ours = ours / (over_tokens if level == "token" else over_responses)
    same("weights", ours, case["weights"], EPS_1E_8)


def bounds_of(threshold: str | float) -> tuple[float, float]:
    """verl's lower and upper bound; one number u stands for (1/u, u)."""
    if "_" in str(threshold):
        low, high = map(float, str(threshold).split("_"))
        return low, high
    return 1 / threshold, threshold


@compared("verl", "mismatch", REJECTIONS, ["mask", "rejected", "k1", "k3"])
def test_rejection(case, same):
    """verl's k1 is log mu - log pi_old, so its bounds are those of the inverse ratio."""
    inputs, metrics = INPUTS[case["input"]], case["metrics"]
    mask = inputs.mask
    low, high = bounds_of(case["threshold"])
    batch = inputs.batch(inputs["advantages"], sampler="rollout_log_prob")
    ours = accepted(batch, LEVELS[case["rollout_rs"]], 1 / high, 1 / low)
    rejected = 1 - ours[mask].double().mean()
    same("mask", ours, case["mask"])
    same("rejected", rejected, metrics["rollout_corr/rollout_rs_masked_fraction"])
    old, sampler = (inputs[n][mask] for n in ("old_log_prob", "rollout_log_prob"))
    same("k1", KL["k1"](sampler, old).mean(), metrics["rollout_corr/kl"])
    same("k3", KL["k3"](sampler, old).mean(), metrics["rollout_corr/k3_kl"])


def bypass_quantities(case: dict) -> list[str]:
    return ["value", "gradient"] + ["ours"] * ("rollout_rs" in case["rollout_correction"])


@compared("verl", "mismatch", verl_cases("bypass"), bypass_quantities)
def test_bypass(case, same):
    """Two policies only: pi_old is the sampler's. ppo_clip is our clip with delta.

    `reinforce` has min(w, 2) in A, by token or by response. What is rejected leaves verl's mask,
    and so its denominators: the survivors count for more. Ours multiplies weights that are fixed
    before, so rejection scales the rest by the share of tokens (or responses) that are left.
    """
    inputs, config, agg = INPUTS[case["input"]], case["rollout_correction"], case["agg"]
    new, mask = policy_output(inputs["log_prob"]), inputs.mask
    advantages, sampler = inputs["seq_advantages"], "rollout_log_prob"
    batch = inputs.batch(advantages, old=sampler, sampler=sampler)
    current = inputs.batch(advantages, old="log_prob", sampler=sampler)
    if config["loss_type"] == "ppo_clip":
        loss, _ = clip(new, batch, epsilon=0.2, delta=3.0)
    else:
        factor = truncated_importance_weights(current, config["rollout_is"], 2.0)
        batch.fill(advantages=batch.advantages * factor)
        loss, _ = reinforce(new, batch)
    trained = mask
    if config.get("rollout_rs") == "seq_mean_k1":
        low, high = bounds_of(config["rollout_rs_threshold"])
        trained = accepted(current, "mean", 1 / high, 1 / low)
    elif "rollout_rs" in config:  # by the mean of k3, which is no option of ours
        k3 = KL["k3"](inputs["rollout_log_prob"], inputs["log_prob"]) * mask
        mean = k3.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        trained = mask & (mean <= config["rollout_rs_threshold"])
    value_and_gradient(same, case, loss, new, trained)
    if "rollout_rs" in config:
        ours = gradient((weights(mask, agg) * trained * loss)[mask].sum(), new.logprobs)
        tokens, rows = trained.sum() / mask.sum(), trained.any(1).sum() / mask.any(1).sum()
        left = tokens if agg == "token-mean" else rows
        same("ours", ours, tensor(case["grad"]) * left, EPS_1E_8)
        assert left < 1
