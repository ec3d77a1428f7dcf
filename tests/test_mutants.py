"""The list of mutants is what it should be. Whether the tests notice them: make mutants."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, NoPlace, change, file_of, functions, mutated, tree_of
from mutants_list import Mutant

EACH = pytest.mark.parametrize(
    "mutant", MUTANTS, ids=[f"{m.module}-{m.function}-{m.pattern}" for m in MUTANTS]
)


def modules_of(package):
    """Return the modules of a package, but those in Triton, whose tests are slow."""
    files = sorted((ROOT / "rlkl" / package).glob("[a-z]*.py"))
    return [f"{package}.{file.stem}" for file in files if not file.stem.endswith("_triton")]


COVERED = ["kl", "advantages", *modules_of("losses"), "logprobs", *modules_of("logprobs")]
ROLLOUT = modules_of("rollout")
LISTED = {
    "rlhf-book",
    "PaLM-rlhf",
    "TRL",
    "nanochat",
    "tiny-grpo",
    "simple_GRPO",
    "GRPO-Zero",
    "nano-aha-moment",
    "cleanrl",
    "lm-human-preference-details",
    "minRLHF",
    "torchtune",
    "prime-rl",
    "nano-vllm",
    "verl",
}

# transformers wants them to be there; the engine gives positions and no mask, so nothing asks them.
UNASKED = {f"SlotLayer.get_{name}" for name in ("seq_length", "max_length", "mask_sizes")}

# The first took the place of three losses: ppo, grpo and dual_clip; the second weights, too, and
# reports.
MERGED = {("losses.clip", "clip"), ("train", "accumulate_gradient")}


def source_of(module):
    return file_of(module).read_text(encoding="utf-8")


# The list


@EACH
def test_a_mutant_changes_one_place_of_its_function_and_it_still_parses(mutant):
    source = source_of(mutant.module)
    try:
        changed = mutated(source, mutant)
    except NoPlace as error:
        pytest.fail(str(error), pytrace=False)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), "it changes nothing"


@EACH
def test_nth_is_said_only_where_it_is_needed(mutant):
    if mutant.nth:
        with pytest.raises(NoPlace):
            change(source_of(mutant.module), mutant._replace(nth=0))


@EACH
def test_the_tests_of_a_mutant_exist(mutant):
    assert mutant.tests
    here = Path(__file__).parent
    assert all((here / f"test_{name}.py").is_file() for name in mutant.tests.split())


def test_there_are_many_and_no_function_has_more_than_two():
    assert len(MUTANTS) >= 60
    assert len({m[:4] for m in MUTANTS}) == len(MUTANTS)
    counts = Counter((m.module, m.function) for m in MUTANTS)
    assert {place: n for place, n in counts.items() if n > 2 and place not in MERGED} == {}


@pytest.mark.parametrize("module", [*COVERED, *ROLLOUT])
def test_every_public_function_has_one(module):
    names = functions(tree_of(source_of(module))).keys()
    public = {name for name in names if not name.split(".")[-1].startswith("_")} - UNASKED
    assert public - {m.function for m in MUTANTS if m.module == module} == set()


def test_the_codebases_whose_bugs_are_known_are_all_there():
    assert {name for name in LISTED if not any(name in m.whose for m in MUTANTS)} == set()


# What a pattern matches

SOURCE = '''TABLE = {"loss": 1}


def loss(new, old, *rest, cap=3.0):
    """é: columns count bytes, not letters."""
    é = "é"; ratio = (new - old).exp()  # a comment
    for x in rest:
        print(x)
        ratio = torch.minimum(ratio, x, out=None)
    return ratio.clamp(max=cap) * ratio


class Policy:
    def act(self, state):
        return self.head(state) + state
'''

CASES = {
    "a letter is any expression": ("loss", "A.exp()", "A", "ratio = (new - old)  #"),
    "two letters": ("loss", "A - B", "B - A", "(old - new)"),
    "a letter twice is the same": ("loss", "A.clamp(max=B) * A", "A", "return (ratio)\n"),
    "the rest of the arguments": (
        "loss",
        "torch.minimum(*A, **B)",
        "f(*A, **B)",
        "f(ratio, x, out",
    ),
    "a suite": ("loss", "for A in B: C", "for A in B[:1]: C", "for x in rest[:1]:\n        print"),
    "the rest of a suite": (
        "loss",
        "for A in B: print(C); D",
        "if B: D",
        "if rest:\n        ratio",
    ),
    "a statement": ("loss", "print(A)", "pass", "    pass\n"),
    "parameters": ("loss", "P1 - P2", "P2 - P3", "(old - rest)"),
    "a method has no self": ("Policy.act", "A + P1", "A - P1", "self.head(state) - state"),
    "an option": ("loss", "option cap", "5.0", "cap=(5.0)"),
    "outside of functions": (None, "TABLE = A", "TABLE = A | {}", "TABLE = {'loss': 1} | {}"),
    "precedence": ("loss", "A.exp()", "A + 1", "ratio = (new - old + 1)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pattern_matches(name):
    function, pattern, replacement, expected = CASES[name]
    changed = mutated(SOURCE, Mutant("module", function, pattern, replacement, "tests"))
    ast.parse(changed)
    assert expected in changed
    assert "# a comment" in changed


def test_the_nth_place_is_counted_as_it_is_read():
    source = "def f(a, b, c):\n    return g(a) + g(b)\n"
    second = Mutant("module", "f", "g(A)", "A", "tests", nth=2)
    assert mutated(source, second) == source.replace("g(b)", "(b)")


def test_renamed_and_reformatted_code_has_the_same_mutants():
    mutant = Mutant("module", "f", "A.clamp(max=B)", "A", "tests")
    other = "def f(ratio, highest):\n    return ratio.clamp(\n        max=highest,  # why\n    )\n"
    assert mutated("def f(x, cap): return x.clamp(max=cap)", mutant).endswith("return (x)")
    assert mutated(other, mutant).endswith("return (ratio)\n")


@pytest.mark.parametrize(
    ("function", "pattern", "said"),
    [
        ("loss", "A.log()", "matches none.*as the line reads"),
        ("loss", "ratio", "matches 5, in the lines .*nth"),
        ("lost", "A", "no function lost; the file has: loss, Policy.act"),
        ("loss", "option low", "no default of an option low; it has: cap"),
        ("loss", "A; B", "one expression or one statement"),
    ],
)
def test_a_mutant_without_a_place_says_how_to_mend_it(function, pattern, said):
    with pytest.raises(NoPlace, match=said) as error:
        mutated(SOURCE, Mutant("module", function, pattern, "None", "tests"))
    if "matches" in said:
        assert "return ratio.clamp(max=cap) * ratio" in str(error.value)


def test_a_letter_of_a_replacement_alone_is_refused():
    with pytest.raises(NoPlace, match="B stands in a replacement"):
        mutated(SOURCE, Mutant("module", "loss", "A.exp()", "B", "tests"))


def test_a_module_that_is_not_there_says_so():
    with pytest.raises(NoPlace, match="no module kll; has it moved"):
        file_of("kll")
