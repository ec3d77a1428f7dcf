"""Any dataset of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), with its own judge."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
from typing import Any

from rlkl.errors import UserError, first_line
from rlkl.tasks.bounded import bounded
from rlkl.tasks.extract import tagged
from rlkl.tasks.hub import user_message
from rlkl.tasks.listed import Listed
from rlkl.tasks.split import select_side
from rlkl.types import Example

PROMPT = (
    "{question}\nThink step by step, then write the answer alone between <answer> and </answer>."
)
MAX_CHARACTERS = 2000  # of an answer
EVALUATES = re.compile(
    r"\beval\(|\bexec\(|sympify|import parse_expr|\w\.parse_expr\(|\.score_answer\("
)
# min(1, nan) is 1: a judge that measures a distance would give nan full marks.
NAN = re.compile(r"\bnan[ij]?\b", re.IGNORECASE)
TRIGONOMETRY = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"}
FUNCTIONS = TRIGONOMETRY | {"sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs"}
ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
    *(ast.Constant, ast.Name, ast.Load, ast.Call, ast.Tuple),
)


class ReasoningGym(Listed):
    """`problems` entries of `dataset`, generated from `seed`; the dataset's score_answer judges.

    options: those of the dataset's own config class. About a share `heldout` of the entries is held
    out, by a hash of the question. With `tags` off the whole response is the answer.
    """

    def __init__(
        self,
        split: str,
        *,
        dataset: str,
        problems: int = 2000,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        prompt: str = PROMPT,
        chat: bool = True,
        tags: bool = True,
        heldout: float = 0.1,
    ) -> None:
        self.tags = tags
        self.dataset, entries = create(dataset, options or {}, seed, problems)
        self.evaluates = evaluates(self.dataset)
        source = f"task.dataset={dataset!r}"
        side = select_side(entries, split, heldout, lambda entry: entry["question"], source)
        self.examples = [parse(entry, prompt, chat, tags) for entry in side]

    def score(self, example: Example, response: str) -> float:
        """The dataset's own score, mostly from 0 to 1.

        0 without an answer, and where the judge fails or runs out of time.
        """
        answer = tagged(response) if self.tags else response.strip()
        if not answer or len(answer) > MAX_CHARACTERS:
            return 0.0
        if self.evaluates and not harmless(answer):
            return 0.0
        if NAN.search(answer) and not NAN.search(example.answer):
            return 0.0
        score = bounded(self.judge, example, answer, otherwise=0.0)
        return score if math.isfinite(score) else 0.0

    def judge(self, example: Example, answer: str) -> float:
        """score_answer of the dataset, on a copy of the entry: some judges change it."""
        entry = copy.deepcopy(example.info["entry"])
        return float(self.dataset.score_answer(answer, entry))


def parse(entry: dict[str, Any], prompt: str, chat: bool, tags: bool) -> Example:
    """One entry as an Example. The judge needs the whole entry, so it is in info."""
    text = prompt.replace("{question}", entry["question"])
    answer = "" if entry["answer"] is None else str(entry["answer"])
    info = {"entry": entry, "solution": f"<answer>{answer}</answer>" if tags else answer}
    return Example(user_message(text) if chat else text, answer, info)


def create(
    name: str, options: dict[str, Any], seed: int, size: int
) -> tuple[Any, list[dict[str, Any]]]:
    """A dataset of reasoning-gym, and its entries.

    Raises UserError on an unknown name, with similar ones, and on an unknown or bad option.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(
            "task=reasoning_gym needs reasoning-gym: pip install 'rlkl[tasks]'"
        ) from error
    if name not in DATASETS:
        similar = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4)
        raise UserError(
            f"task.dataset={name!r}: choose one of the {len(DATASETS)} datasets of reasoning-gym, "
            f"such as {', '.join(similar or sorted(DATASETS)[:5])}"
        )
    fields = [f.name for f in dataclasses.fields(DATASETS[name][1])]
    known = [field for field in fields if field not in ("seed", "size")]
    if unknown := sorted(set(options) - set(known)):
        takes = ", ".join(known) or "none"
        raise UserError(f"task.options: {name} has no option {unknown[0]!r}; it takes {takes}")
    try:
        dataset = create_dataset(name, seed=seed, size=size, **options)
        return dataset, [dataset[i] for i in range(size)]
    except Exception as error:  # a hundred generators, each with limits of its own
        raise UserError(
            f"task.options={options}: {name} refuses them: {first_line(error)}"
        ) from error


# ------------------------------------------------------------------ judges that evaluate


def evaluates(dataset: Any) -> bool:
    """Does its judge give responses to Python's eval, or to sympy's parser, which calls eval?

    This is read from the judge's source.
    """
    source = inspect.getsource(sys.modules[type(dataset).__module__])
    return EVALUATES.search(source) is not None


def harmless(text: str) -> bool:
    """May this text be evaluated?

    Yes for a literal, for words and numbers, and for arithmetic with elementary functions and small
    powers. No for an attribute, for a call of any other function, and for a power of a power of
    numbers: nothing may run, and nothing may grow.
    """
    if not text.isascii():
        return False
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            read(text)
            return True
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # Not an expression. Without a bracket there is no call.
        return re.fullmatch(r"[\w\s,.+-]*", text) is not None
    return all(isinstance(node, ARITHMETIC) and is_small(node) for node in nodes)


def is_small(node: ast.AST) -> bool:
    """Is this node no larger than an answer's: a number, an elementary function, a small power?"""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) < 1e12
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.LShift | ast.RShift | ast.MatMult):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return is_small_power(list(ast.walk(node.left)), list(ast.walk(node.right)))
    return True


def is_small_power(base: list[ast.AST], exponent: list[ast.AST]) -> bool:
    """Are the numbers in the exponent below 100, and is there no power inside?

    A base with a symbol may hold a power: nothing computes its digits.
    """
    constants = [n.value for n in exponent if isinstance(n, ast.Constant)]
    numbers = [x for x in constants if isinstance(x, int | float)]
    if any(abs(x) >= 100 for x in numbers) or has_power(exponent):
        return False
    return any(isinstance(n, ast.Name) for n in base) or not has_power(base)


def has_power(nodes: list[ast.AST]) -> bool:
    """Is one of these nodes the operator **?"""
    return any(isinstance(n, ast.Pow) for n in nodes)
