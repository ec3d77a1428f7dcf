"""An evaluator of arithmetic that a reply may contain anything to and still get nothing but a fraction."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

LONGEST, DIGITS = 200, 9  # characters of an expression, digits of a number
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression in + - * / ( ) and whole numbers; None of anything else, and of a / 0.

    There is no power, no name and no call: 200 characters of it have a value of at most 200 digits.
    """
    text = text.strip()
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", text) or re.search(rf"[0-9]{{{DIGITS + 1}}}", text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        numbers = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, int)]
        return value(tree.body), numbers
    except (SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def value(node: ast.expr) -> Fraction:
    """KeyError on an operator that is not one of the four, TypeError on a node that is neither."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise TypeError(f"no arithmetic: {type(node).__name__}")
