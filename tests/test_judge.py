"""AI feedback: a judge whose answers are known by construction, as a reward and as a labeller."""

import json
from pathlib import Path

import pytest
from preference_models import classifier, judge_of, word_tokenizer
from test_reward_models import batch_of

import train
from rlkl import cli
from rlkl.errors import UserError, exit_code
from rlkl.rewards import compute_scores
from rlkl.rewards.feedback import QUESTION, answer_ids, encode_question, principle_judge
from rlkl.supervised.scratch import character_tokenizer

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()
LAST = "{principle}|{prompt}|{response}"  # the judge sees only the last character


def score(path, prompts, responses, **options):
    """(B,) scores of the judge at `path`."""
    batch = batch_of(TOKENIZER, prompts, responses)
    return principle_judge(*batch, path=str(path), **options)


# ------------------------------------------------------------------ the score


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_the_score_is_the_log_odds_of_yes_as_the_next_token(tmp_path, strength):
    """y and Y have the logit `strength` and n and N have 0: log(2 exp(s) / 2) = s. Or -s."""
    path = judge_of(tmp_path, strength=strength)
    responses = ["fine!", "fine.", "what is it!"]
    options = {"principle": "be loud", "template": LAST}
    scores, parts = score(path, ["q", "q", "another"], responses, **options)
    assert scores.tolist() == pytest.approx([strength, -strength, strength], abs=1e-4)
    assert parts == {}


def test_a_score_does_not_depend_on_the_other_rows_or_on_batching(tmp_path):
    path = judge_of(tmp_path, liked=":")  # the default question ends in a colon
    responses = ["a", "something much longer", ""]
    for micro_tokens in (1, 10**6):
        options = {"principle": "be kind", "micro_tokens": micro_tokens}
        scores = score(path, ["q"] * 3, responses, **options)[0]
        assert scores.tolist() == pytest.approx([2.0] * 3, abs=1e-4)


def test_a_question_longer_than_the_context_loses_its_beginning(tmp_path):
    path = judge_of(tmp_path)
    scores = score(
        path, ["q"] * 2, ["9" * 5000 + "!", "!" * 5000 + "9"], principle="P", template=LAST
    )
    assert scores[0].tolist() == pytest.approx([2.0, -2.0], abs=1e-4)


def test_hostile_responses_are_judged_like_any_other(tmp_path):
    path = str(judge_of(tmp_path))
    responses = ["{principle.__class__}", "%s%n" * 50, "9" * 5000 + "!", "\x00\x1b[2J", "{", ""]
    batch = batch_of(TOKENIZER, ["q"] * 6, responses)
    scores = compute_scores(lambda *x: principle_judge(*x, path=path, principle="P"), *batch)[0]
    assert scores.isfinite().all()


# ------------------------------------------------------------------ the question and its answers


def test_the_question_holds_principle_prompt_and_response_as_they_are():
    ids = encode_question(TOKENIZER, QUESTION, "Be kind {really}.", "p{0}", "r{response}")
    text = TOKENIZER.decode(ids)
    assert [x for x in ("Be kind {really}.", "p{0}", "r{response}") if x not in text] == []


def test_the_question_goes_through_the_chat_template_of_a_judge_that_has_one():
    tokenizer = character_tokenizer()
    message = "<{{ m.role }}>{{ m.content }}"
    tokenizer.chat_template = "{% for m in messages %}" + message + "{% endfor %}<assistant>"
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.decode(encode_question(tokenizer, LAST, "P", messages, "yo"))
    assert text == "<user>P|user: hi|yo<assistant>"


def test_a_template_that_cannot_be_filled_is_refused():
    for template in ("{response} {x}", "no field", "{response", "{response} {}", "{response.x}"):
        with pytest.raises(UserError, match=r"reward\.template"):
            encode_question(TOKENIZER, template, "P", "q", "r")


def test_answers_are_single_tokens_where_there_are_such_and_first_tokens_otherwise():
    def answers(tokenizer):
        return [sorted(tokenizer.convert_ids_to_tokens(ids)) for ids in answer_ids(tokenizer)]

    assert answers(TOKENIZER) == [["Y", "y"], ["N", "n"]]
    words = word_tokenizer("yes", "No", "Yes", "y", "n", "no")
    assert answers(words) == [["Yes", "yes"], ["No", "no"]]
    with pytest.raises(UserError, match="yes and no"):
        answers(word_tokenizer("maybe"))


def test_a_judge_that_is_not_a_causal_lm_is_reported_by_its_own_option(tmp_path):
    with pytest.raises(UserError, match=r"reward\.path='.*not a causal LM"):
        score(tmp_path, ["q"], ["r"], principle="P")
    with pytest.raises(UserError, match="no weights for lm_head"):
        score(classifier(tmp_path / "c"), ["q"], ["r"], principle="P")


# ------------------------------------------------------------------ in the commands


def test_the_judge_labels_given_responses_by_its_principle(here, base, capsys):
    path = judge_of(here / "judge")
    responses = [["quiet.", "loud!"], ["loud!", "quiet."]] * 3
    rows = [{"prompt": f"{i}", "responses": both} for i, both in enumerate(responses)]
    rows.append({"prompt": "tie", "responses": ["a.", "b."]})
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("label.yaml").write_text(
        f"out: pairs.jsonl\nresponses: r.jsonl\nmodel: {{name: {base}}}\n"
        f"reward: {{name: judge, path: {path}, principle: Be loud., template: '{LAST}'}}\n"
    )
    assert cli.main(["label", "label.yaml"]) == 0
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert pairs == [{"prompt": f"{i}", "chosen": "loud!", "rejected": "quiet."} for i in range(6)]
    assert "6 pairs; 1 prompts left out" in capsys.readouterr().out


def test_train_py_learns_from_the_judge(here, base):
    """The judge likes responses that end in a 7."""
    path = judge_of(here / "judge", liked="7")
    train.main(
        [
            f"model.name={base}",
            "task=jsonl",
            "task.path=prompts.jsonl",
            "reward=judge",
            f"reward.path={path}",
            "reward.principle=End in a seven.",
            f'reward.template="{LAST}"',
            "sampling.prompts=12",
            "sampling.group_size=4",
            "sampling.max_new_tokens=6",
            "optim.steps=20",
            "optim.lr=1e-2",
            "optim.warmup=0",
            "kl_ref.coef=0.05",
            "eval.every=0",
            "eval.prompts=5",
            "eval.samples=1",
            "run=out",
        ]
    )
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert -2.01 < rows[0]["reward"] < 0
    assert sum(row["reward"] for row in rows[-5:]) / 5 > rows[0]["reward"] + 1.5


BAD_REWARDS = [  # options, and what the message must say
    ("reward=reward_model reward.path=gone", "reward.path='gone'"),
    ("reward=judge reward.path=gone reward.principle=P", "reward.path='gone'"),
    (
        'reward=judge reward.path=judge reward.principle=P reward.template="{answer}"',
        "reward.template",
    ),
]


def test_a_reward_that_cannot_work_is_refused_before_anything_is_evaluated_or_written(
    here, base, capsys
):
    judge_of(here / "judge")
    run = [f"model.name={base}", "task=jsonl", "task.path=prompts.jsonl", "run=out"]
    for reward, words in BAD_REWARDS:
        assert exit_code(train.main, [*run, *reward.split()]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ")
        assert words in error
        assert "held out" not in out
        assert not (here / "out").exists()
