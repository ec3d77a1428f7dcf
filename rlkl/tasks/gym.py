"""Any dataset of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), generated on the spot and judged by it."""

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
from typing import Any

from rlkl.errors import UserError, first_line
from rlkl.tasks.bounded import bounded
from rlkl.tasks.extract import tagged
from rlkl.tasks.hub import message
from rlkl.tasks.jsonl import bucket
from rlkl.tasks.listed import Listed
from rlkl.types import Example

PROMPT = "{question}\nThink step by step, then write the answer alone between <answer> and </answer>."
LONGEST = 2000  # characters of an answer
EVALUATES = re.compile(r"\beval\(|\bexec\(|sympify|import parse_expr|\w\.parse_expr\(|\.score_answer\(")
NAN = re.compile(r"\bnan[ij]?\b", re.IGNORECASE)  # min(1, nan) is 1: full marks from a judge that measures a distance
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log",
             "ln", "sqrt", "Abs"}
ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call, ast.Tuple, ast.operator,
              ast.unaryop, ast.Load)


class ReasoningGym(Listed):
    """`problems` entries of `dataset`, made from `seed` and its own `options`; its score_answer judges.

    About `heldout` of them are held out, by a hash of the question. `tags` off: the whole reply is the answer.
    """

    def __init__(self, split: str, *, dataset: str, problems: int = 2000, seed: int = 0,
                 options: dict[str, Any] | None = None, prompt: str = PROMPT, chat: bool = True, tags: bool = True,
                 heldout: float = 0.1) -> None:
        self.tags, (self.dataset, entries) = tags, create(dataset, options or {}, seed, problems)
        self.evaluates = evaluates(self.dataset)
        self.examples = [example(entry, prompt, chat, tags) for entry in entries
                         if (bucket(entry["question"]) < heldout) == (split == "heldout")]
        if not self.examples:
            raise UserError(f"task.dataset={dataset!r}: none of {problems} problems falls on the {split} side with "
                            f"task.heldout={heldout}")

    def score(self, example: Example, reply: str) -> float:
        """What the dataset's own judge says, mostly from 0 to 1; 0 without an answer, or if it does not survive it."""
        said = tagged(reply) if self.tags else reply.strip()
        if not said or len(said) > LONGEST or (self.evaluates and not harmless(said)):
            return 0.0
        if NAN.search(said) and not NAN.search(example.answer):
            return 0.0
        found = bounded(lambda: float(self.dataset.score_answer(said, copy.deepcopy(example.info["entry"]))),
                        otherwise=0.0)
        return found if math.isfinite(found) else 0.0


def example(entry: dict[str, Any], prompt: str, chat: bool, tags: bool) -> Example:
    """The judge gets the whole entry, which stays in info."""
    text = prompt.replace("{question}", entry["question"])
    answer = "" if entry["answer"] is None else str(entry["answer"])
    info = {"entry": entry, "solution": f"<answer>{answer}</answer>" if tags else answer}
    return Example(message(text) if chat else text, answer, info)


def create(name: str, options: dict[str, Any], seed: int, size: int) -> tuple[Any, list[dict[str, Any]]]:
    """A dataset of reasoning-gym and its entries. UserError names the ones called alike, or the options there are."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError("task=reasoning_gym needs reasoning-gym: pip install 'rlkl[tasks]'") from error
    if name not in DATASETS:
        alike = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4) or sorted(DATASETS)[:5]
        raise UserError(f"task.dataset={name!r}: choose one of the {len(DATASETS)} datasets of reasoning-gym, such as "
                        f"{', '.join(alike)}")
    known = [f.name for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
    if bad := sorted(set(options) - set(known)):
        raise UserError(f"task.options: {name} has no option {bad[0]!r}; it takes {', '.join(known) or 'none'}")
    try:
        dataset = create_dataset(name, seed=seed, size=size, **options)
        return dataset, [dataset[i] for i in range(size)]
    except Exception as error:  # a hundred generators, each with limits of its own
        raise UserError(f"task.options={options}: {name} refuses them: {first_line(error)}") from error


def evaluates(dataset: Any) -> bool:
    """Does its judge hand replies to Python's eval or to sympy's parser, which calls it? Read from its source."""
    own = [c for c in type(dataset).__mro__ if c.__module__.startswith(type(dataset).__module__)]
    return any(EVALUATES.search(inspect.getsource(inspect.getmodule(c))) for c in own)


def harmless(text: str) -> bool:
    """May a text be evaluated: a literal, words and numbers, or arithmetic with elementary functions and small powers?

    No attribute, no call of another name and no power of a power of numbers: nothing runs, and nothing grows.
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
        return re.fullmatch(r"[\w\s,.+-]*", text) is not None  # no expression; and no bracket, so no call
    return all(isinstance(n, ARITHMETIC) and tame(n) for n in nodes)


def tame(node: ast.AST) -> bool:
    """Is this node as small as an answer's: a number, a call of an elementary function, a power?"""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) < 1e12
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.LShift | ast.RShift | ast.MatMult):
        return False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        inside, above = list(ast.walk(node.left)), list(ast.walk(node.right))
        small = all(abs(n.value) < 100 for n in above if isinstance(n, ast.Constant) and tame(n))
        symbolic = any(isinstance(n, ast.Name) for n in inside)
        return small and not powers(above) and (symbolic or not powers(inside))
    return True


def powers(nodes: list[ast.AST]) -> bool:
    return any(isinstance(n, ast.Pow) for n in nodes)
