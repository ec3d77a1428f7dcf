"""One-line bugs, most of them of other codebases, that the tests must notice: make mutants

Every mutant is applied to a copy of the repository, and the named test files are run against it.
They are also run without a mutant, and must pass. A survivor is a hole in the tests: exit 1.

    python tests/mutants.py [--only PATTERN] [--jobs N]

PATTERN is a regular expression, searched in the module, the function, the bug and whose bug it is.
The mutants are in mutants_list.py, and so is the description of what one says.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from mutants_list import MUTANTS, Mutant
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds of one mutant
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
OPTION = "option "  # what a pattern begins with that names an option, whose default is replaced


class NoPlace(ValueError):
    """A mutant does not say which place it changes; the message says how to mend it."""


# Where a mutant lies


def file_of(module: str, root: Path = ROOT) -> Path:
    """Return the file of a module: rlkl/kl.py of "kl", rlkl/rewards/__init__.py of "rewards"."""
    name = module.replace(".", "/")
    files = [
        root / "rlkl" / f"{name}.py",
        root / "rlkl" / name / "__init__.py",
        root / f"{name}.py",
    ]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise NoPlace(
            f"there is no module {module}; has it moved? Looked for {', '.join(map(str, files))}"
        )
    return found


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse(source)


def functions(tree: ast.Module) -> dict[str, ast.AST]:
    """Return the functions and methods by name; a function within another is a part of it."""
    found = {}
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{x.name}": x for x in node.body if isinstance(x, FUNCTIONS)}
    return found


def nodes_of(tree: ast.Module, function: str | None) -> list[ast.AST]:
    """Return the nodes of a function; those outside of all functions if the function is None."""
    named = functions(tree)
    if function is not None and function not in named:
        raise NoPlace(f"there is no function {function}; the file has: {', '.join(named)}")
    left_out = list(named.values()) if function is None else []
    found, waiting = [], [tree if function is None else named[function]]
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.JoinedStr):
            continue  # Python 3.11 does not know the positions within an f-string
        waiting += [child for child in ast.iter_child_nodes(node) if child not in left_out]
    return found


# What a pattern matches


def parsed(*texts: str) -> list[ast.AST]:
    """Parse texts as expressions, or all of them as statements if one is no expression."""
    statements = [ast.parse(text).body for text in texts]
    if any(len(body) != 1 for body in statements):
        raise NoPlace(
            f"a pattern and a replacement are one expression or one statement each: {texts}"
        )
    nodes = [body[0] for body in statements]
    return [node.value for node in nodes] if all(isinstance(n, ast.Expr) for n in nodes) else nodes


def placeholder(pattern: object) -> str | None:
    """Return the name of a placeholder: `A` of A, of the statement A, of *A and of **A."""
    if isinstance(pattern, ast.Expr | ast.Starred):
        pattern = pattern.value
    if isinstance(pattern, ast.keyword) and pattern.arg is None:
        pattern = pattern.value
    is_one = isinstance(pattern, ast.Name) and re.fullmatch("[A-Z][0-9]?", pattern.id)
    return pattern.id if is_one else None


def takes_many(pattern: object) -> bool:
    """Say whether a placeholder stands for a list: the rest of a suite, or of some arguments."""
    kinds = ast.Expr | ast.Starred | ast.keyword
    return isinstance(pattern, kinds) and placeholder(pattern) is not None


def dumped(found: object) -> str:
    """Return a text that is the same for the same code, stored to or loaded."""
    text = str([ast.dump(x) for x in found]) if isinstance(found, list) else ast.dump(found)
    return text.replace("ctx=Store()", "ctx=Load()")


def matches(pattern: object, node: object, bound: dict) -> bool:
    """Compare a pattern with code, and write what the placeholders stand for into `bound`."""
    if isinstance(pattern, list):
        return isinstance(node, list) and lists_match(pattern, node, bound)
    if isinstance(node, ast.expr) and isinstance(pattern, ast.Name) and placeholder(pattern):
        return dumped(bound.setdefault(pattern.id, node)) == dumped(node)
    if type(pattern) is not type(node):
        return False
    if not isinstance(pattern, ast.AST):
        return pattern == node
    fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
    return all(matches(getattr(pattern, f, None), getattr(node, f, None), bound) for f in fields)


def lists_match(patterns: list, nodes: list, bound: dict) -> bool:
    """Compare lists; a last pattern that takes many takes all nodes that are left."""
    if patterns and takes_many(patterns[-1]):
        patterns, many = patterns[:-1], placeholder(patterns[-1])
        rest, nodes = nodes[len(patterns) :], nodes[: len(patterns)]
        if dumped(bound.setdefault(many, rest)) != dumped(rest):
            return False
    return len(patterns) == len(nodes) and all(map(matches, patterns, nodes, [bound] * len(nodes)))


class Fill(ast.NodeTransformer):
    """Put what the placeholders stand for into a replacement."""

    def __init__(self, bound: dict):
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        name = placeholder(node)
        if name is None:
            return node
        if name not in self.bound:
            raise NoPlace(f"{name} stands in a replacement, and not in its pattern")
        return copy.deepcopy(self.bound[name])

    def fill_many(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        many = self.bound.get(placeholder(node))
        return copy.deepcopy(many) if isinstance(many, list) else self.generic_visit(node)

    visit_Expr = visit_Starred = visit_keyword = fill_many


# What a mutant makes of a file


def parameters(function: ast.AST) -> dict[str, ast.Name]:
    """Return what P1, P2, ... stand for: the parameters of a function in order, without self."""
    if not isinstance(function, FUNCTIONS):
        return {}
    of = function.args
    written = [*of.posonlyargs, *of.args, of.vararg, *of.kwonlyargs, of.kwarg]
    names = [argument.arg for argument in written if argument is not None]
    names = [name for name in names if name != "self"]
    return {f"P{i}": ast.Name(name, ast.Load()) for i, name in enumerate(names, 1)}


def default_of(function: ast.AST, option: str) -> ast.expr:
    """Return the default of an option of a function."""
    of = function.args
    positional = [*of.posonlyargs, *of.args]
    with_default = [*positional[len(positional) - len(of.defaults) :], *of.kwonlyargs]
    defaults = zip(with_default, [*of.defaults, *of.kw_defaults], strict=True)
    values = {argument.arg: default for argument, default in defaults if default is not None}
    if option not in values:
        raise NoPlace(
            f"{function.name} has no default of an option {option}; it has: {', '.join(values)}"
        )
    return values[option]


def position(node: ast.AST) -> tuple[int, int, int, int]:
    """Sort by where code begins; of two that begin together, the longer one is the first."""
    return node.lineno, node.col_offset, -node.end_lineno, -node.end_col_offset


def change(source: str, mutant: Mutant) -> tuple[ast.AST, ast.AST]:
    """Return the one node of a source that a mutant replaces, and what it becomes."""
    nodes = nodes_of(tree_of(source), mutant.function)
    if mutant.pattern.startswith(OPTION):
        [replacement] = parsed(mutant.replacement)
        return default_of(nodes[0], mutant.pattern.removeprefix(OPTION)), replacement
    pattern, replacement = parsed(mutant.pattern, mutant.replacement)
    places = []
    for node in nodes:
        bound = parameters(nodes[0])
        if matches(pattern, node, bound):
            places.append((node, bound))
    if len(places) != 1 and not 1 <= mutant.nth <= len(places):
        raise NoPlace(advice(source, mutant, sorted(node.lineno for node, _ in places)))
    places.sort(key=lambda place: position(place[0]))
    node, bound = places[max(mutant.nth, 1) - 1]
    return node, Fill(bound).visit(replacement)


def advice(source: str, mutant: Mutant, lines: list[int]) -> str:
    """Say how to mend a mutant whose pattern matches no place, or several."""
    if mutant.function is None:
        code = "(a statement of the module, outside of all functions)"
    else:
        code = ast.get_source_segment(source, functions(tree_of(source))[mutant.function])
    if lines:
        found = f"matches {len(lines)}, in the lines {lines}"
        mend = "write more of the line into the pattern, or say which one with nth"
    else:
        found = "matches none"
        mend = "write the pattern as the line reads now, with A, B, ... for its local names"
    return (
        f"{mutant.module}, {mutant.function}: the pattern `{mutant.pattern}` should match one place"
        f" and {found}. In tests/mutants_list.py, {mend}.\n\n{code}"
    )


def mutated(source: str, mutant: Mutant) -> str:
    """Return a source with the mutant in it; all else, comments too, is as it was."""
    node, replacement = change(source, mutant)
    text = ast.unparse(replacement)
    if isinstance(replacement, ast.expr):
        text = f"({text})"
    else:
        text = textwrap.indent(text, " " * node.col_offset).lstrip()
    raw = source.encode()  # ast counts columns in bytes
    begins = [0, *(m.end() for m in re.finditer(b"\n", raw))]
    start = begins[node.lineno - 1] + node.col_offset
    end = begins[node.end_lineno - 1] + node.end_col_offset
    return (raw[:start] + text.encode() + raw[end:]).decode()


# Whether the tests notice


def paths_of(tests: str) -> list[str]:
    """Return the test files: tests/test_kl.py and tests/test_step.py of "kl step"."""
    return [f"tests/test_{name}.py" for name in tests.split()]


def copied(scratch: Path) -> None:
    """Copy what the tests need of the repository."""
    for name in ("rlkl", "tests", "configs", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, scratch)


def run_tests(files: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run test files of a copy. PYTHONPATH wins over an editable install, in subprocesses too."""
    path = os.pathsep.join([str(scratch), str(scratch / "tests")])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
        cwd=scratch,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


OF_THE_COPY = """
import subprocess, sys
import rlkl.kl, train
PRINT = "import rlkl.kl, train; print(rlkl.kl.__file__, train.__file__, sep=chr(10))"

def test_what_is_imported_is_the_copy(tmp_path):
    found = subprocess.check_output([sys.executable, "-c", PRINT], cwd=tmp_path, text=True)
    for file in [rlkl.kl.__file__, train.__file__, *found.split()]:
        assert file.startswith(ROOT)
"""


def check_copy() -> None:
    """RuntimeError where pytest in a copy, or a process that it starts, imports another rlkl."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        copied(scratch)
        test = scratch / "tests" / "test_of_the_copy.py"
        test.write_text(OF_THE_COPY.replace("ROOT", repr(str(scratch))), encoding="utf-8")
        done = run_tests([f"tests/{test.name}"], scratch)
    if done.returncode:
        raise RuntimeError(f"mutants would not be imported: {done.stdout}{done.stderr}")


def run(what: Mutant | str) -> tuple[str, str]:
    """Run the tests of a mutant, or a test file without a mutant, and return (verdict, output).

    The verdict is killed, survived, or broken: the tests could not be run, as nothing imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        copied(scratch)
        if isinstance(what, Mutant):
            try:
                file = file_of(what.module, scratch)
                file.write_text(mutated(file.read_text(encoding="utf-8"), what), encoding="utf-8")
            except NoPlace as error:
                return "broken", str(error)
        try:
            done = run_tests(paths_of(what.tests if isinstance(what, Mutant) else what), scratch)
        except subprocess.TimeoutExpired:
            return "broken", f"more than {LIMIT} s"
    return {0: "survived", 1: "killed"}.get(done.returncode, "broken"), done.stdout + done.stderr


def line_of(mutant: Mutant) -> str:
    """Return the line that a mutant changes, or ? where it changes none."""
    try:
        return str(change(file_of(mutant.module).read_text(encoding="utf-8"), mutant)[0].lineno)
    except NoPlace:
        return "?"


def row_of(what: Mutant | str, verdict: str) -> list[str]:
    """Return a row of the final table."""
    if not isinstance(what, Mutant):
        return [f"tests/test_{what}.py without a mutant", "", "", "", "", verdict]
    bug = f"{what.pattern} → {what.replacement}"
    return [what.module, what.function or "<module>", line_of(what), bug, what.whose, verdict]


def said(row: list[str]) -> str:
    """Return a row as a line."""
    module, function, line, bug, whose, _ = row
    where = f"{module}:{line} {function}: {bug}" if bug else module
    return where + (f"   [{whose}]" if whose else "")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    options = parser.parse_args(argv)
    check_copy()
    console = Console(highlight=False, soft_wrap=True)
    chosen = [m for m in MUTANTS if re.search(options.only, " ".join(map(str, m)))]
    suites = sorted({name for m in chosen for name in m.tests.split()})
    bad, start = Table("module", "function", "line", "bug", "whose", "verdict"), time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(run, what): what for what in (*suites, *chosen)}
        for count, job in enumerate(as_completed(jobs), 1):
            (verdict, output), what = job.result(), jobs[job]
            if isinstance(what, str):
                verdict = {"survived": "passed", "killed": "failed"}.get(verdict, verdict)
            row = row_of(what, verdict)
            if verdict not in ("killed", "passed"):
                bad.add_row(*map(escape, row))
            console.print(escape(f"{count:3}/{len(jobs)} {verdict:8} {said(row)}"))
            if verdict in ("broken", "failed"):
                console.print(escape("\n".join(output.splitlines()[-15:])))
    if bad.row_count:
        console.print(bad)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    of_others = len([m for m in chosen if m.whose])
    console.print(
        f"{len(chosen)} mutants, {of_others} of them bugs of other codebases; "
        f"{bad.row_count or 'none'} not killed; {time.monotonic() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU"
    )
    return int(bad.row_count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
