"""What a reader meets on every page: options and files that exist, tables that show, the way on."""

import functools
import re

import torch
from runs_fixture import ROOT
from test_docs import functions

from rlkl.explain.tabular import BANDIT, probabilities
from rlkl.plugins import resolve
from rlkl.run import config
from rlkl.run.config import options
from rlkl.run.names import names
from rlkl.run.tables import TABLES

PAGES = {
    p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8")
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ANSWER = "docs/kl-or-trust-region.md"


def prose(text: str) -> str:
    """A page without code."""
    blocks = re.compile(r"^```.*?^```|^    .*?$", re.S | re.M)
    return re.sub(r"(`+)[^`]*\1", "", blocks.sub("", text))


def links_from(page: str) -> set[str]:
    """The files that the links of a page open."""
    targets = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]))
    files = [(ROOT / page).parent / t for t in targets if t and "://" not in t]
    return {file.resolve().relative_to(ROOT.resolve()).as_posix() for file in files}


# ------------------------------------------------------------------ names


@functools.cache
def names_in_tests() -> set[str]:
    """Every function, class and module of tests/."""
    paths = list((ROOT / "tests").rglob("*.py"))
    return {name for path in paths for name in (*functions(path), path.stem)}


def test_every_test_and_file_that_a_page_names_exists():
    """Linked or not: in a command, in a table, in a sentence."""
    missing = []
    file = r"(?<![\w./-])(?:configs|tests|docs|rlkl|benchmarks)/[\w./-]+\.\w+"
    for page, text in PAGES.items():
        missing += [
            (page, n) for n in re.findall(r"(?<!\.)\btest_\w+", text) if n not in names_in_tests()
        ]
        missing += [(page, path) for path in re.findall(file, text) if not (ROOT / path).exists()]
    assert missing == []


def test_every_test_of_the_oracles_is_in_the_file_that_its_letter_stands_for():
    text = PAGES["docs/oracles.md"]
    file = dict(re.findall(r"\b([VLTN]) (?:is )?`(tests/\w+\.py)`", text))
    assert set(file) == set("VLTN")
    rows = [row for row in text.splitlines() if re.search(r"\| [VLTN] `test_", row)]
    assert len(rows) >= 24
    for row in rows:
        cell = row.rsplit("|", 2)[1]
        for name in re.findall(r"`(test_\w+)`", cell):
            assert name in functions(ROOT / file[cell.split()[0]]), row


# Sections whose options are those of the function that they name.
PLUGINS = ("loss", "advantage", "reward", "task", "selector", "sampling.backend")


def test_every_option_that_a_page_names_is_one():
    known = {row[0] for row in options()}
    known |= {".".join(n.name.split(".")[:2]) for n in names() if n.library == "verl"}
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    option = rf"(?<![\w./'\[-])((?:{sections})\.[a-z_]+)\b(?!\()"
    unknown = []
    for page, text in PAGES.items():
        for name in re.findall(option, text):
            is_file = name.rpartition(".")[2] in ("py", "md", "json", "jsonl", "yaml")
            if not (name in known or is_file or name.startswith(PLUGINS)):
                unknown.append((page, name))
    assert unknown == []


def test_every_loss_and_advantage_that_a_page_chooses_exists():
    """`loss=clip`, `advantage=rloo`: by a name of the table."""
    unknown = []
    for page, text in PAGES.items():
        for section, name in re.findall(r"(?<![\w.])(loss|advantage|selector)=(?!my_)(\w+)", text):
            if name not in TABLES[section]:
                unknown.append((page, f"{section}={name}"))
    assert unknown == []


def test_every_snippet_of_a_page_is_a_part_of_a_valid_configuration():
    """Snippets that begin with a comment belong to a command: see test_docs_preferences.py."""
    for page, text in PAGES.items():
        for snippet in re.findall(r"```yaml\n(?!# )(.*?)```", text, re.S):
            tree = config.parse_yaml(snippet, page)
            cfg = config.build(config.merge(config.defaults(), tree))
            resolve(cfg.task, TABLES["task"], "task")
            resolve(cfg.sampling.backend, TABLES["sampling.backend"], "sampling.backend")


# ------------------------------------------------------------------ how a page is rendered


def test_the_rows_of_a_table_have_as_many_cells_as_its_head():
    """A table follows an empty line or a comment, and a bar inside a cell is escaped."""
    for page, text in PAGES.items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        tables = re.findall(r"(?:\A|(.*)\n)((?:^\|.*\n?)+)", text, re.M)
        assert len(tables) >= text.count("\n| ---") + text.count("\n|---"), page
        for before, table in tables:
            assert not before.strip() or before.startswith("<!--"), (page, before)
            cells = [len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()]
            assert len(set(cells)) == 1, (page, table)


def test_nothing_in_the_prose_is_rendered_as_html_or_as_a_formula_or_struck_out():
    for page, text in PAGES.items():
        bare = re.sub(r"<!-- /?[\w-]+ -->", "", prose(text))
        assert re.findall(r".{0,30}(?:<[A-Za-z/!?]|[~$]).{0,30}", bare) == [], page


def test_every_svg_is_on_a_page_and_has_a_white_background_for_dark_pages():
    for path in sorted((ROOT / "docs").glob("*.svg")):
        first = re.search(r"<(?:rect|path)[^>]*>", path.read_text(encoding="utf-8"))[0]
        assert re.search(r'fill: #ffffff|fill="white"', first), path.name
        assert any(path.name in page for page in PAGES.values()), path.name


# ------------------------------------------------------------------ docs/kl-or-trust-region.md


def test_the_readme_leads_to_the_answer_and_the_answer_to_the_code():
    assert ANSWER in links_from("README.md")
    assert "train.py" in links_from(ANSWER)


def test_the_pages_about_kl_lead_to_the_answer_and_back():
    for name in ("kl.md", "ppo.md", "grpo.md", "explain.md", "question-results.md"):
        page = f"docs/{name}"
        assert ANSWER in links_from(page)
        assert page in links_from(ANSWER)


def test_the_lines_of_the_answer_are_lines_of_train_py():
    """Each to the letter, without its comment, in the function that is named."""
    text = PAGES[ANSWER]
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    for line, name in zip(lines, ("compute_advantages", "objective", "objective"), strict=True):
        body = source.split(f"def {name}(")[1].split("\ndef ")[0]
        assert line in [x.strip() for x in body.splitlines()], line
        assert f"train.py:{name}]" in text


def test_the_numbers_of_the_drift_are_those_of_log_ref_plus_k_times_score_over_b():
    sentence = r"At b = (\d) .*? is ((?:0|\d\.\d+|, )+) after ([\d, and]+)\s+rollouts"
    b, quoted, rollouts = re.search(sentence, PAGES[ANSWER], re.S).groups()
    ref = probabilities(BANDIT, BANDIT.table)
    drift = []
    for k in re.findall(r"\d+", rollouts):
        pi = (ref.log() + int(k) * BANDIT.scores / int(b)).softmax(0)
        drift.append(f"{float((pi * (pi / ref).log()).sum()):.3f}")
    assert quoted.split(", ") == drift
    assert len(drift) == 3
    # log(1/ref) of the best response is then the largest KL that there is
    assert torch.equal(ref.argmin(), BANDIT.scores.argmax())
