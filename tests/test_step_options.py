"""What a step does when asked for more: care for the mismatch, selectors, a greedy baseline, exact
KLs. Float64.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from runs_fixture import arguments
from test_step import PLAIN, PPO, check_equal, gradients, rollout, setup, update_gradient

import train
from rlkl.errors import UserError
from rlkl.explain import explain, print_warnings, traps
from rlkl.kl import TRAPS
from rlkl.losses import accepted, token_weights, truncated_importance_weights
from rlkl.policy import attention
from rlkl.rollout.sampling import decode
from rlkl.run import config
from rlkl.run.algorithm import reads_old_logprobs, resolve_algorithm
from rlkl.run.build import build
from rlkl.run.selfcheck import MAX_GAP, MEAN_GAP_BF16, report_gaps, selfcheck

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")


def off(batch):
    """A sampler whose log-probs are up to half a nat away from the trainer's."""
    g = torch.Generator().manual_seed(3)
    noise = torch.rand(batch.mask.shape, generator=g, dtype=batch.sampler_logprobs.dtype) - 0.5
    return replace(batch, sampler_logprobs=batch.sampler_logprobs + noise)


# The sampler is not the trainer


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_sampling_multiplies_the_advantages_once(base, level, monkeypatch):
    _, plain = rollout(base, "optim.epochs=2")
    run = setup(base, f"mismatch.truncate={level}", "mismatch.cap=1.1", "optim.epochs=2")
    run.after_sampling(off)
    caught = []
    monkeypatch.setattr(train, "update_policy", lambda *args: caught.append(args[4]) or {})
    run.step()
    (batch,) = caught
    factor = truncated_importance_weights(batch, level, 1.1)
    assert factor[batch.mask].max() == pytest.approx(1.1)
    assert factor[batch.mask].min() < 0.9
    torch.testing.assert_close(batch.advantages, plain.advantages * factor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_rejection_sets_weights_to_zero_and_leaves_the_denominators(base, level):
    """The others count for what they counted before: survivors do not count for more."""
    bounds = (f"mismatch.reject={level}", "mismatch.low=0.8", "mismatch.high=1.25")
    for weights in ("token", "sequence", "constant"):
        run, batch = rollout(base, *bounds, f"optim.weights={weights}", "optim.epochs=2")
        batch = off(batch)
        kept = accepted(batch, level, 0.8, 1.25)
        assert 0 < kept.sum() < batch.mask.sum()
        _, rejected = update_gradient(run, batch)
        batch.advantages = batch.advantages * kept
        run.cfg = replace(run.cfg, mismatch=replace(run.cfg.mismatch, reject="none"))
        check_equal([rejected], [update_gradient(run, batch)[1]])


def test_with_one_policy_for_both_neither_changes_a_gradient(base):
    """mu = pi_old: every ratio is 1."""
    options = (
        "mismatch.truncate=sequence",
        "mismatch.cap=1.0001",
        "mismatch.reject=token",
        "mismatch.low=0.999",
        "mismatch.high=1.001",
    )
    check_equal(gradients(base, *options), gradients(base), 1e-12)


def test_the_gap_between_sampler_and_trainer_is_a_metric(base):
    """k3 of samples of mu: KL(mu || pi_old); and the mean and largest difference of log-probs."""
    run = setup(base)
    run.after_sampling(off)
    metrics = run.step()
    batch = off(rollout(base, "optim.epochs=2")[1])
    gap = (batch.old_logprobs - batch.sampler_logprobs)[batch.mask]
    assert metrics["sampler_gap"] == pytest.approx(gap.abs().mean().item())
    assert metrics["sampler_gap_max"] == pytest.approx(gap.abs().max().item())
    assert metrics["kl_sampler_old"] == pytest.approx((gap.exp() - 1 - gap).mean().item())


def test_the_effective_sample_size_is_one_on_policy_and_less_when_ratios_spread(base, monkeypatch):
    assert setup(base).step()["effective_sample_size"] == pytest.approx(1.0, abs=1e-12)
    run = setup(base, "optim.epochs=4", "optim.lr=0.03")
    policy_divergences, ratios = train.policy_divergences, []

    def noted(logprobs, chunk):
        ratios.append((logprobs - chunk.old_logprobs).exp()[chunk.mask])
        return policy_divergences(logprobs, chunk)

    monkeypatch.setattr(train, "policy_divergences", noted)
    metrics = run.step()
    w = torch.cat(ratios)
    expected = float(w.sum() ** 2 / (len(w) * w.square().sum()))
    assert metrics["effective_sample_size"] == pytest.approx(expected)
    assert expected < 0.99
    assert metrics["ratio_max"] == pytest.approx(float(w.max()))


def test_a_diagnostic_is_averaged_over_tokens_and_its_largest_taken_where_its_name_says_so(base):
    """Whatever is behind the mask, and however the updates are cut."""
    run = setup(base, "optim.minibatch=4", "optim.micro_tokens=20")
    loss, seen = run.algorithm.policy_loss, []

    def with_diagnostics(new, batch):
        x = -new.logprobs.detach() - 100
        seen.append(x[batch.mask])
        x = x.masked_fill(~batch.mask, 1e9)
        return loss(new, batch)[0], {"x": x, "x_max": x}

    run.algorithm.policy_loss = with_diagnostics
    metrics = run.step()
    every = torch.cat(seen)
    assert len(seen) > 4
    assert metrics["x"] == pytest.approx(every.mean().item())
    assert metrics["x_max"] == pytest.approx(every.max().item())
    assert metrics["x_max"] < 0


# Selectors


@pytest.mark.parametrize("name", ["top_entropy", "clip_cov", "kl_cov"])
def test_a_selector_sees_each_update_whole_and_the_loss_acts_on_what_it_picked(base, name):
    options = (f"loss={name}", f"selector={name}", "optim.minibatch=8", "optim.micro_tokens=40")
    run = setup(base, *options)
    selector, loss = run.algorithm.selector, run.algorithm.policy_loss
    seen, losses = [], []

    def selected(batch, uniforms):
        assert batch.old_entropy is not None
        assert uniforms.shape == batch.mask.shape
        seen.append(selector(batch, uniforms))
        return seen[-1]

    def recorded(new, batch):
        losses.append(batch)
        return loss(new, batch)

    run.algorithm.selector, run.algorithm.policy_loss = selected, recorded
    metrics = run.step()
    assert [len(s) for s in seen] == [8, 8]
    assert len(losses) > 2
    assert sum(int(b.selected.sum()) for b in losses) == sum(int(s.sum()) for s in seen)
    assert all(map(math.isfinite, metrics.values()))


def test_a_loss_may_read_the_old_entropy_and_the_scores_also_with_one_update(base):
    with open("reads.py", "w") as file:
        file.write(
            "def loss(new, batch):\n"
            "    scale = 1 + 0 * batch.old_entropy + 0 * batch.scores[:, None]\n"
            "    return -batch.advantages * new.logprobs * scale, {}\n"
        )
    assert not setup(base).algorithm.reads_old_logprobs
    check_equal(gradients(base, "loss=reads.py:loss"), gradients(base, "loss=reinforce"), 1e-12)


def test_a_loss_that_needs_a_selector_says_so_before_the_first_rollout(base):
    with pytest.raises(UserError, match="selector=top_entropy"):
        setup(base, "loss=top_entropy")


def test_a_step_with_a_random_selector_repeats_itself(base):
    options = (
        "loss=clip_cov",
        "selector=clip_cov",
        "selector.low=-9",
        "selector.high=9",
        "selector.fraction=0.3",
    )
    check_equal(gradients(base, *options), gradients(base, *options), 0.0)


# A greedy baseline


def test_remax_is_measured_against_the_score_of_each_prompts_greedy_response(base):
    """The greedy responses are sampled and scored anew here, by the sampler of the run."""
    options = ("advantage=remax", "sampling.baseline=greedy", "task=reward.py:Digits")
    run, batch = rollout(base, *options)
    models = run.models
    params = models.params._replace(temperature=0.0)
    prompts, mask = batch.prompt_ids[::4], batch.prompt_mask[::4]
    greedy = models.sampler(models.policy, prompts, mask, torch.rand(4, 6), params)
    responses = decode(models.tokenizer, greedy)
    scores, _ = train.compute_scores(run.data.reward, [None] * 4, responses, greedy)
    assert len(scores.unique()) == 2
    expected = scores.repeat_interleave(4)[:, None].expand(batch.mask.shape) * batch.mask
    torch.testing.assert_close(batch.baseline.double(), expected.double())
    to_go = batch.rewards.flip(1).cumsum(1).flip(1)
    advantages = ((to_go - expected) * batch.mask).to(batch.advantages.dtype)
    torch.testing.assert_close(batch.advantages, advantages)


def test_a_greedy_baseline_beside_a_critic_is_refused(base):
    with pytest.raises(UserError, match="two baselines"):
        config.load(arguments(base, "sampling.baseline=greedy", *PPO))


# Long responses


def test_the_overlong_punishment_is_a_named_part_of_the_score(base):
    options = ("overlong.buffer=3", "overlong.coef=0.5")
    metrics = setup(base, *options).step()
    plain = setup(base).step()
    _, batch = rollout(base, *options)
    penalty = float((0.5 * ((6 - 3 - batch.mask.sum(1)) / 3).clamp(max=0)).mean())
    assert metrics["rewards/overlong"] == pytest.approx(penalty)
    assert penalty < -0.05
    assert metrics["reward"] == pytest.approx(plain["reward"] + penalty, abs=1e-6)
    assert metrics["rewards/score"] == pytest.approx(plain["reward"], abs=1e-6)


# KL over the whole vocabulary


@pytest.mark.parametrize("estimator", ["exact_pi_ref", "exact_ref_pi", "rao_blackwell"])
def test_an_exact_kl_in_the_loss_reaches_the_gradient_through_the_reference(base, estimator):
    """By hand: the policy's own logits against the reference's, summed over the vocabulary."""
    options = ("kl_ref.place=loss", f"kl_ref.estimator={estimator}", "kl_ref.coef=0.3")
    run, batch = rollout(base, *options, "optim.epochs=2")
    assert run.algorithm.exact_kl
    _, with_kl = update_gradient(run, batch)
    run.state.kl_ref_coef = 0.0
    _, without = update_gradient(run, batch)

    def logp(policy):
        ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
        attended = torch.cat([batch.prompt_mask, batch.attended], 1)
        place = (attended.long().cumsum(1) - 1).clamp_min(0)
        logits = policy.lm(input_ids=ids, attention_mask=attended.long(), position_ids=place).logits
        return logits[:, batch.prompt_ids.shape[1] - 1 : -1, : policy.vocab_size].log_softmax(-1)

    p, q = logp(run.policy), logp(run.models.reference).detach()
    per_token = ((q.exp() * (q - p)) if estimator == "exact_ref_pi" else (p.exp() * (p - q))).sum(
        -1
    )
    if (
        estimator == "rao_blackwell"
    ):  # the prefix before a token, w = 1 here: only its gradient matters
        chosen = (
            p.gather(-1, batch.response_ids[..., None]).squeeze(-1).masked_fill(~batch.mask, 0.0)
        )
        earlier = chosen.cumsum(1) - chosen
        per_token = per_token * (earlier - earlier.detach()).exp()
    weights = token_weights(batch.mask, "token", 6)
    run.optimizer.zero()
    (0.3 * weights * per_token)[batch.mask].sum().backward()
    largest = 0.0
    for name, params in run.optimizer.optimizer.groups.items():
        for i, x in enumerate(params):
            key = f"{name}.{i}"
            torch.testing.assert_close(
                with_kl[key] - without[key], x.grad, atol=1e-6, rtol=1e-5
            )  # a float32 norm
            largest = max(largest, x.grad.abs().max().item())
    assert largest > 1e-2


def test_only_an_exact_kl_reads_the_reference_while_it_learns(base):
    for estimator in ("k2", "k3", "wk3_prefix"):
        options = ("kl_ref.place=loss", f"kl_ref.estimator={estimator}", "kl_ref.coef=0.3")
        assert not setup(base, *options).algorithm.exact_kl


@pytest.mark.parametrize("estimator", ["exact_pi_ref", "exact_ref_pi", "rao_blackwell"])
def test_an_exact_kl_in_the_reward_is_refused_with_the_reason(base, estimator):
    with pytest.raises(UserError, match="only a baseline"):
        setup(base, f"kl_ref.estimator={estimator}", "kl_ref.coef=0.1")


# What is said, and what is read early


def test_traps_are_printed_when_a_run_is_built(base, capsys):
    kl_in_loss = ("kl_ref.place=loss", "kl_ref.estimator=k3", "kl_ref.coef=0.1")
    cfg = config.load(arguments(base, *PLAIN, *kl_in_loss))
    build(cfg, train.generate_and_score, warn=print_warnings)
    printed = capsys.readouterr().out.splitlines()
    notes = [line for line in printed if line.startswith("note:") and "held-out" not in line]
    assert notes == [f"note: {line}" for line in traps(cfg, resolve_algorithm(cfg))]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("options", "early"),
    [
        ([], False),
        (["optim.epochs=2"], True),
        (["optim.minibatch=8"], True),
        (["kl_ref.coef=0.1"], True),
        (["kl_ref.coef=0.1", "kl_ref.place=loss", "kl_ref.estimator=k2"], False),
        (["mismatch.truncate=token"], True),
        (["mismatch.reject=mean"], True),
        (["selector=kl_cov", "loss=kl_cov"], True),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_pi_old_is_scored_when_something_reads_it_before_the_update(base, options, early):
    cfg = config.load(arguments(base, *PLAIN, *options))
    assert reads_old_logprobs(cfg) == early


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], [0, 4]),
        (["model.reference=true"], list(range(9))),
        (["model.reference=false"], []),
        (["kl_ref.coef=0.1"], list(range(9))),
        (["kl_ref.coef=0.1", "kl_ref.place=loss", "kl_ref.estimator=k2"], list(range(9))),
        (["loss=user.py:loss"], list(range(9))),
        (["selector=user.py:all_tokens"], list(range(9))),
        (["kl_old.coef=0.1"], [0, 4]),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_the_reference_scores_a_rollout_only_where_something_reads_it(base, here, options, steps):
    (here / "user.py").write_text(
        "def loss(new, batch):\n    return -new.logprobs * batch.advantages, {}\n"
        "def all_tokens(batch, uniforms):\n    return batch.mask\n"
    )
    run = setup(base, *options, "optim.steps=9", "entropy.coef=0.01")
    scored = []
    if run.models.reference is not None:
        run.models.reference.register_forward_pre_hook(lambda *_: scored.append(run.state.step))
    for step in range(9):
        run.state.step = step
        metrics = run.step()
        assert ("kl_pi_ref_token" in metrics) == ("ref_logprob" in metrics) == (step in steps)
    assert sorted(set(scored)) == steps


# The self-check before the first update


def fresh(base):
    """A run whose policy and reference are where they start."""
    models, _, data = build(config.load(arguments(base, *PLAIN)), train.generate_and_score)
    return config.load(arguments(base, *PLAIN)), models, data


def test_the_self_check_finds_nothing_in_a_sound_run(base):
    run = setup(base)
    assert "reference" not in selfcheck(run.cfg, run.models, run.data, fresh=False)
    line = selfcheck(*fresh(base), fresh=True)
    assert "reference 0.0e+00" in line
    assert "more than" not in line


def test_a_model_whose_shared_prompts_are_far_off_is_read_row_by_row(base, monkeypatch, caplog):
    """A kernel may be wrong on one machine only. The run goes on, and one line says how."""
    cfg, models, data = fresh(base)

    own = attention.attention_in_parts
    monkeypatch.setattr(attention, "attention_in_parts", lambda *args: 1.1 * own(*args))
    line = selfcheck(cfg, models, data, fresh=True)
    assert not models.policy.shared_prompts
    assert not models.reference.shared_prompts
    assert caplog.text.count("each prompt is read again for each of its responses") == 1
    largest = [float(x) for x in re.findall(r"\d\.\de-\d+", line)]
    assert max(largest) <= MAX_GAP


@pytest.mark.parametrize("broken", ["sampler", "ratio", "reference"])
def test_the_self_check_stops_a_run_whose_policies_are_not_one(base, broken):
    """A sampler at another temperature, a pass that depends on padding, another reference."""
    cfg, models, data = fresh(base)
    if broken == "sampler":
        sampler = models.sampler

        def at_another_temperature(*args):
            batch = sampler(*args)
            return replace(batch, sampler_logprobs=batch.sampler_logprobs * 1.1)

        models.sampler = at_another_temperature
    elif broken == "ratio":

        def padded(module, args, output):
            batch = args[0]
            return output._replace(logprobs=output.logprobs - 1e-2 * len(batch) * batch.mask)

        models.policy.register_forward_hook(padded)
    else:
        with torch.no_grad():
            models.reference.head.weight.mul_(1.1)
    with pytest.raises(UserError, match="self-check: log-probs that must agree") as error:
        selfcheck(cfg, models, data, fresh=True)
    gaps = str(error.value).split("(")[1].split(")")[0].split(", ")
    largest = dict(gap.split() for gap in gaps)
    assert float(largest[broken]) > MAX_GAP


def test_in_bfloat16_the_self_check_warns_of_the_mean_and_goes_on():
    near, far = torch.tensor([0.001, 0.03]), torch.tensor([0.001, 0.05])
    assert "more than" not in report_gaps({"sampler": near}, bfloat16=True)
    line = report_gaps({"ratio": near, "sampler": far}, bfloat16=True)
    assert f"more than {MEAN_GAP_BF16} on average in sampler" in line
    with pytest.raises(UserError):
        report_gaps({"sampler": near}, bfloat16=False)
    nan = {"sampler": torch.tensor([math.nan])}
    with pytest.raises(UserError):
        report_gaps(nan, bfloat16=False)
    assert "more than" in report_gaps(nan, bfloat16=True)


def test_the_kl_of_a_users_file_may_be_exact(base):
    with open("mine.py", "w") as file:
        file.write("def half(new, batch):\n    return 0.5 * new.kl_pi_ref\n")
    options = ("kl_ref.place=loss", "kl_ref.estimator=mine.py:half", "kl_ref.coef=0.1")
    algorithm = setup(base, *options).algorithm
    assert algorithm.exact_kl
    assert algorithm.kl_ref.func.__name__ == "half"


# The hot path

HOT = {
    "grpo": ("optim.epochs=2", "entropy.coef=0.01"),
    "ppo": (*PPO, "optim.epochs=2", "kl_ref.coef=0.1"),
    "its own critic": ("advantage=gae", "critic.kind=network", "truncation=mask"),
    "exact KL": (
        "kl_ref.place=loss",
        "kl_ref.estimator=rao_blackwell",
        "kl_ref.coef=0.3",
        "optim.epochs=2",
    ),
}


@pytest.mark.parametrize(
    "how",
    [
        ("model.logprobs=tiled",),
        ("model.logprobs=tiled", "model.keep_logits_gb=1"),
        ("optim.head_tokens=1",),
        ("optim.head_tokens=17",),
        ("optim.head_tokens=17", "model.logprobs=tiled", "optim.micro_tokens=90"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("options", HOT.values(), ids=HOT)
def test_the_gradient_does_not_depend_on_how_log_probs_are_taken(base, options, how):
    """In tiles, with kept logits, in head chunks of whole rows: one gradient. (A norm of the model
    is in float32.)
    """
    check_equal(gradients(base, *options, *how), gradients(base, *options), 1e-6)


def test_head_chunks_are_whole_rows_of_about_so_many_tokens(base):
    run, batch = rollout(base, "optim.epochs=2")
    sizes = [int(part.mask.sum()) for _, part in run.policy.forward_in_chunks(batch, tokens=10)]
    assert sum(sizes) == int(batch.mask.sum())
    assert len(sizes) > 3
    assert max(sizes) <= 10 + 6
    rows = [len(part) for _, part in run.policy.forward_in_chunks(batch, tokens=10**6)]
    assert rows == [len(batch)]


def test_the_references_states_are_kept_with_the_rollout_and_read_in_every_epoch(base):
    """One pass of the reference, for its log-probs and states, for any number of epochs."""
    options = ("kl_ref.place=loss", "kl_ref.estimator=exact_pi_ref", "kl_ref.coef=0.3")
    passes = []
    for epochs in (1, 3):
        run = setup(base, *options, f"optim.epochs={epochs}")
        seen = []
        run.models.reference.backbone.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(1)
        )
        run.step()
        passes.append(len(seen))
    assert passes == [1, 1]
    run, batch = rollout(base, *options, "optim.epochs=3")
    assert batch.ref_states.shape[:2] == batch.mask.shape
    new = run.policy(batch, run.models.reference)
    batch.ref_states = None
    anew = run.policy(batch, run.models.reference)
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
    """What explain makes of a configuration is a note; rlkl explain itself says in one line why it
    has none.
    """
    with open("odd.py", "w") as file:
        file.write(ODD)
    options = (
        "kl_ref.place=loss",
        "kl_ref.estimator=k3",
        "kl_ref.coef=0.1",
        "advantage=odd.py:picky",
    )
    run = setup(base, *options)
    cfg = run.cfg
    assert traps(cfg, resolve_algorithm(cfg)) == [TRAPS["loss", "k3"]]
    run.step()
    with pytest.raises(UserError, match=r"cannot be measured.*RuntimeError: needs three columns"):
        explain(cfg)
    assert explain(config.load(arguments(base, *PLAIN, "loss=odd.py:paid"))).numbers["updates"] == 1
