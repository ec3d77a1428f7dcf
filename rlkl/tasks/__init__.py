"""Where prompts come from and how a reply is judged: task(split, **options) with __len__, __getitem__ and score."""

from rlkl.tasks.addition import Addition
from rlkl.tasks.jsonl import Jsonl
from rlkl.tasks.reviews import Reviews

TASKS = {"addition": Addition, "jsonl": Jsonl, "reviews": Reviews}
