"""Train a language model with PPO or GRPO:  python train.py configs/tiny-ppo.yaml optim.lr=1e-3

One step is `training_step`:  act → judge → evaluate → credit → learn → report.  `--help` lists every option.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rlkl import checkpoint, hacking, kl, model, report, runs
from rlkl.build import TABLES, Parts, build, pick_device
from rlkl.config import options
from rlkl.dynamic import Rollout, dynamic
from rlkl.errors import UserError, of_a_file
from rlkl.heldout import accuracy
from rlkl.log import Meters, RunLog, read_rows
from rlkl.losses import importance_ratio, token_weights
from rlkl.metrics import credited, describe, speed
from rlkl.mismatch import accepted, truncated_ratio
from rlkl.optim import lr_scale
from rlkl.rewards import informative, judge, token_rewards, without_rows
from rlkl.rollout.sample import draw_uniforms
from rlkl.schema import Config
from rlkl.seeds import draw, generator, stream
from rlkl.selfcheck import selfcheck
from rlkl.terminal import Interrupt, before_and_after, console, progress, say, show, suspect, usage
from rlkl.types import Batch, Example


@dataclass
class State:
    """What changes from step to step, beside the weights and the optimizer."""

    kl_ref_coef: float
    kl_old_coef: float
    step: int = 0
    skips: int = 0  # updates in a row that were not finite
    best_accuracy: float = -1.0  # held out
    best_step: int | None = None
    before: dict[str, float] = field(default_factory=dict)  # held out, before the first step
    refilled: int = 0  # prompts drawn by sampling.unanimous=refill
    success: dict[str, float] = field(default_factory=dict)  # of each prompt, by its index: sampling.curriculum


def training_step(cfg: Config, parts: Parts, state: State) -> tuple[dict[str, float], dict[str, Any]]:
    """One rollout and the updates on it. Returns the row of metrics, and one sample."""
    torch.manual_seed(stream(cfg.seed, state.step, "plug-ins"))  # the loop itself draws from its own generator only
    random.seed(stream(cfg.seed, state.step, "plug-ins"))
    rng, group, meters = generator(cfg.seed, state.step, "rollout"), cfg.sampling.group_size, Meters()
    clock = [time.perf_counter()]

    # 1. Act: G replies to each of N prompts.
    # 2. Judge: one score per reply.
    if cfg.sampling.unanimous == "refill" or cfg.sampling.curriculum != "none":
        batch, scores, row, sample = dynamic(cfg, parts.train, state, partial(act_and_judge, cfg, parts), rng)
    else:
        examples = draw(parts.train, cfg.sampling.prompts, cfg.seed, state.step)
        batch, scores, row, sample = act_and_judge(cfg, parts, examples, rng)
    if cfg.sampling.unanimous != "keep":
        kept = informative(scores, group)
        batch, scores = batch[kept].trim(), scores[kept]
    clock.append(time.perf_counter())

    # 3. Evaluate: the same tokens under pi_old and the reference, by the training forward pass.
    last_values = evaluate(cfg, parts, batch)
    clock.append(time.perf_counter())

    # 4. Credit: scores, and perhaps a KL penalty → token rewards → advantages.
    if cfg.truncation == "bootstrap":  # the critic's guess stands for what a longer reply would have earned
        scores = scores + parts.advantage.keywords.get("gamma", 1.0) * last_values * batch.truncated
    batch.rewards = token_rewards(scores, batch.mask)
    if state.kl_ref_coef > 0 and cfg.kl_ref.place == "reward":
        batch.rewards = batch.rewards - state.kl_ref_coef * parts.kl_ref(batch.old_logprobs, batch.ref_logprobs)
    batch.advantages, batch.returns = parts.advantage(batch.rewards, batch.values, batch.mask, group_size=group)
    if cfg.mismatch.truncate != "none":
        batch.advantages = batch.advantages * truncated_ratio(batch, cfg.mismatch.truncate, cfg.mismatch.cap)

    # 5. Learn: a few updates, held near pi_old by the trust region.
    learned = learn(cfg, parts, state, batch, rng, meters)
    clock.append(time.perf_counter())

    # 6. Report.
    row |= credited(batch) | meters.row() | learned | speed(row["tokens"], clock, batch.mask.device)
    row |= {"kl_ref_coef": state.kl_ref_coef, "kl_old_coef": state.kl_old_coef}
    if "ratio_square" in row:
        row["ess"] = row.pop("ratio_mean") ** 2 / row.pop("ratio_square")
    if "kl_pi_ref_tok" in row:
        row["kl_pi_ref_seq"] = seq = row["kl_pi_ref_tok"] * int(batch.mask.sum()) / int(batch.mask.any(1).sum())
        if (target := cfg.kl_ref.target) is not None:
            state.kl_ref_coef = kl.proportional(state.kl_ref_coef, target, seq, len(batch), cfg.kl_ref.horizon)
    return row, sample


def act_and_judge(cfg: Config, parts: Parts, examples: list[Example], rng: Generator) -> Rollout:
    """G replies to each of N prompts, and their scores. The uniforms are the only randomness."""
    group, prompts = cfg.sampling.group_size, [model.encode(parts.tokenizer, e.prompt) for e in examples]
    prompt_ids, prompt_mask = model.left_pad(prompts, parts.rule.pad_id, parts.policy.lm.device)
    uniforms = draw_uniforms(len(prompts) * group, cfg.sampling.max_new_tokens, rng, prompt_ids.device)
    batch = parts.sampler(parts.policy, prompt_ids, prompt_mask, uniforms, parts.rule)
    asked, replies = [e for e in examples for _ in range(group)], model.decode(parts.tokenizer, batch)
    scores, named = judge(parts.reward, asked, replies, batch)
    row = describe(batch, scores, named, group)
    batch = batch if scores.isfinite().all() else without_rows(batch, scores.isnan())  # no score, no sample
    if cfg.sampling.baseline == "greedy":
        batch.values = greedy_baseline(parts, examples, prompt_ids, prompt_mask, uniforms).expand(batch.mask.shape)
    return Rollout(batch, scores, row, {"prompt": asked[0].prompt, "reply": replies[0], "score": scores[0].item()})


def greedy_baseline(parts: Parts, examples: list[Example], prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor
                    ) -> Tensor:
    """(B, 1): the score of each prompt's greedy reply, on all of its G samples."""
    first = uniforms[:: len(uniforms) // len(prompt_ids)]
    batch = parts.sampler(parts.policy, prompt_ids, prompt_mask, first, parts.rule._replace(temperature=0.0))
    scores, _ = judge(parts.reward, examples, model.decode(parts.tokenizer, batch), batch)
    return scores.nan_to_num(0.0).repeat_interleave(len(uniforms) // len(prompt_ids))[:, None]


def evaluate(cfg: Config, parts: Parts, batch: Batch) -> Tensor | None:
    """Fill in old_logprobs, values and ref_logprobs; returns V after the last token, (B,), None without a critic.

    With one update per rollout and nothing that reads it earlier, pi_old is the pi of that update: not scored here.
    """
    if parts.exact is not None:
        batch.ref_logprobs, batch.ref_states = parts.exact.score_and_states(batch, cfg.optim.micro_tokens)
    elif parts.reference is not None:
        batch.ref_logprobs = parts.reference.score(batch, cfg.optim.micro_tokens).logprobs
    if not parts.reads_old:
        return None
    old = parts.policy.score(batch, cfg.optim.micro_tokens)
    batch.old_logprobs, batch.old_entropy = old.logprobs, old.entropy
    batch.values = batch.values if old.values is None else old.values
    return old.last_values


def learn(cfg: Config, parts: Parts, state: State, batch: Batch, rng: Generator, meters: Meters) -> dict[str, float]:
    """Epochs of minibatches, one update each. Returns gradient norms, learning rate and counts."""
    scale = lr_scale(state.step, cfg.optim.steps, cfg.optim.warmup, cfg.optim.schedule)
    frozen = ("policy",) if state.step < cfg.optim.critic_warmup else ()
    row, norms, drift = {"lr": cfg.optim.lr * scale, "updates": 0.0, "skipped": 0.0}, [], 0.0
    shuffled = (batch.shuffle(rng) for _ in range(cfg.optim.epochs))
    for mini in (m for epoch in shuffled for m in epoch.split(cfg.optim.minibatch or len(batch))):
        if parts.selector is not None:
            mini.selected = parts.selector(mini, draw_uniforms(*mini.mask.shape, rng, mini.mask.device))
        loss, drift = backward(cfg, parts, state, mini, meters)
        if cfg.kl_old.stop is not None and drift > cfg.kl_old.stop:
            parts.optimizer.zero()
            break
        found = parts.optimizer.step(scale, loss, frozen)
        state.skips = 0 if found else state.skips + 1
        row["updates" if found else "skipped"] += 1
        norms += [found] if found else []
    if cfg.kl_old.target is not None:
        state.kl_old_coef = kl.doubling(state.kl_old_coef, cfg.kl_old.target, drift)  # as it was before the last update
    return row | {f"grad_norm/{n}": sum(found[n] for found in norms) / len(norms) for n in (norms or [{}])[0]}


def backward(cfg: Config, parts: Parts, state: State, mini: Batch, meters: Meters) -> tuple[float, float]:
    """The gradient of one update, however it is cut. Returns its loss and KL(pi_old || pi) per token before it."""
    trained = mini.mask & ~mini.truncated[:, None] if cfg.truncation == "mask" else mini.mask
    mini.weights = token_weights(trained, cfg.optim.weights, cfg.sampling.max_new_tokens)
    if cfg.mismatch.reject != "none":
        mini.weights = mini.weights * accepted(mini, cfg.mismatch.reject, cfg.mismatch.low, cfg.mismatch.high)
    total, drift, tokens = 0.0, 0.0, max(int(mini.mask.sum()), 1)
    for new, micro in (x for _, rows in mini.microbatches(cfg.optim.micro_tokens) for x in parts.evaluations(rows)):
        if micro.old_logprobs is None:
            micro.old_logprobs = new.logprobs.detach()
        per_token, stats = parts.loss(new, micro)
        if state.kl_ref_coef > 0 and cfg.kl_ref.place == "loss":
            per_token = per_token + state.kl_ref_coef * parts.kl_ref(new, micro)
        if state.kl_old_coef > 0:
            per_token = per_token + state.kl_old_coef * parts.kl_old(new, micro)
        loss = (micro.weights * per_token)[micro.mask].sum()
        loss.backward()
        moved = distances(new.logprobs.detach(), micro)
        meters.add(micro.mask, {**stats, **moved, "entropy": new.entropy})
        total, drift = total + loss.item(), drift + moved["kl_old_pi"][micro.mask].sum().item() / tokens
    return total, drift


def distances(logprobs: Tensor, micro: Batch) -> dict[str, Tensor]:
    """(B, T) meters of how far policies are apart: pi from pi_old, pi_old from the reference and from the sampler."""
    old, ref, sampler = micro.old_logprobs, micro.ref_logprobs, micro.sampler_logprobs
    ratio, gap = importance_ratio(logprobs, old), (old - sampler).abs()
    far = {"kl_old_pi": kl.k3(old, logprobs), "ratio_max": ratio, "ratio_mean": ratio, "ratio_square": ratio.square()}
    far |= {"kl_sampler_old": kl.k3(sampler, old), "sampler_gap": gap, "sampler_gap_max": gap}
    return far if ref is None else far | {"kl_pi_ref_tok": kl.k1(old, ref), "ref_logprob": ref}


def train(cfg: Config, argv: list[str]) -> Path:
    """Build, loop, report. Returns the folder of the last checkpoint, a Hugging Face directory."""
    device = pick_device(cfg.device)
    say(f"device: {device}")
    start = checkpoint.newest(Path(cfg.resume)) if cfg.resume else None
    parts = build(cfg, device, console, start)
    with parts.scoring:  # its processes end with the run, however that ends
        return run(cfg, argv, parts, start)


def run(cfg: Config, argv: list[str], parts: Parts, start: Path | None) -> Path:
    """The loop, with what surrounds it."""
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    if start is not None:
        state = State(**checkpoint.restore(start, parts.policy, parts.optimizer))
    say(selfcheck(cfg, parts, fresh=start is None))
    folder = runs.open_folder(cfg, argv)
    log = RunLog(folder, asdict(cfg), wandb_mode=cfg.log.wandb, project=cfg.log.project, start=state.step)
    measure = partial(accuracy, cfg, parts)

    def save() -> Path:
        path = checkpoint.save(folder, state.step, parts.policy, parts.tokenizer, parts.optimizer, asdict(state))
        checkpoint.prune(folder, cfg.checkpoint.keep, state.best_step)
        return path

    rows, state.before = read_rows(log.path), state.before or measure(samples=cfg.eval.samples)
    say(f"run: {folder}   {len(parts.train)} prompts, {len(parts.heldout)} held out {state.before}")
    with Interrupt() as interrupt, progress(state.step, cfg.optim.steps) as advance:
        while state.step < cfg.optim.steps and not interrupt.asked:
            try:
                give_up(cfg, state)
                parts.scoring.trainer_state.global_step = state.step
                row, sample = training_step(cfg, parts, state)
            except UserError as error:
                save()
                raise UserError(f"{error}; step {state.step} is kept: resume={folder} continues") from error
            state.step += 1
            keep = bool(cfg.checkpoint.every) and state.step % cfg.checkpoint.every == 0
            if cfg.eval.every and state.step % cfg.eval.every == 0:
                row |= {f"heldout/{name}": x for name, x in measure(samples=1).items()}
                if row["heldout/accuracy"] > state.best_accuracy:
                    state.best_accuracy, state.best_step, keep = row["heldout/accuracy"], state.step, True
            rows.append({"step": state.step, **row})
            suspicion = hacking.suspicion(rows, state.before)
            rows[-1]["hacking"] = float(suspicion is not None)
            log.write(rows[-1], sample)
            if suspicion and hacking.is_news(rows):
                suspect(state.step, suspicion)
            if state.step % cfg.log.every == 0 or state.step == 1:
                show(state.step, row, sample)
            if keep:
                save()
            advance(state.step)
    log.close()
    path = save()
    if state.step < cfg.optim.steps:
        say(f"stopped after step {state.step}: python train.py resume={folder} continues")
        return path
    after = measure(samples=cfg.eval.samples)
    before_and_after(
        state.before, after, f"{len(parts.heldout)} held-out prompts, temperature {cfg.eval.temperature:g}")
    report.write(folder, read_rows(log.path), state.before, after)
    say(f"report: {folder / 'report.md'}\nmodel: {path}")
    return path


def give_up(cfg: Config, state: State) -> None:
    """UserError after optim.max_skips updates in a row that were not finite."""
    if state.skips >= cfg.optim.max_skips:
        raise UserError(f"{state.skips} updates in a row had a loss or a gradient that is not finite: try a smaller "
                        "optim.lr, a longer optim.warmup, a smaller loss.clip, or model.dtype=float32")


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        usage(__doc__ or "", options(TABLES))
        return 0
    try:
        train(runs.configure(argv), argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {of_a_file(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
