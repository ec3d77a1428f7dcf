"""Text rewards at work: replies go out to the pool in chunks, scores come back, failures are counted and shown."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlkl.config import resolve
from rlkl.rewards import REWARDS, Reward, weighted
from rlkl.rewards.pool import Failure, Pool
from rlkl.rewards.text import Row, Text, Value, load_reward, load_task, of_a_reply, prepare, score, shortened, work
from rlkl.types import Batch, Example


class Scoring:
    """The text rewards of a run, in `processes` of their own; 0 = in this one, without a limit. A context manager.

    Each reply has `seconds`, and so has each call of a TRL-style function, which judges all replies at once. Replies
    travel in chunks; one whose chunk fails is tried alone, so that it can only fail itself. The time limit is all that
    depends on the machine: a function that is pure, and not near the limit, gives every run the same scores.
    """

    def __init__(self, processes: int | None, seconds: float, failed: float, memory_gb: float, steps: int,
                 say: Callable[[str], None]) -> None:
        self.failed, self.say, self.shown = failed, say, set()
        self.trainer_state = SimpleNamespace(global_step=0, max_steps=steps)  # what TRL's functions may ask for
        self.sources: list[tuple[Callable, Mapping[str, Any]]] = []  # what a worker loads
        self.texts: list[Text] = []  # the same, loaded here
        self.processes = min(os.cpu_count() or 1, 8) if processes is None else processes
        self.pool = Pool(self.processes, seconds, memory_gb, functools.partial(prepare, self.sources))

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def reward(self, spec: Mapping[str, Any]) -> Reward | None:
        """The text reward that a section names; None if it takes the Batch. UserError as resolve."""
        text = load_reward(spec)
        return None if text is None else self.add(load_reward, spec, text)

    def task(self, spec: Mapping[str, Any], judge: Callable[[Example, str], float | dict[str, float]]
             ) -> tuple[Reward, Callable[[Example, str], float]]:
        """The score of a task from a file, `judge`: as a reward, and as a function of one (example, reply)."""
        index, reward = len(self.texts), self.add(load_task, spec, Text(judge, of_a_reply, together=False))

        def one(example: Example, reply: str) -> float:
            scores, _ = summed(self.values(index, [Row(example, reply)]), self.failed)
            return scores[0] or 0.0

        return reward, one

    def add(self, loader: Callable, spec: Mapping[str, Any], text: Text) -> Reward:
        index = len(self.texts)
        self.sources.append((loader, spec))
        self.texts.append(text)

        def reward(examples: Sequence[Example], replies: Sequence[str], batch: Batch
                   ) -> tuple[list[float | None], dict[str, Tensor]]:
            rows = [Row(*x) for x in zip(examples, replies, batch.replies(), strict=True)]
            return summed(self.values(index, rows), self.failed)

        return reward

    def values(self, index: int, rows: Sequence[Row]) -> list[Value]:
        together = self.texts[index].together
        if not self.processes:
            values = score(self.texts[index], rows, self.trainer_state)
        else:
            size = len(rows) if together else max(1, min(64, len(rows) // (4 * self.processes)))
            values = self.sent(index, [rows[i : i + size] for i in range(0, len(rows), size)])
            if not together and size > 1:
                suspects = [i for i, value in enumerate(values) if isinstance(value, Failure)]
                for i, value in zip(suspects, self.sent(index, [[rows[i]] for i in suspects]), strict=True):
                    values[i] = value
        self.show(index, values, rows)
        return values

    def sent(self, index: int, chunks: Sequence[Sequence[Row]]) -> list[Value]:
        """Through the pool; a Failure of a chunk is that of each of its rows."""
        results = self.pool.run(work, [(index, chunk, self.trainer_state) for chunk in chunks])
        return [value for chunk, result in zip(chunks, results, strict=True)
                for value in ([result] * len(chunk) if isinstance(result, Failure) else result)]

    def show(self, index: int, values: Sequence[Value], rows: Sequence[Row]) -> None:
        """One line for the first failure of each kind."""
        name = self.sources[index][1]["name"]
        for value, row in zip(values, rows, strict=True):
            if isinstance(value, str) and (kind := (name, value.partition(":")[0])) not in self.shown:
                self.shown.add(kind)
                self.say(f"{name} {value}, for the reply {shortened(row.reply)} to {shortened(row.example.prompt)}: "
                         f"it scores {self.failed:g}; reward/failed counts such replies")


def summed(values: Sequence[Value], failed: float) -> tuple[list[float | None], dict[str, Tensor]]:
    """Scores, None where nothing applies; the named parts, NaN where there are none; and which failed."""
    names = dict.fromkeys(name for v in values if isinstance(v, dict) for name in v)
    parts = {name: torch.tensor([v.get(name, 0.0) if isinstance(v, dict) else torch.nan for v in values])
             for name in names}
    scores = [sum(v.values()) if isinstance(v, dict) else failed if isinstance(v, str) else None for v in values]
    broken = torch.tensor([float(isinstance(v, str)) for v in values])
    return scores, (parts if len(parts) > 1 else {}) | {"failed": broken}


def unweighted(section: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a reward and the options that are its own."""
    return {key: value for key, value in section.items() if key != "weight"}


def assemble(sections: Sequence[Mapping[str, Any]], task: Reward, scoring: Scoring) -> Reward:
    """The reward of a list of sections: the weighted sum of them, each named like its function."""
    table, rewards = REWARDS | {"task": task}, {}
    for section in sections:
        spec = unweighted(section)
        name = here = spec["name"].rpartition(":")[2]
        while here in rewards:
            here = f"{name}-{sum(other.startswith(name) for other in rewards) + 1}"
        text = scoring.reward(spec) if ":" in spec["name"] else None
        rewards[here] = (section.get("weight", 1.0), text or resolve(spec, table, "reward"))
    ((weight, reward), *others) = rewards.values()
    return reward if not others and weight == 1 else weighted([(name, *x) for name, x in rewards.items()])
