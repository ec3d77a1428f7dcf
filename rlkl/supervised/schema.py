"""Every option of rlkl sft, reward-model, dpo and label."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass

from rlkl.run.schema import STRICT, Beta, Chat, Log, Plugin, Scoring, plugin

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(config=STRICT)
class StartModel:
    name: str = "tiny"
    """a directory or a hub name; tiny = a small causal LM that is made here when first used"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of weights and compute; auto = bfloat16 on cuda (with float32 masters), else float32"""


@dataclass(config=STRICT)
class Training:
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
    """gradient clipping"""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: NonNegativeFloat = 0.0
    """of AdamW"""


@dataclass(config=STRICT)
class SupervisedConfig:
    """What the three commands that train share."""

    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    run: str = "auto"
    """folder of this run and its model, never overwritten; auto = runs/<command>-<number>"""
    model: StartModel = field(default_factory=StartModel)
    max_tokens: PositiveInt | None = None
    """of prompt and response; longer rows are dropped; by default the model's context"""
    optim: Training = field(default_factory=Training)
    log: Log = field(default_factory=Log)


@dataclass(config=STRICT)
class Scratch:
    layers: NonNegativeInt = 0
    """layers of a fresh character-level Llama, trained instead of model.name; 0 = off"""
    hidden: PositiveInt = 128
    """its hidden size"""
    heads: PositiveInt = 2
    """its attention heads"""
    context: PositiveInt = 256
    """its longest text, in characters"""

    @model_validator(mode="after")
    def possible(self) -> Self:
        """The size of a head must be even, for rotary embeddings."""
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"scratch.hidden={self.hidden} must be a multiple of 2 * scratch.heads="
                f"{2 * self.heads}"
            )
        return self


@dataclass(config=STRICT)
class SFTConfig(SupervisedConfig):
    task: Plugin = plugin("addition")
    """whose solutions are learned; jsonl with task.path=FILE reads rows of prompt and answer"""
    chat: Chat = field(default_factory=Chat)
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(config=STRICT)
class PairsConfig(SupervisedConfig):
    """What the two commands that learn from preferences share."""

    data: str = "pairs.jsonl"
    """JSONL file of {"prompt": …, "chosen": …, "rejected": …} rows; rlkl label writes one"""
    heldout: Share = 0.1
    """share of the prompts whose pairs are held out"""


@dataclass(config=STRICT)
class Reference:
    name: str = ""
    """causal LM whose responses are to have mean reward 0 and std 1; by default the pairs' own"""
    prompts: PositiveInt = 256
    """number of the pairs' prompts that it responds to, once each"""
    max_new_tokens: PositiveInt = 64
    """the longest response, in tokens"""


@dataclass(config=STRICT)
class RewardModelConfig(PairsConfig):
    reference: Reference = field(default_factory=Reference)


@dataclass(config=STRICT)
class DPOConfig(PairsConfig):
    beta: PositiveFloat = 0.1
    """coefficient of KL(pi || ref) in the objective that DPO solves; ref is the starting model"""
    chat: Chat = field(default_factory=Chat)


@dataclass(config=STRICT)
class LabelSampling:
    backend: Plugin = plugin("engine")
    """rollout backend"""
    prompts: PositiveInt = 1000
    """prompts of the task's training side"""
    samples: PositiveInt = 2
    """responses to each; the best and the worst make a pair"""
    max_new_tokens: PositiveInt = 64
    """the longest response, in tokens"""
    max_prompt_tokens: PositiveInt | None = None
    """longer prompts are dropped; by default what the model's context leaves"""
    temperature: PositiveFloat = 1.0
    """of sampling"""


@dataclass(config=STRICT)
class LabelConfig:
    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    out: str = "pairs.jsonl"
    """file of {"prompt": …, "chosen": …, "rejected": …} rows to write, never overwritten"""
    model: StartModel = field(default_factory=StartModel)
    task: Plugin = plugin("addition")
    """the prompts, and their score where no reward is named"""
    chat: Chat = field(default_factory=Chat)
    sampling: LabelSampling = field(default_factory=LabelSampling)
    responses: str | None = None
    """JSONL file of {"prompt": …, "responses": [… , …]} rows to label; nothing is sampled then"""
    reward: Plugin | None = None
    """what labels: judge, reward_model, file.py:function; by default the task's score"""
    scoring: Scoring = field(default_factory=Scoring)
    noise: NonNegativeFloat = 0.0
    """0 = the higher score wins; else it wins with probability sigmoid(difference / noise)"""

    @model_validator(mode="after")
    def possible(self) -> Self:
        """A pair needs two responses."""
        if self.sampling.samples < 2 and self.responses is None:
            raise ValueError(
                f"sampling.samples={self.sampling.samples}: a pair needs 2 responses to a prompt"
            )
        return self
