"""Our advantages, KL, log-probs and rewards against frozen numbers of verl (August 2026).

All in float64. Where we differ on purpose the test says why, and asserts what both sides give:
docs/oracles.md.
"""

import pytest
import torch
from golden.reading import (
    EPS_1E_8,
    EXACT,
    FLOAT32,
    INPUTS,
    VERL,
    compared,
    each_input,
    gradient,
    policy_output,
    tensor,
    verl_cases,
)

from rlkl.advantages import (
    best_only,
    dr_grpo,
    gae,
    grpo,
    opo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
    token_rewards,
    whitened,
)
from rlkl.kl import KL, KL_LOSSES, proportional
from rlkl.logprobs import token_logprobs
from rlkl.rewards import overlong
from rlkl.run.evaluate import pass_at_k
from rlkl.run.metrics import advantage_metrics, rollout_metrics
from rlkl.types import Head, Rollout

RESULTS = VERL["results"]


# ------------------------------------------------------------------ KL


KL_CASES = {
    f"{name}-{estimator}": {"input": name, "name": estimator} | RESULTS[name]["kl"][estimator]
    for name in INPUTS
    for estimator in ("k1", "k2", "k3", "k1+", "k2+", "k3+")
}


@compared("verl", "KL", KL_CASES, ["value", "gradient"])
def test_kl(case, same):
    """k1, k2, k3, and each with the gradient of k2 (`+`). Of those ours has k3+ alone.

    verl clamps k3 to 10, which makes its gradient zero there. Ours goes on: a token that is 24.5
    nats away from the reference still counts 23.5, and is still pulled back.
    """
    inputs, name = INPUTS[case["input"]], case["name"]
    mask, ref_logprobs = inputs.mask, inputs["ref_log_prob"]
    new, batch = policy_output(inputs["log_prob"]), inputs.batch(inputs["advantages"])
    batch.fill(ref_logprobs=ref_logprobs)
    if name == "k3+":
        ours = KL_LOSSES["k3+"](new, batch)
    else:
        ours = KL[name.rstrip("+")](new.logprobs, ref_logprobs)
        if name.endswith("+"):
            k2 = KL_LOSSES["k2"](new, batch)
            ours = k2 - k2.detach() + ours.detach()
    our_gradient = gradient(ours[mask].sum(), new.logprobs)
    theirs, their_gradient = tensor(case["value"]), tensor(case["grad_of_sum"])
    clamped = mask & (theirs == 10.0) & (name in ("k3", "k3+"))
    same_value = mask & ~clamped
    same_gradient = same_value if name == "k3" else mask
    same("value", ours[same_value], theirs[same_value])
    same("gradient", our_gradient[same_gradient], their_gradient[same_gradient])
    assert clamped.any() == (case["input"] == "edge" and name in ("k3", "k3+"))
    if clamped.any():
        assert float(ours[0, 0].detach()) == pytest.approx(23.5, abs=1e-8)
    if clamped.any() and name == "k3":
        assert float(our_gradient[0, 0]) == pytest.approx(1.0, abs=1e-8)
        assert their_gradient[clamped].eq(0).all()


@compared("verl", "KL", verl_cases("kl_in_reward"), ["rewards", "coefficient after"])
def test_kl_in_the_reward(case, same):
    """Scores on the last token, minus 0.05 of the KL between pi_old and the reference.

    verl gives its controller the KL per token, averaged over responses; the rule is the same for
    ours, per sequence.
    """
    inputs = INPUTS[case["input"]]
    mask = inputs.mask
    name = {"kl": "k1", "low_var_kl": "k3"}.get(case["kl_penalty"], case["kl_penalty"])
    kl = KL[name](inputs["old_log_prob"], inputs["ref_log_prob"]) * mask
    rewards = token_rewards(inputs["scores"], mask)
    torch.testing.assert_close(rewards, inputs["outcome_rewards"] * mask)
    with_kl = rewards - 0.05 * kl
    same("rewards", with_kl[mask], tensor(case["token_level_rewards"])[mask])
    coef = 0.05
    if case["controller"].startswith("Adaptive"):
        mean_kl = float((kl.sum(1) / mask.sum(1)).mean())
        coef = proportional(0.05, 0.1, mean_kl, rows=len(mask), horizon=100)
    same("coefficient after", coef, case["coef_after"], EPS_1E_8)


CONTROLLER_RUNS = {f"run{i}": run for i, run in enumerate(VERL["adaptive_kl"])}


@compared("verl", "KL", CONTROLLER_RUNS, [f"step {i}" for i in range(20)])
def test_proportional_controller(case, same):
    """Three runs of twenty steps, each step from our own coefficient before it."""
    coef = case["init"]
    for i, (kl, after) in enumerate(zip(case["kls"], case["coef_after_each"], strict=True)):
        coef = proportional(coef, case["target"], kl, rows=case["n_steps"], horizon=case["horizon"])
        same(f"step {i}", coef, after)


# ------------------------------------------------------------------ advantages


@compared("verl", "advantages", verl_cases("gae"), ["raw", "whitened", "returns"])
def test_gae(case, same):
    """A reward on the last token only, and rewards on every token."""
    inputs = INPUTS[case["input"]]
    mask, rewards, values = inputs.mask, inputs[case["rewards"]], inputs["values"]
    options = {"gamma": case["gamma"], "lam": case["lam"]}
    raw, returns = gae(rewards, values, mask, whiten=False, **options)
    advantages, _ = gae(rewards, values, mask, **options)
    same("raw", raw, tensor(case["advantages_raw_masked"]) * mask)
    same("whitened", advantages[mask], tensor(case["advantages_whitened"])[mask])
    same("returns", returns[mask], tensor(case["returns"])[mask])


GROUPED = {
    "grpo": grpo,
    "grpo_vectorized": grpo,
    "dr_grpo(no std)": dr_grpo,
    "grpo_vectorized(no std)": dr_grpo,
    "rloo": rloo,
    "rloo_vectorized": rloo,
    "opo": opo,
    "gpg": dr_grpo,
    "grpo_passk(no std)": best_only,
    "grpo_passk": best_only,
}
RAW_SCORE_ALONE = (  # verl's estimators that give a group of one its raw score
    "grpo",
    "grpo_vectorized",
    "dr_grpo(no std)",
    "grpo_vectorized(no std)",
    "rloo",
    "opo",
    "gpg",
)
GROUP_CASES = {
    f"{name}-{estimator}": {"input": name, "name": estimator, "theirs": advantages}
    for name in INPUTS
    for estimator, advantages in RESULTS[name]["group"].items()
}


@compared("verl", "advantages", GROUP_CASES, ["advantages"])
def test_group_estimators(case, same):
    """A group of one keeps its raw score in verl: 0.7, or 0.7 / (1 + 1e-6) in grpo.

    Ours is 0, as is that of rloo_vectorized: nothing can be learned from comparing a response with
    itself. GPG scales by rows over non-zero scores. grpo_passk is our best_only over the group's
    std + 1e-6. grpo_vectorized is in float32.
    """
    inputs, name, theirs = INPUTS[case["input"]], case["name"], tensor(case["theirs"])
    assert name in GROUPED
    rewards, alone = inputs["outcome_rewards"], inputs.alone
    scores = (rewards * inputs.mask).sum(1)
    scale = 1.0
    if name == "gpg":
        scale = len(scores) / float((scores != 0).sum())
    ours = scale * inputs.grouped(GROUPED[name], rewards)
    if name == "grpo_passk":
        ours = torch.cat([ours[rows] / (scores[rows].std() + 1e-6) for rows in inputs.groups])
    tolerance = FLOAT32 if name.startswith("grpo_vectorized") else EXACT
    same("advantages", ours[~alone], theirs[~alone], tolerance)
    assert alone.any() == (case["input"] == "edge")
    assert ours[alone].eq(0).all()
    if name in RAW_SCORE_ALONE:
        assert theirs[alone].tolist() == pytest.approx([0.7 * scale] * int(alone.sum()), abs=1e-6)


def test_every_group_estimator_of_verl_is_compared():
    assert set(RESULTS["padded"]["group"]) == set(GROUPED)


REINFORCE_PP_CASES = {
    f"{name}-{gamma}-{rewards}": {
        "input": name,
        "gamma": float(gamma),
        "rewards": rewards,
        "theirs": RESULTS[name]["credit"][f"reinforce_plus_plus|gamma={gamma}|{rewards}"],
    }
    for name in INPUTS
    for gamma in ("1", "0.9")
    for rewards in ("outcome_rewards", "dense_rewards")
}


@compared("verl", "advantages", REINFORCE_PP_CASES, ["advantages"])
def test_reinforce_pp(case, same):
    inputs = INPUTS[case["input"]]
    rewards = inputs[case["rewards"]]
    ours, _ = reinforce_pp(rewards, None, inputs.mask, gamma=case["gamma"])
    same("advantages", ours, case["theirs"])


@compared(
    "verl",
    "advantages",
    each_input("credit"),
    lambda case: ["groups"] if case["input"] == "padded" else [],
)
def test_reinforce_pp_baseline(case, same):
    """Its groups are of 3, 3 and 2 samples. In `edge` the first two are degenerate.

    There verl whitens the raw score of the group of one, and gives a group of zero variance minus
    the mean over all tokens. Ours is exactly 0 for both.
    """
    inputs = INPUTS[case["input"]]
    mask, rewards = inputs.mask, inputs["outcome_rewards"]
    theirs = tensor(case["theirs"]["reinforce_plus_plus_baseline"])
    if case["input"] == "padded":  # groups of unequal size, so by the two parts it is made of
        centred = inputs.grouped(dr_grpo, rewards)[:, None] * mask
        same("groups", whitened(centred, mask), theirs)
        ours, _ = reinforce_pp_baseline(rewards[:6], None, mask[:6], group_size=3)
        torch.testing.assert_close(ours, whitened(centred[:6], mask[:6]))
    else:
        assert theirs[1:4][mask[1:4]].abs().min() > 0.1
        ours, _ = reinforce_pp_baseline(rewards[1:], None, mask[1:], group_size=3)
        assert ours[:3].eq(0).all()
        assert ours[3:].abs().sum() > 1


@compared("verl", "advantages", each_input("credit"), ["outcome_rewards", "dense_rewards"])
def test_remax(case, same):
    inputs = INPUTS[case["input"]]
    mask = inputs.mask
    baseline = inputs["reward_baselines"][:, None].expand(mask.shape)
    for name in ("outcome_rewards", "dense_rewards"):
        ours, _ = remax(inputs[name], baseline, mask)
        same(name, ours[mask], tensor(case["theirs"][f"remax|{name}"])[mask])


@compared("verl", "advantages", each_input("whitened"), ["whitened"])
def test_whitening(case, same):
    """The variance is Bessel's over the mask, the factor rsqrt(var + 1e-8)."""
    inputs = INPUTS[case["input"]]
    ours = whitened(inputs["advantages"], inputs.mask)
    same("whitened", ours[inputs.mask], tensor(case["theirs"])[inputs.mask])


# ------------------------------------------------------------------ metrics


METRIC_QUANTITIES = ["advantage", "explained variance", "reward", "length", "clip ratio"]


@compared("verl", "metrics", each_input("metrics"), METRIC_QUANTITIES)
def test_metrics(case, same):
    """verl adds 1e-5 to the variance of the returns, ours nothing: compared after adding it."""
    inputs, theirs = INPUTS[case["input"]], case["theirs"]
    mask = inputs.mask
    batch = inputs.batch(inputs["advantages"])
    batch.fill(values=inputs["values"], returns=inputs["returns"])
    batch.fill(truncated=mask.all(1), scores=inputs["scores"])
    metrics = rollout_metrics(Rollout(batch, batch, {}, [], [], {}), group_size=len(mask))
    metrics |= advantage_metrics(batch)
    variance = float(inputs["returns"][mask].var())
    explained = 1 - (1 - metrics["explained_variance"]) * variance / (variance + 1e-5)
    same("advantage", metrics["advantage_mean"], theirs["critic/advantages/mean"])
    same("explained variance", explained, theirs["critic/vf_explained_var"])
    assert 1e-7 < theirs["critic/vf_explained_var"] - metrics["explained_variance"] < 1e-4
    same("reward", metrics["reward"], theirs["critic/score/mean"])
    same("length", metrics["response_length"], theirs["response_length/mean"], FLOAT32)
    clip_ratio = theirs["response_length/clip_ratio"]
    same("clip ratio", metrics["truncated_fraction"], clip_ratio, FLOAT32)


# ------------------------------------------------------------------ log-probs


HEAD_CASES = {f"head{i}": case for i, case in enumerate(VERL["logprob"])}
HEAD_QUANTITIES = ["log-prob", "entropy", "gradient of hidden", "gradient of weight"]


@compared("verl", "log-probs", HEAD_CASES, HEAD_QUANTITIES)
def test_token_logprobs(case, same):
    """At temperatures 1, 1.7 and 0.6, with the given gradients of log-prob and entropy."""
    hidden, weight = (tensor(case[n]).requires_grad_() for n in ("hidden", "weight"))
    labels = torch.tensor(case["labels"])
    ours = token_logprobs(hidden, Head(weight), labels, temperature=case["temperature"])
    same("log-prob", ours.logprobs, case["logprob"])
    same("entropy", ours.entropy, case["entropy"])
    of_logprob, of_entropy = tensor(case["grad_logprob"]), tensor(case["grad_entropy"])
    total = (of_logprob * ours.logprobs + of_entropy * ours.entropy).sum()
    same("gradient of hidden", gradient(total, hidden), case["grad_hidden"])
    same("gradient of weight", gradient(total, weight), case["grad_weight"])


# ------------------------------------------------------------------ rewards


OVERLONG_CASES = {f"{case['length']}of{case['max_resp_len']}": case for case in VERL["overlong"]}


@compared("verl", "rewards", OVERLONG_CASES, ["penalty"])
def test_overlong(case, same):
    mask = torch.arange(case["max_resp_len"])[None] < case["length"]
    ours = overlong(mask, case["max_resp_len"], case["buffer_len"]) * case["penalty_factor"]
    same("penalty", ours[0], case["overlong_reward"])


@compared("verl", "rewards", {"validation": VERL["validation"]}, ["mean@8"])
def test_validation(case, same):
    """verl's best@k draws k of 8 *with* replacement, 1000 times: about 1 - (1 - p)^k, too low.

    Ours is the unbiased pass@k. At k = 8 it is 3 of 5 prompts, and verl gives 0.5982.
    """
    correct = torch.tensor(case["right"]).view(5, 8).sum(1).long().tolist()
    same("mean@8", sum(pass_at_k(8, n, 1) for n in correct) / 5, case["acc"]["mean@8"])
    for k in (2, 4, 8):
        theirs = case["acc"][f"best@{k}/mean"]
        ours = sum(pass_at_k(8, n, k) for n in correct) / 5
        with_replacement = sum(1 - (1 - n / 8) ** k for n in correct) / 5
        assert theirs == pytest.approx(with_replacement, abs=0.01)
        assert ours > theirs
    assert (ours, theirs) == (pytest.approx(0.6), pytest.approx(0.5982))
