"""docs/preferences.md: its snippets are valid configurations of the command they name, its commands name files."""

import re

import pytest
from runs_fixture import ROOT
from test_supervised import SCHEMAS

from rlkl import config
from rlkl.config import resolve
from rlkl.rewards import REWARDS
from rlkl.schema import Config

PAGE = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```yaml\n# (?:rlkl )?(\S+)\n(.*?)```", PAGE, re.S)


def test_there_is_a_snippet_for_every_command_and_for_training():
    assert {name for name, _ in SNIPPETS} == {*SCHEMAS, "train.py"}


@pytest.mark.parametrize(("name", "text"), SNIPPETS)
def test_a_snippet_is_a_valid_configuration_of_at_most_ten_lines(tmp_path, name, text):
    path, schema = tmp_path / "c.yaml", SCHEMAS.get(name, Config)
    path.write_text(text, encoding="utf-8")
    cfg = config.load([str(path)], schema=schema)
    assert len(text.splitlines()) <= 10
    if getattr(cfg, "reward", None):
        resolve(cfg.reward, REWARDS, "reward")


def test_every_command_of_the_page_names_a_config_of_that_command():
    found = re.findall(r"^    (?:python |rlkl )(\S+) (configs/\S+)", PAGE, re.M)
    assert len(found) == 6
    for name, path in found:
        assert (ROOT / path).read_text(encoding="utf-8").startswith(f"# rlkl {name}:") == (name in SCHEMAS)
        config.load([str(ROOT / path)], schema=SCHEMAS.get(name, Config))
