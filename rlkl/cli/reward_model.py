"""A reward model: Bradley-Terry on pairs of a chosen and a rejected response, the start of RLHF."""

from __future__ import annotations

import json
from contextlib import closing

from rich.table import Table
from torch import Tensor

from rlkl.cli.common import configure, finish, log_start, new_run, open_log
from rlkl.cli.label import generate_responses
from rlkl.policy.model import load
from rlkl.rewards.models import RewardModel, load_reward_model
from rlkl.run.build import dtype_of, model_name, pick_device
from rlkl.run.terminal import console, log_line
from rlkl.supervised.data import Item, filter_by_length
from rlkl.supervised.fit import fit
from rlkl.supervised.preferences import Bin, Pair, bradley_terry, calibration, read_pairs, split
from rlkl.supervised.schema import LabelSampling, RewardModelConfig
from rlkl.types import Example


def main(argv: list[str]) -> None:
    cfg = configure(argv, RewardModelConfig, "reward-model", __doc__ or "")
    if cfg is None:
        return
    device = pick_device(cfg.device)
    train_pairs, heldout_pairs = split(read_pairs(cfg.data), cfg.heldout, cfg.data)
    model = load_reward_model(model_name(cfg.model.name), "model.name", fresh=True)
    model = model.to(device, dtype_of(cfg, device))
    max_tokens = cfg.max_tokens or model.context
    train = filter_by_length(tokenize_pairs(model, train_pairs), max_tokens, "pairs")
    heldout = filter_by_length(tokenize_pairs(model, heldout_pairs), max_tokens, "pairs")
    folder = new_run(cfg, "reward-model", argv)
    log_start(device, folder, train, heldout, "pairs")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        return bradley_terry(model(texts(items)))

    micro_tokens = cfg.optim.micro_tokens
    error_before, _ = heldout_calibration(model, heldout, micro_tokens)
    with closing(open_log(cfg, folder)) as log:
        before, after = fit(cfg, model, objective, train, heldout, log)
    error_after, bins = heldout_calibration(model, heldout, micro_tokens)
    before["calibration_error"] = error_before
    after["calibration_error"] = error_after
    normalise(model, reference_texts(cfg, model, train_pairs, train), micro_tokens)
    result = {**after, "bins": [b._asdict() for b in bins]}
    (folder / "heldout.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    title = "held-out pairs; margins in nats"
    finish(folder, model.lm, model.tokenizer, before, after, title)
    print_calibration(bins)


def tokenize_pairs(model: RewardModel, pairs: list[Pair]) -> list[Item]:
    """Each pair as two texts (chosen, rejected), prompt included.

    The items have no prompt of their own, since a chat template writes a whole conversation.
    """
    items = []
    for pair in pairs:
        chosen = model.tokenize(pair.prompt, pair.chosen, not pair.truncated[0])
        rejected = model.tokenize(pair.prompt, pair.rejected, not pair.truncated[1])
        items.append(Item([], (chosen, rejected)))
    return items


def texts(items: list[Item]) -> list[list[int]]:
    """The token ids of all texts: chosen, rejected, chosen, rejected, …"""
    return [text for item in items for text in item.responses]


def heldout_calibration(
    model: RewardModel, items: list[Item], micro_tokens: int
) -> tuple[float, list[Bin]]:
    """The calibration error of the model's preferences, and its bins."""
    rewards = model.score(texts(items), micro_tokens)
    return calibration(rewards[::2] - rewards[1::2])


def reference_texts(
    cfg: RewardModelConfig, model: RewardModel, pairs: list[Pair], items: list[Item]
) -> list[list[int]]:
    """The texts whose reward is to have mean 0 and standard deviation 1.

    With `reference.name`, its responses to the pairs' prompts; else the training pairs' own texts.
    """
    reference = cfg.reference
    if not reference.name:
        return texts(items)
    dtype = next(model.parameters()).dtype
    policy, tokenizer = load(reference.name, device=model.lm.device, dtype=dtype)
    prompts = list({str(p.prompt): p.prompt for p in pairs}.values())  # each once
    examples = [Example(prompt) for prompt in prompts[: reference.prompts]]
    sampling = LabelSampling(samples=1, max_new_tokens=reference.max_new_tokens)
    rows = []
    for chunk, responses, batch in generate_responses(
        policy, tokenizer, examples, sampling, cfg.seed
    ):
        finished = (~batch.truncated).tolist()
        for e, response, ended in zip(chunk, responses, finished, strict=True):
            rows.append(model.tokenize(e.prompt, response, ended))
    return rows


def normalise(model: RewardModel, rows: list[list[int]], micro_tokens: int) -> None:
    """Write the reward's mean and standard deviation on these texts into the model's config.

    The reward `reward_model` subtracts the one and divides by the other, since Bradley-Terry leaves
    a constant free and takes its scale from the labels (Ziegler et al. 2019, sec. 2.1).
    """
    rewards = model.score(rows, micro_tokens).double()
    mean = rewards.mean().item()
    std = rewards.std().item() if len(rows) > 1 else 0.0
    model.lm.config.reward_mean = mean
    model.lm.config.reward_std = std or 1.0
    log_line(
        f"rewards of {len(rows)} responses of the reference: mean {mean:.3f}, standard deviation "
        f"{std:.3f}, both in the model's config"
    )


def print_calibration(bins: list[Bin]) -> None:
    """Print one row per bin: how sure the model is, and how often it is right."""
    columns = "confidence", "pairs", "mean confidence", "accuracy"
    table = Table(*columns, title="calibration", title_justify="left")
    for b in bins:
        interval = f"{b.low:.2f} to {b.high:.2f}"
        table.add_row(interval, str(b.pairs), f"{b.confidence:.3f}", f"{b.accuracy:.3f}")
    console.print(table)
