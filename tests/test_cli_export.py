"""rlkl export: what is written is an ordinary model, and the policy that was trained."""

import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl.cli.run_commands import find_checkpoint, find_run, load_policies
from rlkl.policy.model import load

pytest_plugins = ("runs_fixture", "finished_runs")
IDS = torch.arange(4, 40)[None]


def test_the_weights_of_a_full_run_are_those_of_its_checkpoint_bit_for_bit(rlkl, tmp_path):
    text = rlkl("export", "runs/ppo", str(tmp_path / "out"))
    assert f"runs/ppo/checkpoints/step-000006 → {tmp_path}/out: float32, " in text
    last = find_checkpoint(find_run("runs/ppo"), "last")
    expected = AutoModelForCausalLM.from_pretrained(last).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert exported.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(exported[name], x)] == []
    assert not list((tmp_path / "out").glob("critic*")), "a critic is no part of a language model"


def test_an_adapter_is_merged_and_peft_is_not_needed_to_load_the_result(rlkl, tmp_path, base):
    rlkl("export", "runs/lora", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    run = find_run("runs/lora")
    last = find_checkpoint(run, "last")
    lm = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = lm(IDS).logits
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        trained = load_policies(run.cfg, last, torch.device("cpu")).after.lm(IDS).logits
        adapted = PeftModel.from_pretrained(lm, last)(IDS).logits
    torch.testing.assert_close(exported, adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(exported, trained, atol=1e-4, rtol=0)
    assert (exported - before).abs().max() > 0.1


def test_dtype_rounds_the_trained_weights(rlkl, tmp_path):
    rlkl("export", "runs/ppo", str(tmp_path / "out"), "dtype=bfloat16", "step=2")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    folder = find_checkpoint(find_run("runs/ppo"), "2")
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, x in exported.state_dict().items():
        assert torch.equal(x, trained[name].bfloat16()), name


def test_the_generation_config_samples_the_policy_that_was_trained(rlkl, tmp_path):
    """Its temperature and the whole distribution, until any id that ends a response."""
    rlkl("export", "runs/lora", str(tmp_path / "out"))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    assert {name: generation[name] for name in expected} == expected
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer("1+2=", return_tensors="pt")
    out = lm.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = lm(prompt.input_ids).logits[:, -1]
    logprobs = (logits / 0.9).log_softmax(-1)
    torch.testing.assert_close(out.scores[0].log_softmax(-1), logprobs, atol=1e-5, rtol=0)


def test_an_exported_model_can_be_trained_again(rlkl, tmp_path):
    checkpoint = "runs/ppo/checkpoints/step-000004"
    rlkl("export", checkpoint, str(tmp_path / "out"))
    policy, tokenizer = load(str(tmp_path / "out"))
    assert policy.lm.dtype == torch.float32
    expected = AutoTokenizer.from_pretrained(checkpoint)("1+2=").input_ids
    assert tokenizer("1+2=").input_ids == expected


def test_nothing_is_overwritten_and_other_mistakes_are_named(refused, there, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    message = f"{out}: it exists and is never overwritten: choose another, or delete it"
    assert refused("export", "runs/ppo", str(out)) == message
    assert list(out.iterdir()) == []
    message = refused("export", "runs/ppo", "reward.py/out")
    assert message.startswith("reward.py/out: cannot be written: ")
    message = refused("export", "runs/ppo", "out", "dtype=int8")
    assert message.startswith("dtype='int8': input should be 'float32', ")
    assert not (there / "out").exists()
    for arguments in (["runs/ppo"], ["runs/ppo", "a", "b"]):
        usage = "usage: rlkl export RUN OUT [key=value …]"
        assert refused("export", *arguments) == f"{usage}; it was given {', '.join(arguments)}"
