"""Reward models and judges of a few thousand weights, in the ordinary formats. A helper, not a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlkl.scratch import character_tokenizer, write

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}
KINDS = {
    "llama": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, bos_token_id=None, **SIZES),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, num_key_value_heads=2, bos_token_id=None, **SIZES),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None),
    "bert": lambda v: BertConfig(vocab_size=v, **SIZES),
}


def classifier(folder: Path, kind: str = "llama", labels: tuple[str, ...] = ("score",), pad_is_eos: bool = False,
               tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A directory of AutoModelForSequenceClassification; every weight is large enough to matter."""
    tokenizer = tokenizer or character_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    config = KINDS[kind](len(tokenizer))
    config.num_labels, config.id2label = len(labels), dict(enumerate(labels))
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    lm = AutoModelForSequenceClassification.from_config(config).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g) + (0 if p.dim() > 1 else p))
    return write(folder, lm, tokenizer)


def words(*known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of another alphabet: whole words, and the white space between them."""
    vocabulary = {w: i for i, w in enumerate(["<end>", "<pad>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def judge_of(folder: Path, liked: str = "!", strength: float = 2.0, chat_template: str | None = None) -> Path:
    """A causal LM that sees its last token alone: after `liked` y and Y have the logit `strength`, else n and N."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = chat_template
    lm = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).eval()
    yes, no = ([tokenizer.convert_tokens_to_ids(c) for c in pair] for pair in ("yY", "nN"))
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() > 1:
                p.zero_()  # attention and MLP add nothing: a state is the normalised embedding of its own token
        embedding = lm.get_input_embeddings().weight
        embedding[:, 1] = 1.0
        embedding[tokenizer.convert_tokens_to_ids(liked)] = torch.eye(16)[0]
        lm.lm_head.weight[yes, 0] = lm.lm_head.weight[no, 1] = strength / 4  # the norm of a state is √16
    return write(folder, lm, tokenizer)
