"""Every option of a run: name, type, default and one line of what it is for."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# Sections of {name: …, **the options of the function it names}; a plain string is the name alone.
PLUGINS = {"task", "reward", "backend", "advantage", "selector", "loss"}


def named(section: Any) -> Any:
    if section is not None and not (isinstance(section, dict) and isinstance(section.get("name"), str)):
        raise ValueError("give a name, or {name: ..., option: ...}")
    return section


def rewards(section: Any) -> Any:
    """One plug-in or a list of them, each with a `weight` of its own."""
    if section == []:
        raise ValueError("an empty list; give a name, {name: ..., weight: ..., option: ...}, or a list of these")
    for each in section if isinstance(section, list) else [section]:
        weight = (named(each) or {}).get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"weight={weight!r} is no number")
    return section


Plugin = Annotated[dict[str, Any], BeforeValidator(named)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def plugin(name: str) -> Any:
    return field(default_factory=lambda: {"name": name})


@dataclass(config=STRICT)
class Model:
    name: str = "tiny"
    """causal LM: a directory or a hub name; tiny = a small one made on the spot"""
    critic: Literal["none", "head", "network"] = "none"
    """value function: none, a linear head on the policy's states, or a network of its own"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of weights and compute; auto = bfloat16 on cuda (with float32 masters), else float32"""
    reference: bool = True
    """keep a frozen copy of the first policy: needed by kl_ref, and to meter the drift"""
    logprobs: Literal["auto", "reference", "tiled", "fused"] = "auto"
    """how log-probs are taken: from all logits at once, in tiles, in tiles with Triton on cuda; auto by their size"""
    checkpointing: bool = False
    """keep only each layer's input for the backward pass, which runs the layer again: less memory, more time"""
    keep_logits_gb: NonNegativeFloat = 0.0
    """GB of logits kept from forward to backward by tiled and fused, which then make them once and not twice"""


@dataclass(config=STRICT)
class Lora:
    r: NonNegativeInt = 0
    """rank of a LoRA adapter, which is then all of the policy that is trained; 0 = off, every weight is"""
    alpha: PositiveFloat = 32.0
    """the adapter's output is scaled by alpha / r"""
    targets: str | list[str] = "all-linear"
    """layers it stands beside: all-linear (all but the unembedding), a list of names, or a regular expression"""
    full: list[str] = field(default_factory=list)
    """layers that are trained themselves, by the end of their name, such as model.norm"""


@dataclass(config=STRICT)
class Sampling:
    backend: Plugin = plugin("engine")
    """rollout backend, the same tokens from each: engine is the fast one, cached and naive the ones to read"""
    prompts: PositiveInt = 64
    """N, prompts per step"""
    group_size: PositiveInt = 8
    """G, replies per prompt"""
    max_new_tokens: PositiveInt = 8
    """T, room for a reply; one that does not end in it is truncated"""
    max_prompt_tokens: PositiveInt | None = None
    """longer prompts are dropped; by default what the model's context leaves"""
    temperature: PositiveFloat = 1.0
    """of sampling and of scoring alike"""
    unanimous: Literal["keep", "drop", "refill"] = "keep"
    """groups whose replies all score the same: kept in the update, dropped before it, or replaced by further prompts"""
    refills: PositiveInt = 3
    """rounds of refill in a step, at most"""
    curriculum: Literal["none", "watch", "success"] = "none"
    """share of right replies of each prompt: not kept, kept and logged, or prompts drawn by p(1 - p) of it too"""
    baseline: Literal["none", "greedy"] = "none"
    """what advantages may be measured against beside a critic: the score of each prompt's greedy reply (remax)"""

    @property
    def rows(self) -> int:
        """B = N · G, replies per step."""
        return self.prompts * self.group_size


@dataclass(config=STRICT)
class Overlong:
    buffer: NonNegativeInt = 0
    """tokens before sampling.max_new_tokens over which a reply's score falls; 0 = off"""
    coef: NonNegativeFloat = 1.0
    """how far it falls"""


@dataclass(config=STRICT)
class Scoring:
    processes: NonNegativeInt | None = None
    """that score text by code from a file; by default one per CPU, at most 8; 0 = none, and no limits"""
    seconds: PositiveFloat = 10.0
    """for a reply, or for a call that judges all replies of a step (TRL's)"""
    memory_gb: PositiveFloat = 4.0
    """that each process may take"""
    failed: float = 0.0
    """score of a reply whose scoring takes longer, raises or gives no finite number"""


@dataclass(config=STRICT)
class Mismatch:
    truncate: Literal["none", "token", "sequence"] = "none"
    """advantages times min(pi_old/mu, cap), mu as the sampler reported it: by token or by reply"""
    cap: PositiveFloat = 2.0
    """of truncate"""
    reject: Literal["none", "token", "sequence", "mean"] = "none"
    """weight 0 where pi_old/mu is outside [low, high]: by token, by reply, or by the reply's geometric mean"""
    low: NonNegativeFloat = 0.5
    """of reject"""
    high: PositiveFloat = 2.0
    """of reject"""


@dataclass(config=STRICT)
class KLRef:
    place: Literal["reward", "loss"] = "reward"
    """where KL(pi || ref) is charged"""
    estimator: str = "k1"
    """k1 is the one for the reward"""
    coef: NonNegativeFloat = 0.0
    """beta; 0 = off"""
    target: PositiveFloat | None = None
    """nats per sequence; given, coef adapts to hold KL(pi || ref) there"""
    horizon: PositiveInt = 10_000
    """replies over which an adaptive coef may change by 20 %"""


@dataclass(config=STRICT)
class KLOld:
    estimator: str = "k3"
    """of KL(pi_old || pi), from samples of pi_old"""
    coef: NonNegativeFloat = 0.0
    """penalty in the loss; 0 = off"""
    target: PositiveFloat | None = None
    """nats per token; given, coef doubles or halves to hold KL(pi_old || pi) there"""
    stop: PositiveFloat | None = None
    """nats per token; beyond it the remaining updates on this rollout are skipped"""


@dataclass(config=STRICT)
class Optim:
    steps: PositiveInt = 300
    """rollouts, each followed by its updates"""
    lr: NonNegativeFloat = 3e-4
    """of the policy"""
    critic_lr: NonNegativeFloat = 1e-3
    """of the critic"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """of both learning rates, down to 0 at the last step"""
    warmup: NonNegativeInt = 20
    """steps over which the learning rates rise from 0"""
    critic_warmup: NonNegativeInt = 0
    """first steps in which only the critic moves"""
    epochs: PositiveInt = 1
    """passes over each rollout"""
    minibatch: PositiveInt | None = None
    """rows per update; by default the whole rollout"""
    micro_tokens: PositiveInt = 8192
    """padded tokens per forward pass; bounds memory, never changes the gradient"""
    head_tokens: PositiveInt | None = None
    """reply tokens per pass through the unembedding, loss and backward; by default the micro-batch at once"""
    weights: Literal["token", "sequence", "constant"] = "token"
    """what counts the same: every token, every reply, or every token over a fixed length"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are clipped to it, policy and critic apart"""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: NonNegativeFloat = 0.0
    """of AdamW"""
    offload: bool = False
    """AdamW, its moments and float32 masters in the CPU's memory: 8 bytes a weight less on the device, 12 of bf16"""
    max_skips: PositiveInt = 5
    """consecutive updates with a non-finite gradient after which the run gives up"""


@dataclass(config=STRICT)
class Eval:
    every: NonNegativeInt = 50
    """steps between held-out evaluations; 0 = only before and after"""
    prompts: PositiveInt = 500
    """held-out prompts, the same ones every time"""
    samples: PositiveInt = 8
    """k of pass@k, before and after"""
    temperature: PositiveFloat = 1.0
    """of the sampled accuracy"""
    stop: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)
    """texts of which the first to appear ends a held-out reply"""


@dataclass(config=STRICT)
class Log:
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases"""
    project: str = "rlkl"
    """its project"""
    every: PositiveInt = 10
    """steps between lines and samples on the terminal; metrics.jsonl has every step"""


@dataclass(config=STRICT)
class Checkpoint:
    every: NonNegativeInt = 50
    """steps between checkpoints; 0 = only at the end"""
    keep: PositiveInt = 2
    """newest checkpoints kept, beside the best by held-out accuracy"""


@dataclass(config=STRICT)
class Config:
    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    run: str = "auto"
    """folder of this run, never overwritten; auto = runs/<task>-<loss>-<number>"""
    resume: str | None = None
    """folder of a run to continue, bit for bit"""
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    task: Plugin = plugin("addition")
    """prompts and their judge"""
    reward: Annotated[dict[str, Any] | list[dict[str, Any]] | None, BeforeValidator(rewards)] = None
    """one, or a list whose weighted sum counts; task = the task's own score, which is the default"""
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Sampling = field(default_factory=Sampling)
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """a reply that ran out of room: is over, is worth gamma V(s_T) more, or is not trained on"""
    overlong: Overlong = field(default_factory=Overlong)
    mismatch: Mismatch = field(default_factory=Mismatch)
    advantage: Plugin = plugin("grpo")
    """credit of each token"""
    selector: Plugin | None = None
    """tokens that its namesake among the losses acts on"""
    loss: Plugin = plugin("grpo")
    """policy objective"""
    kl_ref: KLRef = field(default_factory=KLRef)
    kl_old: KLOld = field(default_factory=KLOld)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @pydantic.model_validator(mode="after")
    def possible(self) -> Self:
        """What no single key can see."""
        rows = self.sampling.rows
        if self.optim.minibatch and self.optim.minibatch > rows:
            raise ValueError(f"optim.minibatch={self.optim.minibatch} is larger than the rollout of {rows} rows "
                             "(sampling.prompts * sampling.group_size)")
        if self.sampling.unanimous != "keep" and self.sampling.group_size == 1:
            raise ValueError(f"sampling.unanimous={self.sampling.unanimous} would drop every group of 1: set "
                             "sampling.group_size >= 2, or keep")
        if self.kl_ref.coef > 0 and not self.model.reference:
            raise ValueError(f"kl_ref.coef={self.kl_ref.coef} needs a reference: set model.reference=true, or "
                             "kl_ref.coef=0")
        for name, kl in (("kl_ref", self.kl_ref), ("kl_old", self.kl_old)):
            if kl.target is not None and kl.coef == 0:
                raise ValueError(f"{name}.target={kl.target} adapts {name}.coef, which is 0: set {name}.coef > 0 to "
                                 "start from")
        if self.sampling.baseline != "none" and self.model.critic != "none":
            raise ValueError(f"sampling.baseline={self.sampling.baseline} and model.critic={self.model.critic} are "
                             "two baselines: set one of them to none")
        if self.overlong.buffer > self.sampling.max_new_tokens:
            raise ValueError(f"overlong.buffer={self.overlong.buffer} is longer than a reply can be: at most "
                             f"sampling.max_new_tokens={self.sampling.max_new_tokens}")
        if self.kl_ref.target is not None and 5 * self.kl_ref.horizon <= rows:
            raise ValueError(f"kl_ref.horizon={self.kl_ref.horizon}: with {rows} replies a rollout, coef could fall to "
                             f"0 at once; more than {rows // 5} is needed")
        if self.mismatch.low > self.mismatch.high:
            raise ValueError(f"mismatch.low={self.mismatch.low} is above mismatch.high={self.mismatch.high}")
        if self.truncation == "bootstrap" and self.model.critic == "none":
            raise ValueError("truncation=bootstrap needs V(s_T): set model.critic=head or network, or "
                             "truncation=terminal or mask")
        return self
