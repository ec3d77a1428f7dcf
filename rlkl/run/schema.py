"""Every option of a run: name, type, default and one line of what it is for."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# Sections of {name: …, **the options of the function it names}; a plain string is the name alone.
PLUGINS = {"task", "reward", "backend", "advantage", "selector", "loss"}


def named(section: Any) -> Any:
    if section is not None and not (
        isinstance(section, dict) and isinstance(section.get("name"), str)
    ):
        raise ValueError("give a name, or {name: ..., option: ...}")
    return section


def rewards(section: Any) -> Any:
    """One plug-in or a list of them, each with a `weight` of its own."""
    if section == []:
        raise ValueError(
            "an empty list; give a name, {name: ..., weight: ..., option: ...}, or a list of these"
        )
    for each in section if isinstance(section, list) else [section]:
        weight = (named(each) or {}).get("weight", 1.0)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
        ):
            raise ValueError(f"weight={weight!r} is no number")
    return section


Plugin = Annotated[dict[str, Any], BeforeValidator(named)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def plugin(name: str) -> Any:
    return field(default_factory=lambda: {"name": name})


@dataclass(config=STRICT)
class Model:
    name: str = "tiny"
    """causal LM: a directory or a hub name; tiny = a small one that is made here when first used"""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """of weights and compute; auto = bfloat16 on cuda (with float32 masters), else float32"""
    reference: Literal["auto", True, False] = "auto"
    """keep a frozen first policy: for kl_ref, and its metrics; auto: the metrics 1 step in 5"""
    logprobs: Literal["auto", "reference", "tiled", "fused"] = "auto"
    """how log-probs are computed: from all logits, in tiles, in tiles with Triton; auto by size"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and run the layer again: less memory"""
    keep_logits_gb: NonNegativeFloat = 0.0
    """GB of logits that tiled and fused keep for the backward pass, not computing them twice"""


@dataclass(config=STRICT)
class Lora:
    r: NonNegativeInt = 0
    """rank of a LoRA adapter; only the adapter is trained. 0 = off, all weights are trained"""
    alpha: PositiveFloat = 32.0
    """the adapter's output is scaled by alpha / r"""
    target_modules: str | list[str] = "all-linear"
    """layers that get an adapter: all-linear (but the unembedding), names, or a regex"""
    modules_to_save: list[str] = field(default_factory=list)
    """layers that are trained in full, by the end of their name, such as model.norm"""


# What rlkl itself passes to apply_chat_template, or what changes the kind of thing it returns.
NOT_OF_A_TEMPLATE = (
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


@dataclass(config=STRICT)
class Chat:
    system: Annotated[str, Field(min_length=1)] | None = None
    """system message before every chat prompt; an error where the prompt has one of its own"""
    template: dict[str, object] = field(default_factory=dict)
    """options of the model's chat template, such as {enable_thinking: false}"""

    @pydantic.model_validator(mode="after")
    def possible(self) -> Self:
        """The template's own options only."""
        for name in self.template:
            if name in NOT_OF_A_TEMPLATE:
                raise ValueError(f"template.{name} is set by rlkl: leave it out")
        return self


@dataclass(config=STRICT)
class Critic:
    kind: Literal["none", "head", "network"] = "none"
    """value function: none, a linear head on the policy's hidden states, or a network of its own"""
    lr: NonNegativeFloat = 1e-3
    """learning rate of the critic"""
    warmup: NonNegativeInt = 0
    """first steps in which only the critic is trained"""
    coef: NonNegativeFloat = 0.5
    """weight of the value loss"""
    clip: PositiveFloat | None = 0.2
    """how far one rollout may move a value; null = not clipped"""


@dataclass(config=STRICT)
class Entropy:
    coef: float = 0.0
    """weight of the entropy bonus; 0 = off"""


@dataclass(config=STRICT)
class Sampling:
    backend: Plugin = plugin("engine")
    """rollout backend, the same tokens from each; engine is fast, naive and cached are to read"""
    prompts: PositiveInt = 64
    """N, prompts per step"""
    group_size: PositiveInt = 8
    """G, responses per prompt"""
    max_new_tokens: PositiveInt = 8
    """T, the longest response in tokens; one that does not end within it is truncated"""
    max_prompt_tokens: PositiveInt | None = None
    """longer prompts are dropped; by default what the model's context leaves"""
    temperature: PositiveFloat = 1.0
    """of sampling and of scoring"""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """groups whose scores are all equal: kept, dropped, or replaced by other prompts (DAPO)"""
    resample_rounds: PositiveInt = 3
    """rounds of resampling per step, at most"""
    curriculum: Literal["none", "watch", "success"] = "none"
    """success rate p of each prompt: not kept, logged, or prompts drawn by p(1 - p) too"""
    baseline: Literal["none", "greedy"] = "none"
    """greedy = the score of each prompt's greedy response, for advantage=remax"""

    @property
    def rows(self) -> int:
        """B = N · G, responses per step."""
        return self.prompts * self.group_size


@dataclass(config=STRICT)
class Overlong:
    buffer: NonNegativeInt = 0
    """tokens before sampling.max_new_tokens over which a response's score falls; 0 = off"""
    coef: NonNegativeFloat = 1.0
    """how far it falls"""


@dataclass(config=STRICT)
class Scoring:
    processes: NonNegativeInt | None = None
    """processes that run reward functions of files; by default one per CPU, at most 8; 0 = none"""
    seconds: PositiveFloat = 10.0
    """time limit of one response, or of one call that scores all responses of a step (TRL style)"""
    memory_gb: PositiveFloat = 4.0
    """memory limit of each process"""
    failed: float = 0.0
    """score of a response whose reward function times out, raises, or returns no finite number"""


@dataclass(config=STRICT)
class Mismatch:
    truncate: Literal["none", "token", "sequence"] = "none"
    """advantages times min(pi_old/sampler, cap), by token or response (truncated IS)"""
    cap: PositiveFloat = 2.0
    """upper bound of that ratio"""
    reject: Literal["none", "token", "sequence", "mean"] = "none"
    """weight 0 where pi_old/sampler is out of bounds: by token, response, or geometric mean"""
    low: NonNegativeFloat = 0.5
    """lower bound of the accepted ratio"""
    high: PositiveFloat = 2.0
    """upper bound of the accepted ratio"""


@dataclass(config=STRICT)
class KLRef:
    place: Literal["reward", "loss"] = "reward"
    """where the KL to the reference is charged"""
    estimator: str = "k1"
    """how it is estimated; k1 is the one for the reward"""
    coef: NonNegativeFloat = 0.0
    """beta; 0 = off"""
    target: PositiveFloat | None = None
    """nats per sequence; if given, coef adapts to keep KL(pi || ref) there"""
    horizon: PositiveInt = 10_000
    """responses over which an adaptive coef may change by 20 %"""


@dataclass(config=STRICT)
class KLOld:
    estimator: str = "k3"
    """how KL(pi_old || pi) is estimated, from samples of pi_old"""
    coef: NonNegativeFloat = 0.0
    """weight of the penalty in the loss; 0 = off"""
    target: PositiveFloat | None = None
    """nats per token; if given, coef doubles or halves to keep KL(pi_old || pi) there"""
    stop: PositiveFloat | None = None
    """nats per token; beyond it the remaining updates on this rollout are skipped"""


@dataclass(config=STRICT)
class Optim:
    steps: PositiveInt = 300
    """training steps: rollouts, each followed by its updates"""
    lr: NonNegativeFloat = 3e-4
    """learning rate of the policy"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """of both learning rates, down to 0 at the last step"""
    warmup: NonNegativeInt = 20
    """steps over which the learning rates rise from 0"""
    epochs: PositiveInt = 1
    """passes over each rollout"""
    minibatch: PositiveInt | None = None
    """rows per optimizer step; by default the whole rollout"""
    micro_tokens: PositiveInt = 8192
    """tokens per forward pass, each prompt once; bounds memory, never changes the gradient"""
    head_tokens: PositiveInt | None = None
    """response tokens per pass through unembedding and loss; by default the whole micro-batch"""
    weights: Literal["token", "sequence", "constant"] = "token"
    """what counts the same: every token, every response, or every token over a fixed length"""
    max_grad_norm: PositiveFloat = 1.0
    """gradient clipping, policy and critic apart"""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: NonNegativeFloat = 0.0
    """of AdamW"""
    offload: bool = False
    """keep AdamW, its moments and the float32 masters in CPU memory: 8 to 12 bytes a weight less"""
    max_skips: PositiveInt = 5
    """updates in a row with a non-finite gradient after which the run gives up"""


@dataclass(config=STRICT)
class Eval:
    every: NonNegativeInt = 50
    """steps between held-out evaluations; 0 = only before and after training"""
    prompts: PositiveInt = 500
    """held-out prompts, the same ones every time"""
    samples: PositiveInt = 8
    """k of pass@k, before and after training"""
    temperature: PositiveFloat = 1.0
    """of the sampled accuracy"""
    stop: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)
    """stop strings: the first to appear ends a held-out response"""


@dataclass(config=STRICT)
class Log:
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases"""
    project: str = "rlkl"
    """project name in Weights & Biases"""
    every: PositiveInt = 10
    """steps between lines on the terminal and tables in W&B; metrics.jsonl has every step"""


@dataclass(config=STRICT)
class RolloutLog(Log):
    responses_every: NonNegativeInt = 50
    """steps between those whose responses to the N prompts are in responses.jsonl; 0 = none"""
    plot: bool = False
    """in a notebook: draw the metrics again with each line on the terminal"""


@dataclass(config=STRICT)
class Checkpoint:
    every: NonNegativeInt = 50
    """steps between checkpoints; 0 = only at the end"""
    keep: PositiveInt = 2
    """newest checkpoints to keep, beside the best by held-out accuracy"""


@dataclass(config=STRICT)
class Config:
    seed: NonNegativeInt = 0
    """of everything random"""
    device: str = "auto"
    """auto = cuda, else mps, else cpu"""
    run: str = "auto"
    """folder of this run, never overwritten; auto = runs/<task>-<advantage>-<number>"""
    resume: str | None = None
    """folder of a run to continue, bit for bit"""
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    critic: Critic = field(default_factory=Critic)
    task: Plugin = plugin("addition")
    """prompts, and how a response is scored"""
    chat: Chat = field(default_factory=Chat)
    reward: Annotated[dict[str, Any] | list[dict[str, Any]] | None, BeforeValidator(rewards)] = None
    """one reward, or a list whose weighted sum counts; by default the task's own score"""
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Sampling = field(default_factory=Sampling)
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """a truncated response: ends there, is worth gamma · V after it more, or is not trained on"""
    overlong: Overlong = field(default_factory=Overlong)
    mismatch: Mismatch = field(default_factory=Mismatch)
    advantage: Plugin = plugin("grpo")
    """advantage estimator"""
    selector: Plugin | None = None
    """token selector; use it with the loss of the same name"""
    loss: Plugin = plugin("clip")
    """policy loss"""
    entropy: Entropy = field(default_factory=Entropy)
    kl_ref: KLRef = field(default_factory=KLRef)
    kl_old: KLOld = field(default_factory=KLOld)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    log: RolloutLog = field(default_factory=RolloutLog)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @pydantic.model_validator(mode="after")
    def possible(self) -> Self:
        """What no single option can check."""
        rows = self.sampling.rows
        if self.optim.minibatch and self.optim.minibatch > rows:
            raise ValueError(
                f"optim.minibatch={self.optim.minibatch} is larger than the rollout of {rows} rows "
                "(sampling.prompts * sampling.group_size): write optim.minibatch=null for one "
                f"update a rollout, or at most {rows}"
            )
        if self.sampling.zero_variance != "keep" and self.sampling.group_size == 1:
            raise ValueError(
                f"sampling.zero_variance={self.sampling.zero_variance} would drop all "
                "groups of 1: set sampling.group_size >= 2, or keep"
            )
        if self.kl_ref.coef > 0 and not self.model.reference:
            raise ValueError(
                f"kl_ref.coef={self.kl_ref.coef} needs a reference: set model.reference=true, or "
                "kl_ref.coef=0"
            )
        for name, kl in (("kl_ref", self.kl_ref), ("kl_old", self.kl_old)):
            if kl.target is not None and kl.coef == 0:
                raise ValueError(
                    f"{name}.target={kl.target} adapts {name}.coef, which is 0: set "
                    f"{name}.coef > 0 to start from"
                )
        if self.sampling.baseline != "none" and self.critic.kind != "none":
            raise ValueError(
                f"sampling.baseline={self.sampling.baseline} and critic.kind={self.critic.kind} "
                "are two baselines: set one of them to none"
            )
        if self.overlong.buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong.buffer={self.overlong.buffer} is longer than a response can be: at most "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}"
            )
        if self.kl_ref.target is not None and 5 * self.kl_ref.horizon <= rows:
            raise ValueError(
                f"kl_ref.horizon={self.kl_ref.horizon}: with {rows} responses a rollout, coef "
                f"could fall to 0 at once; more than {rows // 5} is needed"
            )
        if self.mismatch.low > self.mismatch.high:
            raise ValueError(
                f"mismatch.low={self.mismatch.low} is above mismatch.high={self.mismatch.high}"
            )
        if self.critic.warmup and self.critic.kind == "none":
            raise ValueError(
                f"critic.warmup={self.critic.warmup} trains the critic alone, and there is none: "
                "set critic.kind=head or network, or critic.warmup=0"
            )
        if self.truncation == "bootstrap" and self.critic.kind == "none":
            raise ValueError(
                "truncation=bootstrap needs a critic's V: set critic.kind=head or network, or "
                "truncation=terminal or mask"
            )
        return self
