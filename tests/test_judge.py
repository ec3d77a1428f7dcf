"""AI feedback: a judge whose answer is known by construction, asked in words, is a reward and a labeller."""

import json
from pathlib import Path

import pytest
import torch
from preference_models import classifier, judge_of, words
from test_reward_models import batch_of

import train
from rlkl import cli
from rlkl.errors import UserError
from rlkl.rewards import judge
from rlkl.rewards.feedback import QUESTION, answers, principle_judge, question
from rlkl.tiny import character_tokenizer

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()
LAST = "{principle}|{prompt}|{reply}"  # the hand-made judge sees the last character alone


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_the_score_is_the_log_odds_of_yes_at_the_next_position(tmp_path, strength):
    """y and Y at `strength`, n and N at 0, in a softmax with all else: log (2 e^s / 2) = s; and the other way round."""
    path = str(judge_of(tmp_path, strength=strength))
    asked = batch_of(TOKENIZER, ["q", "q", "another"], ["fine!", "fine.", "what is it!"])
    scores, parts = principle_judge(*asked, path=path, principle="be loud", template=LAST)
    torch.testing.assert_close(scores, torch.tensor([strength, -strength, strength]), atol=1e-4, rtol=0)
    assert parts == {}


@pytest.mark.parametrize("budget", [1, 10**6])
def test_a_score_does_not_depend_on_company_or_batching(tmp_path, budget):
    path = str(judge_of(tmp_path, liked=":"))  # the default question ends in a colon
    asked = batch_of(TOKENIZER, ["q"] * 3, ["a", "something much longer", ""])
    scores = principle_judge(*asked, path=path, principle="be kind", micro_tokens=budget)[0]
    torch.testing.assert_close(scores, torch.full((3,), 2.0), atol=1e-4, rtol=0)


def test_the_question_holds_principle_prompt_and_reply_and_goes_through_a_chat_template():
    text = TOKENIZER.decode(question(TOKENIZER, QUESTION, "Be kind {really}.", "p{0}", "r{reply}"))
    assert all(w in text for w in ("Be kind {really}.", "p{0}", "r{reply}", "yes or no"))  # braces of others stay text
    chat = character_tokenizer()
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    messages = [{"role": "user", "content": "hi"}]
    said = chat.decode(question(chat, LAST, "P", messages, "yo"))
    assert said == "<user>P|user: hi|yo<assistant>"


@pytest.mark.parametrize("template", ["{reply} {x}", "no field", "{reply", "{reply} {}"])
def test_a_template_that_cannot_be_filled_is_one_line(template):
    with pytest.raises(UserError, match=r"reward\.template"):
        question(TOKENIZER, template, "P", "q", "r")


def test_yes_and_no_are_whole_tokens_where_there_are_such_and_first_ones_otherwise():
    names = [[TOKENIZER.convert_ids_to_tokens(i) for i in ids] for ids in answers(TOKENIZER)]
    assert [sorted(n) for n in names] == [["Y", "y"], ["N", "n"]]
    whole = words("yes", "No", "Yes", "y", "n", "no")
    names = [sorted(whole.convert_ids_to_tokens(ids)) for ids in answers(whole)]
    assert names == [["Yes", "yes"], ["No", "no"]]
    with pytest.raises(UserError, match="yes and no"):
        answers(words("maybe"))


def test_a_judge_that_is_no_causal_lm_is_named_by_its_own_key(tmp_path):
    asked = batch_of(TOKENIZER, ["q"], ["r"])
    with pytest.raises(UserError, match=r"reward\.path='.*not a causal LM"):
        principle_judge(*asked, path=str(tmp_path), principle="P")
    classifier(tmp_path / "c")
    with pytest.raises(UserError, match="no weights for lm_head"):
        principle_judge(*asked, path=str(tmp_path / "c"), principle="P")


def test_hostile_replies_are_judged_like_any_other(tmp_path):
    path = str(judge_of(tmp_path))
    replies = ["{principle.__class__}", "%s%n" * 50, "9" * 5000 + "!", "\x00\x1b[2J", "{", ""]
    asked = batch_of(TOKENIZER, ["q"] * 6, replies)
    scores = judge(lambda *x: principle_judge(*x, path=path, principle="P"), *asked)[0]
    assert scores.isfinite().all()


def test_the_judge_labels_given_replies_by_its_principle(here, base, capsys):
    path = judge_of(here / "judge")
    rows = [{"prompt": f"{i}", "replies": ["quiet.", "loud!"][:: 1 if i % 2 else -1]} for i in range(6)]
    rows.append({"prompt": "tie", "replies": ["a.", "b."]})
    Path("r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("label.yaml").write_text(
        f"out: pairs.jsonl\nreplies: r.jsonl\nmodel: {{name: {base}}}\n"
        f"reward: {{name: judge, path: {path}, principle: Replies are loud., template: '{LAST}'}}\n")
    assert cli.main(["label", "label.yaml"]) == 0
    found = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert found == [{"prompt": f"{i}", "chosen": "loud!", "rejected": "quiet."} for i in range(6)]
    assert "6 pairs; 1 prompts left out" in capsys.readouterr().out


def test_a_run_of_train_py_learns_from_the_judge(here, base):
    """It likes replies that end in a 7."""
    path = judge_of(here / "judge", liked="7")
    code = train.main([f"model.name={base}", "task=jsonl", "task.path=prompts.jsonl", "reward=judge",
                       f"reward.path={path}", "reward.principle=End in a seven.", f'reward.template="{LAST}"',
                       "sampling.prompts=12", "sampling.group_size=4", "sampling.max_new_tokens=6", "optim.steps=20",
                       "optim.lr=1e-2", "optim.warmup=0", "kl_ref.coef=0.05", "eval.every=0", "eval.prompts=5",
                       "eval.samples=1", "run=out"])
    assert code == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert -2.01 < rows[0]["reward"] < 0
    assert sum(r["reward"] for r in rows[-5:]) / 5 > rows[0]["reward"] + 1.5


@pytest.mark.parametrize(("reward", "said"), [
    (["reward=reward_model", "reward.path=not-there"], "reward.path='not-there'"),
    (["reward=judge", "reward.path=not-there", "reward.principle=P"], "reward.path='not-there'"),
    (["reward=judge", "reward.path=judge", "reward.principle=P", 'reward.template="{answer}"'], "reward.template"),
])
def test_a_reward_that_cannot_work_is_told_before_anything_is_evaluated_or_written(here, base, capsys, reward, said):
    judge_of(here / "judge")
    assert train.main([f"model.name={base}", "task=jsonl", "task.path=prompts.jsonl", *reward, "run=out"]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert said in error
    assert "held out" not in out
    assert not (here / "out").exists()
