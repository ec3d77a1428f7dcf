"""Train a language model with PPO or GRPO.

    python train.py configs/tiny-grpo.yaml optim.lr=1e-3        --help lists every option
    rlkl train tiny-grpo optim.lr=1e-3                          the same file, installed by pip

One training step, in the order of the functions below:

    generate_and_score   G responses to each of N prompts, one score per response
    evaluate_logprobs    the same tokens under pi_old and under the reference; values of the critic
    compute_advantages   scores and the KL penalty in the reward → one advantage per token
    update_policy        a few optimizer steps on this rollout; `objective` is what they minimise

Shapes: N prompts, G samples per prompt, B = N·G rows, T response tokens. Per-token tensors are
(B, T).
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from rlkl.advantages import token_rewards
from rlkl.errors import exit_code
from rlkl.explain import print_warnings
from rlkl.kl import policy_divergences
from rlkl.losses import accepted, token_weights, truncated_importance_weights, value_loss
from rlkl.policy.optimizer import lr_scale
from rlkl.rewards import compute_scores
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.run.algorithm import Algorithm, reads_reference
from rlkl.run.build import Data, Models, build
from rlkl.run.folder import configure
from rlkl.run.help import asks_for_help, every_option, show_help, usage
from rlkl.run.metrics import (
    Meters,
    advantage_metrics,
    response_rows,
    rollout_metrics,
    speed_metrics,
    update_metrics,
)
from rlkl.run.schema import Config
from rlkl.run.session import Session, open_run
from rlkl.run.state import State
from rlkl.types import Batch, Example, PolicyOutput, Rollout


def train(cfg: Config, command: str) -> Session:
    """Train, and return the run: its folder, its metrics, and the model.

    `run` is what surrounds the loop: prompts, progress, log, held-out evaluation, checkpoints.
    command: how the run was started, to be written into its folder.
    """
    models, algorithm, data = build(cfg, generate_and_score, warn=print_warnings)
    with open_run(cfg, command, models, data) as run:
        for prompts, rng in run.steps():
            metrics, responses = training_step(
                cfg, models, algorithm, data, run.state, prompts, rng
            )
            run.finish_step(metrics, responses)
    return run


def training_step(
    cfg: Config,
    models: Models,
    algorithm: Algorithm,
    data: Data,
    state: State,
    prompts: list[int],
    rng: Generator,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One rollout and the updates on it. Returns the step's metrics, and its responses to read.

    prompts: indices into data.train: the N of this step, and behind them spare ones for dynamic
    sampling. rng: the randomness of the rollout and of the updates.
    """
    clock = [time.perf_counter()]
    rollout = algorithm.rollout(cfg, models, data, state, prompts, rng)
    batch = rollout.batch
    clock.append(time.perf_counter())
    evaluate_logprobs(cfg, models, algorithm, state, batch)
    clock.append(time.perf_counter())
    compute_advantages(cfg, algorithm, state, batch)
    updates = update_policy(cfg, models, algorithm, state, batch, rng)
    clock.append(time.perf_counter())
    metrics = rollout_metrics(rollout, cfg.sampling.group_size) | advantage_metrics(batch) | updates
    metrics |= speed_metrics(metrics["tokens"], clock, batch.mask.device)
    return metrics, response_rows(rollout)


def generate_and_score(
    cfg: Config, models: Models, data: Data, state: State, prompts: list[int], rng: Generator
) -> Rollout:
    """G responses to each of N prompts, and the (B,) scores that the reward gives them.

    The uniforms are the only randomness, so every rollout backend returns the same tokens. This is
    `algorithm.rollout`, unless dynamic sampling wraps it; `state` is there for the latter.
    """
    group_size = cfg.sampling.group_size
    examples = [data.train[i] for i in prompts[: cfg.sampling.prompts]]
    rows, device = len(examples) * group_size, models.policy.lm.device
    uniforms = draw_uniforms(rows, cfg.sampling.max_new_tokens, rng, device)
    batch = generate(models, examples, uniforms, models.params)

    row_examples = [example for example in examples for _ in range(group_size)]
    responses = decode(models.tokenizer, batch)
    scores, score_parts = compute_scores(data.reward, row_examples, responses, batch)
    batch.fill(scores=scores)
    rollout = Rollout(batch, batch, score_parts, row_examples, responses, metrics={})

    if not scores.isfinite().all():  # no score: nothing after this sees the response
        batch = batch.without_rows(scores.isnan())
    if cfg.sampling.baseline == "greedy":
        greedy = score_greedy_responses(models, data, examples, uniforms[::group_size])
        per_row = greedy.repeat_interleave(group_size)
        batch.fill(baseline=per_row[:, None].expand(batch.mask.shape))
    if cfg.sampling.zero_variance == "drop":
        batch = batch.drop_zero_variance(group_size)
    return rollout._replace(batch=batch)


def score_greedy_responses(
    models: Models, data: Data, examples: list[Example], uniforms: Tensor
) -> Tensor:
    """(N,) the score of each prompt's greedy response: the baseline of ReMax."""
    batch = generate(models, examples, uniforms, models.params._replace(temperature=0.0))
    scores, _ = compute_scores(data.reward, examples, decode(models.tokenizer, batch), batch)
    return scores.nan_to_num(0.0)


def evaluate_logprobs(
    cfg: Config, models: Models, algorithm: Algorithm, state: State, batch: Batch
) -> None:
    """Fill old_logprobs, values and ref_logprobs, by the same forward pass that is trained.

    pi_old is computed again, and not taken from the sampler, because the two round differently;
    their difference is logged as `sampler_gap`. What nothing reads is not computed.
    """
    max_tokens = cfg.optim.micro_tokens
    reference = models.reference if reads_reference(cfg, state.step) else None
    if reference is not None and algorithm.exact_kl:
        ref_logprobs, ref_states = reference.score_with_states(batch, max_tokens)
        batch.fill(ref_logprobs=ref_logprobs, ref_states=ref_states)
    elif reference is not None:
        batch.fill(ref_logprobs=reference.score(batch, max_tokens).logprobs)
    if algorithm.reads_old_logprobs:
        old = models.policy.score(batch, max_tokens)
        batch.fill(old_logprobs=old.logprobs, old_entropy=old.entropy)
        batch.fill(values=old.values, last_values=old.last_values)


def compute_advantages(cfg: Config, algorithm: Algorithm, state: State, batch: Batch) -> None:
    """Fill rewards, advantages and returns.

    The score is paid on a response's last token. With kl_ref.place=reward every token also pays
    coef · kl_ref. With k1, log(pi_old / ref), the sum over a response estimates its KL without
    bias.
    """
    scores = batch.scores
    if cfg.truncation == "bootstrap":  # what a longer response would still have earned
        scores = scores + algorithm.gamma * batch.last_values * batch.truncated
    batch.fill(rewards=token_rewards(scores, batch.mask))
    if state.kl_ref_coef > 0 and cfg.kl_ref.place == "reward":
        kl = algorithm.kl_ref(batch.old_logprobs, batch.ref_logprobs)
        batch.fill(rewards=batch.rewards - state.kl_ref_coef * kl)

    values = batch.baseline if batch.values is None else batch.values
    advantages, returns = algorithm.advantage(
        batch.rewards, values, batch.mask, group_size=cfg.sampling.group_size
    )
    batch.fill(advantages=advantages, returns=returns)
    if cfg.mismatch.truncate != "none":
        weights = truncated_importance_weights(batch, cfg.mismatch.truncate, cfg.mismatch.cap)
        batch.fill(advantages=batch.advantages * weights)


def update_policy(
    cfg: Config,
    models: Models,
    algorithm: Algorithm,
    state: State,
    batch: Batch,
    rng: Generator,
) -> dict[str, float]:
    """`optim.epochs` passes over the rollout, one optimizer step per minibatch.

    None where the gradient would be exactly 0, because the scores teach nothing: AdamW's momentum
    and weight decay do not move the policy then, either.
    """
    frozen = ("policy",) if state.step < cfg.critic.warmup else ()
    schedule = state.step, cfg.optim.steps, cfg.optim.warmup, cfg.optim.schedule
    kl_old = 0.0
    skipped = 0
    grad_norms = []
    meters = Meters()
    has_gradient = bool(batch.advantages.any()) or not algorithm.only_advantages
    epochs = cfg.optim.epochs if has_gradient else 0
    minibatches = shuffled_minibatches(
        batch, epochs, cfg.optim.minibatch, cfg.sampling.group_size, rng
    )
    for minibatch in minibatches:
        if algorithm.selector is not None:
            rows, columns = minibatch.mask.shape
            uniforms = draw_uniforms(rows, columns, rng, minibatch.mask.device)
            minibatch.selected = algorithm.selector(minibatch, uniforms)
        loss, kl_old = accumulate_gradient(cfg, models, algorithm, state, minibatch, meters)
        if cfg.kl_old.stop is not None and kl_old > cfg.kl_old.stop:
            models.optimizer.zero()
            break
        norms = models.optimizer.step(lr_scale(*schedule), loss, frozen)
        if norms:
            state.skips = 0
            grad_norms.append(norms)
        else:  # the loss or a gradient was not finite: nothing has moved
            state.skips += 1
            skipped += 1

    metrics = update_metrics(meters, batch.mask)
    metrics |= {"kl_ref_coef": state.kl_ref_coef, "kl_old_coef": state.kl_old_coef}
    metrics |= {"updates": len(grad_norms), "skipped_updates": skipped}
    metrics["lr"] = cfg.optim.lr * lr_scale(*schedule)
    for name in grad_norms[0] if grad_norms else ():
        metrics[f"grad_norm/{name}"] = sum(norms[name] for norms in grad_norms) / len(grad_norms)
    if cfg.kl_ref.target or cfg.kl_old.target:
        state.adapt_kl_coefficients(cfg, kl_old, metrics, len(batch))
    return metrics


def shuffled_minibatches(
    batch: Batch, epochs: int, size: int | None, group_size: int, rng: Generator
) -> Iterator[Batch]:
    """Passes over the rows, each in a new random order, `size` rows at a time; None is all rows.

    Groups are shuffled, and the rows of each: responses to one prompt stay together, so that it is
    read once.
    """
    groups = len(batch) // group_size
    for _ in range(epochs):
        order = torch.randperm(groups, generator=rng)[:, None]
        within = torch.rand(groups, group_size, generator=rng).argsort(1)
        rows = rearrange(order * group_size + within, "n g -> (n g)").to(batch.mask.device)
        for some in rows.split(size or len(rows)):
            yield batch[some]


def accumulate_gradient(
    cfg: Config,
    models: Models,
    algorithm: Algorithm,
    state: State,
    minibatch: Batch,
    meters: Meters,
) -> tuple[float, float]:
    """Backward through one minibatch, a micro-batch at a time; fills the meters.

    Returns its loss, and its mean KL(pi_old || pi) in nats per token; both before the update.
    """
    # Denominators are fixed here, over the whole minibatch, so that how it is cut into
    # micro-batches cannot change the gradient.
    trained = trained_tokens(cfg, minibatch)
    rows_and_tokens = int(trained.any(1).sum()), int(trained.sum())

    total_loss, total_kl = 0.0, 0.0
    for _, microbatch in models.policy.microbatches(minibatch, cfg.optim.micro_tokens):
        for new, chunk in forward(cfg, models, algorithm, microbatch):
            if chunk.old_logprobs is None:  # the only update: pi_old is pi
                chunk.old_logprobs = new.logprobs.detach()
                chunk.old_entropy = new.entropy.detach()
            per_token, diagnostics = objective(cfg, algorithm, state, new, chunk)
            chunk.weights = token_weights(
                trained_tokens(cfg, chunk),
                cfg.optim.weights,
                cfg.sampling.max_new_tokens,
                rows_and_tokens,
            )
            if cfg.mismatch.reject != "none":  # after the denominators are fixed
                bounds = cfg.mismatch.low, cfg.mismatch.high
                chunk.weights = chunk.weights * accepted(chunk, cfg.mismatch.reject, *bounds)
            loss = (chunk.weights * per_token)[chunk.mask].sum()
            loss.backward()

            diagnostics |= policy_divergences(new.logprobs.detach(), chunk)
            meters.tokens += int(chunk.mask.sum())
            for name, x in diagnostics.items():
                if name.endswith("_max"):
                    peak = x.detach().masked_fill(~chunk.mask, -torch.inf).max()
                    meters.peaks[name].append(peak)
                else:
                    meters.sums[name] += x.detach()[chunk.mask].sum()
            total_loss += loss.item()
            total_kl += diagnostics["kl_old_pi"][chunk.mask].sum().item()
    return total_loss, total_kl / max(int(minibatch.mask.sum()), 1)


def trained_tokens(cfg: Config, batch: Batch) -> Tensor:
    """(B, T) bool: the mask; with truncation=mask without the truncated responses."""
    if cfg.truncation != "mask":
        return batch.mask
    return batch.mask & ~batch.truncated[:, None]


def forward(
    cfg: Config, models: Models, algorithm: Algorithm, microbatch: Batch
) -> Iterator[tuple[PolicyOutput, Batch]]:
    """The policy's output on a micro-batch, whole or in chunks of `optim.head_tokens`."""
    reference = models.reference if algorithm.exact_kl else None
    tokens = cfg.optim.head_tokens
    if tokens:
        return models.policy.forward_in_chunks(microbatch, reference, tokens=tokens)
    return iter([(models.policy(microbatch, reference), microbatch)])


def objective(
    cfg: Config, algorithm: Algorithm, state: State, new: PolicyOutput, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The (B, T) loss of each token, before weighting, one term a line; and its diagnostics.

    `policy_loss` is the clipped surrogate for PPO and GRPO alike. The first and the last term are
    trust regions around pi_old; the KL to the reference is the only term that knows where training
    started. A term whose coefficient is 0 is not computed.
    """
    loss, diagnostics = algorithm.policy_loss(new, batch)
    diagnostics = diagnostics | {"policy_loss": loss, "entropy": new.entropy}
    if new.values is not None:
        value = value_loss(new.values, batch.values, batch.returns, cfg.critic.clip)
        diagnostics["value_loss"] = value
        loss = loss + cfg.critic.coef * value
    if cfg.entropy.coef:
        loss = loss - cfg.entropy.coef * new.entropy
    if state.kl_ref_coef > 0 and cfg.kl_ref.place == "loss":
        loss = loss + state.kl_ref_coef * algorithm.kl_ref(new, batch)
    if state.kl_old_coef > 0:
        loss = loss + state.kl_old_coef * algorithm.kl_old(new, batch)
    return loss, diagnostics


def main(argv: list[str]) -> None:
    if asks_for_help(argv):
        show_help(argv, f"{__doc__}\n{usage('rlkl train')}", every_option(argv))
        return
    train(configure(argv), shlex.join(["rlkl", "train", *argv]))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
