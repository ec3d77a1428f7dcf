"""The embedded default model: a causal LM of about 1M parameters, supervised on the spot until it half knows its task.

It is saved as an ordinary Hugging Face directory and then loaded by name, like any other model.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from rlkl.errors import UserError
from rlkl.losses import token_weights
from rlkl.model import Policy, encode, left_pad
from rlkl.tasks.addition import Addition
from rlkl.types import Batch, Example

GOAL = 0.25  # sampled accuracy at which supervision stops: enough replies earn a reward …
ROOM = 0.68  # … if greedy accuracy is not above this: knowledge is missing, not only confidence
ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"


def cached_base(progress: Callable[[float, float], None], seed: int = 0) -> Path:
    """The directory of the base model, made if it is missing; `progress(accuracy, goal)` is called while it is made."""
    cache = Path(os.environ.get("RLKL_CACHE", Path.home() / ".cache" / "rlkl"))
    sources = b"".join(Path(inspect.getfile(x)).read_bytes() for x in (cached_base, Addition))
    recipe = hashlib.sha256(sources).hexdigest()[:8]  # another recipe or task is another model
    folder = cache / f"tiny-{recipe}-{seed}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix="making-"))
        except OSError as error:
            raise UserError(
                f"the tiny base model cannot be written to {cache} ({error.strerror}): set RLKL_CACHE to another folder"
            ) from error
        make_base(scratch, progress, seed)
        if not folder.is_dir():  # another process may have been faster
            scratch.rename(folder)
    return folder


def make_base(folder: Path, progress: Callable[[float, float], None], seed: int = 0) -> None:
    """Supervise a fresh model on the train split until its sampled accuracy reaches GOAL, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = character_tokenizer()
        lm = AutoModelForCausalLM.from_config(architecture(tokenizer))
        supervise(Policy(lm), tokenizer, progress)
    hf_logging.disable_progress_bar()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def supervise(policy: Policy, tokenizer: PreTrainedTokenizerFast, progress: Callable[[float, float], None]) -> None:
    """Cross-entropy on the answers; every 10 steps the probability of the right answer to other prompts is measured."""
    task, optimizer = Addition("train"), torch.optim.AdamW(policy.parameters(), lr=1.5e-3, weight_decay=0.0, fused=True)
    for step in range(2000):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50)
        batch = supervised_batch(tokenizer, [task[i] for i in torch.randint(len(task), (128,)).tolist()])
        logprobs = policy.evaluate(batch).logprobs
        if step % 10 == 0:
            with torch.no_grad():
                fresh = supervised_batch(tokenizer, [task[i] for i in torch.randint(len(task), (512,)).tolist()])
                accuracy = policy.evaluate(fresh).logprobs.sum(1).exp().mean().item()  # expected, without sampling
                best = policy.logits(policy.states(fresh)).argmax(-1)
            progress(accuracy, GOAL)
            greedy = ((best == fresh.response_ids) | ~fresh.mask).all(1).float().mean().item()
            if accuracy >= GOAL and greedy <= ROOM:
                return
        (token_weights(batch.mask, "token", 0) * -logprobs).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise UserError(f"the tiny base model did not reach a sampled accuracy of {GOAL}; try another seed")


def supervised_batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """Prompts and their answers, EOS included, in the shape of a rollout."""
    prompt_ids, prompt_mask = left_pad([encode(tokenizer, e.prompt) for e in examples], tokenizer.pad_token_id)
    answers = [[*encode(tokenizer, e.answer), tokenizer.eos_token_id] for e in examples]
    width = max(len(a) for a in answers)
    ids = torch.tensor([a + [tokenizer.pad_token_id] * (width - len(a)) for a in answers])
    mask = torch.tensor([[True] * len(a) + [False] * (width - len(a)) for a in answers])
    return Batch(prompt_ids, prompt_mask, ids, mask, torch.zeros(ids.shape), torch.zeros(len(ids), dtype=torch.bool))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character; no files, no download."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False)
