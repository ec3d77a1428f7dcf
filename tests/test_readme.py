"""What the README says is what the code does."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlkl import cli, config
from rlkl.losses import LOSSES
from rlkl.preflight import random_batch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loss_of_the_readme_is_a_plug_in_of_at_most_nine_lines(tmp_path):
    source = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my_loss.py" in block)
    assert len([line for line in source.splitlines() if line.strip()]) <= 9
    (tmp_path / "my_loss.py").write_text(source, encoding="utf-8")
    sapo = config.resolve({"name": f"{tmp_path}/my_loss.py:sapo", "tau_pos": "1.5"}, LOSSES, "loss")
    assert sapo.keywords == {"tau_pos": 1.5, "tau_neg": 1.05}
    batch, new = random_batch(4, critic=False)
    batch.advantages = batch.rewards
    assert sapo(new, batch)[0].shape == batch.mask.shape


def test_every_file_and_config_that_the_readme_names_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"\b(?:configs|tests)/[\w.-]+\.(?:yaml|py)", README):
        assert (ROOT / path).exists(), path


def test_the_explanation_in_the_readme_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, block = re.search(r"^    rlkl (explain .*)\n\n```\n(.*?)```", README, re.M | re.S).groups()
    assert cli.main(command.split()) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    told = block.splitlines()
    assert len(told) == 5
    assert [line for line in printed if line in told] == told


def test_the_results_of_the_readme_are_those_of_make_learn():
    """Each row: config, seed or control, before → after, as in benchmarks/results/learn.json."""
    learned = json.loads((ROOT / "benchmarks/results/learn.json").read_text(encoding="utf-8"))["rows"]
    told = re.findall(r"^\| `(configs/[\w.-]+)` \| ([\w ]+) \| ([\d.]+) → ([\d.]+) \|", README, re.M)
    seeds = ["control" if row["control"] else str(row["seed"]) for row in learned]
    want = [(r["config"], seed, *(f"{x:.3f}" for x in r["accuracy"])) for r, seed in zip(learned, seeds, strict=True)]
    assert told == want


CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if not p.read_text().startswith("# rlkl ")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_is_valid_and_begins_with_one_comment_line(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert config.load([str(path)]).optim.steps > 0
    assert yaml.safe_load(path.read_text(encoding="utf-8"))
