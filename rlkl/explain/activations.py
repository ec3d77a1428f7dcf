"""What a forward pass keeps for its backward pass: counted on two and three layers of the model, not guessed."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlkl import lora
from rlkl.model import positions
from rlkl.schema import Lora

LENGTHS = 16, 32  # of the rows that are counted


class Kept(NamedTuple):
    """Bytes of a row: of one layer's inside, which a checkpointed one makes again, of its input, and of the rest."""

    inside: float
    entry: float
    rest: float


def kept(config: Any, dtype: torch.dtype, adapter: Lora, length: int) -> Kept:
    """Of a row of `length` tokens: what grows with the length, and with its square, as attention masks do."""
    inside, rest = [], []
    for n in LENGTHS:
        two, three = (saved(type(config), config.to_json_string(), dtype, json.dumps(asdict(adapter)), layers, n)
                      for layers in (2, 3))
        inside.append(three - two)
        rest.append(max(3 * two - 2 * three, 0))
    entry = config.get_text_config().hidden_size * dtype.itemsize * length
    return Kept(followed(inside, length) - entry, entry, followed(rest, length))


def followed(found: list[int], length: int) -> float:
    """a · length + b · length², given at LENGTHS."""
    (n, m), (x, y) = LENGTHS, found
    b = max((y / m - x / n) / (m - n), 0.0)
    return length * (x / n + b * (length - n))


@cache
def saved(kind: type, settings: str, dtype: torch.dtype, adapter: str, layers: int, length: int) -> int:
    """Bytes that the trunk keeps for its backward pass on one row, with so many layers and none of its vocabulary."""
    lm = shallow(kind, settings, dtype, layers)
    if json.loads(adapter)["r"]:
        lora.adapt(lm, **json.loads(adapter))
    weights = {x.untyped_storage().data_ptr() for x in [*lm.parameters(), *lm.buffers()]}
    sizes: dict[int, int] = {}
    alive = []  # else another tensor may take the place of one that is counted

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    attended = torch.ones(1, length, dtype=torch.bool)
    attended[:, 0] = False  # padding: else there may be no mask
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        lm.base_model(input_ids=attended.long(), attention_mask=attended, position_ids=positions(attended),
                      use_cache=False)
    return sum(sizes.values())


def shallow(kind: type, settings: str, dtype: torch.dtype, layers: int) -> PreTrainedModel:
    """A model of the architecture with few layers and a vocabulary of 8; its weights are what memory held before."""
    config = kind(**json.loads(settings))
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, 8
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return lm.to_empty(device="cpu").eval()
