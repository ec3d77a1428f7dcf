"""Countdown: reach a target with given numbers, each used once (TinyZero, Pan et al. 2025)."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from rlkl.errors import UserError
from rlkl.tasks.arithmetic import MAX_DIGITS, evaluate
from rlkl.tasks.extract import tagged
from rlkl.tasks.hub import load, require_columns, user_message
from rlkl.tasks.split import select_side
from rlkl.types import Example

PROMPT = (
    "Using the numbers {numbers}, write an expression that equals {target}. You may use + - * / "
    "and brackets, and every number exactly once. Think step by step, then write the expression "
    "alone between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>."
)
MAX_NUMBERS = 10  # of a puzzle: an expression of them is shorter than what `evaluate` reads
ATTEMPTS = 200  # random draws per puzzle, after which there are taken to be no more


class Puzzle(NamedTuple):
    """Numbers and a target, and a solution if the puzzle was generated."""

    numbers: list[int]
    target: int
    solution: str | None


class Countdown:
    """`problems` puzzles generated from `seed`, all solvable; or the rows (target, nums) of `path`.

    About a share `heldout` of the puzzles is held out, by a hash of numbers and target that does
    not see the order of the numbers. With `tags` off the whole response is the expression. A
    solution scores 1, and any expression `format_score` on top.
    """

    def __init__(
        self,
        split: str,
        *,
        path: str | None = None,
        problems: int = 5000,
        numbers: tuple[int, int] = (3, 4),
        largest: int = 99,
        target: tuple[int, int] = (10, 99),
        seed: int = 0,
        prompt: str = PROMPT,
        chat: bool = True,
        tags: bool = True,
        format_score: float = 0.1,
        heldout: float = 0.1,
    ) -> None:
        if not 1 <= numbers[0] <= numbers[1] <= MAX_NUMBERS or not 1 <= largest < 10**MAX_DIGITS:
            raise UserError(
                f"task.numbers={list(numbers)}, task.largest={largest}: numbers is the fewest and "
                f"the most, from 1 to {MAX_NUMBERS} numbers; largest has 1 to {MAX_DIGITS} digits, "
                "and is at least 1"
            )
        if not 0 <= format_score < 1:
            raise UserError(
                f"task.format_score={format_score}: must be at least 0 and below 1, the score of a "
                "solution"
            )
        self.prompt = prompt
        self.chat = chat
        self.tags = tags
        self.format_score = format_score
        if path is None:
            puzzles = generate(problems, numbers, largest, target, seed)
        else:
            puzzles = read(path)
        self.puzzles = select_side(puzzles, split, heldout, hash_key, "task=countdown")

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: int) -> Example:
        numbers, target, solution = self.puzzles[index]
        text = self.prompt.replace("{numbers}", ", ".join(map(str, numbers)))
        text = text.replace("{target}", str(target))
        info: dict[str, Any] = {"numbers": list(numbers), "target": target}
        if solution is not None:
            info["solution"] = f"<answer>{solution}</answer>" if self.tags else solution
        return Example(user_message(text) if self.chat else text, str(target), info)

    def score(self, example: Example, response: str) -> float | dict[str, float]:
        """1 for an expression that equals the target and uses every number once, else 0.

        With a `format_score`, two named parts: correct and format.
        """
        expression = tagged(response) if self.tags else response
        parsed = None if expression is None else evaluate(expression)
        correct = 0.0
        if parsed is not None and parsed[0] == example.info["target"]:
            correct = float(sorted(parsed[1]) == sorted(example.info["numbers"]))
        if not self.format_score:
            return correct
        return {"correct": correct, "format": self.format_score * (parsed is not None)}


def hash_key(puzzle: Puzzle) -> str:
    """What decides whether a puzzle is held out."""
    return f"{sorted(puzzle.numbers)} {puzzle.target}"


def read(path: str) -> list[Puzzle]:
    """Puzzles from rows of target and nums, as in Jiayi-Pan/Countdown-Tasks-3to4."""
    rows = load(path, None, "train")
    require_columns(rows, ("target", "nums"), path)
    return [Puzzle([int(n) for n in row["nums"]], int(row["target"]), None) for row in rows]


def generate(
    problems: int, numbers: tuple[int, int], largest: int, target: tuple[int, int], seed: int
) -> list[Puzzle]:
    """Distinct puzzles, each with a solution. Raises UserError if there are too few."""
    rng = random.Random(seed)
    puzzles: dict[tuple[tuple[int, ...], int], Puzzle] = {}
    for _ in range(ATTEMPTS * problems):
        if len(puzzles) == problems:
            break
        drawn = [rng.randint(1, largest) for _ in range(rng.randint(*numbers))]
        value, solution = combine(drawn, rng)
        if target[0] <= value <= target[1]:
            puzzles.setdefault((tuple(sorted(drawn)), value), Puzzle(drawn, value, solution))
    if len(puzzles) < problems:
        raise UserError(
            f"task.problems={problems}: only {len(puzzles)} puzzles were found; ask for fewer, or "
            "widen task.numbers, task.largest or task.target"
        )
    return list(puzzles.values())


def combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """The value and the text of a random expression that uses each number once.

    Two random parts are joined by a random operator until one part is left.
    """
    parts = [(n, str(n)) for n in numbers]
    while len(parts) > 1:
        a, left = parts.pop(rng.randrange(len(parts)))
        b, right = parts.pop(rng.randrange(len(parts)))
        values = {"+": a + b, "-": a - b, "*": a * b}
        if b and a % b == 0:
            values["/"] = a // b
        sign = rng.choice(list(values))
        parts.append((values[sign], f"({left} {sign} {right})"))
    value, text = parts[0]
    return value, text[1:-1] if text.startswith("(") else text
