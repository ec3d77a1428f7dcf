"""The policy: a Hugging Face causal LM read as backbone + unembedding, and the critic that may come with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from rlkl import lora
from rlkl.errors import ChatError, UserError, first_line
from rlkl.logprobs import Backend, head_logits, token_logprobs
from rlkl.types import Batch, Evaluation, Head, Sampling

CriticKind = Literal["none", "head", "network"]


class Critic(nn.Module):
    """V(s): a zero-initialised linear head on the policy's states, or on those of a backbone of its own."""

    def __init__(self, lm: PreTrainedModel, own_backbone: bool) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(lm.base_model) if own_backbone else None
        weight = lm.get_output_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)  # V = 0 at first: a random head gives critic gradients in the hundreds
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T+1, D) states of the policy → (B, T) V(s_t) and (B,) V after the last sampled token."""
        if self.backbone is not None:
            hidden = trajectory(self.backbone, batch)
        values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        last = values.gather(1, batch.attended.sum(1, keepdim=True)).squeeze(1)
        return values[:, :-1].masked_fill(~batch.mask, 0.0), last


class Policy(nn.Module):
    """Backbone + unembedding + optional critic. Scores tokens at `batch.temperature`, with float32 logits."""

    def __init__(self, lm: PreTrainedModel, critic: CriticKind = "none", vocab_size: int | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.critic = None if critic == "none" else Critic(lm, own_backbone=critic == "network")
        self.vocab_size = vocab_size  # of the tokenizer; further rows of the embedding are padding
        self.backend: Backend = "auto"  # of token_logprobs
        self.keep_bytes = 0  # of logits, from the forward pass to the backward pass

    @property
    def backbone(self) -> nn.Module:
        return self.lm.base_model

    @property
    def head(self) -> Head:
        """Read from the model each time, so that it is always the one being trained."""
        unembedding, config = self.lm.get_output_embeddings(), self.lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2; the scales: Cohere, Granite
        return Head(unembedding.weight, unembedding.bias, scale, softcap, self.vocab_size)

    def logits(self, states: Tensor) -> Tensor:
        """(M, D) → (M, V) float32."""
        return head_logits(states, self.head)

    def states(self, batch: Batch) -> Tensor:
        """(B, T, D): the final hidden state *before* each reply token, the one its log-prob is computed from."""
        return trajectory(self.backbone, batch)[:, :-1]

    def evaluate(self, batch: Batch, reference: Policy | None = None) -> Evaluation:
        """Score the sampled tokens; with a reference also both exact KLs, from `batch.ref_states` if it is kept."""
        return self.evaluate_states(trajectory(self.backbone, batch), batch, reference)

    def whole(self, batch: Batch, reference: Policy | None = None) -> Iterator[tuple[Evaluation, Batch]]:
        """`evaluate`, as `in_head_chunks` gives it: the caller calls backward on what it gets."""
        yield self.evaluate(batch, reference), batch

    def in_head_chunks(self, batch: Batch, reference: Policy | None = None, *, tokens: int
                       ) -> Iterator[tuple[Evaluation, Batch]]:
        """Head, loss and backward for about `tokens` reply tokens of whole rows at a time, then once through the trunk.

        The logits of a chunk live from its forward to its backward pass and need not be made again: 3 products, not 4.
        """
        hidden = trajectory(self.backbone, batch)
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        chunk = (batch.mask.sum(1).cumsum(0) - 1).clamp_min(0) // tokens
        start = 0
        for rows in chunk.unique_consecutive(return_counts=True)[1].tolist():
            part = batch[start : start + rows]
            yield self.evaluate_states(leaf[start : start + rows], part, reference, keep_bytes=2**62), part
            start += rows
        if leaf.grad is not None:
            hidden.backward(leaf.grad)

    def evaluate_states(self, hidden: Tensor, batch: Batch, reference: Policy | None, keep_bytes: int | None = None
                        ) -> Evaluation:
        """(B, T+1, D) states of `trajectory` → what they say of the sampled tokens."""
        mask = batch.mask
        ref_hidden, ref_head = (None, None) if reference is None else (reference.states_of(batch)[mask], reference.head)
        stats = token_logprobs(hidden[:, :-1][mask], self.head, batch.response_ids[mask],
                               temperature=batch.temperature, ref_hidden=ref_hidden, ref_head=ref_head,
                               backend=self.backend, keep_bytes=keep_bytes or self.keep_bytes)
        per_token = [None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in stats]
        values = (None, None) if self.critic is None else self.critic(hidden, batch)
        return Evaluation(per_token[0], per_token[1], *values, *per_token[2:])

    @torch.no_grad()
    def score(self, batch: Batch, max_tokens: int) -> Evaluation:
        """`evaluate` without gradients, in micro-batches of at most `max_tokens` padded tokens."""
        whole: dict[str, Tensor] = {}
        for rows, micro in batch.microbatches(max_tokens):
            for name, x in self.evaluate(micro)._asdict().items():
                if x is not None:
                    full = whole.setdefault(name, x.new_zeros(batch.mask.shape[: x.dim()]))
                    full[(rows, slice(x.shape[1])) if x.dim() == 2 else rows] = x
        return Evaluation(**whole)

    @torch.no_grad()
    def states_of(self, batch: Batch) -> Tensor:
        """`states` as a reference: the ones that were kept with the rollout, if they were."""
        return self.states(batch) if batch.ref_states is None else batch.ref_states

    @torch.no_grad()
    def score_and_states(self, batch: Batch, max_tokens: int) -> tuple[Tensor, Tensor]:
        """As a reference: (B, T) log-probs, and the (B, T, D) `states` that an exact KL keeps, M × D and not M × V."""
        logprobs = kept = None
        for rows, micro in batch.microbatches(max_tokens):
            hidden, columns = trajectory(self.backbone, micro), micro.mask.shape[1]
            found = self.evaluate_states(hidden, micro, None).logprobs
            if kept is None:
                logprobs = found.new_zeros(batch.mask.shape)
                kept = hidden.new_zeros(*batch.mask.shape, hidden.shape[-1])
            logprobs[rows, :columns], kept[rows, :columns] = found, hidden[:, :-1]
        return logprobs, kept

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained: the policy, and the critic apart, so that neither's gradient scales the other's step."""
        groups = {"policy": self.lm, "critic": self.critic}
        return {name: [p for p in module.parameters() if p.requires_grad] for name, module in groups.items() if module}


def trajectory(backbone: nn.Module, batch: Batch) -> Tensor:
    """(B, T+1, D) final hidden states after 0, 1, …, T reply tokens."""
    attended = torch.cat([batch.prompt_mask, batch.attended], 1)
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1).masked_fill(~attended, 0)
    out = backbone(input_ids=ids, attention_mask=attended, position_ids=positions(attended), use_cache=False)
    return out.last_hidden_state[:, batch.prompt_ids.shape[1] - 1 :]


def positions(attended: Tensor) -> Tensor:
    """(B, columns) bool → position ids that padding does not shift; models with learned positions need them."""
    return (attended.long().cumsum(1) - 1).clamp_min(0)


class Unadapted(Policy):
    """A policy without its LoRA adapter, on the same tensors: a reference that takes no memory."""

    @property
    def backbone(self) -> Any:
        return lora.unadapted(self.lm)


def reference_of(policy: Policy) -> Policy:
    """The frozen first policy that kl_ref measures against: a copy, or the policy with its adapter switched off."""
    if lora.adapted(policy.lm):
        return Unadapted(policy.lm, vocab_size=policy.vocab_size).eval()
    return Policy(copy.deepcopy(policy.lm), vocab_size=policy.vocab_size).requires_grad_(False).eval()


def checkpoint_layers(policy: Policy) -> None:
    """Keep each layer's input alone for the backward pass, which runs the layer again; the same gradients, exactly.

    Wherever gradients are recorded, and not in train mode, as in transformers: that would bring dropout back.
    """
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        kind = policy.lm.config.model_type
        raise UserError(f"model.checkpointing: {kind} models have no layers that transformers can checkpoint")
    for layer in layers:
        layer.forward = partial(_again_in_backward, layer.forward)


def _again_in_backward(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def load(
    name: str, *, critic: CriticKind = "none", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A causal LM directory or hub name → policy and tokenizer; a LoRA adapter's directory is merged into its base.

    UserError on what is missing or not supported.
    """
    hf_logging.disable_progress_bar()
    if (name[:1] in ("/", ".") or name.count("/") > 1) and not Path(name).is_dir():  # no hub name is like that
        raise UserError(f"model.name={name!r}: no such folder here, in {Path.cwd()}")
    base, *adapters = lora.chain_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        found: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
        lm, report = found
        for folder in adapters:
            lm = lora.merged(lm, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.name={name!r}: not a causal LM with a tokenizer, as a directory or a hub name: "
                        f"{first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name={name!r}: its tokenizer has no EOS token, so no reply could ever end; set eos_token")
    if report["missing_keys"]:
        raise UserError(f"model.name={name!r}: no weights for {', '.join(sorted(report['missing_keys'])[:3])}")
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise UserError(f"model.name={name!r}: its tokenizer has {len(tokenizer)} tokens, its embedding fewer")
    check_reproduced(Policy(lm.to(device).eval(), vocab_size=len(tokenizer)))
    policy = Policy(lm.to(dtype), critic, vocab_size=len(tokenizer))
    return policy.eval(), tokenizer  # eval from here on: dropout would make the ratio differ from 1 before any update


def export(name: str, folder: str, dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> None:
    """Write a checkpoint as an ordinary Hugging Face directory, a LoRA adapter merged into its base, in float32.

    `generate` of what is written samples what was trained: nothing is cut off or penalised, whatever the base declared.
    """
    policy, tokenizer = load(name, dtype=dtype)
    rule = sampling_rule(policy, tokenizer, temperature)
    policy.lm.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, eos_token_id=list(rule.eos_ids),
        pad_token_id=rule.pad_id)
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_reproduced(policy: Policy) -> None:
    """Score a row by `evaluate`, whole and behind padding, and by the model alone; UserError if 1e-4 nats apart."""
    kind, pad = policy.lm.config.model_type, 3
    ids = (torch.arange(12, device=policy.lm.device) * 37 + 5) % (policy.vocab_size or policy.head.weight.shape[0])
    prompt, reply = ids[:6].repeat(2, 1), ids[6:].repeat(2, 1)
    ones = torch.ones_like(reply, dtype=torch.bool)
    kept = torch.stack([ones[0], torch.arange(6, device=ids.device) >= pad])
    batch = Batch(prompt, kept, reply, ones, torch.zeros(reply.shape, device=ids.device), ones[:, 0])
    try:
        with torch.no_grad():
            scored = policy.evaluate(batch).logprobs
            own = [policy.lm(input_ids=ids[None, first:]).logits[0, 5 - first : -1] for first in (0, pad)]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{kind} models are not supported: {first_line(error)}") from error
    logp = torch.stack(own)[..., : policy.vocab_size].float().log_softmax(-1)
    gap = (scored - logp.gather(-1, reply[..., None]).squeeze(-1)).abs().max().item()
    if not gap <= 1e-4:
        raise UserError(f"{kind} models are not supported: evaluate() is {gap:.2g} nats off the model's own logits")


def sampling_rule(policy: Policy, tokenizer: PreTrainedTokenizerBase, temperature: float) -> Sampling:
    """Temperature, every id that ends a reply, and a pad id that is none of them."""
    declared = getattr(policy.lm.generation_config, "eos_token_id", None)
    eos = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    pad = next(i for i in (tokenizer.pad_token_id, *range(len(eos) + 1)) if i is not None and i not in eos)
    return Sampling(temperature=temperature, eos_ids=tuple(sorted(eos)), pad_id=pad, vocab_size=policy.vocab_size)


def context_of(lm: Any) -> int | None:
    """The longest text a model takes, in tokens, where its config says it."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Raw text as it is, chat messages through the tokenizer's template. ChatError if it has none, or refuses them."""
    return tokenizer(prompt).input_ids if isinstance(prompt, str) else templated(tokenizer, prompt)


def templated(tokenizer: PreTrainedTokenizerBase, prompt: list[dict]) -> list[int]:
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program, and may refuse a role, an order, a key in its own way
        raise ChatError(f"chat messages need a tokenizer with a chat template that takes them: {first_line(error)}; "
                        f"they were {str(prompt)[:60]}") from error


def decode(tokenizer: PreTrainedTokenizerBase, batch: Batch) -> list[str]:
    """B replies as text, special tokens left out."""
    rows = zip(batch.response_ids.cpu(), batch.mask.cpu(), strict=True)
    return [tokenizer.decode(ids[sampled], skip_special_tokens=True) for ids, sampled in rows]


def left_pad(prompts: list[list[int]], pad_id: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """N token lists → (N, P) ids and bool mask."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    return ids, torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
