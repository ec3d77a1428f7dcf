"""Check that sampler, scorer and reference log-probs agree before the first update."""

from __future__ import annotations

import torch
from torch import Tensor

from rlkl.errors import UserError
from rlkl.policy.policy import Policy
from rlkl.rollout.sampling import draw_uniforms, generate
from rlkl.run.build import Data, Models
from rlkl.run.schema import Config
from rlkl.run.seeds import generator, sample_examples
from rlkl.types import Batch

PROMPTS, SAMPLES = 8, 2
MAX_GAP = 1e-3  # nats, the largest gap in float32; rounding is below 1e-5
MEAN_GAP_BF16 = 2e-2  # nats, the mean gap in bfloat16, where single tokens differ by more


def selfcheck(cfg: Config, models: Models, data: Data, fresh: bool) -> str:
    """One line with the largest gaps between log-probs that must agree, on a few responses.

    ratio: the trained forward pass (in micro-batches, each prompt read once) against each row
    alone. sampler: the sampler against each row alone. reference: the reference against the policy,
    if training starts here (`fresh`). If prompts read once are too far off, they are read again for
    each response from here on, and one line says so. Raises UserError if another gap is above
    MAX_GAP; in bfloat16 a mean gap above MEAN_GAP_BF16 is only reported.
    """
    policy = models.policy
    examples = sample_examples(data.train, min(PROMPTS, len(data.train)), cfg.seed, step=0)
    rng = generator(cfg.seed, 0, "self-check")
    rows, room = len(examples) * SAMPLES, cfg.sampling.max_new_tokens
    uniforms = draw_uniforms(rows, room, rng, policy.lm.device)
    batch = generate(models, examples, uniforms, models.params)

    bfloat16 = next(policy.parameters()).dtype == torch.bfloat16
    alone = score_each_row_alone(policy, batch)
    trained = score_as_trained(policy, batch, cfg.optim.micro_tokens)
    gap = (trained - alone)[batch.mask].abs()
    if policy.shared_prompts and not agree(gap, bfloat16):
        policy.stop_sharing_prompts(f"or log-probs would be up to {float(gap.max()):.1e} nats off")
        if models.reference is not None:
            models.reference.shared_prompts = False
        trained = score_as_trained(policy, batch, cfg.optim.micro_tokens)
    gaps = {"ratio": trained - alone, "sampler": batch.sampler_logprobs - alone}
    if fresh and models.reference is not None:
        reference = models.reference.score(batch, cfg.optim.micro_tokens).logprobs
        gaps["reference"] = reference - trained
    return report_gaps({name: gap[batch.mask].abs() for name, gap in gaps.items()}, bfloat16)


def score_each_row_alone(policy: Policy, batch: Batch) -> Tensor:
    """(B, T) log-probs, from one row at a time."""
    shared_prompts = policy.shared_prompts
    policy.shared_prompts = False
    try:
        return policy.score(batch, max_tokens=1).logprobs
    finally:
        policy.shared_prompts = shared_prompts


def score_as_trained(policy: Policy, batch: Batch, max_tokens: int) -> Tensor:
    """(B, T) log-probs, from the micro-batches and the forward pass that are trained."""
    logprobs = torch.zeros_like(batch.sampler_logprobs)
    for rows, micro in policy.microbatches(batch, max_tokens):
        logprobs[rows, : micro.mask.shape[1]] = policy(micro).logprobs.detach()
    return logprobs


def agree(gap: Tensor, bfloat16: bool) -> bool:
    """Whether log-probs that differ by `gap` nats are the same but for rounding."""
    return bool(gap.mean() <= MEAN_GAP_BF16 if bfloat16 else gap.max() <= MAX_GAP)


def report_gaps(gaps: dict[str, Tensor], bfloat16: bool) -> str:
    """The line of `selfcheck`, or UserError."""
    largest = ", ".join(f"{name} {float(gap.max()):.1e}" for name, gap in gaps.items())
    line = f"self-check: log-probs that must agree differ by at most: {largest} nats"
    if bfloat16:
        far = [name for name, gap in gaps.items() if not agree(gap, bfloat16)]
        if far:
            line += (
                f"; more than {MEAN_GAP_BF16} on average in {', '.join(far)}: expect ratios off 1 "
                "before any update"
            )
        return line
    if not all(agree(gap, bfloat16) for gap in gaps.values()):
        raise UserError(
            f"self-check: log-probs that must agree differ by more than {MAX_GAP} nats "
            f"({largest}): what samples and what is trained are not one policy, so every ratio "
            "would be wrong; try sampling.backend=naive, or report it with the model's name"
        )
    return line
