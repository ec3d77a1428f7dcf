"""A run's policy as an ordinary Hugging Face directory: weights, tokenizer, generation config.

A LoRA adapter is merged into the weights. The generation config samples as training did: its
temperature, the whole distribution, every id that ends a response.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlkl.cli.run_commands import find_checkpoint, find_run, help_printed, parse
from rlkl.cli.schema import Export
from rlkl.errors import UserError
from rlkl.policy.model import export
from rlkl.run import config
from rlkl.run.terminal import log_line


def main(argv: list[str]) -> None:
    if help_printed(argv, "export", "RUN OUT", __doc__ or "", config.options(Export)):
        return
    (path, out), overrides = parse(argv, "export", "RUN OUT")
    run = find_run(path)
    options = config.load(overrides, schema=Export)
    folder = find_checkpoint(run, options.step)
    if Path(out).exists():
        raise UserError(f"{out}: it exists and is never overwritten: choose another, or delete it")
    try:
        export(str(folder), out, getattr(torch, options.dtype), run.cfg.sampling.temperature)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    log_line(f"{folder} → {out}: {options.dtype}, {size / 1e6:,.1f} MB")
    log_line(f"AutoModelForCausalLM.from_pretrained({out!r}, dtype='auto'), or model.name={out}")
