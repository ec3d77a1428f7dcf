"""The picture of docs/rollout.md, from a real run of the engine: python -m benchmarks.slots"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from benchmarks.rollout import Setting, Work, qwen2
from rlkl.rollout.engine import Run
from rlkl.rollout.sample import sampling_mode

SLOTS, GROUP, COLORS = 8, 4, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
WORK = Work("picture", qwen2(64, 2, 4, 2, 512, 192), 6, GROUP, 64, (3, 20))


class Watched(Run):
    """A run that writes down which row each slot decodes at each step."""

    def step(self, slots: int, reach: int) -> None:
        rows = self.row[:slots].tolist()
        self.history = [*getattr(self, "history", []), rows]
        super().step(slots, reach)


def main() -> None:
    torch.manual_seed(0)
    setting = Setting(WORK, ragged=True)
    with sampling_mode(setting.policy):
        run = Watched(setting.policy, setting.prompts, setting.uniforms(3), setting.rule, SLOTS, None)
        run.to_the_end(1, graphs=False, compile=False)
    lengths = run.length[:-1].tolist()
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for step, rows in enumerate(run.history):
        for slot, row in enumerate(rows):
            top.barh(slot, 1, left=step, height=0.8, color=COLORS[row // GROUP])
    for slot in range(SLOTS):  # a line where a slot changes hands
        for step in range(1, len(run.history)):
            before, now = (h[slot] if slot < len(h) else None for h in run.history[step - 1 : step + 1])
            if before != now:
                top.plot([step, step], [slot - 0.4, slot + 0.4], color="black", lw=1)
    start = 0
    for first in range(0, len(lengths), SLOTS):
        batch = lengths[first : first + SLOTS]
        for slot, length in enumerate(batch):
            bottom.barh(slot, max(batch), left=start, height=0.8, color="#dddddd")
            bottom.barh(slot, length, left=start, height=0.8, color=COLORS[(first + slot) // GROUP])
        start += max(batch)
    work = sum(map(len, run.history))
    top.set_title(f"engine: {len(lengths)} replies, {SLOTS} slots: {len(run.history)} steps, "
                  f"{sum(lengths)} tokens in {work} slot-steps", loc="left", fontsize=10)
    bottom.set_title(f"in batches, as long as the slowest reply: {start} steps, {SLOTS * start} slot-steps",
                     loc="left", fontsize=10)
    bottom.set_xlabel(f"steps; one colour a prompt, {GROUP} replies each; grey: a slot that waits", fontsize=9)
    for axis in (top, bottom):
        axis.set_ylabel("slot", fontsize=9)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/slots.png", dpi=110)


if __name__ == "__main__":
    main()
