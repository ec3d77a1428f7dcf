"""The policy: a Hugging Face causal LM as backbone + unembedding, with a critic if it has one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlkl.logprobs import Backend, token_logprobs
from rlkl.logprobs.reference import head_logits
from rlkl.policy import lora
from rlkl.policy.attention import Unsupported, unsupported
from rlkl.policy.critic import Critic, CriticKind
from rlkl.policy.microbatches import microbatches
from rlkl.policy.states import hidden_states
from rlkl.types import Batch, Head, PolicyOutput

KEEP_ALL = 2**62  # bytes of logits: no limit


class Policy(nn.Module):
    """Backbone + unembedding + optional critic. It scores tokens at `batch.temperature`."""

    def __init__(self, lm: Any, critic: CriticKind = "none", vocab_size: int | None = None) -> None:
        super().__init__()
        self.lm = lm  # a Hugging Face causal LM
        self.critic = None if critic == "none" else Critic(lm, own_backbone=critic == "network")
        self.vocab_size = vocab_size  # of the tokenizer; more rows of the embedding are padding
        self.backend: Backend = "auto"  # of token_logprobs
        self.keep_bytes = 0  # of logits, kept from the forward to the backward pass
        # Read each prompt once for all of its responses, where the model's attention allows it.
        self.shared_prompts = unsupported(lm.base_model) is None

    def forward(self, batch: Batch, reference: Policy | None = None) -> PolicyOutput:
        """Log-probs, entropy and values of the sampled tokens; with a reference both exact KLs too.

        The reference's hidden states are taken from `batch.ref_states` if they are there.
        """
        return self.read_states(self.hidden_states(self.backbone, batch), batch, reference)

    def forward_in_chunks(
        self, batch: Batch, reference: Policy | None = None, *, tokens: int
    ) -> Iterator[tuple[PolicyOutput, Batch]]:
        """(output, rows) for about `tokens` response tokens at a time, in whole rows.

        The caller calls backward on each chunk before it asks for the next. The backbone runs
        backward once, at the end. A chunk's logits live from its forward to its backward pass, so
        they are computed once and not twice: 3 matrix products instead of 4.
        """
        hidden = self.hidden_states(self.backbone, batch)
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        chunk = (batch.mask.sum(1).cumsum(0) - 1).clamp_min(0) // tokens
        start = 0
        for rows in chunk.unique_consecutive(return_counts=True)[1].tolist():
            end = start + rows
            part = batch[start:end]
            yield self.read_states(leaf[start:end], part, reference, keep_bytes=KEEP_ALL), part
            start = end
        if leaf.grad is not None:
            hidden.backward(leaf.grad)

    def read_states(
        self,
        hidden: Tensor,
        batch: Batch,
        reference: Policy | None = None,
        keep_bytes: int | None = None,
    ) -> PolicyOutput:
        """What (B, T+1, D) hidden states say of the sampled tokens."""
        mask = batch.mask
        ref_hidden, ref_head = None, None
        if reference is not None:
            ref_hidden, ref_head = reference.constant_states(batch)[mask], reference.head
        stats = token_logprobs(
            hidden[:, :-1][mask],
            self.head,
            batch.response_ids[mask],
            temperature=batch.temperature,
            ref_hidden=ref_hidden,
            ref_head=ref_head,
            backend=self.backend,
            keep_bytes=keep_bytes or self.keep_bytes,
        )
        per_token = {
            name: x.new_zeros(mask.shape).masked_scatter(mask, x)
            for name, x in stats._asdict().items()
            if x is not None
        }
        values, last_values = None, None
        if self.critic is not None:
            if self.critic.backbone is not None:
                hidden = self.hidden_states(self.critic.backbone, batch)
            values, last_values = self.critic(hidden, batch)
        return PolicyOutput(**per_token, values=values, last_values=last_values)

    @torch.no_grad()
    def score(self, batch: Batch, max_tokens: int) -> PolicyOutput:
        """`forward` without gradients, in micro-batches of at most `max_tokens` tokens."""
        full: dict[str, Tensor] = {}
        for rows, micro in self.microbatches(batch, max_tokens):
            for name, x in self(micro)._asdict().items():
                if x is not None:
                    shape = batch.mask.shape[: x.dim()]
                    place = full.setdefault(name, x.new_zeros(shape))
                    place[(rows, slice(x.shape[1])) if x.dim() == 2 else rows] = x
        return PolicyOutput(**full)

    @torch.no_grad()
    def score_with_states(self, batch: Batch, max_tokens: int) -> tuple[Tensor, Tensor]:
        """(B, T) log-probs and the (B, T, D) hidden states that an exact KL to this policy needs.

        The states take M × D memory, where M × V logits would be needed to keep distributions.
        """
        logprobs = states = None
        for rows, micro in self.microbatches(batch, max_tokens):
            hidden = self.hidden_states(self.backbone, micro)
            scored = self.read_states(hidden, micro).logprobs
            if logprobs is None or states is None:
                logprobs = scored.new_zeros(batch.mask.shape)
                states = hidden.new_zeros(*batch.mask.shape, hidden.shape[-1])
            logprobs[rows, : scored.shape[1]] = scored
            states[rows, : scored.shape[1]] = hidden[:, :-1]
        assert logprobs is not None  # a batch has at least one row
        assert states is not None
        return logprobs, states

    def microbatches(self, batch: Batch, max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """(row indices, rows) of at most `max_tokens` tokens, as this policy reads them."""
        return microbatches(batch, max_tokens, self.shared_prompts)

    def hidden_states(self, backbone: Any, batch: Batch) -> Tensor:
        """(B, T+1, D) states of the policy's backbone or the critic's: see states.py."""
        if self.shared_prompts:
            try:
                return hidden_states(backbone, batch, shared_prompts=True)
            except Unsupported as error:
                self.stop_sharing_prompts(str(error))
        return hidden_states(backbone, batch, shared_prompts=False)

    def stop_sharing_prompts(self, reason: str) -> None:
        """From here on, read each prompt again for each of its responses, and say why."""
        self.shared_prompts = False
        logging.getLogger("rlkl").warning(
            f"{self.lm.config.model_type}: each prompt is read again for each of its responses "
            f"({reason})"
        )

    def states(self, batch: Batch) -> Tensor:
        """(B, T, D) the final hidden state *before* each response token, which predicts it."""
        return self.hidden_states(self.backbone, batch)[:, :-1]

    @torch.no_grad()
    def constant_states(self, batch: Batch) -> Tensor:
        """`states` of a reference: those that the rollout kept, else computed without gradients."""
        return self.states(batch) if batch.ref_states is None else batch.ref_states

    def logits(self, states: Tensor, mask_padding: bool = True) -> Tensor:
        """(M, D) hidden states → (M, V) float32 logits, before the temperature.

        mask_padding: give -inf to ids that the tokenizer does not have.
        """
        head = self.head if mask_padding else self.head._replace(vocab_size=None)
        return head_logits(states, head)

    @property
    def backbone(self) -> nn.Module:
        return self.lm.base_model

    @property
    def head(self) -> Head:
        """The unembedding, read from the model each time: it is always the one being trained."""
        unembedding = self.lm.get_output_embeddings()
        config = self.lm.config.get_text_config()
        logit_scale = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        return Head(
            unembedding.weight,
            unembedding.bias,
            scale=logit_scale or 1 / (divisor or 1),
            softcap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
            vocab_size=self.vocab_size,
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained: the policy, and the critic apart.

        They are clipped apart too, so that neither's gradient scales the other's step.
        """
        groups = {"policy": self.lm, "critic": self.critic}
        return {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in groups.items()
            if module is not None
        }


class UnadaptedPolicy(Policy):
    """A policy without its LoRA adapter, on the same tensors: a reference that takes no memory."""

    @property
    def backbone(self) -> Any:
        return lora.Unadapted(self.lm)


def reference_of(policy: Policy) -> Policy:
    """The frozen first policy, for kl_ref: a copy, or the policy with its adapter switched off."""
    if lora.adapted(policy.lm):
        reference = UnadaptedPolicy(policy.lm, vocab_size=policy.vocab_size)
    else:
        reference = Policy(copy.deepcopy(policy.lm), vocab_size=policy.vocab_size)
        reference.requires_grad_(False)
    reference.shared_prompts = policy.shared_prompts
    return reference.eval()
