"""Save and restore a run: a Hugging Face directory, the critic, the optimizer and the state.

A checkpoint is written under another name and renamed when it is complete, so a folder
checkpoints/step-… is never half a checkpoint. Policy, tokenizer and optimizer are known here only
by their methods to save and load.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlkl.errors import UserError, first_line


def save(
    run: Path, step: int, policy: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]
) -> Path:
    """Write what a run needs to continue after `step` steps, and return the checkpoint's folder.

    Raises UserError where it cannot be written; earlier checkpoints stay.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    if folder.exists():  # the same step has the same state
        return folder
    for unfinished in folder.parent.glob(".step-*"):  # from a crash
        shutil.rmtree(unfinished)
    scratch = folder.with_name(f".{folder.name}")
    try:
        policy.lm.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if policy.critic is not None:
            save_file(policy.critic.state_dict(), scratch / "critic.safetensors")
        torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
        (scratch / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.rename(scratch, folder)
    # On a full disk torch raises RuntimeError, and safetensors its own error.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"the checkpoint {folder} cannot be written: {first_line(error)}; is the disk full?"
        ) from error
    return folder


def restore(folder: Path, policy: Any, optimizer: Any) -> dict[str, Any]:
    """Load the critic and the optimizer of a checkpoint, bit for bit, and return its state.

    policy: already loaded from this folder.
    """
    if policy.critic is not None:
        policy.critic.load_state_dict(load_file(folder / "critic.safetensors"))
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def newest(run: Path) -> Path | None:
    """The folder of the run's latest checkpoint; None if there is none yet."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` ones and that of the step `best`."""
    for folder in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if best is None or folder.name != f"step-{best:06d}":
            shutil.rmtree(folder)
