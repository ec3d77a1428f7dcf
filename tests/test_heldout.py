"""The held-out numbers: the same however many rows are sampled at once; replies end where a stop string appears."""

import io
from pathlib import Path

import pytest
import torch
from finished_runs import ENDS
from rich.console import Console
from runs_fixture import PPO, arguments, rows, run

from rlkl import config, heldout
from rlkl.build import build
from rlkl.errors import UserError
from rlkl.heldout import accuracy, stops
from rlkl.tiny import character_tokenizer

pytest_plugins = ("runs_fixture",)
pytestmark = pytest.mark.usefixtures("here")


def parts_of(base, *options):
    cfg = config.load(arguments(base, *PPO, "eval.prompts=20", "model.dtype=float64", "scoring.processes=0", *options))
    return cfg, build(cfg, torch.device("cpu"), Console(file=io.StringIO()))


def said(cfg, parts, samples=2):
    """Every reply that was judged, and the numbers."""
    replies, solved = [], parts.solved
    parts.solved = lambda example, reply: replies.append(reply) or solved(example, reply)
    return replies, accuracy(cfg, parts, samples=samples)


def test_the_numbers_do_not_depend_on_how_many_rows_are_sampled_at_once(base):
    found = [said(*parts_of(base, f"sampling.prompts={n}", "optim.minibatch=4")) for n in (1, 3, 40)]
    assert found[0] == found[1] == found[2]
    assert 0 < found[0][1]["accuracy"] < 1, "numbers that could differ"


@pytest.mark.parametrize("backend", ["cached", "naive", "engine"])
def test_a_reply_ends_with_its_first_stop_string_and_is_otherwise_the_same(base, backend):
    whole, _ = said(*parts_of(base))
    cut, _ = said(*parts_of(base, "eval.stop=['7', '3', '12', '0']", f"sampling.backend={backend}"))

    def expected(text):
        ends = [text.index(stop) + len(stop) for stop in ("7", "3", "12", "0") if stop in text]
        return text[: min(ends, default=len(text))]

    assert cut == [expected(text) for text in whole]
    assert 10 < sum(a != b for a, b in zip(whole, cut, strict=True)) < len(whole)


def test_stop_strings_count_in_the_held_out_numbers_of_a_run_and_in_no_rollout(base):
    """Right is a reply whose only digit ends it: with every digit a stop string, each that has one."""
    Path("ends.py").write_text(ENDS)
    options = (*PPO, "optim.steps=2", "eval.every=1", "eval.prompts=20", "scoring.processes=0")
    digits, whole, cut = (run(base, *options, f"run={name}", *more) for name, more in {
        "digits": [], "whole": ["task=ends.py:Digits"],
        "cut": ["task=ends.py:Digits", f"eval.stop={list('0123456789')}"]}.items())
    for one, other, third in zip(*map(rows, (digits, whole, cut)), strict=True):
        assert one["heldout/accuracy"] == third["heldout/accuracy"] > other["heldout/accuracy"]
        assert one["reward"] == other["reward"] == third["reward"]
        assert one["length"] == other["length"] == third["length"]


def test_a_stop_string_may_be_a_special_token_and_may_span_several():
    tokenizer = character_tokenizer()
    stop = stops(tokenizer, ["ab", "<unk>"])
    assert [stop(tokenizer(text).input_ids) for text in ("a", "xab", "a b", "é")] == [False, True, False, True]
    assert stops(tokenizer, []) is None


def test_an_empty_stop_string_which_every_text_holds_is_refused():
    with pytest.raises(UserError, match=r"eval.stop.1='': string should have at least 1 character"):
        config.load(["eval.stop=['a', '']"])


def test_the_samples_of_a_prompt_are_together_even_if_they_are_more_than_a_rollout(base):
    cfg, parts = parts_of(base, "eval.samples=30")
    assert cfg.sampling.prompts * cfg.sampling.group_size == 16
    found = heldout.accuracy(cfg, parts, samples=30)
    assert 0 <= found["accuracy"] <= found["pass@30"] <= 1
