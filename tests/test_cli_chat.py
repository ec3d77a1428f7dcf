"""rlkl chat: the responses before and after training, side by side, from the same uniforms."""

import io
import re
import shutil

import pytest
from finished_runs import cells, with_template
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl.cli import chat
from rlkl.cli.run_commands import find_checkpoint, find_run
from rlkl.errors import UserError
from rlkl.policy.model import load, sampling_params
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sampling import decode, draw_uniforms, encode, left_pad
from rlkl.run.seeds import generator
from rlkl.supervised.scratch import character_tokenizer

pytest_plugins = ("runs_fixture", "finished_runs")


def responses(text: str) -> list[tuple[str, ...]]:
    """(before, after) of each table that was printed; every second row is a footer."""
    return [tuple(row) for row in cells(text)[::2]]


def last_checkpoint(run: str):
    return find_checkpoint(find_run(run), "last")


def sampled(folder, prompt: str, number: int, temperature: float) -> str:
    """The response of a policy to the prompt of this number, by the naive sampler."""
    policy, tokenizer = load(str(folder))
    params = sampling_params(policy, tokenizer, temperature)
    ids, mask = left_pad([encode(tokenizer, prompt)], params.pad_id)
    uniforms = draw_uniforms(1, 6, generator(0, number, "chat"), "cpu")
    batch = SAMPLERS["naive"](policy, ids, mask, uniforms, params)
    return decode(tokenizer, batch)[0].strip()


def test_both_policies_answer_each_line_with_the_uniforms_of_its_number(rlkl, base, monkeypatch):
    prompts = ["12+34=", "7", "9+"]
    monkeypatch.setattr("sys.stdin", io.StringIO("12+34=\n\n  \n7\n9+"))
    pairs = responses(rlkl("chat", "runs/ppo", "temperature=1.3"))
    folders = (base, last_checkpoint("runs/ppo"))
    expected = [tuple(sampled(f, p, i, 1.3) for f in folders) for i, p in enumerate(prompts)]
    assert pairs == expected
    assert any(before != after for before, after in pairs)


def test_without_options_chat_samples_like_the_rollouts_of_the_run(rlkl, base):
    pairs = responses(rlkl("chat", "runs/lora", "--prompt", "5+6="))
    folders = (base, last_checkpoint("runs/lora"))
    assert pairs == [tuple(sampled(f, "5+6=", 0, 0.9) for f in folders)]


def test_greedy_responses_are_those_of_plain_transformers(rlkl, base):
    options = ("--prompt", "12+34=", "temperature=0", "max_new_tokens=9")
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("12+34=", return_tensors="pt").input_ids
    expected = []
    for folder in (base, last_checkpoint("runs/ppo")):
        lm = AutoModelForCausalLM.from_pretrained(folder)
        out = lm.generate(
            ids, max_new_tokens=9, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(text.strip())
    assert responses(rlkl("chat", "runs/ppo", *options)) == [tuple(expected)]


def test_the_columns_name_the_policies_and_the_footers_count_tokens(rlkl):
    folder = "runs/ppo/checkpoints/step-000002"
    text = rlkl("chat", folder, "--prompt", "[b]3[/b]+4=", "max_new_tokens=1")
    assert re.search(r"before: .*┃ after: step-000002", text)
    assert "[b]3[/b]+4=" in text, "square brackets are no markup"
    footers = cells(text)[1]
    assert [cell for cell in footers if not re.fullmatch(r"1 tokens(, truncated)?", cell)] == []


def test_long_responses_wrap_inside_their_columns(monkeypatch, capsys):
    from rlkl.run.terminal import console

    monkeypatch.setattr(console, "width", 50)
    long = [chat.Response("a" * 100, 3, False), chat.Response("b c " * 30, 4, True)]
    chat.print_responses("x", "first", "second", long)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50
    assert "".join(lines[4:-3]).count("a") == 100
    assert cells("\n".join(lines))[-1] == ["3 tokens", "4 tokens, truncated"]


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_template(base, tmp_path / "chat"))
    prompt = chat.to_example(tokenizer, "1+2", 4, None).prompt
    assert tokenizer.decode(encode(tokenizer, prompt)) == "<user>1+2="
    assert chat.to_example(character_tokenizer(), "1+2", 4, None).prompt == "1+2"


def test_a_stop_string_of_the_run_ends_a_response(rlkl, there, monkeypatch):
    """With each digit a stop string, a response has at most one digit."""
    shutil.copytree("runs/ppo", "runs/stops")
    config = there / "runs/stops/config.yaml"
    config.write_text(config.read_text().replace("  stop: []", f"  stop: {list('0123456789')}"))
    most_digits = {}
    for run in ("ppo", "stops"):
        monkeypatch.setattr("sys.stdin", io.StringIO("5+6=\n" * 10))
        texts = [text for pair in responses(rlkl("chat", f"runs/{run}")) for text in pair]
        most_digits[run] = max(sum(map(str.isdigit, text)) for text in texts)
    shutil.rmtree("runs/stops")
    assert most_digits["stops"] == 1 < most_digits["ppo"]


def test_a_prompt_without_room_is_refused_and_the_next_one_is_answered(rlkl, refused, monkeypatch):
    long = "1" * 60
    message = (
        "the prompt has 60 tokens, a response up to 6, the model's context 64: shorten the prompt, "
        "or lower max_new_tokens"
    )
    assert refused("chat", "runs/ppo", "--prompt", long) == message
    assert refused("chat", "runs/ppo", "--prompt", "") == "the prompt is empty"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\n1+1=\n"))
    text = rlkl("chat", "runs/ppo")
    assert f"error: {message}" in text
    assert len(responses(text)) == 1


def test_a_prompt_may_fill_the_context_and_an_unknown_context_refuses_nothing():
    tokenizer = character_tokenizer()
    assert chat.to_example(tokenizer, "1" * 10, 6, 16).prompt == "1" * 10
    with pytest.raises(UserError, match="shorten"):
        chat.to_example(tokenizer, "1" * 10, 7, 16)
    assert chat.to_example(tokenizer, "1" * 1000, 1000, None).prompt == "1" * 1000


def test_wrong_arguments_are_refused_by_name(refused):
    message = refused("chat", "runs/ppo", "--prompt")
    assert message == "--prompt needs a text: rlkl chat RUN --prompt TEXT"
    assert refused("chat", "runs/ppo", "temperature=-1").startswith("temperature=-1: ")
    message = refused("chat", "runs/ppo", "device=bogus", "--prompt", "1")
    assert message.startswith("device='bogus': choose auto")
