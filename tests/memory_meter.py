"""Counts bytes of tensors. A helper, not a test."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of the storages created under this mode: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = {id(x.untyped_storage()) for x in inputs}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if id(storage) not in self.alive and id(storage) not in given:
                    self.alive[id(storage)] = weakref.finalize(
                        storage, self.freed, id(storage), storage.nbytes()
                    )
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return result

    def freed(self, key: int, nbytes: int) -> None:
        del self.alive[key]
        self.now -= nbytes
