"""Before the first update: do the sampler, the scorer, the trained pass and the reference tell the same story?"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.build import Parts
from rlkl.errors import UserError
from rlkl.model import encode, left_pad
from rlkl.rollout.sample import draw_uniforms
from rlkl.schema import Config
from rlkl.seeds import draw, generator

PROMPTS, SAMPLES = 8, 2
MOST, MEAN = 1e-3, 2e-2  # nats: the largest gap in float32, the mean gap in bfloat16


def selfcheck(cfg: Config, parts: Parts, fresh: bool) -> str:
    """One line of how far apart they are, on a few sampled replies.

    The ratio of the trained pass (padded with others, in micro-batches) to the scored one (each row alone) must be 1,
    the sampler's log-probs those of the scorer, and the reference the policy itself if training starts here (`fresh`).
    UserError if a gap is above MOST nats; in bfloat16 a gap above MEAN nats on average is only said.
    """
    examples = draw(parts.train, min(PROMPTS, len(parts.train)), cfg.seed, step=0)
    device, narrow = parts.policy.lm.device, next(parts.policy.parameters()).dtype == torch.bfloat16
    ids, mask = left_pad([encode(parts.tokenizer, e.prompt) for e in examples], parts.rule.pad_id, device)
    rng = generator(cfg.seed, 0, "self-check")
    uniforms = draw_uniforms(len(examples) * SAMPLES, cfg.sampling.max_new_tokens, rng, device)
    batch = parts.sampler(parts.policy, ids, mask, uniforms, parts.rule)

    scored = parts.policy.score(batch, max_tokens=1).logprobs
    trained = torch.zeros_like(scored)
    for rows, micro in batch.microbatches(cfg.optim.micro_tokens):
        trained[rows, : micro.mask.shape[1]] = parts.policy.evaluate(micro).logprobs.detach()
    gaps = {"ratio": trained - scored, "sampler": batch.sampler_logprobs - scored}
    if fresh and parts.reference is not None:
        gaps["reference"] = parts.reference.score(batch, cfg.optim.micro_tokens).logprobs - trained
    return judged({name: gap[batch.mask].abs() for name, gap in gaps.items()}, narrow)


def judged(gaps: dict[str, Tensor], narrow: bool) -> str:
    """The line, or UserError. `narrow`: bfloat16."""
    said = ", ".join(f"{name} {float(gap.max()):.1e}" for name, gap in gaps.items())
    far = [name for name, gap in gaps.items() if not (gap.mean() <= MEAN if narrow else gap.max() <= MOST)]
    if far and not narrow:
        raise UserError(f"self-check: log-probs that must agree differ by more than {MOST} nats ({said}): what samples "
                        "and what is trained are not one policy, so every ratio would be wrong; try "
                        "sampling.backend=naive, or report it with the model's name")
    warning = f"; more than {MEAN} on average in {', '.join(far)}: expect ratios off 1 before any update" if far else ""
    return f"self-check: largest gaps in nats: {said}{warning}"
