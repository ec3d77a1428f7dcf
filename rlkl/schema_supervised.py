"""Every option of the commands beside RL: rlkl sft, reward-model, dpo and label."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from rlkl.schema import STRICT, Beta, Log, Plugin, plugin

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(config=STRICT)
class Base:
    name: str = "tiny"
    """where training starts: a directory or a hub name; tiny = a small causal LM made on the spot"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of weights and compute; auto = bfloat16 on cuda (with float32 masters), else float32"""


@dataclass(config=STRICT)
class Fit:
    epochs: PositiveInt = 1
    """passes over the rows"""
    batch: PositiveInt = 64
    """rows, or pairs, per update"""
    lr: NonNegativeFloat = 1e-5
    """learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """of the learning rate, down to 0 at the last update"""
    warmup: NonNegativeInt = 10
    """updates over which the learning rate rises from 0"""
    micro_tokens: PositiveInt = 8192
    """padded tokens per forward pass; bounds memory, never changes the gradient"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are clipped to it"""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: NonNegativeFloat = 0.0
    """of AdamW"""


@dataclass(config=STRICT)
class Supervised:
    """What the three commands that train share."""

    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    run: str = "auto"
    """folder of this run, never overwritten, its model in run/model; auto = runs/<command>-<number>"""
    model: Base = field(default_factory=Base)
    max_tokens: PositiveInt | None = None
    """prompt and reply together; longer rows are dropped; by default the model's context"""
    optim: Fit = field(default_factory=Fit)
    log: Log = field(default_factory=Log)


@dataclass(config=STRICT)
class Scratch:
    layers: NonNegativeInt = 0
    """of a fresh Llama with one token a character, to start from instead of model.name; 0 = off"""
    hidden: PositiveInt = 128
    """its width"""
    heads: PositiveInt = 2
    """its attention heads"""
    context: PositiveInt = 256
    """its longest text, in characters"""

    @model_validator(mode="after")
    def possible(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"scratch.hidden={self.hidden} must be a multiple of 2 * scratch.heads={2 * self.heads}")
        return self


@dataclass(config=STRICT)
class Sft(Supervised):
    task: Plugin = plugin("addition")
    """its examples' whole right replies are taught; jsonl with task.path=FILE reads rows of prompt and answer"""
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(config=STRICT)
class Pairs(Supervised):
    """What the two commands that learn from preferences share."""

    data: str = "pairs.jsonl"
    """file of {"prompt": …, "chosen": …, "rejected": …} rows, one JSON object a line; rlkl label makes one"""
    heldout: Share = 0.1
    """of the prompts, whose pairs are only measured"""


@dataclass(config=STRICT)
class Reference:
    name: str = ""
    """causal LM whose replies to the pairs' prompts are to score 0 on average, ± 1; by default the pairs' own"""
    prompts: PositiveInt = 256
    """of the pairs, one reply to each"""
    max_new_tokens: PositiveInt = 64
    """room for a reply"""


@dataclass(config=STRICT)
class RewardModel(Pairs):
    reference: Reference = field(default_factory=Reference)


@dataclass(config=STRICT)
class Dpo(Pairs):
    beta: PositiveFloat = 0.1
    """of the KL to the starting model in the objective that DPO solves"""


@dataclass(config=STRICT)
class Draws:
    backend: Plugin = plugin("engine")
    """rollout backend"""
    prompts: PositiveInt = 1000
    """of the task's training side"""
    samples: PositiveInt = 2
    """replies to each; the best and the worst make a pair"""
    max_new_tokens: PositiveInt = 64
    """room for a reply"""
    temperature: PositiveFloat = 1.0
    """of sampling"""


@dataclass(config=STRICT)
class Label:
    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    out: str = "pairs.jsonl"
    """file of {"prompt": …, "chosen": …, "rejected": …} rows to write, never overwritten"""
    model: Base = field(default_factory=Base)
    task: Plugin = plugin("addition")
    """prompts, and their judge where no reward is named"""
    sampling: Draws = field(default_factory=Draws)
    replies: str | None = None
    """file of {"prompt": …, "replies": [… , …]} rows to be labelled instead of samples"""
    reward: Plugin | None = None
    """who prefers: judge, reward_model, file.py:function; by default the task's score"""
    noise: NonNegativeFloat = 0.0
    """0 = the higher score wins; else it wins with probability sigmoid(difference / noise)"""

    @model_validator(mode="after")
    def possible(self) -> Self:
        if self.sampling.samples < 2 and self.replies is None:
            raise ValueError(f"sampling.samples={self.sampling.samples}: a pair needs 2 replies to a prompt")
        return self
