"""Our losses against frozen numbers of verl (August 2026), in float64: tests/golden/reading.py, docs/oracles.md.

Where we differ on purpose the test says why, and pins what both sides give.
"""

import torch
from golden.reading import (
    EPS_1E_8,
    EXACT,
    INPUTS,
    Inputs,
    compared,
    each_input,
    evaluation,
    gradient,
    tensor,
    verl_cases,
)

from rlkl.kl import KL, KL_OLD_LOSSES
from rlkl.losses import LOSSES, clipped_tokens, clipped_value_loss, importance_ratio, token_weights
from rlkl.mismatch import accepted, truncated_ratio
from rlkl.selectors import SELECTORS
from rlkl.types import Batch, Evaluation

WEIGHTS = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum-norm": "constant"}


def tolerance_of(agg: str) -> dict:
    return EPS_1E_8 if agg == "seq-mean-token-mean" else EXACT


def weights(mask: torch.Tensor, agg: str) -> torch.Tensor:
    """verl's norm is the width of the padded batch, and its seq-mean-token-sum has no norm: constant with L = 1."""
    return token_weights(mask, WEIGHTS.get(agg, "constant"), 1 if agg == "seq-mean-token-sum" else mask.shape[1])


def reduced(loss: torch.Tensor, mask: torch.Tensor, agg: str) -> torch.Tensor:
    return (weights(mask, agg) * loss)[mask].sum()


def value_and_gradient(same, c: dict, loss: torch.Tensor, new: Evaluation, mask: torch.Tensor) -> None:
    total = reduced(loss, mask, c["agg"])
    same("value", total, c["value"], tolerance_of(c["agg"]))
    same("gradient", gradient(total, new.logprobs), c["grad"], tolerance_of(c["agg"]))


def policy_case(c: dict) -> tuple[Inputs, torch.Tensor, Evaluation]:
    """Rollout importance weights are folded into A: every policy loss of ours is positively homogeneous in A."""
    inputs = INPUTS[c["input"]]
    factor = inputs["rollout_is_weights"] if c["is_weights"] else 1.0
    return inputs, inputs[c["advantages"]] * factor, evaluation(inputs["log_prob"])


OURS = {"vanilla": "dual_clip", "gspo": "gspo", "sapo": "sapo", "gpg": "reinforce", "geo_mean": "gmpo",
    "cispo": "cispo", "dppo_tv": "dppo_tv", "dppo_kl": "dppo_kl"}
OPTIONS = {"clip_ratio_low": "clip", "clip_ratio_high": "clip_high", "clip_ratio_c": "cap", "tau_pos": "tau",
    "tau_neg": "tau_negative"}
HAVE_CLIP_FRACTION = ("vanilla", "gspo", "dppo_tv", "dppo_kl")


def one_sided(c: dict) -> bool:
    return c["loss"] != "cispo" or c["config"].get("clip_ratio_low", 0.2) >= 1


def policy_quantities(c: dict) -> list[str]:
    clipped = "metrics" in c and c["loss"] in HAVE_CLIP_FRACTION
    return ["value", "gradient", *(["clip fraction"] if clipped else [])]


def test_importance_weights_of_gmpo():
    """verl gives a reply the geometric mean of its weights, and A its mean: at A by token, folding w into A differs."""
    for c in verl_cases("policy_loss", "geo_mean").values():
        if c["is_weights"]:
            inputs, a, new = policy_case(c)
            loss, _ = LOSSES["gmpo"](new, inputs.batch(a), clip=c["config"]["clip_ratio_low"],
                clip_high=c["config"]["clip_ratio_high"])
            assert abs(float(reduced(loss, inputs.mask, c["agg"]).detach()) - c["value"]) > 1e-3


def geometric_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ((x.log() * mask).nan_to_num().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()


@compared("verl", "policy losses", {n: c for n, c in verl_cases("policy_loss", *OURS).items() if one_sided(c)},
    policy_quantities)
def test_policy_losses(c, same):
    """PPO with a dual clip, GSPO, GMPO, CISPO (its lower clip off: 1 + clip_ratio_high is our cap), SAPO, DPPO, GPG.

    In `edge` two tokens are 25.5 and -24.5 nats away. verl counts tokens above the dual clip apart: the sum is ours."""
    inputs, a, new = policy_case(c)
    options = {OPTIONS[k]: v for k, v in c["config"].items() if k in OPTIONS}
    if c["loss"] == "geo_mean" and c["is_weights"]:
        a = inputs[c["advantages"]] * geometric_mean(inputs["rollout_is_weights"], inputs.mask)
    if c["loss"] == "vanilla":
        options = {"clip": 0.2, "clip_high": 0.2, "cap": 3.0} | options
    if c["loss"] == "cispo":
        options = {"cap": 1 + options["clip_high"]}
    loss, stats = LOSSES[OURS[c["loss"]]](new, inputs.batch(a), **options)
    value_and_gradient(same, c, loss, new, inputs.mask)
    if "clip fraction" in policy_quantities(c):
        lower = c["metrics"]["actor/pg_clipfrac_lower"] if c["loss"] == "vanilla" else 0.0
        theirs = c["metrics"]["actor/pg_clipfrac"] + lower
        same("clip fraction", stats["clip_fraction"][inputs.mask].mean(), theirs)


@compared("verl", "policy losses", {n: c for n, c in verl_cases("policy_loss", "cispo").items() if not one_sided(c)},
    ["value", "gradient", "ours"])
def test_cispo_with_a_lower_clip(c, same):
    """verl's CISPO raises a small w to 1 - clip_ratio_low, so that what the policy has left pulls harder; ours only
    caps, as ScaleRL and TRL do. Theirs is reinforce with the clipped w in A; where no w is small both are one loss."""
    inputs, a, new = policy_case(c)
    ratio = importance_ratio(inputs["log_prob"], inputs["old_log_prob"])
    loss, _ = LOSSES["reinforce"](new, inputs.batch(a * ratio.clamp(0.8, 1.2)))
    value_and_gradient(same, c, loss, new, inputs.mask)
    ours, _ = LOSSES["cispo"](new, inputs.batch(a), cap=1.2)
    small = inputs.mask & (ratio < 0.8)
    g = gradient(reduced(ours, inputs.mask, c["agg"]), new.logprobs)
    same("ours", g[~small], tensor(c["grad"])[~small], tolerance_of(c["agg"]))
    assert small.any()
    assert (g[small].abs() < tensor(c["grad"])[small].abs()).all()


@compared("verl", "policy losses", verl_cases("policy_loss", "dro"), ["value", "gradient"])
def test_dro(c, same):
    """-A log pi + β k2 to pi_old: reinforce and kl_old. verl's importance weights multiply the k2 too, ours only A, as
    the k2 holds the policy whatever the sampler was; so both parts are given the weight here."""
    inputs, a, new = policy_case(c)
    batch, factor = inputs.batch(a), inputs["rollout_is_weights"] if c["is_weights"] else 1.0
    held = c["config"]["policy_loss"]["dro_beta"] * KL_OLD_LOSSES["k2"](new, batch)
    loss = LOSSES["reinforce"](new, batch)[0] + factor * held
    value_and_gradient(same, c, loss, new, inputs.mask)
    folded = reduced(LOSSES["reinforce"](new, batch)[0] + held, inputs.mask, c["agg"])
    assert (abs(float(folded.detach()) - c["value"]) > 1e-3) == c["is_weights"]


def selecting(c: dict) -> Batch:
    """verl's covariance is of the current log-probs and the plain A, whatever importance weights there are."""
    inputs = INPUTS[c["input"]]
    return inputs.batch(inputs[c["advantages"]], old="log_prob")


def without_a_clamp(same, c: dict, loss: torch.Tensor, theirs: torch.Tensor, new: Evaluation, mask: torch.Tensor):
    """clip_cov and kl_cov are the two losses of verl that do not clamp log w to ±20: where it is beyond (two tokens of
    `edge`), its own loss and gradient stand; ours is e^20 there, and its gradient that of |log w| or none."""
    inputs = INPUTS[c["input"]]
    far = mask & ((inputs["log_prob"] - inputs["old_log_prob"]).abs() > 20)
    value_and_gradient(same, c, torch.where(far, theirs, loss), new, mask)
    g = gradient(reduced(loss, mask, c["agg"]), new.logprobs)
    same("ours", g[~far], tensor(c["grad"])[~far], tolerance_of(c["agg"]))
    assert (g[far].abs() < 2).all()
    assert far.any() == (c["input"] == "edge")


@compared("verl", "policy losses", verl_cases("policy_loss", "kl_cov"), ["value", "gradient", "ours"])
def test_kl_cov(c, same):
    """The tokens are chosen by our selector, given the current log-probs as verl's covariance is of those; ours is of
    pi_old, so that they are chosen once a step. Importance weights multiply verl's |log w| too, ours only A."""
    inputs, a, new = policy_case(c)
    config, batch = c["config"]["policy_loss"], inputs.batch(a)
    uniforms = torch.zeros(inputs.mask.shape)
    batch.selected = SELECTORS["kl_cov"](selecting(c), uniforms, fraction=config["kl_cov_ratio"])
    loss, stats = LOSSES["kl_cov"](new, batch, coef=config["ppo_kl_coef"])
    held = config["ppo_kl_coef"] * stats["moved"]
    if c["is_weights"]:
        loss, held = (x + (inputs["rollout_is_weights"] - 1) * config["ppo_kl_coef"] * stats["moved"] for x in
            (loss, held))
    theirs = held - a * (new.logprobs - batch.old_logprobs).exp()
    without_a_clamp(same, c, loss, theirs, new, inputs.mask)
    folded = LOSSES["kl_cov"](new, batch, coef=config["ppo_kl_coef"])[0]
    assert torch.equal(folded, loss) != c["is_weights"]


@compared("verl", "policy losses", verl_cases("policy_loss", "clip_cov"), ["value", "gradient", "ours"])
def test_clip_cov(c, same):
    """All candidates are taken (clip_cov_ratio = 1), so nothing is drawn. verl never takes a token whose gradient is
    clipped already; ours may, and its constant value is then dropped: the gradient is the same."""
    inputs, a, new = policy_case(c)
    config, batch = c["config"]["policy_loss"], inputs.batch(a)
    bounds = {"low": config["clip_cov_lb"], "high": config["clip_cov_ub"]}
    ours, at_old = (SELECTORS["clip_cov"](b, torch.zeros(inputs.mask.shape), fraction=1.0, **bounds) for b in
        (selecting(c), inputs.batch(inputs[c["advantages"]])))
    assert not torch.equal(ours, at_old)  # verl's covariance is of the current log-probs, ours of pi_old
    clipped = clipped_tokens(importance_ratio(inputs["log_prob"], inputs["old_log_prob"]), a, 0.2, 0.2).bool()
    batch.selected = ours
    dropped, _ = LOSSES["clip_cov"](new, batch)
    batch.selected = ours & ~clipped
    loss, _ = LOSSES["clip_cov"](new, batch)
    torch.testing.assert_close(*(gradient(reduced(x, inputs.mask, c["agg"]), new.logprobs) for x in (dropped, loss)))
    w = (new.logprobs - batch.old_logprobs).exp()
    theirs = -torch.minimum(w * a, w.clamp(0.8, 1.2) * a).masked_fill(batch.selected, 0.0)
    without_a_clamp(same, c, loss, theirs, new, inputs.mask)


@compared("verl", "value loss", verl_cases("value_loss"), ["value", "gradient"])
def test_value_loss(c, same):
    """At ε_v = .05, .2, .5 and 1e9 (none), in four aggregations."""
    inputs = INPUTS[c["input"]]
    values = inputs["vpreds"].clone().requires_grad_()
    loss = clipped_value_loss(values, inputs["values"], inputs["returns"], c["cliprange_value"])
    total = reduced(loss, inputs.mask, c["agg"])
    same("value", total, c["value"], tolerance_of(c["agg"]))
    same("gradient", gradient(total, values), c["grad"], tolerance_of(c["agg"]))


@compared("verl", "aggregation", each_input("aggregation"), lambda c: list(c["theirs"]))
def test_aggregation(c, same):
    """Four aggregations, each as a whole and as two micro-batches with the counts of the whole step, as verl's new
    engine and ours do it. Its older actor takes the mean of the micro-batches' own values, which is another loss where
    replies differ in length: two halves of our weights, counted half by half, reproduce it."""
    inputs = INPUTS[c["input"]]
    mask, x = inputs.mask, inputs["advantages"]
    half = len(mask) // 2
    halves = (slice(0, half), slice(half, None))
    assert len(c["theirs"]) == 13
    for name, theirs in c["theirs"].items():
        agg, _, way = name.partition("|")
        w, tolerance = weights(mask, agg), tolerance_of(agg)
        exact = (w * x)[mask].sum()
        if way == "two_microbatches_sum":
            same(name, sum((w[rows] * x[rows])[mask[rows]].sum() for rows in halves), theirs, tolerance)
        elif way == "naive_mean_of_microbatches":
            naive = sum(reduced(x[rows], mask[rows], agg) for rows in halves) / 2
            same(name, naive, theirs, tolerance)
            assert (abs(float(exact) - theirs) > 1e-3) == DRIFTS[c["input"]](agg)
        elif way:
            same(name, (token_weights(mask, "constant", 100) * x)[mask].sum(), theirs, tolerance)
        else:
            same(name, exact, theirs, tolerance)


DRIFTS = {"padded": lambda agg: agg == "token-mean", "edge": lambda agg: agg != "token-mean"}  # by what the halves have


# The sampler is not the trainer
@compared("verl", "mismatch", {n: c for n, c in verl_cases("correction").items() if "rollout_is" in c}, ["weights"])
def test_truncated_importance_sampling(c, same):
    """By token and by reply; batch_normalize divides by the mean over tokens, or over replies."""
    inputs = INPUTS[c["input"]]
    batch = inputs.batch(inputs["advantages"], sampler="rollout_log_prob")
    w = truncated_ratio(batch, c["rollout_is"], c["threshold"]) * inputs.mask
    if c["batch_normalize"]:
        mean = w[inputs.mask].mean() if c["rollout_is"] == "token" else (w.sum(1) / inputs.mask.sum(1)).mean()
        w = w / mean
    same("weights", w, c["weights"], EPS_1E_8)


LEVELS = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "mean"}


@compared("verl", "mismatch", {n: c for n, c in verl_cases("correction").items() if c.get("rollout_rs") in LEVELS},
    ["mask", "rejected", "k1", "k3"])
def test_rejection(c, same):
    """verl's k1 is log mu - log pi_old, the other way round, so its bounds are those of the inverse ratio; one number u
    stands for (1/u, u)."""
    inputs, mask = INPUTS[c["input"]], INPUTS[c["input"]].mask
    low, high = map(float, str(c["threshold"]).split("_")) if "_" in str(c["threshold"]) else (
        1 / c["threshold"], c["threshold"])
    batch = inputs.batch(inputs["advantages"], sampler="rollout_log_prob")
    kept = accepted(batch, LEVELS[c["rollout_rs"]], 1 / high, 1 / low)
    same("mask", kept, c["mask"])
    metrics = c["metrics"]
    same("rejected", 1 - kept[mask].double().mean(), metrics["rollout_corr/rollout_rs_masked_fraction"])
    old, sampler = (inputs[n][mask] for n in ("old_log_prob", "rollout_log_prob"))
    same("k1", KL["k1"](sampler, old).mean(), metrics["rollout_corr/kl"])
    same("k3", KL["k3"](sampler, old).mean(), metrics["rollout_corr/k3_kl"])


def bypass_quantities(c: dict) -> list[str]:
    return ["value", "gradient", *(["ours"] if "rollout_rs" in c["rollout_correction"] else [])]


@compared("verl", "mismatch", verl_cases("bypass"), bypass_quantities)
def test_bypass(c, same):
    """Two policies: pi_old is the sampler's. ppo_clip is our dual_clip; `reinforce` has min(w, 2) in A, by token or by
    reply. What is rejected leaves verl's mask, and so its denominators: the survivors count for more. Ours multiplies
    weights that are fixed before, so that rejection scales the rest by the tokens (or replies) that are left."""
    inputs, config = INPUTS[c["input"]], c["rollout_correction"]
    new, mask = evaluation(inputs["log_prob"]), inputs.mask
    batch = inputs.batch(inputs["seq_advantages"], old="rollout_log_prob", sampler="rollout_log_prob")
    moved = inputs.batch(inputs["seq_advantages"], old="log_prob", sampler="rollout_log_prob")
    if config["loss_type"] == "ppo_clip":
        loss, _ = LOSSES["dual_clip"](new, batch, clip=0.2, cap=3.0)
    else:
        batch.advantages = batch.advantages * truncated_ratio(moved, config["rollout_is"], 2.0)
        loss, _ = LOSSES["reinforce"](new, batch)
    kept = mask
    if config.get("rollout_rs") == "seq_mean_k1":
        low, high = map(float, config["rollout_rs_threshold"].split("_"))
        kept = accepted(moved, "mean", 1 / high, 1 / low)
    elif "rollout_rs" in config:  # by the mean of k3, which is no rule of ours
        k3 = KL["k3"](inputs["rollout_log_prob"], inputs["log_prob"]) * mask
        kept = mask & ((k3.sum(1) / mask.sum(1)) <= config["rollout_rs_threshold"])[:, None]
    value_and_gradient(same, c, loss, new, kept)
    if "rollout_rs" in config:
        ours = (weights(mask, c["agg"]) * kept * loss)[mask].sum()
        left = {"token-mean": kept.sum() / mask.sum()}.get(c["agg"], kept.any(1).sum() / mask.any(1).sum())
        same("ours", gradient(ours, new.logprobs), tensor(c["grad"]) * left, EPS_1E_8)
        assert left < 1
