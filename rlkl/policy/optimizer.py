"""AdamW with float32 master weights, gradients clipped group by group, and the lr schedule."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn


class Optimizer:
    """AdamW over named groups of parameters, each clipped by its own gradient norm.

    A bf16 parameter has a float32 master, which takes the step and is copied back in place: at RL
    learning rates, Adam on bf16 alone keeps 1–7 % of the displacement. Sampler and trainer read the
    same tensors, and these never move in memory.
    """

    def __init__(
        self,
        groups: dict[str, list[nn.Parameter]],
        lrs: dict[str, float],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        offload: bool = False,
    ) -> None:
        """groups: parameters by group name. lrs: learning rate by group name.

        offload: keep masters and moments on the CPU and step there; gradients are copied to the
        CPU and weights back.
        """
        self.groups = groups
        self.lrs = lrs
        self.max_grad_norm = max_grad_norm
        self.masters = {
            name: [master_of(p, offload) for p in params] for name, params in groups.items()
        }
        self.narrow = [  # the parameters that have a master of their own
            (p, master)
            for name, params in groups.items()
            for p, master in zip(params, self.masters[name], strict=True)
            if p is not master
        ]
        self.adamw = torch.optim.AdamW(
            [{"params": self.masters[name], "lr": lrs[name]} for name in groups],
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )

    def step(
        self, lr_scale: float, loss: float = 0.0, frozen: Collection[str] = ()
    ) -> dict[str, float]:
        """Clip, step, and drop the gradients. Returns each group's gradient norm before clipping.

        If a norm or the loss is not finite, nothing moves and the result is empty. frozen: names of
        groups that get no step, no weight decay and no momentum.
        """
        norms = {}
        for name, params in self.groups.items():
            if name in frozen:
                _drop_gradients(params)  # AdamW skips parameters without a gradient
            else:
                norms[name] = nn.utils.clip_grad_norm_(params, self.max_grad_norm).item()
        finite = all(math.isfinite(x) for x in (loss, *norms.values()))
        if finite:
            for group, name in zip(self.adamw.param_groups, self.groups, strict=True):
                group["lr"] = self.lrs[name] * lr_scale
            self._step_masters()
        self.zero()
        return norms if finite else {}

    def _step_masters(self) -> None:
        """One AdamW step on the masters, copied back into the parameters."""
        for p, master in self.narrow:
            master.grad = None if p.grad is None else p.grad.to(master)
            p.grad = None  # at once, so that only one gradient is held twice
        self.adamw.step()
        with torch.no_grad():
            for p, master in self.narrow:
                p.copy_(master)
                master.grad = None

    def zero(self) -> None:
        """Drop all gradients."""
        for params in self.groups.values():
            _drop_gradients(params)

    def state_dict(self) -> dict:
        """AdamW's state and the masters: all that a resumed run needs."""
        masters = {name: [m.detach() for m in ms] for name, ms in self.masters.items()}
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """Restore moments, masters and the parameters themselves, in place."""
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for name, saved in state["masters"].items():
                pairs = zip(self.groups[name], self.masters[name], strict=True)
                for (p, master), value in zip(pairs, saved, strict=True):
                    master.copy_(value)
                    p.copy_(value)


def master_of(p: nn.Parameter, offload: bool = False) -> nn.Parameter:
    """The parameter itself if it is float32 or wider, else a float32 copy.

    offload: always a copy, on the CPU.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    if wide == p.dtype and not offload:
        return p
    return nn.Parameter(p.detach().to("cpu" if offload else p.device, wide, copy=True))


def lr_scale(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The factor on every learning rate at `step`, counted from 0: warm-up times schedule.

    It rises linearly over `warmup` steps. linear and cosine fall to 0 at `steps`.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    remaining = (steps - step) / steps
    decay = {
        "constant": 1.0,
        "linear": remaining,
        "cosine": (1 - math.cos(math.pi * remaining)) / 2,
    }
    return rise * decay[schedule]


def _drop_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None
