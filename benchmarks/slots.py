"""The picture of docs/rollout.md, from a real run of the engine: python -m benchmarks.slots"""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rollout import Setting, Work
from benchmarks.synthetic import qwen2
from rlkl.rollout.engine import ContinuousBatch
from rlkl.rollout.sampling import sampling_mode

SLOTS = 8
GROUP = 4
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")  # one per prompt
WORK = Work("picture", qwen2(64, 2, 4, 2, 512, 192), 6, GROUP, 64, (3, 20))


class RecordedBatch(ContinuousBatch):
    """A batch that records which row each slot decodes at each step."""

    def step(self, max_length: int) -> None:
        rows = self.state.slot_row[: len(self.running)].tolist()
        self.history = [*getattr(self, "history", []), rows]
        super().step(max_length)


def main() -> None:
    """Write docs/slots.png."""
    torch.manual_seed(0)
    setting = Setting(WORK, ragged=True)
    with sampling_mode(setting.policy):
        run = RecordedBatch(
            setting.policy, setting.prompts, setting.uniforms(3), setting.params, SLOTS
        )
        run.decode(1)
    lengths = run.state.lengths[:-1].tolist()
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    draw_engine(top, run.history, lengths)
    draw_batches(bottom, lengths)
    for axes in (top, bottom):
        axes.set_ylabel("slot", fontsize=9)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/slots.png", dpi=110)


def draw_engine(axes: Axes, history: list[list[int]], lengths: list[int]) -> None:
    """The rows that the slots decoded. history: for each step, the row of each slot."""
    for step, rows in enumerate(history):
        for slot, row in enumerate(rows):
            axes.barh(slot, 1, left=step, height=0.8, color=COLORS[row // GROUP])
    for step in range(1, len(history)):
        for slot in range(SLOTS):  # a line where a slot takes a new row
            if row_at(history, step, slot) != row_at(history, step - 1, slot):
                axes.plot([step, step], [slot - 0.4, slot + 0.4], color="black", lw=1)
    slot_steps = sum(len(rows) for rows in history)
    axes.set_title(
        f"engine: {len(lengths)} responses, {SLOTS} slots: {len(history)} steps, "
        f"{sum(lengths)} tokens in {slot_steps} slot-steps",
        loc="left",
        fontsize=10,
    )


def row_at(history: list[list[int]], step: int, slot: int) -> int | None:
    """The row that a slot decodes at a step; None if the slot is empty."""
    return history[step][slot] if slot < len(history[step]) else None


def draw_batches(axes: Axes, lengths: list[int]) -> None:
    """The same responses in batches of SLOTS rows, each as long as its longest response."""
    start = 0
    for first in range(0, len(lengths), SLOTS):
        batch = lengths[first : first + SLOTS]
        for slot, length in enumerate(batch):
            color = COLORS[(first + slot) // GROUP]
            axes.barh(slot, max(batch), left=start, height=0.8, color="#dddddd")
            axes.barh(slot, length, left=start, height=0.8, color=color)
        start += max(batch)
    axes.set_title(
        f"in batches, as long as the slowest response: {start} steps, {SLOTS * start} slot-steps",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel(
        f"steps; one colour per prompt, {GROUP} responses each; grey: a slot that waits", fontsize=9
    )


if __name__ == "__main__":
    main()
