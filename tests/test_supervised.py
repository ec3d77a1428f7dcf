"""The supervised loop: its gradient depends on the rows alone, its denominator on the whole update, and it learns."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import tiny_policy
from runs_fixture import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl import cli, config
from rlkl.build import TABLES
from rlkl.errors import UserError
from rlkl.preferences import dpo
from rlkl.schema_supervised import Dpo, Fit, Label, RewardModel, Sft, Supervised
from rlkl.supervised import (
    Item,
    accumulate,
    collate,
    cross_entropy,
    fit,
    item_of,
    microbatches,
    one,
    reply_tokens,
    that_fit,
    updates,
)
from rlkl.tiny import character_tokenizer

pytest_plugins = ("runs_fixture",)
TOKENIZER = character_tokenizer()
SCHEMAS = {"sft": Sft, "reward-model": RewardModel, "dpo": Dpo, "label": Label}


def items(count=9, replies=1, seed=0) -> list[Item]:
    """Ragged on both sides."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(4, 90, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return [Item(ids(1, 6), tuple(ids(1, 7) for _ in range(replies))) for _ in range(count)]


def run(capsys, *argv) -> str:
    """A command that must work; what it printed."""
    capsys.readouterr()
    code = cli.main(list(argv))
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# From text to batches
def test_a_finished_reply_ends_with_the_eos_as_an_action_and_a_truncated_one_does_not():
    item = item_of(TOKENIZER, "ab", ["cd", "e"], [False, True])
    batch = collate([item], TOKENIZER.pad_token_id)
    assert batch.replies() == [[*TOKENIZER("cd").input_ids, TOKENIZER.eos_token_id], TOKENIZER("e").input_ids]


def test_a_batch_is_padded_on_the_left_of_prompts_and_on_the_right_of_replies():
    batch = collate([Item([5], ([6, 7], [8])), Item([9, 10, 11], ([12], [13, 14, 15]))], pad_id=0)
    assert batch.prompt_ids.tolist() == [[0, 0, 5], [0, 0, 5], [9, 10, 11], [9, 10, 11]]
    assert batch.prompt_mask.tolist() == [[False, False, True]] * 2 + [[True] * 3] * 2
    assert batch.response_ids.tolist() == [[6, 7, 0], [8, 0, 0], [12, 0, 0], [13, 14, 15]]
    assert batch.mask.sum(1).tolist() == [2, 1, 1, 3]


@pytest.mark.parametrize("budget", [1, 13, 40, 10**6])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    rows = items(30, replies=2)
    cut = list(microbatches(rows, budget))
    assert sorted(map(id, (i for some in cut for i in some))) == sorted(map(id, rows))
    for some in cut:
        assert len(some) == 1 or len(some) * 2 * max(i.width for i in some) <= budget


def test_every_epoch_sees_each_row_once_in_an_order_of_its_own():
    rows = items(10)
    seen = list(updates(rows, Fit(epochs=2, batch=4), seed=0))
    assert [len(r) for r, _ in seen] == [4, 4, 2] * 2
    assert [last for _, last in seen] == [False, False, True] * 2
    first, second = ([id(i) for r, _ in part for i in r] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == sorted(map(id, rows))
    assert first != second
    assert [id(i) for r, _ in updates(rows, Fit(epochs=2, batch=4), seed=0) for i in r] == first + second
    assert [id(i) for r, _ in updates(rows, Fit(epochs=2, batch=4), seed=1) for i in r] != first + second


def test_rows_that_do_not_fit_are_dropped_and_counted_and_none_left_is_an_error(capsys):
    rows = [Item([1], ([2] * n,)) for n in (1, 5, 9, 0)]
    assert that_fit(rows, 6, "rows") == rows[:2]
    assert "2 of 4 rows have no tokens, or more than 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="none is left: raise max_tokens"):
        that_fit(rows, 1, "rows")


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        item_of(TOKENIZER, "", ["a"])


# The gradient
def objectives(policy, reference):
    def say(some):
        return cross_entropy(policy.evaluate(collate(some, 0)).logprobs)

    def prefer(some):
        batch = collate(some, 0)
        with torch.no_grad():
            ref = reference.evaluate(batch).logprobs
        return dpo(policy.evaluate(batch).logprobs, ref, 0.5)

    return {"sft": (say, 1, reply_tokens), "dpo": (prefer, 2, one)}


@pytest.mark.parametrize("which", ["sft", "dpo"])
def test_the_gradient_and_every_measure_do_not_depend_on_how_an_update_is_cut(which):
    policy, reference = tiny_policy("llama", torch.float64), tiny_policy("llama", torch.float64, seed=1)
    objective, replies, units = objectives(policy, reference)[which]
    rows, found = items(11, replies), []
    for order, budget in ((rows, 10**6), (rows[::-1], 1), (rows, 40)):
        policy.zero_grad()
        measured = accumulate(order, objective, budget, units)
        found.append((measured, [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert max(g.abs().max() for g in found[0][1]) > 1e-3
    for measured, gradient in found[1:]:
        assert measured == pytest.approx(found[0][0], abs=1e-12)
        for a, b in zip(gradient, found[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_loss_is_the_mean_over_reply_tokens_of_the_models_own_cross_entropy():
    """Of the replies alone: no token of a prompt is trained on; and of tokens, not of rows."""
    policy, rows = tiny_policy("gpt2", torch.float64), items(5)
    nats = []
    for item in rows:
        ids = torch.tensor([item.prompt + item.replies[0]])
        logp = policy.lm(ids).logits[..., : policy.vocab_size].log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        nats += (-logp[len(item.prompt) - 1 :, 0]).tolist()
    objective, _, units = objectives(policy, policy)["sft"]
    with torch.no_grad():
        found = accumulate(rows, objective, 50, units)["loss"]
    assert found == pytest.approx(sum(nats) / len(nats), abs=1e-9)


class Rows(list):
    """Stands for a RunLog."""

    def write(self, row, sample):
        self.append(row)


def test_the_loop_learns_measures_each_epoch_and_logs_every_update():
    policy, rows, log = tiny_policy("llama"), items(12), Rows()
    objective, _, units = objectives(policy, policy)["sft"]
    cfg = Supervised(optim=Fit(epochs=8, batch=5, lr=1e-2, warmup=0, schedule="constant"))
    before, after = fit(cfg, policy, objective, rows, rows, log, units)
    assert after["loss"] < 0.6 * before["loss"]
    assert [r["step"] for r in log] == list(range(1, 25))
    assert [r["step"] for r in log if "heldout/loss" in r] == list(range(3, 25, 3))
    assert [r["rows"] for r in log[:3]] == [5, 5, 2]
    assert log[-1]["heldout/loss"] == after["loss"]


def test_a_loss_that_is_never_finite_moves_nothing_and_gives_up(monkeypatch):
    policy = tiny_policy("llama")
    start = [p.clone() for p in policy.parameters()]
    cfg = Supervised(optim=Fit(epochs=9, batch=2))
    with pytest.raises(UserError, match=r"not finite.*optim\.lr"):
        fit(cfg, policy, lambda some: (policy.evaluate(collate(some, 0)).logprobs.sum(1) * math.nan, {}), items(4),
            items(4), Rows())
    assert all(torch.equal(a, b) for a, b in zip(start, policy.parameters(), strict=True))


# The commands
@pytest.mark.parametrize("command", SCHEMAS)
def test_help_lists_every_option_with_one_line(command, capsys, monkeypatch):
    from rlkl import terminal

    monkeypatch.setattr(terminal.console, "width", 400)
    out = run(capsys, command, "--help")
    assert f"usage: rlkl {command} " in out
    rows = config.options(TABLES, SCHEMAS[command])
    assert {"seed", "model.name"} <= {row[0] for row in rows}
    assert all(row[3] and row[0] in out for row in rows)


def questions(path: Path, count=60) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "ok"}) + "\n" for i in range(count)))
    return str(path)


def test_sft_learns_a_file_and_leaves_an_ordinary_model_a_log_and_what_was_run(here, base, capsys):
    path = questions(here / "q.jsonl")
    out = run(capsys, "sft", "task=jsonl", f"task.path={path}", f"model.name={base}", "run=out", "optim.epochs=6",
              "optim.batch=8", "optim.lr=1e-2", "optim.warmup=0")
    assert "model: out/model" in out
    lm, tokenizer = (kind.from_pretrained("out/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    said = lm.generate(**tokenizer("999?", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0]
    assert tokenizer.decode(said, skip_special_tokens=True) == "999?ok"
    assert said[-1] == tokenizer.eos_token_id
    log = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["heldout/loss"] < 0.05
    assert json.loads(Path("out/provenance.json").read_text())["command"].startswith("rlkl sft task=jsonl")
    assert config.load(["out/config.yaml"], schema=Sft).optim.batch == 8
    assert "run=out" in refused(capsys, "sft", "task=jsonl", f"task.path={path}", f"model.name={base}", "run=out")


def test_sft_of_a_fresh_model_starts_at_chance_and_is_the_same_twice(here, capsys):
    options = ["sft", "task=reviews", "task.size=64", "scratch.layers=1", "scratch.hidden=16", "scratch.context=64",
               "optim.batch=32"]
    for name in ("one", "two"):
        run(capsys, *options, f"run={name}")
    one, two = (Path(f"{n}/model/model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    first = json.loads(Path("one/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(len(TOKENIZER)), abs=0.1)


@pytest.mark.parametrize(("mistake", "words"), [
    ("sft optim.lrr=1", ["unknown key optim.lrr", "lr, schedule"]),
    ("sft optim.lr=fast", ["optim.lr='fast'", "number"]),
    ("sft task=nope", ["task.name='nope'", "reviews"]), ("sft model.name=gone", ["model.name='gone'", "causal LM"]),
    ("sft scratch.layers=1 scratch.hidden=9", ["scratch", "multiple"]), ("sft gone.yaml", ["no such config file"]),
    ("dpo", ["data='pairs.jsonl': no such file"]), ("dpo data=bad.jsonl", ["bad.jsonl:1", "'rejected'"]),
    ("dpo heldout=1.5", ["heldout=1.5", "less than 1"]), ("reward-model sampling=1", ["unknown key sampling", "data"]),
    ("reward-model data=ok.jsonl model.name=gone", ["model.name='gone'", "sequence classification"]),
    ("label sampling.samples=1", ["sampling.samples=1", "2 replies"]),
    ("label out=bad.jsonl", ["out=bad.jsonl", "exists"]),
    ("label reward=nope", ["reward.name='nope'", "reward_model"]), ("label reward=judge", ["judge needs reward.path"]),
    ("label replies=bad.jsonl model.name=BASE", ["bad.jsonl:1", "replies: a list"])])
def test_a_mistake_is_one_line_and_leaves_no_folder(here, base, capsys, mistake, words):
    (here / "bad.jsonl").write_text('{"prompt": "p", "chosen": "c"}\n')
    (here / "ok.jsonl").write_text("".join(
        json.dumps({"prompt": str(i), "chosen": "c", "rejected": "r"}) + "\n" for i in range(50)))
    message = refused(capsys, *mistake.replace("BASE", str(base)).split())
    assert [w for w in words if w not in message] == [], message
    assert not (here / "runs").exists()


def test_the_configs_of_the_commands_are_valid_and_say_which_command_reads_them():
    found = 0
    for path in (ROOT / "configs").glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        if first.startswith("# rlkl "):
            config.load([str(path)], schema=SCHEMAS[first.split()[2].rstrip(":")])
            found += 1
    assert found >= 4
