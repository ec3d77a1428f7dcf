"""Bytes that a forward pass keeps for its backward pass.

They are counted, not estimated: models of the architecture with two and with three layers run
forward on short rows. Their difference is one layer, and two lengths give the growth with length.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlkl.policy import lora
from rlkl.policy.policy import positions
from rlkl.run.schema import Lora

LENGTHS = (16, 32)  # tokens of the rows that are counted


class RowActivations(NamedTuple):
    """Bytes that one row keeps for the backward pass."""

    inside: float  # of one layer, without its input; a checkpointed layer computes it again
    input: float  # of one layer
    rest: float  # outside the layers


def row_activations(config: Any, dtype: torch.dtype, adapter: Lora, length: int) -> RowActivations:
    """The activations of a row of `length` tokens, without the unembedding.

    They grow with the length, and some, such as attention masks, with its square.
    """
    layer, rest = [], []
    for tokens in LENGTHS:
        two, three = (
            saved_bytes(
                type(config),
                config.to_json_string(),
                dtype,
                json.dumps(asdict(adapter)),
                layers,
                tokens,
            )
            for layers in (2, 3)
        )
        layer.append(three - two)
        rest.append(max(3 * two - 2 * three, 0))
    layer_input = config.get_text_config().hidden_size * dtype.itemsize * length
    return RowActivations(
        inside=extrapolate(layer, length) - layer_input,
        input=layer_input,
        rest=extrapolate(rest, length),
    )


def extrapolate(sizes: list[int], length: int) -> float:
    """a · length + b · length², where a and b follow from the sizes at LENGTHS."""
    short, long = LENGTHS
    per_token_short = sizes[0] / short
    per_token_long = sizes[1] / long
    b = max((per_token_long - per_token_short) / (long - short), 0.0)
    return length * (per_token_short + b * (length - short))


@cache
def saved_bytes(
    config_class: type, config_json: str, dtype: torch.dtype, adapter: str, layers: int, length: int
) -> int:
    """Bytes that the backbone saves for the backward pass of one row, weights aside.

    config_json, adapter: JSON, so that the arguments can be cached.
    """
    lm = shallow_model(config_class, config_json, dtype, layers)
    if json.loads(adapter)["r"]:
        lora.adapt(lm, **json.loads(adapter))
    weights = {x.untyped_storage().data_ptr() for x in [*lm.parameters(), *lm.buffers()]}
    sizes: dict[int, int] = {}
    alive = []  # a freed storage could be replaced by another one at the same address

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    attended = torch.ones(1, length, dtype=torch.bool)
    attended[:, 0] = False  # without padding, transformers may leave the mask out
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        lm.base_model(
            input_ids=attended.long(),
            attention_mask=attended,
            position_ids=positions(attended),
            use_cache=False,
        )
    return sum(sizes.values())


def shallow_model(
    config_class: type, config_json: str, dtype: torch.dtype, layers: int
) -> PreTrainedModel:
    """The architecture with few layers and a vocabulary of 8. Its weights are not initialised."""
    config = config_class(**json.loads(config_json))
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # one entry a layer
            setattr(text, name, (value * layers)[:layers])
    text.num_hidden_layers = layers
    text.vocab_size = 8
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return lm.to_empty(device="cpu").eval()
