"""The hot path against other implementations: time, memory and error of log-prob, entropy and KL.

    python -m benchmarks.logprobs [--quick] [--peers FOLDER] [--shapes NAME ...]

The logits have a standard deviation of 3, the ids are sampled from the softmax, and each token has
random upstream gradients. The ops take turns, so a busy machine slows all of them alike; compare
times within one run only.

Times are relative to the naive op, and to bare matrix products of the same operands: "floor" is the
products that the op makes, "4 prod." those of an op that computes the logits twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import where
from benchmarks.ops import Inputs, Op, Outputs, naive, own, step
from benchmarks.peers import installed, peers, reason
from rlkl.logprobs.tiled import spans


class Shape(NamedTuple):
    """The size of an op: N × V logits of hidden states of size D."""

    rows: int  # N
    width: int  # D; 0 where the logits themselves are given
    columns: int  # V
    dtype: str = "bfloat16"
    padding: float = 0.0  # share of the rows that is left out


SHAPES = {
    "S1": Shape(8192, 896, 151936),
    "S2": Shape(16384, 1536, 151936),
    "S3": Shape(16384, 2048, 151936),
    "S4": Shape(8192, 4096, 151936),
    "S5": Shape(8192, 4096, 128256),
    "S6": Shape(32768, 4096, 151936),
    "S7": Shape(8192, 4096, 131072),
    "S8": Shape(32768, 2048, 151936, padding=0.75),
    "L1": Shape(8192, 0, 151936),
    "L1-float32": Shape(8192, 0, 151936, "float32"),
    "C1": Shape(512, 256, 32000, "float32"),
    "C2": Shape(512, 256, 32000),
    "C3": Shape(256, 896, 65536, "float32"),
    "Q1": Shape(24, 16, 300, "float32"),
    "Q2": Shape(24, 16, 300, padding=0.5),
    "Q3": Shape(24, 0, 300, "float32"),
}
GPU = [name for name in SHAPES if name[0] in "SL"]
CPU = [name for name in SHAPES if name[0] == "C"]
QUICK = [name for name in SHAPES if name[0] == "Q"]
# By the number of outputs of an op.
KINDS = ("", "log-prob", "log-prob, entropy", "log-prob, entropy, KL to a reference")
ERRORS = ("logprob", "entropy", "kl")
ERROR_ROWS = 1024  # rows whose errors are measured


def inputs(shape: Shape, device: str, seed: int) -> Inputs:
    """Random operands of a shape."""
    rng = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=rng, device=device).mul_(std)

    kept = None
    if shape.padding:
        order = torch.rand(shape.rows, generator=rng, device=device).argsort()
        kept = order[int(shape.rows * shape.padding) :].sort()[0]
    hidden = normal(shape.rows, shape.width or shape.columns, std=3.0)
    weight = ref_hidden = ref_weight = None
    if shape.width:
        std = shape.width**-0.5
        weight = normal(shape.columns, shape.width, std=std)
        ref_hidden = hidden if kept is None else hidden[kept]
        ref_hidden = (ref_hidden + normal(*ref_hidden.shape, std=0.3)).to(dtype)
        ref_weight = (weight + normal(*weight.shape, std=0.1 * std)).to(dtype)
        weight = weight.to(dtype).requires_grad_()
    hidden = hidden.to(dtype)
    states = hidden if kept is None else hidden[kept]
    ids = []
    for rows in spans(len(states), ERROR_ROWS):
        logits = states[rows] if weight is None else states[rows] @ weight.detach().T
        probabilities = logits.float().softmax(-1)
        ids.append(torch.multinomial(probabilities, 1, generator=rng).squeeze(1))
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight,
        ids=torch.cat(ids),
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        upstream=normal(3, len(states)),
        kept=kept,
    )


def first(x: Inputs, rows: int, dtype: torch.dtype | None = None) -> Inputs:
    """The first rows that are no padding, as new leaves."""

    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype or t.dtype, copy=True)

    return Inputs(
        hidden=copy(x.rows[:rows]).requires_grad_(),
        weight=None if x.weight is None else copy(x.weight).requires_grad_(),
        ids=x.ids[:rows],
        ref_hidden=None if x.ref_hidden is None else copy(x.ref_hidden[:rows]),
        ref_weight=copy(x.ref_weight),
        upstream=copy(x.upstream[:, :rows]),
    )


# ------------------------------------------------------------------ measurements


class Live(TorchDispatchMode):
    """Counts the bytes that new tensors hold at once; `peak` is the most.

    Buffers inside an op of torch are not seen. known: tensors that are not new.
    """

    def __init__(self, known: tuple) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known if isinstance(x, Tensor)}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                if storage.cdata not in self.known:
                    self.live[storage.cdata] = storage, x.untyped_storage().nbytes()
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def extra_bytes(op: Op, x: Inputs) -> int | None:
    """Peak memory beyond the inputs and the returned gradients.

    On a CPU it is what passes torch's dispatcher; None for a compiled op, which does not.
    """
    if x.hidden.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _, grads = step(op, x, lambda: None)
        return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    if op.compiled:
        return None
    with Live(x) as live:
        _, grads = step(op, x, lambda: None)
    return live.peak - sum(g.nbytes for g in grads)


def errors(op: Op, x: Inputs, truth: tuple[Outputs, Outputs]) -> dict[str, float]:
    """Distance from float64: of outputs in nats, of gradients as a relative 2-norm."""
    outputs, gradients = step(op, x, no_mark)
    true_outputs, true_gradients = truth
    row = {}
    for name, output, right in zip(ERRORS, outputs, true_outputs, strict=False):
        gap = (output.detach().double() - right[: len(output)]).abs()
        row |= {f"{name}_max": gap.max().item(), f"{name}_mean": gap.mean().item()}
    if outputs:
        for name, gradient, right in zip(("dh", "dw"), gradients, true_gradients, strict=False):
            row[name] = ((gradient.double() - right).norm() / right.norm()).item()
    return row


def no_mark() -> None:
    """For a step that is not timed."""


def seconds(run: Callable[[Callable[[], None]], Any], cuda: bool) -> list[float]:
    """Time from the start to each mark and to the end.

    On a CPU with one thread it is CPU time, which other programs do not change.
    """
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            one_thread = torch.get_num_threads() == 1
            marks.append(time.process_time() if one_thread else time.perf_counter())

    mark()
    run(mark)
    mark()
    if cuda:
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(m) / 1000 for m in marks[1:]]
    return [m - marks[0] for m in marks[1:]]


def fresh(x: Inputs) -> Inputs:
    """The inputs, with a copy of given logits, which an op may overwrite."""
    if x.weight is not None:
        return x
    return x._replace(hidden=x.hidden.detach().clone().requires_grad_())


def ceilings(x: Inputs) -> dict[str, Callable[[Any], Any]]:
    """The bare products, in the dtype of the operands.

    For given logits it is a copy of them: one read and one write.
    """
    hidden = x.rows.detach()
    if x.weight is None:
        return {"copy": lambda _: hidden.clone()}
    weight = x.weight.detach()
    dlogits = torch.randn(len(hidden), len(weight), device=hidden.device).to(hidden.dtype)
    return {
        "logits": lambda _: torch.mm(hidden, weight.T),
        "dh": lambda _: torch.mm(dlogits, weight),
        "dw": lambda _: torch.mm(dlogits.T, hidden),
    }


class Times(NamedTuple):
    """Seconds of one op: of all repetitions, to each of its marks."""

    repetitions: list[list[float]]

    def median(self, mark: int) -> float:
        return statistics.median(marks[mark] for marks in self.repetitions)

    def row(self) -> dict[str, float]:
        """The columns of the results."""
        row = {}
        if len(self.repetitions[0]) > 1:
            row["forward"] = self.median(0)
            row["backward"] = statistics.median(end - middle for middle, end in self.repetitions)
        row["both"] = self.median(-1)
        row["both_min"] = min(marks[-1] for marks in self.repetitions)
        return row


def interleaved(
    ops: list[Op],
    products: dict[str, Callable],
    ring: list[Inputs],
    repetitions: int,
    warm_up: int,
) -> tuple[dict[str, float], list[Times]]:
    """Median seconds of each bare product, and the times of each op.

    Every op has its turn in each repetition. ring: two sets of operands, used alternately.
    """
    cuda = ring[0].hidden.is_cuda
    floors: dict[str, list[float]] = {name: [] for name in products}
    times = [Times([]) for _ in ops]
    for repetition in range(-warm_up, repetitions):
        measured = repetition >= 0
        for name, product in products.items():
            elapsed = seconds(product, cuda)
            floors[name] += elapsed if measured else []
        for op, op_times in zip(ops, times, strict=True):
            x = fresh(ring[repetition % 2])
            elapsed = seconds(lambda mark, op=op, x=x: step(op, x, mark), cuda)
            if measured:
                op_times.repetitions.append(elapsed)
    return {name: statistics.median(all_times) for name, all_times in floors.items()}, times


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Add the result of `run` to the row of an op; or, if it fails, the reason.

    A row that has failed before is left alone.
    """
    if "failed" in row:
        return
    try:
        row |= run()
    except Exception as error:  # a peer may fail in any way
        row["failed"] = reason(error)


def rows_with_errors(ops: list[Op], x: Inputs) -> list[dict[str, Any]]:
    """A row for each op, with its errors on the first rows of the operands."""
    operands = first(x, ERROR_ROWS)
    exact = first(x, ERROR_ROWS, torch.float64)
    truth = {n: naive_truth(n, exact) for n in {op.outputs for op in ops}}
    rows = []
    for op in ops:
        row: dict[str, Any] = {"op": op.name, "outputs": op.outputs}
        if op.failed:
            row["failed"] = op.failed
        attempt(row, lambda op=op: errors(op, fresh(operands), truth[op.outputs]))
        rows.append(row)
    return rows


def naive_truth(outputs: int, x: Inputs) -> tuple[Outputs, Outputs]:
    """Outputs and gradients of the naive op on these operands, which are float64."""
    results, gradients = step(Op("", outputs, (), naive(outputs)), x, no_mark)
    return tuple(y.detach() for y in results), tuple(y.detach() for y in gradients)


def measure(
    shape: Shape, device: str, repetitions: int, warm_up: int, compiled: bool
) -> dict[str, Any]:
    """Errors, memory and times of every op on one shape."""
    ring = [inputs(shape, device, seed) for seed in (0, 1)]
    given_logits = shape.width == 0
    ops = own(given_logits, shape.dtype, device, compiled) + peers(given_logits, device, compiled)
    rows = rows_with_errors(ops, ring[0])
    for op, row in zip(ops, rows, strict=True):
        attempt(row, lambda op=op: {"extra_bytes": extra_bytes(op, fresh(ring[0]))})
    running = [i for i, row in enumerate(rows) if "failed" not in row]
    running_ops = [ops[i] for i in running]
    floors, times = interleaved(running_ops, ceilings(ring[0]), ring, repetitions, warm_up)
    for i, op_times in zip(running, times, strict=True):
        rows[i] |= op_times.row()
        floor = sum(n * s for n, s in zip(ops[i].gemms, floors.values(), strict=True))
        rows[i]["to_floor"] = rows[i]["both"] / floor
        if shape.width:
            four_products = 2 * floors["logits"] + floors["dh"] + floors["dw"]
            rows[i]["to_4_products"] = rows[i]["both"] / four_products
    for row in rows:
        baseline = next(r for r in rows if (r["op"], r["outputs"]) == ("naive", row["outputs"]))
        if "both" in row and "both" in baseline:
            part = "forward" if "forward only" in row["op"] else "both"
            row["to_naive"] = row["both"] / baseline[part]
    return {**shape._asdict(), "repetitions": repetitions, "products": floors, "ops": rows}


# ------------------------------------------------------------------ output

COLUMNS = {  # title → key, factor, format
    "forward ms": ("forward", 1e3, ".4g"),
    "backward": ("backward", 1e3, ".4g"),
    "both": ("both", 1e3, ".4g"),
    "/ naive": ("to_naive", 1, ".2f"),
    "/ floor": ("to_floor", 1, ".2f"),
    "/ 4 prod.": ("to_4_products", 1, ".2f"),
    "extra MB": ("extra_bytes", 1e-6, ".1f"),
    "max |Δlogp|": ("logprob_max", 1, ".1e"),
    "mean": ("logprob_mean", 1, ".1e"),
    "max |ΔH|": ("entropy_max", 1, ".1e"),
    "max |ΔKL|": ("kl_max", 1, ".1e"),
    "dh": ("dh", 1, ".1e"),
    "dW": ("dw", 1, ".1e"),
}


def show(results: dict[str, dict], missing: list[str]) -> None:
    """Print a table of all shapes; below it the ops that failed and the shapes not measured."""
    table = Table("", *COLUMNS, box=None, pad_edge=False)
    failures: dict[str, list[str]] = {}
    for name, result in results.items():
        size = f"{result['rows']} × {result['width']} × {result['columns']} {result['dtype']}"
        for outputs, kind in enumerate(KINDS):
            rows = [row for row in result["ops"] if row["outputs"] == outputs]
            if rows:
                table.add_row(f"[bold]{name} {size}: {kind}[/]")
            for row in rows:
                if "failed" in row:
                    failures.setdefault(f"{row['op']}: {row['failed']}", []).append(name)
                else:
                    table.add_row("  " + row["op"], *cells(row))
    lines = [f"{text} ({', '.join(dict.fromkeys(names))})" for text, names in failures.items()]
    if missing:
        lines.append(f"not measured, because there is no GPU: {', '.join(missing)}")
    Console(width=200, highlight=False).print(table, *lines, sep="\n")


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of a row of the table; empty where nothing was measured."""
    return [
        "" if row.get(key) is None else f"{row[key] * factor:{form}}"
        for key, factor, form in COLUMNS.values()
    ]


def parse(argv: list[str], device: str) -> argparse.Namespace:
    """The command line, with what it leaves out filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: C* on a CPU, S* and L* on a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too")
    parser.add_argument("--peers", type=Path, help="a folder of unzipped wheels")
    parser.add_argument("--repetitions", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    default = "benchmarks/results/logprobs-{cpu,cuda}.json"
    parser.add_argument("--out", type=Path, help=f"default: {default}; with --quick none")
    args = parser.parse_args(argv)
    if args.out is None and not args.quick:
        args.out = Path(f"benchmarks/results/logprobs-{device}.json")
    if not args.shapes:
        args.shapes = QUICK if args.quick else GPU if device == "cuda" else CPU
    args.warm_up = 5 if device == "cuda" and not args.quick else 0
    if args.quick:
        args.repetitions = 2
    return args


def main(argv: list[str]) -> None:
    """Measure the shapes, write the results after each, and print a table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = parse(argv, device)
    torch.set_num_threads(args.threads)
    if args.peers:
        sys.path.append(str(args.peers))
    missing = [name for name in GPU if name not in args.shapes] if device == "cpu" else []
    clock = "CUDA events" if device == "cuda" else "CPU time" if args.threads == 1 else "wall time"
    machine = {**where(*installed()), "clock": clock, "not_measured": missing}
    compiled = args.compile or device == "cuda"
    results: dict[str, dict] = {}
    for name in args.shapes:
        results[name] = measure(SHAPES[name], device, args.repetitions, args.warm_up, compiled)
        if args.out:  # after each shape, so that an interrupt loses only one
            args.out.write_text(json.dumps({**machine, "shapes": results}, indent=1) + "\n")
    show(results, missing)


if __name__ == "__main__":
    main(sys.argv[1:])
