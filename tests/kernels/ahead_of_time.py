"""The Triton kernels compiled for real GPUs without one: no spilled register, 16-byte accesses.

tests/test_kernels.py runs this file in a process of its own: kernels that were read with
TRITON_INTERPRET cannot be compiled.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlkl.logprobs import tile_triton
from rlkl.rollout import sampling_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NUMBERS = {"scale", "softcap", "ref_scale", "ref_softcap", "inverse_temperature"}
WIDE, NARROW = 16_384, 4224  # a whole tile, and the last one of Qwen2.5's 151,665 ids
# All tiles of Qwen2.5 (151,665 ids in 151,936 rows) and of Llama 3 (128,256).
WIDTHS = (4224, 16_384, 20_608, 32_768, 65_536, 131_072, 151_680)
WIDTHS += (13_568, 29_952, 62_720, 128_256)
# Registers of a thread with Triton 3.7.1, the most on any architecture and 10 % more, by
# (reference, bias and soft-cap).
MOST = {
    "accumulate_kernel": {
        (False, False): 53,
        (False, True): 53,
        (True, False): 70,
        (True, True): 88,
    },
    "dlogits_kernel": {(False, False): 53, (False, True): 66, (True, False): 53, (True, True): 88},
    "inverse_cdf_kernel": {(False, False): 82},
}
# (architecture, width, reference, bias and soft-cap): every variant and every width on sm_90, and
# the smallest and the largest on all others.
VARIANTS = [
    (90, WIDE, reference, capped) for reference in (False, True) for capped in (False, True)
]
VARIANTS += [
    (architecture, width, everything, everything)
    for architecture, width in (
        (80, WIDE),
        (80, NARROW),
        (90, NARROW),
        (100, NARROW),
        (120, NARROW),
    )
    for everything in (False, True)
]
VARIANTS += [(90, width, False, False) for width in WIDTHS if width not in (WIDE, NARROW)]
VARIANTS += [(architecture, max(WIDTHS), False, False) for architecture in (80, 100, 120)]
variants = pytest.mark.parametrize(("architecture", "width", "reference", "capped"), VARIANTS)


def compiled(
    kernel, architecture: int, constants: dict, options: dict, out: str, number: str = "fp32"
):
    """Compile with the alignment that Triton finds at run time: 16 bytes, strides too.

    But nothing is known of `valid`, on which Triton does not specialise.
    """
    named = {"IDS": "*i64", "OUT": out, "UNIFORMS": "*fp64"}
    named |= dict.fromkeys(NUMBERS, number) | dict.fromkeys(constants, "constexpr")

    def type_of(argument: str) -> str:
        is_number = argument == "valid" or argument.startswith("stride")
        return named.get(argument, "i32" if is_number else "*fp32")

    types = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = [
        i
        for i, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or argument.startswith("stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def dumped(what: str, cubin: Path) -> str:
    command = [TOOLS / "cuobjdump", f"--dump-{what}", cubin]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def check(
    kernel,
    architecture: int,
    constants: dict,
    options: dict,
    reference: bool,
    capped: bool,
    tmp_path: Path,
    out: str = "*fp32",
) -> str:
    """Check what holds for every kernel; returns the SASS."""
    code = compiled(kernel, architecture, constants, options, out).asm
    assert ("cvt.rn.bf16" in code["ptx"]) == (out == "*bf16")  # to nearest
    assert code["cubin"][:4] == b"\x7fELF"
    cubin = tmp_path / "cubin"
    cubin.write_bytes(code["cubin"])
    usage, sass = dumped("resource-usage", cubin), dumped("sass", cubin)

    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0)
    assert not re.search(r"\b(?:LDL|STL)\b", sass)
    if triton.__version__.startswith("3.7."):
        assert registers <= MOST[kernel.__name__][reference, capped]
    # Loads of 4 float32 each that a thread needs for a block.
    per_block = constants["BLOCK"] // (32 * options["num_warps"] * 4)
    assert len(re.findall(r"\bLDG\S*\.128\b", sass)) >= per_block * (1 + reference) * (1 + capped)
    return sass


@variants
def test_accumulate_spills_nothing_and_reads_16_bytes_at_a_time(
    architecture, width, reference, capped, tmp_path
):
    options = tile_triton.ACCUMULATE_BOTH if reference else tile_triton.ACCUMULATE
    launch = tile_triton.launch_options(options, width)
    constants = {
        "WIDTH": width,
        "BLOCK": launch.pop("BLOCK"),
        "HAS_REF": reference,
        "HAS_CAP": capped,
        "HAS_BIAS": capped,
        "REF_CAP": reference and capped,
        "REF_HAS_BIAS": reference and capped,
    }
    kernel = tile_triton.accumulate_kernel
    check(kernel, architecture, constants, launch, reference, capped, tmp_path)


@variants
def test_dlogits_spills_nothing_and_waits_before_it_writes(
    architecture, width, reference, capped, tmp_path
):
    # Both output types on sm_90; elsewhere float32 for the smallest variant, bf16 for the largest.
    both = (architecture, width) == (90, WIDE)
    for out in ("*fp32", "*bf16") if both else ("*bf16" if capped else "*fp32",):
        launch = tile_triton.launch_options(tile_triton.DLOGITS, width)
        constants = {
            "WIDTH": width,
            "BLOCK": launch.pop("BLOCK"),
            "HAS_CAP": capped,
            "HAS_BIAS": capped,
            "REF_CAP": reference and capped,
            "REF_HAS_BIAS": reference and capped,
            "OF_LOGPROBS": True,
            "OF_ENTROPY": True,
            "OF_KL_PI_REF": reference,
            "OF_KL_REF_PI": reference,
        }
        kernel = tile_triton.dlogits_kernel
        sass = check(kernel, architecture, constants, launch, reference, capped, tmp_path, out)
        stores = re.findall(r"\bSTG\S*", sass)
        assert stores
        assert all(x.endswith((".64", ".128")) for x in stores)
        first = re.search(r"\bSTG", sass).start()
        # The tile is written in its own place: every thread must have read its part before.
        assert "BAR.SYNC" in sass[:first]


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_sampling_spills_nothing_and_reads_a_padded_vocabulary_16_bytes_at_a_time(
    architecture, tmp_path
):
    launch = dict(sampling_triton.SAMPLE)
    # The vocabulary of Qwen2.5.
    constants = {"WIDTH": 151_643, "READ": 151_648, "BLOCKS": 64, "BLOCK": launch.pop("BLOCK")}
    kernel = sampling_triton.inverse_cdf_kernel
    sass = check(kernel, architecture, constants, launch, False, False, tmp_path)
    # Two loads for a block, which is read twice, and one uniform: no load is narrow.
    assert len(re.findall(r"\bLDG", sass)) == 2 * 2 + 1


def test_a_float64_temperature_which_torch_compile_passes_costs_one_conversion():
    launch = dict(sampling_triton.SAMPLE)
    constants = {"WIDTH": 151_643, "READ": 151_648, "BLOCKS": 64, "BLOCK": launch.pop("BLOCK")}
    kernel = sampling_triton.inverse_cdf_kernel
    narrow, wide = (
        compiled(kernel, 90, constants, launch, "*fp32", number).asm["ptx"]
        for number in ("fp32", "fp64")
    )
    arithmetic = [re.findall(r"\b(?:add|sub|mul|fma|div)\S*\.f64\b", x) for x in (narrow, wide)]
    conversions = [re.findall(r"\bcvt\.rn\.f32\.f64\b", x) for x in (narrow, wide)]
    assert len(arithmetic[0]) == len(arithmetic[1])
    assert len(conversions[0]) + 1 == len(conversions[1])
