"""What benchmarks/learning.py starts, once with each package: it times what it is asked to.

Run as a file, so that `rlkl` is that of PYTHONPATH and nothing else of this checkout is imported.
A line with the lengths of a batch on stdin → a line with what a run on it gave on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

try:
    from rlkl.policy.policy import Policy
except ModuleNotFoundError:  # before 0.2 it was here
    from rlkl.model import Policy  # pyright: ignore[reportMissingImports]
from rlkl.types import Batch

VOCABULARY = 8192


def random_policy() -> Any:
    """A policy of 5.2M parameters, the same ones in every process."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Policy(AutoModelForCausalLM.from_config(config).eval())


def random_batch(prompts: list[int], responses: list[list[int]]) -> Batch:
    """Rows of random tokens. prompts: their lengths. responses: the lengths of those to each."""
    rng = torch.Generator().manual_seed(1)
    rows = [n for n, group in zip(prompts, responses, strict=True) for _ in group]
    lengths = torch.tensor([n for group in responses for n in group])
    prompt_mask = torch.arange(max(rows)) >= max(rows) - torch.tensor(rows)[:, None]
    ids = torch.randint(VOCABULARY, (len(prompts), max(rows)), generator=rng)
    group_sizes = torch.tensor([len(group) for group in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return Batch(
        prompt_ids=ids.repeat_interleave(group_sizes, 0).masked_fill(~prompt_mask, 0),
        prompt_mask=prompt_mask,
        response_ids=torch.randint(VOCABULARY, mask.shape, generator=rng),
        mask=mask,
        sampler_logprobs=torch.zeros(mask.shape),
        truncated=torch.zeros(len(mask), dtype=torch.bool),
    )


def logprobs(policy: Any, batch: Batch) -> Tensor:
    """(B, T) log-probs of the sampled tokens, with gradients."""
    output = policy.evaluate(batch) if hasattr(policy, "evaluate") else policy(batch)
    return output.logprobs


def learn(policy: Any, batch: Batch) -> dict[str, float]:
    """CPU seconds of a forward and a backward pass, and numbers to compare with the other side's.

    The loss is the sum of the log-probs with weights that differ from token to token.
    """
    policy.zero_grad()
    weights = torch.linspace(0.5, 1.5, batch.mask.numel()).view(batch.mask.shape)
    start = time.process_time()
    loss = -(weights * logprobs(policy, batch)).sum()
    loss.backward()
    seconds = time.process_time() - start
    norm = sum(float(p.grad.square().sum()) for p in policy.parameters()) ** 0.5
    return {"seconds": seconds, "loss": loss.item(), "gradient_norm": norm}


def main() -> None:
    torch.set_num_threads(1)
    policy = random_policy()
    for line in sys.stdin:
        print(json.dumps(learn(policy, random_batch(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
