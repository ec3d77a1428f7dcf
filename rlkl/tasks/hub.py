"""Rows from the `datasets` library: a name on the Hugging Face hub, or a local folder or file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlkl.errors import UserError, first_line
from rlkl.tasks.jsonl import Jsonl, is_prompt
from rlkl.tasks.listed import Listed
from rlkl.tasks.messages import last_turn, response_text
from rlkl.tasks.split import select_side
from rlkl.types import Example

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class Hub(Listed):
    """Any dataset: `prompt` and `answer` name its columns.

    A reward reads the others by their names, and the answers by the name of their column too.

    answer: null where the prompt's column holds whole conversations, whose last message is the
    answer. Without a column `answer` the rows are only prompts, and a reward scores.
    heldout_split: the split that is held out. Without it, and for a single file, about a share
    `heldout` of the rows is held out, by a hash of the prompt.
    chat: make a prompt that is text a user message; else it stays raw text.
    """

    def __init__(
        self,
        split: str,
        *,
        path: str,
        config: str | None = None,
        prompt: str = "prompt",
        answer: str | None = "answer",
        chat: bool = False,
        train_split: str = "train",
        heldout_split: str | None = None,
        heldout: float = 0.1,
    ) -> None:
        splits = (train_split, heldout_split)
        hashed = hash_key if answer is not None else prompt_of_conversation
        rows = load_side(split, path, config, splits, heldout, key=prompt, hashed=hashed)
        if answer == "answer" and answer not in rows[0]:
            answer = ""
        require_columns(rows, [prompt, answer] if answer else [prompt], path)
        self.examples = [parse(row, prompt, answer, chat, path) for row in rows]

    score = Jsonl.score  # 1 if the response equals the answer, except for white space around it


def parse(row: dict[str, Any], prompt: str, answer: str | None, chat: bool, path: str) -> Example:
    """One row as an Example. Raises UserError where a column has the wrong type.

    answer: "" where there is none.
    """
    prompt_value = row.pop(prompt)
    if answer is None:
        messages, response = last_turn(prompt_value, f"task.path={path!r}: {prompt}")
        return Example(messages, response, row)
    answer_value = row[answer] if answer else ""
    if answer in ("answer", "completion"):  # Example.answer is for these
        del row[answer]
    if isinstance(answer_value, list):
        answer_value = response_text(answer_value, f"task.path={path!r}: {answer}")
    if not is_prompt(prompt_value) or not isinstance(answer_value, str | int | float):
        raise UserError(
            f"task.path={path!r}: {prompt} must be text or chat messages, and {answer} text or a "
            f"number; a row has {str(prompt_value)[:60]!r} and {str(answer_value)[:60]!r}"
        )
    if chat and isinstance(prompt_value, str):
        prompt_value = user_message(prompt_value)
    return Example(prompt_value, str(answer_value), row, has_answer=bool(answer))


def user_message(text: str) -> list[dict]:
    """A chat of one user message, for the tokenizer's chat template."""
    return [{"role": "user", "content": text}]


def load_side(
    split: str,
    path: str,
    config: str | None,
    splits: tuple[str, str | None],
    heldout: float,
    key: str,
    hashed: Callable[[Any], str | list[dict]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one side, "train" or "heldout".

    splits: the names of the training and of the held-out split. If the second is None, or the path
    is a single table, the training split is divided by a hash of the column `key`, or of what
    `hashed` makes of it.
    """
    train_split, heldout_split = splits
    if heldout_split is not None and not is_single_table(Path(path)):
        return load(path, config, train_split if split == "train" else heldout_split)
    rows = load(path, config, train_split)
    require_columns(rows, (key,), path)
    of = hashed or hash_key
    return select_side(rows, split, heldout, lambda row: of(row[key]), f"task.path={path!r}")


def is_single_table(path: Path) -> bool:
    """Is this a file, or what Dataset.save_to_disk writes? Neither has splits."""
    return path.is_file() or (path / "state.json").is_file()


def hash_key(x: Any) -> str | list[dict]:
    """A prompt as it is, a number as text."""
    return x if isinstance(x, str | list) else str(x)


def prompt_of_conversation(messages: Any) -> str | list[dict]:
    """What comes before the last message: equal prompts are on one side, whatever the response."""
    return messages[:-1] if isinstance(messages, list) else hash_key(messages)


def load(
    path: str, config: str | None, split: str, option: str = "task.path"
) -> list[dict[str, Any]]:
    """The rows of a split. Raises UserError of one line, whatever is missing or broken.

    option: the one that names the path, for error messages.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "this task reads its rows with datasets: pip install 'rlkl[tasks]'"
        ) from error
    file = Path(path)
    is_local = file.suffix in KINDS or path.startswith(("/", "."))
    if is_local and not file.exists():
        raise UserError(f"{option}={path!r}: no such file or folder")
    if file.is_file() and file.suffix not in KINDS:
        raise UserError(f"{option}={path!r}: a file must be one of {', '.join(KINDS)}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it again
    try:
        rows = read_rows(file, path, config, split)
    except Exception as error:  # the hub, the disk, a parser: each fails in its own way
        cause = error.__cause__ or error  # some errors only say "an error occurred"
        subset = f" ({config})" if config else ""
        raise UserError(
            f"{option}={path!r}{subset}: split {split!r} cannot be read: {first_line(cause)}"
        ) from error
    if not rows:
        raise UserError(f"{option}={path!r}: split {split!r} holds no rows")
    return rows


def read_rows(file: Path, path: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a split, read by the `datasets` library."""
    import datasets

    if file.is_dir() and is_single_table(file):
        return datasets.Dataset.load_from_disk(path).to_list()
    if not file.exists():
        return datasets.load_dataset(path, config, split=split).to_list()
    # The library caches a copy of what it reads, which is not worth keeping for local files.
    with tempfile.TemporaryDirectory() as cache:
        if file.is_file():
            files = {split: str(file)}
            rows = datasets.load_dataset(
                KINDS[file.suffix], data_files=files, split=split, cache_dir=cache
            )
        else:
            rows = datasets.load_dataset(path, split=split, cache_dir=cache)
        return rows.to_list()


def require_columns(
    rows: list[dict[str, Any]], columns: Iterable[str], path: str, option: str = "task.path"
) -> None:
    """Raise UserError if a column is missing, naming those that are there.

    option: the one that names the path.
    """
    if missing := [c for c in columns if c not in rows[0]]:
        raise UserError(f"{option}={path!r}: no column {missing[0]!r}; it has {', '.join(rows[0])}")
