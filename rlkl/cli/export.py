"""A run's policy as an ordinary Hugging Face directory: weights with any adapter merged, tokenizer, generation config.

The generation config samples as training did: its temperature, the whole distribution, every id that ends a reply.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlkl import config
from rlkl.cli.finished import asked_for_help, checkpoint_of, find, parse
from rlkl.errors import UserError
from rlkl.model import export
from rlkl.schema_runs import Export
from rlkl.terminal import say


def main(argv: list[str]) -> None:
    """write a run's policy as an ordinary Hugging Face directory, an adapter merged"""
    if asked_for_help(argv, "export", "RUN OUT", __doc__ or "", config.options({}, Export)):
        return
    (path, out), changes = parse(argv, "export", "RUN OUT")
    run, how = find(path), config.load(changes, schema=Export)
    folder = checkpoint_of(run, how.step)
    if Path(out).exists():
        raise UserError(f"{out}: it exists, and nothing is ever overwritten: choose another, or delete it")
    try:
        export(str(folder), out, getattr(torch, how.dtype), run.cfg.sampling.temperature)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    size = sum(f.stat().st_size for f in Path(out).iterdir())
    say(f"{folder} → {out}: {how.dtype}, {size / 1e6:,.1f} MB")
    say(f"AutoModelForCausalLM.from_pretrained({out!r}, dtype='auto'), or model.name={out}")
