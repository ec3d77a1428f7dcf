"""A whole run: the files that it leaves, how it stops, and that it resumes bit for bit."""

import ast
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from runs_fixture import (
    PPO,
    ROOT,
    arguments,
    differences,
    furnish,
    resume,
    rows,
    run,
    train,
    train_error,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl import cli
from rlkl.errors import UserError, exit_code
from rlkl.run import checkpoint
from rlkl.run.log import RunLog

pytest_plugins = ("runs_fixture",)

SAPO = '''"""SAPO (Gao et al. 2025, arXiv:2511.20347): a sigmoid gate instead of a clip."""
import torch


def sapo(new, batch, *, tau_pos: float = 1.0, tau_neg: float = 1.05):
    ratio = (new.logprobs - batch.old_logprobs).exp()
    tau = torch.where(batch.advantages > 0, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return -gate * batch.advantages, dict(ratio=ratio, gate=gate)
'''
K1 = "def k1(logprobs, ref_logprobs):\n    return logprobs - ref_logprobs\n"
STOPS = '''"""Sends a signal to its own process in the call that the file `when` names."""
import os
import pathlib

import torch

calls = 0


def digits(examples, responses, batch):
    global calls
    calls += 1
    when = pathlib.Path("when")
    if when.exists() and when.read_text() == f"{calls}":
        os.kill(os.getpid(), int(pathlib.Path("signal").read_text()))
    return torch.tensor([sum(c.isdigit() for c in response) / 6 for response in responses]), {}
'''


def run_elsewhere(folder: Path, base: Path, *options: str) -> Path:
    """A run in a folder of its own; returns the absolute path of the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        furnish(folder)
        return run(base, "run=out", *options).absolute()


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Six steps of GRPO without interruption."""
    return run_elsewhere(tmp_path_factory.mktemp("whole"), base, "checkpoint.every=2")


@pytest.fixture(scope="module")
def whole_ppo(base, tmp_path_factory):
    """Six steps of PPO without interruption."""
    return run_elsewhere(tmp_path_factory.mktemp("whole_ppo"), base, *PPO)


# ------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_metrics_provenance_a_report_and_a_model_that_loads(whole, base):
    metrics = rows(whole)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    for row in metrics:
        assert {"reward", "entropy", "grad_norm/policy", "kl_pi_ref_sequence"} <= row.keys()
        assert row["sample"].keys() == {"prompt", "response", "score"}
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [2, 4, 6]
    provenance = json.loads((whole / "provenance.json").read_text())
    assert "run=out" in provenance["command"]
    assert provenance["torch"] == version("torch")

    assert (whole / "metrics.png").read_bytes().startswith(b"\x89PNG")
    report = (whole / "report.md").read_text()
    assert "![metrics](metrics.png)" in report
    assert "| accuracy |" in report
    rewards = [row["reward"] for row in metrics]
    assert "| metric, mean of | the first 3 steps | the last 3 steps |" in report
    assert f"| reward | {fmean(rewards[:3]):.4g} | {fmean(rewards[3:]):.4g} |" in report

    last = whole / "checkpoints" / "step-000006"
    lm = AutoModelForCausalLM.from_pretrained(last)
    started = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(lm.lm_head.weight, started.lm_head.weight), "six steps changed nothing"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (last, base)]
    assert tokenizers[0]("1+2=").input_ids == tokenizers[1]("1+2=").input_ids


def test_config_yaml_alone_repeats_the_run(here, whole_ppo):
    train.main([str(whole_ppo / "config.yaml"), "run=again"])
    assert differences(whole_ppo, here / "again") == []


def test_a_run_without_a_name_takes_the_next_free_number(here, base):
    for names in (["addition-grpo-1"], ["addition-grpo-1", "addition-grpo-2"]):
        train.main(arguments(base, "optim.steps=1", "eval.every=0"))
        assert sorted(p.name for p in Path("runs").iterdir()) == names


def test_a_folder_whose_name_looks_like_markup_is_printed_as_it_is(here, base, capsys):
    run(base, "run=out[/x]", "optim.steps=1", "eval.every=0")
    assert "run: out[/x]" in capsys.readouterr().out


def test_without_matplotlib_a_run_writes_its_report_without_the_figure(
    here, base, whole, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = run(base, "run=out", "checkpoint.every=2")
    lines = capsys.readouterr().out.splitlines()
    (note,) = [line for line in lines if "matplotlib" in line]
    assert note.startswith("note: ")
    assert "pip install 'rlkl[plots]'" in note
    assert not (folder / "metrics.png").exists()
    page = (folder / "report.md").read_text()
    assert "png" not in page
    assert report_table(folder) == report_table(whole)


def test_no_module_imports_matplotlib_or_wandb_when_it_is_imported():
    for path in [*ROOT.glob("rlkl/**/*.py"), ROOT / "train.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            packages = {name.split(".")[0] for name in names}
            assert not packages & {"matplotlib", "wandb"}, path


# ------------------------------------------------------------------ resume


def three_steps_and_three_more(folder: Path, base: Path, *options: str) -> None:
    run(base, f"run={folder}", *options, "optim.steps=3")
    assert len(rows(folder)) == 3
    resume(folder, "optim.steps=6")


def test_three_steps_of_grpo_and_a_resume_are_six_steps_bit_for_bit(here, base, whole):
    three_steps_and_three_more(here / "halves", base)
    assert differences(whole, here / "halves") == []
    assert rows(whole)[0]["reward"] != rows(whole)[-1]["reward"]


def test_three_steps_of_ppo_and_a_resume_are_six_steps_bit_for_bit(here, base, whole_ppo):
    """With a critic, two epochs, minibatches and both KL coefficients adaptive."""
    three_steps_and_three_more(here / "halves", base, *PPO)
    assert differences(whole_ppo, here / "halves") == []
    first, last = rows(whole_ppo)[0], rows(whole_ppo)[-1]
    assert first["updates"] == 4
    assert all(first[name] != last[name] for name in ("reward", "kl_ref_coef", "kl_old_coef"))
    assert report_table(whole_ppo) == report_table(here / "halves")
    _, before, after, _ = report_table(whole_ppo)[2].split("|")[1:]
    assert before != after, "an accuracy that never changes cannot show which one was measured"


def report_table(folder: Path) -> list[str]:
    """The lines of the held-out table of the report: `| accuracy | before | after |` and others."""
    page = (folder / "report.md").read_text()
    return page.split("| held out |")[1].split("\n\n")[0].splitlines()


def test_the_comparison_of_runs_sees_the_smallest_change(here, base, whole_ppo):
    run(base, "run=other", *PPO, "critic.lr=1.0001e-3")
    found = differences(whole_ppo, here / "other")
    names = {line.split(" ")[0].split(":")[0] for line in found}
    assert {"critic.safetensors", "model.safetensors", "optimizer.pt", "step"} <= names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_after_a_signal_the_step_is_finished_and_the_run_resumes_bit_for_bit(
    here, base, capsys, number
):
    """The schedule is linear: it must continue where it was, and not start again."""
    (here / "stops.py").write_text(STOPS)
    (here / "signal").write_text(str(int(number)))
    options = ("reward=stops.py:digits", "optim.schedule=linear", "optim.warmup=1", *PPO)
    run(base, "run=whole", *options)
    (here / "when").write_text("4")  # the first call comes before the first step
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    run(base, "run=stopped", *options)
    assert "resume=stopped" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [row["step"] for row in rows(here / "stopped")] == [1, 2, 3]
    (here / "when").unlink()
    resume(here / "stopped")
    assert differences(here / "whole", here / "stopped") == []


def test_sigterm_ends_a_process_with_code_0_and_says_how_to_resume(here, base):
    options = arguments(base, "run=out", "optim.steps=100000")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    metrics = here / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    try:
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") > 2:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "rlkl train resume=out continues" in out
    steps = [row["step"] for row in rows(here / "out")]
    assert steps == list(range(1, len(steps) + 1))
    assert checkpoint.newest(here / "out").name == f"step-{steps[-1]:06d}"


def test_resume_changes_steps_and_logging_and_refuses_other_options_by_name(here, base, capsys):
    folder = run(base, "run=out", "optim.steps=2")
    for override in (
        "optim.lr=0.5",
        "sampling.prompts=8",
        "loss.epsilon=0.3",
        "seed=1",
        "task.digits=2",
        "loss=surrogate",
    ):
        key, _, value = override.partition("=")
        message = train_error(capsys, f"resume={folder}", override)
        assert key in message
        assert value in message
    allowed = ("log.every=1", "checkpoint.every=1", "checkpoint.keep=5", "eval.every=0")
    resume(folder, "optim.steps=3", *allowed)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_resume_of_a_folder_that_is_no_run_names_it(here, capsys):
    assert "nowhere" in train_error(capsys, "resume=nowhere")


# ------------------------------------------------------------------ plug-ins of a run


def test_a_plugin_file_is_copied_to_the_run_and_resume_refuses_a_changed_one(here, base, capsys):
    (here / "my_loss.py").write_text(SAPO)
    folder = run(base, "run=out", "loss.name=my_loss.py:sapo", "loss.tau_pos=1.5", "optim.steps=2")
    assert (folder / "plugins" / "my_loss.py").read_text() == SAPO
    assert (folder / "plugins" / "reward.py").read_text() == (here / "reward.py").read_text()
    (here / "my_loss.py").write_text(SAPO.replace("* 4 / tau", "* 4.0 / tau"))
    assert "my_loss.py" in train_error(capsys, f"resume={folder}", "optim.steps=3")
    (here / "my_loss.py").write_text(SAPO)
    resume(folder, "optim.steps=3")


def test_plugin_files_of_one_name_are_kept_apart_and_an_estimator_is_kept_too(here, base, capsys):
    for name, source in (("a", SAPO), ("b", K1)):
        (here / name).mkdir()
        (here / name / "my.py").write_text(source)
    plugins = ("loss.name=a/my.py:sapo", "kl_ref.estimator=b/my.py:k1", "kl_ref.coef=0.1")
    folder = run(base, "run=out", *plugins, "optim.steps=1")
    assert (folder / "plugins" / "a_my.py").read_text() == SAPO
    assert (folder / "plugins" / "b_my.py").read_text() == K1
    (here / "b" / "my.py").write_text(K1.replace("return", "return 2 *"))
    message = train_error(capsys, f"resume={folder}", "optim.steps=2")
    assert "b/my.py differs from" in message


def test_a_loss_of_nine_lines_in_a_file_of_ones_own_runs_and_reads_its_option(here, base):
    assert len(SAPO.splitlines()) == 9
    (here / "my_loss.py").write_text(SAPO)
    gates = []
    for name, tau in (("one", 1.5), ("two", 3.0)):
        options = ("loss.name=my_loss.py:sapo", f"loss.tau_pos={tau}", "optim.epochs=2")
        first = rows(run(base, f"run={name}", *options))[0]
        assert "ratio" in first
        gates.append(first["gate"])
    assert gates[0] != gates[1]


# ------------------------------------------------------------------ responses


def responses(folder: Path) -> list[dict]:
    """The rows of responses.jsonl."""
    text = (folder / "responses.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_kth_step_leaves_all_its_responses_with_their_scores(here, base):
    """Their means are the metrics of the step. Two rewards, so that a score has parts."""
    rewards = "reward=[{name: reward.py:digits}, {name: task, weight: 0.5}]"
    folder = run(base, "run=out", "log.responses_every=2", rewards)
    written = responses(folder)
    assert [row["step"] for row in written] == [2] * 16 + [4] * 16 + [6] * 16
    for step in (2, 4, 6):
        of_step = [row for row in written if row["step"] == step]
        metrics = rows(folder)[step - 1]
        assert metrics["sample"].items() <= of_step[0].items()
        parts = [name for name in metrics if name.startswith("rewards/")]
        assert len(parts) == 2
        names = {"score": "reward", "truncated": "truncated_fraction"}
        for name in ("score", "response_length", "truncated", *parts):
            mean = metrics[names.get(name, name)]
            assert fmean(row[name] for row in of_step) == pytest.approx(mean), name
        for first in range(0, 16, 4):
            assert len({row["prompt"] for row in of_step[first : first + 4]}) == 1
        assert len({row["prompt"] for row in of_step}) > 1


def test_a_response_without_a_score_is_written_as_null(here, base):
    (here / "picky.py").write_text(
        "def picky(completions, **kwargs):\n"
        "    return [None if i == 0 else 1.0 for i in range(len(completions))]\n"
    )
    folder = run(base, "run=out", "log.responses_every=1", "optim.steps=1", "reward=picky.py:picky")
    scores = [row["score"] for row in responses(folder)]
    assert scores == [None] + [1.0] * 15
    assert "NaN" not in (folder / "responses.jsonl").read_text()


def test_a_resumed_run_has_the_responses_of_each_step_once(here, base):
    """The run was killed after step 5, of which half is on disk; step 4 is the last checkpoint."""
    options = ("log.responses_every=1", "checkpoint.every=4")
    run(base, "run=whole", *options)
    folder = run(base, "run=killed", *options, "optim.steps=5")
    (folder / "checkpoints" / "step-000005").rename(here / "lost")
    file = folder / "responses.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) - 400])
    resume(folder, "optim.steps=6")
    assert responses(folder) == responses(here / "whole")
    assert len(responses(folder)) == 6 * 16
    assert differences(here / "whole", folder) == []


def test_no_step_leaves_responses_where_that_is_switched_off(here, base):
    folder = run(base, "run=out", "log.responses_every=0", "optim.steps=1")
    assert not (folder / "responses.jsonl").exists()


# ------------------------------------------------------------------ checkpoints and crashes


def test_checkpoints_are_pruned_to_the_newest_and_the_best(here, base):
    """With a learning rate of 0 nothing gets better: the first evaluation stays the best one."""
    options = ("checkpoint.every=1", "checkpoint.keep=2", "eval.every=1", "optim.lr=0")
    folder = run(base, "run=out", *options)
    state = json.loads((folder / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["best_step"] == 1
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000005", "step-000006"]


def test_a_half_written_checkpoint_is_ignored_and_removed(here, base, whole):
    folder = run(base, "run=out", "optim.steps=3")
    (folder / "checkpoints" / ".step-000009").mkdir()
    (folder / "checkpoints" / ".step-000009" / "state.json").write_text('{"st')
    assert checkpoint.newest(folder).name == "step-000003"
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []
    assert not list((folder / "checkpoints").glob(".step-*"))


def test_a_torn_last_line_of_the_metrics_is_dropped_and_its_step_run_again(here, base, whole):
    folder = run(base, "run=out", "optim.steps=3", "checkpoint.every=2")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    (folder / "checkpoints" / "step-000003").rename(here / "lost")
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(here, base, whole):
    folder = run(base, "run=out", "optim.steps=2")
    (folder / "checkpoints" / "step-000002").rename(here / "lost")
    resume(folder, "optim.steps=6")
    assert differences(whole, folder) == []


def test_an_existing_folder_is_refused_before_a_model_is_loaded(here, capsys):
    (here / "out").mkdir()
    message = train_error(capsys, "run=out", "model.name=not-there")
    assert "run=out: the folder exists" in message
    assert cli.main(["sft", "run=out", "model.name=not-there", "task=addition"]) == 2
    assert "run=out: the folder exists" in capsys.readouterr().err


def test_a_log_on_a_full_disk_is_one_line_and_the_checkpoint_stays(here, base, capsys, monkeypatch):
    folder = run(base, "run=out", "optim.steps=1", "checkpoint.every=1")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")

    monkeypatch.setattr(RunLog, "write", full)
    message = train_error(capsys, f"resume={folder}", "optim.steps=2")
    assert message == "error: out/metrics.jsonl: No space left on device"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]


def test_a_checkpoint_on_a_full_disk_is_one_line_and_the_last_one_stays(here, base, capsys):
    """A limit on the size of a file stands for a full disk: a write is cut short."""
    folder = run(base, "run=out", "optim.steps=1", "checkpoint.every=1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert exit_code(train.main, [f"resume={folder}", "optim.steps=2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith(("error:", "Traceback"))]
    assert len(errors) == 1, errors
    assert "step-000002 cannot be written" in errors[0]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]
    resume(folder, "optim.steps=2")


# ------------------------------------------------------------------ Weights & Biases


def test_wandb_continues_the_run_of_a_resumed_folder_and_no_other(tmp_path, monkeypatch):
    """W&B continues a run whose id it knows, and run folders have the same names everywhere."""
    runs = []
    fake = SimpleNamespace(init=lambda **options: runs.append(options))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for place in ("one", "two", "one"):
        folder = tmp_path / place / "addition-grpo-1"
        folder.mkdir(parents=True, exist_ok=True)
        RunLog(folder, {}, wandb_mode="offline", project="rlkl", start=0).close()
    one, two, again = (options["id"] for options in runs)
    assert one == again != two
    assert {options["name"] for options in runs} == {"addition-grpo-1"}


def test_wandb_gets_each_row_under_its_step(tmp_path, monkeypatch):
    calls = []
    session = SimpleNamespace(
        log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: session))
    log = RunLog(tmp_path, {}, wandb_mode="offline", project="rlkl", start=0)
    log.write({"step": 3, "reward": 0.5}, {"prompt": "1+2="})
    log.close()
    assert calls == [({"reward": 0.5}, 3), "finish"]


def test_wandb_gets_a_table_of_responses_whenever_the_terminal_gets_a_line(here, base):
    """Read back from what wandb keeps on disk while it is offline."""
    folder = run(base, "run=out", "log.wandb=offline", "log.every=3")
    tables = {}
    for file in folder.glob("wandb/offline-run-*/files/media/table/responses_*.json"):
        table = json.loads(file.read_text(encoding="utf-8"))
        assert table["columns"] == ["step", "prompt", "response", "score"]
        assert len(table["data"]) == 16
        step, *sample = table["data"][0]
        tables[step] = dict(zip(("prompt", "response", "score"), sample, strict=True))
    assert tables == {step: rows(folder)[step - 1]["sample"] for step in (1, 3, 6)}


def test_wandb_is_needed_only_where_it_is_switched_on(here, base, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(base, "run=out", "optim.steps=1", "eval.every=0")
    message = train_error(capsys, *arguments(base, "run=other", "log.wandb=offline"))
    assert message == (
        "error: log.wandb=offline needs wandb: pip install 'rlkl[wandb]', or set log.wandb=disabled"
    )
    assert not Path("other").exists()
    with pytest.raises(UserError, match=r"rlkl\[wandb\]"):
        RunLog(here, {}, wandb_mode="online", project="rlkl", start=0)
