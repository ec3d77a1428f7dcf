"""Tasks: where prompts come from, and how a response is scored.

A task is called as task(split, **options), split "train" or "heldout". It has `__len__`,
`__getitem__` (an Example) and `score(example, response)`, a number or {part: number}. It may have
`grade(example, response) -> {name: number}`, which a held-out evaluation reports beside accuracy.
"""

from rlkl.tasks.addition import Addition
from rlkl.tasks.countdown import Countdown
from rlkl.tasks.gsm8k import GSM8K
from rlkl.tasks.gym import ReasoningGym
from rlkl.tasks.hub import Hub
from rlkl.tasks.jsonl import Jsonl
from rlkl.tasks.mathematics import Mathematics
from rlkl.tasks.reviews import Reviews

TASKS = {
    "addition": Addition,
    "jsonl": Jsonl,
    "datasets": Hub,
    "gsm8k": GSM8K,
    "math": Mathematics,
    "countdown": Countdown,
    "reasoning_gym": ReasoningGym,
    "reviews": Reviews,
}
