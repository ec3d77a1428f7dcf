"""`make measure` and `benchmarks.memory`: a page quotes a run that was made, or a plan that can be computed."""

import json
import re

import pytest
from runs_fixture import ROOT
from transformers import LlamaForCausalLM

from benchmarks import measured, memory
from benchmarks.examples import EXAMPLES, Example
from benchmarks.measured import HACKED, Row, row
from benchmarks.pages import filled
from rlkl import config
from rlkl.lora import adapt
from rlkl.scratch import architecture, character_tokenizer

pytest_plugins = ("runs_fixture",)
WHERE, ROWS = measured.read()
SMALL = ("task.digits=1", "sampling.prompts=2", "sampling.group_size=2", "sampling.max_new_tokens=3", "optim.steps=1",
         "eval.prompts=2", "eval.samples=2", "optim.minibatch=4")


def page(name: str) -> str:
    """Its words, whatever its lines are."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())


# The file
def test_every_config_for_a_cpu_was_run_as_it_stands_and_so_was_what_the_pages_quote_beside_them():
    wanted = [(e.config, list(e.overrides)) for e in measured.chosen()]
    assert sorted(wanted) == sorted((r.config, r.overrides) for r in ROWS)
    assert {e.config for e in EXAMPLES} == {config for config, _ in wanted} | {*measured.NOT_WHOLE}
    assert WHERE["clean"]
    assert all(r.seconds > 1 for r in ROWS)


@pytest.mark.parametrize("path", measured.PAGES, ids=lambda p: p.name)
def test_the_tables_of_a_page_are_those_of_the_file(path):
    text = path.read_text(encoding="utf-8")
    assert filled(text, measured.sections(ROWS)) == text
    assert any(f"<!-- {name} -->\n|" in text for name in measured.sections(ROWS))


def test_a_run_is_a_row_with_what_it_printed_and_a_failed_one_ends_it_all(base, tmp_path):
    small = (*SMALL, f"model.name={base}")
    found = measured.run(Example("tiny-grpo", "accuracy", 0.0, small), tmp_path)
    assert (found.config, found.overrides, found.hacking) == ("tiny-grpo", list(small), None)
    assert {*found.found} == {"accuracy", "greedy", "pass@2"}
    assert found.seconds > 1
    with pytest.raises(SystemExit, match=r"error: tiny-grpo optim.nope=1: .*unknown key optim.nope"):
        measured.run(Example("tiny-grpo", "accuracy", 0.0, ("optim.nope=1",)), tmp_path)


def test_a_part_of_the_runs_is_kept_and_fills_no_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "examples.json")
    monkeypatch.setattr(measured, "fill", lambda *_: pytest.fail("filled"))
    monkeypatch.setattr(measured, "run", lambda e, _: Row(e.config, [*e.overrides], 2.0, {"loss": [1, 0]}, None, ""))
    for only in ("tiny-ppo|tiny-lora$", "tiny-lora$"):
        with pytest.raises(SystemExit, match="the pages are as they were: tiny-grpo, "):
            measured.main(["--only", only])
    assert [r["config"] for r in json.loads(measured.RESULTS.read_text())["rows"]] == ["tiny-ppo", "tiny-lora"]


def test_a_time_is_told_in_seconds_up_to_a_minute():
    assert [measured.duration(s) for s in (8.4, 59.4, 75, 300)] == ["8 s", "59 s", "1.2 min", "5.0 min"]


# The pages
@pytest.mark.parametrize("name", [r.config for r in ROWS if not r.overrides])
def test_the_time_that_a_config_s_first_line_states_is_the_measured_one_within_a_factor_of_two(name):
    first = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    number, unit = re.search(r"CPU.*?, (?:about )?([\d.]+) (s|minutes?)\b", first).groups()
    stated = float(number) * (1 if unit == "s" else 60)
    assert 0.5 < row(ROWS, name).seconds / stated < 2


def test_the_pages_of_preferences_and_of_hacking_quote_the_runs():
    learned, text = row(ROWS, "tiny-reward-model").found, page("preferences")
    pairs = row(ROWS, "tiny-label").found["pairs"][1]
    assert (f"({pairs:,.0f} pairs; the reward model is right on {learned['accuracy'][1]:.1%} of those held out, "
            f"with a calibration error of {learned['calibration_error'][1]:.2f})") in text
    hacked, healthy = row(ROWS, "tiny-rlhf-grpo", *HACKED), row(ROWS, "tiny-rlhf-grpo")
    assert f"configs/tiny-rlhf-grpo.yaml {' '.join(HACKED)}" in page("hacking")
    assert f"reward hacking? {hacked.hacking}: docs/hacking.md" in page("hacking")
    for text in (page("preferences"), page("hacking")):
        assert f"gold ends at {hacked.found['gold'][1]:.2f}" in text
    assert healthy.hacking is None
    assert "from {:.2f} to {:.2f}".format(*healthy.found["gold"]) in page("hacking")


def test_the_page_of_preferences_quotes_a_dpo_that_went_too_far():
    far = row(ROWS, "tiny-dpo", *measured.GREEDY_DPO)
    graded = row(ROWS, "tiny-rlhf-grpo", "model.name=runs/tiny-rlhf/dpo-far/model", "optim.steps=1")
    said = " ".join(measured.GREEDY_DPO[:3])
    assert (f"With `{said}` DPO orders {far.found['accuracy'][1]:.0%} of the held-out pairs and hardly writes a review "
            f"(gold {graded.found['gold'][0]:.2f})") in page("preferences")


def test_the_page_of_commands_shows_the_two_runs_that_it_names():
    text = page("commands")
    for name, *overrides in (("tiny-grpo", "run=runs/grpo", "optim.steps=100"),
                             ("tiny-lora", "run=runs/lora", "optim.steps=40")):
        assert f"python train.py configs/{name}.yaml {' '.join(overrides)} " in text
        for before, after in row(ROWS, name, *overrides).found.values():
            assert f"{before:.3f} → {after:.3f}" in text


def test_the_page_of_models_counts_the_parameters_of_the_tiny_model():
    lm = LlamaForCausalLM(architecture(character_tokenizer()))
    every = sum(p.numel() for p in lm.parameters())
    cfg = config.load([str(ROOT / "configs" / "tiny-lora.yaml")])
    adapt(lm, **{**vars(cfg.lora), "full": ["model.norm"]})
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert f"with {trained:,} of {every:,} parameters trained" in page("models")


def test_the_pages_have_the_memory_plans_of_today():
    found = memory.sections()
    for path in memory.PAGES:
        text = path.read_text(encoding="utf-8")
        assert filled(text, found) == text
        assert any(f"<!-- {name} -->\n|" in text for name in found)
    offloaded = memory.plan(config.load([*memory.ROLLOUT, "optim.offload=true"])).host
    assert f"Offloading keeps {offloaded / 1e9:.1f} GB on the CPU" in page("models")


@pytest.mark.parametrize("name", memory.CONFIGS)
def test_the_memory_that_a_config_s_first_line_expects_is_its_plan_s(name):
    path = ROOT / "configs" / f"{name}.yaml"
    first, peak = path.read_text(encoding="utf-8").splitlines()[0], memory.plan(config.load([str(path)])).peak / 1e9
    card = float(re.search(r"(\d+) GB GPU", first)[1])
    assert peak < 0.9 * card
    for told in re.findall(r"([\d.]+) GB(?! GPU)", first):
        assert float(told) == pytest.approx(peak, abs=0.5)
