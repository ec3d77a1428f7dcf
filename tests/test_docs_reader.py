"""What a reader meets on every page: names that exist, tables and pictures that show, and the way to the answer."""

import functools
import re

import pytest
import torch
from runs_fixture import ROOT
from test_docs import functions

from rlkl import config
from rlkl.build import TABLES
from rlkl.config import options
from rlkl.explain.tabular import BANDIT, probabilities

PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
         for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
ANSWER = "docs/kl-or-trust-region.md"
every_page = pytest.mark.parametrize("page", PAGES)


def prose(text: str) -> str:
    """Without blocks of code, and without code in a line."""
    return re.sub(r"(`+)[^`]*\1", "", re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.S | re.M))


def leads(page: str) -> set[str]:
    """The files that the links of a page open, one click away."""
    found = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES.get(page, "")))
    inside = ((ROOT / page).parent / link for link in found if link and "://" not in link)
    return {path.resolve().relative_to(ROOT.resolve()).as_posix() for path in inside}


# Names
@functools.cache
def defined() -> set[str]:
    return {name for path in (ROOT / "tests").rglob("*.py") for name in (*functions(path), path.stem)}


@every_page
def test_every_test_and_file_that_a_page_names_exists(page):
    """Linked or not; in a command, in a table, in passing."""
    for name in re.findall(r"\btest_\w+", PAGES[page]):
        assert name in defined(), name
    for path in re.findall(r"(?<![\w./-])(?:configs|tests|docs|rlkl|benchmarks)/[\w./-]+\.\w+", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_every_test_of_the_oracles_is_in_the_file_that_its_letter_stands_for():
    text = PAGES["docs/oracles.md"]
    file = dict(re.findall(r"\b([VLTN]) (?:is )?`(tests/\w+\.py)`", text))
    assert set(file) == set("VLTN")
    rows = [row for row in text.splitlines() if re.search(r"\| [VLTN] `test_", row)]
    assert len(rows) >= 25
    for row in rows:
        cell = row.rsplit("|", 2)[1]
        for name in re.findall(r"`(test_\w+)`", cell):
            assert name in functions(ROOT / file[cell.split()[0]]), row


OWN = ("loss", "advantage", "reward", "task", "selector", "sampling.backend")  # whose options are a function's


@every_page
def test_every_option_that_a_page_names_is_one(page):
    known = {row[0] for row in options({})}
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    for name in re.findall(rf"(?<![\w./'-])((?:{sections})\.[a-z_]+)\b(?!\()", PAGES[page]):
        file = name.rpartition(".")[2] in ("py", "md", "json", "jsonl", "yaml")
        assert name in known or file or name.startswith(OWN), name


SNIPPETS = [(page, text) for page in PAGES for text in re.findall(r"```yaml\n(?!# )(.*?)```", PAGES[page], re.S)]


@pytest.mark.parametrize(("page", "text"), SNIPPETS)
def test_a_snippet_is_a_part_of_a_valid_configuration(page, text):
    """Those that begin with the name of a command are held by test_docs_preferences.py."""
    cfg = config.build(config.merge(config.defaults(), config.parse_yaml(text, page)))
    config.resolve(cfg.task, TABLES["task"], "task")
    config.resolve(cfg.sampling.backend, TABLES["sampling.backend"], "sampling.backend")


# What a forge makes of it
@every_page
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page):
    """A bar inside a cell is escaped; a table is what follows an empty line, or a comment."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    tables = re.findall(r"(?:\A|(.*)\n)((?:^\|.*\n?)+)", text, re.M)
    assert len(tables) >= text.count("\n| ---") + text.count("\n|---")
    for before, table in tables:
        assert not before.strip() or before.startswith("<!--"), before
        cells = [len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table


@every_page
def test_nothing_in_the_prose_is_read_as_html_or_as_a_formula_or_struck_out(page):
    bare = re.sub(r"<!-- /?[\w-]+ -->", "", prose(PAGES[page]))
    assert re.findall(r".{0,30}(?:<[A-Za-z/!?]|[~$]).{0,30}", bare) == []


@pytest.mark.parametrize("picture", sorted(p.name for p in (ROOT / "docs").glob("*.svg")))
def test_a_picture_has_a_ground_of_its_own_so_that_it_is_read_on_a_dark_page_too(picture):
    text = (ROOT / "docs" / picture).read_text(encoding="utf-8")
    first = re.search(r"<(?:rect|path)[^>]*>", text)[0]
    assert re.search(r'fill: #ffffff|fill="white"', first), first
    assert any(picture in page for page in PAGES.values())


# Which KL is between what
def test_from_the_readme_to_which_kl_is_between_what_and_to_its_lines_in_three_clicks():
    assert ANSWER in leads("README.md")
    assert "train.py" in leads(ANSWER)


@pytest.mark.parametrize("page", ["kl.md", "ppo.md", "grpo.md", "explain.md", "question-results.md"])
def test_the_pages_of_the_question_lead_to_the_answer_and_back(page):
    assert ANSWER in leads(f"docs/{page}")
    assert f"docs/{page}" in leads(ANSWER)


def test_the_lines_of_the_answer_are_lines_of_the_loop():
    """Each to the letter, less its comment, in the function that is named."""
    text, loop = PAGES[ANSWER], (ROOT / "train.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    bodies = {name: loop.split(f"def {name}(")[1].split("\ndef ")[0] for name in ("training_step", "backward")}
    assert len(lines) == 3
    for line, name in zip(lines, ("training_step", "backward", "backward"), strict=True):
        assert line in [x.strip() for x in bodies[name].splitlines()], line
        assert f"train.py:{name}]" in text


def test_the_numbers_of_the_drift_are_those_of_log_ref_plus_k_times_score_over_b():
    b, told, rollouts = re.search(r"At b = (\d) .*? is ((?:0|\d\.\d+|, )+) after ([\d, and]+)\s+rollouts",
                                  PAGES[ANSWER], re.S).groups()
    ref = probabilities(BANDIT, BANDIT.table)
    found = []
    for k in map(int, re.findall(r"\d+", rollouts)):
        pi = (ref.log() + k * BANDIT.scores / int(b)).softmax(0)
        found.append(f"{float((pi * (pi / ref).log()).sum()):.3f}")
    assert told.split(", ") == found
    assert len(found) == 3
    assert torch.equal(ref.argmin(), BANDIT.scores.argmax())  # log(1/ref) of the best is then the most there is
