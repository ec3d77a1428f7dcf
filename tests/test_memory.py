"""Checkpointing and offload change no number; the memory plan is what is really held."""

import copy
import itertools
import re

import pytest
import torch
from memory_meter import MemoryMeter
from models import (
    ARCHITECTURES,
    CONFIGS,
    FLOAT64,
    SERVED,
    VOCAB,
    causal_lm,
    forced,
    prompts,
    ragged,
    sampling_params,
    uniforms,
)
from runs_fixture import PPO, arguments, differences, resume, run
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from rlkl.errors import UserError
from rlkl.explain import explain, footprint
from rlkl.explain.activations import Group, group_activations
from rlkl.policy import lora
from rlkl.policy.model import checkpoint_layers
from rlkl.policy.optimizer import Optimizer
from rlkl.policy.policy import Policy, reference_of
from rlkl.policy.shared_prompts import share_prompts
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sampling import pick
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.evaluate import evaluate
from rlkl.run.schema import Config, Lora
from rlkl.supervised import scratch
from rlkl.tasks.addition import Addition
from rlkl.types import Batch

pytest_plugins = ("runs_fixture",)

RANK_4 = {"r": 4, "alpha": 8, "target_modules": "all-linear", "modules_to_save": []}
QWEN = Qwen2Config(  # Qwen2.5-1.5B
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
with_and_without_lora = pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])


def lora_options(adapter: bool) -> list[str]:
    return ["lora.r=4", "lora.alpha=8"] if adapter else []


def policy_of(name, dtype=torch.float32, adapter=False, critic="none") -> Policy:
    policy = Policy(causal_lm(name, dtype), critic, VOCAB).eval()
    if adapter:
        lora.adapt(policy.lm, **RANK_4)
    return policy


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("name", FLOAT64)
@with_and_without_lora
def test_checkpointing_changes_neither_a_gradient_nor_a_sample(name, adapter):
    """Not even for gpt2, whose dropout would be on with transformers' own checkpointing."""

    def gradients_and_samples(policy: Policy) -> tuple[list, list[Batch]]:
        new = policy(forced(ragged(), 0.7))
        (new.logprobs + new.entropy + new.values).sum().backward()
        batches = [
            sampler(policy, *prompts(), uniforms(6, 12), sampling_params())
            for sampler in SAMPLERS.values()
        ]
        assert not any(m.training for m in policy.modules())
        return [p.grad for p in policy.parameters() if p.requires_grad], batches

    policy = policy_of(name, torch.float64, adapter, "network")
    checkpointed = copy.deepcopy(policy)
    checkpoint_layers(checkpointed)
    expected_grads, expected_batches = gradients_and_samples(policy)
    grads, batches = gradients_and_samples(checkpointed)
    assert len(grads) > 20
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    for a, b in zip(batches, expected_batches, strict=True):
        assert torch.equal(a.response_ids, b.response_ids)
        assert torch.equal(a.sampler_logprobs, b.sampler_logprobs)


def test_a_checkpointed_rollout_still_feeds_one_token_at_a_time():
    policy, columns = policy_of("llama"), []
    checkpoint_layers(policy)
    policy.backbone.register_forward_pre_hook(
        lambda module, args, inputs: columns.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    SAMPLERS["cached"](policy, *prompts(), uniforms(6, 8), sampling_params(eos_ids=()))
    assert columns == [7] + [1] * 7


def test_a_model_without_such_layers_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("rlkl.policy.model.GradientCheckpointingLayer", torch.nn.Conv3d)
    with pytest.raises(UserError, match=r"model.gradient_checkpointing: llama models"):
        checkpoint_layers(policy_of("llama"))


# ---------------------------------------------------------------- AdamW on the CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_offload_changes_no_bit_of_weights_or_state_and_keeps_both_apart(dtype):
    results = []
    for offload in (False, True):
        start = (torch.linspace(-1, 1, 12), torch.ones(3))
        params = [torch.nn.Parameter(x.to(dtype)) for x in start]
        addresses = [p.data_ptr() for p in params]
        optimizer = Optimizer(
            {"policy": params},
            {"policy": 1e-2},
            betas=(0.9, 0.99),
            weight_decay=0.1,
            max_grad_norm=1.0,
            offload=offload,
        )
        for step in range(3):
            for p in params:
                p.grad = torch.cos(p.detach() * (step + 1))
            assert optimizer.step(1.0)
            assert all(p.grad is None for p in params)
        assert [p.data_ptr() for p in params] == addresses  # weights never move in memory
        masters = {m.data_ptr() for m in optimizer.masters["policy"]}
        assert masters.isdisjoint(addresses) == (offload or dtype == torch.bfloat16)
        moments = optimizer.state_dict()["adamw"]["state"].values()
        results.append([*params, *(x for state in moments for x in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        ("optim.offload=true",),
        ("model.gradient_checkpointing=true",),
        ("optim.offload=true", "model.dtype=bfloat16"),
    ],
    ids=str,
)
def test_a_run_that_saves_memory_is_the_run_that_does_not_bit_for_bit_and_resumes(
    base, here, options
):
    dtype = [option for option in options if "dtype" in option]
    plain = run(base, "run=plain", *PPO, *dtype)
    saving = run(base, "run=saving", *PPO, *options, "optim.steps=3")
    resume(saving, "optim.steps=6")
    assert differences(plain, saving) == []


# ---------------------------------------------------------------- the plan and what is really held


def planned(cfg: Config, model_config, longest: int) -> footprint.Memory:
    """The plan on a CPU without an exact KL; `longest` is the longest prompt in tokens."""
    width = footprint.width_of(cfg, cuda=False)
    return footprint.memory(cfg, model_config, longest, width, exact=False, cuda=False)


def model_config(name: str, **changes):
    kind, options = CONFIGS[name]
    return kind(**(options | changes))


def bytes_of(tensors) -> int:
    """Each storage counted once."""
    sizes = {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in tensors}
    return sum(sizes.values())


@pytest.mark.parametrize("offload", [False, True])
@with_and_without_lora
@pytest.mark.parametrize("critic", ["none", "head", "network"])
def test_weights_masters_moments_gradients_and_reference_are_planned_to_the_byte(
    critic, adapter, offload
):
    for name, dtype in itertools.product(("tied", "phi"), ("float32", "bfloat16")):
        cfg = config.load(
            [
                f"critic.kind={critic}",
                f"model.dtype={dtype}",
                f"optim.offload={offload}".lower(),
                *lora_options(adapter),
                *(["advantage=gae"] if critic != "none" else []),
            ]
        )
        policy = policy_of(name, getattr(torch, dtype), adapter, critic)
        reference = reference_of(policy)
        groups = policy.parameter_groups()
        optimizer = Optimizer(
            groups,
            dict.fromkeys(groups, 1e-3),
            betas=(0.9, 0.99),
            weight_decay=0.0,
            max_grad_norm=1.0,
            offload=offload,
        )
        trained = [p for params in groups.values() for p in params]
        for p in trained:
            p.grad = torch.ones_like(p)
        gradients = bytes_of(p.grad for p in trained)
        optimizer.step(1.0)

        weights = {p.data_ptr() for p in policy.parameters()}
        masters = [m for group in optimizer.masters.values() for m in group]
        master_bytes = bytes_of(m for m in masters if m.data_ptr() not in weights)
        states = optimizer.adamw.state.values()
        moments = bytes_of(state[key] for state in states for key in ("exp_avg", "exp_avg_sq"))
        own = [p for p in reference.parameters() if p.data_ptr() not in weights]

        plan = planned(cfg, model_config(name), 8)
        assert plan.weights == bytes_of(policy.parameters())
        assert plan.reference == bytes_of(own)
        assert plan.gradients == gradients
        if offload:
            assert (plan.host, plan.masters, plan.moments) == (master_bytes + moments, 0, 0)
        else:
            assert (plan.host, plan.masters, plan.moments) == (0, master_bytes, moments)


def saved_for_backward(policy: Policy, batch: Batch) -> int:
    """Bytes that the backbone keeps for its backward pass, each storage once, without weights."""
    tensors = [*policy.parameters(), *policy.buffers()]
    weights = {x.untyped_storage().data_ptr() for x in tensors}
    sizes, alive = {}, []

    def count(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        policy.states(batch)
    return sum(sizes.values())


def bytes_of_row(batch: Batch, masks: int) -> int:
    """Indices and masks of the attention over shared prompts."""
    parts = share_prompts(batch, flash=False).parts
    indices = sum(p.queries.nbytes + p.keys.nbytes + p.outputs.nbytes for p in parts)
    scores = sum(p.queries.shape[1] * p.keys.numel() for p in parts)
    return indices + masks * scores * 4


@with_and_without_lora
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_are_planned_as_they_are_kept(name, adapter):
    """Within 3 %, or two hidden states where little is kept.

    The plan extrapolates rows of 16 and 32 tokens to 40, and 3 layers to 5.
    """
    _, options = CONFIGS[name]
    layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": 5}
    for key in ("layer_types", "no_rope_layers"):
        if key in options:
            layers[key] = (options[key] * 5)[:5]
    deeper = model_config(name, **layers)
    batch = forced([([id] * 10, [6] * 30) for id in (5, 4) for _ in range(3)])
    adapter = Lora(**RANK_4) if adapter else Lora()
    shared = name in SERVED
    group_shape = Group(prompt=10, response=30, samples=3)
    group = group_activations(deeper, torch.float32, adapter, group_shape, shared)
    for checkpointing in (False, True):
        policy = Policy(AutoModelForCausalLM.from_config(deeper), vocab_size=VOCAB).eval()
        if adapter.r:
            lora.adapt(policy.lm, **RANK_4)
        if checkpointing:
            checkpoint_layers(policy)
        inside = 0 if checkpointing else 5 * group.inside
        expected = 2 * (5 * group.input + group.rest + inside)
        # A checkpoint holds the row of tokens as an argument, and not as a saved tensor.
        little = 2 * 2 * group_shape.tokens(shared) * 48 * 4 + bytes_of_row(batch, masks=2)
        assert saved_for_backward(policy, batch) == pytest.approx(
            expected, rel=0.03, abs=little if checkpointing else 0
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_a_model_of_two_layers_are_counted_too(name):
    """Three layers are counted, and a list by layer, as in smollm3 and gemma3, has only two."""
    group = Group(prompt=10, response=30, samples=2)
    kept = group_activations(model_config(name), torch.float32, Lora(), group, name in SERVED)
    assert kept.inside > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@with_and_without_lora
def test_the_peak_of_learning_is_at_most_the_plan_and_not_far_below_it(adapter, checkpointing):
    """Everything created in one forward and backward pass: activations, logits, gradients."""
    options = ["optim.micro_tokens=350", "sampling.prompts=5", *lora_options(adapter)]
    cfg = config.load([f"model.gradient_checkpointing={checkpointing}".lower(), *options])
    tiny = scratch.architecture(scratch.character_tokenizer())
    policy = Policy(AutoModelForCausalLM.from_config(tiny), vocab_size=99).eval()
    if adapter:
        lora.adapt(policy.lm, **RANK_4)
    if checkpointing:
        checkpoint_layers(policy)
    batch = forced([([prompt] * 6, [6] * 8) for prompt in range(5) for _ in range(8)])
    with MemoryMeter() as meter:
        new = policy(batch)
        (new.logprobs + new.entropy).sum().backward()
    least = 0.6 if checkpointing else 0.7
    assert least < meter.most / planned(cfg, tiny, 6).learning <= 1.0


def test_the_kv_cache_is_planned_to_the_byte():
    policy, caches = policy_of("llama"), []
    policy.backbone.register_forward_hook(
        lambda module, args, out: caches.append(out.past_key_values)
    )
    SAMPLERS["cached"](policy, *prompts(), uniforms(12, 9), sampling_params(eos_ids=()))
    layers = caches[-1].layers
    held = bytes_of(x for layer in layers for x in (layer.keys, layer.values))
    rollout = ["sampling.prompts=3", "sampling.group_size=4", "sampling.max_new_tokens=9"]
    cfg = config.load([*rollout, "eval.prompts=1", "eval.samples=1"])
    # 7 prompt tokens and 9 sampled ones, of which the last is never fed back.
    assert planned(cfg, model_config("llama"), 7).kv_cache == held * 16 // 15


def test_an_engine_holds_keys_and_values_of_its_slots_alone():
    def kv_cache(*options: str, cuda: bool = False) -> int:
        rows = ["sampling.prompts=50", "sampling.group_size=8", "eval.samples=1"]
        cfg = config.load([*rows, *options])
        return footprint.memory(cfg, model_config("llama"), 7, 4, exact=False, cuda=cuda).kv_cache

    engine = "sampling.backend.name=engine"
    row = kv_cache("sampling.backend=cached") // 400
    assert kv_cache(engine) == 128 * row
    assert kv_cache(engine, "sampling.backend.slots=1000") == 400 * row
    # CUDA graphs: 15 tokens have room for 16, and slots are halved as long as all rows have one.
    row_of_graph = row // 15 * 16
    assert kv_cache(engine, cuda=True) == 256 * row_of_graph
    assert kv_cache(engine, "sampling.backend.slots=9", cuda=True) == 9 * row_of_graph
    assert kv_cache(engine, "sampling.backend.slots=1600", cuda=True) == 400 * row_of_graph


def test_sampling_a_token_takes_what_is_planned():
    """(B, V): logits, log-probs, and probabilities and their running sum in float64."""
    logits = torch.randn(40, 5000)
    with MemoryMeter() as meter:
        pick(logits, torch.rand(40, dtype=torch.float64), sampling_params(vocab_size=None))
    rollout = ["sampling.prompts=10", "sampling.group_size=4"]
    cfg = config.load([*rollout, "eval.prompts=1", "eval.samples=1"])
    expected = planned(cfg, model_config("llama", vocab_size=5000), 7).sampling_logits
    assert 0.8 * expected < meter.most + logits.nbytes <= 1.01 * expected


@pytest.mark.parametrize(("samples", "most"), [(1, 16), (3, 16), (40, 40)])
def test_evaluation_samples_no_more_rows_at_once_than_the_plan_says(base, here, samples, most):
    """As many as a rollout, so that it fits where training does; or all samples of one prompt."""
    cfg = config.load(arguments(base, f"eval.samples={samples}", "eval.prompts=30"))
    models, _, data = build(cfg, train.generate_and_score)
    rows = []
    sampler = models.sampler

    def counted(policy, prompt_ids, prompt_mask, uniforms, params) -> Batch:
        rows.append(len(uniforms))
        return sampler(policy, prompt_ids, prompt_mask, uniforms, params)

    models.sampler = counted
    heldout = data.heldout._replace(examples=data.heldout.examples * 6)
    assert len(heldout.examples) > 16
    evaluate(cfg, models, heldout, samples=samples)
    assert most - samples < max(rows) <= most

    architecture = footprint.architecture(cfg)[0]

    def kv_cache(samples: int) -> int:
        return planned(
            config.load(arguments(base, f"eval.samples={samples}")), architecture, 7
        ).kv_cache

    assert kv_cache(samples) / kv_cache(1) == most / 16


def test_a_large_model_is_counted_without_its_weights_in_memory():
    """As published: 1.54B parameters, 1.31B without the embedding."""
    count = footprint.parameters(QWEN, Lora())
    assert count.policy == count.trained == 1_543_714_304
    assert count.policy - 151936 * 1536 == 1_310_340_608
    adapted = footprint.parameters(QWEN, Lora(r=16))
    per_layer = 16 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert adapted.trained == 28 * per_layer == adapted.policy - count.policy


# ---------------------------------------------------------------- what a run prints


def test_the_plan_of_a_run_has_the_numbers_of_explain_and_at_most_six_lines(base):
    cfg = config.load(["lora.r=8", "optim.offload=true"])
    lines = footprint.plan(cfg, False, torch.device("cpu"), Addition("train"))
    explained = explain(cfg).topics["size of a step"][1:]
    assert len(lines) <= 6
    assert lines[:-1] == explained[:-1]
    assert re.fullmatch(rf"{explained[-1]} of [\d.e+]+ on cpu", lines[-1])
    assert "host" in " ".join(lines)


def test_a_run_that_will_not_fit_says_so_and_names_what_would_help(base, here, monkeypatch, capsys):
    """It runs nevertheless: the plan is an estimate."""
    monkeypatch.setattr(footprint, "available", lambda device: 300_000)
    train.main(arguments(base, "run=out", "optim.steps=1"))
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    line = re.search(r"will not fit\. GB with (.*?) self-check", output)[1]
    changes = re.findall(r"([\w.=]+|these together): ([\d.e-]+)", line)
    peaks = {name: float(peak) for name, peak in changes}
    named = {"lora.r=16", "model.gradient_checkpointing=true", "optim.micro_tokens=2048"}
    assert named & peaks.keys()
    cfg = config.load(arguments(base))
    architecture, tokenizer = footprint.architecture(cfg)
    longest = footprint.tokens(cfg, architecture, tokenizer).prompt
    for name, peak in peaks.items():
        assert peak < planned(cfg, architecture, longest).peak / 1e9
        if "=" in name:
            changed = planned(config.load(arguments(base, name)), architecture, longest)
            assert peak == pytest.approx(changed.peak / 1e9, rel=6e-3)


def test_an_estimate_that_fails_stops_no_run(monkeypatch):
    monkeypatch.setattr(footprint, "group_activations", lambda *args: 1 / 0)
    lines = footprint.plan(config.load([]), False, torch.device("cpu"), Addition("train"))
    assert lines == ["memory    not estimated: division by zero"]
