"""Bytes that a forward pass keeps for its backward pass.

They are counted, not estimated: models of the architecture with two and with three layers run
forward on short groups. Their difference is one layer, and two lengths give the growth with length.
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
from rlkl.policy.policy import Policy
from rlkl.run.schema import Lora
from rlkl.types import Batch

LENGTHS = (16, 32)  # tokens of prompt and response together, of the groups that are counted
SAMPLES = 16  # responses of such a group, at most: more of them need the same for each token


class Group(NamedTuple):
    """Responses to one prompt."""

    prompt: int  # tokens
    response: int  # tokens of each response
    samples: int

    def shorter(self, length: int) -> Group:
        """The same shape, with `length` tokens of prompt and response together, and few samples."""
        share = self.prompt / (self.prompt + self.response)
        prompt = min(max(round(share * length), 1), length - 1)
        return Group(prompt, length - prompt, min(self.samples, SAMPLES))

    def tokens(self, shared_prompts: bool) -> int:
        """Tokens that the model reads."""
        prompts = 1 if shared_prompts else self.samples
        return prompts * self.prompt + self.samples * self.response

    def batch(self) -> Batch:
        """The group as a batch of zeros."""
        ids = torch.zeros(self.samples, self.prompt + self.response, dtype=torch.long)
        prompt_ids, response_ids = ids.split([self.prompt, self.response], 1)
        return Batch(
            prompt_ids=prompt_ids,
            prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool),
            response_ids=response_ids,
            mask=torch.ones_like(response_ids, dtype=torch.bool),
            sampler_logprobs=response_ids.float(),
            truncated=torch.zeros(self.samples, dtype=torch.bool),
        )


class Activations(NamedTuple):
    """Bytes that a group keeps for the backward pass."""

    inside: float  # of one layer, without its input; a checkpointed layer computes it again
    input: float  # of one layer
    rest: float  # outside the layers


def group_activations(
    config: Any, dtype: torch.dtype, adapter: Lora, group: Group, shared_prompts: bool
) -> Activations:
    """The activations of a group, without the unembedding.

    They grow with its lengths, and some, such as attention masks, with their square.
    shared_prompts: whether the model reads the prompt once for the whole group.
    """
    layer, rest = [], []  # per token
    for length in LENGTHS:
        shorter = group.shorter(length)
        two, three = (
            saved_bytes(
                type(config),
                config.to_json_string(),
                dtype,
                json.dumps(asdict(adapter)),
                layers,
                shorter,
            )
            for layers in (2, 3)
        )
        tokens = shorter.tokens(shared_prompts)
        layer.append((three - two) / tokens)
        rest.append(max(3 * two - 2 * three, 0) / tokens)
    tokens = group.tokens(shared_prompts)
    length = group.prompt + group.response
    layer_input = config.get_text_config().hidden_size * dtype.itemsize * tokens
    return Activations(
        inside=extrapolate(layer, length) * tokens - layer_input,
        input=layer_input,
        rest=extrapolate(rest, length) * tokens,
    )


def extrapolate(per_token: list[float], length: int) -> float:
    """a + b · length, where a and b follow from the bytes per token at LENGTHS."""
    short, long = LENGTHS
    b = max((per_token[1] - per_token[0]) / (long - short), 0.0)
    return per_token[0] + b * (length - short)


@cache
def saved_bytes(
    config_class: type,
    config_json: str,
    dtype: torch.dtype,
    adapter: str,
    layers: int,
    group: Group,
) -> int:
    """Bytes that the backbone saves for the backward pass of one group, weights aside.

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

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        Policy(lm).states(group.batch())
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
