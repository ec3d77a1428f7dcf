"""The policy before and after training, side by side: one prompt at a time, the same uniforms for both.

Each prompt stands alone, without what was said before. It goes through the tokenizer's chat template, or is raw text
where there is none. Ctrl-D ends; piped lines are prompts too; --prompt TEXT is the only one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from rlkl import config
from rlkl.build import pick_device
from rlkl.cli.finished import asked_for_help, both, checkpoint_of, find, kept, parse
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.heldout import stops
from rlkl.model import Policy, context_of, decode, encode, left_pad, sampling_rule
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sample import draw_uniforms
from rlkl.schema import Config
from rlkl.schema_runs import Chat
from rlkl.seeds import generator
from rlkl.terminal import console, say
from rlkl.types import Batch, Sampling

NAMES = "RUN [--prompt TEXT]"


class Reply(NamedTuple):
    text: str
    tokens: int
    truncated: bool


def main(argv: list[str]) -> None:
    """talk to a run's policy before and after training, side by side"""
    if asked_for_help(argv, "chat", NAMES, __doc__ or "", config.options({}, Chat)):
        return
    argv, only = one_shot(argv)
    (path,), changes = parse(argv, "chat", "RUN")
    run, how = find(path), config.load(changes, schema=Chat)
    folder = checkpoint_of(run, how.step)
    own = replace(run.cfg, task=kept(run, run.cfg.task))
    tokenizer, *policies = both(own, folder, pick_device(how.device))
    sampler = resolve(kept(run, run.cfg.sampling.backend), SAMPLERS, "sampling.backend")
    rule = rule_of(how, run.cfg, policies[1], tokenizer)
    room, context = how.max_new_tokens or run.cfg.sampling.max_new_tokens, context_of(policies[1].lm)
    for number, text in enumerate([only] if only is not None else typed()):
        try:
            prompt = asked(tokenizer, text, room, context)
        except UserError as error:
            if only is not None:
                raise
            say(f"error: {error}")
            continue
        ids, mask = left_pad([prompt], rule.pad_id, policies[1].lm.device)
        uniforms = draw_uniforms(1, room, generator(how.seed, number, "chat"), ids.device)
        batches = (sampler(policy, ids, mask, uniforms, rule) for policy in policies)
        show(text, run.cfg.model.name, folder, [replied(tokenizer, batch) for batch in batches])


def one_shot(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --prompt TEXT, and the text."""
    if "--prompt" not in argv:
        return argv, None
    at = argv.index("--prompt")
    if at + 1 == len(argv):
        raise UserError("--prompt needs a text: rlkl chat RUN --prompt TEXT")
    return [*argv[:at], *argv[at + 2 :]], argv[at + 1]


def typed() -> Iterator[str]:
    """The lines of stdin, with a prompt sign on a terminal, until they end."""
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(sign).strip()
        except EOFError:
            return
        if line:
            yield line


def rule_of(how: Chat, cfg: Config, policy: Policy, tokenizer: Any) -> Sampling:
    temperature = cfg.sampling.temperature if how.temperature is None else how.temperature
    return sampling_rule(policy, tokenizer, temperature)._replace(stop=stops(tokenizer, cfg.eval.stop))


def asked(tokenizer: Any, text: str, room: int, context: int | None) -> list[int]:
    """The prompt's ids. UserError where it is empty, or leaves no room for a reply."""
    ids = encode(tokenizer, [{"role": "user", "content": text}] if tokenizer.chat_template else text)
    if not ids:
        raise UserError("the prompt is empty")
    if context is not None and len(ids) + room > context:
        raise UserError(f"the prompt has {len(ids)} tokens and a reply {room}, the model's context {context}: shorten "
                        "it, or lower max_new_tokens")
    return ids


def replied(tokenizer: Any, batch: Batch) -> Reply:
    """Of a batch of one row."""
    return Reply(decode(tokenizer, batch)[0], int(batch.mask.sum()), bool(batch.truncated))


def show(text: str, name: str, folder: Path, replies: list[Reply]) -> None:
    """Two columns, as wide as the terminal lets them be."""
    table = Table(title=escape(text), title_justify="left", title_style="bold", show_footer=True, expand=True)
    for title, reply in zip((f"before: {name}", f"after: {folder.name}"), replies, strict=True):
        cut = ", no more room" if reply.truncated else ""
        table.add_column(escape(title), escape(f"{reply.tokens} tokens{cut}"), ratio=1, overflow="fold")
    table.add_row(*(escape(reply.text) for reply in replies))
    console.print(table, soft_wrap=False)
