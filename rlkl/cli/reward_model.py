"""A reward model: Bradley-Terry on pairs of a chosen and a rejected reply, the first phase of RLHF."""

from __future__ import annotations

import json

from rich.table import Table
from torch import Tensor

from rlkl.build import dtype_of, model_name, pick_device
from rlkl.cli.common import configure, finish, new_run, open_log
from rlkl.cli.label import sampled
from rlkl.model import decode, load
from rlkl.preferences import Bin, Pair, bradley_terry, calibration, read_pairs, split
from rlkl.rewards.models import RewardModel, load_reward_model
from rlkl.schema_supervised import Draws
from rlkl.schema_supervised import RewardModel as Schema
from rlkl.supervised import Item, fit, that_fit
from rlkl.terminal import console, say
from rlkl.types import Example


def main(argv: list[str]) -> None:
    """train a reward model on pairs of a chosen and a rejected reply"""
    cfg = configure(argv, Schema, "reward-model", __doc__ or "")
    if cfg is None:
        return
    device, sides = pick_device(cfg.device), split(read_pairs(cfg.data), cfg.heldout, cfg.data)
    model = load_reward_model(model_name(cfg.model.name, console), "model.name", fresh=True)
    model = model.to(device, dtype_of(cfg, device))
    train, heldout = (that_fit([item_of(model, p) for p in side], cfg.max_tokens or model.context, "pairs")
                      for side in sides)
    folder = new_run(cfg, "reward-model", argv)
    say(f"device: {device}   run: {folder}   {len(train)} pairs, {len(heldout)} held out")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        return bradley_terry(model([reply for item in items for reply in item.replies]))

    error, _ = calibrated(model, heldout, cfg.optim.micro_tokens)
    before, after = fit(cfg, model, objective, train, heldout, open_log(cfg, folder))
    before["calibration_error"] = error
    after["calibration_error"], bins = calibrated(model, heldout, cfg.optim.micro_tokens)
    normalise(model, reference_rows(cfg, model, sides[0], train), cfg.optim.micro_tokens)
    (folder / "heldout.json").write_text(json.dumps({**after, "bins": [b._asdict() for b in bins]}, indent=1))
    finish(folder, model.lm, model.tokenizer, before, after, "held-out pairs; margins in nats")
    show(bins)


def item_of(model: RewardModel, pair: Pair) -> Item:
    """Both texts whole, as the model reads them: nothing is shared, there is no prompt of its own."""
    both = zip((pair.chosen, pair.rejected), pair.truncated, strict=True)
    return Item([], tuple(model.read(pair.prompt, reply, not cut) for reply, cut in both))


def calibrated(model: RewardModel, pairs: list[Item], micro_tokens: int) -> tuple[float, list[Bin]]:
    rewards = model.score([reply for item in pairs for reply in item.replies], micro_tokens)
    return calibration(rewards[::2] - rewards[1::2])


def reference_rows(cfg: Schema, model: RewardModel, pairs: list[Pair], items: list[Item]) -> list[list[int]]:
    """What is to score 0 on average: the reference policy's replies to the pairs' prompts, or the pairs' own."""
    how = cfg.reference
    if not how.name:
        return [reply for item in items for reply in item.replies]
    policy, tokenizer = load(how.name, device=model.lm.device, dtype=next(model.parameters()).dtype)
    examples = [Example(p) for p in list({str(p.prompt): p.prompt for p in pairs}.values())[: how.prompts]]
    rows, draws = [], Draws(samples=1, max_new_tokens=how.max_new_tokens)
    for asked, batch in sampled(policy, tokenizer, examples, draws, cfg.seed):
        said = zip(asked, decode(tokenizer, batch), (~batch.truncated).tolist(), strict=True)
        rows += [model.read(e.prompt, reply, done) for e, reply, done in said]
    return rows


def normalise(model: RewardModel, rows: list[list[int]], micro_tokens: int) -> None:
    """Write mean and standard deviation of the reward into the model's config: `reward_model` takes them out.

    A Bradley-Terry model may add any constant, and its scale is that of the labels (Ziegler et al. 2019, sec. 2.1).
    """
    rewards = model.score(rows, micro_tokens).double()
    mean, std = rewards.mean().item(), rewards.std().item() if len(rows) > 1 else 0.0
    model.lm.config.reward_mean, model.lm.config.reward_std = mean, std or 1.0
    console.print(f"rewards of {len(rows)} replies of the reference: mean {mean:.3f}, standard deviation {std:.3f}, "
                  "both in the model's config")


def show(bins: list[Bin]) -> None:
    table = Table("sure of it by", "pairs", "on average", "right", title="calibration", title_justify="left")
    for b in bins:
        table.add_row(f"{b.low:.2f} to {b.high:.2f}", str(b.pairs), f"{b.confidence:.3f}", f"{b.accuracy:.3f}")
    console.print(table)
