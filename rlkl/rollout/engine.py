"""Continuous batching: a reply that ends leaves its slot to the next one, so that no row waits for the slowest.

A sample starts from the keys and values of its prompt, which was read once for all of its G samples, and feeds the
prompt's last token: there is one place that samples. A step (forward, pick, bookkeeping) is device code that never
waits for the host, on CUDA one graph. Every `sync_every` steps the host looks: it refills free slots, and closes gaps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from rlkl.model import Policy
from rlkl.rollout.cached import cached
from rlkl.rollout.one_pass import one_pass
from rlkl.rollout.sample import cut, sampling_mode
from rlkl.rollout.slots import Slots, Unsupported, attention_over_slots, dynamic_positions, prefill, unsupported
from rlkl.types import Batch, Sampling

SLOTS = {"cuda": 256}  # an H200 is bound by arithmetic from about 184 rows on
SYNC_EVERY = {"cuda": 16}  # steps; a look at the device costs next to nothing elsewhere
PREFILL_TOKENS = 16_384  # padded prompt tokens in one forward pass
FREE_SHARE = 0.7  # of the free device memory, for keys and values
FEWEST = 8  # slots of the smallest CUDA graph


def engine(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, rule: Sampling, *,
        slots: int | None = None, sync_every: int | None = None, max_kv_gb: float | None = None, graphs: bool = True,
        compile: bool = False) -> Batch:
    """(N, P) prompts, left-padded, and (B, T) uniforms, G = B // N → B sampled replies: the same tokens as `naive`.

    slots: replies decoded at once, at most what fits into `max_kv_gb` of keys and values, on CUDA into free memory.
    graphs: one CUDA graph for a step of each batch size. compile: torch.compile of the step.
    What slots cannot serve is left to `cached`, and one line says why.
    """
    device, group = policy.lm.device.type, len(uniforms) // len(prompt_ids)
    prompts = [ids[kept].tolist() for ids, kept in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]

    def sampled(slots: int, part: int = 1) -> Batch:
        with sampling_mode(policy):
            run = Run(policy, prompts, uniforms, rule, slots, max_kv_gb, part)
            run.to_the_end(sync_every or SYNC_EVERY.get(device, 4),
                           graphs=graphs and device == "cuda" and not dynamic_positions(policy), compile=compile)
            return run.batch(*(repeat(x, "n p -> (n g) p", g=group) for x in (prompt_ids, prompt_mask)))

    slots, why = slots or slots_on(device), unsupported(policy)
    try:
        if why is None:
            return sampled(slots)
    except Unsupported as error:
        why = str(error)
    except torch.OutOfMemoryError:
        say("sampling ran out of memory: once more with half the slots")
    if why is None:
        torch.cuda.empty_cache()
        return sampled(slots, part=2)
    say(f"sampling.backend=engine cannot serve {policy.lm.config.model_type} ({why}): sampled by cached instead")
    return cached(policy, prompt_ids, prompt_mask, uniforms, rule)


def slots_on(device: str) -> int:
    return SLOTS.get(device, 128)


@functools.cache
def say(line: str) -> None:
    """One line for the user, once."""
    logging.getLogger("rlkl").warning(line)


class Run:
    """Replies being decoded: what the device knows of each slot and each row, and what the host knows of each slot.

    A slot that has ended works on for an idle row, at position 0, until the host looks.
    """

    def __init__(self, policy: Policy, prompts: list[list[int]], uniforms: Tensor, rule: Sampling, slots: int,
            max_kv_gb: float | None, part: int = 1) -> None:
        """`part`: of the slots that there may be, only one in so many."""
        (rows, columns), device = uniforms.shape, uniforms.device
        self.policy, self.prompts, self.rule = policy, prompts, rule
        self.group, self.idle, self.columns = rows // len(prompts), rows, columns
        self.chunks = chunks(prompts)  # prompts still to be read
        self.ready: list[int] = []  # rows that wait for a slot, of prompts that have been read
        self.read()
        room = max(len(p) for p in prompts) + columns - 1  # the last token is not fed
        slots = max(min(slots, rows, self.affordable(room, max_kv_gb)) // part, 1)
        # of each row; the last one is the idle one
        self.uniforms = F.pad(uniforms, (0, 0, 0, 1))
        self.tokens = torch.full((rows + 1, columns), rule.pad_id, device=device)
        self.logprobs = torch.zeros(rows + 1, columns, device=device,
                                    dtype=torch.promote_types(policy.head.weight.dtype, torch.float32))
        self.length = torch.zeros(rows + 1, dtype=torch.long, device=device)
        # of each slot
        self.kv = Slots(len(self.store), slots, room, device)
        self.row = torch.full((slots,), self.idle, device=device)
        self.count, self.token = torch.zeros_like(self.row), torch.zeros_like(self.row)
        self.eos = torch.tensor(rule.eos_ids, device=device, dtype=torch.long)
        # what the host knows: the row that a slot decodes, None if it is free, and the step it began at
        self.running: list[int | None] = [None] * slots
        self.began, self.steps, self.slot_steps = [0] * slots, 0, 0

    def affordable(self, room: int, max_kv_gb: float | None) -> int:
        """How many slots the budget holds, one at least."""
        each = room * sum(x[0, 0].numel() * x.element_size() for pair in self.store for x in pair)
        budget = float("inf") if max_kv_gb is None else max_kv_gb * 1e9
        if self.store[0][0].is_cuda:
            held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            budget = min(budget, FREE_SHARE * (torch.cuda.mem_get_info()[0] + held))
        return max(int(min(budget / each, self.idle)), 1)

    def to_the_end(self, sync_every: int, graphs: bool, compile: bool) -> None:
        """Decode every row. With graphs, or compiled, a step attends over the whole room: its shapes stay the same."""
        fixed = graphs or compile
        step = torch.compile(self.step, fullgraph=True, dynamic=False) if compile else self.step
        replay = Graphs(step) if graphs else step
        while self.refill():
            self.close_gaps(halves=fixed)
            live = [i for i, row in enumerate(self.running) if row is not None]
            some = min(sync_every, max(self.columns - (self.steps - self.began[i]) for i in live))
            used = max(len(self.prompts[self.running[i] // self.group]) + self.steps - self.began[i] for i in live)
            with attention_over_slots(self.policy):
                for _ in range(some):
                    replay(len(self.running), self.kv.room if fixed else used + some)
            self.steps, self.slot_steps = self.steps + some, self.slot_steps + some * len(self.running)
            self.look()

    def step(self, slots: int, reach: int) -> None:
        """One more token for the first `slots` slots, none of which reads more than `reach` columns."""
        kv, row, count = self.kv, self.row[:slots], self.count[:slots]
        kv.begin(reach)
        hidden = self.policy.backbone(input_ids=self.token[:slots, None], position_ids=kv.position[:slots, None],
                                      past_key_values=kv, use_cache=True, slots=kv).last_hidden_state
        token, logprob = one_pass(self.policy.logits(hidden[:, -1]), self.uniforms[row, count], self.rule)
        self.tokens[row, count], self.logprobs[row, count], self.length[row] = token, logprob, count + 1
        goes_on = (token[:, None] != self.eos).all(1) & (count + 1 < self.columns) & (row != self.idle)
        self.row[:slots], self.token[:slots] = torch.where(goes_on, row, self.idle), token
        self.count[:slots] = torch.where(goes_on, count + 1, 0)
        kv.position[:slots] = torch.where(goes_on, kv.position[:slots] + 1, 0)

    def look(self) -> None:
        """The only wait for the device: which slots are still at work."""
        if self.rule.stop is not None:
            for slot, row in enumerate(self.running):
                if row is not None and self.rule.stop(self.reply(row)):
                    self.row[slot], self.count[slot], self.kv.position[slot] = self.idle, 0, 0
        self.running = [None if row == self.idle else row for row in self.row[: len(self.running)].tolist()]

    def reply(self, row: int) -> list[int]:
        return self.tokens[row, : self.length[row]].tolist()

    def refill(self) -> bool:
        """Start rows that wait in slots that are free. Is there anything left to decode?"""
        free = [i for i, row in enumerate(self.running) if row is None]
        while free and (self.ready or self.chunks):
            if not self.ready:
                self.read()
            some = min(len(free), len(self.ready))
            self.start(free[:some], self.ready[:some])
            free, self.ready = free[some:], self.ready[some:]
        return any(row is not None for row in self.running)

    def read(self) -> None:
        """Read the next prompts; their samples are ready to start."""
        chunk = self.chunks.pop(0)
        self.store = prefill(self.policy, [self.prompts[n] for n in chunk])
        self.place = {n: i for i, n in enumerate(chunk)}
        self.ready = [n * self.group + g for n in chunk for g in range(self.group)]

    def start(self, slots: list[int], rows: list[int]) -> None:
        """Each slot gets a copy of its prompt's keys and values, and the prompt's last token to feed."""
        of = [row // self.group for row in rows]
        slot, row, place, last, position = torch.tensor(
            [slots, rows, [self.place[n] for n in of], [self.prompts[n][-1] for n in of],
             [len(self.prompts[n]) - 1 for n in of]], device=self.row.device)
        self.kv.put(slot, self.store, place)
        self.row[slot], self.token[slot], self.kv.position[slot] = row, last, position
        self.count[slot] = 0
        for i, r in zip(slots, rows, strict=True):
            self.running[i], self.began[i] = r, self.steps

    def close_gaps(self, halves: bool) -> None:
        """Nothing waits any more: move the slots still at work to the front, and leave the others out."""
        live, size = sum(row is not None for row in self.running), len(self.running)
        while halves and size // 2 >= max(live, FEWEST):
            size //= 2
        size = size if halves else live
        to = [i for i in range(size) if self.running[i] is None]
        source = [i for i in range(size, len(self.running)) if self.running[i] is not None]
        if source:
            to = to[: len(source)]
            i, j = torch.tensor([to, source], device=self.row.device)
            self.kv.move(i, j)
            for x in (self.row, self.token, self.count):
                x[i] = x[j]
            for a, b in zip(to, source, strict=True):
                self.running[a], self.began[a] = self.running[b], self.began[b]
        self.running, self.began = self.running[:size], self.began[:size]

    def batch(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Batch:
        """All rows, as wide as the longest."""
        length = self.length[:-1]
        mask = torch.arange(int(length.max()), device=length.device) < length[:, None]
        tokens, logprobs = (x[:-1, : mask.shape[1]] for x in (self.tokens, self.logprobs))
        truncated = (tokens.gather(1, length[:, None] - 1) != self.eos).all(1)
        batch = Batch(prompt_ids, prompt_mask, tokens, mask, logprobs, truncated, self.rule.temperature or 1.0)
        return batch if self.rule.stop is None else cut(batch, self.rule)


class Graphs:
    """A step as one CUDA graph for each number of slots. They end with the run: so does the memory that they hold."""

    def __init__(self, step: Callable[[int, int], None]) -> None:
        self.step, self.pool = step, None
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, slots: int, reach: int) -> None:
        if slots in self.captured:
            self.captured[slots].replay()
            return
        side = torch.cuda.Stream()  # the first step is done here, which warms up; capturing does nothing but record
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(slots, reach)
        torch.cuda.current_stream().wait_stream(side)
        graph = self.captured[slots] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # wandb has threads
            self.step(slots, reach)
        self.pool = graph.pool()


def chunks(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts in the order in which they are read, longest first, cut by PREFILL_TOKENS padded tokens."""
    found: list[list[int]] = []
    for n in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
        if not found or (len(found[-1]) + 1) * len(prompts[found[-1][0]]) > PREFILL_TOKENS:
            found.append([])
        found[-1].append(n)
    return found
