"""Load a causal LM from a folder or the hub, check that we reproduce it, and write it back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
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
from rlkl.policy.attention import attention_of, exchanged_attention
from rlkl.policy.critic import CriticKind
from rlkl.policy.policy import Policy
from rlkl.policy.states import positions
from rlkl.types import Batch, SamplingParams

# Nats between our log-probs and the model's own. Rounding in float32 is below 1e-5 on a CPU. A GPU
# takes another kernel for another shape, and large models add up the difference over their layers.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}


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
    checked = Policy(lm.to(device).eval(), vocab_size=len(tokenizer))
    check_reproduced(checked)
    policy = Policy(lm.to(dtype), critic, vocab_size=len(tokenizer)).eval()
    policy.shared_prompts = checked.shared_prompts
    check_kernels(policy)
    return policy, tokenizer


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
    """Compare `policy` with the model's own logits of each row alone: see `gap_to_own_logits`.

    A model that we reproduce only with each prompt read again for each response is read like that
    from here on, and one line says so. Raises UserError on a model that we do not reproduce: it
    would be trained wrongly.
    """
    kind, device = policy.lm.config.model_type, policy.lm.device
    tolerance = TOLERANCE.get(device.type, TOLERANCE["cpu"])
    problem = reproduction_problem(policy, tolerance)
    if problem and policy.shared_prompts:
        policy.shared_prompts = False
        with_shared_prompts, problem = problem, reproduction_problem(policy, tolerance)
        if not problem:
            policy.stop_sharing_prompts(with_shared_prompts)
    if problem:
        raise UserError(f"{kind} models are not supported: {problem}")


@torch.no_grad()
def check_kernels(policy: Policy) -> None:
    """Score a few tokens in the dtype of the run, whose kernels may not serve this model or device.

    They are those of the attention over shared prompts: without them prompts are not shared.
    """
    if policy.shared_prompts:
        try:
            policy(probe(policy))
        except RuntimeError as error:
            policy.stop_sharing_prompts(first_line(error))


def reproduction_problem(policy: Policy, tolerance: float) -> str | None:
    """What keeps `policy` from giving the model's own log-probs; None if they are the same."""
    try:
        gap = gap_to_own_logits(policy)
    except (TypeError, AttributeError) as error:
        return first_line(error)
    if gap <= tolerance:
        return None
    return f"our log-probs are {gap:.2g} nats off those of the model's own logits"


def probe(policy: Policy) -> Batch:
    """Two responses to one prompt, and one to a shorter prompt."""
    vocab_size = policy.vocab_size or policy.head.weight.shape[0]
    device = policy.lm.device
    ids = (torch.arange(18, device=device) * 37 + 5) % vocab_size
    short = torch.arange(6, device=device) >= 3  # the shorter prompt is the end of the other one
    prompt, response = ids[:6].repeat(3, 1), torch.stack([ids[6:12], ids[12:], ids[6:12]])
    mask = torch.ones_like(response, dtype=torch.bool)
    prompt_mask = torch.stack([mask[0], mask[0], short])
    zeros = torch.zeros(response.shape, device=device)
    return Batch(prompt, prompt_mask, response, mask, zeros, truncated=mask[:, 0])


@torch.no_grad()
def gap_to_own_logits(policy: Policy) -> float:
    """The largest difference in nats, as a scorer and as a sampler reads.

    Scored are the responses of `probe`. Read are its prompts, side by side with padding on the
    left.
    """
    batch = probe(policy)
    prompt, prompt_mask, response = batch.prompt_ids, batch.prompt_mask, batch.response_ids
    vocab_size = policy.vocab_size or policy.head.weight.shape[0]
    ours = policy(batch).logprobs
    states = policy.backbone(
        input_ids=prompt,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        use_cache=False,
    ).last_hidden_state
    first = policy.logits(states[:, -1])[:, :vocab_size].log_softmax(-1)
    first = first.gather(-1, response[:, :1])

    differences = []
    for row in range(3):
        text = torch.cat([prompt[row, prompt_mask[row]], response[row]])
        own = policy.lm(input_ids=text[None]).logits[0, -7:-1, :vocab_size]
        own = own.float().log_softmax(-1).gather(-1, response[row, :, None]).squeeze(-1)
        differences += [ours[row] - own, first[row] - own[:1]]
    return torch.cat(differences).abs().max().item()


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
    backbones = [policy.backbone]
    if policy.critic is not None and policy.critic.backbone is not None:
        backbones.append(policy.critic.backbone)
    for backbone in backbones:
        layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            kind = policy.lm.config.model_type
            raise UserError(
                f"model.gradient_checkpointing: {kind} models have no layers that transformers can "
                "checkpoint"
            )
        for layer in layers:
            layer.forward = partial(_checkpointed, layer.forward, backbone)


def _checkpointed(
    forward: Callable[..., Any], backbone: nn.Module, *args: Any, **options: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    attention = attention_of(backbone)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the forward pass, and of the same once more in the backward pass."""
        return nullcontext(), exchanged_attention(backbone, attention)

    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        **options,
    )


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
