"""The optimizer: AdamW, separate groups, float32 masters, and no change on a non-finite step.

Also the learning-rate schedule, and the examples of a step as a function of (seed, step).
"""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkl.policy.optimizer import Optimizer, lr_scale
from rlkl.run.seeds import derive_seed, generator, sample_examples

LRS = {"policy": 1e-3, "critic": 5e-3}
SHAPES = {"policy": [(3, 5), (7,)], "critic": [(5, 1), (1,)]}
OPTIONS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}


Groups = dict[str, list[nn.Parameter]]
DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Groups:
    """The same parameters for the same seed and dtype."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]
        for name, shapes in SHAPES.items()
    }


def parameters(groups: Groups) -> list[nn.Parameter]:
    return [p for params in groups.values() for p in params]


def fill_gradients(groups: Groups, seed: int, **scale: float) -> None:
    """The same gradients for the same seed; policy=2.0 doubles those of one group only."""
    g = torch.Generator().manual_seed(seed)
    for name, params in groups.items():
        for p in params:
            p.grad = (scale.get(name, 1.0) * torch.randn(p.shape, generator=g)).to(p.dtype)


def optimizer_of(groups: Groups, **changes) -> Optimizer:
    return Optimizer(groups, LRS, **OPTIONS | changes)


def values(groups: Groups) -> dict[str, list[Tensor]]:
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
    optimizer = optimizer_of(groups)
    adamw = torch.optim.AdamW(
        [{"params": twins[name], "lr": LRS[name]} for name in twins],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    for step, scale in enumerate((1.0, 0.5, 0.25, 0.1)):
        fill_gradients(groups, step, critic=1e-3)  # the policy is clipped, the critic is not
        fill_gradients(twins, step, critic=1e-3)
        norms = {
            name: nn.utils.clip_grad_norm_(params, 1.0).item() for name, params in twins.items()
        }
        assert norms["critic"] < 1 < norms["policy"]
        for group, name in zip(adamw.param_groups, twins, strict=True):
            group["lr"] = LRS[name] * scale
        adamw.step()
        assert optimizer.step(scale) == pytest.approx(norms)
        for p, q in zip(parameters(groups), parameters(twins), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_norms_are_those_before_clipping():
    groups = weights()
    fill_gradients(groups, 0, policy=1000.0)
    expected = {
        name: torch.cat([p.grad.flatten() for p in params]).norm().item()
        for name, params in groups.items()
    }
    assert optimizer_of(groups).step(1.0) == pytest.approx(expected)
    assert expected["policy"] > 1000


def test_gradients_are_gone_after_a_step():
    groups = weights()
    optimizer = optimizer_of(groups)
    fill_gradients(groups, 0)
    optimizer.step(1.0)
    assert all(p.grad is None for p in parameters(groups))
    assert all(m.grad is None for masters in optimizer.masters.values() for m in masters)
    fill_gradients(groups, 1)
    optimizer.zero()
    assert all(p.grad is None for p in parameters(groups))


@each_dtype
def test_a_huge_gradient_in_one_group_leaves_the_others_step_unchanged_bit_for_bit(dtype):
    for noisy, other in (("critic", "policy"), ("policy", "critic")):
        results = []
        for scale in (1.0, 1e6):
            groups = weights(dtype)
            optimizer = optimizer_of(groups)
            for step in range(3):
                fill_gradients(groups, step, **{noisy: scale})
                optimizer.step(1.0)
            results.append(values(groups))
        assert equal(results[0][other], results[1][other])
        assert not equal(results[0][other], values(weights(dtype))[other])


def test_the_learning_rate_of_a_step_is_the_groups_times_the_scale():
    """The first step of Adam moves every weight by lr, whatever the gradient."""
    for scale in (1.0, 0.25):
        groups, start = weights(), values(weights())
        fill_gradients(groups, 0)
        optimizer_of(groups, weight_decay=0.0).step(scale)
        for name, params in groups.items():
            for p, before in zip(params, start[name], strict=True):
                displacement = torch.full_like(p, LRS[name] * scale)
                torch.testing.assert_close((p - before).abs(), displacement, rtol=1e-3, atol=0)


@each_dtype
def test_a_learning_rate_of_zero_moves_nothing(dtype):
    groups = weights(dtype)
    fill_gradients(groups, 0)
    assert optimizer_of(groups).step(0.0)
    assert equal(values(groups), values(weights(dtype)))


def test_weight_decay_is_decoupled():
    groups, start = weights(), values(weights())
    for p in parameters(groups):
        p.grad = torch.zeros_like(p)
    optimizer_of(groups).step(1.0)
    for name, params in groups.items():
        for p, before in zip(params, start[name], strict=True):
            torch.testing.assert_close(p.detach(), before * (1 - LRS[name] * 0.1))


# ---------------------------------------------------------------- frozen groups


@each_dtype
def test_a_frozen_group_does_not_move_by_one_bit_and_gets_no_state(dtype):
    """Critic warm-up: no step, decay or momentum, and no norm that could be non-finite."""
    groups, start = weights(dtype), values(weights(dtype))
    optimizer = optimizer_of(groups)
    for step in range(3):
        fill_gradients(groups, step, policy=math.nan if step == 1 else 1.0)
        assert list(optimizer.step(1.0, frozen=["policy"])) == ["critic"]
    assert equal(values(groups)["policy"], start["policy"])
    assert not equal(values(groups)["critic"], start["critic"])
    assert set(optimizer.adamw.state) == set(optimizer.masters["critic"])
    assert all(p.grad is None for p in groups["policy"])


@each_dtype
def test_a_group_that_is_no_longer_frozen_starts_as_if_it_were_new(dtype):
    """Gradients from when it was frozen leave no trace in moments or bias correction."""
    groups, fresh = weights(dtype), weights(dtype)
    optimizer, other = optimizer_of(groups), optimizer_of(fresh)
    for step in range(3):
        fill_gradients(groups, step)
        optimizer.step(1.0, frozen={"policy"})
    fill_gradients(groups, 7)
    fill_gradients(fresh, 7)
    optimizer.step(1.0)
    other.step(1.0)
    assert equal(values(groups)["policy"], values(fresh)["policy"])


def test_a_group_that_is_frozen_again_keeps_its_state_and_does_not_decay():
    groups = weights()
    optimizer = optimizer_of(groups)
    fill_gradients(groups, 0)
    optimizer.step(1.0)
    before = values(groups)
    state = copy.deepcopy([optimizer.adamw.state[p] for p in groups["policy"]])
    fill_gradients(groups, 1)
    optimizer.step(1.0, frozen=("policy",))
    assert equal(values(groups)["policy"], before["policy"])
    assert equal([optimizer.adamw.state[p] for p in groups["policy"]], state)


# ---------------------------------------------------------------- a step that is not finite


@pytest.mark.parametrize("where", ["loss", "policy", "critic"])
@each_dtype
def test_nothing_moves_on_a_step_that_is_not_finite(where, dtype):
    for bad, first_step in itertools.product((math.nan, math.inf, -math.inf), (True, False)):
        groups = weights(dtype)
        optimizer = optimizer_of(groups)
        if not first_step:
            fill_gradients(groups, 0)
            optimizer.step(1.0)
        before, state = values(groups), copy.deepcopy(optimizer.state_dict())
        fill_gradients(groups, 1)
        if where != "loss":
            groups[where][1].grad[0] = bad
        assert optimizer.step(0.5, loss=bad if where == "loss" else 1.0) == {}
        assert equal(values(groups), before)
        assert equal(optimizer.state_dict(), state)
        assert all(p.grad is None for p in parameters(groups))  # else the nan joins the next step
        fill_gradients(groups, 2)
        assert set(optimizer.step(1.0)) == {"policy", "critic"}  # the next step is an ordinary one
        assert not equal(values(groups), before)


# ---------------------------------------------------------------- masters


def test_tiny_steps_add_up_under_bf16_weights():
    """300 steps of 1e-5 on a weight of 1 are 0.003; bf16, of spacing 0.004, loses every one."""
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    narrow, plain = (nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2))
    wide = nn.Parameter(torch.ones(5))
    optimizer, twin = (
        Optimizer({"policy": [p]}, {"policy": 1e-5}, max_grad_norm=1.0, **options)
        for p in (narrow, wide)
    )
    adamw = torch.optim.AdamW([plain], lr=1e-5, **options)
    for _ in range(300):
        for p in (narrow, plain, wide):
            p.grad = torch.full_like(p, 0.25)
        optimizer.step(1.0)
        twin.step(1.0)
        adamw.step()
    assert (plain == 1).all()
    master = optimizer.masters["policy"][0]
    assert master.dtype == torch.float32
    assert torch.equal(master, wide)
    assert master.tolist() == pytest.approx([0.997] * 5, abs=1e-4)
    assert torch.equal(narrow, wide.bfloat16())
    assert (narrow < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_updated_in_place(dtype):
    """A sampler, or a captured graph, reads the very tensors that are trained."""
    groups = weights(dtype)
    addresses = [p.data_ptr() for p in parameters(groups)]
    views = [p.detach() for p in groups["policy"]]
    optimizer = optimizer_of(groups)
    for step in range(2):
        fill_gradients(groups, step)
        optimizer.step(1.0)
    assert [p.data_ptr() for p in parameters(groups)] == addresses
    assert all(torch.equal(v, p) for v, p in zip(views, groups["policy"], strict=True))
    assert not equal(values(groups), values(weights(dtype)))
    assert {p.dtype for p in parameters(groups)} == {dtype}


def test_only_narrow_weights_have_a_master_of_their_own():
    mixed = {"policy": weights(torch.bfloat16)["policy"], "critic": weights()["critic"]}
    optimizer = optimizer_of(mixed)
    for master, p in zip(optimizer.masters["policy"], mixed["policy"], strict=True):
        assert master.dtype == torch.float32
        assert master is not p
    for master, p in zip(optimizer.masters["critic"], mixed["critic"], strict=True):
        assert master is p
    fill_gradients(mixed, 0)
    assert set(optimizer.step(1.0)) == {"policy", "critic"}
    assert equal(mixed["policy"], [m.to(torch.bfloat16) for m in optimizer.masters["policy"]])
    assert not equal(values(mixed)["critic"], values(weights())["critic"])


def test_a_parameter_without_a_gradient_stays_where_it_is():
    for dtype in DTYPES:
        groups = weights(dtype)
        fill_gradients(groups, 0)
        groups["policy"][0].grad = None
        assert optimizer_of(groups).step(1.0)
        assert equal(groups["policy"][0].detach(), weights(dtype)["policy"][0].detach())
        assert not equal(groups["policy"][1].detach(), weights(dtype)["policy"][1].detach())


# ---------------------------------------------------------------- save and load


@each_dtype
def test_four_steps_are_two_steps_saved_loaded_and_two_more_bit_for_bit(dtype):
    whole = weights(dtype)
    optimizer = optimizer_of(whole)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            half = values(whole)
        fill_gradients(whole, step)
        optimizer.step(1.0 - step / 4)
    file.seek(0)
    other = weights(dtype, seed=1)
    resumed = optimizer_of(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert equal(values(other), half)  # the weights themselves come back from their masters
    for step in (2, 3):
        fill_gradients(other, step)
        resumed.step(1.0 - step / 4)
    assert equal(values(other), values(whole))
    assert equal(resumed.state_dict(), optimizer.state_dict())


def test_loading_keeps_every_tensor_where_it_is():
    state = copy.deepcopy(optimizer_of(weights(torch.bfloat16)).state_dict())
    groups = weights(torch.bfloat16, seed=1)
    optimizer = optimizer_of(groups)
    tensors = [*parameters(groups), *parameters(optimizer.masters)]
    before = [x.data_ptr() for x in tensors]
    optimizer.load_state_dict(state)
    assert [x.data_ptr() for x in tensors] == before
    fill_gradients(groups, 0)
    optimizer.step(1.0)
    assert equal(groups["policy"], [m.to(torch.bfloat16) for m in optimizer.masters["policy"]])


# ---------------------------------------------------------------- the schedule


def test_without_warmup_the_first_step_is_full_and_the_last_is_not_zero():
    high, low = (1 + math.cos(math.pi / 4)) / 2, (1 - math.cos(math.pi / 4)) / 2
    expected = {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "linear": [1.0, 0.75, 0.5, 0.25],
        "cosine": [1.0, high, 0.5, low],
    }
    for schedule, scales in expected.items():
        assert [lr_scale(i, 4, 0, schedule) for i in range(4)] == pytest.approx(scales)


def test_warmup_rises_linearly_and_never_wastes_a_step_on_zero():
    scales = [lr_scale(i, 10, 3, "constant") for i in range(5)]
    assert scales == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
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
def test_sample_examples_covers_every_example_once_before_any_comes_again(size, count, seed):
    """Whether a step is smaller than the data, larger, or does not divide it."""
    examples = []
    for step in range(3 * size // count + 1):
        examples += sample_examples(range(size), count, seed, step)
    for epoch in range(len(examples) // size):
        assert sorted(examples[epoch * size : (epoch + 1) * size]) == list(range(size))
    rest = examples[len(examples) // size * size :]
    assert len(rest) == len(set(rest))


def test_sample_examples_is_a_function_of_seed_and_step_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    forward = [sample_examples(range(11), 4, 7, step) for step in range(9)]
    torch.rand(5)
    backward = [sample_examples(range(11), 4, 7, step) for step in reversed(range(9))]
    assert forward == backward[::-1]
    torch.set_rng_state(state)
    sample_examples(range(11), 4, 7, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_examples_is_shuffled_differently_in_every_epoch_and_for_every_seed():
    orders = [
        tuple(sample_examples(range(20), 20, seed, epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({*orders, tuple(range(20))}) == 10


def test_sample_examples_returns_the_examples_themselves():
    examples = ["a", "b", "c"]
    assert sorted(sample_examples(examples, 3, 0, 0)) == examples
    assert examples == ["a", "b", "c"]


def test_derived_seeds_differ_by_seed_step_and_purpose_and_are_the_same_in_every_process():
    keys = list(itertools.product((0, 1, 12), (0, 1, 2, 21), ("act", "learn")))
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # hash() would differ between processes, so a resumed run would sample other examples.
    assert derive_seed(0, 0, "act") == 6485325312004561841
    a, b = (torch.rand(3, generator=generator(3, 4, "act")) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(3, generator=generator(3, 5, "act")))
