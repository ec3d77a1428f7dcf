"""Safe arithmetic parser: returns a Fraction or None, whatever the text."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

MAX_CHARACTERS = 200  # of an expression
MAX_DIGITS = 9  # of a number
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
PARSE_ERRORS = (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError)


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression in + - * / ( ) and whole numbers, and the numbers in it.

    None for anything else, and for a division by zero. There is no power, no name and no call, so
    the value of 200 characters has at most 200 digits.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    if re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return value(tree.body), [n for n in constants if isinstance(n, int)]
    except (*PARSE_ERRORS, ZeroDivisionError):
        return None


def value(node: ast.expr) -> Fraction:
    """The value of a syntax tree.

    Raises KeyError on an operator that is not one of the four, TypeError on any other node.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise TypeError(f"not arithmetic: {type(node).__name__}")
