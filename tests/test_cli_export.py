"""rlkl export: what is written is an ordinary model, and the policy that was trained."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl.cli.finished import both, checkpoint_of, find
from rlkl.model import load

pytest_plugins = ("runs_fixture", "finished_runs")
IDS = torch.arange(4, 40)[None]


def test_the_weights_of_a_full_run_are_those_of_its_checkpoint_to_the_bit(rlkl, tmp_path):
    said = rlkl("export", "runs/ppo", str(tmp_path / "out"))
    assert f"runs/ppo/checkpoints/step-000006 → {tmp_path}/out: float32, " in said
    found, expected = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (
        tmp_path / "out", checkpoint_of(find("runs/ppo"), "last")))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert not list((tmp_path / "out").glob("critic*")), "a critic is no part of a language model"


def test_an_adapter_is_merged_and_peft_is_not_needed_to_load_it(rlkl, tmp_path, base):
    rlkl("export", "runs/lora", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    run = find("runs/lora")
    last = checkpoint_of(run, "last")
    started = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = started(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        trained = both(run.cfg, last, torch.device("cpu"))[2].lm(IDS).logits
        adapted = PeftModel.from_pretrained(started, last)(IDS).logits
    torch.testing.assert_close(found, adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=0)
    assert (found - before).abs().max() > 0.1


def test_a_narrow_dtype_is_that_of_the_files_and_rounds_the_trained_weights(rlkl, tmp_path):
    rlkl("export", "runs/ppo", str(tmp_path / "out"), "dtype=bfloat16", "step=2")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(checkpoint_of(find("runs/ppo"), "2")).state_dict()
    assert all(torch.equal(x, expected[name].bfloat16()) for name, x in found.state_dict().items())


def test_the_generation_config_samples_what_was_trained(rlkl, tmp_path):
    """Its temperature and the whole distribution, until any id that ends a reply."""
    rlkl("export", "runs/lora", str(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0,
                "eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    assert {name: told[name] for name in expected} == expected
    lm, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer("1+2=", return_tensors="pt")
    out = lm.generate(**prompt.to("cpu"), max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = lm(prompt.input_ids).logits[:, -1]
    torch.testing.assert_close(out.scores[0].log_softmax(-1), (logits / 0.9).log_softmax(-1), atol=1e-5, rtol=0)


def test_an_exported_model_is_a_model_to_start_from(rlkl, tmp_path):
    rlkl("export", "runs/ppo/checkpoints/step-000004", str(tmp_path / "out"))
    policy, tokenizer = load(str(tmp_path / "out"))
    assert policy.lm.dtype == torch.float32
    assert tokenizer("1+2=").input_ids == AutoTokenizer.from_pretrained("runs/ppo/checkpoints/step-000004")(
        "1+2=").input_ids


def test_nothing_is_overwritten_and_what_cannot_be_written_is_told(refused, there, tmp_path):
    (tmp_path / "out").mkdir()
    assert refused("export", "runs/ppo", str(tmp_path / "out")) == (
        f"{tmp_path}/out: it exists, and nothing is ever overwritten: choose another, or delete it")
    assert list((tmp_path / "out").iterdir()) == []
    assert refused("export", "runs/ppo", "reward.py/out").startswith("reward.py/out: cannot be written: ")
    assert refused("export", "runs/ppo", "out", "dtype=int8").startswith("dtype='int8': input should be 'float32', ")
    assert not (there / "out").exists()


@pytest.mark.parametrize("arguments", [["runs/ppo"], ["runs/ppo", "a", "b"]])
def test_a_run_and_a_folder_are_both_needed(refused, arguments):
    assert refused("export", *arguments) == (
        f"usage: rlkl export RUN OUT [key=value …]; it was given {', '.join(arguments)}")
