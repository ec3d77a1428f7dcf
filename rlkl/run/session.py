"""What surrounds the loop: progress, log, held-out evaluation, checkpoints, interrupts, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Generator

from rlkl.errors import UserError
from rlkl.run import checkpoint, learning_signal, report, reward_hacking
from rlkl.run.build import Data, Models
from rlkl.run.dynamic_sampling import prompt_order
from rlkl.run.evaluate import evaluate
from rlkl.run.folder import open_folder
from rlkl.run.live_plot import LivePlot
from rlkl.run.log import RunLog, read_rows
from rlkl.run.schema import Config
from rlkl.run.seeds import step_generator
from rlkl.run.selfcheck import selfcheck
from rlkl.run.state import State
from rlkl.run.terminal import (
    Interrupt,
    StepTable,
    log_before_after,
    log_heldout,
    log_line,
    log_reward_hacking,
    log_sample,
    note,
    progress,
)


class Session:
    """A run: what `open_run` makes, and what `rlkl.train` returns when it is done.

    folder: where everything is written. rows: the metrics of each step. before, after: held-out
    metrics, {} where they are not measured yet. last_checkpoint: a Hugging Face directory.
    """

    def __init__(self, cfg: Config, models: Models, data: Data, state: State, folder: Path) -> None:
        self.cfg = cfg
        self.models = models
        self.data = data
        self.state = state
        self.folder = folder
        self.log = RunLog(
            folder,
            asdict(cfg),
            wandb_mode=cfg.log.wandb,
            project=cfg.log.project,
            start=state.step,
        )
        rows = read_rows(self.log.path)
        self.rows = [{k: x for k, x in row.items() if k != "sample"} for row in rows]
        self.interrupt = Interrupt()
        self.table = StepTable()
        self.plot = LivePlot()
        self.show_done: Callable[[int], None]  # moves the progress bar; set by open_run
        self.last_checkpoint: Path  # set by save, which every run ends with
        self.after: dict[str, float] = {}

    @property
    def before(self) -> dict[str, float]:
        return self.state.before

    @property
    def model(self) -> Any:
        """The trained Hugging Face model."""
        return self.models.policy.lm

    @property
    def tokenizer(self) -> Any:
        return self.models.tokenizer

    def steps(self) -> Iterator[tuple[list[int], Generator]]:
        """The inputs of each step, until all are done or an interrupt comes: see step_inputs."""
        while self.continues():
            yield step_inputs(self.cfg, self.data, self.state)

    def continues(self) -> bool:
        """Is there another step to do? Tells reward functions its number, too.

        Raises UserError after too many updates in a row that were not finite.
        """
        if self.state.skips >= self.cfg.optim.max_skips:
            raise UserError(
                f"{self.state.skips} updates in a row had a loss or a gradient that is not finite: "
                "try a smaller optim.lr, a longer optim.warmup, or "
                "model.dtype=float32"
            )
        self.data.scoring.trainer_state.global_step = self.state.step
        return self.state.step < self.cfg.optim.steps and not self.interrupt.asked

    def finish_step(self, metrics: dict[str, float], responses: list[dict[str, Any]]) -> None:
        """Count the step, evaluate and save where it is time to, and log metrics and responses."""
        state, cfg = self.state, self.cfg
        state.step += 1
        save = is_time(state.step, cfg.checkpoint.every)
        try:
            if is_time(state.step, cfg.eval.every):
                heldout = self.evaluate(samples=1)
                metrics |= {f"eval/{name}": x for name, x in heldout.items()}
                log_heldout(f"after step {state.step}", heldout)
                if heldout["accuracy"] > state.best_accuracy:
                    state.best_accuracy, state.best_step = heldout["accuracy"], state.step
                    save = True
        finally:  # also where a task fails to grade: the step is done, and open_run saves it
            self.log_step(metrics, responses)
        if save:
            self.save()
        self.show_done(state.step)

    def log_step(self, metrics: dict[str, float], responses: list[dict[str, Any]]) -> None:
        """Write what a step came to, and print it where it is time to."""
        step, log = self.state.step, self.cfg.log
        sample = {name: responses[0][name] for name in ("prompt", "response", "score")}
        self.rows.append({"step": step, **metrics})
        suspicion = reward_hacking.suspicion(self.rows, self.before)
        self.rows[-1]["reward_hacking"] = float(suspicion is not None)
        self.log.write(self.rows[-1], sample)
        if is_time(step, log.responses_every):
            self.log.write_responses(step, responses)
        if suspicion and reward_hacking.is_news(self.rows):
            log_reward_hacking(step, suspicion)
        if no_signal := learning_signal.warning(self.rows, sample):
            note(no_signal)
        if is_time(step, log.every) or step == 1:
            self.log.send_responses(step, responses)
            self.show_step(metrics, sample)

    def show_step(self, metrics: dict[str, float], sample: dict[str, Any]) -> None:
        """Print a row of metrics and a sample, and draw the figure where that is asked for."""
        self.table.print(self.state.step, metrics)
        log_sample(sample)
        if self.cfg.log.plot:
            self.plot.show(self.rows, self.before)

    def evaluate(self, samples: int) -> dict[str, float]:
        return evaluate(self.cfg, self.models, self.data.heldout, samples=samples)

    def evaluate_whole(self, when: str) -> dict[str, float]:
        """The held-out numbers of `eval.samples` responses each. Says first what takes so long."""
        prompts, samples = len(self.data.heldout.examples), self.cfg.eval.samples
        log_line(f"evaluating {when}: {prompts} held-out prompts, {samples} responses each")
        return self.evaluate(samples=samples)

    def save(self) -> Path:
        """Write a checkpoint, and delete those that are no longer kept."""
        models, state = self.models, self.state
        path = checkpoint.save(
            self.folder,
            state.step,
            models.policy,
            models.tokenizer,
            models.optimizer,
            asdict(state),
        )
        checkpoint.prune(self.folder, self.cfg.checkpoint.keep, state.best_step)
        self.last_checkpoint = path
        return path

    def finish(self) -> None:
        """Save, and if all steps are done, evaluate and write the report."""
        path = self.save()
        cfg, state = self.cfg, self.state
        if state.step < cfg.optim.steps:
            resume = f"rlkl train resume={self.folder} continues"
            log_line(f"stopped after step {state.step}: {resume}")
            return
        self.after = self.evaluate_whole("after training")
        count = len(self.data.heldout.examples)
        title = f"{count} held-out prompts, temperature {cfg.eval.temperature:g}"
        log_before_after(state.before, self.after, title)
        report.write(self.folder, read_rows(self.log.path), state.before, self.after)
        log_line(f"report: {self.folder / 'report.md'}\nmodel: {path}")


@contextmanager
def open_run(cfg: Config, command: str, models: Models, data: Data) -> Iterator[Session]:
    """The run folder, new or resumed, and everything around the steps; closed when the loop ends.

    command: how the run was started. After a UserError inside, the steps that are done are saved,
    and the message says how to resume.
    """
    with data.scoring:  # its processes end with the run, however that ends
        state = restore_state(cfg, models)
        log_line(selfcheck(cfg, models, data, fresh=cfg.resume is None))
        if cfg.resume is None:
            log_line(learning_signal.describe_scores(cfg, models, data))
        session = Session(cfg, models, data, state, open_folder(cfg, command))
        prompts = f"{len(data.train)} prompts, {len(data.heldout.examples)} held out"
        log_line(f"run: {session.folder}   {prompts}")
        state.before = state.before or session.evaluate_whole("before training")
        log_heldout("before training", state.before)
        bar = progress("training", cfg.optim.steps, done=state.step)
        try:
            with session.interrupt, bar as session.show_done:
                yield session
        except UserError as error:
            session.save()
            kept = f"step {state.step} is kept: resume={session.folder} continues"
            raise UserError(f"{error}; {kept}") from error
        finally:
            session.log.close()
        session.finish()


def restore_state(cfg: Config, models: Models) -> State:
    """A fresh state, or that of the newest checkpoint, with its optimizer and critic."""
    start = checkpoint.newest(Path(cfg.resume)) if cfg.resume else None
    if start is None:
        return State(cfg.kl_ref.coef, cfg.kl_old.coef)
    return State(**checkpoint.restore(start, models.policy, models.optimizer))


def step_inputs(cfg: Config, data: Data, state: State) -> tuple[list[int], Generator]:
    """The training prompts of a step, by index, and the generator of all its randomness.

    The first N are the step's prompts; behind them are those that dynamic sampling may take.
    """
    rounds = 1 + cfg.sampling.resample_rounds * (cfg.sampling.zero_variance == "resample")
    order = prompt_order(cfg, len(data.train), state)
    prompts = list(islice(order, rounds * cfg.sampling.prompts))
    return prompts, step_generator(cfg.seed, state.step)


def is_time(step: int, every: int) -> bool:
    """Is this a step of every so many? Never where `every` is 0."""
    return bool(every) and step % every == 0
