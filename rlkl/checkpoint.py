"""Save and resume: an HF directory, the optimizer and a small state, written aside and renamed: never half there.

Knows policy, tokenizer and optimizer only by their methods to save and load.
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

from rlkl.errors import UserError


def save(run: Path, step: int, policy: Any, tokenizer: Any, optimizer: Any, state: dict[str, Any]) -> Path:
    """Write what a run needs to go on after `step` steps. The folder appears only once it is complete.

    UserError where it cannot be written: those that are there stay.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    if folder.exists():  # the same step is the same state
        return folder
    for stale in folder.parent.glob(".step-*"):  # left by a crash
        shutil.rmtree(stale)
    scratch = folder.with_name(f".{folder.name}")
    try:
        policy.lm.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if policy.critic is not None:
            save_file(policy.critic.state_dict(), scratch / "critic.safetensors")
        torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
        (scratch / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        os.rename(scratch, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk torch and safetensors have their own
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"the checkpoint {folder} cannot be written: {str(error).splitlines()[0]}; is the disk full?"
                        ) from error
    return folder


def restore(folder: Path, policy: Any, optimizer: Any) -> dict[str, Any]:
    """The critic and the optimizer of a checkpoint, bit for bit, into a policy loaded from it; returns its state."""
    if policy.critic is not None:
        policy.critic.load_state_dict(load_file(folder / "critic.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def newest(run: Path) -> Path | None:
    """The latest checkpoint of a run, None if there is none yet."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for folder in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if best is None or folder.name != f"step-{best:06d}":
            shutil.rmtree(folder)
