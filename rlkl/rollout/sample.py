"""The uniform → token rule. All randomness of a rollout is a (B, T) tensor of uniforms: same uniforms, same tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlkl.types import Batch, Sampling


def draw_uniforms(rows: int, columns: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """(rows, columns) in [0, 1), drawn on the CPU so that every device samples from the same numbers."""
    uniforms = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return uniforms.to(device, torch.float32 if torch.device(device).type == "mps" else torch.float64)


def pick(logits: Tensor, uniforms: Tensor, rule: Sampling) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: (B, V) logits and (B,) uniforms in [0, 1) → (B,) ids and their (B,) log-probs, nats.

    The log-probs are those of the distribution sampled from; greedy (temperature 0) reports those of temperature 1.
    """
    if rule.vocab_size is not None:
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= rule.vocab_size, -torch.inf)
    logp = (logits / (rule.temperature or 1.0)).log_softmax(-1)
    if rule.temperature == 0:
        ids = logp.argmax(-1)
    else:
        if rule.top_k or rule.top_p < 1 or rule.min_p:
            logp = logp.masked_fill(~nucleus(logp, rule), -torch.inf).log_softmax(-1)
        wide = torch.float32 if logp.device.type == "mps" else torch.float64
        cdf = logp.to(wide).exp().cumsum(-1)
        total = cdf[:, -1]
        target = torch.minimum(uniforms.to(wide) * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)  # the first with cdf > target: p > 0
        ids = ids.clamp_max(logits.shape[-1] - 1)  # nan logits: let the loss report them
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)


def nucleus(logp: Tensor, rule: Sampling) -> Tensor:
    """(B, V) bool: the ids that top-k, top-p and min-p leave. For evaluation only; the most likely id always stays."""
    ordered, order = logp.sort(-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if rule.top_k:
        keep[:, rule.top_k :] = False
    keep &= ordered.exp().cumsum(-1) - ordered.exp() < rule.top_p  # the mass before an id has not reached top_p yet
    keep &= ordered >= ordered[:, :1] + torch.tensor(rule.min_p).log()
    return torch.zeros_like(keep).scatter(-1, order, keep)


def cut(batch: Batch, rule: Sampling) -> Batch:
    """Each reply up to the token that completes the first stop string; such a reply is finished, not truncated.

    The log-probs of what is left are as valid as before. For evaluation only: no policy is trained to end like that.
    """
    length, truncated, stop = batch.mask.sum(1), batch.truncated.clone(), rule.stop or (lambda ids: False)
    for row, ids in enumerate(batch.response_ids.tolist()):
        if stop(ids := ids[: length[row]]):
            length[row] = bisect.bisect_left(range(len(ids)), True, key=lambda n, ids=ids: stop(ids[:n]))
            truncated[row] = False
    mask = torch.arange(int(length.max()), device=length.device) < length[:, None]
    tokens = torch.where(mask, batch.response_ids[:, : mask.shape[1]], rule.pad_id)
    return Batch(batch.prompt_ids, batch.prompt_mask, tokens, mask, batch.sampler_logprobs[:, : mask.shape[1]],
                 truncated, batch.temperature)


@contextmanager
def sampling_mode(policy: nn.Module) -> Iterator[None]:
    """No dropout and no gradients while sampling, and the mode as it was afterwards, also after an exception.

    no_grad and not inference_mode: tensors of the latter may not enter a graph.
    """
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.train(training)
