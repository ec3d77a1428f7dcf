"""The optimizer: AdamW, groups apart, masters for narrow weights, and nothing at all on a step that is not finite.

Also what a step is drawn from: the learning-rate schedule, and the examples as a function of (seed, step).
"""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkl.optim import Optimizer, lr_scale
from rlkl.seeds import draw, generator, stream

LRS = {"policy": 1e-3, "critic": 5e-3}
SHAPES = {"policy": [(3, 5), (7,)], "critic": [(5, 1), (1,)]}
OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, list[nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes] for name, shapes in SHAPES.items()
    }


def fill(groups: dict[str, list[nn.Parameter]], seed: int, **scale: float) -> None:
    """The same gradients for the same seed; policy=2.0 doubles those of one group only."""
    g = torch.Generator().manual_seed(seed)
    for name, params in groups.items():
        for p in params:
            p.grad = (scale.get(name, 1.0) * torch.randn(p.shape, generator=g)).to(p.dtype)


def make(groups: dict[str, list[nn.Parameter]], **changes) -> Optimizer:
    return Optimizer(groups, LRS, **OPTIONS | changes)


def values(groups: dict[str, list[nn.Parameter]]) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in params] for name, params in groups.items()}


def equal(a: object, b: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---------------------------------------------------------------- what a step is


def test_float32_steps_are_torchs_adamw_after_clipping_each_group():
    groups, twins = weights(), weights()
    optimizer = make(groups)
    adamw = torch.optim.AdamW(
        [{"params": twins[name], "lr": LRS[name]} for name in twins], betas=(0.9, 0.95), weight_decay=0.1
    )
    for step, scale in enumerate((1.0, 0.5, 0.25, 0.1)):
        fill(groups, step, critic=1e-3)  # the policy is clipped, the critic is not
        fill(twins, step, critic=1e-3)
        norms = {name: nn.utils.clip_grad_norm_(params, 1.0).item() for name, params in twins.items()}
        assert norms["critic"] < 1 < norms["policy"]
        for group, name in zip(adamw.param_groups, twins, strict=True):
            group["lr"] = LRS[name] * scale
        adamw.step()
        assert optimizer.step(scale) == pytest.approx(norms)
        for p, q in zip(sum(groups.values(), []), sum(twins.values(), []), strict=True):  # noqa: RUF017
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_norms_are_those_before_clipping():
    groups = weights()
    fill(groups, 0, policy=1000.0)
    want = {name: torch.cat([p.grad.flatten() for p in params]).norm().item() for name, params in groups.items()}
    assert make(groups).step(1.0) == pytest.approx(want)
    assert want["policy"] > 1000


def test_gradients_are_gone_after_a_step():
    groups = weights()
    optimizer = make(groups)
    fill(groups, 0)
    optimizer.step(1.0)
    assert all(p.grad is None for params in groups.values() for p in params)
    assert all(m.grad is None for masters in optimizer.masters.values() for m in masters)
    fill(groups, 1)
    optimizer.zero()
    assert all(p.grad is None for params in groups.values() for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("noisy", "other"), [("critic", "policy"), ("policy", "critic")])
def test_a_huge_gradient_in_one_group_leaves_the_others_step_unchanged_bit_for_bit(noisy, other, dtype):
    results = []
    for scale in (1.0, 1e6):
        groups = weights(dtype)
        optimizer = make(groups)
        for step in range(3):
            fill(groups, step, **{noisy: scale})
            optimizer.step(1.0)
        results.append(values(groups))
    assert equal(results[0][other], results[1][other])
    assert not equal(results[0][other], values(weights(dtype))[other])


def test_the_learning_rate_of_a_step_is_the_groups_times_the_scale():
    """The first step of Adam moves every weight by lr, whatever the gradient."""
    for scale in (1.0, 0.25):
        groups, start = weights(), values(weights())
        fill(groups, 0)
        make(groups, weight_decay=0.0).step(scale)
        for name, params in groups.items():
            for p, before in zip(params, start[name], strict=True):
                torch.testing.assert_close((p - before).abs(), torch.full_like(p, LRS[name] * scale), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learning_rate_of_zero_moves_nothing(dtype):
    groups = weights(dtype)
    fill(groups, 0)
    assert make(groups).step(0.0)
    assert equal(values(groups), values(weights(dtype)))


def test_weight_decay_is_decoupled():
    groups, start = weights(), values(weights())
    for params in groups.values():
        for p in params:
            p.grad = torch.zeros_like(p)
    make(groups).step(1.0)
    for name, params in groups.items():
        for p, before in zip(params, start[name], strict=True):
            torch.testing.assert_close(p.detach(), before * (1 - LRS[name] * 0.1))


# ---------------------------------------------------------------- frozen groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_group_does_not_move_by_one_bit_and_gets_no_state(dtype):
    """Critic warm-up: no step, no decay, no momentum, and no norm that could make the step non-finite."""
    groups, start = weights(dtype), values(weights(dtype))
    optimizer = make(groups)
    for step in range(3):
        fill(groups, step, policy=math.nan if step == 1 else 1.0)
        assert list(optimizer.step(1.0, frozen=["policy"])) == ["critic"]
    assert equal(values(groups)["policy"], start["policy"])
    assert not equal(values(groups)["critic"], start["critic"])
    assert set(optimizer.adamw.state) == set(optimizer.masters["critic"])
    assert all(p.grad is None for p in groups["policy"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_that_thaws_starts_as_if_it_were_new(dtype):
    """The gradients it saw while frozen leave no trace in its moments or in the bias correction."""
    groups, fresh = weights(dtype), weights(dtype)
    optimizer, other = make(groups), make(fresh)
    for step in range(3):
        fill(groups, step)
        optimizer.step(1.0, frozen={"policy"})
    fill(groups, 7)
    fill(fresh, 7)
    optimizer.step(1.0)
    other.step(1.0)
    assert equal(values(groups)["policy"], values(fresh)["policy"])


def test_a_group_that_freezes_again_keeps_its_state_and_decays_nowhere():
    groups = weights()
    optimizer = make(groups)
    fill(groups, 0)
    optimizer.step(1.0)
    before, state = values(groups), copy.deepcopy([optimizer.adamw.state[p] for p in groups["policy"]])
    fill(groups, 1)
    optimizer.step(1.0, frozen=("policy",))
    assert equal(values(groups)["policy"], before["policy"])
    assert equal([optimizer.adamw.state[p] for p in groups["policy"]], state)


# ---------------------------------------------------------------- a step that is not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "policy", "critic"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_nothing_moves_on_a_step_that_is_not_finite(where, bad, dtype, first):
    groups = weights(dtype)
    optimizer = make(groups)
    if not first:
        fill(groups, 0)
        optimizer.step(1.0)
    before, state = values(groups), copy.deepcopy(optimizer.state_dict())
    fill(groups, 1)
    if where != "loss":
        groups[where][1].grad[0] = bad
    assert optimizer.step(0.5, loss=bad if where == "loss" else 1.0) == {}
    assert equal(values(groups), before)
    assert equal(optimizer.state_dict(), state)
    assert all(p.grad is None for params in groups.values() for p in params), "or the nan is added to the next step"
    fill(groups, 2)
    assert set(optimizer.step(1.0)) == {"policy", "critic"}, "the step after it is an ordinary one"
    assert not equal(values(groups), before)


# ---------------------------------------------------------------- masters


def test_tiny_steps_add_up_under_bf16_weights():
    """300 steps of 1e-5 on a weight of 1 are 0.003; bf16 alone rounds every one of them away (its spacing is 0.004)."""
    p, plain, wide = (nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.bfloat16, torch.bfloat16, torch.float32))
    optimizer, twin = (
        Optimizer({"policy": [x]}, {"policy": 1e-5}, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
        for x in (p, wide)
    )
    adamw = torch.optim.AdamW([plain], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(300):
        for x in (p, plain, wide):
            x.grad = torch.full_like(x, 0.25)
        optimizer.step(1.0)
        twin.step(1.0)
        adamw.step()
    assert (plain == 1).all()
    master = optimizer.masters["policy"][0]
    assert master.dtype == torch.float32
    assert torch.equal(master, wide)
    assert master.tolist() == pytest.approx([0.997] * 5, abs=1e-4)
    assert torch.equal(p, wide.bfloat16())
    assert (p < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_updated_in_place(dtype):
    """A sampler, or a captured graph, reads the very tensors that are trained."""
    groups = weights(dtype)
    before, views = [p.data_ptr() for ps in groups.values() for p in ps], [p.detach() for p in groups["policy"]]
    optimizer = make(groups)
    for step in range(2):
        fill(groups, step)
        optimizer.step(1.0)
    assert [p.data_ptr() for ps in groups.values() for p in ps] == before
    assert all(torch.equal(v, p) for v, p in zip(views, groups["policy"], strict=True))
    assert not equal(values(groups), values(weights(dtype)))
    assert {p.dtype for ps in groups.values() for p in ps} == {dtype}


def test_only_narrow_weights_have_a_master_of_their_own():
    mixed = {"policy": weights(torch.bfloat16)["policy"], "critic": weights()["critic"]}
    optimizer = make(mixed)
    assert all(m.dtype == torch.float32 and m is not p for m, p in zip(optimizer.masters["policy"], mixed["policy"]))  # noqa: B905
    assert all(m is p for m, p in zip(optimizer.masters["critic"], mixed["critic"], strict=True))
    fill(mixed, 0)
    assert set(optimizer.step(1.0)) == {"policy", "critic"}
    assert equal(mixed["policy"], [m.to(torch.bfloat16) for m in optimizer.masters["policy"]])
    assert not equal(values(mixed)["critic"], values(weights())["critic"])


def test_a_parameter_without_a_gradient_stays_where_it_is():
    for dtype in (torch.float32, torch.bfloat16):
        groups = weights(dtype)
        fill(groups, 0)
        groups["policy"][0].grad = None
        assert make(groups).step(1.0)
        assert equal(groups["policy"][0].detach(), weights(dtype)["policy"][0].detach())
        assert not equal(groups["policy"][1].detach(), weights(dtype)["policy"][1].detach())


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_steps_are_two_steps_saved_loaded_and_two_more_bit_for_bit(dtype):
    whole = weights(dtype)
    optimizer = make(whole)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            half = values(whole)
        fill(whole, step)
        optimizer.step(1.0 - step / 4)
    file.seek(0)
    parts = weights(dtype, seed=1)
    resumed = make(parts)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert equal(values(parts), half), "the weights themselves come back from their masters"
    for step in (2, 3):
        fill(parts, step)
        resumed.step(1.0 - step / 4)
    assert equal(values(parts), values(whole))
    assert equal(resumed.state_dict(), optimizer.state_dict())


def test_loading_keeps_every_tensor_where_it_is():
    state = copy.deepcopy(make(weights(torch.bfloat16)).state_dict())
    groups = weights(torch.bfloat16, seed=1)
    optimizer = make(groups)
    tensors = [*sum(groups.values(), []), *sum(optimizer.masters.values(), [])]  # noqa: RUF017
    before = [x.data_ptr() for x in tensors]
    optimizer.load_state_dict(state)
    assert [x.data_ptr() for x in tensors] == before
    fill(groups, 0)
    optimizer.step(1.0)
    assert equal(groups["policy"], [m.to(torch.bfloat16) for m in optimizer.masters["policy"]])


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
    ],
)
def test_without_warmup_the_first_step_is_full_and_the_last_is_not_zero(schedule, want):
    assert [lr_scale(i, 4, 0, schedule) for i in range(4)] == pytest.approx(want)


def test_warmup_rises_linearly_and_never_wastes_a_step_on_zero():
    assert [lr_scale(i, 10, 3, "constant") for i in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert lr_scale(1, 10, 3, "linear") == pytest.approx(0.5 * 0.9)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_is_positive_at_most_one_and_falls_after_warmup(schedule):
    for steps, warmup in ((1, 0), (7, 2), (50, 10), (3, 5)):
        scales = [lr_scale(i, steps, warmup, schedule) for i in range(steps)]
        assert all(0 < x <= 1 for x in scales)
        tail = scales[warmup:]
        assert tail == sorted(tail, reverse=True)


# ---------------------------------------------------------------- seeds


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_draw_covers_every_example_once_before_any_comes_again(size, count, seed):
    """Whether a step is smaller than the data, larger, or does not divide it."""
    drawn = sum((draw(range(size), count, seed, step) for step in range(3 * size // count + 1)), [])  # noqa: RUF017
    for epoch in range(len(drawn) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))
    rest = drawn[len(drawn) // size * size :]
    assert len(rest) == len(set(rest))


def test_draw_is_a_function_of_seed_and_step_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    forward = [draw(range(11), 4, 7, step) for step in range(9)]
    torch.rand(5)
    backward = [draw(range(11), 4, 7, step) for step in reversed(range(9))]
    assert forward == backward[::-1]
    torch.set_rng_state(state)
    draw(range(11), 4, 7, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_is_shuffled_differently_in_every_epoch_and_for_every_seed():
    orders = [tuple(draw(range(20), 20, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len({*orders, tuple(range(20))}) == 10


def test_draw_gives_the_examples_themselves():
    examples = ["a", "b", "c"]
    assert sorted(draw(examples, 3, 0, 0)) == examples
    assert examples == ["a", "b", "c"]


def test_streams_are_apart_by_seed_step_and_purpose_and_the_same_in_every_process():
    keys = [(seed, step, purpose) for seed in (0, 1, 12) for step in (0, 1, 2, 21) for purpose in ("act", "learn")]
    streams = {key: stream(*key) for key in keys}
    assert len(set(streams.values())) == len(keys)
    assert all(0 <= x < 2**63 for x in streams.values())
    assert stream(0, 0, "act") == 6485325312004561841, "hash() differs between processes: a resumed run would draw anew"
    a, b = (torch.rand(3, generator=generator(3, 4, "act")) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(3, generator=generator(3, 5, "act")))
