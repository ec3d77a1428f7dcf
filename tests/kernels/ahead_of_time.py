"""The Triton kernels compiled for real GPUs without one: no register spilled, every access to a tile 16 bytes wide.

tests/test_kernels.py runs it in a process of its own: kernels that were read with TRITON_INTERPRET cannot be compiled.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlkl.kernels import logits, sampling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NUMBERS = {"scale", "softcap", "ref_scale", "ref_softcap", "inverse_temperature"}
WIDTHS = [16_384, 4480]  # a whole tile, and the last one of 151,936 columns
ARCHITECTURES = [(a, w) for a in (80, 90) for w in WIDTHS] + [(100, 4480), (120, 4480)]
# Registers of a thread with Triton 3.7.1, the most on any architecture, and 10 % more: (reference, bias and soft-cap).
MOST = {
    "accumulate_kernel": {(False, False): 44, (False, True): 53, (True, False): 62, (True, True): 80},
    "dlogits_kernel": {(False, False): 44, (False, True): 53, (True, False): 53, (True, True): 88},
    "inverse_cdf_kernel": {(False, False): 82},
}
every = pytest.mark.parametrize("options", [False, True], ids=["plain", "bias and soft-cap"])
either = pytest.mark.parametrize("reference", [False, True], ids=["no reference", "reference"])
targets = pytest.mark.parametrize(("architecture", "width"), ARCHITECTURES)


def compiled(kernel, architecture: int, constants: dict, options: dict, out: str = "*fp32"):
    """With the alignment that Triton finds at run time: tensors of 16 bytes, strides of multiples of 16."""
    names = {"IDS": "*i64", "OUT": out, "UNIFORMS": "*fp64"} | dict.fromkeys(NUMBERS, "fp32")
    names |= dict.fromkeys(constants, "constexpr")
    types = {a: names.get(a, "i32" if a.startswith("stride") else "*fp32") for a in kernel.arg_names}
    aligned = [i for i, (a, t) in enumerate(types.items()) if t.startswith("*") or a.startswith("stride")]
    source = ASTSource(fn=kernel, signature=types, constexprs=constants,
                       attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def check(kernel, architecture: int, constants: dict, options: dict, reference: bool, capped: bool, tmp_path: Path,
          out: str = "*fp32") -> str:
    """SASS, after what holds for both kernels."""
    found = compiled(kernel, architecture, constants, options, out).asm
    binary = found["cubin"]
    assert ("cvt.rn.bf16" in found["ptx"]) == (out == "*bf16")  # to nearest
    assert binary[:4] == b"\x7fELF"
    (tmp_path / "cubin").write_bytes(binary)
    usage, sass = (
        subprocess.run([TOOLS / "cuobjdump", f"--dump-{what}", tmp_path / "cubin"], stdout=subprocess.PIPE, text=True,
                       check=True).stdout for what in ("resource-usage", "sass"))
    registers, stack, local = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK", "LOCAL"))
    name = kernel.__name__
    assert (stack, local) == (0, 0)
    assert not re.search(r"\b(?:LDL|STL)\b", sass)
    if triton.__version__.startswith("3.7."):
        assert registers <= MOST[name][reference, capped]
    per_block = constants["BLOCK"] // (32 * options["num_warps"] * 4)  # loads of 4 float32 each a thread needs
    assert len(re.findall(r"\bLDG\S*\.128\b", sass)) >= per_block * (1 + reference) * (1 + capped)
    return sass


@every
@either
@targets
def test_accumulate_spills_nothing_and_reads_16_bytes_at_a_time(architecture, width, reference, options, tmp_path):
    launch = logits.fitted(logits.ACCUMULATE_BOTH if reference else logits.ACCUMULATE, width)
    constants = {"WIDTH": width, "BLOCK": launch.pop("BLOCK"), "HAS_REF": reference, "HAS_CAP": options,
                 "HAS_BIAS": options, "REF_CAP": reference and options, "REF_HAS_BIAS": reference and options}
    check(logits.accumulate_kernel, architecture, constants, launch, reference, options, tmp_path)


@pytest.mark.parametrize("out", ["*fp32", "*bf16"])
@every
@either
@targets
def test_dlogits_spills_nothing_and_waits_before_it_writes(architecture, width, reference, options, out, tmp_path):
    launch = logits.fitted(logits.DLOGITS, width)
    constants = {"WIDTH": width, "BLOCK": launch.pop("BLOCK"), "HAS_CAP": options, "HAS_BIAS": options,
                 "REF_CAP": reference and options, "REF_HAS_BIAS": reference and options, "OF_LOGPROBS": True,
                 "OF_ENTROPY": True, "OF_KL_PI_REF": reference, "OF_KL_REF_PI": reference}
    sass = check(logits.dlogits_kernel, architecture, constants, launch, reference, options, tmp_path, out)
    stores = re.findall(r"\bSTG\S*", sass)
    assert stores
    assert all(x.endswith((".64", ".128")) for x in stores)
    first = re.search(r"\bSTG", sass).start()
    assert "BAR.SYNC" in sass[:first], "the tile is written in its own place: every thread must have read its part"


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_sampling_spills_nothing_and_reads_a_padded_vocabulary_16_bytes_at_a_time(architecture, tmp_path):
    launch = dict(sampling.SAMPLE)
    constants = {"WIDTH": 151_643, "READ": 151_648, "BLOCKS": 64, "BLOCK": launch.pop("BLOCK")}  # Qwen2.5
    sass = check(sampling.inverse_cdf_kernel, architecture, constants, launch, False, False, tmp_path)
    assert len(re.findall(r"\bLDG", sass)) == 2 * 2 + 1, "a block twice, and one uniform: nothing narrow"
