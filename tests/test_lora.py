"""LoRA: nothing but the adapter learns, the reference is the same model without it, and PEFT alone can load it."""

import copy
import io
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import CONFIGS, VOCAB, causal_lm, forced, prompts, ragged, rule, uniforms
from packaging.version import Version
from rich.console import Console
from runs_fixture import PPO, arguments, differences, make_base, resume, rows, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from rlkl import config, lora
from rlkl.build import build
from rlkl.errors import UserError
from rlkl.logprobs import token_logprobs
from rlkl.model import Policy, check_reproduced, checkpoint_layers, export, load, reference_of
from rlkl.rollout import SAMPLERS
from rlkl.types import Head

pytest_plugins = ("runs_fixture",)

EVERY = list(CONFIGS)
SOME = ["llama", "gpt2", "gemma", "phi"]  # plain, transposed weights and learned positions, tied and scaled, biases
LORA = ("lora.r=4", "lora.alpha=8")


def adapted(name, dtype=torch.float32, moved=True, critic="none", targets="all-linear", full=()):
    """A policy with an adapter of rank 4, B drawn at random unless it is fresh."""
    policy = Policy(causal_lm(name, dtype), critic, VOCAB).eval()
    lora.adapt(policy.lm, r=4, alpha=8, targets=targets, full=list(full))
    if moved:
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for n, p in policy.lm.named_parameters():
                if "lora_B" in n or "modules_to_save" in n:
                    p.add_(0.2 * torch.randn(p.shape, generator=g))
    return policy


def plain(name, dtype=torch.float32) -> Policy:
    return Policy(causal_lm(name, dtype), vocab_size=VOCAB).eval()


def trained(policy) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in policy.lm.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the policy and its reference


@pytest.mark.parametrize(("name", "dtype"), [(n, torch.float32) for n in EVERY] + [(n, torch.bfloat16) for n in SOME])
def test_a_fresh_adapter_changes_no_bit_and_every_kl_to_the_reference_is_exactly_zero(name, dtype):
    policy, batch = adapted(name, dtype, moved=False), forced(ragged(), 0.7)
    reference, mine = reference_of(policy), policy.score(batch, 20)
    assert torch.equal(mine.logprobs, plain(name, dtype).score(batch, 20).logprobs)
    assert torch.equal(mine.logprobs, reference.score(batch, 20).logprobs)
    assert torch.equal(mine.logprobs, reference.score_and_states(batch, 20)[0])
    new = policy.evaluate(batch, reference)
    assert not new.kl_pi_ref.any()
    assert not new.kl_ref_pi.any()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_trained_adapter_moves_the_policy_and_not_the_reference(name, full):
    norm = {"gpt2": "ln_f", "phi": "final_layernorm", "gpt_neox": "final_layer_norm"}.get(name, "model.norm")
    policy, first, batch = adapted(name, full=[norm] if full else []), plain(name), forced(ragged(), 0.7)
    reference = reference_of(policy)
    check_reproduced(policy)
    want, states = first.score_and_states(batch, 20)
    found = reference.score_and_states(batch, 20)
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], states)
    assert torch.equal(reference.score(batch, 20).logprobs, want)
    exact, expected = policy.evaluate(batch, reference), policy.evaluate(batch, first)
    assert torch.equal(exact.kl_pi_ref, expected.kl_pi_ref)
    assert torch.equal(exact.kl_ref_pi, expected.kl_ref_pi)
    assert exact.kl_pi_ref.max() > 0.01
    assert (policy.score(batch, 20).logprobs - want).abs().max() > 0.01, "after the reference the adapter is on again"


def test_the_reference_holds_no_tensor_of_its_own():
    policy = adapted("llama")
    mine, theirs = ({x.data_ptr() for x in [*p.parameters(), *p.buffers()]} for p in (policy, reference_of(policy)))
    assert theirs == mine


def test_the_adapter_is_on_again_also_after_an_error_in_the_reference():
    policy, batch = adapted("llama"), forced(ragged())
    before, reference = policy.evaluate(batch).logprobs, reference_of(policy)
    with pytest.raises(RuntimeError):
        reference.backbone(input_ids=torch.zeros(1, 1), attention_mask=None)
    assert torch.equal(policy.evaluate(batch).logprobs, before)
    assert all(p.requires_grad for n, p in policy.lm.named_parameters() if "lora_" in n)


# ---------------------------------------------------------------- what learns


@pytest.mark.parametrize("way", ["whole", "head chunks", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi"])
def test_the_gradient_is_that_of_the_merged_weights_through_b_and_a(name, way):
    """W + s B A: dB = s dW Aᵀ, dA = s Bᵀ dW, with dW from an ordinary model of those weights; the reference between."""
    policy, batch = adapted(name, torch.float64, full=["norm"] if name != "phi" else []), forced(ragged(), 0.7)
    reference, whole = reference_of(policy), plain(name, torch.float64)
    layers = {n: m for n, m in policy.lm.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for n, m in layers.items():
            whole.lm.get_parameter(f"{n}.weight").add_(m.get_delta_weight("default"))
        for n in trained(policy):
            if "modules_to_save" in n:
                whole.lm.get_parameter(n.replace(".modules_to_save.default", "")).copy_(policy.lm.get_parameter(n))
    if way == "checkpointing":
        checkpoint_layers(policy)
    first = plain(name, torch.float64)
    in_chunks = way == "head chunks"
    for new, _ in policy.in_head_chunks(batch, reference, tokens=6) if in_chunks else policy.whole(batch, reference):
        (new.kl_pi_ref + new.logprobs).sum().backward()
    new = whole.evaluate(batch, first)
    (new.kl_pi_ref + new.logprobs).sum().backward()
    assert len(layers) > 10
    for n, m in layers.items():
        d, a, b = whole.lm.get_parameter(f"{n}.weight").grad, m.lora_A.default.weight, m.lora_B.default.weight
        torch.testing.assert_close(b.grad, 2 * d @ a.T, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.grad, 2 * b.T @ d, rtol=1e-9, atol=1e-11)
    for n, p in trained(policy).items():
        if "modules_to_save" in n:
            theirs = whole.lm.get_parameter(n.replace(".modules_to_save.default", "")).grad
            torch.testing.assert_close(p.grad, theirs, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


@pytest.mark.parametrize("critic", ["none", "head", "network"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_adapter_and_critic_are_all_that_is_trained_and_the_critic_is_not_adapted(name, critic):
    policy = adapted(name, critic=critic)
    groups = policy.parameter_groups()
    assert {id(p) for p in groups["policy"]} == {id(p) for n, p in policy.lm.named_parameters() if "lora_" in n}
    if critic != "none":
        assert {id(p) for p in groups["critic"]} == {id(p) for p in policy.critic.parameters()}
        assert not any("lora" in n for n, _ in policy.critic.named_parameters())
        assert reference_of(policy).critic is None


def test_layers_trained_in_full_stay_trained_after_the_reference_has_run():
    """transformers' enable_adapters() leaves them frozen, and switched off: a run then never moves them."""
    policy = adapted("llama", full=["model.norm"])
    names = set(trained(policy))
    assert "model.norm.modules_to_save.default.weight" in names
    reference_of(policy).score(forced(ragged()), 20)
    assert set(trained(policy)) == names
    policy.evaluate(forced(ragged())).logprobs.sum().backward()
    assert policy.lm.get_parameter("model.norm.modules_to_save.default.weight").grad.any()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_frozen_unembedding_costs_no_product_for_its_gradient(backend, monkeypatch):
    """2 M D V operations less; the tiled products are in place, which the counter does not see."""
    m, d, v = 24, 16, 40
    hidden, ids = torch.randn(m, d, requires_grad=True), torch.randint(v, (m,))

    def cost(learns: bool) -> int:
        weight, products = torch.randn(v, d, requires_grad=learns), []
        monkeypatch.setattr("rlkl.tiles.add_product", lambda total, a, b: products.append(2 * a.numel() * b.shape[1]))
        with FlopCounterMode(display=False) as counter:
            token_logprobs(hidden, Head(weight), ids, backend=backend).logprobs.sum().backward()
        assert (weight.grad is not None) == learns
        return counter.get_total_flops() + sum(products)

    assert cost(True) - cost(False) == 2 * m * d * v


def test_the_unembedding_of_an_adapted_policy_is_frozen_and_the_reference_shares_it():
    policy = adapted("tied")
    assert not policy.head.weight.requires_grad
    assert reference_of(policy).head.weight is policy.head.weight  # one product for both in tiles


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("name", SOME)
def test_rollouts_see_the_adapter_and_their_log_probs_are_the_scorers(name, sampler):
    policy, (ids, mask) = adapted(name, moved=False), prompts()
    u = uniforms(12, 10)
    fresh = SAMPLERS[sampler](policy, ids, mask, u, rule())
    assert fresh.replies() == SAMPLERS[sampler](plain(name), ids, mask, u, rule()).replies()
    with torch.no_grad():
        for n, p in policy.lm.named_parameters():
            if "lora_B" in n:
                p.add_(0.3)
    batch = SAMPLERS[sampler](policy, ids, mask, u, rule())
    assert batch.replies() != fresh.replies()
    scored = policy.evaluate(batch).logprobs
    torch.testing.assert_close(batch.sampler_logprobs, scored.detach(), rtol=0, atol=2e-5)
    assert (reference_of(policy).evaluate(batch).logprobs - scored)[batch.mask].abs().max() > 0.01


# ---------------------------------------------------------------- PEFT's own format


@pytest.mark.parametrize("full", [[], ["model.norm"]], ids=str)
def test_a_checkpoint_loads_with_plain_peft_with_transformers_and_merged_with_load(tmp_path, full):
    base = make_base(tmp_path / "base")
    policy, tokenizer = load(str(base))
    lora.adapt(policy.lm, r=4, alpha=8, targets="all-linear", full=full)
    with torch.no_grad():
        for p in trained(policy).values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    folder, ids = tmp_path / "adapter", torch.arange(5, 25)[None]
    policy.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    want = policy.lm(ids).logits
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    assert torch.equal(theirs(ids).logits, want)
    if not full or Version(transformers.__version__) >= Version("5.23"):  # older ones leave modules_to_save out
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, want)
    merged, _ = load(str(folder))
    torch.testing.assert_close(merged.lm(ids).logits, want, rtol=0, atol=2e-5)
    assert not lora.adapted(merged.lm)
    assert all(p.requires_grad for p in merged.lm.parameters())
    export(str(folder), str(tmp_path / "export"))  # an ordinary directory again, with no trace of PEFT
    assert not list((tmp_path / "export").glob("adapter*"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("1+2=").input_ids == tokenizer("1+2=").input_ids
    assert torch.equal(exported(ids).logits, merged.lm(ids).logits)
    again, _ = load(str(base))
    lora.adapt(again.lm, r=4, alpha=8, targets="all-linear", full=full, seed=9)
    lora.restore(again.lm, folder)
    assert torch.equal(again.lm(ids).logits, want)


def test_an_adapter_on_an_adapter_names_it_and_loads_from_there(base, here):
    run(base, "run=one", *LORA, "optim.steps=2")
    first = "one/checkpoints/step-000002"
    policy, tokenizer = load(first)
    lora.adapt(policy.lm, r=2, alpha=4, targets="all-linear", full=[])
    with torch.no_grad():
        for p in trained(policy).values():
            p.add_(0.1)
    policy.lm.save_pretrained("two")
    tokenizer.save_pretrained("two")
    assert json.loads(Path("two/adapter_config.json").read_text())["base_model_name_or_path"] == first
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(load("two")[0].lm(ids).logits, policy.lm(ids).logits, rtol=0, atol=2e-5)
    assert (load(first)[0].lm(ids).logits - policy.lm(ids).logits).abs().max() > 0.01


def test_a_bf16_adapter_has_float32_masters_and_comes_back_bit_for_bit(base, here):
    run(base, "run=whole", *LORA, "model.dtype=bfloat16", "optim.steps=4")
    run(base, "run=halves", *LORA, "model.dtype=bfloat16", "optim.steps=2")
    resume(Path("halves"), "optim.steps=4")
    assert differences(Path("whole"), Path("halves")) == []
    state = torch.load("whole/checkpoints/step-000004/optimizer.pt", weights_only=True)
    assert {m.dtype for m in state["masters"]["policy"]} == {torch.float32}


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("options", [(), PPO, ("lora.full=[model.norm]", "kl_ref.place=loss",
                                               "kl_ref.estimator=exact_pi_ref", "optim.head_tokens=20")],
                         ids=["grpo", "ppo", "exact"])
def test_three_steps_and_a_resume_are_six_bit_for_bit_and_the_first_kl_is_exactly_zero(base, here, options):
    """So the reference is the first policy again after the resume: kl_pi_ref is among what must agree."""
    run(base, "run=whole", *LORA, *options)
    run(base, "run=halves", *LORA, *options, "optim.steps=3")
    resume(Path("halves"), "optim.steps=6")
    assert differences(Path("whole"), Path("halves")) == []
    first, *_, last = rows(Path("whole"))
    assert first["kl_pi_ref_tok"] == first["kl_pi_ref_seq"] == 0.0
    assert last["kl_pi_ref_seq"] != 0.0
    assert "adapter_model.safetensors" in {f.name for f in Path("whole/checkpoints/step-000006").iterdir()}


def test_a_run_leaves_the_base_as_it_was_to_the_bit_and_has_no_state_for_it(base, here):
    cfg = config.load(arguments(base, *LORA, *PPO, "model.critic=head"))
    parts = build(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    first = {n: x.clone() for n, x in parts.policy.lm.state_dict().items()}
    state = train.State(cfg.kl_ref.coef, cfg.kl_old.coef)
    for _ in range(2):
        train.training_step(cfg, parts, state)
        state.step += 1
    now = parts.policy.lm.state_dict()
    assert {n for n, x in now.items() if not torch.equal(x, first[n])} == {n for n in now if "lora_" in n}
    saved = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(x, now.get(n, now.get(n.replace("weight", "base_layer.weight")))) for n, x in saved.items()
               if "proj" not in n)
    layers = {n.replace(".base_layer", ""): x for n, x in now.items() if "lora_" not in n}
    assert layers.keys() == saved.keys()
    assert all(torch.equal(layers[n], x) for n, x in saved.items())
    state = parts.optimizer.adamw.state_dict()["state"]
    learned = {id(p) for params in parts.policy.parameter_groups().values() for p in params}
    assert len(state) == len(learned) == 2 * 7 + 2  # A and B of seven layers, weight and bias of the critic's head


def test_the_adapter_starts_from_the_runs_seed(base, here):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, f"run={name}", *LORA, f"seed={seed}", "optim.steps=1", "optim.lr=0")
    a, b, c = (peft.utils.load_peft_weights(f"{n}/checkpoints/step-000001", device="cpu") for n in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(a[n], c[n]) == ("lora_B" in n) for n in a)


# ---------------------------------------------------------------- mistakes


def test_without_peft_one_line_names_the_extra(base, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train.main(arguments(base, *LORA)) == 2
    assert capsys.readouterr().err == "error: lora.r=4 needs PEFT: pip install 'rlkl[lora]'\n"
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(UserError, match=r"model.name='adapter', an adapter, needs PEFT: pip install 'rlkl\[lora\]'"):
        load("adapter")


@pytest.mark.parametrize("where", [{"targets": "no_such"}, {"targets": ["q_proj", "no_such"]}, {"full": ["no_such"]},
                                   {"targets": "(no_such"}], ids=str)
def test_layers_that_are_not_there_are_answered_with_those_that_are(where):
    """PEFT takes a list of which one name is wrong as it is."""
    with pytest.raises(UserError, match=r"lora.*no_such.*down_proj, gate_proj, k_proj"):
        adapted("llama", **where)


@pytest.mark.parametrize("where", [{"targets": ["lm_head"]}, {"full": ["lm_head"]}])
def test_an_adapted_unembedding_is_refused(where):
    with pytest.raises(UserError, match="unembedding"):
        adapted("llama", **where)


def test_an_adapter_whose_base_is_gone_is_refused_in_one_line(tmp_path):
    policy = adapted("llama")
    policy.lm.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model.name="):
        load(str(tmp_path))


def test_a_deep_copy_of_an_adapted_policy_is_on_its_own():
    policy = adapted("llama")
    other, batch = copy.deepcopy(policy), forced(ragged())
    with torch.no_grad():
        for p in trained(other).values():
            p.zero_()
    assert torch.equal(other.evaluate(batch).logprobs, plain("llama").evaluate(batch).logprobs)
    assert not torch.equal(policy.evaluate(batch).logprobs, other.evaluate(batch).logprobs)
