"""An untrained model: a small Llama with one token per character, as a Hugging Face directory."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from rlkl.supervised.schema import Scratch

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"
TINY = Scratch(layers=4)  # 0.9M parameters


def make_scratch(folder: Path, size: Scratch, seed: int) -> Path:
    """Write a model with fresh weights, the same ones for the same seed. Returns the folder."""
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(architecture(tokenizer, size))
    return write(folder, lm, tokenizer)


def write(folder: Path, lm: Any, tokenizer: Any) -> Path:
    """Save a model and its tokenizer as a Hugging Face directory. Returns the folder."""
    hf_logging.disable_progress_bar()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def architecture(tokenizer: Any, size: Scratch = TINY) -> LlamaConfig:
    """The configuration of a Llama of this size for this tokenizer."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character, built without a download."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
