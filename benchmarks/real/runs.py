"""`make real`: every run on the pre-trained model, and the page about them.

    python -m benchmarks.real.runs [--processes 2] [--only PATTERN]

Each run is a process of one thread, and has a folder of its own in runs/real. A run that is done
there is not run again; one that was stopped begins anew. When all are done, their numbers are
written to benchmarks/results/real.json, and the pages are filled from them.

It is an error if GRPO or PPO gains less than GAIN held out, or if the control gains as much.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import processor
from benchmarks.pages import fill
from benchmarks.parallel import as_they_end
from benchmarks.real.model import LINK, prepare
from benchmarks.real.page import PAGES, sections
from rlkl.cli.report import summarise
from rlkl.cli.run_commands import find_run
from rlkl.errors import UserError, exit_code
from rlkl.plugins import resolve
from rlkl.policy.model import load, sampling_params
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sampling import decode, draw_uniforms, generate
from rlkl.run import config, report, reward_hacking
from rlkl.run import folder as run_folder
from rlkl.run.build import Models
from rlkl.run.checkpoint import newest
from rlkl.run.log import read_rows
from rlkl.run.schema import Config
from rlkl.run.seeds import generator, sample_examples
from rlkl.run.terminal import console
from rlkl.tasks import TASKS
from rlkl.types import Example

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
FOLDER = Path("runs/real")
GAIN = 0.15  # in held-out accuracy: what GRPO and PPO gain from every seed, and the control not
SAMPLES = 3  # held-out responses that the page shows, before and after training
CURVES = (  # metrics of each step that are kept
    *("reward", "response_length", "entropy", "kl_pi_ref_sequence", "ref_logprob"),
    *("eval/accuracy", "tokens", "seconds"),
)


class Run(NamedTuple):
    """One run: the name of its folder, its configuration and the options that differ."""

    name: str
    config: str
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def done(self) -> bool:
        """Are all its steps done? The last thing that a run writes is its report."""
        return (self.folder / "report.md").is_file()

    @property
    def arguments(self) -> list[str]:
        """The arguments of train.py."""
        return [f"configs/{self.config}.yaml", *self.options, f"run={self.folder}"]


RUNS = (  # the longest first, so that no process waits long for another at the end
    Run("ppo", "real-ppo"),
    Run("replies", "real-replies"),
    Run("replies-kl-low", "real-replies", ("kl_ref.coef=0.05",)),
    Run("replies-kl-off", "real-replies", ("kl_ref.coef=0",)),
    Run("grpo-0", "real-grpo", ("seed=0",)),
    Run("grpo-1", "real-grpo", ("seed=1",)),
    Run("grpo-2", "real-grpo", ("seed=2",)),
    Run("grpo-shuffled", "real-grpo", ("advantage=tests/shuffled.py:grpo",)),
)
COMPARED = ("replies", "replies-kl-low", "replies-kl-off")  # what `rlkl report` puts side by side


# ------------------------------------------------------------------ running


def start(run: Run) -> Run:
    """Train one run in a process of one thread. UserError with its last line if it fails."""
    shutil.rmtree(run.folder, ignore_errors=True)  # left by a run that was stopped
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", *run.arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not run.done:  # also after an interrupt, which train.py survives
        reason = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
        raise UserError(f"python train.py {' '.join(run.arguments)}: {reason}")
    minutes = round((time.monotonic() - began) / 60, 1)
    (run.folder / "minutes.json").write_text(json.dumps(minutes), encoding="utf-8")
    return run


def start_all(runs: Sequence[Run], processes: int) -> Iterator[Run]:
    """Each run when it is done; `processes` of them at a time."""
    with ThreadPoolExecutor(processes) as pool:
        yield from as_they_end(pool, start, runs)


# ------------------------------------------------------------------ results


def row(run: Run) -> dict[str, Any]:
    """What a finished run found: its numbers held out, its curves, and some of its responses."""
    heldout = json.loads((run.folder / "heldout.json").read_text(encoding="utf-8"))
    before, after = heldout["before"], heldout["after"]
    steps = read_rows(run.folder / "metrics.jsonl")
    provenance = json.loads((run.folder / "provenance.json").read_text(encoding="utf-8"))
    return {
        "name": run.name,
        "config": run.config,
        "options": list(run.options),
        "minutes": json.loads((run.folder / "minutes.json").read_text(encoding="utf-8")),
        "found": {name: [before[name], after[name]] for name in after},
        "hacking": reward_hacking.episodes(steps, before),
        "curves": {
            name: [float(f"{step[name]:.4g}") for step in steps if name in step] for name in CURVES
        },
        "samples": samples(run),
        "git": provenance["git"],
        "clean": provenance["clean"],
    }


def samples(run: Run) -> list[dict[str, str]]:
    """SAMPLES held-out prompts, with the responses before and after training."""
    cfg = config.load(run.arguments)
    task = resolve(cfg.task, TASKS, "task")("heldout")
    examples = sample_examples(task.examples, SAMPLES, seed=0, step=0)
    models = {"before": str(LINK), "after": str(newest(run.folder))}
    texts = {when: responses(model, examples, cfg) for when, model in models.items()}
    return [
        {"prompt": example.prompt[-1]["content"]} | {when: texts[when][i] for when in models}
        for i, example in enumerate(examples)
    ]


def responses(model: str, examples: list[Example], cfg: Config) -> list[str]:
    """One response to each example, sampled as in a rollout, from the same uniforms each time."""
    policy, tokenizer = load(model)
    params = sampling_params(policy, tokenizer, cfg.sampling.temperature)
    rng = generator(0, 0, "samples")
    uniforms = draw_uniforms(len(examples), cfg.sampling.max_new_tokens, rng, "cpu")
    models = Models(policy, tokenizer, SAMPLERS["engine"], params)
    return decode(tokenizer, generate(models, examples, uniforms, params))


def comparison() -> list[list[str]]:
    """The table that `rlkl report` prints of the runs that are COMPARED."""
    by_name = {run.name: run for run in RUNS}
    return report.comparison([summarise(find_run(str(by_name[n].folder))) for n in COMPARED])


def write(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the file of results, and return what it holds."""
    where = run_folder.provenance("make real") | {"device": processor()}
    results = {"where": where, "rows": rows, "report": comparison()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each run on the sentiment of reviews that does not show what it should."""
    lines = []
    for row in rows:
        before, after = row["found"]["accuracy"]
        gained = after - before >= GAIN
        is_control = "shuffled" in row["name"]
        if row["config"] in ("real-grpo", "real-ppo") and gained == is_control:
            lines.append(f"{row['name']}: {before:.3f} → {after:.3f}")
    return lines


def main(argv: list[str]) -> None:
    """Make the model, run what is missing, write the results and fill the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    args = parser.parse_args(argv)
    prepare()
    missing = [run for run in RUNS if re.search(args.only, run.name) and not run.done]
    console.print(f"{FOLDER}: {len(missing)} of {len(RUNS)} runs to do")
    for run in start_all(missing, args.processes):
        heldout = json.loads((run.folder / "heldout.json").read_text(encoding="utf-8"))
        before, after = (heldout[when]["accuracy"] for when in ("before", "after"))
        console.print(f"{run.name}: {before:.3f} → {after:.3f}")
    not_done = [run.name for run in RUNS if not run.done]
    if not_done:
        raise UserError(f"the pages were not changed: not yet run: {', '.join(not_done)}")
    results = write([row(run) for run in RUNS])
    fill(PAGES, sections(results))
    failed = failures(results["rows"])
    if failed:
        raise UserError(f"not what should be learned: {'; '.join(failed)}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
