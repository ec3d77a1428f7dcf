"""Tokens and memory of one training step. Only the model's config is read, no weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlkl.errors import UserError, first_line
from rlkl.explain.activations import Group, group_activations
from rlkl.logprobs import LOGITS_BUDGET
from rlkl.logprobs.tiled import tile_for
from rlkl.plugins import resolve
from rlkl.policy import lora
from rlkl.policy.attention import unsupported
from rlkl.policy.model import check_folder
from rlkl.rollout import SAMPLERS
from rlkl.rollout.engine import capacity_bucket, default_slots, halved
from rlkl.rollout.graphs import KEEP_SHARE
from rlkl.rollout.sampling import encode
from rlkl.run.algorithm import reads_old_logprobs
from rlkl.run.schema import Config, Lora
from rlkl.supervised import scratch
from rlkl.tasks import TASKS

# (M, V) float32 tensors alive at the peak of the plain log-prob; twice as many with an exact KL
LOGITS_HELD = 6
# tiles alive at the peak of the tiled log-prob: without and with an exact KL
TILES_HELD = (4, 6)
MAX_PROMPTS = 1000  # prompts looked at for the longest one
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class Tokens(NamedTuple):
    """Upper bounds of one step: tokens that are sampled, and tokens that pass through a model."""

    prompt: int  # of the longest prompt
    sampled: int
    scored: int  # forward only, by the reference and by pi_old
    learned: int  # forward and backward, all epochs


class Memory(NamedTuple):
    """Bytes on the device by purpose; `host` is memory of the CPU."""

    weights: int
    reference: int
    masters: int  # float32 copies of bf16 weights
    moments: int  # AdamW's two
    kv_cache: int
    sampling_logits: int  # with their probabilities and sums, and a float32 unembedding
    gradients: int
    activations: int  # saved for the backward pass, and one more layer that is being computed
    logits: int
    host: int

    @property
    def resident(self) -> int:
        return self.weights + self.reference + self.masters + self.moments

    @property
    def sampling(self) -> int:
        return self.kv_cache + self.sampling_logits

    @property
    def learning(self) -> int:
        """The larger of the forward pass's end and the optimizer step.

        In the step, masters have gradients of their own width.
        """
        step = 2 * self.gradients if self.masters else self.gradients
        return max(self.gradients + self.activations + self.logits, step)

    @property
    def peak(self) -> int:
        return self.resident + max(self.sampling, self.learning)


def architecture(cfg: Config) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's config and tokenizer. UserError where they cannot be read."""
    if cfg.model.name == "tiny":
        tokenizer = scratch.character_tokenizer()
        return scratch.architecture(tokenizer), tokenizer
    check_folder(cfg.model.name)
    base, *_ = lora.chain_of(cfg.model.name)
    try:
        return AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(cfg.model.name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.name={cfg.model.name!r}: neither a folder nor a hub name whose config can be "
            f"read: {first_line(error)}"
        ) from error


# ------------------------------------------------------------------ tokens


def tokens(
    cfg: Config, config: Any, tokenizer: PreTrainedTokenizerBase, task: Any = None
) -> Tokens:
    """The tokens of a step in which every prompt and every response is as long as it may be.

    config: of the model.
    """
    task = resolve(cfg.task, TASKS, "task")("train") if task is None else task
    count = min(len(task), MAX_PROMPTS)
    longest = max(len(encode(tokenizer, task[i].prompt, cfg.chat)) for i in range(count))
    longest = min(longest, cfg.sampling.max_prompt_tokens or longest)
    rows = cfg.sampling.rows
    prompts_read = cfg.sampling.prompts if shares_prompts(config) else rows
    read = prompts_read * longest + rows * cfg.sampling.max_new_tokens
    greedy = cfg.sampling.prompts if cfg.sampling.baseline != "none" else 0
    resamples = cfg.sampling.zero_variance == "resample"
    rounds = 1 + (cfg.sampling.resample_rounds if resamples else 0)
    return Tokens(
        prompt=longest,
        sampled=rounds * (rows + greedy) * cfg.sampling.max_new_tokens,
        scored=((cfg.model.reference is not False) + reads_old_logprobs(cfg)) * read,
        learned=cfg.optim.epochs * read,
    )


# ------------------------------------------------------------------ memory


def memory(cfg: Config, config: Any, longest: int, width: int, exact: bool, cuda: bool) -> Memory:
    """The memory plan of a run.

    config: of the model. longest: tokens of a prompt. width: bytes per weight, 2 for bfloat16
    with float32 masters, 4 or 8. exact: the KL is over the whole vocabulary.
    """
    text = config.get_text_config()
    length = longest + cfg.sampling.max_new_tokens
    wide = max(width, 4)  # of what is never bf16
    count = parameters(config, cfg.lora)
    critic_network = count.backbone if cfg.critic.kind == "network" else 0
    critic_head = text.hidden_size + 1 if cfg.critic.kind != "none" else 0  # float32 at least
    trained = (count.trained + critic_network) * width + critic_head * wide
    masters = master_bytes(cfg, count.trained + critic_network, critic_head, width)
    moments = 2 * (count.trained + critic_network + critic_head) * wide
    offload = cfg.optim.offload
    # With LoRA it is the policy without its adapter.
    has_reference = cfg.model.reference is not False and not cfg.lora.r
    sampled_rows, sampled_length = cache_size(cfg, length, cuda)
    shared_prompts = shares_prompts(config)
    groups, group = largest_microbatch(cfg, longest, shared_prompts)
    response_tokens = groups * group.samples * group.response
    return Memory(
        weights=(count.policy + critic_network) * width + critic_head * wide,
        reference=count.policy * width if has_reference else 0,
        masters=0 if offload else masters,
        moments=0 if offload else moments,
        kv_cache=sampled_rows * sampled_length * kv_bytes_per_token(text, width),
        sampling_logits=sampling_logits_bytes(text, sampled_rows, width, cuda),
        gradients=trained,
        activations=groups * activations(cfg, config, group, DTYPES[width], shared_prompts),
        logits=logits(cfg, response_tokens, text.vocab_size, wide, exact, cuda),
        host=masters + moments if offload else 0,
    )


def master_bytes(cfg: Config, trained: int, critic_head: int, width: int) -> int:
    """Bytes of the optimizer's own copies of the trained weights.

    On the device only bf16 weights have them, and the critic's head is never bf16. Offloaded, all
    weights have them.
    """
    if cfg.optim.offload:
        return (trained + critic_head) * max(width, 4)
    return 4 * trained if width == 2 else 0


def kv_bytes_per_token(text: Any, width: int) -> int:
    """Keys and values of one token, in all layers."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size * width


def sampling_logits_bytes(text: Any, rows: int, width: int, cuda: bool) -> int:
    """What picking a token from the logits takes: two (B, V) tensors, and two of float64.

    A CPU multiplies bf16 hidden states by a float32 copy of the unembedding.
    """
    per_row = 2 * max(width, 4) + 16
    copy = 4 * text.hidden_size if width == 2 and not cuda else 0
    return (per_row * rows + copy) * text.vocab_size


def cache_size(cfg: Config, length: int, cuda: bool) -> tuple[int, int]:
    """Responses that hold keys and values at once, and for how many tokens each has room.

    All responses, or as many as the backend has slots. An evaluation samples no more rows at once
    than a rollout, but all samples of a prompt together. length: of prompt and response, in tokens.
    """
    rows = max(cfg.sampling.rows, cfg.eval.samples)
    sampler = resolve(cfg.sampling.backend, SAMPLERS, "sampling.backend")
    options = signature(sampler).parameters
    if "slots" not in options:
        return rows, length
    slots = options["slots"].default or default_slots("cuda" if cuda else "cpu")
    if cuda:  # CUDA graphs need sizes that stay the same
        return halved(slots, rows), capacity_bucket(length)
    return min(rows, slots), length


class Count(NamedTuple):
    """Numbers of parameters."""

    policy: int  # with the adapter
    backbone: int  # of the policy, without the adapter
    trained: int


def parameters(config: Any, adapter: Lora) -> Count:
    """Count the parameters of a model of this config, without allocating them."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        backbone = sum(p.numel() for p in lm.base_model.parameters())
        if adapter.r:
            lora.adapt(lm, **asdict(adapter))
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    return Count(sum(p.numel() for p in lm.parameters()), backbone, trained)


def shares_prompts(config: Any) -> bool:
    """Whether a model of this config reads each prompt once for all of its responses."""
    with torch.device("meta"):
        return unsupported(AutoModelForCausalLM.from_config(config).base_model) is None


def largest_microbatch(cfg: Config, longest: int, shared_prompts: bool) -> tuple[int, Group]:
    """How many groups of responses a full micro-batch holds, and one of them.

    longest: tokens of a prompt. A group is all samples of a prompt, or as many as fit; where
    prompts are not shared it is a single row.
    """
    response = cfg.sampling.max_new_tokens
    most_groups, samples = cfg.sampling.rows, 1
    if shared_prompts:
        fitting = (cfg.optim.micro_tokens - longest) // response
        most_groups, samples = cfg.sampling.prompts, min(max(fitting, 1), cfg.sampling.group_size)
    groups = cfg.optim.micro_tokens // (longest + samples * response)
    return min(max(groups, 1), most_groups), Group(longest, response, samples)


def activations(
    cfg: Config, config: Any, group: Group, dtype: torch.dtype, shared_prompts: bool
) -> int:
    """Bytes that a group keeps in the policy's backbone and in the critic's network."""
    layers = config.get_text_config().num_hidden_layers
    adapters = [cfg.lora, Lora()] if cfg.critic.kind == "network" else [cfg.lora]
    computed = 2 if cfg.model.gradient_checkpointing else layers + 1
    total = 0.0
    for adapter in adapters:
        kept = group_activations(config, dtype, adapter, group, shared_prompts)
        total += layers * kept.input + kept.rest + kept.inside * computed
    return int(total)


def logits(cfg: Config, tokens: int, vocabulary: int, width: int, exact: bool, cuda: bool) -> int:
    """Bytes of logits while one pass through the head is learned from.

    All logits at once where they are few, else tiles. tokens: of responses in a micro-batch.
    """
    rows = min(tokens, cfg.optim.head_tokens or tokens)
    policies = 2 if exact else 1
    full = policies * rows * vocabulary * width
    in_tiles = width_of(cfg, cuda) == 2 and not cuda  # as logprobs.choose_backend decides
    fits = rows * vocabulary * 4 <= LOGITS_BUDGET and not in_tiles
    if (cfg.model.logprobs == "auto" and fits) or cfg.model.logprobs == "reference":
        return LOGITS_HELD * full
    tile = tile_for(rows, vocabulary, width, cuda)
    saved = full if cfg.optim.head_tokens else min(int(cfg.model.keep_logits_gb * 1e9), full)
    return TILES_HELD[exact] * tile.rows * tile.columns * width + saved


def width_of(cfg: Config, cuda: bool) -> int:
    """Bytes per weight."""
    return {"float32": 4, "bfloat16": 2, "float64": 8, "auto": 2 if cuda else 4}[cfg.model.dtype]


# ------------------------------------------------------------------ what is printed


def memory_lines(plan: Memory) -> Iterator[tuple[str, dict[str, float]]]:
    """Lines as templates, each with its numbers in GB, rounded to three digits."""
    totals = {name: getattr(plan, name) for name in ("resident", "sampling", "learning", "peak")}
    numbers = {
        f"{name}_gb": float(f"{x / 1e9:.3g}") for name, x in (plan._asdict() | totals).items()
    }
    lines = [
        "memory    {resident_gb} GB: weights {weights_gb}, reference {reference_gb}, "
        "float32 masters {masters_gb}, Adam moments {moments_gb}",
        "sampling  {sampling_gb} more: KV cache {kv_cache_gb}, logits {sampling_logits_gb}",
        "learning  {learning_gb} more: gradients {gradients_gb}, activations {activations_gb}, "
        "logits {logits_gb}",
    ]
    if plan.host:
        lines.append("host      {host_gb} GB of the CPU's memory: float32 masters and Adam moments")
    lines.append("peak      {peak_gb} GB")
    for line in lines:
        yield line, {name: x for name, x in numbers.items() if f"{{{name}}}" in line}


def plan(cfg: Config, exact: bool, device: torch.device, task: Any) -> list[str]:
    """The memory plan of a run on this device in lines, and what to change if it does not fit.

    Raises UserError where the model's config, or a prompt, cannot be read.
    """
    try:
        config, tokenizer = architecture(cfg)
        cuda = device.type == "cuda"
        longest = tokens(cfg, config, tokenizer, task).prompt

        def plan_of(changed: Config) -> Memory:
            return memory(changed, config, longest, width_of(changed, cuda), exact, cuda)

        needed = plan_of(cfg)
        limit = available(device)
        lines = [
            line.format(**{name: f"{x:g}" for name, x in numbers.items()})
            for line, numbers in memory_lines(needed)
        ]
        lines[-1] += f" of {limit / 1e9:.3g} on {device}"
        kept = KEEP_SHARE * limit if cuda else 0  # between rollouts, for graphs
        if needed.peak > limit - kept:
            peaks = {name: plan_of(changed).peak for name, changed in remedies(cfg, longest)}
            smaller = [
                f"{name}: {peak / 1e9:.3g}" for name, peak in peaks.items() if peak < needed.peak
            ]
            lines.append("will not fit. GB with " + ", ".join(smaller))
    except UserError:  # what the run needs too: it would stop a moment later
        raise
    except Exception as error:  # an estimate must not stop a run
        return [f"memory    not estimated: {first_line(error)}"]
    return lines


def remedies(cfg: Config, longest: int) -> Iterator[tuple[str, Config]]:
    """(name, configuration) of changes that save memory.

    Four leave the rollout as it is, alone and together. The last one halves the prompts.
    """
    half = max(cfg.sampling.prompts // 2, 1)
    one_row = longest + cfg.sampling.max_new_tokens
    micro_tokens = min(cfg.optim.micro_tokens, max(one_row, cfg.optim.micro_tokens // 4))
    lora = replace(cfg.lora, r=cfg.lora.r or 16)
    model = replace(cfg.model, gradient_checkpointing=True)
    offload = replace(cfg.optim, offload=True)
    micro = replace(cfg.optim, micro_tokens=micro_tokens)
    together = replace(offload, micro_tokens=micro_tokens)
    yield "lora.r=16", replace(cfg, lora=lora)
    yield "model.gradient_checkpointing=true", replace(cfg, model=model)
    yield "optim.offload=true", replace(cfg, optim=offload)
    yield f"optim.micro_tokens={micro_tokens}", replace(cfg, optim=micro)
    yield "these together", replace(cfg, lora=lora, model=model, optim=together)
    sampling = replace(cfg.sampling, prompts=half)
    fewer = replace(cfg, sampling=sampling, optim=replace(cfg.optim, minibatch=None))
    yield f"sampling.prompts={half}", fewer


def available(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
