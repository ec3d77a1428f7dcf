"""Our advantages, KL, log-probs and rewards against frozen numbers of verl (August 2026), in float64.

Where we differ on purpose the test says why, and pins what both sides give: docs/oracles.md.
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
    evaluation,
    gradient,
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
    whitened,
)
from rlkl.heldout import pass_at_k
from rlkl.kl import KL, KL_LOSSES, proportional
from rlkl.logprobs import token_logprobs
from rlkl.metrics import credited, describe
from rlkl.rewards import overlong, token_rewards
from rlkl.types import Head

RESULTS = VERL["results"]


def kl_cases() -> dict[str, dict]:
    return {f"{n}-{name}": {"input": n, "name": name} | RESULTS[n]["kl"][name] for n in INPUTS for name in
        ("k1", "k2", "k3", "k1+", "k2+", "k3+")}


@compared("verl", "KL", kl_cases(), ["value", "gradient"])
def test_kl(c, same):
    """k1, k2, k3, and each with the gradient of k2 (`+`); ours has k3+ alone, the others are made of their two parts.

    verl clamps k3 to 10, which makes its gradient zero there; ours goes on, so a token that has left the reference by
    24.5 nats is still counted (23.5) and still pulled back."""
    inputs, name = INPUTS[c["input"]], c["name"]
    new, batch = evaluation(inputs["log_prob"]), inputs.batch(inputs["advantages"])
    batch.ref_logprobs = inputs["ref_log_prob"]
    ref, mask = inputs["ref_log_prob"], inputs.mask
    if name == "k3+":
        got = KL_LOSSES["k3+"](new, batch)
    else:
        got = KL[name.rstrip("+")](new.logprobs, ref)
        if name.endswith("+"):
            straight = KL_LOSSES["k2"](new, batch)
            got = straight - straight.detach() + got.detach()
    g = gradient(got[mask].sum(), new.logprobs)
    theirs, their_g = tensor(c["value"]), tensor(c["grad_of_sum"])
    clamped = mask & (theirs == 10.0) if name in ("k3", "k3+") else torch.zeros_like(mask)
    free = mask & ~clamped
    steered = free if name == "k3" else mask
    same("value", got[free], theirs[free])
    same("gradient", g[steered], their_g[steered])
    assert clamped.any() == (c["input"] == "edge" and name in ("k3", "k3+"))
    if clamped.any():
        assert float(got[0, 0].detach()) == pytest.approx(23.5, abs=1e-8)
    if clamped.any() and name == "k3":
        assert float(g[0, 0]) == pytest.approx(1.0, abs=1e-8)
        assert their_g[clamped].eq(0).all()


# Advantages
@compared("verl", "advantages", verl_cases("gae"), ["raw", "whitened", "returns"])
def test_gae(c, same):
    """Score-only and dense rewards."""
    inputs = INPUTS[c["input"]]
    options, m = {"gamma": c["gamma"], "lam": c["lam"]}, inputs.mask
    raw, returns = gae(inputs[c["rewards"]], inputs["values"], m, whiten=False, **options)
    white, _ = gae(inputs[c["rewards"]], inputs["values"], m, **options)
    same("raw", raw, tensor(c["advantages_raw_masked"]) * m)
    same("whitened", white[m], tensor(c["advantages_whitened"])[m])
    same("returns", returns[m], tensor(c["returns"])[m])


GROUPED = {"grpo": grpo, "grpo_vectorized": grpo, "dr_grpo(no std)": dr_grpo, "grpo_vectorized(no std)": dr_grpo,
    "rloo": rloo, "rloo_vectorized": rloo, "opo": opo, "gpg": dr_grpo, "grpo_passk(no std)": best_only,
    "grpo_passk": best_only}
RAW_ALONE = ("grpo", "grpo_vectorized", "dr_grpo(no std)", "grpo_vectorized(no std)", "rloo", "opo", "gpg")


def group_cases() -> dict[str, dict]:
    assert set(RESULTS["padded"]["group"]) == set(GROUPED)
    return {f"{n}-{name}": {"input": n, "name": name, "theirs": x} for n in INPUTS for name, x in
        RESULTS[n]["group"].items()}


@compared("verl", "advantages", group_cases(), ["advantages"])
def test_group_estimators(c, same):
    """A singleton group keeps its raw score in verl (0.7; over 1 + 1e-6 in grpo; rloo_vectorized gives 0): ours is 0,
    as nothing can be learned from comparing a reply with itself. GPG scales by rows over non-zero scores.
    grpo_passk is our best_only over the group's std + 1e-6. grpo_vectorized is in float32."""
    inputs, name, theirs = INPUTS[c["input"]], c["name"], tensor(c["theirs"])
    rewards, alone = inputs["outcome_rewards"], inputs.alone
    scores = (rewards * inputs.mask).sum(1)
    got = inputs.grouped(GROUPED[name], rewards)
    if name == "gpg":
        got = got * len(scores) / (scores != 0).sum()
    if name == "grpo_passk":
        got = torch.cat([got[rows] / (scores[rows].std() + 1e-6) for rows in inputs.groups])
    same("advantages", got[~alone], theirs[~alone], FLOAT32 if "vectorized" in name and "grpo" in name else EXACT)
    assert alone.any() == (c["input"] == "edge")
    assert got[alone].eq(0).all()
    if name in RAW_ALONE:
        factor = len(scores) / float((scores != 0).sum()) if name == "gpg" else 1.0
        assert theirs[alone].tolist() == pytest.approx([0.7 * factor] * int(alone.sum()), abs=1e-6)


def reinforce_pp_cases() -> dict[str, dict]:
    return {f"{n}-{gamma}-{paid}": {"input": n, "gamma": float(gamma), "paid": paid,
        "theirs": RESULTS[n]["credit"][f"reinforce_plus_plus|gamma={gamma}|{paid}"]}
        for n in INPUTS for gamma in ("1", "0.9") for paid in ("outcome_rewards", "dense_rewards")}


@compared("verl", "advantages", reinforce_pp_cases(), ["advantages"])
def test_reinforce_pp(c, same):
    inputs = INPUTS[c["input"]]
    same("advantages", reinforce_pp(inputs[c["paid"]], None, inputs.mask, gamma=c["gamma"])[0], c["theirs"])


@compared("verl", "advantages", each_input("credit"), lambda c: ["groups"] if c["input"] == "padded" else [])
def test_reinforce_pp_baseline(c, same):
    """Its groups are of 3, 3 and 2 samples. In `edge` the first two are degenerate: verl whitens a singleton's raw
    score, and gives a unanimous group minus the mean over all tokens, where ours is exactly 0."""
    inputs, theirs = INPUTS[c["input"]], tensor(c["theirs"]["reinforce_plus_plus_baseline"])
    if c["input"] == "padded":
        centred = inputs.grouped(dr_grpo, inputs["outcome_rewards"])[:, None] * inputs.mask
        same("groups", whitened(centred, inputs.mask), theirs)  # of unequal size, so by the two parts it is made of
        mask, rewards = inputs.mask[:6], inputs["outcome_rewards"][:6]
        ours, _ = reinforce_pp_baseline(rewards, None, mask, group_size=3)
        torch.testing.assert_close(ours, whitened(centred[:6], mask))
    else:
        unanimous = inputs.mask[1:4]
        assert theirs[1:4][unanimous].abs().min() > 0.1
        got, _ = reinforce_pp_baseline(inputs["outcome_rewards"][1:], None, inputs.mask[1:], group_size=3)
        assert got[:3].eq(0).all()
        assert got[3:].abs().sum() > 1


@compared("verl", "advantages", each_input("credit"), ["outcome_rewards", "dense_rewards"])
def test_remax(c, same):
    inputs = INPUTS[c["input"]]
    baseline = inputs["reward_baselines"][:, None].expand(inputs.mask.shape)
    for paid in ("outcome_rewards", "dense_rewards"):
        theirs = tensor(c["theirs"][f"remax|{paid}"])
        same(paid, remax(inputs[paid], baseline, inputs.mask)[0][inputs.mask], theirs[inputs.mask])


@compared("verl", "advantages", each_input("whitened"), ["whitened"])
def test_whitening(c, same):
    """Bessel variance over the mask, rsqrt(var + 1e-8)."""
    inputs = INPUTS[c["input"]]
    same("whitened", whitened(inputs["advantages"], inputs.mask)[inputs.mask], tensor(c["theirs"])[inputs.mask])


# Rewards and aggregation
@compared("verl", "KL", verl_cases("kl_in_reward"), ["rewards", "coefficient after"])
def test_kl_in_the_reward(c, same):
    """Scores on the last token, minus 0.05 of the KL between the policy that sampled and the reference. The controller
    of verl is given the KL per token, averaged over replies; the rule is the same for ours, per sequence."""
    inputs, mask = INPUTS[c["input"]], INPUTS[c["input"]].mask
    name = {"kl": "k1", "low_var_kl": "k3"}.get(c["kl_penalty"], c["kl_penalty"])
    kl = KL[name](inputs["old_log_prob"], inputs["ref_log_prob"]) * mask
    placed = token_rewards(inputs["scores"], mask)
    torch.testing.assert_close(placed, inputs["outcome_rewards"] * mask)
    same("rewards", (placed - 0.05 * kl)[mask], tensor(c["token_level_rewards"])[mask])
    now = float((kl.sum(1) / mask.sum(1)).mean())
    moved = proportional(0.05, 0.1, now, rows=len(mask), horizon=100)
    same("coefficient after", moved if c["controller"].startswith("Adaptive") else 0.05, c["coef_after"], EPS_1E_8)


# What is logged
@compared("verl", "metrics", each_input("metrics"),
    ["advantage", "explained variance", "reward", "length", "clip ratio"])
def test_metrics(c, same):
    """verl adds 1e-5 to the variance of the returns, ours nothing: compared after adding it."""
    inputs, theirs = INPUTS[c["input"]], c["theirs"]
    mask = inputs.mask
    batch = inputs.batch(inputs["advantages"])
    batch.values, batch.returns, batch.truncated = inputs["values"], inputs["returns"], mask.all(1)
    learned, said = credited(batch), describe(batch, inputs["scores"], {}, group_size=len(mask))
    variance = float(inputs["returns"][mask].var())
    explained = 1 - (1 - learned["explained_variance"]) * variance / (variance + 1e-5)
    same("advantage", learned["advantage"], theirs["critic/advantages/mean"])
    same("explained variance", explained, theirs["critic/vf_explained_var"])
    assert 1e-7 < theirs["critic/vf_explained_var"] - learned["explained_variance"] < 1e-4
    same("reward", said["reward"], theirs["critic/score/mean"])
    same("length", said["length"], theirs["response_length/mean"], FLOAT32)
    same("clip ratio", said["truncated"], theirs["response_length/clip_ratio"], FLOAT32)


@compared("verl", "KL", {f"run{i}": run for i, run in enumerate(VERL["adaptive_kl"])}, [f"step {i}" for i in range(20)])
def test_proportional_controller(c, same):
    """Three runs of twenty steps, each step from our own coefficient before it."""
    coef = c["init"]
    for i, (kl, after) in enumerate(zip(c["kls"], c["coef_after_each"], strict=True)):
        coef = proportional(coef, c["target"], kl, rows=c["n_steps"], horizon=c["horizon"])
        same(f"step {i}", coef, after)


@compared("verl", "log-probs", {f"head{i}": c for i, c in enumerate(VERL["logprob"])},
    ["log-prob", "entropy", "gradient of hidden", "gradient of weight"])
def test_token_logprobs(c, same):
    """At temperatures 1, 1.7 and .6, with the given gradients of log-prob and entropy."""
    hidden, weight = (tensor(c[n]).requires_grad_() for n in ("hidden", "weight"))
    got = token_logprobs(hidden, Head(weight), torch.tensor(c["labels"]), temperature=c["temperature"])
    same("log-prob", got.logprobs, c["logprob"])
    same("entropy", got.entropy, c["entropy"])
    total = (tensor(c["grad_logprob"]) * got.logprobs + tensor(c["grad_entropy"]) * got.entropy).sum()
    same("gradient of hidden", gradient(total, hidden), c["grad_hidden"])
    same("gradient of weight", gradient(total, weight), c["grad_weight"])


@compared("verl", "rewards", {f"{c['length']}of{c['max_resp_len']}": c for c in VERL["overlong"]}, ["penalty"])
def test_overlong(c, same):
    mask = torch.arange(c["max_resp_len"])[None] < c["length"]
    ours = overlong(mask, c["max_resp_len"], c["buffer_len"]) * c["penalty_factor"]
    same("penalty", ours[0], c["overlong_reward"])


@compared("verl", "rewards", {"validation": VERL["validation"]}, ["mean@8"])
def test_validation(c, same):
    """verl's best@k draws k of 8 *with* replacement, 1000 times: about 1 - (1 - p)^k, which is too low; ours is the
    unbiased pass@k. At k = 8 it is 3 of 5 prompts, and verl says .5982."""
    prompts = torch.tensor(c["right"]).view(5, 8).sum(1).long().tolist()
    same("mean@8", sum(pass_at_k(8, n, 1) for n in prompts) / 5, c["acc"]["mean@8"])
    for k in (2, 4, 8):
        theirs, ours = c["acc"][f"best@{k}/mean"], sum(pass_at_k(8, n, k) for n in prompts) / 5
        assert theirs == pytest.approx(sum(1 - (1 - n / 8) ** k for n in prompts) / 5, abs=0.01)
        assert ours > theirs
    assert (ours, theirs) == (pytest.approx(0.6), pytest.approx(0.5982))
