"""LoRA: only the adapter is trained, the reference is the model without it, PEFT can load it."""

import copy
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    VOCAB,
    causal_lm,
    forced,
    prompts,
    ragged,
    sampling_params,
    uniforms,
)
from packaging.version import Version
from runs_fixture import PPO, arguments, differences, make_base, resume, rows, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rlkl.errors import UserError, exit_code
from rlkl.explain import footprint
from rlkl.logprobs import tiled, token_logprobs
from rlkl.policy import lora
from rlkl.policy.model import check_reproduced, checkpoint_layers, export, load
from rlkl.policy.policy import Policy, reference_of
from rlkl.rollout import SAMPLERS
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.types import Batch, Head

pytest_plugins = ("runs_fixture",)

# Plain; transposed weights and learned positions; tied and scaled; biases.
SOME = ["llama", "gpt2", "gemma", "phi"]
LORA = ("lora.r=4", "lora.alpha=8")
RANK_4 = {"r": 4, "alpha": 8, "target_modules": "all-linear", "modules_to_save": []}


def adapted(name, dtype=torch.float32, trained=True, critic="none", **options) -> Policy:
    """A policy with an adapter of rank 4.

    trained: B is random, as if it had been trained; otherwise the adapter is fresh.
    """
    policy = Policy(causal_lm(name, dtype), critic, VOCAB).eval()
    lora.adapt(policy.lm, **(RANK_4 | options))
    if trained:
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter_name, p in policy.lm.named_parameters():
                if "lora_B" in parameter_name or "modules_to_save" in parameter_name:
                    p.add_(0.2 * torch.randn(p.shape, generator=g))
    return policy


def plain(name, dtype=torch.float32) -> Policy:
    return Policy(causal_lm(name, dtype), vocab_size=VOCAB).eval()


def trainable(policy) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in policy.lm.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the policy and its reference


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float32) for n in ARCHITECTURES] + [(n, torch.bfloat16) for n in SOME],
)
def test_a_fresh_adapter_changes_no_bit_and_every_kl_to_the_reference_is_exactly_zero(name, dtype):
    policy, batch = adapted(name, dtype, trained=False), forced(ragged(), 0.7)
    reference = reference_of(policy)
    logprobs = policy.score(batch, 20).logprobs
    assert torch.equal(logprobs, plain(name, dtype).score(batch, 20).logprobs)
    assert torch.equal(logprobs, reference.score(batch, 20).logprobs)
    assert torch.equal(logprobs, reference.score_with_states(batch, 20)[0])
    new = policy(batch, reference)
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_adapter_changes_the_policy_and_not_the_reference(name, with_norm):
    norms = {"gpt2": "ln_f", "phi": "final_layernorm", "gpt_neox": "final_layer_norm"}
    modules_to_save = [norms.get(name, "model.norm")] if with_norm else []
    policy, original = adapted(name, modules_to_save=modules_to_save), plain(name)
    batch = forced(ragged(), 0.7)
    reference = reference_of(policy)
    check_reproduced(policy)
    logprobs, states = original.score_with_states(batch, 20)
    ref_logprobs, ref_states = reference.score_with_states(batch, 20)
    assert torch.equal(ref_logprobs, logprobs)
    assert torch.equal(ref_states, states)
    assert torch.equal(reference.score(batch, 20).logprobs, logprobs)
    exact, expected = policy(batch, reference), policy(batch, original)
    assert torch.equal(exact.kl_pi_ref, expected.kl_pi_ref)
    assert torch.equal(exact.kl_ref_pi, expected.kl_ref_pi)
    assert exact.kl_pi_ref.max() > 0.01
    # After the reference the adapter is on again.
    assert (policy.score(batch, 20).logprobs - logprobs).abs().max() > 0.01


def test_the_reference_holds_no_tensor_of_its_own():
    policy = adapted("llama")
    addresses = [
        {x.data_ptr() for x in [*p.parameters(), *p.buffers()]}
        for p in (policy, reference_of(policy))
    ]
    assert addresses[0] == addresses[1]


def test_the_adapter_is_on_again_also_after_an_error_in_the_reference():
    policy, batch = adapted("llama"), forced(ragged())
    before, reference = policy(batch).logprobs, reference_of(policy)
    with pytest.raises(RuntimeError):
        reference.backbone(input_ids=torch.zeros(1, 1), attention_mask=None)
    assert torch.equal(policy(batch).logprobs, before)
    assert all(p.requires_grad for n, p in policy.lm.named_parameters() if "lora_" in n)


# ---------------------------------------------------------------- what is trained


def merged_by_hand(policy: Policy, name: str) -> Policy:
    """An ordinary model with the weights W + s B A, and the layers that were trained in full."""
    merged = plain(name, torch.float64)
    with torch.no_grad():
        for layer_name, layer in lora_layers(policy).items():
            weight = merged.lm.get_parameter(f"{layer_name}.weight")
            weight.add_(layer.get_delta_weight("default"))
        for parameter_name, p in trainable(policy).items():
            if "modules_to_save" in parameter_name:
                merged.lm.get_parameter(original_name(parameter_name)).copy_(p)
    return merged


def lora_layers(policy: Policy) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in policy.lm.named_modules() if hasattr(m, "lora_A")}


def original_name(name: str) -> str:
    return name.replace(".modules_to_save.default", "")


@pytest.mark.parametrize("way", ["whole", "head chunks", "gradient checkpointing"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi"])
def test_the_gradient_is_that_of_the_merged_weights_through_b_and_a(name, way):
    """For W + s B A: dB = s dW Aᵀ and dA = s Bᵀ dW, with dW from an ordinary model.

    The reference runs between forward and backward.
    """
    modules_to_save = ["norm"] if name != "phi" else []
    policy = adapted(name, torch.float64, modules_to_save=modules_to_save)
    batch = forced(ragged(), 0.7)
    merged = merged_by_hand(policy, name)
    reference = reference_of(policy)
    if way == "gradient checkpointing":
        checkpoint_layers(policy)
    if way == "head chunks":
        outputs = policy.forward_in_chunks(batch, reference, tokens=6)
    else:
        outputs = [(policy(batch, reference), batch)]
    for new, _ in outputs:
        (new.kl_pi_ref + new.logprobs).sum().backward()
    new = merged(batch, plain(name, torch.float64))
    (new.kl_pi_ref + new.logprobs).sum().backward()

    layers, scale = lora_layers(policy), 2.0  # alpha / r
    assert len(layers) > 10
    for layer_name, layer in layers.items():
        d = merged.lm.get_parameter(f"{layer_name}.weight").grad
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        torch.testing.assert_close(b.grad, scale * d @ a.T, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.grad, scale * b.T @ d, rtol=1e-9, atol=1e-11)
    for parameter_name, p in trainable(policy).items():
        if "modules_to_save" in parameter_name:
            expected = merged.lm.get_parameter(original_name(parameter_name)).grad
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


@pytest.mark.parametrize("critic", ["none", "head", "network"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_only_adapter_and_critic_are_trained_and_the_critic_is_not_adapted(name, critic):
    policy = adapted(name, critic=critic)
    groups = policy.parameter_groups()
    of_adapter = {id(p) for n, p in policy.lm.named_parameters() if "lora_" in n}
    assert {id(p) for p in groups["policy"]} == of_adapter
    if critic != "none":
        assert {id(p) for p in groups["critic"]} == {id(p) for p in policy.critic.parameters()}
        assert not any("lora" in n for n, _ in policy.critic.named_parameters())
        assert reference_of(policy).critic is None


def test_layers_trained_in_full_stay_trained_after_the_reference_has_run():
    """transformers' enable_adapters() would leave them frozen and switched off."""
    policy = adapted("llama", modules_to_save=["model.norm"])
    names = set(trainable(policy))
    assert "model.norm.modules_to_save.default.weight" in names
    reference_of(policy).score(forced(ragged()), 20)
    assert set(trainable(policy)) == names
    policy(forced(ragged())).logprobs.sum().backward()
    assert policy.lm.get_parameter("model.norm.modules_to_save.default.weight").grad.any()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_frozen_unembedding_costs_no_product_for_its_gradient(backend, monkeypatch):
    """2 M D V operations less. Tiled products are in place, which torch's counter does not see."""
    m, d, v = 24, 16, 40
    hidden, ids = torch.randn(m, d, requires_grad=True), torch.randint(v, (m,))
    in_place: list[int] = []
    monkeypatch.setattr(
        tiled,
        "add_product",
        lambda total, a, b, first: in_place.append(2 * a.numel() * b.shape[1]),
    )

    def operations(trained: bool) -> int:
        weight = torch.randn(v, d, requires_grad=trained)
        in_place.clear()
        with FlopCounterMode(display=False) as counter:
            token_logprobs(hidden, Head(weight), ids, backend=backend).logprobs.sum().backward()
        assert (weight.grad is not None) == trained
        return counter.get_total_flops() + sum(in_place)

    assert operations(True) - operations(False) == 2 * m * d * v


def test_the_unembedding_of_an_adapted_policy_is_frozen_and_the_reference_shares_it():
    policy = adapted("tied")
    assert not policy.head.weight.requires_grad
    assert reference_of(policy).head.weight is policy.head.weight  # one product for both in tiles


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("name", SOME)
def test_rollouts_use_the_adapter_and_have_the_logprobs_of_the_scorer(name, sampler):
    def sample(policy: Policy) -> Batch:
        return SAMPLERS[sampler](policy, *prompts(), uniforms(12, 10), sampling_params())

    policy = adapted(name, trained=False)
    fresh = sample(policy)
    assert fresh.responses() == sample(plain(name)).responses()
    with torch.no_grad():
        for parameter_name, p in policy.lm.named_parameters():
            if "lora_B" in parameter_name:
                p.add_(0.3)
    batch = sample(policy)
    assert batch.responses() != fresh.responses()
    scored = policy(batch).logprobs
    torch.testing.assert_close(batch.sampler_logprobs, scored.detach(), rtol=0, atol=2e-5)
    assert (reference_of(policy)(batch).logprobs - scored)[batch.mask].abs().max() > 0.01


# ---------------------------------------------------------------- PEFT's own format


def logits_of(lm, ids: torch.Tensor) -> torch.Tensor:
    return lm.eval()(ids).logits


@pytest.mark.parametrize("modules_to_save", [[], ["model.norm"]], ids=str)
def test_a_checkpoint_loads_with_plain_peft_with_transformers_and_merged_with_load(
    tmp_path, modules_to_save
):
    base, folder = make_base(tmp_path / "base"), tmp_path / "adapter"
    options = RANK_4 | {"modules_to_save": modules_to_save}
    policy, tokenizer = load(str(base))
    lora.adapt(policy.lm, **options)
    with torch.no_grad():
        for p in trainable(policy).values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {f.name for f in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files

    ids = torch.arange(5, 25)[None]
    expected = logits_of(policy.lm, ids)
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits_of(by_peft, ids), expected)
    # Transformers before 5.23 leaves modules_to_save out.
    if not modules_to_save or Version(transformers.__version__) >= Version("5.23"):
        by_transformers = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits_of(by_transformers, ids), expected)

    merged, _ = load(str(folder))
    torch.testing.assert_close(logits_of(merged.lm, ids), expected, rtol=0, atol=2e-5)
    assert not lora.adapted(merged.lm)
    assert all(p.requires_grad for p in merged.lm.parameters())

    # An exported checkpoint is an ordinary directory, without any file of PEFT.
    exported = tmp_path / "export"
    export(str(folder), str(exported))
    assert not list(exported.glob("adapter*"))
    exported_tokenizer = AutoTokenizer.from_pretrained(exported)
    assert exported_tokenizer("1+2=").input_ids == tokenizer("1+2=").input_ids
    exported_lm = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(logits_of(exported_lm, ids), logits_of(merged.lm, ids))

    again, _ = load(str(base))
    lora.adapt(again.lm, **options, seed=9)
    lora.restore(again.lm, folder)
    assert torch.equal(logits_of(again.lm, ids), expected)


def test_an_adapter_on_an_adapter_names_it_and_loads_from_there(base, here):
    run(base, "run=one", *LORA, "optim.steps=2")
    first = "one/checkpoints/step-000002"
    policy, tokenizer = load(first)
    lora.adapt(policy.lm, r=2, alpha=4, target_modules="all-linear", modules_to_save=[])
    with torch.no_grad():
        for p in trainable(policy).values():
            p.add_(0.1)
    policy.lm.save_pretrained("two")
    tokenizer.save_pretrained("two")
    settings = json.loads(Path("two/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == first
    ids = torch.arange(5, 25)[None]
    expected = logits_of(policy.lm, ids)
    torch.testing.assert_close(logits_of(load("two")[0].lm, ids), expected, rtol=0, atol=2e-5)
    assert (logits_of(load(first)[0].lm, ids) - expected).abs().max() > 0.01
    architecture, _ = footprint.architecture(config.load(["model.name=two"]))
    assert architecture.num_hidden_layers == policy.lm.config.num_hidden_layers


def test_a_bf16_adapter_has_float32_masters_and_comes_back_bit_for_bit(base, here):
    run(base, "run=whole", *LORA, "model.dtype=bfloat16", "optim.steps=4")
    run(base, "run=halves", *LORA, "model.dtype=bfloat16", "optim.steps=2")
    resume(Path("halves"), "optim.steps=4")
    assert differences(Path("whole"), Path("halves")) == []
    state = torch.load("whole/checkpoints/step-000004/optimizer.pt", weights_only=True)
    assert {m.dtype for m in state["masters"]["policy"]} == {torch.float32}


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "options",
    [
        (),
        PPO,
        (
            "lora.modules_to_save=[model.norm]",
            "kl_ref.place=loss",
            "kl_ref.estimator=exact_pi_ref",
            "optim.head_tokens=20",
        ),
    ],
    ids=["grpo", "ppo", "exact"],
)
def test_three_steps_and_a_resume_are_six_bit_for_bit_and_the_first_kl_is_exactly_zero(
    base, here, options
):
    """kl_pi_ref is compared too, so after the resume the reference is the first policy again."""
    run(base, "run=whole", *LORA, *options)
    run(base, "run=halves", *LORA, *options, "optim.steps=3")
    resume(Path("halves"), "optim.steps=6")
    assert differences(Path("whole"), Path("halves")) == []
    first, *_, last = rows(Path("whole"))
    assert first["kl_pi_ref_token"] == first["kl_pi_ref_sequence"] == 0.0
    assert last["kl_pi_ref_sequence"] != 0.0
    assert Path("whole/checkpoints/step-000006/adapter_model.safetensors").is_file()


def test_a_run_leaves_the_base_unchanged_to_the_bit_and_keeps_no_state_for_it(base, here):
    cfg = config.load(arguments(base, *LORA, *PPO, "critic.kind=head"))
    models, algorithm, data = build(cfg, train.generate_and_score)
    lm = models.policy.lm
    before = {name: x.clone() for name, x in lm.state_dict().items()}
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    for _ in range(2):
        inputs = step_inputs(cfg, data, state)
        train.training_step(cfg, models, algorithm, data, state, *inputs)
        state.step += 1
    now = lm.state_dict()
    changed = {name for name, x in now.items() if not torch.equal(x, before[name])}
    assert changed == {name for name in now if "lora_" in name}
    of_base = {name.replace(".base_layer", ""): x for name, x in now.items() if "lora_" not in name}
    saved = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert of_base.keys() == saved.keys()
    assert all(torch.equal(of_base[name], x) for name, x in saved.items())

    with_state = models.optimizer.adamw.state_dict()["state"]
    groups = models.policy.parameter_groups()
    trained = {id(p) for params in groups.values() for p in params}
    # A and B of seven layers; weight and bias of the critic's head.
    assert len(with_state) == len(trained) == 2 * 7 + 2


def test_the_adapter_starts_from_the_runs_seed(base, here):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, f"run={name}", *LORA, f"seed={seed}", "optim.steps=1", "optim.lr=0")
    a, b, c = (
        peft.utils.load_peft_weights(f"{n}/checkpoints/step-000001", device="cpu") for n in "abc"
    )
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(a[n], c[n]) == ("lora_B" in n) for n in a)


# ---------------------------------------------------------------- mistakes


def test_without_peft_one_line_names_the_extra(base, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert exit_code(train.main, arguments(base, *LORA)) == 2
    assert capsys.readouterr().err == "error: lora.r=4 needs PEFT: pip install 'rlkl[lora]'\n"
    (here / "adapter").mkdir()
    settings = json.dumps({"base_model_name_or_path": str(base)})
    (here / "adapter" / "adapter_config.json").write_text(settings)
    message = r"model.name='adapter', an adapter, needs PEFT: pip install 'rlkl\[lora\]'"
    with pytest.raises(UserError, match=message):
        load("adapter")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "no_such"},
        {"target_modules": ["q_proj", "no_such"]},
        {"modules_to_save": ["no_such"]},
        {"target_modules": "(no_such"},
    ],
    ids=str,
)
def test_layers_that_do_not_exist_are_refused_with_those_that_do(options):
    """PEFT itself accepts a list that contains one wrong name."""
    with pytest.raises(UserError, match=r"lora.*no_such.*down_proj, gate_proj, k_proj"):
        adapted("llama", **options)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_an_adapted_unembedding_is_refused(option):
    with pytest.raises(UserError, match="unembedding"):
        adapted("llama", **{option: ["lm_head"]})


def test_an_adapter_whose_base_is_gone_is_refused_in_one_line(tmp_path):
    policy = adapted("llama")
    policy.lm.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model.name="):
        load(str(tmp_path))


def test_a_deep_copy_of_an_adapted_policy_is_independent():
    policy = adapted("llama")
    other, batch = copy.deepcopy(policy), forced(ragged())
    with torch.no_grad():
        for p in trainable(other).values():
            p.zero_()
    assert torch.equal(other(batch).logprobs, plain("llama")(batch).logprobs)
    assert not torch.equal(policy(batch).logprobs, other(batch).logprobs)
