"""What every arm starts from, made once.

The base model, preference pairs of its responses, labelled by the gold score, and a reward model
that is learned from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.question.bag_of_words import accuracy, counts, fit
from benchmarks.question.grammar import LETTER, PROMPT, Grammar
from rlkl.cli import label, sft
from rlkl.cli.label import generate_responses
from rlkl.policy.model import load
from rlkl.supervised.preferences import read_pairs
from rlkl.supervised.schema import LabelSampling

FOLDER = Path("runs/question")
BASE = FOLDER / "base" / "model"
PAIRS = FOLDER / "pairs.jsonl"
REWARD = FOLDER / "reward.json"
HELD_OUT = 500  # pairs


def prepare() -> dict:
    """Make what is missing of base, pairs and reward model. Returns the reward model."""
    if not BASE.is_dir():
        shutil.rmtree(BASE.parent, ignore_errors=True)  # left by a run that was stopped
        fresh(FOLDER / "fresh")
        sft.main(["configs/question-sft.yaml"])
    if not PAIRS.exists():
        label.main(["configs/question-label.yaml"])
    if not REWARD.exists():
        REWARD.write_text(json.dumps(reward_model(), indent=1), encoding="utf-8")
    return json.loads(REWARD.read_text(encoding="utf-8"))


def fresh(folder: Path, seed: int = 0) -> None:
    """Write a Llama of 2 layers and 48 dimensions, one token per word, as a Hugging Face folder."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", PROMPT, *LETTER])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=PROMPT))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=144,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reward_model() -> dict:
    """The reward model, learned from the pairs.

    Its mean and standard deviation are those of fresh responses of the base.
    """
    pairs = read_pairs(str(PAIRS))
    words = fit(pairs[:-HELD_OUT])
    policy, tokenizer = load(str(BASE))
    sampling = LabelSampling(samples=1, max_new_tokens=24)
    examples = Grammar("train", size=2048).examples
    responses = []
    for _, texts, _ in generate_responses(policy, tokenizer, examples, sampling, seed=1):
        responses += texts
    scores = counts(responses, list(words)) @ torch.tensor(list(words.values()))
    return {
        "words": words,
        "mean": scores.mean().item(),
        "std": scores.std().item(),
        "pairs": len(pairs) - HELD_OUT,
        "heldout_accuracy": accuracy(words, pairs[-HELD_OUT:]),
    }


if __name__ == "__main__":
    print(json.dumps(prepare(), indent=1))
