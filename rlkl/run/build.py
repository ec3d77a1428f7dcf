"""From a configuration to models, algorithm and data, all checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy import lora
from rlkl.policy.attention import unsupported
from rlkl.policy.model import checkpoint_layers, context_of, load, sampling_params
from rlkl.policy.optimizer import Optimizer
from rlkl.policy.policy import Policy, reference_of
from rlkl.rewards import REWARDS, Reward, compute_scores, from_task, with_overlong
from rlkl.rewards.pool import end_if_imported
from rlkl.rewards.scoring import Scoring, assemble, unweighted
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sampling import encode
from rlkl.run import checkpoint
from rlkl.run.algorithm import Algorithm, resolve_algorithm
from rlkl.run.dynamic_sampling import GenerateAndScore, with_dynamic_sampling
from rlkl.run.schema import Chat, Config
from rlkl.run.seeds import derive_seed, sample_examples
from rlkl.run.terminal import console, log_line, note, note_few_heldout
from rlkl.supervised.tiny import cached_base
from rlkl.tasks import TASKS, Addition
from rlkl.tasks.answers import NO_ANSWERS, has_answers
from rlkl.types import Batch, Example, SamplingParams


@dataclass
class Models:
    """The policy and what goes with it: how it samples, its reference, its optimizer."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    sampler: Callable[..., Batch]  # a rollout backend
    params: SamplingParams
    reference: Policy | None = None
    chat: Chat | None = None  # how the policy's chat prompts are built
    optimizer: Optimizer = field(init=False)  # only where the policy is trained


Grade = Callable[[Example, str], dict[str, float]]  # what a task reports beside accuracy


class Heldout(NamedTuple):
    """The held-out prompts, and how responses to them are graded."""

    examples: list[Example]
    reward: Reward  # a response is correct if this scores it at least 1
    grade: Grade


@dataclass
class Data:
    """Prompts, and the reward that scores responses to them."""

    train: list[Example]
    heldout: Heldout
    reward: Reward
    scoring: Scoring  # the processes that run reward functions; to be closed


def build(
    cfg: Config,
    generate_and_score: GenerateAndScore,
    warn: Callable[[Config, Algorithm, Any, torch.device], None] = lambda *_: None,
) -> tuple[Models, Algorithm, Data]:
    """Load and check everything that a run needs. Raises UserError on what cannot work.

    generate_and_score: train.py's, which dynamic sampling may wrap.
    warn(cfg, algorithm, task, device): called before a model is loaded.
    """
    end_if_imported()
    device = pick_device(cfg.device)
    log_line(f"device: {device}")
    algorithm = resolve_algorithm(cfg)
    algorithm.rollout = with_dynamic_sampling(cfg, generate_and_score)
    sampler = build_sampler(cfg.sampling.backend)
    make_task = resolve(cfg.task, TASKS, "task")
    task, heldout_task = make_task("train"), make_task("heldout")
    scoring = build_scoring(cfg, cfg.optim.steps)
    reward, heldout_reward, grade = build_reward(cfg, task, scoring, device)
    warn(cfg, algorithm, task, device)
    models = build_models(cfg, task, sampler, device)
    heldout = Heldout(
        heldout_examples(cfg, models.policy, models.tokenizer, heldout_task), heldout_reward, grade
    )
    examples = [task[i] for i in range(len(task))]
    train = filter_by_length(cfg, models.policy, models.tokenizer, examples, "train")
    return models, algorithm, Data(train, heldout, reward, scoring)


def build_models(
    cfg: Config, task: Any, sampler: Callable[..., Batch], device: torch.device
) -> Models:
    """Policy, reference and optimizer; with `resume` the policy of the newest checkpoint.

    The reference is the first policy, also where a run is resumed.
    """
    start = checkpoint.newest(Path(cfg.resume)) if cfg.resume else None
    name, dtype = model_name(cfg.model.name, task), dtype_of(cfg, device)
    policy, tokenizer = load(name, critic=cfg.critic.kind, device=device, dtype=dtype)
    reason = unsupported(policy.backbone)
    if reason is not None:
        policy.stop_sharing_prompts(reason)
    if cfg.lora.r:
        lora.adapt(policy.lm, **asdict(cfg.lora), seed=derive_seed(cfg.seed, 0, "LoRA"))
    reference = reference_of(policy) if cfg.model.reference else None
    if start is not None and cfg.lora.r:
        lora.restore(policy.lm, start)
    elif start is not None:
        policy, _ = load(str(start), critic=cfg.critic.kind, device=device, dtype=dtype)
    if cfg.model.gradient_checkpointing:
        checkpoint_layers(policy)
    for model in filter(None, (policy, reference)):
        model.backend = cfg.model.logprobs
        model.keep_bytes = int(cfg.model.keep_logits_gb * 1e9)
    models = Models(
        policy=policy,
        tokenizer=tokenizer,
        sampler=sampler,
        params=sampling_params(policy, tokenizer, cfg.sampling.temperature),
        reference=reference,
        chat=cfg.chat,
    )
    models.optimizer = Optimizer(
        policy.parameter_groups(),
        {"policy": cfg.optim.lr, "critic": cfg.critic.lr},
        betas=cfg.optim.betas,
        weight_decay=cfg.optim.weight_decay,
        max_grad_norm=cfg.optim.max_grad_norm,
        offload=cfg.optim.offload,
    )
    return models


def build_sampler(backend: dict[str, Any]) -> Callable[..., Batch]:
    """A rollout backend. What a plug-in returns is checked, and set to 0 outside the mask.

    Raises UserError as `resolve` does.
    """
    sampler = resolve(backend, SAMPLERS, "sampling.backend")
    if backend["name"] in SAMPLERS:
        return sampler

    def checked(*args: Any) -> Batch:
        batch = sampler(*args)
        try:
            batch.zero_padding()
        except ValueError as error:
            raise UserError(f"sampling.backend.name={backend['name']}: {error}") from error
        return batch

    return checked


# ------------------------------------------------------------------ device and model


def pick_device(name: str) -> torch.device:
    """auto = cuda, else mps, else cpu. UserError if the device is not there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise UserError(f"device={name!r}: choose auto, {', '.join(available)}")
    return device


def dtype_of(cfg: Any, device: torch.device) -> torch.dtype:
    """model.dtype; auto is bfloat16 on CUDA and float32 elsewhere."""
    if cfg.model.dtype != "auto":
        return getattr(torch, cfg.model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def model_name(name: str, task: Any = None) -> str:
    """A directory or a hub name as it is; for `tiny` the folder of the base model of this task.

    The base is made now if it is missing; without a task it is that of addition.
    """
    if name != "tiny":
        return name
    task = Addition("train") if task is None else task
    examples = [task[i] for i in range(len(task))]
    with console.status("") as status:

        def progress(step: int, steps: int) -> None:
            status.update(f"making the tiny base model, once: step {step} of {steps}")

        return str(cached_base(progress, examples))


# ------------------------------------------------------------------ rewards


def build_scoring(cfg: Any, steps: int) -> Scoring:
    """The processes that run reward functions in a run of so many steps; none is started yet."""
    return Scoring(**asdict(cfg.scoring), steps=steps, say=note)


def build_reward(
    cfg: Config, task: Any, scoring: Scoring, device: torch.device
) -> tuple[Reward, Reward, Grade]:
    """(reward of the run, reward of its held-out evaluation, `grade` of the task).

    Held-out responses have the score of the task, whatever is trained on. Rows without answers have
    none: there it is the reward of the run. Raises UserError where that is not given either.
    """
    sections = sections_of(cfg.reward)
    require_answers(task, sections)
    task_reward, grade = task_functions(cfg, task, scoring)
    reward = task_reward
    if sections:
        reward = assemble(sections, task_reward, scoring)
        try_rewards(sections, device)
    heldout_reward = task_reward if has_answers(task) else reward
    if cfg.overlong.buffer:
        room = cfg.sampling.max_new_tokens
        reward = with_overlong(reward, room, cfg.overlong.buffer, cfg.overlong.coef)
    return reward, heldout_reward, grade


def sections_of(reward: dict[str, Any] | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The sections of `reward:`, of which there may be none, one, or a list."""
    return reward if isinstance(reward, list) else [reward] if reward else []


def require_answers(task: Any, sections: list[dict[str, Any]]) -> None:
    """UserError where the task is to score, and its rows have no answers."""
    is_to_score = not sections or any(section["name"] == "task" for section in sections)
    if is_to_score and not has_answers(task):
        raise UserError(NO_ANSWERS)


def task_functions(cfg: Any, task: Any, scoring: Scoring) -> tuple[Reward, Grade]:
    """The task's score as a reward, and its `grade`: {} where it has none."""
    if not has_answers(task):
        reward = from_task(no_score)
    elif cfg.task["name"] in TASKS:
        reward = from_task(task.score)
    else:  # user code
        reward = scoring.task(cfg.task, task.score)
    return reward, partial(call_grade, getattr(task, "grade", lambda *_: {}))


def no_score(example: Example, response: str) -> float:
    """The score of a task whose rows have no answers. Raises UserError."""
    raise UserError(NO_ANSWERS)


def call_grade(grade: Grade, example: Example, response: str) -> dict[str, float]:
    """The grades of a response. UserError where the task raises."""
    try:
        return grade(example, response)
    except Exception as error:  # user code may fail in any way
        raise UserError(
            f"task.grade raised {type(error).__name__}: {error} for the response {response!r}"
        ) from error


def try_rewards(sections: list[dict[str, Any]], device: torch.device) -> None:
    """Score one response with each built-in reward, so that a missing model is noticed now."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, mask, ids, mask, ids.float(), ~mask[:, 0])
    for section in sections:
        if section["name"] in REWARDS:
            reward = resolve(unweighted(section), REWARDS, "reward")
            compute_scores(reward, [Example("prompt")], ["response"], batch)


# ------------------------------------------------------------------ prompts


def heldout_examples(
    cfg: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, task: Any
) -> list[Example]:
    """The held-out examples, the same ones for every seed."""
    count = min(cfg.eval.prompts, len(task))
    chosen = sample_examples(range(len(task)), count, seed=0, step=0)
    examples = filter_by_length(cfg, policy, tokenizer, [task[i] for i in chosen], "held-out")
    advice = f"eval.prompts={cfg.eval.prompts}, and the task holds out {len(task)}"
    note_few_heldout(len(examples), "prompts", advice)
    return examples


def filter_by_length(
    cfg: Any,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    side: str,
) -> list[Example]:
    """The examples whose prompt leaves room for a response.

    The others are counted, and the first one is named. UserError if none is left.
    """
    if not examples:
        raise UserError(f"the task has no {side} prompts")
    lengths = [len(encode(tokenizer, e.prompt, cfg.chat)) for e in examples]
    context = context_of(policy.lm)
    limit = cfg.sampling.max_prompt_tokens
    if limit is None and context is None:
        limit = max(lengths)
    elif limit is None:
        limit = context - cfg.sampling.max_new_tokens
        if limit <= 0:
            raise UserError(
                f"sampling.max_new_tokens={cfg.sampling.max_new_tokens} leaves no room for a "
                f"prompt: the model's context is {context} tokens, for prompt and response together"
            )
    too_long = [(n, e) for n, e in zip(lengths, examples, strict=True) if not 0 < n <= limit]
    if too_long:
        tokens, first = too_long[0]
        what = (
            f"{len(too_long)} of {len(examples)} {side} prompts are empty or longer than {limit} "
            f"tokens, the first with {tokens}: {str(first.prompt)[:60]!r}"
        )
        if len(too_long) == len(examples):
            raise UserError(
                f"{what}; none is left: raise sampling.max_prompt_tokens, or lower "
                "sampling.max_new_tokens"
            )
        note(f"dropped: {what}")
    return [e for n, e in zip(lengths, examples, strict=True) if 0 < n <= limit]
