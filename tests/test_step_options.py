"""What a step does when asked for more: care for the mismatch, selectors, a greedy baseline, exact KLs. Float64."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from runs_fixture import arguments
from test_step import PLAIN, before, check_equal, gradients, rollout, setup, update_gradient

import train
from rlkl import config, kl
from rlkl.algorithm import algorithm, reads_old
from rlkl.build import build
from rlkl.errors import UserError
from rlkl.explain import explain, traps
from rlkl.losses import token_weights
from rlkl.mismatch import accepted, truncated_ratio
from rlkl.selfcheck import MEAN, MOST, judged, selfcheck
from rlkl.types import Sampling

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")


def off(batch):
    """A sampler whose log-probs are up to half a nat away from the trainer's."""
    g = torch.Generator().manual_seed(3)
    noise = torch.rand(batch.mask.shape, generator=g, dtype=batch.sampler_logprobs.dtype) - 0.5
    return replace(batch, sampler_logprobs=batch.sampler_logprobs + noise)


# The sampler is not the trainer


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_sampling_multiplies_the_advantages_once(base, level):
    plain = rollout(base, "optim.epochs=2")[3]
    cfg, parts, state = setup(base, f"mismatch.truncate={level}", "mismatch.cap=1.1", "optim.epochs=2")
    before(parts, "sampler", off)
    caught = []
    real = train.learn
    train.learn = lambda *args: caught.append(args[3]) or {}
    try:
        train.training_step(cfg, parts, state)
    finally:
        train.learn = real
    factor = truncated_ratio(caught[0], level, 1.1)
    inside = factor[caught[0].mask]
    assert inside.max() == pytest.approx(1.1)
    assert inside.min() < 0.9
    torch.testing.assert_close(caught[0].advantages, plain.advantages * factor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_rejection_sets_weights_to_zero_and_leaves_the_denominators(base, level, how):
    """The others count for what they counted before: survivors are not weighed up."""
    options = (f"mismatch.reject={level}", "mismatch.low=0.8", "mismatch.high=1.25", f"optim.weights={how}")
    cfg, parts, state, batch = rollout(base, *options, "optim.epochs=2")
    batch = off(batch)
    kept = accepted(batch, level, 0.8, 1.25)
    assert 0 < kept.sum() < batch.mask.sum()
    update_gradient(cfg, parts, state, batch)
    expected = token_weights(batch.mask, how, cfg.sampling.max_new_tokens)
    assert torch.equal(batch.weights, expected * kept)
    _, found = update_gradient(cfg, parts, state, batch)
    batch.advantages = batch.advantages * kept
    plain = replace(cfg, mismatch=replace(cfg.mismatch, reject="none"))
    check_equal([found], [update_gradient(plain, parts, state, batch)[1]])


def test_with_one_policy_for_both_neither_changes_a_gradient(base):
    """mu = pi_old: every ratio is 1."""
    options = ("mismatch.truncate=sequence", "mismatch.cap=1.0001", "mismatch.reject=token", "mismatch.low=0.999",
               "mismatch.high=1.001")
    check_equal(gradients(base, *options), gradients(base), 1e-12)


def test_the_gap_is_metered(base):
    """k3 of samples of mu: KL(mu || pi_old), and the mean and the largest difference of log-probs."""
    cfg, parts, state = setup(base)
    before(parts, "sampler", off)
    row, _ = train.training_step(cfg, parts, state)
    batch = off(rollout(base, "optim.epochs=2")[3])
    gap = (batch.old_logprobs - batch.sampler_logprobs)[batch.mask]
    assert row["sampler_gap"] == pytest.approx(gap.abs().mean().item())
    assert row["sampler_gap_max"] == pytest.approx(gap.abs().max().item())
    assert row["kl_sampler_old"] == pytest.approx((gap.exp() - 1 - gap).mean().item())


def test_the_effective_sample_size_is_one_on_policy_and_less_when_ratios_spread(base):
    cfg, parts, state = setup(base)
    assert train.training_step(cfg, parts, state)[0]["ess"] == pytest.approx(1.0, abs=1e-12)
    cfg, parts, state = setup(base, "optim.epochs=4", "optim.lr=0.03")
    ratios = []
    real = train.distances

    def noted(logprobs, micro):
        ratios.append((logprobs - micro.old_logprobs).exp()[micro.mask])
        return real(logprobs, micro)

    train.distances = noted
    try:
        row, _ = train.training_step(cfg, parts, state)
    finally:
        train.distances = real
    w = torch.cat(ratios)
    assert row["ess"] == pytest.approx(float(w.sum() ** 2 / (len(w) * w.square().sum())))
    assert row["ess"] < 0.99
    assert row["ratio_max"] == pytest.approx(float(w.max()))


# Selectors


@pytest.mark.parametrize("name", ["top_entropy", "clip_cov", "kl_cov"])
def test_a_selector_sees_each_update_whole_and_the_loss_acts_on_what_it_picked(base, name):
    cfg, parts, state = setup(base, f"loss={name}", f"selector={name}", "optim.minibatch=8", "optim.micro_tokens=40")
    seen, losses, select, loss = [], [], parts.selector, parts.loss

    def selected(batch, uniforms):
        assert batch.old_entropy is not None
        assert uniforms.shape == batch.mask.shape
        seen.append(select(batch, uniforms))
        return seen[-1]

    def recorded(new, batch):
        losses.append(batch)
        return loss(new, batch)

    parts.selector, parts.loss = selected, recorded
    row, _ = train.training_step(cfg, parts, state)
    assert [len(s) for s in seen] == [8, 8]
    assert len(losses) > 2
    assert sum(int(b.selected.sum()) for b in losses) == sum(int(s.sum()) for s in seen)
    assert all(map(math.isfinite, row.values()))


def test_a_loss_that_needs_a_selector_says_so_before_the_first_rollout(base):
    with pytest.raises(UserError, match="selector=top_entropy"):
        setup(base, "loss=top_entropy")


def test_a_step_with_a_random_selector_repeats_itself(base):
    options = ("loss=clip_cov", "selector=clip_cov", "selector.low=-9", "selector.high=9", "selector.fraction=0.3")
    check_equal(gradients(base, *options), gradients(base, *options), 0.0)


# A greedy baseline


def test_remax_is_measured_against_the_score_of_each_prompts_greedy_reply(base):
    """The greedy replies are sampled and judged anew here, by the sampler of the run."""
    _, parts, _, batch = rollout(base, "advantage=remax", "sampling.baseline=greedy", "task=reward.py:Digits")
    rule = parts.rule._replace(temperature=0.0)
    assert isinstance(rule, Sampling)
    prompts, mask = batch.prompt_ids[::4], batch.prompt_mask[::4]
    greedy = parts.sampler(parts.policy, prompts, mask, torch.rand(4, 6), rule)
    scores, _ = train.judge(parts.reward, [None] * 4, train.model.decode(parts.tokenizer, greedy), greedy)
    assert len(scores.unique()) == 2
    want = scores.repeat_interleave(4)[:, None].expand(batch.mask.shape) * batch.mask
    torch.testing.assert_close(batch.values.double(), want.double())
    to_go = batch.rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(batch.advantages, ((to_go - want) * batch.mask).to(batch.advantages.dtype))


def test_a_greedy_baseline_beside_a_critic_is_refused(base):
    with pytest.raises(UserError, match="two baselines"):
        config.load(arguments(base, "sampling.baseline=greedy", "model.critic=head", "advantage=gae", "loss=ppo"))


# Long replies


def test_the_overlong_punishment_is_a_named_part_of_the_score(base):
    cfg, parts, state = setup(base, "overlong.buffer=3", "overlong.coef=0.5")
    row, _ = train.training_step(cfg, parts, state)
    plain = setup(base)
    expected, _ = train.training_step(*plain)
    batch = rollout(base, "overlong.buffer=3", "overlong.coef=0.5")[3]
    penalty = 0.5 * ((6 - 3 - batch.mask.sum(1)) / 3).clamp(max=0)
    assert row["reward/overlong"] == pytest.approx(float(penalty.mean()))
    assert row["reward/overlong"] < -0.05
    assert row["reward"] == pytest.approx(expected["reward"] + row["reward/overlong"], abs=1e-6)
    assert row["reward/score"] == pytest.approx(expected["reward"], abs=1e-6)


# KL over the whole vocabulary


@pytest.mark.parametrize("estimator", ["exact_pi_ref", "exact_ref_pi", "rao_blackwell"])
def test_an_exact_kl_in_the_loss_reaches_the_gradient_through_the_reference(base, estimator):
    """By hand: the policy's own logits against the reference's, summed over the vocabulary."""
    options = ("kl_ref.place=loss", f"kl_ref.estimator={estimator}", "kl_ref.coef=0.3")
    cfg, parts, state, batch = rollout(base, *options, "optim.epochs=2")
    assert parts.exact is parts.reference
    _, with_kl = update_gradient(cfg, parts, state, batch)
    plain = replace(cfg, kl_ref=replace(cfg.kl_ref, coef=0.0))
    _, without = update_gradient(plain, parts, train.State(0.0, 0.0), batch)

    def logp(policy):
        ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
        attended = torch.cat([batch.prompt_mask, batch.attended], 1)
        place = (attended.long().cumsum(1) - 1).clamp_min(0)
        logits = policy.lm(input_ids=ids, attention_mask=attended.long(), position_ids=place).logits
        return logits[:, batch.prompt_ids.shape[1] - 1 : -1, : policy.vocab_size].log_softmax(-1)

    p, q = logp(parts.policy), logp(parts.reference).detach()
    per_token = ((q.exp() * (q - p)) if estimator == "exact_ref_pi" else (p.exp() * (p - q))).sum(-1)
    if estimator == "rao_blackwell":  # the prefix before a token, w = 1 here: only its gradient matters
        chosen = p.gather(-1, batch.response_ids[..., None]).squeeze(-1).masked_fill(~batch.mask, 0.0)
        earlier = chosen.cumsum(1) - chosen
        per_token = per_token * (earlier - earlier.detach()).exp()
    weights = token_weights(batch.mask, "token", 6)
    parts.optimizer.zero()
    (0.3 * weights * per_token)[batch.mask].sum().backward()
    largest = 0.0
    for name, params in parts.optimizer.optimizer.groups.items():
        for i, x in enumerate(params):
            key = f"{name}.{i}"
            torch.testing.assert_close(with_kl[key] - without[key], x.grad, atol=1e-6, rtol=1e-5)  # a float32 norm
            largest = max(largest, x.grad.abs().max().item())
    assert largest > 1e-2


def test_only_an_exact_kl_reads_the_reference_while_it_learns(base):
    for estimator in ("k2", "k3", "wk3_prefix"):
        parts = setup(base, "kl_ref.place=loss", f"kl_ref.estimator={estimator}", "kl_ref.coef=0.3")[1]
        assert parts.exact is None


@pytest.mark.parametrize("estimator", ["exact_pi_ref", "exact_ref_pi", "rao_blackwell"])
def test_an_exact_kl_in_the_reward_is_refused_with_the_reason(base, estimator):
    with pytest.raises(UserError, match="it is a baseline, and holds nothing"):
        setup(base, f"kl_ref.estimator={estimator}", "kl_ref.coef=0.1")


# What is said, and what is read early


def test_traps_are_said_once_when_a_run_is_built(base, tmp_path):
    said = io.StringIO()
    cfg = config.load(arguments(base, *PLAIN, "kl_ref.place=loss", "kl_ref.estimator=k3", "kl_ref.coef=0.1"))
    build(cfg, torch.device("cpu"), Console(file=said, width=1000))
    notes = [line for line in said.getvalue().splitlines() if line.startswith("note:")]
    assert notes == [f"note: {line}" for line in traps(cfg, algorithm(cfg))]
    assert len(notes) == 2
    assert "the other one" in notes[0]
    assert "beta · std(score)" in notes[1]


@pytest.mark.parametrize(
    ("options", "early"),
    [
        ([], False), (["optim.epochs=2"], True), (["optim.minibatch=8"], True), (["kl_ref.coef=0.1"], True),
        (["kl_ref.coef=0.1", "kl_ref.place=loss", "kl_ref.estimator=k2"], False), (["mismatch.truncate=token"], True),
        (["mismatch.reject=mean"], True), (["selector=kl_cov", "loss=kl_cov"], True),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_pi_old_is_scored_when_something_reads_it_before_the_update(base, options, early):
    cfg = config.load(arguments(base, *PLAIN, *options))
    assert reads_old(cfg) == early


# The self-check before the first update


def test_the_self_check_finds_nothing_in_a_sound_run(base):
    cfg, parts, _ = setup(base)
    assert "reference" not in selfcheck(cfg, parts, fresh=False)
    cfg = config.load(arguments(base, *PLAIN))
    parts = build(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    line = selfcheck(cfg, parts, fresh=True)
    assert "reference 0.0e+00" in line
    assert "more than" not in line


@pytest.mark.parametrize("broken", ["sampler", "ratio", "reference"])
def test_the_self_check_stops_a_run_whose_policies_are_not_one(base, broken):
    """A sampler at another temperature, a pass that depends on the padding, a reference that is another model."""
    cfg = config.load(arguments(base, *PLAIN))
    parts = build(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    if broken == "sampler":
        before(parts, "sampler", lambda b: replace(b, sampler_logprobs=b.sampler_logprobs * 1.1))
    elif broken == "ratio":
        evaluate = parts.policy.evaluate

        def padded(batch, reference=None):
            found = evaluate(batch, reference)
            return found._replace(logprobs=found.logprobs - 1e-2 * len(batch) * batch.mask)

        parts.policy.evaluate = padded
    else:
        with torch.no_grad():
            parts.reference.head.weight.mul_(1.1)
    with pytest.raises(UserError, match="self-check: log-probs that must agree") as error:
        selfcheck(cfg, parts, fresh=True)
    largest = dict(part.split() for part in str(error.value).split("(")[1].split(")")[0].split(", "))
    assert float(largest[broken]) > MOST


def test_in_bfloat16_the_self_check_warns_of_the_mean_and_goes_on():
    near, far = torch.tensor([0.001, 0.03]), torch.tensor([0.001, 0.05])
    assert "more than" not in judged({"sampler": near}, narrow=True)
    line = judged({"ratio": near, "sampler": far}, narrow=True)
    assert f"more than {MEAN} on average in sampler" in line
    with pytest.raises(UserError):
        judged({"sampler": near}, narrow=False)
    with pytest.raises(UserError):
        judged({"sampler": torch.tensor([math.nan])}, narrow=False)
    assert "more than" in judged({"sampler": torch.tensor([math.nan])}, narrow=True)


def test_the_kl_of_a_users_file_may_be_exact(base):
    with open("mine.py", "w") as file:
        file.write("def half(new, batch):\n    return 0.5 * new.kl_pi_ref\n")
    parts = setup(base, "kl_ref.place=loss", "kl_ref.estimator=mine.py:half", "kl_ref.coef=0.1")[1]
    assert parts.exact is parts.reference
    assert kl.KL_LOSSES["exact_pi_ref"] is not parts.kl_ref.func


# The hot path

HOT = {
    "grpo": ("optim.epochs=2", "loss.entropy_coef=0.01"),
    "ppo": ("advantage=gae", "loss=ppo", "model.critic=head", "optim.epochs=2", "kl_ref.coef=0.1"),
    "its own critic": ("advantage=gae", "loss=ppo", "model.critic=network", "truncation=mask"),
    "exact KL": ("kl_ref.place=loss", "kl_ref.estimator=rao_blackwell", "kl_ref.coef=0.3", "optim.epochs=2"),
}


@pytest.mark.parametrize("how", [("model.logprobs=tiled",), ("model.logprobs=tiled", "model.keep_logits_gb=1"),
                                 ("optim.head_tokens=1",), ("optim.head_tokens=17",),
                                 ("optim.head_tokens=17", "model.logprobs=tiled", "optim.micro_tokens=90")],
                         ids=" ".join)
@pytest.mark.parametrize("options", HOT.values(), ids=HOT)
def test_the_gradient_does_not_depend_on_how_log_probs_are_taken(base, options, how):
    """In tiles, with kept logits, in head chunks of whole rows: one gradient. (A norm of the model is in float32.)"""
    check_equal(gradients(base, *options, *how), gradients(base, *options), 1e-6)


def test_head_chunks_are_whole_rows_of_about_so_many_tokens(base):
    _, parts, _, batch = rollout(base, "optim.epochs=2")
    sizes = [int(part.mask.sum()) for _, part in parts.policy.in_head_chunks(batch, tokens=10)]
    assert sum(sizes) == int(batch.mask.sum())
    assert len(sizes) > 3
    assert max(sizes) <= 10 + 6
    rows = [len(part) for _, part in parts.policy.in_head_chunks(batch, tokens=10**6)]
    assert rows == [len(batch)]


def test_the_references_states_are_kept_with_the_rollout_and_read_in_every_epoch(base):
    """One pass of the reference, for its log-probs and its states, whatever the number of epochs."""
    options = ("kl_ref.place=loss", "kl_ref.estimator=exact_pi_ref", "kl_ref.coef=0.3")
    passes = []
    for epochs in (1, 3):
        cfg, parts, state = setup(base, *options, f"optim.epochs={epochs}")
        seen = []
        parts.reference.backbone.register_forward_hook(lambda module, args, output, seen=seen: seen.append(1))
        train.training_step(cfg, parts, state)
        passes.append(len(seen))
    assert passes == [1, 1]
    batch = rollout(base, *options, "optim.epochs=3")[3]
    assert batch.ref_states.shape[:2] == batch.mask.shape
    _, parts, _, batch = rollout(base, *options, "optim.epochs=3")
    new = parts.policy.evaluate(batch, parts.reference)
    batch.ref_states = None
    anew = parts.policy.evaluate(batch, parts.reference)
    torch.testing.assert_close(new.kl_pi_ref, anew.kl_pi_ref, atol=1e-6, rtol=1e-5)
    assert new.kl_pi_ref.max() > 1e-3


ODD = """
def picky(rewards, values, mask, *, group_size):
    if mask.shape[1] < 3:
        raise RuntimeError("needs three columns")
    r = rewards.sum(1).view(-1, group_size)
    return (r - r.mean(1, keepdim=True)).reshape(-1, 1) * mask, None


def paid(new, batch):
    return -batch.advantages * new.logprobs + 0 * batch.rewards, {}
"""


def test_a_plug_in_that_cannot_be_measured_trains_all_the_same(base):
    """What explain makes of a configuration is a note; rlkl explain itself says in one line why it has none."""
    with open("odd.py", "w") as file:
        file.write(ODD)
    options = "kl_ref.place=loss", "kl_ref.estimator=k3", "kl_ref.coef=0.1", "advantage=odd.py:picky"
    cfg, parts, state = setup(base, *options)
    assert traps(cfg, algorithm(cfg)) == [kl.TRAPS["loss", "k3"]]
    train.training_step(cfg, parts, state)
    with pytest.raises(UserError, match=r"cannot be measured.*RuntimeError: needs three columns"):
        explain(cfg)
    assert explain(config.load(arguments(base, *PLAIN, "loss=odd.py:paid"))).numbers["updates"] == 1
