"""Key-value slots: a Hugging Face cache whose rows each stand at a position of their own, and the attention over it.

The model's own forward does the rest: `past_key_values=slots` writes, `rlkl_slots` is its attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from rlkl.model import Policy

ATTENTION = "rlkl_slots"
FLASH: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
RAGGED = FLASH is not None and "seqused_k" in {a.name for a in FLASH.default._schema.arguments}
STEP = 32  # keys are read in multiples of it where attention is over one length for all slots


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (slot, time, head, dim): one token a slot is written at that slot's position."""

    is_sliding = False  # sliding layers keep everything too; their window is a matter of the mask

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        (_, heads, _, k), v = key_states.shape, value_states.shape[-1]
        self.keys = key_states.new_zeros(self.slots.count, self.slots.room, heads, k)
        self.values = value_states.new_zeros(self.slots.count, self.slots.room, heads, v)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(b, heads, 1, dim) of the first b slots → all that they hold, (b, heads, room, dim), as views."""
        b, position = len(key_states), self.slots.position
        self.keys[self.slots.index[:b], position[:b]] = key_states[:, :, 0]
        self.values[self.slots.index[:b], position[:b]] = value_states[:, :, 0]
        return self.keys[:b].transpose(1, 2), self.values[:b].transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.slots.room

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.room, 0


class Slots(Cache):
    """`count` slots of `room` tokens. A slot's `position` is where it writes next; later columns are garbage."""

    def __init__(self, layers: int, count: int, room: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.count, self.room, self.reach = count, room, room
        self.index = torch.arange(count, device=device)
        self.position = torch.zeros(count, dtype=torch.long, device=device)
        self.starts = torch.arange(count + 1, dtype=torch.int32, device=device)  # of each query, among queries
        self.bias: dict[int | None, Tensor] = {}

    def begin(self, reach: int) -> None:
        """A new step, in which no slot reads more than `reach` columns: one mask serves all layers of a kind."""
        self.reach, self.bias = min(-(-reach // STEP) * STEP, self.room), {}

    def mask(self, b: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(b, 1, 1, reach) added to the scores: 0 where a slot may look, -inf on the columns behind its position."""
        if window not in self.bias:
            column, position = torch.arange(self.reach, device=self.index.device), self.position[:b, None]
            seen = column <= position
            if window is not None:
                seen = seen & (column > position - window)
            self.bias[window] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
                ~seen, -torch.inf)[:, None, None]
        return self.bias[window]

    def put(self, slots: Tensor, prompts: list[tuple[Tensor, Tensor]], which: Tensor) -> None:
        """Copy the keys and values of `which` prompts into `slots`: a prompt is read once, for all of its samples."""
        layer: Any
        width = prompts[0][0].shape[1]
        for layer, (keys, values) in zip(self.layers, prompts, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys.transpose(1, 2), values.transpose(1, 2))
            layer.keys[slots, :width], layer.values[slots, :width] = keys[which], values[which]

    def move(self, to: Tensor, source: Tensor) -> None:
        """What the slots `source` hold, to the slots `to`."""
        layer: Any
        for layer in self.layers:
            layer.keys[to], layer.values[to] = layer.keys[source], layer.values[source]
        self.position[to] = self.position[source]


class Unsupported(Exception):
    """The model does something in attention that the slots do not."""


def slot_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
        scaling: float | None = None, slots: Slots | None = None, sliding_window: int | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """One query a slot, (b, H, 1, D), over that slot's own position + 1 keys → (b, 1, H, D).

    On CUDA FlashAttention 2 as torch ships it (it reads only the filled part of each slot), elsewhere torch's SDPA on
    the first `reach` columns. Heads that share keys are rows of one query: nothing is repeated.
    """
    if slots is None or softcap is not None or s_aux is not None:
        raise Unsupported("soft-capping, sinks, or a layer that hands its options not on to attention")
    if serves(query, value):
        return ragged(query, key, value, slots, scaling, sliding_window), None
    grouped = rearrange(query, "b (kv g) 1 d -> b kv g d", kv=key.shape[1])
    out = F.scaled_dot_product_attention(grouped, key[:, :, : slots.reach], value[:, :, : slots.reach],
                                         attn_mask=slots.mask(len(query), sliding_window, query.dtype), scale=scaling)
    return rearrange(out, "b kv g d -> b 1 (kv g) d"), None


AttentionInterface.register(ATTENTION, slot_attention)


@contextmanager
def attention_over_slots(policy: Policy) -> Iterator[None]:
    """The model's attention exchanged for that over slots; its own again afterwards, also after an exception."""
    backbone: Any = policy.backbone
    own = backbone.config._attn_implementation
    try:
        backbone.set_attn_implementation(ATTENTION)
        yield
    finally:
        backbone.set_attn_implementation(own)


def serves(query: Tensor, value: Tensor) -> bool:
    """Can FlashAttention 2 do it?"""
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    return RAGGED and query.is_cuda and narrow and query.shape[-1] == value.shape[-1] <= 256


def ragged(query: Tensor, key: Tensor, value: Tensor, slots: Slots, scaling: float | None, window: int | None
           ) -> Tensor:
    """FlashAttention 2 over sequences that lie `room` apart and are position + 1 long; it reads nothing else."""
    b, starts = len(query), slots.starts[: len(query) + 1]
    flat = [rearrange(x, "b h t d -> (b t) h d") for x in (key, value)]  # a view: slots are contiguous
    left, right = (None, None) if window is None else (window - 1, 0)
    out = FLASH(query[:, :, 0], *flat, starts, starts * slots.room, 1, slots.room, 0.0, False, False, scale=scaling,
                seqused_k=(slots.position[:b] + 1).int(), window_size_left=left, window_size_right=right)[0]
    return out[:, None]


def prefill(policy: Policy, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer keys and values (N, width, head, dim) of every prompt but its last token, which decoding feeds.

    Right-padded and causal, so without a mask: what padding leaves lies behind a slot's position.
    """
    width = max(max(len(p) for p in prompts) - 1, 1)
    device = policy.lm.device
    ids = torch.tensor([(p[:-1] + [0] * width)[:width] for p in prompts], device=device)
    cache: Any = DynamicCache()  # layers of a plain kind, which drop nothing outside a sliding window
    policy.backbone(input_ids=ids, position_ids=torch.arange(width, device=device).expand(len(ids), -1),
                    past_key_values=cache, use_cache=True)
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in cache.layers]


def unsupported(policy: Policy) -> str | None:
    """Why slots cannot serve this model, None if they can."""
    config = policy.lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if not getattr(policy.backbone, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys"
    if any(name.endswith(".sinks") for name, _ in policy.backbone.named_parameters()):
        return "its attention has sinks"
    return None


def dynamic_positions(policy: Policy) -> bool:
    """Rotary embeddings that look at the longest position of the batch: they wait for the host, so no CUDA graph."""
    rope = getattr(policy.lm.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(x for x in rope.values() if isinstance(x, dict))]
    return any(str(x.get("rope_type", "")) in ("dynamic", "longrope") for x in kinds)
