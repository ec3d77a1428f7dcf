"""LoRA (Hu et al. 2022, arXiv:2106.09685) through PEFT: W x + alpha/r · B A x.

A (r, in) and B (out, r) are trained, W is frozen. The adapter layers are put into the model in
place, so backbone, unembedding and config stay where they were. With the adapter switched off the
model computes what it computed before, on the same tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlkl.errors import UserError

# PEFT's own format: its files, and the prefix of every parameter name.
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapt(
    lm: Any,
    *,
    r: int,
    alpha: float,
    target_modules: str | list[str],
    modules_to_save: list[str],
    seed: int = 0,
) -> None:
    """Put a fresh adapter into `lm`, in place, and freeze all other weights.

    target_modules: layers that get an adapter, a list, a regular expression, or "all-linear".
    modules_to_save: layers that are trained in full. seed: of A. B starts at 0, so the model's
    output does not change yet. Raises UserError on layers that do not exist, and if the
    unembedding would be trained.
    """
    peft = import_peft(f"lora.r={r}")
    check_layers(lm, target_modules, modules_to_save)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        modules_to_save=modules_to_save or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=lm.config.model_type == "gpt2",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            lm.add_adapter(config)
        except (ValueError, re.error) as error:
            choices = ", ".join(linear_layers(lm))
            raise UserError(
                f"lora.target_modules={target_modules!r}: no layer matches; choose all-linear, or "
                f"a list from {choices}"
            ) from error
    if any(p.requires_grad for p in lm.get_output_embeddings().parameters()):
        raise UserError(
            "lora: the unembedding must stay frozen; leave it out of lora.target_modules and "
            "lora.modules_to_save"
        )


def check_layers(lm: Any, target_modules: str | list[str], modules_to_save: list[str]) -> None:
    """UserError on the first name that no layer ends with. PEFT ignores a wrong name in a list."""
    targets = target_modules if isinstance(target_modules, list) else []
    layers = [name for name, _ in lm.named_modules()]
    for option, names in (("target_modules", targets), ("modules_to_save", modules_to_save)):
        for name in names:
            if not any(layer.endswith(name) for layer in layers):
                choices = ", ".join(linear_layers(lm))
                raise UserError(
                    f"lora.{option}: no layer is named {name!r}; the linear layers are {choices}"
                )


def linear_layers(lm: Any) -> list[str]:
    """The names of the layers that all-linear stands for."""
    modules = lm.base_model.named_modules()
    linear = {name for name, module in modules if isinstance(module, nn.Linear | Conv1D)}
    return sorted({name.rpartition(".")[2] for name in linear})


def import_peft(needed_by: str) -> Any:
    """The PEFT library. UserError naming the extra if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{needed_by} needs PEFT: pip install 'rlkl[lora]'") from error
    return peft


def adapted(lm: nn.Module) -> bool:
    """Whether `lm` has an adapter."""
    return bool(getattr(lm, "peft_config", None))


@contextmanager
def switched_off(lm: Any) -> Iterator[None]:
    """Within this context the adapter has no effect."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [m for m in lm.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:  # one by one: lm.enable_adapters() forgets modules_to_save
            layer.enable_adapters(True)


class Unadapted:
    """The backbone without the adapter, as a function without gradients."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.config = lm.config
        self.dtype = lm.dtype

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        with switched_off(self.lm):
            return self.lm.base_model(**inputs)


def restore(lm: Any, folder: Path) -> None:
    """Load the adapter of a checkpoint, bit for bit, into a model that was adapted the same way."""
    saved = load_file(folder / WEIGHTS)
    weights = {name.removeprefix(PREFIX): x for name, x in saved.items()}
    import_peft("an adapter").set_peft_model_state_dict(lm, weights)


def chain_of(name: str) -> list[str]:
    """The base model, then the adapters on it in the order in which they are merged.

    A name that is no folder in PEFT's format stands for itself.
    """
    if not (Path(name) / CONFIG).is_file():
        return [name]
    peft = import_peft(f"model.name={name!r}, an adapter,")
    base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    return [*chain_of(base), name]


def merged(lm: Any, folder: str) -> Any:
    """`lm` with the adapter in `folder` merged in: an ordinary model with W + alpha/r · B A.

    lm: the base model of that adapter.
    """
    peft = import_peft("an adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        model = peft.PeftModel.from_pretrained(lm, folder).merge_and_unload()
    model.name_or_path = folder  # the base that an adapter of this model will name
    return model.requires_grad_(True)  # PEFT froze it
