"""Continuous batching: a slot whose response has ended takes the next one that waits.

So no response waits for the slowest of its batch. A prompt is read once (prefill) for all of its G
samples. Each sample starts in a slot from a copy of the prompt's keys and values and feeds the
prompt's last token. So every response token is sampled in one place, `ContinuousBatch.decode_step`.

A decoding step (forward, sampling, bookkeeping) is device code that never waits for the host; on
CUDA it is one graph. Every `sync_every` steps the host looks which slots have ended, fills them
again, and moves the running ones together when nothing waits any more.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from rlkl.policy.microbatches import pack_by_tokens
from rlkl.policy.policy import Policy
from rlkl.rollout.cached import cached
from rlkl.rollout.one_pass import one_pass
from rlkl.rollout.sampling import cut_at_stop, sampling_mode
from rlkl.rollout.slots import (
    SlotCache,
    Unsupported,
    attention_over_slots,
    batch_dependent_rope,
    prefill,
    unsupported,
)
from rlkl.types import Batch, SamplingParams

SLOTS = {"cuda": 256}  # an H200 is bound by arithmetic from about 184 rows on
SYNC_EVERY = {"cuda": 16}  # steps; on other devices a sync costs next to nothing
PREFILL_TOKENS = 16_384  # padded prompt tokens in one forward pass
FREE_SHARE = 0.7  # of the free device memory, for keys and values
MIN_GRAPH_SLOTS = 8  # slots of the smallest CUDA graph


def engine(
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
    *,
    slots: int | None = None,
    sync_every: int | None = None,
    max_kv_gb: float | None = None,
    graphs: bool = True,
    compile: bool = False,
) -> Batch:
    """Sample G = B // N responses to each of the (N, P) prompts, with (B, T) uniforms.

    The same tokens as `naive`. Models that slots cannot serve are sampled by `cached`, and one
    line says why. If memory runs out, everything is sampled again with half the slots.

    slots: responses decoded at once; fewer where memory holds fewer.
    sync_every: steps between two looks of the host.
    max_kv_gb: memory for keys and values in GB (1e9 bytes); on CUDA the free memory bounds it too.
    graphs: record the step as a CUDA graph, one for each batch size.
    compile: apply torch.compile to the step.
    """
    device = policy.lm.device.type
    group_size = len(uniforms) // len(prompt_ids)
    prompts = [
        ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)
    ]

    def decode_in_slots(slot_divisor: int = 1) -> Batch:
        with sampling_mode(policy):
            responses = ContinuousBatch(
                policy,
                prompts,
                uniforms,
                params,
                slots=slots or default_slots(device),
                max_kv_gb=max_kv_gb,
                slot_divisor=slot_divisor,
            )
            responses.decode(
                sync_every or SYNC_EVERY.get(device, 4),
                graphs=graphs and device == "cuda" and not batch_dependent_rope(policy),
                compile=compile,
            )
            return responses.batch(
                repeat(prompt_ids, "n p -> (n g) p", g=group_size),
                repeat(prompt_mask, "n p -> (n g) p", g=group_size),
            )

    reason = unsupported(policy)
    if reason is None:
        try:
            return decode_in_slots()
        except Unsupported as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            warn_once("sampling ran out of memory: once more with half the slots")
    # Outside the except clause: the exception would keep the memory of the first attempt alive.
    if reason is None:
        torch.cuda.empty_cache()
        return decode_in_slots(slot_divisor=2)
    model_type = policy.lm.config.model_type
    warn_once(
        f"sampling.backend=engine cannot serve {model_type} ({reason}): sampled by cached instead"
    )
    return cached(policy, prompt_ids, prompt_mask, uniforms, params)


def default_slots(device: str) -> int:
    """Responses decoded at once on a type of device, where the configuration does not say."""
    return SLOTS.get(device, 128)


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning, each line only once per process."""
    logging.getLogger("rlkl").warning(line)


class ContinuousBatch:
    """B responses, some waiting, some running in a slot, some finished.

    A *row* is a response, 0 … B - 1; row B is the idle row. A *slot* is a place in the cache. The
    device knows what each slot does; the host knows it as of the last sync. A slot whose response
    has ended works on for the idle row, at position 0, until the next sync.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        uniforms: Tensor,
        params: SamplingParams,
        slots: int,
        max_kv_gb: float | None,
        slot_divisor: int = 1,
    ) -> None:
        """Read the first prompts and make room for `slots` responses, fewer if memory is short.

        prompts: N token lists. uniforms: (B, T). slot_divisor: divides the number of slots that
        memory allows.
        """
        rows, max_tokens = uniforms.shape
        device = uniforms.device
        self.policy = policy
        self.prompts = prompts
        self.params = params
        self.group_size = rows // len(prompts)
        self.idle_row = rows
        self.max_tokens = max_tokens
        self.eos_ids = torch.tensor(params.eos_ids, device=device, dtype=torch.long)

        # The queue: prompts that are still to be read, and rows whose prompt has been read.
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_chunks = list(pack_by_tokens(lengths, PREFILL_TOKENS))
        self.waiting: list[int] = []
        self.prefill_next_chunk()

        # Per row, on the device; the last one is the idle row.
        logprob_dtype = torch.promote_types(policy.head.weight.dtype, torch.float32)
        self.uniforms = F.pad(uniforms, (0, 0, 0, 1))
        self.tokens = torch.full((rows + 1, max_tokens), params.pad_id, device=device)
        self.logprobs = torch.zeros(rows + 1, max_tokens, device=device, dtype=logprob_dtype)
        self.lengths = torch.zeros(rows + 1, dtype=torch.long, device=device)

        # Per slot, on the device: its row, the token it feeds next, the tokens sampled so far.
        capacity = max(len(prompt) for prompt in prompts) + max_tokens - 1  # the last is not fed
        slots = min(slots, rows, self.slots_that_fit(capacity, max_kv_gb))
        slots = max(slots // slot_divisor, 1)
        self.cache = SlotCache(len(self.prefilled), slots, capacity, device)
        self.slot_row = torch.full((slots,), self.idle_row, device=device)
        self.slot_token = torch.zeros_like(self.slot_row)
        self.slot_length = torch.zeros_like(self.slot_row)

        # Per slot, on the host: its row, None if it is free, and the step at which it started.
        self.running: list[int | None] = [None] * slots
        self.started = [0] * slots
        self.steps = 0
        self.slot_steps = 0  # Σ over steps of the slots that worked, idle ones too

    def slots_that_fit(self, capacity: int, max_kv_gb: float | None) -> int:
        """How many slots of `capacity` tokens the memory budget holds; at least one."""
        bytes_per_token = sum(
            x[0, 0].numel() * x.element_size() for layer in self.prefilled for x in layer
        )
        budget = float("inf") if max_kv_gb is None else max_kv_gb * 1e9
        if self.prefilled[0][0].is_cuda:
            cached_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info()[0] + cached_by_torch
            budget = min(budget, FREE_SHARE * free)
        return max(int(min(budget / (capacity * bytes_per_token), self.idle_row)), 1)

    def decode(self, sync_every: int, graphs: bool, compile: bool) -> None:
        """Decode every row.

        CUDA graphs and compiled steps need shapes that stay the same: they read the whole capacity
        of each slot.
        """
        fixed_shapes = graphs or compile
        step: Callable[[int, int], None] = self.decode_step
        if compile:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        if graphs:
            step = StepGraphs(step)
        while self.fill_slots():
            self.compact(halves=fixed_shapes)
            steps = min(sync_every, self.longest_remaining())
            max_length = self.longest_sequence() + steps
            if fixed_shapes:
                max_length = self.cache.capacity
            with attention_over_slots(self.policy):
                for _ in range(steps):
                    step(len(self.running), max_length)
            self.steps += steps
            self.slot_steps += steps * len(self.running)
            self.sync()

    def decode_step(self, slots: int, max_length: int) -> None:
        """Sample one more token for each of the first `slots` slots, without the host.

        max_length: no slot reads more keys than this.
        """
        cache = self.cache
        row, column = self.slot_row[:slots], self.slot_length[:slots]
        cache.begin_step(max_length)
        hidden = self.policy.backbone(
            input_ids=self.slot_token[:slots, None],
            position_ids=cache.positions[:slots, None],
            past_key_values=cache,
            use_cache=True,
            slots=cache,
        ).last_hidden_state
        logits = self.policy.logits(hidden[:, -1])
        token, logprob = one_pass(logits, self.uniforms[row, column], self.params)

        length = column + 1
        self.tokens[row, column] = token
        self.logprobs[row, column] = logprob
        self.lengths[row] = length

        not_eos = (token[:, None] != self.eos_ids).all(1)
        continues = not_eos & (length < self.max_tokens) & (row != self.idle_row)
        self.slot_row[:slots] = torch.where(continues, row, self.idle_row)
        self.slot_token[:slots] = token
        self.slot_length[:slots] = torch.where(continues, length, 0)
        cache.positions[:slots] = torch.where(continues, cache.positions[:slots] + 1, 0)

    def sync(self) -> None:
        """Wait for the device, and note which slots are still running."""
        stop = self.params.stop
        if stop is not None:
            for slot, row in enumerate(self.running):
                if row is not None and stop(self.response(row)):
                    self.slot_row[slot] = self.idle_row
                    self.slot_length[slot] = 0
                    self.cache.positions[slot] = 0
        rows = self.slot_row[: len(self.running)].tolist()
        self.running = [None if row == self.idle_row else row for row in rows]

    # -------------------------------------------------------------- what the host knows

    def response(self, row: int) -> list[int]:
        """The tokens of a row so far."""
        return self.tokens[row, : self.lengths[row]].tolist()

    def decoded(self) -> dict[int, int]:
        """Of each running slot: the tokens that it has decoded, unless it has ended meanwhile."""
        return {
            slot: self.steps - self.started[slot]
            for slot, row in enumerate(self.running)
            if row is not None
        }

    def longest_remaining(self) -> int:
        """The most steps that any running slot may still need."""
        return self.max_tokens - min(self.decoded().values())

    def longest_sequence(self) -> int:
        """The most tokens, of prompt and response, that any running slot holds."""
        decoded = self.decoded()
        return max(
            len(self.prompt_of(row)) + decoded[slot]
            for slot, row in enumerate(self.running)
            if row is not None
        )

    def prompt_of(self, row: int) -> list[int]:
        return self.prompts[row // self.group_size]

    # -------------------------------------------------------------- from waiting to running

    def fill_slots(self) -> bool:
        """Start waiting rows in free slots. Returns whether any slot is running."""
        free = [slot for slot, row in enumerate(self.running) if row is None]
        while free and (self.waiting or self.prompt_chunks):
            if not self.waiting:
                self.prefill_next_chunk()
            count = min(len(free), len(self.waiting))
            self.start(free[:count], self.waiting[:count])
            free = free[count:]
            self.waiting = self.waiting[count:]
        return any(row is not None for row in self.running)

    def prefill_next_chunk(self) -> None:
        """Read the next prompts. Their G samples each wait for a slot from here on."""
        chunk = self.prompt_chunks.pop(0)
        self.prefilled = prefill(self.policy, [self.prompts[n] for n in chunk])
        self.place_in_chunk = {n: place for place, n in enumerate(chunk)}
        self.waiting = [n * self.group_size + g for n in chunk for g in range(self.group_size)]

    def start(self, slots: list[int], rows: list[int]) -> None:
        """Give each slot a copy of its prompt's keys and values, and the last prompt token."""
        prompts = [self.prompt_of(row) for row in rows]
        places = [self.place_in_chunk[row // self.group_size] for row in rows]
        last_tokens = [prompt[-1] for prompt in prompts]
        last_positions = [len(prompt) - 1 for prompt in prompts]
        # One transfer to the device for all five lists.
        columns = [slots, rows, places, last_tokens, last_positions]
        slot, row, place, token, position = torch.tensor(columns, device=self.slot_row.device)

        self.cache.copy_prompts(slot, self.prefilled, place)
        self.cache.positions[slot] = position
        self.slot_row[slot] = row
        self.slot_token[slot] = token
        self.slot_length[slot] = 0
        for free_slot, new_row in zip(slots, rows, strict=True):
            self.running[free_slot] = new_row
            self.started[free_slot] = self.steps

    def compact(self, halves: bool) -> None:
        """Move the running slots to the front, and leave the free ones out of the next steps.

        Nothing happens while rows wait, as then no slot is free. halves: only ever halve the batch
        size, since each size costs a CUDA graph.
        """
        running = sum(row is not None for row in self.running)
        size = len(self.running) if halves else running
        while halves and size // 2 >= max(running, MIN_GRAPH_SLOTS):
            size //= 2
        source = [i for i in range(size, len(self.running)) if self.running[i] is not None]
        free = [i for i in range(size) if self.running[i] is None]
        if source:
            self.move(source, free[: len(source)])
        self.running = self.running[:size]
        self.started = self.started[:size]

    def move(self, source: list[int], target: list[int]) -> None:
        """Continue the responses of the slots `source` in the slots `target`."""
        source_slots, target_slots = torch.tensor([source, target], device=self.slot_row.device)
        self.cache.move(source_slots, target_slots)
        for per_slot in (self.slot_row, self.slot_token, self.slot_length):
            per_slot[target_slots] = per_slot[source_slots]
        for i, j in zip(source, target, strict=True):
            self.running[j] = self.running[i]
            self.started[j] = self.started[i]

    def batch(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Batch:
        """All rows, as wide as the longest response. Prompts are (B, P)."""
        lengths = self.lengths[: self.idle_row]
        columns = int(lengths.max())
        tokens = self.tokens[: self.idle_row, :columns]
        last_tokens = tokens.gather(1, lengths[:, None] - 1)
        batch = Batch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=tokens,
            mask=torch.arange(columns, device=lengths.device) < lengths[:, None],
            sampler_logprobs=self.logprobs[: self.idle_row, :columns],
            truncated=(last_tokens != self.eos_ids).all(1),
            temperature=self.params.temperature or 1.0,
        )
        return cut_at_stop(batch, self.params)


class StepGraphs:
    """A decoding step as one CUDA graph for each number of slots.

    The graphs live as long as this object, and so does the memory that they hold.
    """

    def __init__(self, step: Callable[[int, int], None]) -> None:
        self.step = step
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = None  # of memory, shared by the graphs

    def __call__(self, slots: int, max_length: int) -> None:
        """Do one step: replay its graph, or do it eagerly and record the graph for the next ones.

        Recording alone does nothing, so the eager step is also the warm-up that it needs.
        """
        if slots in self.graphs:
            self.graphs[slots].replay()
            return
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            self.step(slots, max_length)
        torch.cuda.current_stream().wait_stream(side_stream)

        graph = torch.cuda.CUDAGraph()
        self.graphs[slots] = graph
        # thread_local: other threads, such as those of wandb, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(slots, max_length)
        self.pool = graph.pool()
