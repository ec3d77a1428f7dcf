"""Score responses with text rewards: in chunks, in a pool of processes; failures are counted."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlkl.plugins import is_given, resolve
from rlkl.rewards import REWARDS, Reward, weighted_sum
from rlkl.rewards.pool import Failure, Pool
from rlkl.rewards.text import (
    Row,
    TextReward,
    Value,
    call_plain,
    load_all,
    load_reward,
    load_task,
    score_in_worker,
    score_rows,
    short_repr,
)
from rlkl.types import Batch, Example

MAX_PROCESSES = 8  # by default
MAX_CHUNK = 64  # responses that travel to a worker together


class Scoring:
    """The text rewards of a run and the processes that run them. A context manager.

    A response has `seconds`, and so has a call of a TRL-style function, which scores all responses
    at once. Responses travel in chunks. If a chunk fails, its responses are scored again one by
    one, so that a response can only fail itself.

    The time limit is all that depends on the machine: a function that is pure and not near the
    limit gives every run the same scores. A function that `rlkl.train` was given is in no file that
    a process could load: it runs in this process, without limits.
    """

    def __init__(
        self,
        processes: int | None,
        seconds: float,
        failed: float,
        memory_gb: float,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        """processes: None is one per CPU, at most 8; 0 scores in this process, without limits.

        failed: the score of a response whose scoring fails. steps: of the run. say(line) prints.
        """
        self.failed = failed
        self.say = say
        self.shown: set[tuple[str, str]] = set()  # (reward, kind of failure)
        self.trainer_state = SimpleNamespace(global_step=0, max_steps=steps)  # for TRL's functions
        self.sources: list[tuple[Callable, Mapping[str, Any]]] = []  # what a worker loads
        self.loaded: list[TextReward] = []  # the same, loaded in this process
        self.processes = min(os.cpu_count() or 1, MAX_PROCESSES) if processes is None else processes
        initialize = functools.partial(load_all, self.sources)
        self.pool = Pool(self.processes, seconds, memory_gb, initialize)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def reward(self, spec: Mapping[str, Any]) -> Reward | None:
        """The text reward that a section names; None if it takes the Batch.

        Raises UserError as `resolve` does.
        """
        text_reward = load_reward(spec)
        return None if text_reward is None else self.add(load_reward, spec, text_reward)

    def task(
        self, spec: Mapping[str, Any], score: Callable[[Example, str], float | dict[str, float]]
    ) -> Reward:
        """The score of a task from a file, as a reward."""
        return self.add(load_task, spec, TextReward(score, call_plain, all_rows=False))

    def add(self, loader: Callable, spec: Mapping[str, Any], text_reward: TextReward) -> Reward:
        """Take in a text reward, and return it as a Reward. loader(spec) loads it in a worker."""
        index = len(self.loaded)
        self.sources.append((loader, spec))
        self.loaded.append(text_reward)

        def reward(
            examples: Sequence[Example], responses: Sequence[str], batch: Batch
        ) -> tuple[list[float | None], dict[str, Tensor]]:
            columns = zip(examples, responses, batch.responses(), strict=True)
            rows = [Row(example, response, ids) for example, response, ids in columns]
            return scores_and_parts(self.values(index, rows), self.failed)

        return reward

    def values(self, index: int, rows: Sequence[Row]) -> list[Value]:
        """The values that the text reward of this index gives to the rows."""
        text_reward = self.loaded[index]
        if not self.processes or is_given(self.sources[index][1]["name"]):
            values = score_rows(text_reward, rows, self.trainer_state)
        elif text_reward.all_rows:
            values = self.score_chunks(index, [rows])
        else:
            values = self.score_by_row(index, rows)
        self.show_failures(index, values, rows)
        return values

    def score_by_row(self, index: int, rows: Sequence[Row]) -> list[Value]:
        """About four chunks for each process; the rows of a chunk that failed are tried alone."""
        size = max(1, min(MAX_CHUNK, len(rows) // (4 * self.processes)))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        values = self.score_chunks(index, chunks)
        if size > 1:
            failed = [i for i, value in enumerate(values) if isinstance(value, Failure)]
            alone = self.score_chunks(index, [[rows[i]] for i in failed])
            for i, value in zip(failed, alone, strict=True):
                values[i] = value
        return values

    def score_chunks(self, index: int, chunks: Sequence[Sequence[Row]]) -> list[Value]:
        """One value per row. The Failure of a chunk is that of each of its rows."""
        calls = [(index, chunk, self.trainer_state) for chunk in chunks]
        values: list[Value] = []
        for chunk, result in zip(chunks, self.pool.run(score_in_worker, calls), strict=True):
            values += [result] * len(chunk) if isinstance(result, Failure) else result
        return values

    def show_failures(self, index: int, values: Sequence[Value], rows: Sequence[Row]) -> None:
        """Print the first failure of each kind."""
        name = self.sources[index][1]["name"]
        for value, row in zip(values, rows, strict=True):
            if not isinstance(value, str):
                continue
            kind = (name, value.partition(":")[0])
            if kind not in self.shown:
                self.shown.add(kind)
                self.say(
                    f"{name} {value}, for the response {short_repr(row.response)} to "
                    f"{short_repr(row.example.prompt)}: it scores {self.failed:g}; rewards/failed "
                    "counts such responses"
                )


def scores_and_parts(
    values: Sequence[Value], failed: float
) -> tuple[list[float | None], dict[str, Tensor]]:
    """Scores, None where nothing applies, and named parts, (B,) each, NaN where there are none.

    The part `failed` is 1 where scoring failed, and such a response scores `failed`.
    """
    scores: list[float | None] = []
    for value in values:
        if isinstance(value, dict):
            scores.append(sum(value.values()))
        else:
            scores.append(failed if isinstance(value, str) else None)
    names = dict.fromkeys(name for v in values if isinstance(v, dict) for name in v)
    parts = {name: torch.tensor([part_of(value, name) for value in values]) for name in names}
    has_failed = torch.tensor([float(isinstance(value, str)) for value in values])
    return scores, (parts if len(parts) > 1 else {}) | {"failed": has_failed}


def part_of(value: Value, name: str) -> float:
    """A named part of a value: 0 where only this part is missing, NaN where there are no parts."""
    return value.get(name, 0.0) if isinstance(value, dict) else torch.nan


# ------------------------------------------------------------------ the `reward:` section


def unweighted(section: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's section without its weight: its name and its own options."""
    return {key: value for key, value in section.items() if key != "weight"}


def assemble(sections: Sequence[Mapping[str, Any]], task: Reward, scoring: Scoring) -> Reward:
    """The reward of a list of sections: their weighted sum.

    Each part is named like its function, with a number where several have one name. task: the
    reward that the name `task` stands for. Raises UserError as `resolve` does.
    """
    table = REWARDS | {"task": task}
    rewards: list[tuple[str, float, Reward]] = []
    for section in sections:
        spec = unweighted(section)
        text_reward = scoring.reward(spec) if ":" in spec["name"] else None
        reward = text_reward or resolve(spec, table, "reward")
        name = part_name(spec["name"], [other for other, _, _ in rewards])
        rewards.append((name, section.get("weight", 1.0), reward))
    if len(rewards) == 1 and rewards[0][1] == 1:
        return rewards[0][2]
    return weighted_sum(rewards)


def part_name(reward: str, taken: Sequence[str]) -> str:
    """`f` for file.py:f; `f-2`, `f-3`, … where that name is taken."""
    name = reward.rpartition(":")[2]
    if name not in taken:
        return name
    same = [other for other in taken if other.partition("-")[0] == name]
    return f"{name}-{len(same) + 1}"
