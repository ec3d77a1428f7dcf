"""The attention over shared prompts, and how it is put into a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from rlkl.policy.shared_prompts import SharedPrompts

SHARED_PROMPTS = "rlkl_shared_prompts"  # the name under which transformers knows our attention
VARLEN_OPTIONS = signature(varlen_attn).parameters
HAS_VARLEN = {"scale", "window_size"} <= VARLEN_OPTIONS.keys()
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


class Unsupported(Exception):
    """The model's attention does something that ours does not."""


@contextmanager
def exchanged_attention(backbone: Any, name: str) -> Iterator[None]:
    """Within this context the model's layers call the attention function of this name.

    name: as registered with transformers' AttentionInterface. The model's own attention is restored
    afterwards, also after an exception.
    """
    config = backbone.config.get_text_config()
    own_attention = attention_of(backbone)
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = own_attention


def attention_of(backbone: Any) -> str:
    """The name of the attention function that the model's layers call."""
    return backbone.config.get_text_config()._attn_implementation


def unsupported(backbone: Any) -> str | None:
    """Why the attention of this model cannot be exchanged for ours; None if it can."""
    if not isinstance(backbone, PreTrainedModel):
        return "it is no model of transformers"
    config = backbone.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or []) - SUPPORTED_LAYERS
    if other_layers:
        return f"it has layers of {', '.join(sorted(other_layers))}"
    if not getattr(backbone, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys"
    if any(name.endswith(".sinks") for name, _ in backbone.named_parameters()):
        return "its attention has sinks"
    return None


# ------------------------------------------------------------------ over shared prompts


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Each of L tokens over the keys that it sees: (1, H, L, D) queries → (1, L, H, D).

    On CUDA in 16 bits by torch's variable-length flash attention, elsewhere by its SDPA on padded
    segments. Raises Unsupported.
    """
    if shared_prompts is None or softcap is not None or s_aux is not None:
        raise Unsupported(
            "soft-capping, sinks, or a layer that does not pass its options on to attention"
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
    attend = attention_in_parts if shared_prompts.packed is None else flash_attention
    return attend(query, key, value, shared_prompts, scaling, sliding_window)[None], None


AttentionInterface.register(SHARED_PROMPTS, shared_prompt_attention)


def attention_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: SharedPrompts,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(L, H, D) queries over (L, heads, D) keys, one part of the row after the other."""
    outputs = []
    for i, part in enumerate(row.parts):
        causal = part.causal(window)
        out = F.scaled_dot_product_attention(
            query[part.queries].transpose(1, 2),
            key[part.keys].transpose(1, 2),
            value[part.keys].transpose(1, 2),
            attn_mask=None if causal else row.mask(i, window, query.dtype),
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        outputs.append(rearrange(out, "r h q d -> (r q) h d")[part.outputs])
    return torch.cat(outputs)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: SharedPrompts,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """`attention_in_parts` by torch's flash attention for varying lengths: no padding, no masks.

    The queries of a response are the last ones of its keys, and there the kernel aligns what is
    causal: a segment's last query sees all of its keys.
    """
    packed = row.packed
    assert packed is not None
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}
    out: Any = varlen_attn(
        query,
        key[packed.keys],
        value[packed.keys],
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.max_seqlen_q,
        packed.max_seqlen_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return out


def flash_serves(backbone: Any, device: torch.device) -> bool:
    """Whether torch's flash attention takes this model's dtype and head sizes on this device."""
    if not HAS_VARLEN or device.type != "cuda":
        return False
    config = backbone.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_fits = size <= 256 and size % 8 == 0 and not hasattr(config, "v_head_dim")
    sixteen_bits = backbone.dtype in (torch.float16, torch.bfloat16)
    return sixteen_bits and head_fits and torch.cuda.get_device_capability(device) >= (8, 0)
