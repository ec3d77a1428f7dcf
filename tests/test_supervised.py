"""Supervised learning: rows to batches, the gradient of one update, the loop, and the commands."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from models import tiny_policy
from runs_fixture import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl import cli
from rlkl.errors import UserError
from rlkl.run import config, terminal
from rlkl.run.log import RunLog
from rlkl.supervised.data import (
    Item,
    collate,
    filter_by_length,
    microbatches,
    minibatches,
    tokenize,
)
from rlkl.supervised.fit import (
    accumulate_gradient,
    count_items,
    count_response_tokens,
    cross_entropy,
    evaluate,
    fit,
)
from rlkl.supervised.preferences import dpo
from rlkl.supervised.schema import (
    DPOConfig,
    LabelConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
    Training,
)
from rlkl.supervised.scratch import character_tokenizer

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()
SCHEMAS = {
    "sft": SFTConfig,
    "reward-model": RewardModelConfig,
    "dpo": DPOConfig,
    "label": LabelConfig,
}


def items(count=9, responses=1) -> list[Item]:
    """Prompts of 1 to 5 tokens with responses of 1 to 6 tokens, all random."""
    rng = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=rng))
        return torch.randint(4, 90, (length,), generator=rng).tolist()

    return [Item(ids(1, 6), tuple(ids(1, 7) for _ in range(responses))) for _ in range(count)]


def run(capsys, *argv) -> str:
    """What a command prints. It must succeed."""
    capsys.readouterr()
    code = cli.main(list(argv))
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def error_of(capsys, *argv) -> str:
    """The one line that a command prints when it refuses its options."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# ------------------------------------------------------------------ rows and batches


def test_a_finished_response_ends_with_the_eos_and_a_truncated_one_does_not():
    item = tokenize(TOKENIZER, "ab", ["cd", "e"], [False, True])
    batch = collate([item], TOKENIZER.pad_token_id)
    finished = [*TOKENIZER("cd").input_ids, TOKENIZER.eos_token_id]
    assert batch.responses() == [finished, TOKENIZER("e").input_ids]


def test_a_batch_is_padded_on_the_left_of_prompts_and_on_the_right_of_responses():
    batch = collate([Item([5], ([6, 7], [8])), Item([9, 10, 11], ([12], [13, 14, 15]))], pad_id=0)
    assert batch.prompt_ids.tolist() == [[0, 0, 5], [0, 0, 5], [9, 10, 11], [9, 10, 11]]
    assert batch.prompt_mask.tolist() == [[False, False, True]] * 2 + [[True] * 3] * 2
    assert batch.response_ids.tolist() == [[6, 7, 0], [8, 0, 0], [12, 0, 0], [13, 14, 15]]
    lengths = torch.tensor([2, 1, 1, 3])
    assert torch.equal(batch.mask, torch.arange(3) < lengths[:, None])
    assert not batch.truncated.any()


def test_micro_batches_hold_every_item_once_and_keep_to_the_budget():
    rows = items(30, responses=2)
    for max_tokens in (1, 13, 40, 10**6):
        batches = list(microbatches(rows, max_tokens))
        assert sorted(id(item) for batch in batches for item in batch) == sorted(map(id, rows))
        for batch in batches:
            padded = len(batch) * 2 * max(item.width for item in batch)
            assert len(batch) == 1 or padded <= max_tokens


def test_every_epoch_takes_each_item_once_in_an_order_of_its_own():
    rows = items(10)

    def order(seed):
        updates = list(minibatches(rows, epochs=2, size=4, seed=seed))
        assert [len(batch) for batch, _ in updates] == [4, 4, 2] * 2
        assert [ends_epoch for _, ends_epoch in updates] == [False, False, True] * 2
        return [id(item) for batch, _ in updates for item in batch]

    first, second = order(seed=0)[:10], order(seed=0)[10:]
    assert sorted(first) == sorted(second) == sorted(map(id, rows))
    assert first != second
    assert order(seed=0) == first + second
    assert order(seed=1) != first + second


def test_items_that_are_empty_or_too_long_are_dropped_with_a_note(capsys):
    rows = [Item([1], ([2] * length,)) for length in (1, 5, 9, 0)]
    assert filter_by_length(rows, 6, "rows") == rows[:2]
    without = "of 4 rows have a response without tokens"
    assert f"2 {without}, or more than 6 tokens\n" in capsys.readouterr().out
    assert filter_by_length(rows, None, "rows") == rows[:3]
    assert f"1 {without}\n" in capsys.readouterr().out
    assert filter_by_length(rows[:3], None, "rows") == rows[:3]
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="there are no pairs"):
        filter_by_length([], None, "pairs")
    with pytest.raises(UserError, match="none is left: raise max_tokens"):
        filter_by_length(rows, 1, "rows")


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        tokenize(TOKENIZER, "", ["a"])


# ------------------------------------------------------------------ the gradient of one update


def sft_objective(policy):
    return lambda batch: cross_entropy(policy(collate(batch, 0)).logprobs)


def dpo_objective(policy, reference):
    def objective(items):
        batch = collate(items, 0)
        with torch.no_grad():
            ref_logprobs = reference(batch).logprobs
        return dpo(policy(batch).logprobs, ref_logprobs, 0.5)

    return objective


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_gradient_and_metrics_do_not_depend_on_how_an_update_is_cut(command):
    policy = tiny_policy("llama", torch.float64)
    if command == "sft":
        objective, rows, count = sft_objective(policy), items(11), count_response_tokens
    else:
        reference = tiny_policy("llama", torch.float64, seed=1)
        objective, rows, count = dpo_objective(policy, reference), items(11, 2), count_items

    def gradient_of(rows, max_tokens):
        policy.zero_grad()
        metrics = accumulate_gradient(rows, objective, max_tokens, count)
        return metrics, [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    metrics, gradient = gradient_of(rows, 10**6)
    assert max(g.abs().max() for g in gradient) > 1e-3
    assert evaluate(rows, objective, 40, count) == pytest.approx(metrics, abs=1e-12)
    for other_rows, max_tokens in ((rows[::-1], 1), (rows, 40)):
        other_metrics, other_gradient = gradient_of(other_rows, max_tokens)
        assert other_metrics == pytest.approx(metrics, abs=1e-12)
        for a, b in zip(other_gradient, gradient, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_sft_loss_is_the_models_own_cross_entropy_averaged_over_response_tokens():
    """Prompt tokens are not trained on, and tokens count the same, not rows."""
    policy, rows = tiny_policy("gpt2", torch.float64), items(5)
    nats = []
    for item in rows:
        ids = torch.tensor([item.prompt + item.responses[0]])
        logprobs = policy.lm(ids).logits[0, :-1, : policy.vocab_size].log_softmax(-1)
        of_tokens = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
        nats += (-of_tokens[len(item.prompt) - 1 :]).tolist()
    loss = evaluate(rows, sft_objective(policy), 50, count_response_tokens)["loss"]
    assert loss == pytest.approx(sum(nats) / len(nats), abs=1e-9)


# ------------------------------------------------------------------ the loop


class ListLog(list):
    """Stands for a RunLog: keeps the rows."""

    def write(self, row, sample):
        self.append(row)


def test_the_loop_learns_evaluates_after_each_epoch_and_logs_every_update():
    policy, rows, log = tiny_policy("llama"), items(12), ListLog()
    optim = Training(epochs=8, batch=5, lr=1e-2, warmup=0, schedule="constant")
    cfg = SupervisedConfig(optim=optim)
    before, after = fit(cfg, policy, sft_objective(policy), rows, rows, log, count_response_tokens)
    assert after["loss"] < 0.6 * before["loss"]
    assert [row["step"] for row in log] == list(range(1, 25))
    assert [row["step"] for row in log if "eval/loss" in row] == list(range(3, 25, 3))
    assert [row["rows"] for row in log[:3]] == [5, 5, 2]
    assert {row["lr"] for row in log} == {1e-2}
    assert log[-1]["eval/loss"] == after["loss"]


def test_a_loss_that_is_never_finite_changes_no_weight_and_ends_the_run():
    policy = tiny_policy("llama")
    start = [p.clone() for p in policy.parameters()]
    cfg = SupervisedConfig(optim=Training(epochs=9, batch=2))

    def objective(batch):
        return policy(collate(batch, 0)).logprobs.sum(1) * math.nan, {}

    with pytest.raises(UserError, match=r"not finite.*optim\.lr"):
        fit(cfg, policy, objective, items(4), items(4), ListLog())
    assert all(torch.equal(a, b) for a, b in zip(start, policy.parameters(), strict=True))


# ------------------------------------------------------------------ the commands


def test_help_lists_every_option_of_a_command_with_its_description(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 400)
    for command, schema in SCHEMAS.items():
        out = run(capsys, command, "--help")
        assert f"usage: rlkl {command} " in out
        options = config.options(schema)
        assert {"seed", "model.name"} <= {name for name, *_ in options}
        for name, _, _, description in options:
            assert description, name
            assert name in out


def questions(path: Path, count=60) -> str:
    """A file in which every answer is ok."""
    rows = [{"prompt": f"{i}?", "answer": "ok"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sft_learns_a_file_and_leaves_an_ordinary_model_a_log_and_what_was_run(here, base, capsys):
    path = questions(here / "q.jsonl")
    argv = ["sft", "task=jsonl", f"task.path={path}", f"model.name={base}", "run=out"]
    optim = ["optim.epochs=6", "optim.batch=8", "optim.lr=1e-2", "optim.warmup=0"]
    assert "model: out/model" in run(capsys, *argv, *optim)
    lm = AutoModelForCausalLM.from_pretrained("out/model")
    tokenizer = AutoTokenizer.from_pretrained("out/model")
    prompt = tokenizer("999?", return_tensors="pt")
    ids = lm.generate(**prompt, max_new_tokens=5, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "999?ok"
    assert ids[-1] == tokenizer.eos_token_id
    log = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["eval/loss"] < 0.05
    provenance = json.loads(Path("out/provenance.json").read_text())
    assert provenance["command"].startswith("rlkl sft task=jsonl")
    assert config.load(["out/config.yaml"], schema=SFTConfig).optim.batch == 8
    assert "run=out" in error_of(capsys, *argv)


@pytest.mark.parametrize("command", ["sft", "reward-model", "dpo"])
def test_a_held_out_side_too_small_to_mean_much_is_noted(here, base, capsys, command):
    """The standard error of an accuracy on N rows is at most 0.5 / sqrt(N)."""
    data = ["data=rows.jsonl", "heldout=0.5"]
    if command == "sft":
        data = ["task=jsonl", "task.path=rows.jsonl", "task.heldout=0.5"]
    row = {"answer": "ok", "chosen": "ok", "rejected": "no"}
    for number, count in enumerate((30, 120)):
        rows = [row | {"prompt": f"question {i}?"} for i in range(count)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = run(capsys, command, *data, f"model.name={base}", f"run=out{number}")
        heldout = int(re.search(r"(\d+) held out", out)[1])
        notes = [line for line in out.splitlines() if line.startswith("note: held-out")]
        assert (heldout < 30) == (number == 0)
        assert len(notes) == (number == 0)
        for line in notes:
            assert f"only {heldout}," in line
            assert f"up to {0.5 / math.sqrt(heldout):.2f};" in line


def test_sft_of_a_fresh_model_starts_at_chance_and_is_the_same_twice(here, capsys, monkeypatch):
    scratch = ["scratch.layers=1", "scratch.hidden=16", "scratch.context=64"]
    argv = ["sft", "task=reviews", "task.size=64", "optim.batch=32", *scratch]
    closed, close = [], RunLog.close
    monkeypatch.setattr(RunLog, "close", lambda log: closed.append(close(log)))
    run(capsys, *argv, "run=one")
    assert closed == [None], "W&B is told that the run has ended"
    run(capsys, *argv, "run=two")
    first, second = (Path(f"{name}/model/model.safetensors") for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    row = json.loads(Path("one/metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(math.log(len(TOKENIZER)), abs=0.1)


MISTAKES = [  # arguments, and what the message must say
    ("sft optim.lrr=1", ["unknown key optim.lrr", "lr, schedule"]),
    ("sft optim.lr=fast", ["optim.lr='fast'", "number"]),
    ("sft task=nope", ["task.name='nope'", "reviews"]),
    ("sft model.name=gone", ["model.name='gone'", "causal LM"]),
    ("sft scratch.layers=1 scratch.hidden=9", ["scratch", "multiple"]),
    ("sft gone.yaml", ["no such config file"]),
    ("dpo", ["data='pairs.jsonl': no such file"]),
    ("dpo data=bad.jsonl", ["bad.jsonl:1", "'rejected'"]),
    ("dpo heldout=1.5", ["heldout=1.5", "less than 1"]),
    ("reward-model sampling=1", ["unknown key sampling", "data"]),
    ("reward-model data=ok.jsonl model.name=gone", ["model.name='gone'", "sequence classif"]),
    ("label sampling.samples=1", ["sampling.samples=1", "2 responses"]),
    ("label out=bad.jsonl", ["out=bad.jsonl", "exists"]),
    ("label reward=nope", ["reward.name='nope'", "reward_model"]),
    ("label reward=judge", ["judge needs reward.path"]),
    ("label responses=bad.jsonl model.name=BASE", ["bad.jsonl:1", "responses: a list"]),
    ("label responses=one.jsonl model.name=BASE", ["one.jsonl:1", "two texts or more"]),
    ("label replies=one.jsonl", ["unknown key replies", "responses"]),
]


def test_a_mistake_is_reported_in_one_line_and_leaves_no_folder(here, base, capsys):
    (here / "bad.jsonl").write_text('{"prompt": "p", "chosen": "c"}\n')
    (here / "one.jsonl").write_text('{"prompt": "p", "responses": ["r"]}\n')
    pairs = [{"prompt": str(i), "chosen": "c", "rejected": "r"} for i in range(50)]
    (here / "ok.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for arguments, words in MISTAKES:
        message = error_of(capsys, *arguments.replace("BASE", str(base)).split())
        assert [w for w in words if w not in message] == [], message
        assert not (here / "runs").exists(), arguments


def test_every_config_of_a_command_is_valid_for_it():
    commands = []
    for path in (ROOT / "configs").glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        if first.startswith("# rlkl "):
            command = first.split()[2].rstrip(":")
            config.load([str(path)], schema=SCHEMAS[command])
            commands.append(command)
    assert set(commands) == set(SCHEMAS)
