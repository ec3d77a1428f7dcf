"""A language model of 10,000 random weights, and runs of train.py on it that last a second.

A helper, not a test. PYTEST_DONT_REWRITE: the tests import it and name it in pytest_plugins, and
it has no assertion that is worth rewriting.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # train.py is a script, not a part of the package

import train  # noqa: E402
from rlkl.errors import exit_code  # noqa: E402
from rlkl.supervised.scratch import character_tokenizer, write  # noqa: E402

SMALL = (
    "task.digits=1",
    "sampling.prompts=4",
    "sampling.group_size=4",
    "sampling.max_new_tokens=6",
    "optim.steps=6",
    "optim.lr=1e-2",
    "optim.warmup=0",
    "eval.prompts=5",
    "eval.samples=2",
    "eval.every=2",
    "kl_ref.coef=0.05",
)
PPO = (  # everything that carries state from step to step, and a task whose accuracy is not 0
    "task=reward.py:Digits",
    "advantage=gae",
    "loss=clip",
    "critic.kind=head",
    "optim.epochs=2",
    "optim.minibatch=8",
    "kl_ref.coef=0.1",
    "kl_ref.target=0.5",
    "kl_ref.horizon=50",
    "kl_old.coef=0.5",
    "kl_old.target=1e-3",
)
REWARD = '''"""Random weights hardly ever add correctly, so digits are rewarded instead."""
import torch

from rlkl.types import Example


def digits(examples, responses, batch):
    return torch.tensor([sum(c.isdigit() for c in response) / 6 for response in responses]), {}


class Digits:
    def __init__(self, split):
        self.prompts = [f"{i}:" for i in range(40)][:: 1 if split == "train" else -1]

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Example(self.prompts[index])

    def score(self, example, response):
        return float(any(c.isdigit() for c in response))
'''


def make_base(folder: Path) -> Path:
    """A Hugging Face directory of an untrained model.

    Its logits are pushed towards digits and EOS, so that its responses have different lengths.
    """
    tokenizer = character_tokenizer()
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,  # far from uniform, and not blind to the context
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(architecture).eval()
    with torch.no_grad():
        ids = torch.tensor([tokenizer("0123456789+=").input_ids])
        mean = lm.base_model(ids).last_hidden_state.mean((0, 1))
        likely = torch.tensor([tokenizer.eos_token_id, *tokenizer("0123456789").input_ids])
        lm.lm_head.weight[likely] += 9 * mean / mean.square().sum()
    return write(folder, lm, tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of the untrained model."""
    return make_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with nothing but reward.py and prompts.jsonl in it."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def furnish(folder: Path) -> None:
    """Write reward.py, and prompts.jsonl with prompts of different lengths."""
    (folder / "reward.py").write_text(REWARD)
    prompts = ["1234567890+"[: 1 + i % 11] + f"{i}=" for i in range(40)]
    lines = [json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))


# ------------------------------------------------------------------ runs


def arguments(base: Path, *overrides: str) -> list[str]:
    """The arguments of a small run of train.py."""
    return [*SMALL, f"model.name={base}", "reward=reward.py:digits", *overrides]


def run(base: Path, *overrides: str) -> Path:
    """Run train.py in the working directory; returns the run folder. Raises where the run fails."""
    train.main(arguments(base, *overrides))
    folders = [x.removeprefix("run=") for x in overrides if x.startswith("run=")]
    return Path(folders[-1])


def resume(folder: Path, *overrides: str) -> Path:
    """`train.py resume=FOLDER` alone: everything else is in the folder."""
    train.main([f"resume={folder}", *overrides])
    return folder


def train_error(capsys, *argv: str) -> str:
    """The error of a run of train.py: the only line on stderr. The exit code is 2."""
    capsys.readouterr()
    assert exit_code(train.main, list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    return lines[0]


# ------------------------------------------------------------------ their folders


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    """A row of metrics without clocks and memory."""
    measured = ("seconds", "tokens_per_second", "peak_memory_gb")
    return {name: x for name, x in row.items() if not name.startswith(measured)}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: any bit of metrics, responses, last checkpoint."""
    found = metric_differences(rows(one), rows(other))
    if file_text(one / "responses.jsonl") != file_text(other / "responses.jsonl"):
        found.append("responses.jsonl")
    last = [max((folder / "checkpoints").glob("step-*")) for folder in (one, other)]
    files = [sorted(f.name for f in folder.iterdir()) for folder in last]
    if last[0].name != last[1].name or files[0] != files[1]:
        return [*found, f"{last[0].name} with {files[0]} and {last[1].name} with {files[1]}"]
    for name in files[0]:
        if name.endswith(".pt"):  # a zip archive: equal tensors may have different bytes
            a, b = (torch.load(folder / name, weights_only=True) for folder in last)
            found += [f"{name}: {key}" for key in sorted(unequal(a, b))]
        elif (last[0] / name).read_bytes() != (last[1] / name).read_bytes():
            found.append(name)
    return found


def file_text(path: Path) -> str | None:
    """The text of a file; None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def metric_differences(one: list[dict], other: list[dict]) -> list[str]:
    found = []
    steps = [[row["step"] for row in run] for run in (one, other)]
    if steps[0] != steps[1]:
        found.append(f"steps {steps[0]} and {steps[1]}")
    for row_a, row_b in zip(one, other, strict=False):
        a, b = timeless(row_a), timeless(row_b)
        for name in {*a, *b}:
            if a.get(name) != b.get(name):
                found.append(f"step {a['step']} {name}: {a.get(name)} and {b.get(name)}")
    return found


def unequal(a: object, b: object, path: str = "") -> set[str]:
    """The places where two nested containers of tensors differ in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return set() if a.dtype == b.dtype and torch.equal(a, b) else {path}
    if type(a) is not type(b) or (isinstance(a, dict | list) and len(a) != len(b)):
        return {path}
    if isinstance(a, dict):
        return set().union(*(unequal(a[k], b.get(k), f"{path}.{k}") for k in a))
    if isinstance(a, list):
        pairs = enumerate(zip(a, b, strict=True))
        return set().union(*(unequal(x, y, f"{path}.{i}") for i, (x, y) in pairs))
    return set() if a == b else {path}
