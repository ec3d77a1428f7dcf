"""What a reader of one training step meets: every function of ours that it runs, in order.

    python tests/trace_step.py [configs/tiny-grpo.yaml] [key=value ...] [--table]

For each function its file and its lines of code; then totals: functions, files, lines, and how
often the next new function is in another file than the one before. --table prints the table of
docs/one-step.md instead: a row for each stay in one file.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SMALL = (
    "task.digits=1",  # random weights are sometimes right: a step without a signal has no update
    "sampling.prompts=32",
    "optim.minibatch=8",
    "optim.warmup=0",
    "model.logprobs=reference",
)


class Function(NamedTuple):
    file: str
    name: str
    lines: frozenset[int]  # of code: not blank, not a comment, not in a docstring


def trace(call: Callable[[], object]) -> list[Function]:
    """The functions of train.py and rlkl/ that `call()` runs, in the order of their first call."""
    codes: dict[CodeType, None] = {}

    def watch(frame, event, arg):
        if event == "call":
            codes[frame.f_code] = None

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    functions: dict[tuple[str, str], Function] = {}
    for code in codes:
        path = Path(code.co_filename)
        ours = path == ROOT / "train.py" or ROOT / "rlkl" in path.parents
        name = code.co_qualname.split(".<locals>")[
            0
        ]  # an inner function is a part of its outer one
        if ours and not name.startswith("<"):
            file = str(path.relative_to(ROOT))
            source, first = inspect.getsourcelines(code)
            lines = set(range(first, first + len(source))) & code_lines(path)
            before = functions.get((file, name))
            lines |= before.lines if before else set()
            functions[file, name] = Function(file, name, frozenset(lines))
    return list(functions.values())


@functools.cache
def code_lines(path: Path) -> frozenset[int]:
    """The line numbers of a file that hold code: not blank, not a comment, not in a docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(source.splitlines(), 1)
    code = {n for n, line in numbered if line.strip() and line.strip()[0] != "#"}
    return frozenset(code - docstrings)


def changes_of_file(functions: list[Function]) -> int:
    files = [function.file for function in functions]
    return sum(a != b for a, b in itertools.pairwise(files))


def trace_of(argv: list[str], base: str) -> list[Function]:
    """The trace of one step of a configuration on the model in the folder `base`."""
    import train
    from rlkl.run import config
    from rlkl.run.build import build
    from rlkl.run.session import step_inputs
    from rlkl.run.state import State

    cfg = config.load([*argv, f"model.name={base}"])
    models, algorithm, data = build(cfg, train.generate_and_score)
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    inputs = step_inputs(cfg, data, state)
    return trace(lambda: train.training_step(cfg, models, algorithm, data, state, *inputs))


def table(functions: list[Function]) -> str:
    """A Markdown table with a row for each stay in one file."""
    rows = ["| file | functions |", "|---|---|"]
    for file, stay in itertools.groupby(functions, key=lambda function: function.file):
        names = ", ".join(f"`{function.name}`" for function in stay)
        rows.append(f"| [{file.removeprefix('rlkl/')}](../{file}) | {names} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    from runs_fixture import make_base

    as_table = "--table" in argv
    argv = [arg for arg in argv if arg != "--table"]
    config = argv if argv and argv[0].endswith(".yaml") else ["configs/tiny-grpo.yaml", *argv]
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        functions = trace_of([config[0], *SMALL, *config[1:]], str(base))
    if as_table:
        print(table(functions))
        return
    for file, name, lines in functions:
        print(f"{len(lines):4d}  {file:36s} {name}")
    files = {function.file for function in functions}
    lines = sum(len(function.lines) for function in functions)
    print(
        f"\n{len(functions)} functions, {len(files)} files, {lines} lines of code, "
        f"{changes_of_file(functions)} changes of file"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
