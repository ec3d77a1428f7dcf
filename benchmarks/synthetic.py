"""Models with random weights, prompts and a reward, for benchmarks that need no download."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-=*?.,"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
QWEN2_5 = {  # hidden size, layers, heads, heads of keys, MLP size
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
}
# Scores differ within a group, so that every response is learned from.
REWARD = """
def share(examples, responses, batch):
    even = (batch.response_ids % 2 == 0) & batch.mask
    return even.sum(1) / batch.mask.sum(1), {}
"""


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, ffn: int) -> dict:
    """Options of Qwen2Config."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def qwen2_5(size: str, vocabulary: int | None = None) -> dict:
    """Options of Qwen2Config for the shape of a Qwen2.5: "0.5B", "1.5B", "3B" or "7B".

    vocabulary: by default its own.
    """
    own_vocabulary = 152_064 if size == "7B" else 151_936
    hidden, layers, heads, kv_heads, ffn = QWEN2_5[size]
    options = qwen2(hidden, layers, heads, kv_heads, vocabulary or own_vocabulary, ffn)
    return options | {"tie_word_embeddings": size != "7B"}


def character_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer of characters, with as many names that no text has as `tokens` asks for."""
    names = [*SPECIAL, *CHARACTERS]
    names += [f"<extra{i}>" for i in range(tokens - len(names))]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def save_random_model(
    folder: Path, config: dict, dtype: str, tokens: int, end: float = 0.0
) -> PreTrainedTokenizerFast:
    """Save a model and its tokenizer, the same ones each time. Returns the tokenizer.

    config: options of Qwen2Config. tokens: of the tokenizer; the model's vocabulary may be larger.
    end: the chance of each sampled token to be the EOS. With 0 it is that of any other token.
    """
    tokenizer = character_tokenizer(tokens)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = Qwen2ForCausalLM(Qwen2Config(**config | ids, dtype=dtype)).to(getattr(torch, dtype))
        if end:
            end_with_chance(lm, end)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def end_with_chance(lm: Any, chance: float) -> None:
    """Give the EOS this chance at each token, whatever was read before.

    A random model gives each token nearly the same chance. Here all embeddings have the same last
    feature, which the residual stream carries to the unembedding. There the row of the EOS reads
    more of it than the others. The EOS itself is never read.
    """
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    embedding[:, -1] = head[:, -1] = 1.0
    ids = torch.randint(len(SPECIAL), len(head), (8, 64), device=head.device)
    feature = lm.base_model(input_ids=ids).last_hidden_state[..., -1].float().mean()
    eos, others = lm.config.eos_token_id, len(head) - 1
    head[eos] = 0.0
    head[eos, -1] = 1.0 + math.log(others * chance / (1 - chance)) / feature


def random_digits(count: int, shortest: int, longest: int) -> list[str]:
    """`count` texts of digits, of lengths between the two: one token a digit."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=rng).tolist()
    return [digits(length, rng) for length in lengths]


def digits(length: int, rng: torch.Generator) -> str:
    return "".join(str(d) for d in torch.randint(0, 10, (length,), generator=rng).tolist())


def task_options(folder: Path, prompts: Sequence[str]) -> list[str]:
    """Write prompts and reward into a folder. Returns the options of a run that reads them."""
    (folder / "share.py").write_text(REWARD)
    rows = [json.dumps({"prompt": text, "answer": "0"}) for text in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return [
        "task.name=jsonl",
        f"task.path={folder}/prompts.jsonl",
        f"reward.name={folder}/share.py:share",
    ]
