"""The list of mutants is what it should be. Whether the tests notice them: make mutants."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, functions

EACH = pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.file}-{m.before}" for m in MUTANTS])
ROLLOUT = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "rlkl" / "rollout").glob("*.py"))
COVERED = [f"rlkl/{name}.py" for name in ("kl", "advantages", "losses", "selectors", "mismatch", "logprobs")]
LISTED = {"rlhf-book", "PaLM-rlhf", "TRL", "nanochat", "tiny-grpo", "simple_GRPO", "GRPO-Zero", "nano-aha-moment",
    "cleanrl", "lm-human-preference-details", "minRLHF", "torchtune", "prime-rl", "nano-vllm", "verl"}


# transformers wants them to be there; the engine gives positions and no mask, so nothing asks them.
UNASKED = {f"SlotLayer.get_{name}" for name in ("seq_length", "max_length", "mask_sizes")}


@EACH
def test_a_mutant_is_another_line_that_still_parses(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.before) == 1
    assert mutant.after != mutant.before
    assert "\n" not in mutant.before + mutant.after
    changed = source.replace(mutant.before, mutant.after)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), "a comment is no behaviour"


@EACH
def test_a_mutant_lies_in_one_function_or_in_none(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    name, line = mutant.place
    assert mutant.before in source.splitlines()[line - 1]
    inside = [f for f, first, last in functions(source) if first <= line <= last]
    assert inside == ([] if name == "<module>" else [name])


@EACH
def test_the_tests_of_a_mutant_exist(mutant):
    assert mutant.tests
    assert all((Path(__file__).parent / f"test_{name}.py").is_file() for name in mutant.tests.split())


def test_there_are_many_and_no_function_has_more_than_two():
    assert len(MUTANTS) >= 60
    assert len({(m.file, m.before, m.after) for m in MUTANTS}) == len(MUTANTS)
    counts = Counter((m.file, m.place[0]) for m in MUTANTS)
    assert {place: n for place, n in counts.items() if n > 2} == {}


@pytest.mark.parametrize("file", [*COVERED, *ROLLOUT])
def test_every_public_function_has_one(file):
    names = {name for name, *_ in functions((ROOT / file).read_text(encoding="utf-8"))}
    public = {name for name in names if not name.split(".")[-1].startswith("_")} - UNASKED
    assert public - {m.place[0] for m in MUTANTS if m.file == file} == set()


def test_the_codebases_whose_bugs_are_known_are_all_there():
    assert {name for name in LISTED if not any(name in m.whose for m in MUTANTS)} == set()
