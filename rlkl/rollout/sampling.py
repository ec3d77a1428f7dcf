"""From prompts to responses: text to token ids, one sampled token at a time, and back to text.

All randomness of a rollout is a (B, T) tensor of uniforms: the same uniforms give the same tokens.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlkl.errors import ChatError, first_line
from rlkl.types import Batch, Example, SamplingParams


class SamplingModels(Protocol):
    """What `generate` reads of `run.build.Models`."""

    policy: Any
    tokenizer: Any
    sampler: Callable[..., Batch]  # a rollout backend
    chat: Any  # ChatOptions | None: how the policy's chat prompts are built


class ChatOptions(Protocol):
    """What `encode` reads of the section `chat` of a configuration."""

    system: str | None
    template: dict[str, object]


def generate(
    models: SamplingModels, examples: Sequence[Example], uniforms: Tensor, params: SamplingParams
) -> Batch:
    """B responses to N prompts, B // N each: one row of uniforms (B, T) for each response.

    The backend runs in eval mode and without gradients, also if it is a plug-in. Raises ChatError
    where the tokenizer's chat template refuses a prompt.
    """
    prompts = [encode(models.tokenizer, example.prompt, models.chat) for example in examples]
    prompt_ids, prompt_mask = left_pad(prompts, params.pad_id, uniforms.device)
    with sampling_mode(models.policy):
        return models.sampler(models.policy, prompt_ids, prompt_mask, uniforms, params)


def draw_uniforms(
    rows: int, columns: int, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """(rows, columns) numbers in [0, 1).

    They are drawn on the CPU, so that every device samples from the same numbers.
    """
    uniforms = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return uniforms.to(device, widest_float(torch.device(device)))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# ------------------------------------------------------------------ text and token ids


def encode(tokenizer: Any, prompt: str | list[dict], chat: ChatOptions | None = None) -> list[int]:
    """Token ids: raw text as it is, chat messages through the tokenizer's template.

    chat: the policy's system message and the options of its template. A judge has a template of its
    own and is given none. Raises ChatError if the tokenizer has no template, if its template
    refuses the messages, and where an option of `chat` would be without effect.
    """
    system = chat.system if chat else None
    template = chat.template if chat else {}
    if isinstance(prompt, str):
        if system is not None or template:
            raise ChatError(
                "chat.system and chat.template are for prompts of chat messages, and this one is "
                f"text: {prompt[:60]!r}"
            )
        return tokenizer(prompt).input_ids
    messages = prompt if system is None else with_system(prompt, system)
    check_template_options(tokenizer, template)
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **template
        )
    except Exception as error:  # a template is a program and may refuse messages in any way
        if not getattr(tokenizer, "chat_template", None):
            raise ChatError(
                "the prompt is chat messages, and the model's tokenizer has no chat template: take "
                "a model that has one (an instruct model), or prompts of raw text, with "
                f"task.chat=false where the task has this option; it was {str(prompt)[:60]}"
            ) from error
        raise ChatError(
            "chat messages need a tokenizer with a chat template that accepts them: "
            f"{first_line(error)}; they were {str(messages)[:60]}"
        ) from error


def with_system(messages: list[dict], system: str) -> list[dict]:
    """The messages behind a system message. ChatError where they begin with one of their own."""
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        raise ChatError(
            f"chat.system={system[:60]!r}: the prompt begins with a system message of its own, "
            f"{str(first.get('content'))[:60]!r}: leave one of the two out"
        )
    return [{"role": "system", "content": system}, *messages]


def check_template_options(tokenizer: Any, options: dict[str, object]) -> None:
    """ChatError where the tokenizer's chat template does not read an option.

    A template ignores what it does not read, so a misspelt option would do nothing.
    """
    text = tokenizer.chat_template
    for name in options:
        if text and not re.search(rf"\b{re.escape(name)}\b", str(text)):
            raise ChatError(
                f"chat.template.{name}={options[name]!r}: the tokenizer's chat template does not "
                f"read {name!r}"
            )


def decode(tokenizer: Any, batch: Batch) -> list[str]:
    """The B responses as text, without special tokens."""
    rows = zip(batch.response_ids.cpu(), batch.mask.cpu(), strict=True)
    return [tokenizer.decode(ids[sampled], skip_special_tokens=True) for ids, sampled in rows]


def left_pad(
    prompts: list[list[int]], pad_id: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """N token lists → (N, P) ids and bool mask, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = [[pad_id] * (width - len(p)) + p for p in prompts]
    mask = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def right_pad(
    rows: Sequence[list[int]], pad_id: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """B token lists → (B, T) ids and bool mask, padded on the right."""
    width = max(len(row) for row in rows)
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device, dtype=torch.long), torch.tensor(mask, device=device)


# ------------------------------------------------------------------ one token at a time


@contextmanager
def sampling_mode(policy: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside. The mode is restored afterwards, also after an exception.

    no_grad and not inference_mode, whose tensors may not enter a graph.
    """
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.train(training)


def sample_responses(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
) -> Batch:
    """Sample token by token until every row has ended. Prompts are (B, P), uniforms (B, T).

    next_logits(ids, attended): the (B, V) logits of the token after (B, columns) ids.
    """
    ids, attended = prompt_ids, prompt_mask
    eos_ids = torch.tensor(params.eos_ids, device=ids.device, dtype=ids.dtype)
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    tokens, masks, logprobs = [], [], []
    for column_uniforms in uniforms.unbind(1):
        token, logprob = pick(next_logits(ids, attended), column_uniforms, params)
        token = torch.where(alive, token, params.pad_id)
        tokens.append(token)
        masks.append(alive)
        logprobs.append(logprob.masked_fill(~alive, 0.0))

        ids = torch.cat([ids, token[:, None]], 1)
        attended = torch.cat([attended, alive[:, None]], 1)
        # The EOS was sampled, so it is an action and inside the mask. Only what follows is not.
        alive = alive & ~torch.isin(token, eos_ids)
        if not alive.any():
            break
    batch = Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=torch.stack(tokens, 1),
        mask=torch.stack(masks, 1),
        sampler_logprobs=torch.stack(logprobs, 1),
        truncated=alive,
        temperature=params.temperature or 1.0,
    )
    return cut_at_stop(batch, params)


def pick(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample one token a row: (B, V) logits, (B,) uniforms → (B,) ids, (B,) log-probs in nats.

    The id is the first one whose cumulative probability is above the uniform. The log-probs are
    those of the distribution sampled from; greedy (temperature 0) reports those of temperature 1.
    """
    if params.vocab_size is not None:
        padding_rows = torch.arange(logits.shape[-1], device=logits.device) >= params.vocab_size
        logits = logits.masked_fill(padding_rows, -torch.inf)
    logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
    if params.temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        if params.top_k or params.top_p < 1 or params.min_p:
            logprobs = logprobs.masked_fill(~allowed_ids(logprobs, params), -torch.inf)
            logprobs = logprobs.log_softmax(-1)
        wide = widest_float(logprobs.device)
        cdf = logprobs.to(wide).exp().cumsum(-1)
        ids, _ = first_above(cdf, uniforms.to(wide) * cdf[:, -1])
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


def first_above(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The (B,) first index at which the (B, n) running sum is above the (B,) target.

    Rounding can put a target at the total or above. It is lowered to just below the total, so that
    the index has a probability above 0. The lowered target is returned too.
    """
    total = cdf[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)
    return index.clamp_max(cdf.shape[-1] - 1), target  # NaN logits: left to the loss to report


def allowed_ids(logprobs: Tensor, params: SamplingParams) -> Tensor:
    """(B, V) bool: the ids that top-k, top-p and min-p all keep. For evaluation only.

    The most likely id is always kept.
    """
    ordered, order = logprobs.sort(-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        keep[:, params.top_k :] = False
    probs = ordered.exp()
    mass_before = probs.cumsum(-1) - probs
    keep &= mass_before < params.top_p
    keep &= ordered >= ordered[:, :1] + torch.tensor(params.min_p).log()
    return torch.zeros_like(keep).scatter(-1, order, keep)


def cut_at_stop(batch: Batch, params: SamplingParams) -> Batch:
    """Cut each response after the token that completes its first stop string.

    Such a response is finished, not truncated, and the log-probs of what is left stay valid. For
    evaluation only: a policy cannot be trained to end like that. Without `params.stop` the batch
    is returned as it is.
    """
    stop = params.stop
    if stop is None:
        return batch
    lengths = batch.mask.sum(1)
    truncated = batch.truncated.clone()
    for row, ids in enumerate(batch.responses()):
        if stop(ids):
            lengths[row] = shortest_stop(ids, stop)
            truncated[row] = False
    columns = int(lengths.max())
    mask = torch.arange(columns, device=lengths.device) < lengths[:, None]
    return replace(
        batch,
        response_ids=torch.where(mask, batch.response_ids[:, :columns], params.pad_id),
        mask=mask,
        sampler_logprobs=batch.sampler_logprobs[:, :columns].masked_fill(~mask, 0.0),
        truncated=truncated,
    )


def shortest_stop(ids: list[int], stop: Callable[[list[int]], bool]) -> int:
    """The length of the shortest prefix that contains a stop string; `ids` contains one."""
    return bisect.bisect_left(range(len(ids)), True, key=lambda n: stop(ids[:n]))
