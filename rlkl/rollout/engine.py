"""Continuous batching: a slot whose response has ended takes the next one that waits.

So no response waits for the slowest of its batch. A prompt is read once (prefill) for all of its G
samples. Each sample starts in a slot from a copy of the prompt's keys and values and feeds the
prompt's last token. So every response token is sampled in one place, `ContinuousBatch.decode_step`.

A decoding step (forward, sampling, bookkeeping) is device code that never waits for the host. On
CUDA it is one graph, which is kept for the next rollout where that takes little memory. Every
`sync_every` steps the host looks which slots have ended, fills them again, and moves the running
ones together when nothing waits any more.
"""

from __future__ import annotations

import functools
import logging

import torch
from einops import repeat
from torch import Tensor

from rlkl.policy.attention import Unsupported, exchanged_attention, unsupported
from rlkl.policy.microbatches import pack_by_tokens
from rlkl.policy.policy import Policy
from rlkl.rollout.cached import cached
from rlkl.rollout.decoding import DecodeState, Sizes, compiled_step, decode_step
from rlkl.rollout.graphs import Recorded, addresses, keep, take
from rlkl.rollout.sampling import cut_at_stop, sampling_mode
from rlkl.rollout.slots import SLOT_ATTENTION, batch_dependent_rope, prefill
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
    keep_gb: float | None = None,
) -> Batch:
    """Sample G = B // N responses to each of the (N, P) prompts, with (B, T) uniforms.

    The same tokens as `naive`. Models that slots cannot serve are sampled by `cached`, and one
    line says why. If memory runs out, everything is sampled again with half the slots.

    slots: responses decoded at once; fewer where memory holds fewer.
    sync_every: steps between two looks of the host.
    max_kv_gb: memory for keys and values in GB (1e9 bytes); on CUDA the free memory bounds it too.
    graphs: record the step as a CUDA graph, one for each batch size.
    compile: apply torch.compile to the step.
    keep_gb: GB that graphs, keys and values may take between rollouts, on CUDA. If they take less,
        they stay for the next one; else all is freed. By default 5 % of the device's memory.
    """
    device = policy.lm.device.type
    graphs = graphs and graphs_serve(policy)
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
                graphs=graphs,
                compile=compile,
            )
            responses.decode(sync_every or SYNC_EVERY.get(device, 4))
            if responses.recorded is not None:
                keep(policy, responses.recorded, keep_gb)
            return responses.batch(
                repeat(prompt_ids, "n p -> (n g) p", g=group_size),
                repeat(prompt_mask, "n p -> (n g) p", g=group_size),
            )

    reason = unsupported(policy.backbone)
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


def graphs_serve(policy: Policy) -> bool:
    """Whether CUDA graphs can record this policy's decoding step."""
    return policy.lm.device.type == "cuda" and not batch_dependent_rope(policy)


def capacity_bucket(tokens: int) -> int:
    """The next of 5, 6, 7, 8 · 2^n, n as small as possible: at most a quarter more than `tokens`.

    Prompts of other lengths then find their graphs and compiled steps made, as these are few sizes.
    """
    step = 1 << max((tokens - 1).bit_length() - 3, 0)
    return -(-tokens // step) * step


def halved(slots: int, rows: int) -> int:
    """`slots` halved as long as each row has one, and they are not too few for a graph."""
    while slots // 2 >= max(rows, MIN_GRAPH_SLOTS):
        slots //= 2
    return slots


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a CUDA device; no limit elsewhere."""
    if device.type != "cuda":
        return float("inf")
    cached_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached_by_torch


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning, each line only once per process."""
    logging.getLogger("rlkl").warning(line)


class ContinuousBatch:
    """B responses, some waiting, some running in a slot, some finished.

    This is what the host knows. The device knows what each slot does (`DecodeState`); the host
    knows it as of the last sync. A slot whose response has ended works on for the idle row, at
    position 0, until the next sync.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        uniforms: Tensor,
        params: SamplingParams,
        slots: int,
        max_kv_gb: float | None = None,
        slot_divisor: int = 1,
        graphs: bool = False,
        compile: bool = False,
    ) -> None:
        """Read the first prompts and make room for `slots` responses, fewer if memory is short.

        prompts: N token lists. uniforms: (B, T). slot_divisor: divides the number of slots that
        memory allows. graphs, compile: how decoding steps run.
        """
        self.policy = policy
        self.prompts = prompts
        self.params = params
        self.rows, self.max_tokens = uniforms.shape
        self.group_size = self.rows // len(prompts)
        self.compile = compile
        self.fixed_shapes = graphs or compile  # which both need

        # The queue: prompts that are still to be read, and rows whose prompt has been read.
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_chunks = list(pack_by_tokens(lengths, PREFILL_TOKENS))
        self.waiting: list[int] = []
        self.prefill_next_chunk()

        sizes = self.sizes(slots, max_kv_gb)
        self.recorded: Recorded | None = None
        if graphs:
            options = (slots, max_kv_gb, compile, uniforms.dtype, uniforms.device)
            depends_on = (addresses(policy), self.step_params(), options)
            self.recorded = take(policy, sizes, depends_on)
            if self.recorded is None:
                state = self.new_state(sizes, uniforms, slot_divisor)
                self.recorded = Recorded(state, depends_on)
            self.state = self.recorded.state
        else:
            self.state = self.new_state(sizes, uniforms, slot_divisor)
        self.state.reset(uniforms)

        # Per slot, on the host: its row, None if it is free, and the step at which it started.
        slots = min(sizes.slots, self.state.sizes.slots)
        self.running: list[int | None] = [None] * slots
        self.started = [0] * slots
        self.steps = 0
        self.slot_steps = 0  # Σ over steps of the slots that worked, idle ones too

    # -------------------------------------------------------------- what the device holds

    def sizes(self, slots: int, max_kv_gb: float | None) -> Sizes:
        """What these rows need, and as many of `slots` as the configuration allows.

        Fixed shapes come from few sizes, so that other prompts and rows find their kernels made.
        """
        longest = max(len(prompt) for prompt in self.prompts)
        capacity = longest + self.max_tokens - 1  # the last token is not fed
        rows = self.rows
        if self.fixed_shapes:
            capacity = capacity_bucket(capacity)
            rows = 1 << (rows - 1).bit_length()  # rows take little memory: the next power of two
        budget = float("inf") if max_kv_gb is None else max_kv_gb * 1e9
        return Sizes(self.slots_that_fit(slots, capacity, budget), capacity, rows, self.max_tokens)

    def slots_that_fit(self, slots: int, capacity: int, budget: float) -> int:
        """At most `slots`, one a row, and what `budget` bytes hold; at least one.

        Fixed shapes: `slots` halved as often as it needs, and one for each row or more.
        """
        bytes_per_token = sum(
            x[0, 0].numel() * x.element_size() for layer in self.prefilled for x in layer
        )
        fitting = max(int(min(budget / (capacity * bytes_per_token), slots)), 1)
        if not self.fixed_shapes:
            return min(fitting, self.rows)
        while slots > fitting:
            slots //= 2
        return halved(slots, self.rows)

    def new_state(self, sizes: Sizes, uniforms: Tensor, slot_divisor: int) -> DecodeState:
        """Room on the device, with fewer slots where its free memory is short."""
        budget = FREE_SHARE * free_bytes(uniforms.device)
        slots = self.slots_that_fit(sizes.slots, sizes.capacity, budget)
        return DecodeState(
            sizes._replace(slots=max(slots // slot_divisor, 1)),
            self.step_params(),
            layers=len(self.prefilled),
            logprob_dtype=torch.promote_types(self.policy.head.weight.dtype, torch.float32),
            uniforms=uniforms,
        )

    def step_params(self) -> SamplingParams:
        """What a step reads of the parameters. Stop strings are the host's."""
        limits = (self.params.vocab_size, self.policy.vocab_size)
        vocab_size = min((n for n in limits if n is not None), default=None)
        return self.params._replace(vocab_size=vocab_size, stop=None)

    # -------------------------------------------------------------- decoding

    def decode(self, sync_every: int) -> None:
        """Decode every row. Fixed shapes read the whole capacity of each slot."""
        while self.fill_slots():
            self.compact()
            steps = min(sync_every, self.longest_remaining())
            max_length = self.longest_sequence() + steps
            if self.fixed_shapes:
                max_length = self.state.cache.capacity
            with exchanged_attention(self.policy.backbone, SLOT_ATTENTION):
                for _ in range(steps):
                    self.step(max_length)
            self.steps += steps
            self.slot_steps += steps * len(self.running)
            self.sync()

    def step(self, max_length: int) -> None:
        """Decode one token in each slot. No slot reads more than `max_length` keys."""
        function = compiled_step() if self.compile else decode_step
        slots = len(self.running)
        step = functools.partial(function, self.state, self.policy, slots, max_length)
        if self.recorded is None:
            step()
        else:
            self.recorded.graphs(step, slots)

    def sync(self) -> None:
        """Wait for the device, and note which slots are still running."""
        stop, state = self.params.stop, self.state
        if stop is not None:
            for slot, row in enumerate(self.running):
                if row is not None and stop(self.response(row)):
                    state.slot_row[slot] = state.idle_row
                    state.slot_length[slot] = 0
                    state.cache.positions[slot] = 0
        rows = state.slot_row[: len(self.running)].tolist()
        self.running = [None if row == state.idle_row else row for row in rows]

    # -------------------------------------------------------------- what the host knows

    def response(self, row: int) -> list[int]:
        """The tokens of a row so far."""
        return self.state.tokens[row, : self.state.lengths[row]].tolist()

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
        state = self.state
        slot, row, place, token, position = torch.tensor(columns, device=state.slot_row.device)

        state.cache.copy_prompts(slot, self.prefilled, place)
        state.cache.positions[slot] = position
        state.slot_row[slot] = row
        state.slot_token[slot] = token
        state.slot_length[slot] = 0
        for free_slot, new_row in zip(slots, rows, strict=True):
            self.running[free_slot] = new_row
            self.started[free_slot] = self.steps

    def compact(self) -> None:
        """Move the running slots to the front, and leave the free ones out of the next steps.

        Nothing happens while rows wait, as then no slot is free. Where shapes are fixed, the batch
        size is only ever halved, since each size costs a compiled step or a CUDA graph.
        """
        running = sum(row is not None for row in self.running)
        size = len(self.running) if self.fixed_shapes else running
        while self.fixed_shapes and size // 2 >= max(running, MIN_GRAPH_SLOTS):
            size //= 2
        source = [i for i in range(size, len(self.running)) if self.running[i] is not None]
        free = [i for i in range(size) if self.running[i] is None]
        if source:
            self.move(source, free[: len(source)])
        self.running = self.running[:size]
        self.started = self.started[:size]

    def move(self, source: list[int], target: list[int]) -> None:
        """Continue the responses of the slots `source` in the slots `target`."""
        state = self.state
        source_slots, target_slots = torch.tensor([source, target], device=state.slot_row.device)
        state.cache.move(source_slots, target_slots)
        for per_slot in (state.slot_row, state.slot_token, state.slot_length):
            per_slot[target_slots] = per_slot[source_slots]
        for i, j in zip(source, target, strict=True):
            self.running[j] = self.running[i]
            self.started[j] = self.started[i]

    def batch(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Batch:
        """All rows, as wide as the longest response, in new tensors. Prompts are (B, P)."""
        state = self.state
        lengths = state.lengths[: self.rows]
        columns = int(lengths.max())
        tokens = state.tokens[: self.rows, :columns].clone()
        last_tokens = tokens.gather(1, lengths[:, None] - 1)
        batch = Batch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=tokens,
            mask=torch.arange(columns, device=lengths.device) < lengths[:, None],
            sampler_logprobs=state.logprobs[: self.rows, :columns].clone(),
            truncated=(last_tokens != state.eos_ids).all(1),
            temperature=self.params.temperature or 1.0,
        )
        return cut_at_stop(batch, self.params)
