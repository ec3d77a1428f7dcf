"""The README: its plug-in runs, its commands print what it shows, its numbers are measured ones."""

import re
from pathlib import Path

import yaml

from rlkl import cli
from rlkl.losses import LOSSES
from rlkl.plugins import resolve
from rlkl.run import config
from rlkl.run.check_plugins import random_batch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loss_of_the_readme_is_a_plug_in(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (source,) = [block for block in blocks if "my_loss.py" in block]
    (tmp_path / "my_loss.py").write_text(source, encoding="utf-8")
    sapo = resolve({"name": f"{tmp_path}/my_loss.py:sapo", "tau_pos": "1.5"}, LOSSES, "loss")
    assert sapo.keywords == {"tau_pos": 1.5, "tau_neg": 1.05}
    batch, new = random_batch(4, critic=False)
    batch.advantages = batch.rewards
    assert sapo(new, batch)[0].shape == batch.mask.shape


def test_every_file_and_config_that_the_readme_names_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"\b(?:configs|tests)/[\w.-]+\.(?:yaml|py)", README)
    local = [path for path in links + named if "://" not in path]
    assert [path for path in local if not (ROOT / path).exists()] == []


def test_the_explanation_in_the_readme_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    example = re.search(r"^    rlkl (explain .*)\n\n```\n(.*?)```", README, re.M | re.S)
    command, shown = example.groups()
    assert cli.main(command.split()) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    lines = shown.splitlines()
    assert len(lines) > 3
    assert [line for line in printed if line in lines] == lines


def test_every_config_is_valid_and_begins_with_a_comment():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path.name
        assert yaml.safe_load(text), path.name
        if not text.startswith("# rlkl "):
            assert config.load([str(path)]).optim.steps > 0, path.name
