"""LoRA (Hu et al. 2022, arXiv:2106.09685) through PEFT: W x + alpha/r · B A x, with A (r, in) and B (out, r) trained.

The layers are put into the model in place, so that its trunk, unembedding and config are where they always are; what
the adapter is switched off for runs on the same tensors as before it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlkl.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT's own format
PREFIX = "base_model.model."  # of every name in it


def adapt(lm: PreTrainedModel, *, r: int, alpha: float, targets: str | list[str], full: list[str],
          seed: int = 0) -> None:
    """Put a fresh adapter into `lm`, in place; the layers of `full` are trained themselves, and all else is frozen.

    Nothing changes yet, since B = 0. UserError on layers that are not there.
    """
    peft = library(f"lora.r={r}")
    names = [name for name, _ in lm.named_modules()]
    if missing := [x for x in [*(targets if isinstance(targets, list) else []), *full]
                   if not any(name.endswith(x) for name in names)]:
        raise UserError(f"lora: no layer is named {missing[0]!r}; there is {', '.join(linear(lm))}, among others")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of A
        try:
            lm.add_adapter(peft.LoraConfig(
                r=r, lora_alpha=alpha, target_modules=targets, modules_to_save=full or None, lora_dropout=0.0,
                task_type="CAUSAL_LM", fan_in_fan_out=lm.config.model_type == "gpt2"))
        except (ValueError, re.error) as error:
            choice = f"choose all-linear, or a list from {', '.join(linear(lm))}"
            raise UserError(f"lora.targets={targets!r}: {choice}") from error
    if any(p.requires_grad for p in lm.get_output_embeddings().parameters()):
        raise UserError("lora: the unembedding stays frozen, leave it out of lora.targets and lora.full")


def linear(lm: PreTrainedModel) -> list[str]:
    """The names of the layers that all-linear stands for."""
    kinds = nn.Linear, Conv1D
    return sorted({name.rpartition(".")[2] for name, m in lm.base_model.named_modules() if isinstance(m, kinds)})


def library(what: str) -> Any:
    """PEFT. UserError naming the extra if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{what} needs PEFT: pip install 'rlkl[lora]'") from error
    return peft


def adapted(lm: nn.Module) -> bool:
    """Does it carry an adapter?"""
    return bool(getattr(lm, "peft_config", None))


@contextmanager
def switched_off(lm: PreTrainedModel) -> Iterator[None]:
    """The adapter out of the way, and back again afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [m for m in lm.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:  # one by one: lm.enable_adapters() forgets those of `full`
            layer.enable_adapters(True)


def unadapted(lm: PreTrainedModel) -> Callable[..., Any]:
    """The trunk as it was before the adapter."""

    @torch.no_grad()
    def trunk(**inputs: Any) -> Any:
        with switched_off(lm):
            return lm.base_model(**inputs)

    return trunk


def restore(lm: PreTrainedModel, folder: Path) -> None:
    """The adapter of a checkpoint, bit for bit, into a model that was adapted in the same way."""
    found = {name.removeprefix(PREFIX): x for name, x in load_file(folder / WEIGHTS).items()}
    library("an adapter").set_peft_model_state_dict(lm, found)


def chain_of(name: str) -> list[str]:
    """The model that a folder in PEFT's format adapts, and the folder; any other name stands for itself."""
    if not (Path(name) / CONFIG).is_file():
        return [name]
    settings = library(f"model.name={name!r}, an adapter,").PeftConfig.from_pretrained(name)
    return [*chain_of(settings.base_model_name_or_path), name]


def merged(lm: PreTrainedModel, folder: str) -> PreTrainedModel:
    """`lm`, the base of the adapter in `folder`, with W + alpha/r · B A for every W: an ordinary model again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        found = library("an adapter").PeftModel.from_pretrained(lm, folder).merge_and_unload()
    found.name_or_path = folder  # what an adapter of it will name as its base
    return found.requires_grad_(True)  # frozen while it was a base
