"""A configuration of TRL's GRPOTrainer as one of ours: `rlkl explain --trl FILE`.

The names and the defaults of the fields are in rlkl/run/names.py. What is the same is said by
tests/test_golden_trl.py, which compares TRL's losses and advantages with ours; what differs is
noted beside the option. A function of this file translates one part of TRL's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

from rlkl.errors import UserError
from rlkl.run.config import checked
from rlkl.run.names import TRL, TRL_AROUND, did_you_mean

VERSION = "1.16"
FIELDS = {f.name: f for f in TRL}
Loss = tuple[dict[str, Any], tuple[str, ...]]  # our section `loss`, and TRL's fields that it reads


@dataclass
class Translation:
    """What TRL's fields are here."""

    options: dict[str, Any] = field(default_factory=dict)  # ours, by dotted key
    differs: dict[str, str] = field(default_factory=dict)  # TRL's field → how ours differs
    left_out: dict[str, str] = field(default_factory=dict)  # TRL's field → why it is not here
    unread: dict[str, str] = field(default_factory=dict)  # TRL's field → why TRL does not read it
    around: list[str] = field(default_factory=list)  # fields that do not change the optimisation


class Batching(NamedTuple):
    """The rows of TRL's rollouts and updates, as ours."""

    prompts: int
    epochs: int
    minibatch: int | None
    updates: int  # per rollout


def translate(given: dict[str, Any], where: str) -> Translation:
    """TRL's fields by name → options of ours. What is not given has TRL's default.

    where: the file, for messages. Raises UserError on a field that TRL does not have, on a value of
    the wrong type, and on batch sizes that TRL refuses.
    """
    values = read_fields(given, where)
    trl = SimpleNamespace(**values)
    done = Translation(around=[name for name in given if name in TRL_AROUND])
    batching = batch_sizes(trl, done)
    model(trl, done)
    data(trl, done)
    rewards(trl, done)
    rollout(trl, done, batching)
    advantage(trl, done)
    policy_loss(trl, done, given)
    divergence_and_entropy(trl, done)
    optimizer(trl, done, batching)
    for f in TRL:
        if f.name not in given or values[f.name] == f.default:
            continue
        if f.only_with and not getattr(trl, f.only_with):
            done.unread.setdefault(f.name, f"it goes with {f.only_with}")
        elif not f.here:
            done.left_out.setdefault(f.name, f.note)
    return done


def read_fields(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The value of each field, checked. UserError on another name, and on a wrong type."""
    for name in given:
        if name not in FIELDS and name not in TRL_AROUND:
            advice = did_you_mean(str(name), [*FIELDS, *TRL_AROUND])
            raise UserError(
                f"{where}: TRL {VERSION} has no field {name!r} in GRPOConfig"
                + (f"; {advice}" if advice else "")
            )
    return {
        name: checked(given[name], f.kind, f"{where}: {name}") if name in given else f.default
        for name, f in FIELDS.items()
    }


# ------------------------------------------------------------------ batches


def batch_sizes(trl: Any, done: Translation) -> Batching:
    """TRL's arithmetic on one device.

    A rollout has steps_per_generation micro-batches, each of which is trained on num_iterations
    times; an update has gradient_accumulation_steps micro-batches. Raises UserError where TRL does.
    """
    micro, accumulated = trl.per_device_train_batch_size, trl.gradient_accumulation_steps
    group, iterations = trl.num_generations, trl.num_iterations
    steps = steps_per_generation(trl)
    for name, value in (
        ("per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", accumulated),
        ("num_iterations", iterations),
        ("steps_per_generation", steps),
    ):
        if value < 1:
            raise UserError(f"{name}={value}: it must be 1 at least")
    rows, update = micro * steps, micro * accumulated
    if group < 2 or rows % group:
        raise UserError(
            f"a rollout of {rows} rows (per_device_train_batch_size={micro} * "
            f"steps_per_generation={steps}) must be a multiple of num_generations={group}, which "
            "must be 2 at least: TRL refuses it too"
        )
    passes = steps * iterations  # micro-batches that a rollout is trained on
    if iterations > 1 and steps < accumulated:
        done.differs["num_iterations"] = "passes within one update of TRL's are one pass here"
    if accumulated % passes == 0:  # an update takes several whole rollouts
        return Batching(update // iterations // group, 1, None, 1)
    if accumulated % steps == 0 and passes % accumulated == 0:  # an update has whole passes
        return Batching(rows // group, passes // accumulated, None, passes // accumulated)
    if steps % accumulated == 0:  # a pass has several updates
        minibatch = update if update < rows else None
        return Batching(rows // group, iterations, minibatch, passes // accumulated)
    done.differs["gradient_accumulation_steps"] = (
        f"TRL's update has {accumulated} micro-batches and its rollout {steps}, so some updates "
        "see two rollouts; here each rollout is finished first"
    )
    minibatch = min(update, rows)
    return Batching(rows // group, iterations, minibatch, iterations * -(-rows // minibatch))


def steps_per_generation(trl: Any) -> int:
    """The micro-batches of a rollout. UserError where TRL refuses its two names together."""
    rows, micro = trl.generation_batch_size, trl.per_device_train_batch_size
    if rows is None:
        return (
            trl.gradient_accumulation_steps
            if trl.steps_per_generation is None
            else (trl.steps_per_generation)
        )
    if trl.steps_per_generation is not None:
        raise UserError(
            f"generation_batch_size={rows} and steps_per_generation={trl.steps_per_generation} say "
            "the same: leave one of them out"
        )
    if micro < 1 or rows % micro:
        raise UserError(
            f"generation_batch_size={rows} must be a multiple of "
            f"per_device_train_batch_size={micro}"
        )
    return rows // micro


# ------------------------------------------------------------------ model, data and rewards


def model(trl: Any, done: Translation) -> None:
    """The model, its dtype, its adapter."""
    if trl.model_name_or_path is not None:
        done.options["model.name"] = trl.model_name_or_path
    if trl.dtype == "bfloat16":
        done.options["model.dtype"] = "bfloat16"
        done.differs["dtype"] = "AdamW has float32 masters of bfloat16 weights"
    elif trl.dtype == "float16":
        done.left_out["dtype"] = FIELDS["fp16"].note
    elif trl.bf16 is False and not trl.fp16:
        done.options["model.dtype"] = "float32"
    checkpointing = trl.activation_checkpointing
    done.options["model.gradient_checkpointing"] = (
        trl.gradient_checkpointing if checkpointing is None else checkpointing
    )
    done.options["seed"] = trl.seed
    if trl.use_cpu:
        done.options["device"] = "cpu"
    if trl.use_peft:
        adapter(trl, done)


def adapter(trl: Any, done: Translation) -> None:
    done.options["lora.r"] = trl.lora_r
    done.options["lora.alpha"] = trl.lora_alpha
    if trl.lora_target_modules is None:
        done.differs["lora_target_modules"] = FIELDS["lora_target_modules"].note
    else:
        done.options["lora.target_modules"] = trl.lora_target_modules
    if trl.lora_modules_to_save:
        done.options["lora.modules_to_save"] = trl.lora_modules_to_save
    if trl.lora_dropout:
        done.left_out["lora_dropout"] = (
            f"{trl.lora_dropout:g} there, and dropout is always off here"
        )


def data(trl: Any, done: Translation) -> None:
    """The dataset, and how its prompts become tokens."""
    if trl.dataset_name is not None:
        task = {
            "name": "datasets",
            "path": trl.dataset_name,
            "train_split": trl.dataset_train_split,
        }
        if trl.dataset_config is not None:
            task["config"] = trl.dataset_config
        if trl.dataset_test_split != FIELDS["dataset_test_split"].default:
            task["heldout_split"] = trl.dataset_test_split
        done.options["task"] = task
        done.differs["dataset_name"] = (
            "task.prompt and task.answer name its columns, and are prompt and answer if not given"
        )
    if trl.max_prompt_length is not None:
        done.options["sampling.max_prompt_tokens"] = trl.max_prompt_length
        done.differs["max_prompt_length"] = FIELDS["max_prompt_length"].note
    if isinstance(trl.chat_template_kwargs, str):
        raise UserError(
            f"chat_template_kwargs={trl.chat_template_kwargs!r}: write it as a mapping, "
            "{name: value}"
        )
    if trl.chat_template_kwargs:
        done.options["chat.template"] = trl.chat_template_kwargs


def rewards(trl: Any, done: Translation) -> None:
    """The reward functions that TRL's command line names, with their weights."""
    parts = []
    if trl.reward_model_name_or_path is not None:
        parts.append({"name": "reward_model", "path": trl.reward_model_name_or_path})
    for name in trl.reward_funcs or []:
        module, dot, function = name.rpartition(".")
        if not dot:  # TRL's own, which work here where TRL is installed
            module = "trl.rewards"
        parts.append({"name": f"{module}:{function}"})
    weights = trl.reward_weights
    if not parts:
        if weights is not None:
            done.left_out["reward_weights"] = (
                "the functions are not in this file: reward=[{name: ..., weight: ...}, ...]"
            )
        return
    if weights is not None and len(weights) != len(parts):
        raise UserError(
            f"reward_weights={weights!r}: there are {len(parts)} rewards, and one weight for each"
        )
    for part, weight in zip(parts, weights or [], strict=False):
        part["weight"] = weight
    done.options["reward"] = parts


# ------------------------------------------------------------------ rollout and advantage


def rollout(trl: Any, done: Translation, batching: Batching) -> None:
    """What is sampled, and what of it is trained on."""
    done.options["sampling.prompts"] = batching.prompts
    done.options["sampling.group_size"] = trl.num_generations
    done.options["sampling.max_new_tokens"] = trl.max_completion_length
    done.options["sampling.temperature"] = trl.temperature
    if trl.mask_truncated_completions:
        done.options["truncation"] = "mask"


SCALES: dict[Any, dict[str, str]] = {
    True: {"name": "grpo"},
    "group": {"name": "grpo"},
    "batch": {"name": "grpo", "scale": "batch"},
    False: {"name": "dr_grpo"},
    "none": {"name": "dr_grpo"},
}


def advantage(trl: Any, done: Translation) -> None:
    """The scores relative to their group."""
    done.options["advantage"] = choose(SCALES, trl.scale_rewards, "scale_rewards")


# ------------------------------------------------------------------ policy loss


def clip(trl: Any, done: Translation) -> Loss:
    """PPO's clip of a token's ratio, or of the ratio of its response."""
    reads = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")
    loss = {"name": "clip", "epsilon": trl.epsilon}
    if trl.epsilon_high is not None:
        loss["epsilon_high"] = trl.epsilon_high
    high = trl.epsilon if trl.epsilon_high is None else trl.epsilon_high
    if by_response(trl):
        loss |= {"name": "gspo", "epsilon_high": high}  # whose own default is another
    elif trl.top_entropy_quantile < 1:
        loss["name"] = "top_entropy"
        done.options["selector"] = {"name": "top_entropy", "fraction": trl.top_entropy_quantile}
        done.differs["top_entropy_quantile"] = (
            "tokens are chosen over the whole update, by pi_old and by rank; TRL's by pi, in each "
            "micro-batch, at a quantile"
        )
    elif trl.delta is not None:
        loss["delta"] = trl.delta
        if trl.delta < 1 + high:
            done.differs["delta"] = (
                "it bounds w where A < 0 only; TRL's also where A > 0, which shows below "
                f"1 + epsilon_high = {1 + high:g}"
            )
    if trl.delta is not None and "delta" not in loss:
        done.left_out["delta"] = "it is an option of loss=clip alone"
    if by_response(trl) and trl.top_entropy_quantile < 1:
        done.left_out["top_entropy_quantile"] = "loss=top_entropy clips tokens and not responses"
    return loss, reads


def cispo(trl: Any, done: Translation) -> Loss:
    """A capped weight of REINFORCE."""
    of_tokens(trl, done)
    if trl.epsilon_high is not None:
        return {"name": "cispo", "cap": trl.epsilon_high}, ("epsilon_high",)
    return {"name": "cispo", "cap": trl.epsilon}, ("epsilon",)


def sapo(trl: Any, done: Translation) -> Loss:
    """A sigmoid gate."""
    of_tokens(trl, done)
    options = {"tau": trl.sapo_temperature_pos, "tau_negative": trl.sapo_temperature_neg}
    return {"name": "sapo"} | options, ("sapo_temperature_pos", "sapo_temperature_neg")


def vespo(trl: Any, done: Translation) -> Loss:
    """A soft weight of the whole response."""
    of_tokens(trl, done, any_level=True)
    options = {
        "k": trl.vespo_k_pos,
        "lam": trl.vespo_lambda_pos,
        "k_negative": trl.vespo_k_neg,
        "lam_negative": trl.vespo_lambda_neg,
    }
    reads = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    return {"name": "vespo"} | options, reads


def by_response(trl: Any) -> bool:
    """Is the ratio that of a whole response? UserError on a level that TRL does not have."""
    levels = {"token": False, "sequence": True}
    return choose(levels, trl.importance_sampling_level, "importance_sampling_level")


def of_tokens(trl: Any, done: Translation, any_level: bool = False) -> None:
    """Note what only the clip has here. any_level: TRL does not read the level for this loss."""
    if by_response(trl) and not any_level:
        done.left_out["importance_sampling_level"] = (
            "only the clip has the ratio of a response, loss=gspo"
        )
    if trl.top_entropy_quantile < 1:
        done.left_out["top_entropy_quantile"] = "it goes with the clip alone, loss=top_entropy"


LOSS_TYPES: dict[str, tuple[Callable[[Any, Translation], Loss], str]] = {
    "grpo": (clip, "sequence"),
    "bnpo": (clip, "token"),
    "dapo": (clip, "token"),
    "dr_grpo": (clip, "constant"),
    "luspo": (clip, "constant"),
    "cispo": (cispo, "token"),
    "vespo": (vespo, "token"),
    "sapo": (sapo, "sequence"),
}
OVER_THE_ROLLOUT = ("dapo", "cispo", "vespo")  # TRL counts the tokens of the rollout
LOSS_FIELDS = [
    *("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *(f.name for f in TRL if f.name.startswith(("sapo_", "vespo_"))),
]


def is_summed(trl: Any) -> bool:
    """Does TRL sum the tokens of a response, without a denominator?"""
    return trl.loss_type == "luspo"


def policy_loss(trl: Any, done: Translation, given: dict[str, Any]) -> None:
    """loss_type is a loss and the weights of its tokens."""
    translate_loss, weights = choose(LOSS_TYPES, trl.loss_type, "loss_type")
    loss, reads = translate_loss(trl, done)
    for name in LOSS_FIELDS:
        if name in given and name not in reads and name not in done.left_out:
            done.unread[name] = f"loss_type={trl.loss_type} does not"
    accumulated = trl.gradient_accumulation_steps
    if trl.loss_type == "bnpo" and trl.per_device_train_batch_size == 1:
        weights = "sequence"  # the mean over a response of each micro-batch
    elif trl.loss_type == "bnpo" and accumulated > 1:
        done.differs["loss_type"] = (
            "TRL takes the mean of its micro-batches' means; here every token of the update counts "
            "the same"
        )
    elif trl.loss_type in OVER_THE_ROLLOUT and steps_per_generation(trl) != accumulated:
        done.differs["loss_type"] = (
            "TRL divides by the mean number of tokens in the rollout's updates, or of each rollout "
            "in an update; here by the number of tokens in the update"
        )
    elif is_summed(trl):
        done.differs["loss_type"] = (
            "TRL sums a response's tokens; optim.weights=constant also divides by "
            "sampling.max_new_tokens, so optim.max_grad_norm does, and AdamW sees no difference"
        )
    if trl.mask_truncated_completions and weights != "token":
        done.differs["mask_truncated_completions"] = (
            "TRL's mean still counts the truncated responses, as zeros"
        )
    done.options["loss"] = loss
    done.options["optim.weights"] = weights


# ------------------------------------------------------------------ KL and entropy


def divergence_and_entropy(trl: Any, done: Translation) -> None:
    """The KL to the reference, which TRL has in the loss, and the entropy bonus."""
    if trl.beta:
        done.options["kl_ref.coef"] = trl.beta
        done.options["kl_ref.place"] = "loss"
        done.options["kl_ref.estimator"] = "wk3_token" if trl.use_bias_correction_kl else "k3"
        if trl.use_bias_correction_kl and by_response(trl):
            done.differs["use_bias_correction_kl"] = (
                "wk3_token weighs k3 by the ratio of its token; TRL by that of its response"
            )
    if trl.entropy_coef:
        done.options["entropy.coef"] = trl.entropy_coef
        by_token = done.options["optim.weights"] == "token"
        if not by_token or trl.gradient_accumulation_steps > 1 or trl.top_entropy_quantile < 1:
            done.differs["entropy_coef"] = (
                "TRL's bonus is a mean over the tokens of a micro-batch that are trained on; here "
                "it has the weights of the loss, over all tokens of the update"
            )


# ------------------------------------------------------------------ optimizer

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
SAME_OPTIMIZER = ("adamw_torch", "adamw_torch_fused")
NO_CLIPPING = 1e9  # of the gradient's norm


def optimizer(trl: Any, done: Translation, batching: Batching) -> None:
    """AdamW, its schedule, and the length of the run."""
    done.options["optim.epochs"] = batching.epochs
    if batching.minibatch is not None:
        done.options["optim.minibatch"] = batching.minibatch
    done.options["optim.lr"] = trl.learning_rate
    done.options["optim.betas"] = [trl.adam_beta1, trl.adam_beta2]
    done.options["optim.weight_decay"] = trl.weight_decay
    if trl.weight_decay:
        done.differs["weight_decay"] = "all weights decay; TRL leaves out biases and norms"
    summed = trl.max_completion_length if is_summed(trl) else 1
    done.options["optim.max_grad_norm"] = trl.max_grad_norm / summed or NO_CLIPPING
    if trl.optim not in SAME_OPTIMIZER:
        done.left_out["optim"] = "AdamW in float32 is the only optimizer"
    length(trl, done, batching)


def length(trl: Any, done: Translation, batching: Batching) -> None:
    """Steps, warm-up and schedule: TRL counts updates, and we count rollouts."""
    steps = None
    if trl.max_steps > 0:
        steps = -(-trl.max_steps // batching.updates)
        done.options["optim.steps"] = steps
    else:
        done.left_out["num_train_epochs"] = (
            f"optim.steps counts rollouts: it is {trl.num_train_epochs:g} * (the number of prompts "
            f"in the dataset) / {batching.prompts}"
        )
    done.options["optim.schedule"] = SCHEDULES.get(trl.lr_scheduler_type, "constant")
    if trl.lr_scheduler_type not in SCHEDULES:
        done.left_out["lr_scheduler_type"] = f"there is {', '.join(SCHEDULES)}"
    name = "warmup_steps" if trl.warmup_steps else "warmup_ratio"
    warmup = trl.warmup_steps or trl.warmup_ratio
    done.options["optim.warmup"] = 0
    if warmup and trl.lr_scheduler_type == "constant":
        done.unread[name] = "the schedule constant has no warm-up; constant_with_warmup has"
    elif 0 < warmup < 1 and steps is None:
        done.left_out[name] = f"optim.warmup counts rollouts: it is {warmup:g} * optim.steps"
    elif warmup:
        updates = math.ceil(warmup * trl.max_steps) if warmup < 1 else int(warmup)
        done.options["optim.warmup"] = -(-updates // batching.updates)
        done.differs[name] = "TRL's first update has lr 0, and its decay begins after the warm-up"


def choose(table: dict[Any, Any], value: Any, name: str) -> Any:
    """The entry of a value. UserError with the choices where there is none."""
    if value not in table:
        choices = ", ".join(str(key) for key in table)
        raise UserError(f"{name}={value!r}: choose {choices}")
    return table[value]
