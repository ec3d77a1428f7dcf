"""Our functions against frozen numbers of TRL 1.16, in float64: tests/golden/reading.py, docs/oracles.md.

Where we differ on purpose the test says why, and pins what both sides give.
"""

import torch
from golden.reading import BESSEL32, FLOAT32, FLOAT32_SUMS, TRL, compared, gradient, label, plain_batch, tensor

from rlkl.advantages import dr_grpo, gae, grpo, rloo, whitened
from rlkl.kl import KL, KL_LOSSES
from rlkl.logprobs import token_logprobs
from rlkl.losses import LOSSES, clipped_surrogate, clipped_tokens, clipped_value_loss, importance_ratio, token_weights
from rlkl.metrics import describe
from rlkl.mismatch import truncated_ratio
from rlkl.rewards import token_rewards
from rlkl.selectors import SELECTORS
from rlkl.types import Batch, Evaluation, Head


def trl_batch(name: str) -> tuple[Evaluation, Batch]:
    """Without old log-probs (`onpolicy`) TRL takes the current ones, detached."""
    raw = TRL["batches"][name]
    mask = tensor(raw["mask"]).bool()
    old, advantages = tensor(raw["old_logps"] or raw["logps"]), tensor(raw["advantages"])[:, None].expand(mask.shape)
    batch = plain_batch(mask, old, advantages, old)
    batch.ref_logprobs, batch.old_entropy = tensor(raw["ref_logps"]), tensor(raw["entropies"])
    return Evaluation(*(tensor(raw[n]).requires_grad_() for n in ("logps", "entropies"))), batch


def loss_cases(*wanted: str) -> dict[str, dict]:
    """TRL's cases of these loss types, their config completed by TRL's defaults."""
    whole = {c["id"]: c | {"config": TRL["defaults"] | c["config"]} for c in TRL["losses"]}
    return {f"{n}-{label(b=c['batch'], l=c['config']['loss_type'])}": c for n, c in whole.items()
        if c["config"]["loss_type"] in wanted}


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
METRICS = {"kl": "kl", "clip_ratio/region_mean": "clip fraction", "policy_loss": "policy loss",
    "clip_ratio/low_mean": "clipped below", "clip_ratio/high_mean": "clipped above", "cispo_clip_ratio": "capped"}


def quantities(c: dict) -> list[str]:
    return ["loss", "gradient", *(["gradient of entropy"] if "grad_entropies" in c else []),
        *(name for key, name in METRICS.items() if key in c["metrics"])]


def by_reply(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(B, 1) mean log-ratio of each reply, differentiable."""
    moved = (logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0)
    return moved.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp_min(1)


def policy_loss(c: dict, new: Evaluation, batch: Batch) -> torch.Tensor:
    """(B, T) by the loss of ours that TRL's name and options stand for."""
    config, name = c["config"], c["config"]["loss_type"]
    clip = {"clip": config["epsilon"], "clip_high": config["epsilon_high"] or config["epsilon"]}
    by_sequence = config["importance_sampling_level"] == "sequence"
    if name in CLIPPED:
        if by_sequence and not config["delta"]:
            return LOSSES["gspo"](new, batch, **clip)[0]
        if config["delta"]:
            return LOSSES["dual_clip"](new, level(new, batch, by_sequence), **clip, cap=config["delta"])[0]
        return LOSSES["grpo"](new, batch, **clip)[0]
    options = {"cispo": {"cap": config["epsilon_high"]}, "sapo": {"tau_negative": float(torch.tensor(1.05))}}
    batch = level(new, batch, by_sequence and name != "vespo")
    return LOSSES[name](new, batch, **options.get(name, {}))[0]


def level(new: Evaluation, batch: Batch, by_sequence: bool) -> Batch:
    """With pi_old moved so that each token's ratio is its reply's, as in GSPO's token form."""
    if not by_sequence:
        return batch
    moved = plain_batch(batch.mask, batch.old_logprobs, batch.advantages, batch.old_logprobs)
    moved.old_logprobs = (new.logprobs - by_reply(new.logprobs, batch)).detach()
    return moved


def kl_term(c: dict, new: Evaluation, batch: Batch) -> torch.Tensor:
    """k3, or by default k3 times the ratio: our wk3_token. TRL's ratio of a reply has a gradient through its mean."""
    if not c["config"]["use_bias_correction_kl"]:
        return KL_LOSSES["k3"](new, batch)
    if c["config"]["importance_sampling_level"] == "sequence":
        mean = by_reply(new.logprobs, batch)
        return importance_ratio(mean, torch.zeros_like(mean)) * KL_LOSSES["k3"](new, batch)
    return KL_LOSSES["wk3_token"](new, batch)


def denominators(c: dict, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weights and the number of accumulation steps. The denominators are ours to give."""
    config, name, tokens = c["config"], c["config"]["loss_type"], int(batch.mask.sum())
    steps = config["grad_accum"] if config["mode"] == "train" else 1
    if name in ("dapo", "cispo", "vespo"):
        counted = config["num_items_in_batch"] or TRL["batches"][c["batch"]]["num_items_in_batch"]
        if config["mode"] == "train":
            counted = counted * steps / config["steps_per_generation"]
        return token_weights(batch.mask, "token", 1, totals=(1, counted)), steps
    how = {"grpo": "sequence", "sapo": "sequence", "bnpo": "token"}.get(name, "constant")
    length = 1 if name == "luspo" else config["max_completion_length"]
    return token_weights(batch.mask, how, length, totals=(steps * len(batch), steps * tokens)), steps


def check_loss(c: dict, same) -> None:
    config, (new, batch) = c["config"], trl_batch(c["batch"])
    mask, w, steps = batch.mask, *denominators(c, batch)
    a = batch.advantages
    if config["vllm_is"]:
        factor = tensor(c["importance_sampling_ratio"]).expand(mask.shape)
        if config["loss_type"] == "vespo":
            batch.old_logprobs = batch.old_logprobs - factor.log()
        else:
            batch.advantages = batch.advantages * factor
    loss = policy_loss(c, new, batch)
    chosen = mask
    if config["top_entropy_quantile"] < 1:
        chosen = most_uncertain(config["top_entropy_quantile"], batch)
        loss = loss.masked_fill(~chosen, 0.0)
    kl = kl_term(c, new, batch)
    loss = loss + config["beta"] * kl
    policy = (w * loss)[mask].sum()
    total = policy
    if config["entropy_coef"]:
        of_entropy = token_weights(chosen, "token", 1, totals=(1, steps * int(chosen.sum())))
        total = total - (config["entropy_coef"] * of_entropy * new.entropy)[mask].sum()
        same("gradient of entropy", gradient(total, new.entropy), c["grad_entropies"])
        assert tensor(c["grad_entropies"])[mask & ~chosen].eq(0).all()
    same("loss", total, c["loss"])
    same("gradient", gradient(total, new.logprobs), c["grad_logps"])
    if config["loss_type"] not in ("dapo", "cispo", "vespo"):
        policy = policy * steps  # which TRL logs before it divides by them
    measured = {"kl": kl[mask].mean(), "policy loss": policy}
    measured |= measure(c, new, batch, a)
    for key, name in METRICS.items():
        if key in c["metrics"]:
            same(name, measured[name], c["metrics"][key], FLOAT32)


def measure(c: dict, new: Evaluation, batch: Batch, a: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fractions of clipped tokens, or of clipped replies where the ratio is a reply's."""
    config, mask = c["config"], batch.mask
    low, high = config["epsilon"], config["epsilon_high"] or config["epsilon"]
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    if config["importance_sampling_level"] == "sequence":
        ratio, a, mask = by_reply(new.logprobs, batch).exp(), a[:, :1], torch.ones(len(a), 1, dtype=torch.bool)
    clipped = clipped_tokens(ratio, a, low, high)
    parts = {"clip fraction": clipped, "clipped below": clipped * (a < 0), "clipped above": clipped * (a > 0),
        "capped": ((ratio > high) & (a > 0)).double()}
    return {n: x[mask].mean() for n, x in parts.items()}


def most_uncertain(quantile: float, batch: Batch) -> torch.Tensor:
    """As many as TRL takes: those at or above an interpolated quantile, so 8 of 31 tokens at .25. Ours takes
    floor(.25 · 31) = 7, the same but the last."""
    n = int(batch.mask.sum())
    theirs = n - 1 - int((1 - quantile) * (n - 1) - 1e-9)
    ours = SELECTORS["top_entropy"](batch, batch.old_entropy, fraction=quantile)
    chosen = SELECTORS["top_entropy"](batch, batch.old_entropy, fraction=(theirs + 0.5) / n)
    assert (int(ours.sum()), int(chosen.sum())) == {0.25: (7, 8), 0.55: (17, 17)}[quantile]
    assert (ours <= chosen).all()
    return chosen


@compared("TRL", "policy losses", loss_cases("grpo", "bnpo", "dr_grpo"), quantities)
def test_grpo_bnpo_and_dr_grpo(c, same):
    """Clip-higher, `delta` (our cap), GSPO's ratio of a reply, k3 in the loss with and without the ratio, an entropy
    bonus, the most uncertain tokens only, vLLM's importance weights folded into A, and accumulation over two steps.

    TRL's entropy bonus is a mean over tokens whatever the loss is, and over the most uncertain ones where only those
    are trained: so it has weights of its own here. Its KL has neither weights nor that mask."""
    check_loss(c, same)


@compared("TRL", "policy losses", loss_cases("dapo", "cispo", "vespo"), quantities)
def test_dapo_cispo_and_vespo(c, same):
    """As above, over a number of tokens that TRL counts. `vllm_is` enters VESPO's W: pi_old becomes the sampler."""
    check_loss(c, same)


@compared("TRL", "policy losses", loss_cases("sapo", "luspo"), quantities)
def test_sapo_and_luspo(c, same):
    """SAPO's τ is a float32. LUSPO is a sum over the reply and a mean over replies: constant weights with L = 1."""
    check_loss(c, same)


def with_our_totals(c: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient with our own count of rows and tokens, 2 equal micro-batches to a step if TRL accumulates."""
    new, batch = trl_batch(c["batch"])
    how = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant", "luspo": "constant"}
    length = 1 if c["config"]["loss_type"] == "luspo" else c["config"]["max_completion_length"]
    loss = policy_loss(c, new, batch) + c["config"]["beta"] * kl_term(c, new, batch)
    w = token_weights(batch.mask, how.get(c["config"]["loss_type"], "token"), length) / c["config"]["grad_accum"]
    return gradient((w * loss)[batch.mask].sum(), new.logprobs), batch.mask


EMPTY = {n: c for n, c in loss_cases("grpo", "dr_grpo", "sapo", "luspo").items() if c["batch"] == "masked_rows"}
WINDOWS = {n: c for n, c in loss_cases("dapo", "cispo", "vespo").items() if c["config"]["steps_per_generation"] == 4}


@compared("TRL", "policy losses", EMPTY, ["ours"])
def test_rows_without_a_token(c, same):
    """TRL divides by all 6 rows, ours by the 4 that have a token: a masked reply makes no other count less."""
    ours, mask = with_our_totals(c)
    assert (len(mask), int(mask.any(1).sum())) == (6, 4)
    same("ours", ours * 4 / 6, c["grad_logps"])


@compared("TRL", "policy losses", WINDOWS, ["ours"])
def test_steps_of_a_longer_window(c, same):
    """Of a generation trained on in 4 parts, 2 of which make a step, TRL divides by 2/4 of the window's 100 tokens,
    ours by the 62 that the step has."""
    ours, mask = with_our_totals(c)
    assert (2 * int(mask.sum()), c["config"]["num_items_in_batch"]) == (62, 100)
    same("ours", ours * 62 / 50, c["grad_logps"])


@compared("TRL", "mismatch", {c["config"]["vllm_is"]: c for c in loss_cases("grpo").values() if c["config"]["vllm_is"]},
    ["ratio"])
def test_importance_ratio(c, same):
    """What TRL calls vLLM's correction: pi_old/mu of a token, or its product over the reply, at most 3."""
    _, batch = trl_batch(c["batch"])
    batch.sampler_logprobs = tensor(TRL["batches"][c["batch"]]["sampling_logps"])
    theirs = tensor(c["importance_sampling_ratio"]).expand(batch.mask.shape)
    same("ratio", truncated_ratio(batch, c["config"]["vllm_is"], 3.0)[batch.mask], theirs[batch.mask])


@compared("TRL", "policy losses", {f"{c['batch']}-{c['config']['epsilon_high']}": c for c in TRL["rloo"]["losses"]},
    ["loss", "gradient", "clip fraction"])
def test_rloo_loss(c, same):
    """The ratio is the reply's, a product and not a mean: our clipped surrogate of the summed log-probs."""
    new, batch = trl_batch(c["batch"])
    low, high = c["config"]["epsilon"], c["config"]["epsilon_high"]
    now, old = ((x.masked_fill(~batch.mask, 0.0)).sum(1) for x in (new.logprobs, batch.old_logprobs))
    a = tensor(TRL["batches"][c["batch"]]["advantages"])
    loss, ratio = clipped_surrogate(now, old, a, low, high)
    same("loss", loss.mean(), c["loss"])
    same("gradient", gradient(loss.mean(), new.logprobs), c["grad_logps"])
    same("clip fraction", clipped_tokens(ratio, a, low, high).mean(), c["metrics"]["clip_ratio/region_mean"], FLOAT32)


def normalised(scores: torch.Tensor, size: int, scale: str) -> torch.Tensor:
    """Our grpo with TRL's epsilon; a reply that nobody could score (nan) is not in its group, and gets 0."""
    known = ~scores.isnan()
    found = torch.zeros_like(scores)
    for start in range(0, len(scores), size):
        rows = torch.arange(start, start + size)[known[start : start + size]]
        one, mask = scores[rows][:, None], torch.ones(len(rows), 1, dtype=torch.bool)
        if scale == "group" and len(rows) > 1:
            std = scores[rows].std()
            found[rows] = grpo(one, None, mask, group_size=len(rows))[0][:, 0] * (std + 1e-6) / (std + 1e-4)
        elif len(rows):
            found[rows] = dr_grpo(one, None, mask, group_size=len(rows))[0][:, 0]
    if scale == "batch":
        found = found / (scores[known].std() + 1e-4)
        if known.all():  # and in one call
            one = scores[:, None]
            ours = grpo(one, None, torch.ones_like(one, dtype=torch.bool), group_size=size, scale="batch")[0][:, 0]
            torch.testing.assert_close(found, ours * (scores.std() + 1e-6) / (scores.std() + 1e-4))
    return found


@compared("TRL", "advantages", {c["id"]: c for c in TRL["advantages"]}, ["advantages"])
def test_group_advantages(c, same):
    """TRL adds 1e-4 to the std, we 1e-6: compared after changing one for the other. Several reward functions are summed
    by their weights, before or (GDPO) after each is normalised."""
    config, size = c["config"], c["config"]["num_generations"]
    each = tensor([[float("nan") if x is None else x for x in row] for row in c["rewards_per_func"]])
    w, scale = tensor(config["reward_weights"]), config["scale_rewards"]
    nobody = each.isnan().all(1)
    if config["multi_objective_aggregation"] == "sum_then_normalize":
        scores = (each.nan_to_num() * w).sum(1).masked_fill(nobody, float("nan"))
        got = normalised(scores, size, scale)
        if not nobody.any() and scale == "group":
            one, mask = scores[:, None], torch.ones(len(scores), 1, dtype=torch.bool)
            ours = grpo(one, None, mask, group_size=size)[0][:, 0]
            assert 2e-5 < (ours - got).abs().max() < 1e-2  # of 1e-4 and 1e-6
    else:
        parts = torch.stack([normalised(column, size, scale) for column in each.T], 1)
        total = (parts * w).sum(1)
        known = total[~nobody]
        got = ((total - known.mean()) / (known.std() + 1e-4)).masked_fill(nobody, 0.0)
    same("advantages", got, c["advantages_f32"], FLOAT32)


KNOWN = {c["id"]: c for c in TRL["advantages"] if not any(x is None for row in c["rewards_per_func"] for x in row)}


def by_group(c: dict) -> bool:
    config = c["config"]
    return config["scale_rewards"] != "batch" and config["multi_objective_aggregation"] != "normalize_then_sum"


@compared("TRL", "metrics", KNOWN, lambda c: ["reward", "std", *(["unanimous"] if by_group(c) else [])])
def test_metrics(c, same):
    """TRL's std of the reward is Bessel's, ours is not. Where it divides by the batch's std it counts no group as
    unanimous, ours counts those whose scores are equal."""
    scores = (tensor(c["rewards_per_func"]) * tensor(c["config"]["reward_weights"])).sum(1)
    mask = torch.ones(len(scores), 1, dtype=torch.bool)
    batch = plain_batch(mask, scores[:, None], scores[:, None], scores[:, None])
    row, theirs = describe(batch, scores, {}, c["config"]["num_generations"]), c["metrics"]
    same("reward", row["reward"], theirs["reward"], FLOAT32)
    same("std", row["reward_std"] * (12 / 11) ** 0.5, theirs["reward_std"], FLOAT32)
    if by_group(c):
        same("unanimous", row["unanimous"], theirs["frac_reward_zero_std"], FLOAT32)
    else:
        assert theirs["frac_reward_zero_std"] == 0


def rloo_id(config: dict) -> str:
    return label(g=config["num_generations"], beta=config["beta"], white=config["normalize_advantages"],
        clip=config["reward_clip_range"])


@compared("TRL", "advantages", {rloo_id(c["config"]): c for c in TRL["rloo"]["advantages"]}, ["advantages"])
def test_rloo_with_a_kl_in_the_reward(c, same):
    """k1 on every token is paid before the baseline is taken; TRL sums it over the reply first, which is the same. It
    may clip the scores before, and divide by the batch's std + 1e-4 after."""
    data, config = TRL["rloo"], c["config"]
    logprobs, ref = (tensor(data[n]) for n in ("advantage_logps_f32", "advantage_ref_logps_f32"))
    mask = torch.arange(logprobs.shape[1]) < tensor(data["advantage_lens"])[:, None]
    scores = tensor(data["advantage_rewards"])[:, 0]
    if config["reward_clip_range"]:
        scores = scores.clamp(*config["reward_clip_range"])
    rewards = token_rewards(scores, mask) - config["beta"] * KL["k1"](logprobs, ref)
    got = rloo(rewards, None, mask, group_size=config["num_generations"])[0][:, 0]
    if config["normalize_advantages"]:
        got = (got - got.mean()) / (got.std() + 1e-4)
    same("advantages", got, c["advantages_f32"], FLOAT32)


# Log-probs
@compared("TRL", "log-probs", {label(t=c["temperature"], rows=c["row_mask"]): c for c in TRL["logprob"]["cases"]},
    ["log-prob", "entropy", "gradient"])
def test_token_logprobs(c, same):
    """Of logits, which are hidden states under an identity for a head. TRL computes masked rows as zeros."""
    data = TRL["logprob"]
    keep = tensor(data["row_mask"]).bool().flatten() if c["row_mask"] else torch.ones(6, dtype=torch.bool)
    logits, ids = tensor(data["logits"]).flatten(0, 1).requires_grad_(), torch.tensor(data["index"]).flatten()
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    got = token_logprobs(logits[keep], head, ids[keep], temperature=c["temperature"])
    up, up_entropy = (tensor(data[n]).flatten()[keep] for n in ("upstream_logp", "upstream_entropy"))
    total = (up * got.logprobs).sum() + (up_entropy * got.entropy).sum()
    same("log-prob", got.logprobs, tensor(c["logps"]).flatten()[keep])
    same("entropy", got.entropy, tensor(c["entropy"]).flatten()[keep])
    same("gradient", gradient(total, logits), tensor(c["grad_logits"]).flatten(0, 1))


def head_id(c: dict) -> str:
    return label(t=c["temperature"], chunk=c["chunk_size"], bias=c["bias"], cap=c["final_logit_softcapping"])


@compared("TRL", "log-probs", {head_id(c): c for c in TRL["heads"]["cases"]},
    ["log-prob", "entropy", "grad_hidden", "grad_weight"])
def test_chunked_head(c, same):
    """TRL's chunked unembedding, which is float32: with and without bias and soft cap."""
    data = TRL["heads"]
    leaves = {n: tensor(data[f"{n}_f32"]).requires_grad_() for n in ("hidden", "weight", "bias")}
    head = Head(leaves["weight"], leaves["bias"] if c["bias"] else None, softcap=c["final_logit_softcapping"])
    got = token_logprobs(leaves["hidden"], head, torch.tensor(data["targets"]), temperature=c["temperature"])
    total = (tensor(data["upstream_logp"]) * got.logprobs + tensor(data["upstream_entropy"]) * got.entropy).sum()
    same("log-prob", got.logprobs, c["logps"], FLOAT32_SUMS)
    same("entropy", got.entropy, c["entropy"], FLOAT32_SUMS)
    for name in ("grad_hidden", "grad_weight"):
        same(name, gradient(total, leaves[name.removeprefix("grad_")]), c[name], FLOAT32_SUMS)


# PPO
@compared("TRL", "policy losses", {f"clip{c['config']['cliprange']}-{i}": c for i, c in enumerate(TRL["ppo"]["cases"])},
    ["policy loss", "value loss", "loss", "gradient", "gradient of values", "clip fraction"])
def test_ppo_losses(c, same):
    """TRL's value mask is one token longer than its policy mask, as it also trains the value after the last token; each
    loss is compared on its own mask. Ours has one mask: nothing follows the EOS, so its value is 0 by definition."""
    data, config = TRL["ppo"], c["config"]
    mask, value_mask = (~torch.tensor(data[n]) for n in ("padding_mask", "padding_mask_p1"))
    logprobs, values = (tensor(data[n]).requires_grad_() for n in ("new_logprobs", "vpred"))
    a, clip = tensor(data["advantages"]), config["cliprange"]
    policy, ratio = clipped_surrogate(logprobs, tensor(data["logprobs"]), a, clip, clip)
    value = clipped_value_loss(values, tensor(data["values"]), tensor(data["returns"]), config["cliprange_value"])
    w = token_weights(mask, "token", 1)
    policy = (w * policy)[mask].sum()
    ours = (w * value)[mask].sum()
    value = (token_weights(value_mask, "token", 1) * value)[value_mask].sum()
    total = policy + config["vf_coef"] * value
    same("policy loss", policy, c["pg_loss"])
    same("value loss", value, c["vf_loss"])
    same("loss", total, c["loss"])
    same("gradient", gradient(total, logprobs), c["grad_new_logprobs"])
    same("gradient of values", gradient(total, values), c["grad_vpred"])
    clipped = (w * clipped_tokens(ratio, a, clip, clip))[mask].sum()
    same("clip fraction", clipped, c["pg_clipfrac"], FLOAT32)
    assert (value_mask & ~mask).sum() == 4
    assert abs(float((ours - value).detach())) > 0.01


@compared("TRL", "advantages", {label(**c["config"]): c for c in TRL["gae"]["cases"]},
    ["kl", "rewards", "raw", "advantages", "returns"])
def test_gae(c, same):
    """TRL pays the score on the slot after the last token, and so its values' mask is one longer than the one its
    advantages are whitened over; ours pays it on the last token. Its reward whitening keeps the mean; we have none."""
    data, config = TRL["gae"], c["config"]
    mask, longer = (~torch.tensor(c[n]) for n in ("padding_mask", "padding_mask_p1"))
    kl = KL[config["kl_estimator"]](tensor(data["logprobs"]), tensor(data["ref_logprobs"])) * mask
    scores = tensor(data["scores"])
    rewards = token_rewards(scores, longer) - config["kl_coef"] * kl
    tolerance = {}
    if config["whiten_rewards"]:
        rewards, tolerance = whitened(rewards, longer) + rewards[longer].mean() * longer, {"tolerance": BESSEL32}
    same("kl", kl, c["kl"])
    same("rewards", rewards, c["rewards"], **tolerance)
    options = {"gamma": config["gamma"], "lam": config["lam"], "whiten": False}
    raw, returns = gae(rewards, tensor(c["values"]), longer, **options)
    same("raw", raw[longer], tensor(c["advantages_before_whitening"])[longer], **tolerance)
    same("returns", returns[longer], tensor(c["returns"])[longer], **tolerance)
    same("advantages", whitened(raw, mask)[mask], tensor(c["advantages"])[mask], BESSEL32)
    if not config["whiten_rewards"]:
        ours = token_rewards(scores, mask)
        assert ours[~mask].eq(0).all()
        torch.testing.assert_close(ours.sum(1), scores)
        assert tensor(c["rewards"])[~mask].ne(0).sum() == 4  # the replies that do not fill the row


@compared("TRL", "advantages", {"helper": TRL["whitened"]}, ["whitened", "with its mean"])
def test_whitening(c, same):
    x, mask = tensor(c["values"]), torch.tensor(c["mask"])
    same("whitened", whitened(x, mask)[mask], tensor(c["masked_whiten"])[mask], BESSEL32)
    same("with its mean", (whitened(x, mask) + x[mask].mean())[mask], tensor(c["masked_whiten_keep_mean"])[mask],
        BESSEL32)
