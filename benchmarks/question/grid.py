"""Run the arms.

    python -m benchmarks.question.grid [--quick] [--processes 2] [--out FILE]

Each arm is one line of FILE, written when it is done. An arm that is in FILE is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import train
from benchmarks.parallel import as_they_end
from benchmarks.question.arms import CONFIG, SEEDS, Arm, grid, quick
from benchmarks.question.grammar import PROMPT, Grammar
from benchmarks.question.prepare import BASE, REWARD, prepare
from benchmarks.question.tables import show
from rlkl.errors import UserError
from rlkl.plugins import resolve
from rlkl.policy.model import load, sampling_params
from rlkl.policy.policy import Policy
from rlkl.rewards import REWARDS
from rlkl.rollout.cached import cached
from rlkl.rollout.sampling import decode, draw_uniforms, encode, left_pad
from rlkl.run import folder as runs
from rlkl.run.config import load as load_config
from rlkl.run.log import read_rows
from rlkl.run.seeds import generator
from rlkl.run.terminal import console

MEASURED = 512  # responses of the policy that an arm ends with
CURVES = {  # name in the file of results → name in metrics.jsonl
    "proxy": "reward",
    "gold": "rewards/task",
    "invalid": "rewards/task/invalid",
    "length": "response_length",
    "truncated": "truncated_fraction",
    "distinct": "distinct_2",
    "entropy": "entropy",
    "ref_logprob": "ref_logprob",
    "kl_pi_ref_sequence": "kl_pi_ref_sequence",
    "kl_old_pi": "kl_old_pi",
    "clip_fraction": "clip_fraction",
    "ratio_max": "ratio_max",
    "ess": "effective_sample_size",
    "grad_norm": "grad_norm/policy",
}


def run(arm: Arm) -> dict:
    """Train one arm with train.py, and measure the policy that it ends with."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    console.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        argv = [CONFIG, *arm.overrides, f"seed={arm.seed}", f"run={folder}/run"]
        cfg = runs.configure(argv)
        try:
            checkpoint = train.train(cfg, shlex.join(argv)).last_checkpoint
        finally:
            console.quiet = False
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
        if len(rows) < cfg.optim.steps:  # train.py ends without an error on Ctrl-C
            raise KeyboardInterrupt(
                f"{arm.key} was stopped after {len(rows)} of {cfg.optim.steps} steps"
            )
        policy, _ = load(str(checkpoint))
    seconds = {
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    curves = {name: [short(row.get(metric)) for row in rows] for name, metric in CURVES.items()}
    return head(arm) | seconds | measure(policy) | {"curves": curves}


def head(arm: Arm) -> dict:
    """The fields that name an arm."""
    return {"key": arm.key, **arm._asdict()}


def start() -> dict:
    """The row of the base, measured like an arm; and what the reward model learned."""
    learned = json.loads(REWARD.read_text(encoding="utf-8"))
    learned["words"] = {word: short(weight) for word, weight in learned["words"].items()}
    row = head(Arm("reference", "reference", 0, ()))
    row |= {"where": runs.provenance("make question"), "reward_model": learned}
    return row | measure(load(str(BASE))[0])


@torch.no_grad()
def measure(policy: Policy) -> dict:
    """Means over MEASURED responses: both rewards, and how far the policy is from the base.

    Every policy gets the same uniforms. kl_pi_ref_sequence is KL(pi || ref) of whole responses:
    exact at each state, summed over the states that were met.
    """
    cfg = load_config([CONFIG])
    reference, tokenizer = load(str(BASE))
    task = Grammar("heldout", size=MEASURED)
    params = sampling_params(policy, tokenizer, cfg.sampling.temperature)
    ids, mask = left_pad([encode(tokenizer, PROMPT)] * MEASURED, params.pad_id)
    rng = generator(0, 0, "measure")
    uniforms = draw_uniforms(MEASURED, cfg.sampling.max_new_tokens, rng, ids.device)
    batch = cached(policy, ids, mask, uniforms, params)

    responses = decode(tokenizer, batch)
    proxy, _ = resolve(cfg.reward[0], REWARDS, "reward")(task.examples, responses, batch)
    grades = [task.grade(e, r) for e, r in zip(task.examples, responses, strict=True)]
    new = policy(batch, reference)
    ref_logprobs = reference(batch).logprobs
    per_response = {
        "proxy": proxy,
        **{name: torch.tensor([grade[name] for grade in grades]) for name in grades[0]},
        "length": batch.mask.sum(1),
        "truncated": batch.truncated,
        "kl_pi_ref_sequence": new.kl_pi_ref.sum(1),
        "k1_sequence": (new.logprobs - ref_logprobs).sum(1),
    }
    per_token = {
        "entropy": new.entropy,
        "ref_logprob_token": ref_logprobs,
        "kl_pi_ref_token": new.kl_pi_ref,
    }
    final = {name: x.float().mean() for name, x in per_response.items()}
    final |= {name: x[batch.mask].mean() for name, x in per_token.items()}
    return {"final": {name: short(x.item()) for name, x in final.items()}, "samples": responses[:8]}


def short(x: float | None) -> float | None:
    """Four digits of a number."""
    return None if x is None else float(f"{x:.4g}")


def results(arms: Sequence[Arm], processes: int) -> Iterator[dict]:
    """The rows of the arms, in the order in which they end. One process is this one."""
    if processes == 1:
        yield from map(run, arms)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from as_they_end(pool, run, arms)


def measure_all(arms: Iterable[Arm], out: Path, processes: int) -> list[dict]:
    """Run the arms that `out` does not have. Returns all of its rows."""
    rows = read_rows(out)
    write(out, rows)  # without a last line that was cut off
    if not any(row["group"] == "reference" for row in rows):
        append(out, start())
    done = {row["key"] for row in rows if row["group"] != "reference"}
    missing = [arm for arm in arms if arm.key not in done]
    console.print(f"{out}: {len(missing)} arms to run, {len(done)} are there")
    for number, row in enumerate(results(missing, processes), 1):
        append(out, row)
        names = ("proxy", "gold", "valid", "kl_pi_ref_sequence")
        numbers = "  ".join(f"{name} {row['final'][name]:.4g}" for name in names)
        console.print(
            f"{number:3d} of {len(missing)}  {row['key']:16s}  {numbers}  "
            f"{row['wall_seconds']:.0f} s  {row['samples'][0][:48]}"
        )
    return read_rows(out)


def write(out: Path, rows: Sequence[dict]) -> None:
    """Replace the file of results, at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, out)


def append(out: Path, row: dict) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the grid and print its tables. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.question.grid", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the corners at 16 epochs, one seed")
    parser.add_argument("--processes", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/question/arms.jsonl"))
    args = parser.parse_args(argv)
    try:
        prepare()
        arms = quick() if args.quick else grid(tuple(args.seeds))
        show(measure_all(arms, args.out, args.processes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = f"the arms that are done stay in {args.out}; the same command continues"
        print(f"interrupted: {advice}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
