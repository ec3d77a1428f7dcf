"""Direct preference optimisation: RLHF from preferences, without a reward model."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkl.cli.common import configure, finish, log_start, new_run, open_log
from rlkl.policy.model import context_of, load, sampling_params
from rlkl.policy.policy import reference_of
from rlkl.run.build import dtype_of, model_name, pick_device
from rlkl.run.schema import Chat
from rlkl.supervised.data import Item, collate, filter_by_length, tokenize
from rlkl.supervised.fit import fit
from rlkl.supervised.preferences import Pair, dpo, read_pairs, split
from rlkl.supervised.schema import DPOConfig


def main(argv: list[str]) -> None:
    cfg = configure(argv, DPOConfig, "dpo", __doc__ or "")
    if cfg is None:
        return
    device = pick_device(cfg.device)
    train_pairs, heldout_pairs = split(read_pairs(cfg.data), cfg.heldout, cfg.data)
    name = model_name(cfg.model.name)
    policy, tokenizer = load(name, device=device, dtype=dtype_of(cfg, device))
    reference = reference_of(policy)
    pad_id = sampling_params(policy, tokenizer, 1.0).pad_id
    max_tokens = cfg.max_tokens or context_of(policy.lm)
    train = filter_by_length(tokenize_pairs(tokenizer, train_pairs, cfg.chat), max_tokens, "pairs")
    heldout = filter_by_length(
        tokenize_pairs(tokenizer, heldout_pairs, cfg.chat), max_tokens, "pairs"
    )
    folder = new_run(cfg, "dpo", argv)
    log_start(device, folder, train, heldout, "pairs")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = collate(items, pad_id, device)
        with torch.no_grad():
            ref_logprobs = reference(batch).logprobs
        return dpo(policy(batch).logprobs, ref_logprobs, cfg.beta)

    with closing(open_log(cfg, folder)) as log:
        before, after = fit(cfg, policy, objective, train, heldout, log)
    title = "held-out pairs; implicit rewards beta·log(pi/ref), in nats"
    finish(folder, policy.lm, tokenizer, before, after, title)


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], chat: Chat) -> list[Item]:
    """Each prompt with its two responses, (chosen, rejected)."""
    return [tokenize(tokenizer, p.prompt, (p.chosen, p.rejected), p.truncated, chat) for p in pairs]
