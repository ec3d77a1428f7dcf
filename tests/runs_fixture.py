"""A language model of 10 000 random weights, and runs of train.py on it that last a second. A helper, not a test.

PYTEST_DONT_REWRITE (the tests import it and name it in pytest_plugins; it asserts nothing worth rewriting).
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # train.py is a script, not a part of the package

import train  # noqa: E402
from rlkl.scratch import character_tokenizer, write  # noqa: E402

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
    "loss=ppo",
    "model.critic=head",
    "optim.epochs=2",
    "optim.minibatch=8",
    "kl_ref.coef=0.1",
    "kl_ref.target=0.5",
    "kl_ref.horizon=50",
    "kl_old.coef=0.5",
    "kl_old.target=1e-3",
)
REWARD = '''"""Random weights hardly ever add right, and equal rewards teach nothing: digits are paid for."""
import torch

from rlkl.types import Example


def digits(examples, replies, batch):
    return torch.tensor([sum(c.isdigit() for c in reply) / 6 for reply in replies]), {}


class Digits:
    def __init__(self, split):
        self.prompts = [f"{i}:" for i in range(40)][:: 1 if split == "train" else -1]

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Example(self.prompts[index])

    def score(self, example, reply):
        return float(any(c.isdigit() for c in reply))
'''


def make_base(folder: Path) -> Path:
    """A Hugging Face directory of an untrained model, pushed towards digits and EOS so that its replies are ragged."""
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(
            LlamaConfig(
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
        ).eval()
    with torch.no_grad():
        mean = lm.base_model(torch.tensor([tokenizer("0123456789+=").input_ids])).last_hidden_state.mean((0, 1))
        likely = torch.tensor([tokenizer.eos_token_id, *tokenizer("0123456789").input_ids])
        lm.lm_head.weight[likely] += 9 * mean / mean.square().sum()
    return write(folder, lm, tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with nothing but reward.py and prompts.jsonl in it."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def furnish(folder: Path) -> None:
    (folder / "reward.py").write_text(REWARD)
    prompts = [{"prompt": "1234567890+"[: 1 + i % 11] + f"{i}=", "answer": "1"} for i in range(40)]  # ragged
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def arguments(base: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"model.name={base}", "reward=reward.py:digits", *overrides]


def run(base: Path, *overrides: str) -> Path:
    """train.py in the working directory; returns the run folder. Fails where the run fails."""
    call(arguments(base, *overrides))
    return Path(next(o for o in reversed(overrides) if o.startswith("run=")).removeprefix("run="))


def resume(folder: Path, *overrides: str) -> Path:
    """`train.py resume=FOLDER` alone: everything else is in the folder."""
    call([f"resume={folder}", *overrides])
    return folder


def call(argv: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = train.main(argv)
    assert code == 0, said.getvalue()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    """A row of metrics without clocks and memory."""
    clocks = {name for name in row if name.startswith("seconds")} | {"tokens_per_second", "peak_memory_gb"}
    return {name: x for name, x in row.items() if name not in clocks}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, bit for bit: metrics, and everything in the last checkpoint."""
    found = []
    if [row["step"] for row in rows(one)] != [row["step"] for row in rows(other)]:
        found.append(f"steps {[r['step'] for r in rows(one)]} and {[r['step'] for r in rows(other)]}")
    for a, b in zip(rows(one), rows(other), strict=False):
        a, b = timeless(a), timeless(b)
        found += [f"step {a['step']} {k}: {a.get(k)} and {b.get(k)}" for k in {*a, *b} if a.get(k) != b.get(k)]
    last = [max((folder / "checkpoints").glob("step-*")) for folder in (one, other)]
    files = [sorted(f.name for f in folder.iterdir()) for folder in last]
    if last[0].name != last[1].name or files[0] != files[1]:
        return [*found, f"{last[0].name} with {files[0]} and {last[1].name} with {files[1]}"]
    for name in files[0]:
        if name.endswith(".pt"):  # a zip archive: its bytes may differ where its tensors do not
            a, b = (torch.load(folder / name, weights_only=True) for folder in last)
            found += [f"{name}: {key}" for key in sorted(unequal(a, b))]
        elif (last[0] / name).read_bytes() != (last[1] / name).read_bytes():
            found.append(name)
    return found


def unequal(a: object, b: object, path: str = "") -> set[str]:
    """The places where two nested containers of tensors are not the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return set() if a.dtype == b.dtype and torch.equal(a, b) else {path}
    if type(a) is not type(b) or (isinstance(a, dict | list) and len(a) != len(b)):
        return {path}
    if isinstance(a, dict):
        return set().union(*(unequal(a[k], b.get(k), f"{path}.{k}") for k in a))
    if isinstance(a, list):
        return set().union(*(unequal(x, y, f"{path}.{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))))
    return set() if a == b else {path}
