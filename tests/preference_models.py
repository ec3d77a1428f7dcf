"""Reward models and judges of a few thousand weights, as directories. A helper, not a test."""

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

from rlkl.supervised.scratch import character_tokenizer, write

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "llama": (LlamaConfig, SIZES | {"num_key_value_heads": 2, "bos_token_id": None}),
    "qwen2": (Qwen2Config, SIZES | {"num_key_value_heads": 2, "bos_token_id": None}),
    "gpt2": (GPT2Config, GPT2_SIZES | {"bos_token_id": None}),
    "bert": (BertConfig, SIZES),
}


def classifier(
    folder: Path,
    kind: str = "llama",
    labels: tuple[str, ...] = ("score",),
    pad_is_eos: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A directory of AutoModelForSequenceClassification; every weight is large enough to matter."""
    tokenizer = tokenizer or character_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    config_class, options = CONFIGS[kind]
    config = config_class(vocab_size=len(tokenizer), **options)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    lm = AutoModelForSequenceClassification.from_config(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lm.parameters():
            noise = 0.3 * torch.randn(p.shape, generator=rng)
            p.copy_(noise if p.dim() > 1 else p + noise)  # norms stay around 1
    return write(folder, lm, tokenizer)


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; white space has none."""
    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def judge_of(folder: Path, liked: str = "!", strength: float = 2.0) -> Path:
    """A causal LM that sees only its last token.

    After `liked` the tokens y and Y have the logit `strength`, after any other n and N have it.
    """
    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    yes = tokenizer.convert_tokens_to_ids(["y", "Y"])
    no = tokenizer.convert_tokens_to_ids(["n", "N"])
    with torch.no_grad():
        # Attention and MLP add nothing, so a state is the normalised embedding of its own token.
        for p in lm.parameters():
            if p.dim() > 1:
                p.zero_()
        embedding = lm.get_input_embeddings().weight
        embedding[:, 1] = 1.0
        embedding[tokenizer.convert_tokens_to_ids(liked)] = torch.eye(16)[0]
        logit = strength / 4  # the norm of a state is √16
        lm.lm_head.weight[yes, 0] = logit
        lm.lm_head.weight[no, 1] = logit
    return write(folder, lm, tokenizer)
