"""rlkl chat: the reply before and after, side by side, from the same uniforms."""

import io
import re
import shutil

import pytest
import torch
from finished_runs import with_template
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl.cli import chat
from rlkl.cli.finished import checkpoint_of, find
from rlkl.errors import UserError
from rlkl.model import decode, encode, left_pad, load, sampling_rule
from rlkl.rollout import SAMPLERS
from rlkl.rollout.sample import draw_uniforms
from rlkl.seeds import generator
from rlkl.tiny import character_tokenizer

pytest_plugins = ("runs_fixture", "finished_runs")


def columns(said: str) -> list[tuple[str, str]]:
    """(before, after) of each row of each table: heads are left out, feet are not."""
    return [tuple(cell.strip() for cell in line[1:-1].split("│")) for line in said.splitlines() if line.startswith("│")]


def sampled(folder, prompt: str, number: int, temperature: float, room: int = 6) -> str:
    """What a policy says, by the slow and obvious sampler."""
    policy, tokenizer = load(str(folder))
    rule = sampling_rule(policy, tokenizer, temperature)
    ids, mask = left_pad([encode(tokenizer, prompt)], rule.pad_id)
    uniforms = draw_uniforms(1, room, generator(0, number, "chat"), "cpu")
    return decode(tokenizer, SAMPLERS["naive"](policy, ids, mask, uniforms, rule))[0]


def test_both_policies_answer_each_line_with_the_uniforms_of_its_number(rlkl, base, monkeypatch):
    prompts = ["12+34=", "7", "9+"]
    monkeypatch.setattr("sys.stdin", io.StringIO("12+34=\n\n  \n7\n9+"))
    found = columns(rlkl("chat", "runs/ppo", "temperature=1.3"))[::2]
    folders = (base, checkpoint_of(find("runs/ppo"), "last"))
    assert found == [tuple(sampled(f, p, i, 1.3).strip() for f in folders) for i, p in enumerate(prompts)]
    assert any(before != after for before, after in found)


def test_a_chat_without_options_samples_like_the_rollouts_of_the_run(rlkl, base):
    found = columns(rlkl("chat", "runs/lora", "--prompt", "5+6="))[0]
    last = checkpoint_of(find("runs/lora"), "last")
    assert found == tuple(sampled(f, "5+6=", 0, 0.9).strip() for f in (base, last))


def test_greedy_replies_are_those_of_plain_transformers(rlkl, base):
    found = columns(rlkl("chat", "runs/ppo", "--prompt", "12+34=", "temperature=0", "max_new_tokens=9"))[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids, expected = tokenizer("12+34=", return_tensors="pt").input_ids, []
    for folder in (base, checkpoint_of(find("runs/ppo"), "last")):
        out = AutoModelForCausalLM.from_pretrained(folder).generate(
            ids, max_new_tokens=9, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        expected.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
    assert found == tuple(expected)


def test_the_columns_say_which_policy_and_how_long_and_whether_it_ran_out_of_room(rlkl, base):
    said = rlkl("chat", "runs/ppo/checkpoints/step-000002", "--prompt", "[b]3[/b]+4=", "max_new_tokens=1")
    assert re.search(r"before: .*┃ after: step-000002", said)
    assert "[b]3[/b]+4=" in said, "no markup"
    assert all(re.fullmatch(r"1 tokens(, no more room)?", cell) for cell in columns(said)[1])


def test_long_replies_wrap_inside_their_columns(there, monkeypatch, capsys):
    from rlkl.terminal import console

    monkeypatch.setattr(console, "width", 40)
    chat.show("x", "base", there / "step-000001", [chat.Reply("a" * 100, 3, False), chat.Reply("b c " * 30, 4, True)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(c for line in lines[4:-3] for c in line).count("a") == 100


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(with_template(base, tmp_path / "chat"))
    assert tokenizer.decode(chat.asked(tokenizer, "1+2", 4, None)) == "<user>1+2="
    plain = character_tokenizer()
    assert plain.decode(chat.asked(plain, "1+2", 4, None)) == "1+2"


def test_a_stop_string_of_the_run_ends_a_reply(rlkl, there, monkeypatch):
    shutil.copytree("runs/ppo", "runs/stops", dirs_exist_ok=True)
    config = there / "runs/stops/config.yaml"
    config.write_text(config.read_text().replace("  stop: []", f"  stop: {list('0123456789')}"))
    digits = {}
    for run in ("ppo", "stops"):
        monkeypatch.setattr("sys.stdin", io.StringIO("5+6=\n" * 10))
        said = [text for pair in columns(rlkl("chat", f"runs/{run}"))[::2] for text in pair]
        digits[run] = max(sum(map(str.isdigit, text)) for text in said)
    shutil.rmtree("runs/stops")
    assert digits["stops"] == 1 < digits["ppo"]


def test_a_prompt_without_room_is_refused_and_a_conversation_goes_on_after_it(rlkl, refused, monkeypatch):
    long = "1" * 60
    words = "the prompt has 60 tokens and a reply 6, the model's context 64: shorten it, or lower max_new_tokens"
    assert refused("chat", "runs/ppo", "--prompt", long) == words
    assert refused("chat", "runs/ppo", "--prompt", "") == "the prompt is empty"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\n1+1=\n"))
    said = rlkl("chat", "runs/ppo")
    assert f"error: {words}" in said
    assert len(columns(said)) == 2


def test_mistakes_of_the_arguments(refused):
    assert refused("chat", "runs/ppo", "--prompt") == "--prompt needs a text: rlkl chat RUN --prompt TEXT"
    assert refused("chat", "runs/ppo", "temperature=-1").startswith("temperature=-1: ")
    assert refused("chat", "runs/ppo", "device=bogus", "--prompt", "1").startswith("device='bogus': choose auto")


def test_a_context_that_is_not_known_refuses_nothing():
    assert len(chat.asked(character_tokenizer(), "1" * 1000, 1000, None)) == 1000
    with pytest.raises(UserError, match="shorten"):
        chat.asked(character_tokenizer(), "1" * 10, 7, 16)
    assert len(chat.asked(character_tokenizer(), "1" * 10, 6, 16)) == 10
    assert torch.is_grad_enabled()
