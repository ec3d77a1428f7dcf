"""Our functions against frozen numbers of TRL, verl and NeMo-RL (tests/golden/freeze.py picked them), in float64.

Where we differ on purpose the test says why, and pins what both sides give.
"""

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rlkl.advantages import dr_grpo, gae, grpo, opo, reinforce_pp, reinforce_pp_baseline, remax, rloo, whitened
from rlkl.kl import KL, KL_LOSSES, proportional
from rlkl.losses import LOSSES, clipped_surrogate, clipped_tokens, clipped_value_loss, token_weights
from rlkl.rewards import token_rewards
from rlkl.types import Batch, Evaluation

TRL, VERL, NEMO = (
    json.loads((Path(__file__).parent / "golden" / f"{n}.json").read_text()) for n in ("trl", "verl", "nemo")
)
EXACT = {"atol": 1e-9, "rtol": 1e-9}
EPS_1E_8 = {"atol": 2e-8, "rtol": 2e-8}  # verl divides a reply's sum by its length + 1e-8
BESSEL32 = {"atol": 1e-7, "rtol": 1e-7}  # TRL takes n / (n - 1) in float32
FLOAT32 = {"atol": 2e-6, "rtol": 2e-6}  # what TRL computes in float32, whatever it is given


def tensor(x: list) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def same(got: torch.Tensor, expected: object, tolerance: dict = EXACT) -> None:
    expected = expected if isinstance(expected, torch.Tensor) else tensor(expected)
    torch.testing.assert_close(got.detach().double(), expected, **tolerance)


class Inputs:
    """verl's and NeMo-RL's fixed inputs by name, float64, garbage behind the mask."""

    def __init__(self, name: str) -> None:
        raw = VERL["inputs"][name]
        self.mask = tensor(raw["response_mask"]).bool()
        self.groups = [slice(a, b) for a, b in pairwise([*starts(raw["groups"]), len(raw["groups"])])]
        self.x = {n: tensor(x) for n, x in raw.items() if n != "groups"}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.x[name]

    def grouped(self, estimator, rewards: torch.Tensor) -> torch.Tensor:
        """One number a reply, prompt by prompt: their groups are of 1, 2 and 3 samples."""
        parts = [
            estimator(rewards[rows], None, self.mask[rows], group_size=rows.stop - rows.start)[0]
            for rows in self.groups
        ]
        return torch.cat(parts)[:, 0]


def starts(names: list[str]) -> list[int]:
    return [i for i, n in enumerate(names) if i == 0 or names[i - 1] != n]


@pytest.fixture(params=["padded", "edge"])
def case(request):
    return request.param, Inputs(request.param), VERL["results"][request.param]


# verl
def test_gae_of_verl(case):
    """Raw and whitened advantages and returns, score-only and dense rewards."""
    _, inputs, result = case
    assert len(result["gae"]) == 5
    for c in result["gae"]:
        options = {"gamma": c["gamma"], "lam": c["lam"]}
        raw, returns = gae(inputs[c["rewards"]], inputs["values"], inputs.mask, whiten=False, **options)
        white, _ = gae(inputs[c["rewards"]], inputs["values"], inputs.mask, **options)
        same(raw, tensor(c["advantages_raw_masked"]) * inputs.mask)
        same(white[inputs.mask], tensor(c["advantages_whitened"])[inputs.mask])
        same(returns[inputs.mask], tensor(c["returns"])[inputs.mask])


@pytest.mark.parametrize("ours", [grpo, dr_grpo, rloo, opo], ids=lambda f: f.__name__)
def test_group_estimators_of_verl(case, ours):
    """A singleton group keeps its raw score in verl (0.7: dr_grpo, rloo and opo; 0.7/(1 + 1e-6): grpo); ours is 0, as
    nothing can be learned from comparing a reply with itself."""
    name, inputs, result = case
    theirs = tensor(result["group"]["dr_grpo(no std)" if ours is dr_grpo else ours.__name__])
    got = inputs.grouped(ours, inputs["outcome_rewards"])
    alone = torch.tensor([rows.stop - rows.start == 1 for rows in inputs.groups for _ in range(*rows.indices(99))])
    same(got[~alone], theirs[~alone])
    assert alone.any() == (name == "edge")
    assert got[alone].eq(0).all()
    assert theirs[alone].tolist() == pytest.approx([0.7] * int(alone.sum()), abs=1e-6)


@pytest.mark.parametrize("gamma", ["1", "0.9"])
@pytest.mark.parametrize("paid", ["outcome_rewards", "dense_rewards"])
def test_reinforce_pp_of_verl(case, gamma, paid):
    _, inputs, result = case
    got = reinforce_pp(inputs[paid], None, inputs.mask, gamma=float(gamma))[0]
    same(got, result["credit"][f"reinforce_plus_plus|gamma={gamma}|{paid}"])


def test_reinforce_pp_baseline_of_verl(case):
    """Its groups are of 3, 3 and 2 samples. In `edge` the first two are degenerate: verl whitens a singleton's raw
    score, and gives a unanimous group minus the mean over all tokens, where ours is exactly 0."""
    name, inputs, result = case
    theirs = tensor(result["credit"]["reinforce_plus_plus_baseline"])
    if name == "padded":
        centred = inputs.grouped(dr_grpo, inputs["outcome_rewards"])[:, None] * inputs.mask
        same(whitened(centred, inputs.mask), theirs)  # all groups, of unequal size, by the two parts it is made of
        first = inputs.mask[:6], inputs["outcome_rewards"][:6]
        same(reinforce_pp_baseline(first[1], None, first[0], group_size=3)[0], whitened(centred[:6], first[0]))
    else:
        unanimous = inputs.mask[1:4]
        assert theirs[1:4][unanimous].abs().min() > 0.1
        got, _ = reinforce_pp_baseline(inputs["outcome_rewards"][1:], None, inputs.mask[1:], group_size=3)
        assert got[:3].eq(0).all()
        assert got[3:].abs().sum() > 1


def test_remax_of_verl(case):
    _, inputs, result = case
    baseline = inputs["reward_baselines"][:, None].expand(inputs.mask.shape)
    for paid in ("outcome_rewards", "dense_rewards"):
        theirs = tensor(result["credit"][f"remax|{paid}"])
        same(remax(inputs[paid], baseline, inputs.mask)[0][inputs.mask], theirs[inputs.mask])


WEIGHTS = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum-norm": "constant"}


def tolerance_of(agg: str) -> dict:
    return EPS_1E_8 if agg == "seq-mean-token-mean" else EXACT


def weights(mask: torch.Tensor, agg: str) -> torch.Tensor:
    """verl's norm is the width of the padded batch, and its seq-mean-token-sum has no norm: constant with L = 1."""
    return token_weights(mask, WEIGHTS.get(agg, "constant"), 1 if agg == "seq-mean-token-sum" else mask.shape[1])


def test_aggregation_of_verl(case):
    _, inputs, result = case
    assert set(result["aggregation"]) == {*WEIGHTS, "seq-mean-token-sum"}
    for agg, value in result["aggregation"].items():
        total = (weights(inputs.mask, agg) * inputs["advantages"])[inputs.mask].sum()
        same(total, torch.tensor(value, dtype=torch.float64), tolerance_of(agg))


def test_clipped_surrogate_of_verl(case):
    """Value and gradient: ε .2, clip-higher .28 and ε .1, in three aggregations.

    verl clips dually: where A < 0 the loss is at most -c A (c = 3, or 10), and its gradient 0 beyond. Ours is PPO's, so
    those tokens are taken out of the gradient's comparison, and the excess of the loss, (w - c)·|A|, out of its value.
    """
    _, inputs, result = case
    assert len(result["surrogate"]) == 9
    a, mask = inputs["advantages"], inputs.mask
    for c in result["surrogate"]:
        logprobs = inputs["log_prob"].clone().requires_grad_()
        low, high = (c["config"].get(f"clip_ratio_{side}", 0.2) for side in ("low", "high"))
        loss, ratio = clipped_surrogate(logprobs, inputs["old_log_prob"], a, low, high)
        w, bound = weights(mask, c["agg"]), c["config"].get("clip_ratio_c", 3.0)
        dual = (a < 0) & (ratio > bound) & mask
        total = (w * loss)[mask].sum()
        excess = (w * (ratio - bound) * a.abs())[dual].sum()
        same(total - excess, torch.tensor(c["value"], dtype=torch.float64), tolerance_of(c["agg"]))
        (g,) = torch.autograd.grad(total, logprobs)
        same(g[mask & ~dual], tensor(c["grad"])[mask & ~dual], tolerance_of(c["agg"]))
        assert tensor(c["grad"])[dual].eq(0).all()
        assert g[dual].ne(0).all()


OPTIONS = {"clip_ratio_low": "clip", "clip_ratio_high": "clip_high", "clip_ratio_c": "cap", "tau_pos": "tau"}
OPTIONS |= {"tau_neg": "tau_negative"}


def verl_batch(inputs: Inputs, advantages: torch.Tensor) -> tuple[Evaluation, Batch]:
    mask, old = inputs.mask, inputs["old_log_prob"]
    batch = Batch(mask.long(), mask, mask.long(), mask, old, mask[:, -1], old_logprobs=old, advantages=advantages)
    logprobs = inputs["log_prob"].clone().requires_grad_()
    return Evaluation(logprobs, torch.zeros_like(logprobs)), batch


@pytest.mark.parametrize(
    ("theirs", "ours", "cases"),
    [
        ("gspo", "gspo", 2),
        ("geo_mean", "gmpo", 4),
        ("cispo", "cispo", 2),
        ("sapo", "sapo", 2),
        ("gpg", "reinforce", 1),
        ("dppo_tv", "dppo_tv", 2),
        ("dppo_kl", "dppo_kl", 2),
    ],
)
def test_policy_losses_of_verl(case, theirs, ours, cases):
    """Value and gradient; in `edge` two tokens are 25.5 and -24.5 nats away. CISPO only where its lower clip is off
    (1 - 10 < 0): then 1 + clip_ratio_high is our cap. DPPO's rollout and old policies are one policy there."""
    _, inputs, result = case
    chosen = [c for c in result["losses"] if c["loss"] == theirs]
    assert len(chosen) == cases
    for c in chosen:
        options = {OPTIONS[k]: v for k, v in c["config"].items()}
        if ours == "cispo":
            options = {"cap": 1 + c["config"]["clip_ratio_high"]}
        new, batch = verl_batch(inputs, inputs[c["advantages"]])
        loss, _ = LOSSES[ours](new, batch, **options)
        total = (weights(inputs.mask, c["agg"]) * loss)[inputs.mask].sum()
        same(total, torch.tensor(c["value"], dtype=torch.float64), tolerance_of(c["agg"]))
        same(torch.autograd.grad(total, new.logprobs)[0], c["grad"], tolerance_of(c["agg"]))


def test_value_loss_of_verl(case):
    """Value and gradient at ε_v = .05, .2, .5 and 1e9 (none)."""
    _, inputs, result = case
    assert {c["cliprange_value"] for c in result["value"]} == {0.05, 0.2, 0.5, 1e9}
    for c in result["value"]:
        values = inputs["vpreds"].clone().requires_grad_()
        loss = clipped_value_loss(values, inputs["values"], inputs["returns"], c["cliprange_value"])
        total = (weights(inputs.mask, c["agg"]) * loss)[inputs.mask].sum()
        same(total, torch.tensor(c["value"], dtype=torch.float64), tolerance_of(c["agg"]))
        same(torch.autograd.grad(total, values)[0], c["grad"], tolerance_of(c["agg"]))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators_of_verl(case, name):
    """Value and gradient. verl clamps k3 to 10, which makes its gradient zero there; ours goes on, so a token that has
    left the reference by 24.5 nats is still counted (23.5) and still pulled back."""
    which, inputs, result = case
    logprobs = inputs["log_prob"].clone().requires_grad_()
    got = KL[name](logprobs, inputs["ref_log_prob"])
    (g,) = torch.autograd.grad(got.sum(), logprobs)
    theirs, their_g = (tensor(result["kl"][name][k]) for k in ("value", "grad_of_sum"))
    clamped = theirs == 10.0 if name == "k3" else torch.zeros_like(theirs, dtype=torch.bool)
    same(got[~clamped], theirs[~clamped])
    same(g[~clamped], their_g[~clamped])
    assert clamped.any() == (which == "edge" and name == "k3")
    if which == "edge" and name == "k3":
        assert float(got[0, 0].detach()) == pytest.approx(23.5, abs=1e-8)
        assert float(g[0, 0]) == pytest.approx(1.0, abs=1e-8)
        assert their_g[clamped].eq(0).all()


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_in_the_reward_of_verl(name):
    """Scores on the last token, minus 0.05 of the KL between the policy that sampled and the reference."""
    inputs, result = Inputs("padded"), VERL["results"]["padded"]
    placed = token_rewards(inputs["scores"], inputs.mask)
    same(placed, inputs["outcome_rewards"] * inputs.mask)
    paid = placed - 0.05 * KL[name](inputs["old_log_prob"], inputs["ref_log_prob"]) * inputs.mask
    theirs = tensor(result["kl_in_reward"][{"k1": "kl", "k3": "low_var_kl"}.get(name, name)])
    same(paid[inputs.mask], theirs[inputs.mask])


def test_whitening_of_verl(case):
    """Bessel variance over the mask, rsqrt(var + 1e-8)."""
    _, inputs, result = case
    same(whitened(inputs["advantages"], inputs.mask)[inputs.mask], tensor(result["whitened"])[inputs.mask])


def test_the_proportional_controller_of_verl():
    """Three runs of twenty steps."""
    assert len(VERL["adaptive_kl"]) == 3
    for run in VERL["adaptive_kl"]:
        coef = run["init"]
        assert len(run["kls"]) == 20
        for kl, after in zip(run["kls"], run["coef_after_each"], strict=True):
            coef = proportional(coef, run["target"], kl, rows=run["n_steps"], horizon=run["horizon"])
            assert coef == pytest.approx(after, rel=1e-10)


# NeMo-RL
def test_gae_of_nemo_with_a_lambda_of_its_own_for_the_critic(case):
    name, inputs, _ = case
    assert len(NEMO[name]["gae"]) == 3
    for c in NEMO[name]["gae"]:
        lam = c["gae_lambda"] if c["gae_lambda_policy"] is None else c["gae_lambda_policy"]
        options = {"gamma": c["gamma"], "lam": lam, "lam_critic": c["gae_lambda_value"]}
        rewards = token_rewards(inputs["scores"], inputs.mask)
        raw, returns = gae(rewards, inputs["values"], inputs.mask, whiten=False, **options)
        white, _ = gae(rewards, inputs["values"], inputs.mask, **options)
        same(raw[inputs.mask], tensor(c["advantages_raw"])[inputs.mask])
        same(white, c["advantages"])
        same(returns[inputs.mask], tensor(c["returns"])[inputs.mask])


def test_gae_of_nemo_with_a_lambda_that_grows_with_the_length(case):
    """VAPO's λ = 1 - 1/max(α·length, 1), α = .05 (all 0 for these short rows), .5 and 2."""
    name, inputs, _ = case
    assert [c["length_adaptive_alpha"] for c in NEMO[name]["adaptive"]] == [0.05, 0.5, 2.0]
    rewards = token_rewards(inputs["scores"], inputs.mask)
    for c in NEMO[name]["adaptive"]:
        raw, _ = gae(rewards, inputs["values"], inputs.mask, lam_alpha=c["length_adaptive_alpha"], whiten=False)
        same(raw[inputs.mask], tensor(c["advantages_raw"])[inputs.mask])


def test_group_baselines_of_nemo(case):
    """score - baseline is dr_grpo, or rloo if the reply is left out; over std + 1e-6 it is grpo. A singleton's baseline
    is its own score, so it is 0 there too."""
    name, inputs, _ = case
    everyone, others = NEMO[name]["baselines"]
    assert (everyone["leave_one_out"], others["leave_one_out"]) == (False, True)
    scores, rewards = inputs["scores"], token_rewards(inputs["scores"], inputs.mask)
    same(inputs.grouped(dr_grpo, rewards), scores - tensor(everyone["baseline"]))
    same(inputs.grouped(rloo, rewards), scores - tensor(others["baseline"]))
    same(inputs.grouped(grpo, rewards), (scores - tensor(everyone["baseline"])) / (tensor(everyone["std"]) + 1e-6))


# TRL
def trl_batch(name: str) -> tuple[Evaluation, Batch]:
    raw = TRL["batches"][name]
    mask = tensor(raw["mask"]).bool()
    old, advantages = tensor(raw["old_logps"]), tensor(raw["advantages"])[:, None].expand(mask.shape)
    batch = Batch(
        mask.long(), mask | True, mask.long(), mask, old, mask[:, -1], old_logprobs=old, advantages=advantages
    )
    batch.ref_logprobs = tensor(raw["ref_logps"])
    leaves = (tensor(raw[n]).requires_grad_() for n in ("logps", "entropies"))
    return Evaluation(*leaves), batch


def is_grpo(c: dict) -> bool:
    by_reply = c["config"]["importance_sampling_level"] == "sequence"
    return c["config"]["loss_type"] in ("grpo", "bnpo", "dr_grpo", "dapo") and not by_reply


@pytest.mark.parametrize("c", [c for c in TRL["losses"] if not is_grpo(c)], ids=lambda c: c["id"])
def test_other_losses_of_trl(c):
    """GSPO is its grpo with a ratio by reply, whose gradient goes through the mean: the same as in the token form.
    CISPO's epsilon_high is the cap; SAPO's τ is a float32. TRL counts rows without a token, so its count is passed in.
    """
    config, (new, batch) = c["config"], trl_batch(c["batch"])
    assert config["epsilon_high"] is None or config["loss_type"] == "cispo"
    name, options, how = {
        "grpo": ("gspo", {"clip": config["epsilon"], "clip_high": config["epsilon"]}, "sequence"),
        "cispo": ("cispo", {"cap": config["epsilon_high"]}, "token"),
        "sapo": ("sapo", {"tau_negative": float(torch.tensor(1.05))}, "sequence"),
    }[config["loss_type"]]
    loss, _ = LOSSES[name](new, batch, **options)
    tokens = config["num_items_in_batch"] if name == "cispo" else None
    w = token_weights(batch.mask, how, 1, totals=(len(batch), tokens or int(batch.mask.sum())))
    total = (w * loss)[batch.mask].sum()
    same(total, torch.tensor(c["loss"], dtype=torch.float64))
    same(torch.autograd.grad(total, new.logprobs)[0], c["grad_logps"])


@pytest.mark.parametrize("c", [c for c in TRL["losses"] if is_grpo(c)], ids=lambda c: c["id"])
def test_grpo_losses_of_trl(c):
    """Value and gradients of grpo, bnpo, dr_grpo and dapo: two batches, clip-higher, k3 in the loss, accumulation.

    The denominators are ours to give: TRL's grpo and dr_grpo count rows without a token, we do not, so its count of
    rows is passed in (the last lines show ours without it). With 2 accumulation steps the step has twice the rows.
    """
    config, (new, batch) = c["config"], trl_batch(c["batch"])
    tokens = int(batch.mask.sum())
    loss, _ = LOSSES["grpo"](new, batch, clip=config["epsilon"], clip_high=config["epsilon_high"], entropy_coef=0.0)
    if config["beta"]:
        loss = loss + config["beta"] * KL_LOSSES["k3"](new, batch)
    how = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}[config["loss_type"]]
    steps = config["grad_accum"]
    counted = config["num_items_in_batch"] if config["loss_type"] == "dapo" else None
    totals = (steps * len(batch), counted or steps * tokens)
    w = token_weights(batch.mask, how, config["max_completion_length"], totals=totals)
    total = (w * loss)[batch.mask].sum()
    if config[
        "entropy_coef"
    ]:  # TRL: the mean over the micro-batch's tokens whatever the loss is; so weights of its own
        of_entropy = token_weights(batch.mask, "token", 1, totals=(1, steps * tokens))
        total = total - (config["entropy_coef"] * of_entropy * new.entropy)[batch.mask].sum()
        (g,) = torch.autograd.grad(total, new.entropy, retain_graph=True)
        same(g, c["grad_entropies"])
    same(total, torch.tensor(c["loss"], dtype=torch.float64))
    same(torch.autograd.grad(total, new.logprobs)[0], c["grad_logps"])
    if c["batch"] == "masked_rows" and how != "token":
        ours = token_weights(batch.mask, how, config["max_completion_length"])
        torch.testing.assert_close(ours, w * 6 / 4)  # four of six rows have tokens


@pytest.mark.parametrize("c", TRL["advantages"], ids=lambda c: f"{c['scale_rewards']}-{c['num_generations']}")
def test_group_advantages_of_trl(c):
    """TRL adds 1e-4 to the std, we 1e-6: compared after changing one for the other. Two reward functions are two
    rewards of one reply, which are summed."""
    rewards, size = tensor(c["rewards_per_func"]), c["num_generations"]
    mask = torch.ones_like(rewards, dtype=torch.bool)
    scores = rewards.sum(1).tolist()
    if c["scale_rewards"] == "none":
        got = dr_grpo(rewards, None, mask, group_size=size)[0][:, 0]
    else:
        got = grpo(rewards, None, mask, group_size=size, scale=c["scale_rewards"])[0][:, 0]
        stds = [statistics.stdev(scores[i - i % size : i - i % size + size]) for i in range(len(scores))]
        stds = tensor(stds if c["scale_rewards"] == "group" else [statistics.stdev(scores)] * len(scores))
        got = got * (stds + 1e-6) / (stds + 1e-4)
    same(got, c["advantages_f32"], FLOAT32)


@pytest.mark.parametrize("c", TRL["rloo"]["cases"], ids=lambda c: f"{c['num_generations']}-beta{c['beta']}")
def test_rloo_of_trl_with_a_kl_in_the_reward(c):
    """k1 on every token is paid before the baseline is taken; TRL sums it over the reply first, which is the same."""
    lengths, (logprobs, ref) = (
        tensor(TRL["rloo"]["advantage_lens"]),
        (tensor(TRL["rloo"][n]) for n in ("advantage_logps_f32", "advantage_ref_logps_f32")),
    )
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    scores = tensor(TRL["rloo"]["advantage_rewards"])[:, 0]
    rewards = token_rewards(scores, mask) - c["beta"] * KL["k1"](logprobs, ref)
    got = rloo(rewards, None, mask, group_size=c["num_generations"])[0]
    same(got[:, 0], c["advantages_f32"], FLOAT32)


@pytest.mark.parametrize("c", TRL["ppo"]["cases"], ids=lambda c: f"clip{c['config']['cliprange']}")
def test_ppo_losses_of_trl(c):
    """Both losses, both gradients and the fraction of clipped tokens. TRL's value mask is one token longer than its
    policy mask, as it also trains the value after the last token; each loss is compared on its own mask."""
    data, config = TRL["ppo"], c["config"]
    mask, value_mask = (~torch.tensor(data[n]) for n in ("padding_mask", "padding_mask_p1"))
    logprobs, values = (tensor(data[n]).requires_grad_() for n in ("new_logprobs", "vpred"))
    a, clip = tensor(data["advantages"]), config["cliprange"]
    policy, ratio = clipped_surrogate(logprobs, tensor(data["logprobs"]), a, clip, clip)
    value = clipped_value_loss(values, tensor(data["values"]), tensor(data["returns"]), config["cliprange_value"])
    w = token_weights(mask, "token", 1)
    policy = (w * policy)[mask].sum()
    value = (token_weights(value_mask, "token", 1) * value)[value_mask].sum()
    for got, name in ((policy, "pg_loss"), (value, "vf_loss"), (policy + config["vf_coef"] * value, "loss")):
        same(got, torch.tensor(c[name], dtype=torch.float64))
    total = policy + config["vf_coef"] * value
    for leaf, name in ((logprobs, "grad_new_logprobs"), (values, "grad_vpred")):
        same(torch.autograd.grad(total, leaf, retain_graph=True)[0], c[name])
    clipped = float((w * clipped_tokens(ratio, a, clip, clip))[mask].sum())
    assert clipped == pytest.approx(c["pg_clipfrac"], abs=1e-6)


@pytest.mark.parametrize("c", TRL["gae"]["cases"], ids=lambda c: f"{c['gamma']}-{c['lam']}")
def test_gae_of_trl(c):
    """On the mask of TRL's values, one token longer than the one its advantages are whitened over."""
    mask, longer = (~torch.tensor(TRL["gae"][n]) for n in ("padding_mask", "padding_mask_p1"))
    options = {"gamma": c["gamma"], "lam": c["lam"], "whiten": False}
    raw, returns = gae(tensor(c["rewards"]), tensor(c["values"]), longer, **options)
    same(raw[longer], tensor(c["advantages_before_whitening"])[longer])
    same(returns[longer], tensor(c["returns"])[longer])
    same(whitened(raw, mask)[mask], tensor(c["advantages"])[mask], BESSEL32)
