"""Chat checkpoints: messages go through the tokenizer's template, and any EOS ends a response."""

import inspect
import json

import pytest
import torch
from runs_fixture import SMALL, make_base, rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

import train
from rlkl import cli
from rlkl.cli.dpo import tokenize_pairs
from rlkl.cli.sft import solutions
from rlkl.errors import UserError
from rlkl.rewards import feedback
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sampling import encode
from rlkl.run.config import load
from rlkl.run.schema import NOT_OF_A_TEMPLATE
from rlkl.supervised.preferences import Pair
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)

CHATML = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML + (  # as Qwen3's
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>no</think>' }}{% endif %}"
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


# ------------------------------------------------------------------ the section `chat`


USER = {"role": "user", "content": "3+4="}
SYSTEM = {"role": "system", "content": "Add."}
CHAT = ("chat.system=Add.", "chat.template={enable_thinking: false}")


@pytest.fixture
def thinking(chat_model, tmp_path):
    """The folder of the chat model with a template that reads enable_thinking."""
    folder = tmp_path / "thinking"
    AutoModelForCausalLM.from_pretrained(chat_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder)
    return folder


def test_a_prompt_is_that_of_apply_chat_template_with_its_options(thinking):
    tokenizer = AutoTokenizer.from_pretrained(thinking)

    def apply(messages, **options) -> list[int]:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )

    for options, expected in {
        (): apply([USER]),
        CHAT[:1]: apply([SYSTEM, USER]),
        CHAT[1:]: apply([USER], enable_thinking=False),
        CHAT: apply([SYSTEM, USER], enable_thinking=False),
        ("chat.template.enable_thinking=true",): apply([USER], enable_thinking=True),
    }.items():
        assert encode(tokenizer, [USER], load([*options]).chat) == expected
    assert apply([USER]) != apply([USER], enable_thinking=False)


def test_every_command_asks_the_policy_with_them_and_no_judge(thinking, here, monkeypatch):
    """Training, both evaluations, chat, label, SFT and DPO; the judge has a template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    engine, judge = SAMPLERS["engine"], feedback.next_logprobs
    prompts, questions = [], []

    def record(policy, prompt_ids, prompt_mask, uniforms, params):
        rows = zip(prompt_ids, prompt_mask, strict=True)
        prompts.extend(tokenizer.decode(ids[mask]) for ids, mask in rows)
        return engine(policy, prompt_ids, prompt_mask, uniforms, params)

    def record_judge(policy, rows, max_tokens):
        questions.extend(tokenizer.decode(row) for row in rows)
        return judge(policy, rows, max_tokens)

    monkeypatch.setitem(SAMPLERS, "engine", record)
    monkeypatch.setattr(feedback, "next_logprobs", record_judge)
    users = [{"role": "user", "content": f"{i}+{i % 7}="} for i in range(40)]
    lines = [json.dumps({"prompt": [user], "answer": "1"}) for user in users]
    (here / "chat.jsonl").write_text("\n".join(lines))
    task = [f"model.name={thinking}", "task=jsonl", "task.path=chat.jsonl", *CHAT]
    reward = ["reward.name=judge", f"reward.path={thinking}", "reward.principle=Add."]
    small = [option for option in SMALL if not option.startswith("task")]
    label = ["sampling.prompts=4", "sampling.max_new_tokens=3", "out=pairs.jsonl"]

    train.main([*small, *task, *reward, "run=out", "optim.steps=1", "eval.every=0"])
    counts = [len(prompts)]
    for command in (["eval", "out"], ["chat", "out", "--prompt", "3+4="], ["label", *task, *label]):
        assert cli.main([*command]) in (0, 2)  # label: perhaps all scores are equal
        counts.append(len(prompts))
    assert counts == sorted(set(counts))
    cfg = load([*CHAT])
    items = solutions([Example([USER])], tokenizer, cfg.chat)
    items += tokenize_pairs(tokenizer, [Pair([USER], "7", "8")], cfg.chat)
    prompts += [tokenizer.decode(item.prompt) for item in items]
    start = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n"
    assert {p.startswith(start) and p.endswith("<think>no</think>") for p in prompts} == {True}
    assert questions
    assert not [q for q in questions if "system" in q or "<think>" in q]


def test_an_option_that_would_have_no_effect_is_refused(thinking):
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    for options, prompt, words in (
        (CHAT[:1], "3+4=", ["chat.system", "text", "3+4="]),
        (CHAT[1:], "3+4=", ["chat.template", "text"]),
        (CHAT[:1], [SYSTEM, USER], ["chat.system='Add.'", "of its own"]),
        (["chat.template.enable_thinkin=false"], [USER], ["enable_thinkin=False", "not read"]),
    ):
        with pytest.raises(UserError) as error:
            encode(tokenizer, prompt, load([*options]).chat)
        assert [word for word in words if word not in str(error.value)] == []


def test_what_rlkl_passes_to_the_template_itself_is_no_option():
    parameters = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    parameters -= {"self", "kwargs", "chat_template", "sanitize_control_tokens"}
    assert parameters - {"tools", "documents"} <= {*NOT_OF_A_TEMPLATE}
    for name in NOT_OF_A_TEMPLATE:
        with pytest.raises(UserError, match=rf"template\.{name} is set by rlkl"):
            load([f"chat.template.{name}=true"])
