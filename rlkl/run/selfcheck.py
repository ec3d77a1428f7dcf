"""Check that sampler, scorer and reference log-probs agree before the first update."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.rollout.sampling import draw_uniforms, generate
from rlkl.run.build import Data, Models
from rlkl.run.schema import Config
from rlkl.run.seeds import generator, sample_examples

PROMPTS, SAMPLES = 8, 2
MAX_GAP = 1e-3  # nats, the largest gap in float32; rounding is below 1e-5
MEAN_GAP_BF16 = 2e-2  # nats, the mean gap in bfloat16, where single tokens differ by more


def selfcheck(cfg: Config, models: Models, data: Data, fresh: bool) -> str:
    """One line with the largest gaps between log-probs that must agree, on a few responses.

    ratio: the trained forward pass (padded, in micro-batches) against the scorer (each row alone).
    sampler: the sampler against the scorer. reference: the reference against the policy, if
    training starts here (`fresh`). Raises UserError if a gap is above MAX_GAP; in bfloat16 a mean
    gap above MEAN_GAP_BF16 is only reported.
    """
    examples = sample_examples(data.train, min(PROMPTS, len(data.train)), cfg.seed, step=0)
    rng = generator(cfg.seed, 0, "self-check")
    rows, room = len(examples) * SAMPLES, cfg.sampling.max_new_tokens
    uniforms = draw_uniforms(rows, room, rng, models.policy.lm.device)
    batch = generate(models, examples, uniforms, models.params)

    scored = models.policy.score(batch, max_tokens=1).logprobs
    trained = torch.zeros_like(scored)
    for rows, micro in models.policy.microbatches(batch, cfg.optim.micro_tokens):
        trained[rows, : micro.mask.shape[1]] = models.policy(micro).logprobs.detach()
    gaps = {"ratio": trained - scored, "sampler": batch.sampler_logprobs - scored}
    if fresh and models.reference is not None:
        reference = models.reference.score(batch, cfg.optim.micro_tokens).logprobs
        gaps["reference"] = reference - trained
    bfloat16 = next(models.policy.parameters()).dtype == torch.bfloat16
    return report_gaps({name: gap[batch.mask].abs() for name, gap in gaps.items()}, bfloat16)


def report_gaps(gaps: dict[str, Tensor], bfloat16: bool) -> str:
    """The line of `selfcheck`, or UserError."""
    largest = ", ".join(f"{name} {float(gap.max()):.1e}" for name, gap in gaps.items())
    line = f"self-check: log-probs that must agree differ by at most: {largest} nats"
    if bfloat16:
        far = [name for name, gap in gaps.items() if not gap.mean() <= MEAN_GAP_BF16]
        if far:
            line += (
                f"; more than {MEAN_GAP_BF16} on average in {', '.join(far)}: expect ratios off 1 "
                "before any update"
            )
        return line
    if any(not gap.max() <= MAX_GAP for gap in gaps.values()):
        raise UserError(
            f"self-check: log-probs that must agree differ by more than {MAX_GAP} nats "
            f"({largest}): what samples and what is trained are not one policy, so every ratio "
            "would be wrong; try sampling.backend=naive, or report it with the model's name"
        )
    return line
