"""`make measure` and `benchmarks.memory`: the pages quote real runs, and plans as computed."""

import json
import re
from subprocess import CompletedProcess

import pytest
from runs_fixture import ROOT
from transformers import LlamaForCausalLM

from benchmarks import measured, memory
from benchmarks.examples import EXAMPLES, Example
from benchmarks.measured import HACKED, Row, row
from benchmarks.pages import filled
from rlkl.policy.lora import adapt
from rlkl.run import config, terminal
from rlkl.supervised.scratch import architecture, character_tokenizer

pytest_plugins = ("runs_fixture",)
WHERE, ROWS = measured.read()


def page(name: str) -> str:
    """The text of a page, on one line."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())


def first_line(name: str) -> str:
    """The first line of a configuration, which says what it shows and what it takes."""
    return (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]


# ------------------------------------------------------------------ the file of results


def test_the_file_has_every_config_for_a_cpu_as_it_stands_and_the_runs_that_pages_quote():
    wanted = [(example.config, list(example.overrides)) for example in measured.all_runs()]
    assert sorted(wanted) == sorted((r.config, r.overrides) for r in ROWS)
    configs = {config for config, _ in wanted}
    assert {example.config for example in EXAMPLES} == configs | {*measured.NOT_WHOLE}
    assert WHERE["clean"]
    assert all(r.seconds > 1 for r in ROWS)


def test_the_tables_of_the_pages_are_those_of_the_file():
    sections = measured.sections(ROWS)
    for path in measured.PAGES:
        text = path.read_text(encoding="utf-8")
        assert filled(text, sections) == text, path.name
        assert any(f"<!-- {name} -->\n|" in text for name in sections), path.name


def test_a_run_becomes_a_row_with_what_it_printed_and_a_failed_one_ends_everything(
    tmp_path, monkeypatch
):
    before = {"accuracy": 0.25, "greedy": 0.5}
    after = {"accuracy": 0.75, "greedy": 1.0}
    with terminal.console.capture() as printed:
        terminal.log_before_after(before, after, "held out")
        terminal.log_reward_hacking(7, "reward 0 → 1, but ref_logprob -1 → -4 (since step 2)")
    finished = CompletedProcess([], 0, stdout=printed.get(), stderr="")
    failed = CompletedProcess([], 2, stdout="", stderr="error: unknown key optim.nope\n")
    example = Example("tiny-grpo", "accuracy", 0.0, ("optim.lr=1",))

    monkeypatch.setattr(measured, "start", lambda *_: (finished, 12.34))
    new = measured.run(example, tmp_path)
    assert (new.config, new.overrides, new.seconds) == ("tiny-grpo", ["optim.lr=1"], 12.3)
    assert new.found == {"accuracy": [0.25, 0.75], "greedy": [0.5, 1.0]}
    assert new.hacking == "step 7: reward 0 → 1, but ref_logprob -1 → -4 (since step 2)"
    monkeypatch.setattr(measured, "start", lambda *_: (failed, 1.0))
    with pytest.raises(SystemExit, match=r"error: tiny-grpo optim.lr=1: .*unknown key optim.nope"):
        measured.run(example, tmp_path)


def test_a_part_of_the_runs_is_written_but_fills_no_page(monkeypatch, tmp_path):
    def fake_run(example: Example, folder) -> Row:
        return Row(example.config, [*example.overrides], 2.0, {"loss": [1, 0]}, None, "")

    monkeypatch.setattr(measured, "RESULTS", tmp_path / "examples.json")
    monkeypatch.setattr(measured, "fill", lambda *_: pytest.fail("filled"))
    monkeypatch.setattr(measured, "run", fake_run)
    for only in ("tiny-ppo|tiny-lora$", "tiny-lora$"):
        with pytest.raises(SystemExit, match="tiny-grpo, "):
            measured.main(["--only", only])
    written = json.loads(measured.RESULTS.read_text())["rows"]
    assert [r["config"] for r in written] == ["tiny-ppo", "tiny-lora"]


def test_a_duration_is_in_seconds_up_to_a_minute():
    durations = {8.4: "8 s", 59.4: "59 s", 75: "1.2 min", 300: "5.0 min"}
    assert {s: measured.duration(s) for s in durations} == durations


# ------------------------------------------------------------------ what the pages say


def test_the_time_that_a_config_states_is_the_measured_one_within_a_factor_of_two():
    for name in (r.config for r in ROWS if not r.overrides):
        match = re.search(r"CPU.*?, (?:about )?([\d.]+) (s|minutes?)\b", first_line(name))
        stated = float(match[1]) * (1 if match[2] == "s" else 60)
        assert 0.5 < row(ROWS, name).seconds / stated < 2, name


def test_the_pages_about_preferences_and_reward_hacking_quote_the_runs():
    reward_model = row(ROWS, "tiny-reward-model").found
    pairs = row(ROWS, "tiny-label").found["pairs"][1]
    numbers = [
        f"{pairs:,.0f} pairs",
        f"{reward_model['accuracy'][1]:.1%}",
        f"calibration error of {reward_model['calibration_error'][1]:.2f}",
    ]
    assert [text for text in numbers if text not in page("preferences")] == []
    hacked = row(ROWS, "tiny-rlhf-grpo", *HACKED)
    healthy = row(ROWS, "tiny-rlhf-grpo")
    assert f"configs/tiny-rlhf-grpo.yaml {' '.join(HACKED)}" in page("hacking")
    assert f"reward hacking? {hacked.hacking}: docs/hacking.md" in page("hacking")
    for name in ("preferences", "hacking"):
        assert f"gold ends at {hacked.found['gold'][1]:.2f}" in page(name)
    assert healthy.hacking is None
    assert "from {:.2f} to {:.2f}".format(*healthy.found["gold"]) in page("hacking")


def test_the_page_about_preferences_quotes_a_dpo_that_went_too_far():
    dpo = row(ROWS, "tiny-dpo", *measured.GREEDY_DPO)
    model = "model.name=runs/tiny-rlhf/dpo-far/model"
    graded = row(ROWS, "tiny-rlhf-grpo", model, "optim.steps=1")
    text = page("preferences")
    assert f"`{' '.join(measured.GREEDY_DPO[:3])}`" in text
    assert f"{dpo.found['accuracy'][1]:.0%} of the held-out pairs" in text
    assert f"(gold {graded.found['gold'][0]:.2f})" in text


def test_the_page_about_commands_shows_the_two_runs_that_it_names():
    text = page("commands")
    for name, *overrides in (
        ("tiny-grpo", "run=runs/grpo", "optim.steps=100"),
        ("tiny-lora", "run=runs/lora", "optim.steps=40"),
    ):
        assert f"python train.py configs/{name}.yaml {' '.join(overrides)} " in text
        for before, after in row(ROWS, name, *overrides).found.values():
            assert f"{before:.3f} → {after:.3f}" in text


def test_the_page_about_models_counts_the_parameters_of_the_tiny_model():
    lm = LlamaForCausalLM(architecture(character_tokenizer()))
    total = sum(p.numel() for p in lm.parameters())
    cfg = config.load([str(ROOT / "configs" / "tiny-lora.yaml")])
    adapt(lm, **{**vars(cfg.lora), "modules_to_save": ["model.norm"]})
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert f"with {trained:,} of {total:,} parameters trained" in page("models")


def test_the_pages_have_the_memory_plans_as_they_are_computed_now():
    sections = memory.sections()
    for path in memory.PAGES:
        text = path.read_text(encoding="utf-8")
        assert filled(text, sections) == text, path.name
        assert any(f"<!-- {name} -->\n|" in text for name in sections), path.name
    offloaded = memory.plan(config.load([*memory.ROLLOUT, "optim.offload=true"])).host
    assert f"Offloading keeps {offloaded / 1e9:.1f} GB on the CPU" in page("models")


def test_the_memory_that_a_config_states_is_that_of_its_plan():
    for name in memory.CONFIGS:
        cfg = config.load([str(ROOT / "configs" / f"{name}.yaml")])
        peak = memory.plan(cfg).peak / 1e9
        card = float(re.search(r"(\d+) GB GPU", first_line(name))[1])
        assert peak < 0.9 * card, name
        for stated in re.findall(r"([\d.]+) GB(?! GPU)", first_line(name)):
            assert float(stated) == pytest.approx(peak, abs=0.5), name
