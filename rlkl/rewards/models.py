"""Reward models: any AutoModelForSequenceClassification directory reads prompt and reply and gives one number."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from rlkl.errors import UserError, first_line
from rlkl.model import context_of, encode
from rlkl.types import Batch, Example


class RewardModel(nn.Module):
    """Token lists → (B,) float32. A decoder is read at a row's last token, an encoder as it reads itself.

    Hugging Face's own rule, the last token that is not `pad_token_id`, passes over the EOS where pad = eos.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, column: int | None = None) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.column = lm, tokenizer, column
        head = getattr(lm, "score", None)  # what every decoder's classifier calls it; an encoder's is `classifier`
        self.head = head if isinstance(head, nn.Linear) else None

    @property
    def context(self) -> int | None:
        return context_of(self.lm)

    def forward(self, rows: Sequence[list[int]]) -> Tensor:
        lengths = torch.tensor([len(r) for r in rows], device=self.lm.device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r, device=self.lm.device) for r in rows], batch_first=True)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        if self.head is None:
            logits = self.lm(input_ids=ids, attention_mask=mask.long()).logits
        else:
            states = self.lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = states[torch.arange(len(ids), device=ids.device), lengths - 1].float()
            logits = F.linear(last, self.head.weight.float(), self.head.bias)  # in bf16 close replies would tie
        if self.column is None:
            return logits[:, 0].float()
        others = logits.float().clone()
        others[:, self.column] = -torch.inf
        return logits[:, self.column].float() - others.logsumexp(1)

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]], max_tokens: int) -> Tensor:
        """`forward` in micro-batches of at most `max_tokens` padded tokens, longest rows first."""
        scores = torch.zeros(len(rows), device=self.lm.device)
        order, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), 0
        while start < len(order):
            some = order[start : start + max(max_tokens // len(rows[order[start]]), 1)]
            scores[some] = self([rows[i] for i in some])
            start += len(some)
        return scores

    def read(self, prompt: str | list[dict], reply: str, finished: bool, sampled: list[int] | None = None) -> list[int]:
        """Prompt and reply as this model's tokens; what is too long loses its beginning.

        Chat messages: the whole conversation by its own template. Text: a decoder reads on, and the EOS if the reply is
        finished; an encoder reads two segments. `sampled`: the reply's own ids, taken as they are if they are its too.
        """
        tokenizer = self.tokenizer
        if isinstance(prompt, list) and tokenizer.chat_template:
            ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": reply}], return_dict=False)
        else:
            text = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)
            if self.head is None:
                ids = tokenizer(text, reply).input_ids
            elif sampled is not None and tokenizer.decode(sampled, skip_special_tokens=True) == reply:
                ids = encode(tokenizer, text) + sampled
            else:
                end = [tokenizer.eos_token_id] * (finished and tokenizer.eos_token_id is not None)
                ids = encode(tokenizer, text) + tokenizer(reply, add_special_tokens=False).input_ids + end
        return ids[-self.context :] if self.context else ids


def load_reward_model(name: str, key: str, *, label: str | None = None, fresh: bool = False) -> RewardModel:
    """A sequence classification directory or hub name. `fresh`: with a new head, to be trained; else it must have one.

    UserError on what is missing, on a classifier of several labels of which none is named, and on a model we misread.
    """
    hf_logging.disable_progress_bar()
    said, one = hf_logging.get_verbosity(), {"num_labels": 1} if fresh else {}
    hf_logging.set_verbosity_error()  # a fresh head is what was asked for
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        found: Any = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **one)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{key}={name!r}: not a sequence classification model with a tokenizer, as a directory or a "
                        f"hub name: {first_line(error)}") from error
    finally:
        hf_logging.set_verbosity(said)
    lm, report = found
    if report["missing_keys"] and not fresh:
        raise UserError(f"{key}={name!r}: no weights for {', '.join(sorted(report['missing_keys'])[:3])}: not a "
                        "trained reward model; rlkl reward-model makes one of it")
    names = {i: str(n) for i, n in lm.config.id2label.items()}
    if len(names) > 1 and label not in names.values():
        raise UserError(f"{key}={name!r} tells {len(names)} labels apart: its score is the log-odds of one of them, "
                        f"named by label: {', '.join(names.values())}")
    column = next(i for i, n in names.items() if n == label) if len(names) > 1 else None
    model = RewardModel(lm.eval(), tokenizer, column)
    if fresh:
        new_head(model, key, name)
    check_reproduced(model, key, name)
    return model


def new_head(model: RewardModel, key: str, name: str) -> None:
    """N(0, 1/(D+1)) as in Ziegler et al. 2019; and a pad id that is not the EOS, for Hugging Face's own rule."""
    tokenizer, lm = model.tokenizer, model.lm
    if model.head is None:
        return
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}={name!r}: its tokenizer has no EOS token, so no reply could ever end; set eos_token")
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=g) / (lm.config.hidden_size + 1) ** 0.5)
    pad = next(i for i in (tokenizer.pad_token_id, 0, 1) if i is not None and i != tokenizer.eos_token_id)
    lm.config.get_text_config().pad_token_id = pad


def check_reproduced(model: RewardModel, key: str, name: str) -> None:
    """Short rows beside longer ones, and each alone by the model itself; UserError if 1e-3 apart."""
    known = [i for i in range(len(model.tokenizer)) if i != model.lm.config.get_text_config().pad_token_id]
    rows = [[known[(i * 37 + 5) % len(known)] for i in range(n)] for n in (9, 4, 12)]
    with torch.no_grad():
        own = torch.stack([model.lm(input_ids=torch.tensor([r]).to(model.lm.device)).logits[0] for r in rows]).float()
        model.column, column = None, model.column
        gap = (model(rows) - own[:, 0]).abs().max().item()
        model.column = column
    if not gap <= 1e-3:
        raise UserError(f"{key}={name!r}: {model.lm.config.model_type} classifiers are not supported: our scores are "
                        f"{gap:.2g} off the model's own")


@functools.lru_cache(maxsize=4)
def loaded(path: str, label: str | None, device: torch.device) -> RewardModel:
    """Once a process; bfloat16 on cuda."""
    model = load_reward_model(path, "reward.path", label=label).requires_grad_(False)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def reward_model(examples: Sequence[Example], replies: Sequence[str], batch: Batch, *, path: str,
                 label: str | None = None, normalise: bool = True, micro_tokens: int = 16384
                 ) -> tuple[Tensor, dict[str, Tensor]]:
    """What a sequence classifier says of prompt and reply: a reward model of `rlkl reward-model`, or any other.

    normalise: minus the mean, over the standard deviation, of the reference's replies, where its config has them.
    label: the one whose log-odds are the score, where the classifier tells several apart.
    """
    model = loaded(path, label, batch.mask.device)
    rows = zip(examples, replies, batch.replies(), (~batch.truncated).tolist(), strict=True)
    scores = model.score([model.read(e.prompt, r, done, ids) for e, r, ids, done in rows], micro_tokens)
    mean, std = (getattr(model.lm.config, f"reward_{x}", None) for x in ("mean", "std"))
    return ((scores - mean) / std if normalise and mean is not None and std else scores), {}
