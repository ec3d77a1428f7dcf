"""Chat checkpoints through train.py: messages by the tokenizer's template, and every id that ends a reply."""

import io
import json

import pytest
import torch
from rich.console import Console
from runs_fixture import SMALL, make_base, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train
from rlkl import config
from rlkl.build import build

pytest_plugins = ("runs_fixture",)

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]


@pytest.fixture
def chat(tmp_path, here):
    """Like Qwen's: ChatML, <|im_end|> ends a turn and <eos> a text, and the embedding has rows to spare."""
    folder = make_base(tmp_path / "chat")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    end_of_text = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    lm.resize_token_embeddings(128)
    with torch.no_grad():
        lm.lm_head.weight[tokenizer.eos_token_id] = lm.lm_head.weight[end_of_text]
    lm.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, end_of_text])
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [{"prompt": [MESSAGES[0], {"role": "user", "content": f"{i}+{i % 7}="}], "answer": "1"} for i in range(40)]
    (here / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def options(chat, *more):
    some = [x for x in SMALL if not x.startswith("task")]
    return [*some, f"model.name={chat}", "task=jsonl", "task.path=chat.jsonl", "reward=reward.py:digits",
            "sampling.max_new_tokens=12", *more]


def test_messages_are_sampled_from_behind_the_template_and_either_end_ends_a_reply(chat):
    cfg = config.load(options(chat))
    parts = build(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    tokenizer, seen = parts.tokenizer, []
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")}
    assert set(parts.rule.eos_ids) == ends
    assert len(ends) == 2
    assert parts.rule.vocab_size == len(tokenizer) == 101
    real = parts.sampler
    parts.sampler = lambda *args: seen.append(real(*args)) or seen[-1]
    state = train.State(cfg.kl_ref.coef, cfg.kl_old.coef)
    for _ in range(3):
        _, sample = train.training_step(cfg, parts, state)
        state.step += 1
    last = set()
    for batch in seen:
        first = tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]])
        assert first.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
        assert first.endswith("<|im_end|>\n<|im_start|>assistant\n")
        for ids, mask, truncated in zip(batch.response_ids, batch.mask, batch.truncated, strict=True):
            reply = ids[mask].tolist()
            assert not ends & set(reply[:-1])
            assert (reply[-1] in ends) != bool(truncated)
            assert max(reply) < 101
            last.add(reply[-1])
    assert ends <= last, "both ends were sampled, and are in the mask"
    assert "<|im_end|>" not in sample["reply"]


@pytest.mark.parametrize("more", [(), ("lora.r=4",)], ids=["full", "lora"])
def test_a_chat_run_trains_saves_and_keeps_its_template(chat, here, more):
    assert train.main(options(chat, "run=out", "optim.steps=2", *more)) == 0
    assert len(rows(here / "out")) == 2
    saved = AutoTokenizer.from_pretrained(here / "out" / "checkpoints" / "step-000002")
    assert saved.chat_template == CHATML
    assert saved.eos_token == "<|im_end|>"
