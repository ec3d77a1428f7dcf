"""Chat checkpoints: messages go through the tokenizer's template, and any EOS ends a response."""

import json

import pytest
import torch
from runs_fixture import SMALL, make_base, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train
from rlkl.rollout import SAMPLERS

pytest_plugins = ("runs_fixture",)

CHATML = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """As Qwen's: ChatML; <|im_end|> ends a turn and <eos> a text; the embedding has spare rows."""
    folder = make_base(tmp_path_factory.mktemp("model") / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    end_of_text = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    lm.resize_token_embeddings(128)
    with torch.no_grad():
        lm.lm_head.weight[tokenizer.eos_token_id] = lm.lm_head.weight[end_of_text]
    lm.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end_of_text])
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_run(chat_model, here):
    """train.py for a few steps on chat prompts; returns the rows of its metrics."""
    system = {"role": "system", "content": "Add."}
    users = [{"role": "user", "content": f"{i}+{i % 7}="} for i in range(40)]
    lines = [json.dumps({"prompt": [system, user], "answer": "1"}) for user in users]
    (here / "chat.jsonl").write_text("\n".join(lines))
    options = [option for option in SMALL if not option.startswith("task")]
    options += [f"model.name={chat_model}", "task=jsonl", "task.path=chat.jsonl", "run=out"]
    options += ["reward=reward.py:digits", "sampling.max_new_tokens=12", "log.every=1"]

    def run(*overrides: str) -> list[dict]:
        train.main([*options, *overrides])
        return rows(here / "out")

    return run


def test_messages_go_through_the_template_and_either_eos_ends_a_response(
    chat_model, chat_run, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")}
    assert len(ends) == 2
    engine = SAMPLERS["engine"]
    batches = []

    def record(policy, prompt_ids, prompt_mask, uniforms, params):
        assert set(params.eos_ids) == ends
        assert params.vocab_size == len(tokenizer) == 101
        batches.append(engine(policy, prompt_ids, prompt_mask, uniforms, params))
        return batches[-1]

    monkeypatch.setitem(SAMPLERS, "engine", record)
    metrics = chat_run("optim.steps=3", "eval.every=0", "eval.prompts=1", "eval.samples=1")
    last_ids = set()
    for batch in batches:
        prompt = tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]])
        assert prompt.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        for ids, truncated in zip(batch.responses(), batch.truncated, strict=True):
            assert not ends & set(ids[:-1])
            assert (ids[-1] in ends) != bool(truncated)
            assert max(ids) < 101
            last_ids.add(ids[-1])
    assert ends <= last_ids, "both were sampled, and are in the mask"
    assert all("<|im_end|>" not in row["sample"]["response"] for row in metrics)


@pytest.mark.parametrize("options", [(), ("lora.r=4",)], ids=["full", "lora"])
def test_a_chat_run_trains_saves_and_keeps_its_template(chat_run, here, options):
    assert len(chat_run("optim.steps=2", *options)) == 2
    saved = AutoTokenizer.from_pretrained(here / "out" / "checkpoints" / "step-000002")
    assert saved.chat_template == CHATML
    assert saved.eos_token == "<|im_end|>"
