"""Load a causal LM from a folder or the hub, check that we reproduce it, and write it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from rlkl.errors import UserError, first_line
from rlkl.policy import lora
from rlkl.policy.critic import CriticKind
from rlkl.policy.policy import Policy
from rlkl.types import Batch, SamplingParams

TOLERANCE = 1e-4  # nats between our log-probs and the model's own: float32 rounding is below 1e-5


def load(
    name: str,
    *,
    critic: CriticKind = "none",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A policy in eval mode and its tokenizer, from a causal LM's folder or hub name.

    The folder of a LoRA adapter is merged into its base. The policy stays in eval mode from here
    on: dropout would make the ratio differ from 1 before any update. Raises UserError on what is
    missing or not supported.
    """
    hf_logging.disable_progress_bar()
    check_folder(name)
    base, *adapters = lora.chain_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, output_loading_info=True
        )
        lm, report = loaded
        for folder in adapters:
            lm = lora.merged(lm, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.name={name!r}: not a causal LM with a tokenizer, as a directory or a hub name: "
            f"{first_line(error)}"
        ) from error
    check_usable(name, lm, tokenizer, report["missing_keys"])
    check_reproduced(Policy(lm.to(device).eval(), vocab_size=len(tokenizer)))
    return Policy(lm.to(dtype), critic, vocab_size=len(tokenizer)).eval(), tokenizer


def check_folder(name: str) -> None:
    """UserError where a name can only be that of a folder, and there is none."""
    looks_like_a_path = name[:1] in ("/", ".") or name.count("/") > 1  # no hub name does
    if looks_like_a_path and not Path(name).is_dir():
        raise UserError(f"model.name={name!r}: no such folder here, in {Path.cwd()}")


def check_usable(name: str, lm: Any, tokenizer: Any, missing_keys: set[str]) -> None:
    """UserError on a tokenizer without EOS, missing weights, or too small an embedding."""
    problem = None
    if tokenizer.eos_token_id is None:
        problem = "its tokenizer has no EOS token, so no response could ever end; set eos_token"
    elif missing_keys:
        problem = f"no weights for {', '.join(sorted(missing_keys)[:3])}"
    elif len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        problem = f"its tokenizer has {len(tokenizer)} tokens, its embedding fewer"
    if problem:
        raise UserError(f"model.name={name!r}: {problem}")


def check_reproduced(policy: Policy) -> None:
    """Score one row with `policy`, alone and behind padding, and with the model's own logits.

    Raises UserError if they are more than TOLERANCE apart: a model that we do not reproduce would
    be trained wrongly.
    """
    kind, pad = policy.lm.config.model_type, 3
    vocab_size = policy.vocab_size or policy.head.weight.shape[0]
    ids = (torch.arange(12, device=policy.lm.device) * 37 + 5) % vocab_size
    prompt, response = ids[:6].repeat(2, 1), ids[6:].repeat(2, 1)
    mask = torch.ones_like(response, dtype=torch.bool)
    padded = torch.arange(6, device=ids.device) >= pad
    prompt_mask = torch.stack([mask[0], padded])
    zeros = torch.zeros(response.shape, device=ids.device)
    batch = Batch(prompt, prompt_mask, response, mask, zeros, truncated=mask[:, 0])
    try:
        with torch.no_grad():
            ours = policy(batch).logprobs
            logits = [
                policy.lm(input_ids=ids[None, first:]).logits[0, 5 - first : -1]
                for first in (0, pad)
            ]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{kind} models are not supported: {first_line(error)}") from error
    own = torch.stack(logits)[..., : policy.vocab_size].float().log_softmax(-1)
    own = own.gather(-1, response[..., None]).squeeze(-1)
    gap = (ours - own).abs().max().item()
    if not gap <= TOLERANCE:
        raise UserError(
            f"{kind} models are not supported: our log-probs are {gap:.2g} nats off those of the "
            "model's own logits"
        )


def sampling_params(policy: Policy, tokenizer: Any, temperature: float) -> SamplingParams:
    """Temperature, every id that ends a response, and a pad id that is none of them."""
    declared = getattr(policy.lm.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    eos = {tokenizer.eos_token_id, *declared} - {None}
    candidates = (tokenizer.pad_token_id, *range(len(eos) + 1))
    pad = next(i for i in candidates if i is not None and i not in eos)
    return SamplingParams(
        temperature=temperature,
        eos_ids=tuple(sorted(eos)),
        pad_id=pad,
        vocab_size=policy.vocab_size,
    )


def context_of(lm: Any) -> int | None:
    """The longest text that a model takes, in tokens, if its config says so."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None)


def checkpoint_layers(policy: Policy) -> None:
    """Gradient checkpointing, in place: keep each layer's input, run the layer again in backward.

    The gradients are exactly the same. It is active wherever gradients are recorded. In
    transformers it needs train mode, which would bring dropout back. Raises UserError on models
    without layers that can be checkpointed.
    """
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        kind = policy.lm.config.model_type
        raise UserError(
            f"model.gradient_checkpointing: {kind} models have no layers that transformers can "
            "checkpoint"
        )
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def export(
    name: str, folder: str, dtype: torch.dtype = torch.float32, temperature: float = 1.0
) -> None:
    """Write a checkpoint as an ordinary Hugging Face directory; a LoRA adapter is merged.

    `generate` of what is written samples as training did: at this temperature, with no top-k, top-p
    or penalty, whatever the base declared.
    """
    policy, tokenizer = load(name, dtype=dtype)
    params = sampling_params(policy, tokenizer, temperature)
    policy.lm.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(params.eos_ids),
        pad_token_id=params.pad_id,
    )
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
