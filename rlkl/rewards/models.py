"""Reward models: a sequence classifier reads prompt and response, and its logit is the score.

Any directory or hub name of Hugging Face's AutoModelForSequenceClassification will do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from rlkl.errors import UserError, first_line
from rlkl.policy.microbatches import pack_by_tokens
from rlkl.policy.model import context_of
from rlkl.rollout.sampling import encode, right_pad
from rlkl.types import Batch, Example

TOLERANCE = 1e-3  # between our scores and the model's own

# ------------------------------------------------------------------ the reward


def reward_model(
    examples: Sequence[Example],
    responses: Sequence[str],
    batch: Batch,
    *,
    path: str,
    label: str | None = None,
    normalise: bool = True,
    micro_tokens: int = 16384,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) scores of a sequence classifier: a model of `rlkl reward-model`, or any other.

    path: a directory or a hub name.
    label: of a classifier with several labels, the one whose log-odds are the score.
    normalise: subtract the mean of the reference's rewards and divide by their standard deviation,
    if the model's config has them.
    micro_tokens: padded tokens per forward pass.
    """
    model = load_once(path, label, batch.mask.device)
    finished = (~batch.truncated).tolist()
    rows = [
        model.tokenize(example.prompt, response, ended, ids)
        for example, response, ended, ids in zip(
            examples, responses, finished, batch.responses(), strict=True
        )
    ]
    scores = model.score(rows, micro_tokens)
    mean = getattr(model.lm.config, "reward_mean", None)
    std = getattr(model.lm.config, "reward_std", None)
    if normalise and mean is not None and std:
        scores = (scores - mean) / std
    return scores, {}


@functools.lru_cache(maxsize=4)
def load_once(path: str, label: str | None, device: torch.device) -> RewardModel:
    """The reward model of a run, loaded once per process; bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_reward_model(path, "reward.path", label=label)
    return model.requires_grad_(False).to(device, dtype)


# ------------------------------------------------------------------ the model


class RewardModel(nn.Module):
    """A sequence classifier: token lists → (B,) float32 scores.

    A decoder is read at the last token of each row. Hugging Face reads it at the last token that is
    not pad_token_id, which is one before the EOS if pad = eos. An encoder is called as it is.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: Any, column: int | None = None) -> None:
        """column: the label whose log-odds are the score; None = the only logit is the score."""
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.column = column
        # `score` is the head of every decoder's classifier; that of an encoder is `classifier`.
        head = getattr(lm, "score", None)
        self.head = head if isinstance(head, nn.Linear) else None

    @property
    def context(self) -> int | None:
        """The longest text that the model takes, in tokens, if its config says so."""
        return context_of(self.lm)

    def forward(self, rows: Sequence[list[int]]) -> Tensor:
        """(B,) scores of B rows of token ids."""
        logits = self.logits(rows)
        if self.column is None:
            return logits[:, 0]
        others = logits.clone()
        others[:, self.column] = -torch.inf
        return logits[:, self.column] - others.logsumexp(1)

    def logits(self, rows: Sequence[list[int]]) -> Tensor:
        """(B, labels) float32 logits."""
        ids, mask = right_pad(rows, 0, self.lm.device)
        if self.head is None:
            return self.lm(input_ids=ids, attention_mask=mask.long()).logits.float()
        hidden = self.lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        row = torch.arange(len(ids), device=ids.device)
        last = hidden.last_hidden_state[row, mask.sum(1) - 1]
        # In float32: in bfloat16 responses with close scores would tie.
        return F.linear(last.float(), self.head.weight.float(), self.head.bias)

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]], max_tokens: int) -> Tensor:
        """`forward` without gradients, in micro-batches of at most `max_tokens` padded tokens."""
        scores = torch.zeros(len(rows), device=self.lm.device)
        for indices in pack_by_tokens([len(row) for row in rows], max_tokens):
            scores[indices] = self([rows[i] for i in indices])
        return scores

    def tokenize(
        self,
        prompt: str | list[dict],
        response: str,
        finished: bool,
        sampled_ids: list[int] | None = None,
    ) -> list[int]:
        """Prompt and response as this model's token ids. What is too long loses its beginning.

        Chat messages become one conversation by the model's own template. Of text, an encoder reads
        two segments; a decoder reads one, with the EOS at its end if the response is finished.
        sampled_ids: the response as the policy sampled it; a decoder takes it as it is, if it means
        the same text in this model's vocabulary.
        """
        if isinstance(prompt, list) and self.tokenizer.chat_template:
            conversation = [*prompt, {"role": "assistant", "content": response}]
            ids = self.tokenizer.apply_chat_template(conversation, return_dict=False)
        else:
            if isinstance(prompt, list):
                prompt = "\n".join(str(message.get("content", "")) for message in prompt)
            if self.head is None:
                ids = self.tokenizer(prompt, response).input_ids
            else:
                response_ids = self.response_ids(response, finished, sampled_ids)
                ids = encode(self.tokenizer, prompt) + response_ids
        return ids[-self.context :] if self.context else ids

    def response_ids(
        self, response: str, finished: bool, sampled_ids: list[int] | None
    ) -> list[int]:
        """A response as a decoder reads it: the sampled ids if they decode to it, else its text."""
        tokenizer = self.tokenizer
        if sampled_ids is not None:
            text = tokenizer.decode(sampled_ids, skip_special_tokens=True)
            if text == response:
                return sampled_ids
        ids = tokenizer(response, add_special_tokens=False).input_ids
        if finished and tokenizer.eos_token_id is not None:
            return [*ids, tokenizer.eos_token_id]
        return ids


# ------------------------------------------------------------------ loading


def load_reward_model(
    name: str, key: str, *, label: str | None = None, fresh: bool = False
) -> RewardModel:
    """A sequence classifier from a directory or a hub name.

    key: the option that names it, for error messages.
    label: of a classifier with several labels, the one whose log-odds are the score.
    fresh: give it a new head, which is then trained; else it must have a trained one.
    Raises UserError on missing files or weights, on several labels where none of them is named, and
    on a model whose own scores we do not reproduce.
    """
    tokenizer, lm, missing_keys = load_classifier(name, key, fresh)
    if missing_keys and not fresh:
        missing = ", ".join(sorted(missing_keys)[:3])
        raise UserError(
            f"{key}={name!r}: no weights for {missing}: not a trained reward model; rlkl "
            "reward-model makes one of it"
        )
    labels = {str(x): i for i, x in lm.config.id2label.items()}
    column = None
    if len(labels) > 1:
        if label not in labels:
            raise UserError(
                f"{key}={name!r} has {len(labels)} labels; the score is the log-odds of one of "
                f"them: set label to {', '.join(labels)}"
            )
        column = labels[label]
    model = RewardModel(lm.eval(), tokenizer, column)
    if fresh and model.head is not None:
        reset_head(model, model.head, f"{key}={name!r}")
    check_reproduced(model, f"{key}={name!r}")
    return model


def load_classifier(name: str, key: str, fresh: bool) -> tuple[Any, Any, set[str]]:
    """Tokenizer, classifier and the names of the weights that its files lack."""
    options: dict[str, Any] = {"num_labels": 1} if fresh else {}
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # no warning of the head that a fresh model does not have
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{key}={name!r}: not a sequence classification model with a tokenizer, as a directory "
            f"or a hub name: {first_line(error)}"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    lm, report = loaded
    return tokenizer, lm, report["missing_keys"]


def reset_head(model: RewardModel, head: nn.Linear, source: str) -> None:
    """Draw the head's weights from N(0, 1/(D+1)), as in Ziegler et al. 2019, from a fixed seed.

    The config gets a pad id other than the EOS, so that Hugging Face too reads the last token.
    source: the option and its value, for error messages. Raises UserError without an EOS token.
    """
    eos_id = model.tokenizer.eos_token_id
    if eos_id is None:
        raise UserError(
            f"{source}: its tokenizer has no EOS token, so no response could ever end; set "
            "eos_token"
        )
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(head.weight.shape, generator=rng)
    with torch.no_grad():
        head.weight.copy_(weight / (model.lm.config.hidden_size + 1) ** 0.5)
    candidates = (model.tokenizer.pad_token_id, 0, 1)
    pad_id = next(i for i in candidates if i is not None and i != eos_id)
    model.lm.config.get_text_config().pad_token_id = pad_id


@torch.no_grad()
def check_reproduced(model: RewardModel, source: str) -> None:
    """Compare our logits of a padded batch with the model's own of each row alone.

    Raises UserError where they are more than TOLERANCE apart.
    """
    pad_id = model.lm.config.get_text_config().pad_token_id
    ids = [i for i in range(len(model.tokenizer)) if i != pad_id]
    rows = [[ids[(i * 37 + 5) % len(ids)] for i in range(length)] for length in (9, 4, 12)]
    own = [model.lm(input_ids=torch.tensor([row]).to(model.lm.device)).logits[0] for row in rows]
    gap = (model.logits(rows) - torch.stack(own).float()).abs().max().item()
    if not gap <= TOLERANCE:
        raise UserError(
            f"{source}: {model.lm.config.model_type} classifiers are not supported: our scores are "
            f"{gap:.2g} off the model's own"
        )
