"""docs/one-step.md: the trace and the data flow of the page are those of a step."""

import re
from dataclasses import fields

import pytest
from runs_fixture import ROOT
from trace_step import SMALL, changes_of_file, table, trace_of

import train
from rlkl.types import Batch, PolicyOutput

pytest_plugins = ("runs_fixture",)

PAGE = (ROOT / "docs" / "one-step.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def functions(base):
    return trace_of([str(ROOT / "configs" / "tiny-grpo.yaml"), *SMALL], str(base))


def test_the_table_of_the_page_is_the_trace_of_a_step(functions):
    printed = re.search(r"<!-- trace -->\n(.*)\n<!-- /trace -->", PAGE, re.S)[1]
    assert printed == table(functions), "run python tests/trace_step.py --table"


def test_the_trace_names_the_functions_that_a_step_is_made_of(functions):
    names = [function.name for function in functions]
    steps = ["training_step", "generate_and_score", "evaluate_logprobs", "compute_advantages"]
    steps += ["update_policy", "objective"]
    assert [name for name in names if name in steps] == steps
    assert changes_of_file(functions) < len(functions) / 2


def test_the_figure_follows_the_fields_of_a_batch():
    """What stands on an arrow is a field of Batch or of PolicyOutput."""
    figure = re.search(r"```mermaid\n(.*?)```", PAGE, re.S)[1]
    known = {f.name for f in fields(Batch)} | set(PolicyOutput._fields) | {"uniforms"}
    arrows = re.findall(r"-->\|\"(.*?)\"\|", figure)
    named = [re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", arrow) for arrow in arrows]
    assert {name for names in named for name in names} <= known
    boxes = re.findall(r"\b(\w+)\[\"", figure)
    functions = [box for box in boxes if hasattr(train, box)]
    assert len(functions) >= 7
