"""The policy before and after training, side by side, from the same uniform random numbers.

Prompts are read from stdin, one a line, until Ctrl-D; with --prompt TEXT there is only that one.
Each prompt stands alone: earlier ones are not remembered. It goes through the tokenizer's chat
template where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from rlkl.cli.run_commands import (
    find_checkpoint,
    find_run,
    help_printed,
    load_policies,
    parse,
    saved_plugin,
)
from rlkl.cli.schema import Chat
from rlkl.errors import UserError
from rlkl.policy.model import context_of, sampling_params
from rlkl.policy.policy import Policy
from rlkl.rollout.sampling import decode, draw_uniforms, encode, generate
from rlkl.run import config
from rlkl.run.build import Models, build_sampler, pick_device
from rlkl.run.evaluate import stop_function
from rlkl.run.schema import Chat as ChatSection
from rlkl.run.schema import Config
from rlkl.run.seeds import generator
from rlkl.run.terminal import console, log_line
from rlkl.types import Batch, Example, SamplingParams

USAGE = "RUN [--prompt TEXT]"


class Response(NamedTuple):
    text: str
    tokens: int
    truncated: bool


def main(argv: list[str]) -> None:
    if help_printed(argv, "chat", USAGE, __doc__ or "", config.options(Chat)):
        return
    argv, only_prompt = take_prompt(argv)
    (path,), overrides = parse(argv, "chat", "RUN")
    run = find_run(path)
    options = config.load(overrides, schema=Chat)
    folder = find_checkpoint(run, options.step)
    cfg = replace(run.cfg, task=saved_plugin(run, run.cfg.task))
    tokenizer, before, after = load_policies(cfg, folder, pick_device(options.device))
    backend = saved_plugin(run, cfg.sampling.backend)
    sampler = build_sampler(backend)
    params = chat_params(options, cfg, after, tokenizer)
    max_new_tokens = options.max_new_tokens or cfg.sampling.max_new_tokens
    context = context_of(after.lm)

    prompts = typed_prompts() if only_prompt is None else [only_prompt]
    for number, prompt in enumerate(prompts):
        try:
            example = to_example(tokenizer, prompt, max_new_tokens, context, cfg.chat)
        except UserError as error:
            if only_prompt is not None:
                raise
            log_line(f"error: {error}")
            continue
        rng = generator(options.seed, number, "chat")
        uniforms = draw_uniforms(1, max_new_tokens, rng, after.lm.device)
        responses = []
        for policy in (before, after):
            models = Models(policy, tokenizer, sampler, params, chat=cfg.chat)
            responses.append(to_response(tokenizer, generate(models, [example], uniforms, params)))
        print_responses(prompt, f"before: {cfg.model.name}", f"after: {folder.name}", responses)


def take_prompt(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --prompt TEXT, and the text; None where it is not among them."""
    if "--prompt" not in argv:
        return argv, None
    at = argv.index("--prompt")
    if at + 1 == len(argv):
        raise UserError("--prompt needs a text: rlkl chat RUN --prompt TEXT")
    return [*argv[:at], *argv[at + 2 :]], argv[at + 1]


def typed_prompts() -> Iterator[str]:
    """The lines of stdin that are not empty, after a `>` where it is a terminal."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(sign).strip()
        except EOFError:
            return
        if line:
            yield line


def chat_params(options: Chat, cfg: Config, policy: Policy, tokenizer: Any) -> SamplingParams:
    """Sample as the run's rollouts do, unless an option differs, and stop at its eval.stop."""
    temperature = options.temperature
    if temperature is None:
        temperature = cfg.sampling.temperature
    params = sampling_params(policy, tokenizer, temperature)
    return params._replace(stop=stop_function(tokenizer, cfg.eval.stop))


def to_example(
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    context: int | None,
    chat: ChatSection | None = None,
) -> Example:
    """A prompt as an Example: a user message where the tokenizer has a chat template.

    context: the model's, in tokens; None where it is not known. chat: the run's, if it has chat
    prompts. Raises UserError on an empty prompt, and on one that leaves no room for a response.
    """
    example = Example([{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt)
    ids = encode(tokenizer, example.prompt, chat)
    if not ids:
        raise UserError("the prompt is empty")
    if context is not None and len(ids) + max_new_tokens > context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, a response up to {max_new_tokens}, the model's "
            f"context {context}: shorten the prompt, or lower max_new_tokens"
        )
    return example


def to_response(tokenizer: Any, batch: Batch) -> Response:
    """The response in a batch of one row."""
    return Response(decode(tokenizer, batch)[0], int(batch.mask.sum()), bool(batch.truncated))


def print_responses(prompt: str, before: str, after: str, responses: list[Response]) -> None:
    """Print a table of two columns, titled `before` and `after`, as wide as the terminal."""
    table = Table(
        title=escape(prompt),
        title_justify="left",
        title_style="bold",
        show_footer=True,
        expand=True,
    )
    for title, response in zip((before, after), responses, strict=True):
        footer = f"{response.tokens} tokens"
        if response.truncated:
            footer += ", truncated"
        table.add_column(escape(title), escape(footer), ratio=1, overflow="fold")
    table.add_row(*(escape(response.text) for response in responses))
    console.print(table, soft_wrap=False)
