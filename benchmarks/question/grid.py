"""Run the arms: python -m benchmarks.question.grid [--quick] [--processes 2] [--out FILE].

Each arm is one line of FILE, written when it is done; an arm that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import train
from benchmarks.question.arms import CONFIG, SEEDS, Arm, grid, quick
from benchmarks.question.grammar import PROMPT, Grammar
from benchmarks.question.prepare import BASE, REWARD, prepare
from benchmarks.question.tables import show
from rlkl import runs
from rlkl.config import load as load_config
from rlkl.config import resolve
from rlkl.errors import UserError
from rlkl.log import read_rows
from rlkl.model import Policy, decode, encode, left_pad, load, sampling_rule
from rlkl.rewards import REWARDS
from rlkl.rollout.cached import cached
from rlkl.rollout.sample import draw_uniforms
from rlkl.seeds import generator
from rlkl.terminal import console

MEASURED = 512  # replies of the policy that an arm ends with
CURVES = {  # name here → name in metrics.jsonl
    "proxy": "reward", "gold": "reward/task", "invalid": "reward/task/invalid", "length": "length",
    "truncated": "truncated", "distinct": "distinct", "entropy": "entropy", "ref_logprob": "ref_logprob",
    "kl_pi_ref_seq": "kl_pi_ref_seq", "kl_old_pi": "kl_old_pi", "clip_fraction": "clip_fraction",
    "ratio_max": "ratio_max", "ess": "ess", "grad_norm": "grad_norm/policy"}


def run(arm: Arm) -> dict:
    """Train one arm by train.py, measure what it ends with."""
    torch.set_num_threads(1)
    wall, cpu, console.quiet = time.perf_counter(), time.process_time(), True
    with tempfile.TemporaryDirectory() as scratch:
        argv = [CONFIG, *arm.overrides, f"seed={arm.seed}", f"run={scratch}/run"]
        try:
            path = train.train(runs.configure(argv), argv)
        finally:
            console.quiet = False
        rows, steps = read_rows(Path(scratch) / "run" / "metrics.jsonl"), load_config(argv).optim.steps
        if len(rows) < steps:  # train.py ends in good order on Ctrl-C
            raise KeyboardInterrupt(f"{arm.key} was stopped after {len(rows)} of {steps} steps")
        policy, _ = load(str(path))
    spent = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    curves = {name: [short(row.get(key)) for row in rows] for name, key in CURVES.items()}
    return head(arm) | {key: round(x, 1) for key, x in spent.items()} | measure(policy) | {"curves": curves}


def head(arm: Arm) -> dict:
    return {"key": arm.key, **arm._asdict()}


def start() -> dict:
    """The row of what every arm starts from: the base, measured like an arm, and what the reward model learned."""
    learned = json.loads(REWARD.read_text(encoding="utf-8"))
    learned["words"] = {word: short(weight) for word, weight in learned["words"].items()}
    return head(Arm("reference", "reference", 0, ())) | {
        "where": runs.provenance("make question"), "reward_model": learned} | measure(load(str(BASE))[0])


@torch.no_grad()
def measure(policy: Policy) -> dict:
    """Means over MEASURED replies, the same uniforms for every policy: both rewards, and how far it is from the base.

    KL(pi || ref) of whole replies is exact at each state, summed over the states that were met.
    """
    cfg, (reference, tokenizer) = load_config([CONFIG]), load(str(BASE))
    rule, task = sampling_rule(policy, tokenizer, cfg.sampling.temperature), Grammar("heldout", size=MEASURED)
    ids, mask = left_pad([encode(tokenizer, PROMPT)] * MEASURED, rule.pad_id)
    uniforms = draw_uniforms(MEASURED, cfg.sampling.max_new_tokens, generator(0, 0, "measure"), ids.device)
    batch = cached(policy, ids, mask, uniforms, rule)
    replies, new = decode(tokenizer, batch), policy.evaluate(batch, reference)
    ref_logprobs = reference.evaluate(batch).logprobs
    proxy, _ = resolve(cfg.reward[0], REWARDS, "reward")(task.examples, replies, batch)
    graded = [task.grade(e, r) for e, r in zip(task.examples, replies, strict=True)]
    grades = {name: torch.tensor([g[name] for g in graded]) for name in graded[0]}
    per_reply = {"proxy": proxy, **grades, "length": batch.mask.sum(1), "truncated": batch.truncated,
                 "kl_pi_ref_seq": new.kl_pi_ref.sum(1), "k1_seq": (new.logprobs - ref_logprobs).sum(1)}
    per_token = {"entropy": new.entropy, "ref_logprob_tok": ref_logprobs, "kl_pi_ref_tok": new.kl_pi_ref}
    final = {name: x.float().mean() for name, x in per_reply.items()}
    final |= {name: x[batch.mask].mean() for name, x in per_token.items()}
    return {"final": {name: short(x.item()) for name, x in final.items()}, "samples": replies[:8]}


def short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def results(arms: Sequence[Arm], processes: int) -> Iterator[dict]:
    """As they are done. With one process, in this one."""
    if processes == 1:
        yield from map(run, arms)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(run, arm) for arm in arms]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun is not begun
            raise


def measure_all(arms: Iterable[Arm], out: Path, processes: int) -> list[dict]:
    """Run the arms that `out` does not have; returns all of its rows."""
    rows = read_rows(out)
    write(out, rows)  # without a last line that was cut off
    if not any(row["group"] == "reference" for row in rows):
        append(out, start())
    have = {row["key"] for row in rows if row["group"] != "reference"}
    missing = [arm for arm in arms if arm.key not in have]
    console.print(f"{out}: {len(missing)} arms to run, {len(have)} are there")
    for number, row in enumerate(results(missing, processes), 1):
        append(out, row)
        found = "  ".join(f"{name} {row['final'][name]:.4g}" for name in ("proxy", "gold", "valid", "kl_pi_ref_seq"))
        console.print(f"{number:3d} of {len(missing)}  {row['key']:16s}  {found}  {row['wall_seconds']:.0f} s  "
                      f"{row['samples'][0][:48]}")
    return read_rows(out)


def write(out: Path, rows: Sequence[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, out)


def append(out: Path, row: dict) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.question.grid", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the four corners at 16 epochs, one seed")
    parser.add_argument("--processes", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/question/arms.jsonl"))
    args = parser.parse_args(argv)
    try:
        prepare()
        show(measure_all(quick() if args.quick else grid(tuple(args.seeds)), args.out, args.processes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: the arms that are done stay in {args.out}; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
