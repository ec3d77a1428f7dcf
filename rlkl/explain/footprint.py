"""What a step takes: tokens, and bytes by what they are for. No weight is loaded, only the model's config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlkl import lora, scratch
from rlkl.algorithm import reads_old
from rlkl.config import resolve
from rlkl.errors import UserError, first_line
from rlkl.explain.activations import kept
from rlkl.logprobs import LOGITS_BUDGET
from rlkl.model import encode
from rlkl.rollout import SAMPLERS
from rlkl.rollout.engine import slots_on
from rlkl.schema import Config, Lora
from rlkl.tasks import TASKS
from rlkl.tiles import tile_for

LOGITS_HELD = 6  # (M, V) float32 tensors that the plain log-prob holds at its peak; twice as many with an exact KL
TILES_HELD = 4, 6  # a tile's products and what is made of them at the peak; with an exact KL
PROMPTS = 1000  # looked at for the longest
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class Tokens(NamedTuple):
    """Of one step, at most: what is sampled, and what passes through a model."""

    prompt: int  # longest prompt
    sampled: int
    scored: int  # by the reference and pi_old, forward only
    learned: int  # forward and backward, all epochs


class Memory(NamedTuple):
    """Bytes on the device, by what they are for; `host`: beside it, in the CPU's memory."""

    weights: int
    reference: int
    masters: int  # float32, of bf16 weights
    moments: int  # AdamW's two
    kv_cache: int
    choices: int  # while a token is sampled: logits, probabilities, their sums, a float32 copy of the unembedding
    gradients: int
    activations: int  # kept for the backward pass, and one layer more that is at work
    logits: int
    host: int

    @property
    def resident(self) -> int:
        return self.weights + self.reference + self.masters + self.moments

    @property
    def sampling(self) -> int:
        return self.kv_cache + self.choices

    @property
    def learning(self) -> int:
        """At the end of a forward pass, or in the step, where masters get gradients of their own width."""
        step = 2 * self.gradients if self.masters else self.gradients
        return max(self.gradients + self.activations + self.logits, step)

    @property
    def peak(self) -> int:
        return self.resident + max(self.sampling, self.learning)


def architecture(cfg: Config) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's config and tokenizer. UserError if they are not here."""
    if cfg.model.name == "tiny":
        tokenizer = scratch.character_tokenizer()
        return scratch.architecture(tokenizer), tokenizer
    try:
        return AutoConfig.from_pretrained(cfg.model.name), AutoTokenizer.from_pretrained(cfg.model.name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name={cfg.model.name!r}: its config cannot be read: {first_line(error)}") from error


def tokens(cfg: Config, tokenizer: PreTrainedTokenizerBase, task: Any = None) -> Tokens:
    """With the longest of the task's first prompts, and every reply as long as it may be."""
    task = resolve(cfg.task, TASKS, "task")("train") if task is None else task
    lengths = [len(encode(tokenizer, task[i].prompt)) for i in range(min(len(task), PROMPTS))]
    longest = min(max(lengths), cfg.sampling.max_prompt_tokens or max(lengths))
    rows = cfg.sampling.rows
    greedy = cfg.sampling.prompts * (cfg.sampling.baseline != "none")
    whole = rows * (longest + cfg.sampling.max_new_tokens)
    passes = cfg.model.reference + reads_old(cfg)
    rounds = 1 + cfg.sampling.refills * (cfg.sampling.unanimous == "refill")
    sampled = rounds * (rows + greedy) * cfg.sampling.max_new_tokens
    return Tokens(longest, sampled, passes * whole, cfg.optim.epochs * whole)


def memory(cfg: Config, config: Any, longest: int, width: int, exact: bool, cuda: bool) -> Memory:
    """`width`: bytes per weight, 2 for bfloat16 with float32 masters, 4, or 8. `longest`: tokens of a prompt. `exact`:
    the KL is over the whole vocabulary."""
    text, wide = config.get_text_config(), max(width, 4)
    count = parameters(config, cfg.lora)
    network = count.backbone * (cfg.model.critic == "network")
    value = (text.hidden_size + 1) * (cfg.model.critic != "none")  # the critic's head, never narrow
    trained = (count.trained + network) * width + value * wide
    masters = 4 * (count.trained + network) * (width == 2) + 4 * value * (width == 2 and cfg.optim.offload)
    masters += trained * (width > 2 and cfg.optim.offload)  # copies of weights that are wide enough themselves
    moments = 2 * (count.trained + network + value) * wide
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows, length = cfg.sampling.rows, longest + cfg.sampling.max_new_tokens
    most = max(rows, cfg.eval.samples)  # held out, at most a rollout at once, but a prompt's replies together
    sampled = at_once(cfg, most, cuda)
    replied = min(cfg.optim.micro_tokens, rows * length) * cfg.sampling.max_new_tokens // length
    away = cfg.optim.offload
    return Memory(
        weights=(count.policy + network) * width + value * wide,
        reference=count.policy * width * (cfg.model.reference and not cfg.lora.r),
        masters=0 if away else masters, moments=0 if away else moments, host=masters + moments if away else 0,
        kv_cache=2 * text.num_hidden_layers * heads * head * width * sampled * length,
        choices=((2 * wide + 16) * sampled + 4 * text.hidden_size * (width == 2 and not cuda)) * text.vocab_size,
        gradients=trained,
        activations=activations(cfg, config, length, DTYPES[width]),
        logits=logits(cfg, replied, text.vocab_size, wide, exact, cuda))


def at_once(cfg: Config, rows: int, cuda: bool) -> int:
    """Replies that hold keys and values at the same time: all of them, or as many as the backend has slots."""
    options = signature(resolve(cfg.sampling.backend, SAMPLERS, "sampling.backend")).parameters
    if "slots" not in options:
        return rows
    return min(rows, options["slots"].default or slots_on("cuda" if cuda else "cpu"))


class Count(NamedTuple):
    """Parameters."""

    policy: int  # the adapter's too
    backbone: int  # of it, before any adapter
    trained: int


def parameters(config: Any, adapter: Lora) -> Count:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        backbone = sum(p.numel() for p in lm.base_model.parameters())
        if adapter.r:
            lora.adapt(lm, **asdict(adapter))
    sizes = [(p.numel(), p.requires_grad) for p in lm.parameters()]
    return Count(sum(n for n, _ in sizes), backbone, sum(n for n, trained in sizes if trained))


def activations(cfg: Config, config: Any, length: int, dtype: torch.dtype) -> int:
    """Of the largest micro-batch, in the policy's trunk and in that of a critic network."""
    layers = config.get_text_config().num_hidden_layers
    rows = min(max(cfg.optim.micro_tokens // length, 1), cfg.sampling.rows)
    trunks = [cfg.lora, Lora()] if cfg.model.critic == "network" else [cfg.lora]
    total = 0.0
    for adapter in trunks:
        row = kept(config, dtype, adapter, length)
        total += layers * row.entry + row.rest + row.inside * (2 if cfg.model.checkpointing else layers + 1)
    return int(rows * total)


def logits(cfg: Config, replied: int, vocabulary: int, width: int, exact: bool, cuda: bool) -> int:
    """Bytes of logits while one pass through the head is learned from: all of them, or tiles if they are too many."""
    rows, kinds = min(replied, cfg.optim.head_tokens or replied), 2 if exact else 1
    all_fit = cfg.model.logprobs == "auto" and rows * vocabulary * 4 <= LOGITS_BUDGET
    if all_fit or cfg.model.logprobs == "reference":
        return LOGITS_HELD * kinds * rows * vocabulary * width
    tile = tile_for(rows, vocabulary, width, cuda)
    all_of_them = kinds * rows * vocabulary * width
    kept = all_of_them if cfg.optim.head_tokens else min(int(cfg.model.keep_logits_gb * 1e9), all_of_them)
    return TILES_HELD[exact] * tile.rows * tile.columns * width + kept


def width_of(cfg: Config, cuda: bool) -> int:
    return {"float32": 4, "bfloat16": 2, "float64": 8, "auto": 2 if cuda else 4}[cfg.model.dtype]


def described(found: Memory) -> Iterator[tuple[str, dict[str, float]]]:
    """Lines as templates, and the numbers in them, in GB."""
    numbers = found._asdict() | {name: getattr(found, name) for name in ("resident", "sampling", "learning", "peak")}
    lines = ["memory    {resident_gb} GB: weights {weights_gb}, reference {reference_gb}, masters {masters_gb}, "
             "moments {moments_gb}",
             "sampling  {sampling_gb} more: KV cache {kv_cache_gb}, logits {choices_gb}",
             "learning  {learning_gb} more: gradients {gradients_gb}, activations {activations_gb}, logits {logits_gb}"]
    lines += ["host      {host_gb} GB of the CPU's memory: masters and moments"] * bool(found.host)
    for line in [*lines, "peak      {peak_gb} GB"]:
        yield line, {f"{n}_gb": float(f"{x / 1e9:.3g}") for n, x in numbers.items() if f"{{{n}_gb}}" in line}


def plan(cfg: Config, exact: bool, device: torch.device, task: Any) -> list[str]:
    """What `described` says of a run on this device, and what to change if it does not fit."""
    try:
        config, tokenizer = architecture(cfg)
        longest, cuda = tokens(cfg, tokenizer, task).prompt, device.type == "cuda"

        def of(changed: Config) -> Memory:
            return memory(changed, config, longest, width_of(changed, cuda), exact, cuda)

        found, room = of(cfg), available(device)
        lines = [line.format(**{n: f"{x:g}" for n, x in numbers.items()}) for line, numbers in described(found)]
        lines[-1] += f" of {room / 1e9:.3g} on {device}"
        if found.peak > room:
            peaks = {name: of(changed).peak for name, changed in remedies(cfg, longest)}
            lines.append("will not fit. GB with " + ", ".join(
                f"{name}: {peak / 1e9:.3g}" for name, peak in peaks.items() if peak < found.peak))
    except Exception as error:  # an estimate stops no run: what is wrong is said where it is needed
        return [f"memory    not estimated: {first_line(error)}"]
    return lines


def remedies(cfg: Config, longest: int) -> Iterator[tuple[str, Config]]:
    """What takes less memory: each change alone, then all of those that leave the rollout as it is."""
    o, half = cfg.optim, max(cfg.sampling.prompts // 2, 1)
    micro = min(o.micro_tokens, max(longest + cfg.sampling.max_new_tokens, o.micro_tokens // 4))
    lora = replace(cfg.lora, r=cfg.lora.r or 16)
    model = replace(cfg.model, checkpointing=True)
    yield "lora.r=16", replace(cfg, lora=lora)
    yield "model.checkpointing=true", replace(cfg, model=model)
    yield "optim.offload=true", replace(cfg, optim=replace(o, offload=True))
    yield f"optim.micro_tokens={micro}", replace(cfg, optim=replace(o, micro_tokens=micro))
    yield "these together", replace(cfg, lora=lora, model=model, optim=replace(o, offload=True, micro_tokens=micro))
    sampling = replace(cfg.sampling, prompts=half)
    yield f"sampling.prompts={half}", replace(cfg, sampling=sampling, optim=replace(o, minibatch=None))


def available(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
