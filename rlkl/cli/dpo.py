"""Direct preference optimisation: the policy of an RLHF run, from the preference file alone (arXiv:2305.18290)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.build import dtype_of, model_name, pick_device
from rlkl.cli.common import configure, finish, new_run, open_log
from rlkl.model import context_of, load, reference_of, sampling_rule
from rlkl.preferences import dpo, read_pairs, split
from rlkl.schema_supervised import Dpo
from rlkl.supervised import Item, collate, fit, item_of, that_fit
from rlkl.terminal import console, say


def main(argv: list[str]) -> None:
    """prefer the chosen replies to the rejected ones, without a reward model"""
    cfg = configure(argv, Dpo, "dpo", __doc__ or "")
    if cfg is None:
        return
    device, sides = pick_device(cfg.device), split(read_pairs(cfg.data), cfg.heldout, cfg.data)
    policy, tokenizer = load(model_name(cfg.model.name, console), device=device, dtype=dtype_of(cfg, device))
    reference = reference_of(policy)
    pad, limit = sampling_rule(policy, tokenizer, 1.0).pad_id, cfg.max_tokens or context_of(policy.lm)
    train, heldout = (that_fit((item_of(tokenizer, p.prompt, (p.chosen, p.rejected), p.truncated) for p in side),
                               limit, "pairs") for side in sides)
    folder = new_run(cfg, "dpo", argv)
    say(f"device: {device}   run: {folder}   {len(train)} pairs, {len(heldout)} held out")

    def objective(items: list[Item]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = collate(items, pad, device)
        with torch.no_grad():
            ref_logprobs = reference.evaluate(batch).logprobs
        return dpo(policy.evaluate(batch).logprobs, ref_logprobs, cfg.beta)

    before, after = fit(cfg, policy, objective, train, heldout, open_log(cfg, folder))
    finish(folder, policy.lm, tokenizer, before, after, "held-out pairs; implicit rewards beta·log(pi/ref), in nats")
