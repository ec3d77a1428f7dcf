"""Countdown: reach a target with given numbers, each used once. The task of TinyZero (Pan et al. 2025)."""

from __future__ import annotations

import random
from typing import Any

from rlkl.errors import UserError
from rlkl.tasks.arithmetic import evaluate
from rlkl.tasks.extract import tagged
from rlkl.tasks.hub import load, message, require
from rlkl.tasks.jsonl import bucket
from rlkl.types import Example

PROMPT = (
    "Using the numbers {numbers}, write an expression that equals {target}. You may use + - * / and brackets, and "
    "every number exactly once. Think step by step, then write the expression alone between <answer> and </answer>, "
    "for example <answer>(1 + 2) / 3</answer>.")
MOST = 10  # numbers: their expression must not be longer than what is read
TRIES = 200  # draws per problem that is wanted, after which the space is taken to be smaller than that


class Countdown:
    """`problems` puzzles made from `seed`, each of which can be solved; or the rows (target, nums) of `path`.

    About `heldout` of the puzzles are held out, by a hash of numbers and target: their order does not matter. `tags`
    off: the whole reply is the expression. A reply earns 1 for a solution, and `format_score` for any expression.
    """

    def __init__(self, split: str, *, path: str | None = None, problems: int = 5000, numbers: tuple[int, int] = (3, 4),
                 largest: int = 99, target: tuple[int, int] = (10, 99), seed: int = 0, prompt: str = PROMPT,
                 chat: bool = True, tags: bool = True, format_score: float = 0.1, heldout: float = 0.1) -> None:
        if not 1 <= numbers[0] <= numbers[1] <= MOST or largest < 1:
            raise UserError(f"task.numbers={list(numbers)}, task.largest={largest}: from 1 to {MOST} numbers, the "
                            "fewest first, and each at least 1")
        if not 0 <= format_score < 1:
            raise UserError(f"task.format_score={format_score}: at least 0 and below 1, which is for a solution")
        self.prompt, self.chat, self.tags, self.format_score = prompt, chat, tags, format_score
        puzzles = generate(problems, numbers, largest, target, seed) if path is None else read(path)
        self.puzzles = [p for p in puzzles if (bucket(f"{sorted(p[0])} {p[1]}") < heldout) == (split == "heldout")]
        if not self.puzzles:
            raise UserError(f"task=countdown: none of {len(puzzles)} puzzles falls on the {split} side with "
                            f"task.heldout={heldout}")

    def __len__(self) -> int:
        return len(self.puzzles)

    def __getitem__(self, index: int) -> Example:
        numbers, target, solution = self.puzzles[index]
        text = self.prompt.replace("{numbers}", ", ".join(map(str, numbers))).replace("{target}", str(target))
        info: dict[str, Any] = {"numbers": list(numbers), "target": target}
        if solution is not None:
            info["solution"] = f"<answer>{solution}</answer>" if self.tags else solution
        return Example(message(text) if self.chat else text, str(target), info)

    def score(self, example: Example, reply: str) -> float | dict[str, float]:
        """1 for an expression that uses every number once and equals the target; named parts with a format_score."""
        said = tagged(reply) if self.tags else reply
        found = None if said is None else evaluate(said)
        right = found is not None and found[0] == example.info["target"]
        correct = float(right and sorted(found[1]) == sorted(example.info["numbers"]))
        if not self.format_score:
            return correct
        return {"correct": correct, "format": self.format_score * (found is not None)}


Puzzle = tuple[list[int], int, str | None]


def read(path: str) -> list[Puzzle]:
    """Rows of target and nums, as in Jiayi-Pan/Countdown-Tasks-3to4."""
    rows = load(path, None, "train")
    require(rows, ("target", "nums"), path)
    return [([int(n) for n in row["nums"]], int(row["target"]), None) for row in rows]


def generate(problems: int, numbers: tuple[int, int], largest: int, target: tuple[int, int], seed: int) -> list[Puzzle]:
    """Distinct puzzles with a solution each. UserError if there are not so many."""
    rng, found = random.Random(seed), {}
    for _ in range(TRIES * problems):
        if len(found) == problems:
            break
        drawn = [rng.randint(1, largest) for _ in range(rng.randint(*numbers))]
        value, solution = combine(drawn, rng)
        if target[0] <= value <= target[1]:
            found.setdefault((tuple(sorted(drawn)), value), (drawn, value, solution))
    if len(found) < problems:
        raise UserError(f"task.problems={problems}: only {len(found)} puzzles were found; ask for fewer, or widen "
                        "task.numbers, task.largest or task.target")
    return list(found.values())


def combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """A random expression of them, and its value: two at random are joined by an operator until one is left."""
    parts = [(n, str(n)) for n in numbers]
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        values = {"+": a + b, "-": a - b, "*": a * b} | ({"/": a // b} if b and a % b == 0 else {})
        sign = rng.choice(list(values))
        parts.append((values[sign], f"({left} {sign} {right})"))
    value, text = parts[0]
    return value, text[1:-1] if text.startswith("(") else text
