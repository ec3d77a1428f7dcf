"""AdamW with float32 masters, gradients clipped group by group, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn


class Optimizer:
    """Steps named parameter groups apart: neither's gradient norm scales the other's step.

    A bf16 parameter has a float32 master that takes the step and is copied back in place: at RL learning rates Adam on
    bf16 keeps 1–7 % of the displacement. Sampler and trainer read the same tensors, which never move in memory.
    With `offload` all masters and moments are on the CPU, and so is the step: gradients go there, weights come back.
    """

    def __init__(self, groups: dict[str, list[nn.Parameter]], lrs: dict[str, float], *, betas: tuple[float, float],
            weight_decay: float, max_grad_norm: float, offload: bool = False) -> None:
        self.groups, self.lrs, self.max_grad_norm = groups, lrs, max_grad_norm
        self.masters = {name: [master_of(p, offload) for p in params] for name, params in groups.items()}
        both = ((p, m) for name in groups for p, m in zip(groups[name], self.masters[name], strict=True))
        self.narrow = [(p, master) for p, master in both if p is not master]
        self.adamw = torch.optim.AdamW([{"params": self.masters[name], "lr": lrs[name]} for name in groups],
            betas=betas, weight_decay=weight_decay, fused=True)

    def step(self, lr_scale: float, loss: float = 0.0, frozen: Collection[str] = ()) -> dict[str, float]:
        """Clip, step, zero. Returns each group's gradient norm before clipping; empty if one of them or the loss is not
        finite: then nothing has moved.
        """
        for p in (p for name in frozen for p in self.groups[name]):
            p.grad = None  # AdamW passes over it: no step, no decay, no momentum
        trained = {name: params for name, params in self.groups.items() if name not in frozen}
        norms = {name: nn.utils.clip_grad_norm_(ps, self.max_grad_norm).item() for name, ps in trained.items()}
        finite = all(math.isfinite(x) for x in (loss, *norms.values()))
        if finite:
            for group, name in zip(self.adamw.param_groups, self.groups, strict=True):
                group["lr"] = self.lrs[name] * lr_scale
            self._through_masters()
        self.zero()
        return norms if finite else {}

    def _through_masters(self) -> None:
        for p, master in self.narrow:
            master.grad, p.grad = None if p.grad is None else p.grad.to(master), None  # one of them at a time
        self.adamw.step()
        with torch.no_grad():
            for p, master in self.narrow:
                p.copy_(master)
                master.grad = None

    def zero(self) -> None:
        for p in (p for params in self.groups.values() for p in params):
            p.grad = None

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(),
            "masters": {name: [m.detach() for m in ms] for name, ms in self.masters.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for name, saved in state["masters"].items():
                for p, master, value in zip(self.groups[name], self.masters[name], saved, strict=True):
                    master.copy_(value)
                    p.copy_(value)


def master_of(p: nn.Parameter, offload: bool = False) -> nn.Parameter:
    """The parameter itself, or a copy: in float32 where its own dtype is narrower, and on the CPU with `offload`."""
    wide = torch.promote_types(p.dtype, torch.float32)
    if wide == p.dtype and not offload:
        return p
    return nn.Parameter(p.detach().to("cpu" if offload else p.device, wide, copy=True))


def lr_scale(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The factor on every learning rate at `step`: a linear rise over `warmup` steps, then the schedule down to 0."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    left = (steps - step) / steps
    return rise * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]
