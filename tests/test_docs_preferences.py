"""docs/preferences.md: snippets are valid configurations, and commands name their configs."""

import re

from runs_fixture import ROOT
from test_supervised import SCHEMAS

from rlkl.plugins import resolve
from rlkl.rewards import REWARDS
from rlkl.run import config
from rlkl.run.schema import Config

PAGE = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```yaml\n# (?:rlkl )?(\S+)\n(.*?)```", PAGE, re.S)


def test_every_snippet_is_a_valid_configuration_of_its_command(tmp_path):
    assert {command for command, _ in SNIPPETS} == {*SCHEMAS, "train.py"}
    path = tmp_path / "c.yaml"
    for command, text in SNIPPETS:
        path.write_text(text, encoding="utf-8")
        cfg = config.load([str(path)], schema=SCHEMAS.get(command, Config))
        if getattr(cfg, "reward", None):
            resolve(cfg.reward, REWARDS, "reward")


def test_every_command_of_the_page_names_a_config_of_that_command():
    commands = re.findall(r"^    (?:python |rlkl )(\S+) (configs/\S+)", PAGE, re.M)
    assert len(commands) == 6
    for command, path in commands:
        is_of_this_command = (
            (ROOT / path).read_text(encoding="utf-8").startswith(f"# rlkl {command}:")
        )
        assert is_of_this_command == (command in SCHEMAS)
        config.load([str(ROOT / path)], schema=SCHEMAS.get(command, Config))
