"""A model that has learned nothing yet: a small Llama with one token a character, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as hf_logging

from rlkl.schema_supervised import Scratch
from rlkl.tiny import character_tokenizer


def make_scratch(folder: Path, size: Scratch, seed: int) -> Path:
    """Fresh weights, the same ones for the same seed; they are then loaded by name, like any other model."""
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=size.context, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config)
    hf_logging.disable_progress_bar()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
