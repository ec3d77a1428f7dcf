"""Slots of a key-value cache, each at its own position, and the attention that reads them.

The model's own forward pass does the rest: it writes through `past_key_values=cache`, and
`rlkl_slots` is registered as its attention function.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from rlkl.policy.attention import Unsupported
from rlkl.policy.policy import Policy

SLOT_ATTENTION = "rlkl_slots"  # the name under which transformers knows `slot_attention`
FLASH: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
FLASH_READS_LENGTHS = FLASH is not None and "seqused_k" in {
    argument.name for argument in FLASH.default._schema.arguments
}
READ_MULTIPLE = 32  # dense attention reads a multiple of so many keys


# ------------------------------------------------------------------ the cache


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (slots, capacity, heads, dim).

    A forward pass writes one token into each slot, at that slot's position.
    """

    keys: Tensor  # both set by lazy_initialization
    values: Tensor
    is_sliding = False  # sliding layers keep everything too: the mask applies their window

    def __init__(self, capacity: int, index: Tensor, positions: Tensor) -> None:
        """index, positions: (slots,) of the cache, which all layers share.

        A layer does not hold the cache itself: in a cycle, keys and values would stay in memory
        until Python looks for cycles.
        """
        super().__init__()
        self.capacity = capacity
        self.index = index
        self.positions = positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        size = (len(self.index), self.capacity, heads)
        self.keys = key_states.new_zeros(*size, key_states.shape[-1])
        self.values = value_states.new_zeros(*size, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (b, heads, 1, dim) into the first b slots.

        Returns all that these slots hold, (b, heads, capacity, dim), as views.
        """
        b = len(key_states)
        slot, position = self.index[:b], self.positions[:b]
        self.keys[slot, position] = key_states[:, :, 0]
        self.values[slot, position] = value_states[:, :, 0]
        return self.keys[:b].transpose(1, 2), self.values[:b].transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0


class SlotCache(Cache):
    """Keys and values of `slots` sequences of at most `capacity` tokens each.

    `positions` (slots,) is where each slot writes next; what lies behind it is garbage.
    """

    def __init__(self, layers: int, slots: int, capacity: int, device: torch.device) -> None:
        index = torch.arange(slots, device=device)
        positions = torch.zeros(slots, dtype=torch.long, device=device)
        super().__init__(layers=[SlotLayer(capacity, index, positions) for _ in range(layers)])
        self.slots = slots
        self.capacity = capacity
        self.index = index
        self.positions = positions
        # Where each slot starts in the flat list of queries, one a slot, and in that of keys.
        self.query_starts = torch.arange(slots + 1, dtype=torch.int32, device=device)
        self.key_starts = self.query_starts * capacity
        self.begin_step(slots, capacity)

    def reset(self) -> None:
        """Make it as new. What lay there could be NaN, which no mask hides."""
        layer: Any
        self.positions.zero_()
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()

    def begin_step(self, slots: int, max_length: int) -> None:
        """Start a forward pass of the first `slots` slots, which read at most `max_length` keys.

        What all layers need is computed here, once a step.
        """
        multiple = math.ceil(max_length / READ_MULTIPLE) * READ_MULTIPLE
        self.read_length = min(multiple, self.capacity)  # keys that dense attention reads
        self.lengths = (self.positions[:slots] + 1).int()  # of each slot, with the new token
        self.masks: dict[int | None, Tensor] = {}  # by sliding window

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(b, 1, 1, read_length) to add to the scores of the step's b slots.

        0 on the keys that a slot may see, -inf on those behind its position or outside the window.
        Layers with the same window share one mask in each step.
        """
        if window not in self.masks:
            column = torch.arange(self.read_length, device=self.index.device)
            length = self.lengths[:, None]
            visible = column < length
            if window is not None:
                visible = visible & (column >= length - window)
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self.masks[window] = bias.masked_fill(~visible, -torch.inf)[:, None, None]
        return self.masks[window]

    def copy_prompts(
        self, slots: Tensor, prefilled: list[tuple[Tensor, Tensor]], prompts: Tensor
    ) -> None:
        """Copy the keys and values of some prefilled prompts into slots.

        prefilled: of each layer, as `prefill` returns them. prompts: (slots,) rows of `prefilled`.
        """
        layer: Any
        width = prefilled[0][0].shape[1]
        for layer, (keys, values) in zip(self.layers, prefilled, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys.transpose(1, 2), values.transpose(1, 2))
            layer.keys[slots, :width] = keys[prompts]
            layer.values[slots, :width] = values[prompts]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy what the slots `source` hold to the slots `target`."""
        layer: Any
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]
        self.positions[target] = self.positions[source]


# ------------------------------------------------------------------ the attention


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    slots: SlotCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One query a slot, (b, H, 1, D), over that slot's position + 1 keys → (b, 1, H, D).

    On CUDA in 16 bits with FlashAttention 2 as torch ships it, which reads only the filled part of
    each slot. Elsewhere with torch's SDPA on the first `read_length` keys. Query heads that share
    keys become rows of one query, so that no key is repeated. Raises Unsupported.
    """
    if slots is None or softcap is not None or s_aux is not None:
        raise Unsupported(
            "soft-capping, sinks, or a layer that does not pass its options on to attention"
        )
    if flash_serves(query, value):
        return flash_attention(query, key, value, slots, scaling, sliding_window), None
    grouped = rearrange(query, "b (kv g) 1 d -> b kv g d", kv=key.shape[1])
    out = F.scaled_dot_product_attention(
        grouped,
        key[:, :, : slots.read_length],
        value[:, :, : slots.read_length],
        attn_mask=slots.mask(sliding_window, query.dtype),
        scale=scaling,
    )
    return rearrange(out, "b kv g d -> b 1 (kv g) d"), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)


def flash_serves(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention 2 supports these dtypes and head sizes."""
    sixteen_bits = query.dtype in (torch.float16, torch.bfloat16)
    head_fits = query.shape[-1] == value.shape[-1] <= 256
    return FLASH_READS_LENGTHS and query.is_cuda and sixteen_bits and head_fits


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: SlotCache,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """FlashAttention 2 over sequences that lie `capacity` apart and are position + 1 long.

    It reads nothing else. Shapes as in `slot_attention`.
    """
    b = len(query)
    flat_keys = rearrange(key, "b h t d -> (b t) h d")  # a view, since slots are contiguous
    flat_values = rearrange(value, "b h t d -> (b t) h d")
    window_left, window_right = (None, None) if window is None else (window - 1, 0)
    out = FLASH(
        query[:, :, 0],
        flat_keys,
        flat_values,
        slots.query_starts[: b + 1],
        slots.key_starts[: b + 1],
        1,  # longest query
        slots.capacity,  # longest key
        0.0,  # dropout
        False,  # causal
        False,  # return the debug mask
        scale=scaling,
        seqused_k=slots.lengths,
        window_size_left=window_left,
        window_size_right=window_right,
    )[0]
    return out[:, None]


# ------------------------------------------------------------------ prompts and models


def prefill(policy: Policy, prompts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """Read N prompts: of each layer the keys and values, (N, width, heads, dim).

    Prompts are read without their last token, which is the first one that decoding feeds. They are
    right-padded and need no mask: attention is causal, and what padding leaves lies behind a slot's
    position.
    """
    width = max(max(len(prompt) for prompt in prompts) - 1, 1)
    device = policy.lm.device
    ids = torch.tensor([(p[:-1] + [0] * width)[:width] for p in prompts], device=device)
    # A cache of plain layers: they drop nothing, also where the model's own have a sliding window.
    cache: Any = DynamicCache()
    policy.backbone(
        input_ids=ids,
        position_ids=torch.arange(width, device=device).expand(len(ids), -1),
        past_key_values=cache,
        use_cache=True,
    )
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in cache.layers]


def batch_dependent_rope(policy: Policy) -> bool:
    """Whether rotary embeddings depend on the longest position of the batch.

    They wait for the host, so a CUDA graph cannot record them.
    """
    rope = getattr(policy.lm.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [section for section in rope.values() if isinstance(section, dict)]
    kinds = [str(section.get("rope_type", "")) for section in [rope, *by_layer_type]]
    return any(kind in ("dynamic", "longrope") for kind in kinds)
