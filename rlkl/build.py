"""From a config to the things it names, each checked before the first rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkl import lora, tiny
from rlkl.advantages import ADVANTAGES
from rlkl.algorithm import algorithm, reads_old
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.explain import traps
from rlkl.explain.footprint import plan
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES, SELECTORS
from rlkl.model import Policy, checkpoint_layers, context_of, encode, load, reference_of, sampling_rule
from rlkl.optim import Optimizer
from rlkl.rewards import REWARDS, Reward, from_task, judge, with_overlong
from rlkl.rewards.scoring import Scoring, assemble, unweighted
from rlkl.rollout import SAMPLERS
from rlkl.schema import Config
from rlkl.seeds import draw, stream
from rlkl.tasks import TASKS, Addition
from rlkl.types import Batch, Evaluation, Example, Sampling

T = TypeVar("T")
TABLES = {  # what an option may name
    "task": TASKS, "reward": REWARDS, "sampling.backend": SAMPLERS, "advantage": ADVANTAGES, "selector": SELECTORS,
    "loss": LOSSES, "kl_ref.estimator": KL | KL_LOSSES, "kl_old.estimator": KL_OLD_LOSSES,
}


@dataclass
class Parts:
    """What the config names."""

    policy: Policy
    reference: Policy | None
    exact: Policy | None  # the reference again, if the KL term is about the whole vocabulary
    evaluations: Callable[[Batch], Iterator[tuple[Evaluation, Batch]]]  # of a micro-batch, whole or in head chunks
    tokenizer: PreTrainedTokenizerBase
    optimizer: Optimizer
    rule: Sampling
    sampler: Callable[..., Batch]
    reward: Reward
    scoring: Scoring  # the processes that score text; to be closed
    advantage: Callable[..., tuple[Tensor, Tensor | None]]
    selector: Callable[[Batch, Tensor], Tensor] | None
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    kl_ref: Callable[..., Tensor]  # in the reward (logprobs, ref_logprobs), in the loss (new, batch); → (B, T)
    kl_old: Callable[..., Tensor]  # (new, batch) → (B, T)
    reads_old: bool  # does anything need pi_old before the first update? If not, it is the pi of that update
    train: list[Example]
    heldout: list[Example]
    solved: Callable[[Example, str], bool]  # is this reply right? what held-out accuracy counts
    grade: Callable[[Example, str], dict[str, float]]  # what the task reports of a held-out reply beside that


def pick_device(name: str) -> torch.device:
    """auto = cuda, else mps, else cpu. UserError if it is not there."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in here:
        raise UserError(f"device={name!r}: choose auto, {', '.join(here)}")
    return device


def build(cfg: Config, device: torch.device, console: Console, start: Path | None = None) -> Parts:
    """Load and check everything. `start`: the checkpoint to continue from; the reference is always the first policy."""
    sampler, chosen = resolve(cfg.sampling.backend, SAMPLERS, "sampling.backend"), algorithm(cfg)
    for trap in traps(cfg, chosen):
        console.print(f"[yellow]note:[/] {escape(trap)}")
    make_task = resolve(cfg.task, TASKS, "task")
    task, heldout_task = make_task("train"), make_task("heldout")
    scoring = scoring_of(cfg, console)
    reward, solved, grade = judges(cfg, task, scoring)
    if cfg.reward:
        sections = cfg.reward if isinstance(cfg.reward, list) else [cfg.reward]
        reward = assemble(sections, reward, scoring)
        ask_once(sections, device)
    if cfg.overlong.buffer:
        reward = with_overlong(reward, cfg.sampling.max_new_tokens, cfg.overlong.buffer, cfg.overlong.coef)

    for line in plan(cfg, chosen.exact, device, task):
        console.print(escape(line))
    name, dtype = model_name(cfg.model.name, console, task), dtype_of(cfg, device)
    policy, tokenizer = load(name, critic=cfg.model.critic, device=device, dtype=dtype)
    if cfg.lora.r:
        lora.adapt(policy.lm, **asdict(cfg.lora), seed=stream(cfg.seed, 0, "LoRA"))
    reference = reference_of(policy) if cfg.model.reference else None
    exact = reference if chosen.exact else None
    if start is not None and cfg.lora.r:
        lora.restore(policy.lm, start)
    elif start is not None:
        policy, _ = load(str(start), critic=cfg.model.critic, device=device, dtype=dtype)
    if cfg.model.checkpointing:
        checkpoint_layers(policy)
    lrs = {"policy": cfg.optim.lr, "critic": cfg.optim.critic_lr}
    optimizer = Optimizer(policy.parameter_groups(), lrs, betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay,
                          max_grad_norm=cfg.optim.max_grad_norm, offload=cfg.optim.offload)

    for each in filter(None, (policy, reference)):
        each.backend, each.keep_bytes = cfg.model.logprobs, int(cfg.model.keep_logits_gb * 1e9)
    chunks = partial(policy.in_head_chunks, tokens=cfg.optim.head_tokens) if cfg.optim.head_tokens else policy.whole
    return Parts(
        policy, reference, exact, partial(chunks, reference=exact), tokenizer, optimizer,
        sampling_rule(policy, tokenizer, cfg.sampling.temperature),
        sampler, reward, scoring, chosen.advantage, chosen.selector, chosen.loss, chosen.kl_ref, chosen.kl_old,
        reads_old(cfg),
        train=that_fit(cfg, policy, tokenizer, [task[i] for i in range(len(task))], "train", console),
        heldout=heldout_of(cfg, policy, tokenizer, heldout_task, console), solved=solved, grade=grade)


def ask_once(sections: list[dict[str, Any]], device: torch.device) -> None:
    """Each reward of ours, about one reply: a model that one of them lacks is missed before a run is begun."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    said = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(ids, said, ids, said, ids.float(), ~said[:, 0])
    for section in sections:
        if section["name"] in REWARDS:
            judge(resolve(unweighted(section), REWARDS, "reward"), [Example("prompt")], ["reply"], batch)


def scoring_of(cfg: Config, console: Console) -> Scoring:
    """The processes that score text, none started yet."""
    return Scoring(**asdict(cfg.scoring), steps=cfg.optim.steps, say=lambda line: console.print(
        f"[yellow]note:[/] {escape(line)}"))


def heldout_of(cfg: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, task: Any, console: Console
               ) -> list[Example]:
    """The held-out prompts, the same ones for every seed."""
    chosen = draw(range(len(task)), min(cfg.eval.prompts, len(task)), seed=0, step=0)
    return that_fit(cfg, policy, tokenizer, [task[i] for i in chosen], "held-out", console)


def judges(cfg: Config, task: Any, scoring: Scoring
           ) -> tuple[Reward, Callable[[Example, str], bool], Callable[[Example, str], dict[str, float]]]:
    """What a task says of replies: as a reward, whether one is right, and its grades, none where it gives none."""
    reward, score = from_task(task.score), task.score
    if cfg.task["name"] not in TASKS:  # somebody else's code
        reward, score = scoring.task(cfg.task, task.score)
    return reward, partial(is_right, score), partial(judged, "grade", getattr(task, "grade", lambda *_: {}))


def is_right(score: Callable[[Example, str], float | dict[str, float]], example: Example, reply: str) -> bool:
    """A score, or a sum of named parts, of at least 1."""
    scored = judged("score", score, example, reply)
    return (sum(scored.values()) if isinstance(scored, dict) else scored) >= 1


def judged(name: str, function: Callable[[Example, str], T], example: Example, reply: str) -> T:
    """What a task says of a reply. UserError where it raises."""
    try:
        return function(example, reply)
    except Exception as error:  # somebody else's code may fail in any way
        raise UserError(f"task.{name} raised {type(error).__name__}: {error} for the reply {reply!r}") from error


def dtype_of(cfg: Config, device: torch.device) -> torch.dtype:
    if cfg.model.dtype != "auto":
        return getattr(torch, cfg.model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def model_name(name: str, console: Console, task: Any = None) -> str:
    """A directory or a hub name as it is; for tiny the base for a task, or for addition, made now if it is missing."""
    if name != "tiny":
        return name
    task = Addition("train") if task is None else task
    with console.status("") as status:
        return str(tiny.cached_base(
            lambda accuracy, goal: status.update(
                f"making the tiny base model, once: sampled accuracy {accuracy:.2f}, stops at {goal}"),
            [task[i] for i in range(len(task))]))


def that_fit(cfg: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, examples: list[Example], side: str,
        console: Console) -> list[Example]:
    """The examples whose prompt leaves room for a reply; the others are counted and the first one is named."""
    context = context_of(policy.lm)
    limit = cfg.sampling.max_prompt_tokens or (context - cfg.sampling.max_new_tokens if context else None)
    if not examples:
        raise UserError(f"the task has no {side} prompts")
    lengths = [len(encode(tokenizer, e.prompt)) for e in examples]
    limit = max(lengths) if limit is None else limit
    if long := [(n, e) for n, e in zip(lengths, examples, strict=True) if not 0 < n <= limit]:
        tokens, first = long[0]
        what = f"{len(long)} of {len(examples)} {side} prompts are empty or longer than {limit} tokens"
        what += f", the first with {tokens}: {str(first.prompt)[:60]!r}"
        if len(long) == len(examples):
            raise UserError(f"{what}; none is left: raise sampling.max_prompt_tokens, or lower sampling.max_new_tokens")
        console.print(f"[yellow]note:[/] dropped: {escape(what)}")
    return [e for n, e in zip(lengths, examples, strict=True) if 0 < n <= limit]
