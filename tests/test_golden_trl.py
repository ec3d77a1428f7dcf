"""Our functions against frozen numbers of TRL 1.16, in float64: docs/oracles.md.

Where we differ on purpose the test says why, and asserts what both sides give.
"""

import torch
from golden.reading import (
    BESSEL32,
    FLOAT32,
    FLOAT32_SUMS,
    TRL,
    compared,
    gradient,
    label,
    plain_batch,
    tensor,
)

from rlkl.advantages import dr_grpo, gae, grpo, rloo, token_rewards, whitened
from rlkl.kl import KL, KL_LOSSES
from rlkl.logprobs import token_logprobs
from rlkl.losses import (
    LOSSES,
    SELECTORS,
    clip,
    clipped_surrogate,
    clipped_tokens,
    importance_ratio,
    token_weights,
    truncated_importance_weights,
    value_loss,
)
from rlkl.run.metrics import rollout_metrics
from rlkl.types import Batch, Head, PolicyOutput, Rollout


def trl_batch(name: str) -> tuple[PolicyOutput, Batch]:
    """Without old log-probs (`onpolicy`) TRL takes the current ones, detached."""
    raw = TRL["batches"][name]
    mask = tensor(raw["mask"]).bool()
    old = tensor(raw["old_logps"] or raw["logps"])
    advantages = tensor(raw["advantages"])[:, None].expand(mask.shape)
    batch = plain_batch(mask, old, advantages, old)
    batch.fill(ref_logprobs=tensor(raw["ref_logps"]), old_entropy=tensor(raw["entropies"]))
    logprobs = tensor(raw["logps"]).requires_grad_()
    entropies = tensor(raw["entropies"]).requires_grad_()
    return PolicyOutput(logprobs, entropies), batch


def loss_cases(*loss_types: str) -> dict[str, dict]:
    """TRL's cases of these loss types, their config completed by TRL's defaults."""
    cases = {}
    for case in TRL["losses"]:
        config = TRL["defaults"] | case["config"]
        if config["loss_type"] in loss_types:
            name = label(b=case["batch"], l=config["loss_type"])
            cases[f"{case['id']}-{name}"] = case | {"config": config}
    return cases


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
METRICS = {
    "kl": "kl",
    "clip_ratio/region_mean": "clip fraction",
    "policy_loss": "policy loss",
    "clip_ratio/low_mean": "clipped below",
    "clip_ratio/high_mean": "clipped above",
    "cispo_clip_ratio": "capped",
}


def loss_quantities(case: dict) -> list[str]:
    names = ["loss", "gradient"]
    if "grad_entropies" in case:
        names.append("gradient of entropy")
    return names + [name for key, name in METRICS.items() if key in case["metrics"]]


def mean_log_ratio(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(B, 1) mean log-ratio of each response, differentiable."""
    log_ratio = (logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return log_ratio.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp_min(1)


def policy_loss(case: dict, new: PolicyOutput, batch: Batch) -> torch.Tensor:
    """(B, T) by our loss of the same name and options."""
    config = case["config"]
    name = config["loss_type"]
    by_sequence = config["importance_sampling_level"] == "sequence"
    if name in CLIPPED:
        epsilon = config["epsilon"]
        options = {"epsilon": epsilon, "epsilon_high": config["epsilon_high"] or epsilon}
        if config["delta"]:
            batch = with_response_ratio(new, batch) if by_sequence else batch
            return clip(new, batch, **options, delta=config["delta"])[0]
        return LOSSES["gspo" if by_sequence else "clip"](new, batch, **options)[0]
    options = {
        "cispo": {"cap": config["epsilon_high"]},
        "sapo": {"tau_negative": float(torch.tensor(1.05))},
    }
    if by_sequence and name != "vespo":
        batch = with_response_ratio(new, batch)
    return LOSSES[name](new, batch, **options.get(name, {}))[0]


def with_response_ratio(new: PolicyOutput, batch: Batch) -> Batch:
    """pi_old such that the ratio of each token is that of its response, as in GSPO's token form."""
    old = (new.logprobs - mean_log_ratio(new.logprobs, batch)).detach()
    return plain_batch(batch.mask, old, batch.advantages, batch.old_logprobs)


def kl_term(case: dict, new: PolicyOutput, batch: Batch) -> torch.Tensor:
    """k3, or by default k3 times the ratio, which is our wk3_token.

    TRL's ratio of a response has a gradient through its mean.
    """
    if not case["config"]["use_bias_correction_kl"]:
        return KL_LOSSES["k3"](new, batch)
    if case["config"]["importance_sampling_level"] == "sequence":
        mean = mean_log_ratio(new.logprobs, batch)
        return importance_ratio(mean, torch.zeros_like(mean)) * KL_LOSSES["k3"](new, batch)
    return KL_LOSSES["wk3_token"](new, batch)


def denominators(case: dict, batch: Batch) -> tuple[torch.Tensor, float]:
    """Our weights with TRL's counts of rows and tokens, and the number of accumulation steps."""
    config, mask = case["config"], batch.mask
    name = config["loss_type"]
    training = config["mode"] == "train"
    steps = config["grad_accum"] if training else 1
    if name in ("dapo", "cispo", "vespo"):
        tokens = config["num_items_in_batch"] or TRL["batches"][case["batch"]]["num_items_in_batch"]
        if training:
            tokens = tokens * steps / config["steps_per_generation"]
        return token_weights(mask, "token", 1, totals=(1, tokens)), steps
    how = {"grpo": "sequence", "sapo": "sequence", "bnpo": "token"}.get(name, "constant")
    length = 1 if name == "luspo" else config["max_completion_length"]
    totals = steps * len(batch), steps * int(mask.sum())
    return token_weights(mask, how, length, totals=totals), steps


def check_loss(case: dict, same) -> None:
    """Policy loss + KL - entropy bonus, each from our own function; the gradients; the metrics."""
    config, (new, batch) = case["config"], trl_batch(case["batch"])
    mask, advantages = batch.mask, batch.advantages
    weights, steps = denominators(case, batch)
    if config["vllm_is"]:
        factor = tensor(case["importance_sampling_ratio"]).expand(mask.shape)
        if config["loss_type"] == "vespo":
            batch.fill(old_logprobs=batch.old_logprobs - factor.log())
        else:
            batch.fill(advantages=batch.advantages * factor)
    loss = policy_loss(case, new, batch)
    trained = mask
    if config["top_entropy_quantile"] < 1:
        trained = most_uncertain(config["top_entropy_quantile"], batch)
        loss = loss.masked_fill(~trained, 0.0)
    kl = kl_term(case, new, batch)
    policy = (weights * (loss + config["beta"] * kl))[mask].sum()
    total = policy
    if config["entropy_coef"]:
        totals = 1, steps * int(trained.sum())
        entropy_weights = token_weights(trained, "token", 1, totals=totals)
        total = policy - config["entropy_coef"] * (entropy_weights * new.entropy)[mask].sum()
        theirs = tensor(case["grad_entropies"])
        same("gradient of entropy", gradient(total, new.entropy), theirs)
        assert theirs[mask & ~trained].eq(0).all()
    same("loss", total, case["loss"])
    same("gradient", gradient(total, new.logprobs), case["grad_logps"])
    if config["loss_type"] not in ("dapo", "cispo", "vespo"):
        policy = policy * steps  # which TRL logs before it divides by them
    metrics = {"kl": kl[mask].mean(), "policy loss": policy}
    metrics |= clip_metrics(case, new, batch, advantages)
    for key, name in METRICS.items():
        if key in case["metrics"]:
            same(name, metrics[name], case["metrics"][key], FLOAT32)


def clip_metrics(
    case: dict, new: PolicyOutput, batch: Batch, advantages: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Fractions of clipped tokens, or of clipped responses where the ratio is a response's."""
    config, mask = case["config"], batch.mask
    low = config["epsilon"]
    high = config["epsilon_high"] or low
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    if config["importance_sampling_level"] == "sequence":
        ratio = mean_log_ratio(new.logprobs, batch).exp()
        advantages = advantages[:, :1]
        mask = torch.ones(len(advantages), 1, dtype=torch.bool)
    clipped = clipped_tokens(ratio, advantages, low, high)
    fractions = {
        "clip fraction": clipped,
        "clipped below": clipped * (advantages < 0),
        "clipped above": clipped * (advantages > 0),
        "capped": ((ratio > high) & (advantages > 0)).double(),
    }
    return {name: x[mask].mean() for name, x in fractions.items()}


def most_uncertain(quantile: float, batch: Batch) -> torch.Tensor:
    """As many tokens as TRL takes: those at or above an interpolated quantile, 8 of 31 at 0.25.

    Ours takes floor(0.25 · 31) = 7: the same ones but the last.
    """
    n = int(batch.mask.sum())
    theirs = n - 1 - int((1 - quantile) * (n - 1) - 1e-9)
    select = SELECTORS["top_entropy"]
    ours = select(batch, batch.old_entropy, fraction=quantile)
    selected = select(batch, batch.old_entropy, fraction=(theirs + 0.5) / n)
    counts = int(ours.sum()), int(selected.sum())
    assert counts == {0.25: (7, 8), 0.55: (17, 17)}[quantile]
    assert (ours <= selected).all()
    return selected


# ------------------------------------------------------------------ policy losses


@compared("TRL", "policy losses", loss_cases("grpo", "bnpo", "dr_grpo"), loss_quantities)
def test_grpo_bnpo_and_dr_grpo(case, same):
    """Clip-higher, delta, GSPO's ratio, k3 with and without the ratio, an entropy bonus.

    Also the most uncertain tokens only, vLLM's importance weights folded into A, and accumulation
    over two steps. TRL's entropy bonus is a mean over tokens whatever the loss is, and over the
    most uncertain ones where only those are trained, so it has weights of its own here. Its KL has
    neither weights nor that mask.
    """
    check_loss(case, same)


@compared("TRL", "policy losses", loss_cases("dapo", "cispo", "vespo"), loss_quantities)
def test_dapo_cispo_and_vespo(case, same):
    """As above, over TRL's own count of tokens. In VESPO `vllm_is` enters W through pi_old."""
    check_loss(case, same)


@compared("TRL", "policy losses", loss_cases("sapo", "luspo"), loss_quantities)
def test_sapo_and_luspo(case, same):
    """SAPO's τ is a float32 number.

    LUSPO is a sum over the response and a mean over responses: constant weights with L = 1.
    """
    check_loss(case, same)


def gradient_with_our_counts(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient with our count of rows and tokens; 2 equal micro-batches if TRL accumulates."""
    new, batch = trl_batch(case["batch"])
    config = case["config"]
    name = config["loss_type"]
    how = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant", "luspo": "constant"}
    length = 1 if name == "luspo" else config["max_completion_length"]
    weights = token_weights(batch.mask, how.get(name, "token"), length) / config["grad_accum"]
    loss = policy_loss(case, new, batch) + config["beta"] * kl_term(case, new, batch)
    return gradient((weights * loss)[batch.mask].sum(), new.logprobs), batch.mask


EMPTY_ROWS = {
    name: case
    for name, case in loss_cases("grpo", "dr_grpo", "sapo", "luspo").items()
    if case["batch"] == "masked_rows"
}
LONG_WINDOWS = {
    name: case
    for name, case in loss_cases("dapo", "cispo", "vespo").items()
    if case["config"]["steps_per_generation"] == 4
}


@compared("TRL", "policy losses", EMPTY_ROWS, ["ours"])
def test_rows_without_a_token(case, same):
    """TRL divides by all 6 rows, ours by the 4 with a token: an empty row dilutes no other."""
    ours, mask = gradient_with_our_counts(case)
    assert (len(mask), int(mask.any(1).sum())) == (6, 4)
    same("ours", ours * 4 / 6, case["grad_logps"])


@compared("TRL", "policy losses", LONG_WINDOWS, ["ours"])
def test_steps_of_a_longer_window(case, same):
    """A generation of 100 tokens is trained on in 4 parts, of which 2 make a step.

    TRL divides by 2/4 of the window's 100 tokens, ours by the 62 that the step has.
    """
    ours, mask = gradient_with_our_counts(case)
    assert (2 * int(mask.sum()), case["config"]["num_items_in_batch"]) == (62, 100)
    same("ours", ours * 62 / 50, case["grad_logps"])


VLLM_CORRECTIONS = {
    case["config"]["vllm_is"]: case
    for case in loss_cases("grpo").values()
    if case["config"]["vllm_is"]
}


@compared("TRL", "mismatch", VLLM_CORRECTIONS, ["ratio"])
def test_importance_ratio(case, same):
    """TRL's vLLM correction: pi_old/mu of a token, or its product over the response, at most 3."""
    _, batch = trl_batch(case["batch"])
    batch.fill(sampler_logprobs=tensor(TRL["batches"][case["batch"]]["sampling_logps"]))
    ours = truncated_importance_weights(batch, case["config"]["vllm_is"], 3.0)
    theirs = tensor(case["importance_sampling_ratio"]).expand(batch.mask.shape)
    same("ratio", ours[batch.mask], theirs[batch.mask])


RLOO_LOSSES = {
    f"{case['batch']}-{case['config']['epsilon_high']}": case for case in TRL["rloo"]["losses"]
}


@compared("TRL", "policy losses", RLOO_LOSSES, ["loss", "gradient", "clip fraction"])
def test_rloo_loss(case, same):
    """The ratio is the response's, a product: our clipped surrogate of the summed log-probs."""
    new, batch = trl_batch(case["batch"])
    low, high = case["config"]["epsilon"], case["config"]["epsilon_high"]
    logprobs = new.logprobs.masked_fill(~batch.mask, 0.0).sum(1)
    ratio = importance_ratio(logprobs, batch.old_logprobs.sum(1))
    advantages = tensor(TRL["batches"][case["batch"]]["advantages"])
    loss = clipped_surrogate(ratio, advantages, low, high).mean()
    clip_fraction = clipped_tokens(ratio, advantages, low, high).mean()
    same("loss", loss, case["loss"])
    same("gradient", gradient(loss, new.logprobs), case["grad_logps"])
    same("clip fraction", clip_fraction, case["metrics"]["clip_ratio/region_mean"], FLOAT32)


# ------------------------------------------------------------------ advantages


def per_row(estimator, scores: torch.Tensor, size: int, **options) -> torch.Tensor:
    """(B,) advantages of responses of one token."""
    rewards = scores[:, None]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return estimator(rewards, None, mask, group_size=size, **options)[0][:, 0]


def normalised(scores: torch.Tensor, size: int, scale: str) -> torch.Tensor:
    """(B,) our grpo with TRL's epsilon. A response without a score (NaN) is not in its group."""
    scored = ~scores.isnan()
    advantages = torch.zeros_like(scores)
    for start in range(0, len(scores), size):
        rows = torch.arange(start, start + size)[scored[start : start + size]]
        if scale == "group" and len(rows) > 1:
            std = scores[rows].std()
            group = per_row(grpo, scores[rows], len(rows))
            advantages[rows] = group * (std + 1e-6) / (std + 1e-4)
        elif len(rows):
            advantages[rows] = per_row(dr_grpo, scores[rows], len(rows))
    if scale == "batch":
        std = scores[scored].std()
        advantages = advantages / (std + 1e-4)
        if scored.all():  # and in one call
            ours = per_row(grpo, scores, size, scale="batch")
            torch.testing.assert_close(advantages, ours * (std + 1e-6) / (std + 1e-4))
    return advantages


@compared("TRL", "advantages", {case["id"]: case for case in TRL["advantages"]}, ["advantages"])
def test_group_advantages(case, same):
    """TRL adds 1e-4 to the std, we 1e-6: compared after changing one for the other.

    Several reward functions are summed by their weights, before or (GDPO) after each is normalised.
    """
    config = case["config"]
    size, scale = config["num_generations"], config["scale_rewards"]
    rewards = case["rewards_per_func"]
    scores_by_reward = tensor([[float("nan") if x is None else x for x in row] for row in rewards])
    reward_weights = tensor(config["reward_weights"])
    unscored = scores_by_reward.isnan().all(1)
    if config["multi_objective_aggregation"] == "sum_then_normalize":
        scores = (scores_by_reward.nan_to_num() * reward_weights).sum(1)
        scores = scores.masked_fill(unscored, float("nan"))
        advantages = normalised(scores, size, scale)
        if not unscored.any() and scale == "group":
            difference = (per_row(grpo, scores, size) - advantages).abs().max()
            assert 2e-5 < difference < 1e-2  # of 1e-4 and 1e-6
    else:
        parts = torch.stack([normalised(column, size, scale) for column in scores_by_reward.T], 1)
        total = (parts * reward_weights).sum(1)
        scored = total[~unscored]
        advantages = ((total - scored.mean()) / (scored.std() + 1e-4)).masked_fill(unscored, 0.0)
    same("advantages", advantages, case["advantages_f32"], FLOAT32)


ALL_SCORED = {
    case["id"]: case
    for case in TRL["advantages"]
    if not any(x is None for row in case["rewards_per_func"] for x in row)
}


def counts_zero_variance(case: dict) -> bool:
    """Does TRL count the groups of equal scores? Not where it divides by the std of the batch."""
    config = case["config"]
    by_batch = config["scale_rewards"] == "batch"
    return not by_batch and config["multi_objective_aggregation"] != "normalize_then_sum"


def metric_quantities(case: dict) -> list[str]:
    return ["reward", "std"] + ["frac_reward_zero_std"] * counts_zero_variance(case)


@compared("TRL", "metrics", ALL_SCORED, metric_quantities)
def test_metrics(case, same):
    """TRL's std of the reward has Bessel's correction, ours has not.

    Where TRL divides by the std of the batch it counts no group of zero variance; ours counts those
    whose scores are equal.
    """
    reward_weights = tensor(case["config"]["reward_weights"])
    scores = (tensor(case["rewards_per_func"]) * reward_weights).sum(1)
    column = scores[:, None]
    batch = plain_batch(torch.ones_like(column, dtype=torch.bool), column, column, column)
    batch.fill(scores=scores)
    metrics = rollout_metrics(
        Rollout(batch, batch, {}, [], [], {}), case["config"]["num_generations"]
    )
    theirs = case["metrics"]
    same("reward", metrics["reward"], theirs["reward"], FLOAT32)
    same("std", metrics["reward_std"] * (12 / 11) ** 0.5, theirs["reward_std"], FLOAT32)
    name = "frac_reward_zero_std"
    if counts_zero_variance(case):
        same(name, metrics[name], theirs[name], FLOAT32)
    else:
        assert theirs[name] == 0


def rloo_name(config: dict) -> str:
    return label(
        g=config["num_generations"],
        beta=config["beta"],
        white=config["normalize_advantages"],
        clip=config["reward_clip_range"],
    )


RLOO_ADVANTAGES = {rloo_name(case["config"]): case for case in TRL["rloo"]["advantages"]}


@compared("TRL", "advantages", RLOO_ADVANTAGES, ["advantages"])
def test_rloo_with_a_kl_in_the_reward(case, same):
    """We pay k1 on every token; TRL sums it over the response first, which is the same.

    TRL may clip the scores before, and divide by the std of the batch + 1e-4 after.
    """
    data, config = TRL["rloo"], case["config"]
    logprobs = tensor(data["advantage_logps_f32"])
    ref_logprobs = tensor(data["advantage_ref_logps_f32"])
    mask = torch.arange(logprobs.shape[1]) < tensor(data["advantage_lens"])[:, None]
    scores = tensor(data["advantage_rewards"])[:, 0]
    if config["reward_clip_range"]:
        scores = scores.clamp(*config["reward_clip_range"])
    rewards = token_rewards(scores, mask) - config["beta"] * KL["k1"](logprobs, ref_logprobs)
    advantages = rloo(rewards, None, mask, group_size=config["num_generations"])[0][:, 0]
    if config["normalize_advantages"]:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
    same("advantages", advantages, case["advantages_f32"], FLOAT32)


# ------------------------------------------------------------------ log-probs


LOGPROB_CASES = {
    label(t=case["temperature"], rows=case["row_mask"]): case for case in TRL["logprob"]["cases"]
}


@compared("TRL", "log-probs", LOGPROB_CASES, ["log-prob", "entropy", "gradient"])
def test_token_logprobs(case, same):
    """Of logits: hidden states under an identity head. TRL computes masked rows as zeros."""
    data = TRL["logprob"]
    rows = torch.ones(6, dtype=torch.bool)
    if case["row_mask"]:
        rows = tensor(data["row_mask"]).bool().flatten()
    logits = tensor(data["logits"]).flatten(0, 1).requires_grad_()
    ids = torch.tensor(data["index"]).flatten()
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    ours = token_logprobs(logits[rows], head, ids[rows], temperature=case["temperature"])
    of_logprob = tensor(data["upstream_logp"]).flatten()[rows]
    of_entropy = tensor(data["upstream_entropy"]).flatten()[rows]
    total = (of_logprob * ours.logprobs).sum() + (of_entropy * ours.entropy).sum()
    same("log-prob", ours.logprobs, tensor(case["logps"]).flatten()[rows])
    same("entropy", ours.entropy, tensor(case["entropy"]).flatten()[rows])
    same("gradient", gradient(total, logits), tensor(case["grad_logits"]).flatten(0, 1))


def head_name(case: dict) -> str:
    return label(
        t=case["temperature"],
        chunk=case["chunk_size"],
        bias=case["bias"],
        cap=case["final_logit_softcapping"],
    )


HEAD_CASES = {head_name(case): case for case in TRL["heads"]["cases"]}


@compared("TRL", "log-probs", HEAD_CASES, ["log-prob", "entropy", "grad_hidden", "grad_weight"])
def test_chunked_head(case, same):
    """TRL's chunked unembedding in float32, with and without bias and soft cap."""
    data = TRL["heads"]
    leaves = {n: tensor(data[f"{n}_f32"]).requires_grad_() for n in ("hidden", "weight", "bias")}
    bias = leaves["bias"] if case["bias"] else None
    head = Head(leaves["weight"], bias, softcap=case["final_logit_softcapping"])
    targets = torch.tensor(data["targets"])
    ours = token_logprobs(leaves["hidden"], head, targets, temperature=case["temperature"])
    of_logprob, of_entropy = tensor(data["upstream_logp"]), tensor(data["upstream_entropy"])
    total = (of_logprob * ours.logprobs + of_entropy * ours.entropy).sum()
    same("log-prob", ours.logprobs, case["logps"], FLOAT32_SUMS)
    same("entropy", ours.entropy, case["entropy"], FLOAT32_SUMS)
    for name in ("hidden", "weight"):
        theirs = case[f"grad_{name}"]
        same(f"grad_{name}", gradient(total, leaves[name]), theirs, FLOAT32_SUMS)


# ------------------------------------------------------------------ PPO


PPO_CASES = {
    f"clip{case['config']['cliprange']}-{i}": case for i, case in enumerate(TRL["ppo"]["cases"])
}
PPO_QUANTITIES = [
    "policy loss",
    "value loss",
    "loss",
    "gradient",
    "gradient of values",
    "clip fraction",
]


@compared("TRL", "policy losses", PPO_CASES, PPO_QUANTITIES)
def test_ppo_losses(case, same):
    """Policy loss + vf_coef · value loss, as in train.objective.

    TRL also trains the value after the last token, so its value mask is one token longer than its
    policy mask; each loss is compared on its own mask. Ours has one mask: nothing follows the EOS,
    so its value is 0 by definition.
    """
    data, config = TRL["ppo"], case["config"]
    mask, value_mask = (~torch.tensor(data[n]) for n in ("padding_mask", "padding_mask_p1"))
    advantages, epsilon = tensor(data["advantages"]), config["cliprange"]
    old_logprobs = tensor(data["logprobs"])
    batch = plain_batch(mask, old_logprobs, advantages, old_logprobs)
    logprobs, values = (tensor(data[n]).requires_grad_() for n in ("new_logprobs", "vpred"))
    new = PolicyOutput(logprobs, torch.zeros_like(logprobs), values)
    policy, diagnostics = clip(new, batch, epsilon=epsilon)
    old_values, returns = tensor(data["values"]), tensor(data["returns"])
    value = value_loss(values, old_values, returns, config["cliprange_value"])
    weights = token_weights(mask, "token", 1)
    policy = (weights * policy)[mask].sum()
    value_with_our_mask = (weights * value)[mask].sum()
    value = (token_weights(value_mask, "token", 1) * value)[value_mask].sum()
    total = policy + config["vf_coef"] * value
    same("policy loss", policy, case["pg_loss"])
    same("value loss", value, case["vf_loss"])
    same("loss", total, case["loss"])
    same("gradient", gradient(total, logprobs), case["grad_new_logprobs"])
    same("gradient of values", gradient(total, values), case["grad_vpred"])
    clip_fraction = (weights * diagnostics["clip_fraction"])[mask].sum()
    same("clip fraction", clip_fraction, case["pg_clipfrac"], FLOAT32)
    assert (value_mask & ~mask).sum() == 4
    assert abs(float((value_with_our_mask - value).detach())) > 0.01


GAE_CASES = {label(**case["config"]): case for case in TRL["gae"]["cases"]}


@compared("TRL", "advantages", GAE_CASES, ["kl", "rewards", "raw", "advantages", "returns"])
def test_gae(case, same):
    """TRL pays the score on the slot after the last token, ours on the last token.

    So TRL's mask of values is one longer than the mask that its advantages are whitened over. Its
    whitening of rewards keeps the mean; we have none.
    """
    data, config = TRL["gae"], case["config"]
    mask, value_mask = (~torch.tensor(case[n]) for n in ("padding_mask", "padding_mask_p1"))
    kl = KL[config["kl_estimator"]](tensor(data["logprobs"]), tensor(data["ref_logprobs"])) * mask
    scores = tensor(data["scores"])
    rewards = token_rewards(scores, value_mask) - config["kl_coef"] * kl
    tolerance = {}
    if config["whiten_rewards"]:
        mean = rewards[value_mask].mean()
        rewards = whitened(rewards, value_mask) + mean * value_mask
        tolerance = {"tolerance": BESSEL32}
    same("kl", kl, case["kl"])
    same("rewards", rewards, case["rewards"], **tolerance)
    options = {"gamma": config["gamma"], "lam": config["lam"], "whiten": False}
    raw, returns = gae(rewards, tensor(case["values"]), value_mask, **options)
    theirs = tensor(case["advantages_before_whitening"])
    same("raw", raw[value_mask], theirs[value_mask], **tolerance)
    same("returns", returns[value_mask], tensor(case["returns"])[value_mask], **tolerance)
    advantages = whitened(raw, mask)
    same("advantages", advantages[mask], tensor(case["advantages"])[mask], BESSEL32)
    if not config["whiten_rewards"]:
        ours = token_rewards(scores, mask)
        assert ours[~mask].eq(0).all()
        torch.testing.assert_close(ours.sum(1), scores)
        # of the responses that do not fill the row
        assert tensor(case["rewards"])[~mask].ne(0).sum() == 4


@compared("TRL", "advantages", {"helper": TRL["whitened"]}, ["whitened", "with its mean"])
def test_whitening(case, same):
    x, mask = tensor(case["values"]), torch.tensor(case["mask"])
    ours = whitened(x, mask)
    with_mean = ours + x[mask].mean()
    theirs = {n: tensor(case[n]) for n in ("masked_whiten", "masked_whiten_keep_mean")}
    same("whitened", ours[mask], theirs["masked_whiten"][mask], BESSEL32)
    same("with its mean", with_mean[mask], theirs["masked_whiten_keep_mean"][mask], BESSEL32)
