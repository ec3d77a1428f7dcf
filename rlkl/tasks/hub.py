"""Rows from the `datasets` library: a hub name, or a local folder or file of parquet, jsonl or csv."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlkl.errors import UserError, first_line
from rlkl.tasks.jsonl import Jsonl, bucket
from rlkl.tasks.listed import Listed
from rlkl.types import Example

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


class Hub(Listed):
    """Any dataset: `prompt` and `answer` name its columns, the others go to Example.info.

    `heldout_split` names the split that is held out; without it, as for a single file, about `heldout` of the rows are,
    by a hash of the prompt. A prompt that is text becomes what a user says (`chat`), or stays as it is.
    """

    def __init__(self, split: str, *, path: str, config: str | None = None, prompt: str = "prompt",
                 answer: str = "answer", chat: bool = False, train_split: str = "train",
                 heldout_split: str | None = None, heldout: float = 0.1) -> None:
        rows = side(split, path, config, (train_split, heldout_split), heldout, key=prompt)
        require(rows, (prompt, answer), path)
        self.examples = []
        for row in rows:
            asked, wanted = row.pop(prompt), row.pop(answer)
            if not isinstance(asked, str | list) or not asked or not isinstance(wanted, str | int | float):
                raise UserError(f"task.path={path!r}: {prompt} must be text or chat messages, and {answer} text or a "
                                f"number; a row has {str(asked)[:60]!r} and {str(wanted)[:60]!r}")
            asked = message(asked) if chat and isinstance(asked, str) else asked
            self.examples.append(Example(asked, str(wanted), row))

    score = Jsonl.score  # the reply is the answer, but for white space around it


def message(text: str) -> list[dict]:
    """What a user says, for the tokenizer's chat template."""
    return [{"role": "user", "content": text}]


def side(split: str, path: str, config: str | None, splits: tuple[str, str | None], heldout: float, key: str
         ) -> list[dict[str, Any]]:
    """The rows of one side: a split of its own for each, or one that is cut by a hash of the column `key`."""
    train_split, heldout_split = splits
    if heldout_split is not None and not one_table(Path(path)):
        return load(path, config, train_split if split == "train" else heldout_split)
    rows = load(path, config, train_split)
    require(rows, (key,), path)
    rows = [row for row in rows if (bucket(text_or_chat(row[key])) < heldout) == (split == "heldout")]
    if not rows:
        raise UserError(f"task.path={path!r}: no row falls on the {split} side with task.heldout={heldout}")
    return rows


def one_table(path: Path) -> bool:
    """Has it no splits: a file, or what a Dataset's save_to_disk left?"""
    return path.is_file() or (path / "state.json").is_file()


def text_or_chat(x: Any) -> str | list[dict]:
    return x if isinstance(x, str | list) else str(x)


def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of a split. UserError in one line, whatever is missing."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("this task reads its rows with datasets: pip install 'rlkl[tasks]'") from error
    file, here = Path(path), Path(path).exists()
    if (file.suffix in KINDS or path.startswith(("/", "."))) and not here:
        raise UserError(f"task.path={path!r}: no such file or folder")
    if file.is_file() and file.suffix not in KINDS:
        raise UserError(f"task.path={path!r}: a file must be one of {', '.join(KINDS)}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of a bad file comes again, in the error
    try:
        with tempfile.TemporaryDirectory() as scratch:  # the library copies what it reads: worth keeping of the hub's
            read = functools.partial(datasets.load_dataset, split=split, cache_dir=scratch if here else None)
            if file.is_dir() and one_table(file):
                rows = datasets.Dataset.load_from_disk(path).to_list()
            elif file.is_file():
                rows = read(KINDS[file.suffix], data_files={split: str(file)}).to_list()
            else:
                rows = read(path, None if here else config).to_list()
    except Exception as error:  # the hub, the disk, a parser: each fails in its own way
        why = error.__cause__ or error  # "an error occurred" is all that some of them say
        subset = f" ({config})" if config else ""
        raise UserError(f"task.path={path!r}{subset}: split {split!r} cannot be read: {first_line(why)}") from error
    if not rows:
        raise UserError(f"task.path={path!r}: split {split!r} holds no rows")
    return rows


def require(rows: list[dict[str, Any]], columns: Iterable[str], path: str) -> None:
    """UserError if a column is missing, with those that are there."""
    if missing := [c for c in columns if c not in rows[0]]:
        raise UserError(f"task.path={path!r}: no column {missing[0]!r}; it has {', '.join(rows[0])}")
