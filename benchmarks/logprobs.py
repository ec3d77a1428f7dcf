"""The hot path against its peers, python -m benchmarks.logprobs: seconds, memory and error of log-prob, entropy, KL.

Operands have logits of standard deviation 3, ids sampled from the softmax, random upstream gradients per token. The ops
are interleaved, so a busy machine slows all alike: ratios are within one run. Beside the naive way they are to the time
of bare products of the same operands: "floor" is as many as an op makes, "4 prod." what making the logits twice takes.
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
from benchmarks.ops import Inputs, Op, naive, own, step
from benchmarks.peers import installed, peers, reason
from rlkl.tiles import spans


class Shape(NamedTuple):
    """N × V logits of D-wide states; width 0: the logits themselves are given."""

    rows: int
    width: int
    columns: int
    dtype: str = "bfloat16"
    padding: float = 0.0  # share of the rows that is left out first


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
GPU, CPU, QUICK = ([name for name in SHAPES if name[0] in letters] for letters in ("SL", "C", "Q"))
KINDS = ("", "log-prob", "log-prob, entropy", "log-prob, entropy, KL to a reference")
ERRORS = ("logprob", "entropy", "kl")
JUDGED = 1024  # rows whose errors are measured


def inputs(shape: Shape, device: str, seed: int) -> Inputs:
    g, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, shape.dtype)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g, device=device).mul_(std)

    kept = None
    if shape.padding:
        kept = torch.rand(shape.rows, generator=g, device=device).argsort()[int(shape.rows * shape.padding) :].sort()[0]
    hidden, weight, ref_hidden, ref_weight = normal(shape.rows, shape.width or shape.columns, std=3.0), None, None, None
    if shape.width:
        std = shape.width**-0.5
        weight = normal(shape.columns, shape.width, std=std)
        ref_hidden = hidden if kept is None else hidden[kept]
        ref_hidden = (ref_hidden + normal(*ref_hidden.shape, std=0.3)).to(dtype)
        ref_weight = (weight + normal(*weight.shape, std=0.1 * std)).to(dtype)
        weight = weight.to(dtype).requires_grad_()
    hidden = hidden.to(dtype)
    ids, states = [], hidden if kept is None else hidden[kept]
    for rows in spans(len(states), JUDGED):
        logits = states[rows] if weight is None else states[rows] @ weight.detach().T
        ids.append(torch.multinomial(logits.float().softmax(-1), 1, generator=g).squeeze(1))
    return Inputs(hidden.requires_grad_(), weight, torch.cat(ids), ref_hidden, ref_weight, normal(3, len(states)), kept)


def first(x: Inputs, rows: int, dtype: torch.dtype | None = None) -> Inputs:
    """The first rows, compacted, as new leaves."""
    def of(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype or t.dtype, copy=True)

    ref_hidden = None if x.ref_hidden is None else x.ref_hidden[:rows]
    return Inputs(of(x.rows[:rows]).requires_grad_(), x.weight if x.weight is None else of(x.weight).requires_grad_(),
                  x.ids[:rows], of(ref_hidden), of(x.ref_weight), of(x.upstream[:, :rows]))


# What is measured
class Live(TorchDispatchMode):
    """The most bytes that tensors made under it held at once, without the ones inside an op of torch."""

    def __init__(self, known: tuple) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known if isinstance(x, Tensor)}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (ref := StorageWeakRef(x.untyped_storage())).cdata not in self.known:
                self.live[ref.cdata] = ref, x.untyped_storage().nbytes()
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def extra_bytes(op: Op, x: Inputs) -> int | None:
    """Peak memory beyond the inputs and the returned gradients; on a CPU of what passes torch's dispatcher."""
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


def errors(op: Op, x: Inputs, truth: list[list[Tensor]]) -> dict[str, float]:
    """Nats off float64 on the same operands; of the gradients the relative 2-norm."""
    found, grads = step(op, x, lambda: None)
    result = {}
    for name, mine, right in zip(ERRORS, found, truth[0], strict=False):
        gap = (mine.detach().double() - right[: len(mine)]).abs()
        result |= {f"{name}_max": gap.max().item(), f"{name}_mean": gap.mean().item()}
    for name, mine, right in zip(("dh", "dw"), grads if found else (), truth[1], strict=False):
        result[name] = ((mine.double() - right).norm() / right.norm()).item()
    return result


def seconds(run: Callable[[Callable[[], None]], Any], cuda: bool) -> list[float]:
    """Time from the start to each mark and to the end; CPU time of one thread, which is its own on a busy machine."""
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.process_time() if torch.get_num_threads() == 1 else time.perf_counter())

    mark()
    run(mark)
    mark()
    if cuda:
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(m) / 1000 for m in marks[1:]]
    return [m - marks[0] for m in marks[1:]]


def fresh(x: Inputs) -> Inputs:
    """Given logits may be overwritten by an op."""
    return x if x.weight is not None else x._replace(hidden=x.hidden.detach().clone().requires_grad_())


def ceilings(x: Inputs) -> dict[str, Callable[[Any], Any]]:
    """The bare products, of the dtype of the operands; for given logits, a copy of them: one read and one write."""
    h = x.rows.detach()
    if x.weight is None:
        return {"copy": lambda _: h.clone()}
    w, d = x.weight.detach(), torch.randn(len(h), len(x.weight), device=h.device).to(h.dtype)
    return {"logits": lambda _: torch.mm(h, w.T), "dh": lambda _: torch.mm(d, w), "dw": lambda _: torch.mm(d.T, h)}


def interleaved(ops: list[Op], bare: dict, ring: list[Inputs], repetitions: int, warm_up: int) -> tuple[dict, list]:
    """Median seconds of each ceiling; of each op those to its marks, all repetitions. Every op has its turn in each."""
    cuda = ring[0].hidden.is_cuda
    floors, times = {name: [] for name in bare}, [[] for _ in ops]
    for repetition in range(-warm_up, repetitions):
        for name, run in bare.items():
            floors[name] += seconds(run, cuda) if repetition >= 0 else []
        for op, mine in zip(ops, times, strict=True):
            x = fresh(ring[repetition % 2])
            found = seconds(lambda mark, op=op, x=x: step(op, x, mark), cuda)
            mine += [found] if repetition >= 0 else []
    return {name: statistics.median(found) for name, found in floors.items()}, times


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """Add what `run` finds to the row of an op, or why the op does not run here: a peer may fail in any way."""
    try:
        row |= {} if "failed" in row else run()
    except Exception as error:
        row["failed"] = reason(error)


def judged(ops: list[Op], x: Inputs) -> list[dict[str, Any]]:
    """A row per op, with its errors on the first rows of the operands."""
    mine, exact, truth = first(x, JUDGED), first(x, JUDGED, torch.float64), {}
    for n in {op.outputs for op in ops}:
        truth[n] = [[y.detach() for y in found] for found in step(Op("", n, (), naive(n)), exact, lambda: None)]
    rows = [{"op": op.name, "outputs": op.outputs} | ({"failed": op.failed} if op.failed else {}) for op in ops]
    for op, row in zip(ops, rows, strict=True):
        attempt(row, lambda op=op: errors(op, fresh(mine), truth[op.outputs]))
    return rows


def measure(shape: Shape, device: str, repetitions: int, warm_up: int, compiled: bool) -> dict[str, Any]:
    ring = [inputs(shape, device, seed) for seed in (0, 1)]
    ops = own(shape.width == 0, shape.dtype, device, compiled) + peers(shape.width == 0, device, compiled)
    rows, bare = judged(ops, ring[0]), ceilings(ring[0])
    for op, row in zip(ops, rows, strict=True):
        attempt(row, lambda op=op: {"extra_bytes": extra_bytes(op, fresh(ring[0]))})
    running = [i for i, row in enumerate(rows) if "failed" not in row]
    floors, times = interleaved([ops[i] for i in running], bare, ring, repetitions, warm_up)
    for i, found in zip(running, times, strict=True):
        both = statistics.median(t[-1] for t in found)
        if len(found[0]) > 1:
            rows[i] |= {"forward": statistics.median(t[0] for t in found),
                        "backward": statistics.median(t[1] - t[0] for t in found)}
        floor = sum(n * s for n, s in zip(ops[i].gemms, floors.values(), strict=True))
        rows[i] |= {"both": both, "both_min": min(t[-1] for t in found), "to_floor": both / floor}
        if shape.width:
            rows[i]["to_4_products"] = both / (2 * floors["logits"] + floors["dh"] + floors["dw"])
    for row in rows:
        base = next(r for r in rows if (r["op"], r["outputs"]) == ("naive", row["outputs"]))
        if "both" in row and "both" in base:
            row["to_naive"] = row["both"] / base["forward" if "forward only" in row["op"] else "both"]
    return {**shape._asdict(), "repetitions": repetitions, "products": floors, "ops": rows}


# What is shown
COLUMNS = {  # title → key, factor, format
    "forward ms": ("forward", 1e3, ".4g"), "backward": ("backward", 1e3, ".4g"), "both": ("both", 1e3, ".4g"),
    "/ naive": ("to_naive", 1, ".2f"), "/ floor": ("to_floor", 1, ".2f"), "/ 4 prod.": ("to_4_products", 1, ".2f"),
    "extra MB": ("extra_bytes", 1e-6, ".1f"), "max |Δlogp|": ("logprob_max", 1, ".1e"),
    "mean": ("logprob_mean", 1, ".1e"), "max |ΔH|": ("entropy_max", 1, ".1e"), "max |ΔKL|": ("kl_max", 1, ".1e"),
    "dh": ("dh", 1, ".1e"), "dW": ("dw", 1, ".1e"),
}


def show(results: dict[str, dict], missing: list[str]) -> None:
    table, notes = Table("", *COLUMNS, box=None, pad_edge=False), dict[str, list[str]]()
    for name, result in results.items():
        size = f"{name} {result['rows']} × {result['width']} × {result['columns']} {result['dtype']}"
        for outputs, kind in enumerate(KINDS):
            rows = [row for row in result["ops"] if row["outputs"] == outputs]
            if rows:
                table.add_row(f"[bold]{size}: {kind}[/]")
            for row in rows:
                if "failed" in row:
                    notes.setdefault(f"{row['op']}: {row['failed']}", []).append(name)
                    continue
                table.add_row("  " + row["op"], *(f"{row[key] * factor:{form}}" if row.get(key) is not None else ""
                                                  for key, factor, form in COLUMNS.values()))
    lines = [f"{note} ({', '.join(dict.fromkeys(names))})" for note, names in notes.items()]
    lines += [f"not measured, for want of a GPU: {', '.join(missing)}"] if missing else []
    Console(width=200, highlight=False).print(table, *lines, sep="\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: C* on a CPU, S* and L* on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too")
    parser.add_argument("--peers", type=Path, help="a folder of unzipped wheels")
    parser.add_argument("--repetitions", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; several on a shared one wait for each other")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/logprobs-{cpu,cuda}.json; --quick: none")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sys.path += [str(args.peers)] if args.peers else []
    out = args.out or (None if args.quick else Path(f"benchmarks/results/logprobs-{device}.json"))
    names = args.shapes or (QUICK if args.quick else GPU if device == "cuda" else CPU)
    repetitions, warm_up = (2, 0) if args.quick else (args.repetitions, 5 if device == "cuda" else 0)
    missing = [name for name in GPU if name not in names] if device == "cpu" else []
    clock = "CUDA events" if device == "cuda" else "CPU time" if args.threads == 1 else "wall time"
    setting = {**where(*installed()), "clock": clock, "not_measured": missing}
    results: dict[str, dict] = {}
    for name in names:
        results[name] = measure(SHAPES[name], device, repetitions, warm_up, args.compile or device == "cuda")
        if out:  # after each shape: an hour may be lost otherwise
            out.write_text(json.dumps({**setting, "shapes": results}, indent=1) + "\n")
    show(results, missing)


if __name__ == "__main__":
    main(sys.argv[1:])
