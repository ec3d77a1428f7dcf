"""What a step takes: tokens, and bytes by what they are for. No weight is loaded, only the model's config."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlkl import tiny
from rlkl.algorithm import reads_old
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.logprobs import LOGITS_BUDGET
from rlkl.model import encode, first_line
from rlkl.schema import Config
from rlkl.tasks import TASKS
from rlkl.tiles import tile_for

LOGITS_HELD = 6  # (M, V) float32 tensors that the plain log-prob holds at its peak; twice as many with an exact KL
TILES_HELD = 4, 6  # a tile's products and what is made of them at the peak; with an exact KL
PROMPTS = 1000  # looked at for the longest


class Tokens(NamedTuple):
    """Of one step, at most: what is sampled, and what passes through a model."""

    prompt: int  # longest prompt
    sampled: int
    scored: int  # by the reference and pi_old, forward only
    learned: int  # forward and backward, all epochs


class Memory(NamedTuple):
    """Bytes. Activations come on top: they grow with optim.micro_tokens."""

    weights: int
    reference: int
    gradients: int
    optimizer: int  # AdamW's two moments, and float32 masters of bf16 weights
    kv_cache: int
    logits: int


def architecture(cfg: Config) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's config and tokenizer. UserError if they are not here."""
    if cfg.model.name == "tiny":
        tokenizer = tiny.character_tokenizer()
        return tiny.architecture(tokenizer), tokenizer
    try:
        return AutoConfig.from_pretrained(cfg.model.name), AutoTokenizer.from_pretrained(cfg.model.name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name={cfg.model.name!r}: its config cannot be read: {first_line(error)}") from error


def tokens(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """With the longest of the task's first prompts, and every reply as long as it may be."""
    task = resolve(cfg.task, TASKS, "task")("train")
    lengths = [len(encode(tokenizer, task[i].prompt)) for i in range(min(len(task), PROMPTS))]
    longest = min(max(lengths), cfg.sampling.max_prompt_tokens or max(lengths))
    rows = cfg.sampling.prompts * cfg.sampling.group_size
    greedy = cfg.sampling.prompts * (cfg.sampling.baseline != "none")
    whole = rows * (longest + cfg.sampling.max_new_tokens)
    passes = cfg.model.reference + reads_old(cfg)
    return Tokens(longest, (rows + greedy) * cfg.sampling.max_new_tokens, passes * whole, cfg.optim.epochs * whole)


def memory(cfg: Config, config: Any, longest: int, width: int, exact: bool, cuda: bool) -> Memory:
    """`width`: bytes per weight, 2 for bfloat16 with float32 masters, 4, or 8. `longest`: tokens of a prompt. `exact`:
    the KL is over the whole vocabulary."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    policy, backbone = (sum(p.numel() for p in m.parameters()) for m in (lm, lm.base_model))
    critic = {"none": 0, "head": text.hidden_size + 1, "network": backbone + text.hidden_size + 1}[cfg.model.critic]
    trained, rows = policy + critic, cfg.sampling.prompts * cfg.sampling.group_size
    moments = 2 * max(width, 4) + (4 if width == 2 else 0)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    length = longest + cfg.sampling.max_new_tokens
    replied = min(cfg.optim.micro_tokens, rows * length) * cfg.sampling.max_new_tokens // length
    return Memory(
        trained * width, policy * width * cfg.model.reference, trained * width, trained * moments,
        2 * text.num_hidden_layers * heads * head * width * rows * length,
        logits(cfg, replied, text.vocab_size, max(width, 4), exact, cuda))


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
