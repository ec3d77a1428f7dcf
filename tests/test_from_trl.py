"""rlkl explain --trl: what TRL's fields become here, and that it has TRL's own gradients."""

import itertools
from collections import defaultdict
from contextlib import suppress
from typing import Any

import pytest
import torch
import yaml
from golden.reading import EXACT, gradient, tensor
from golden.reading import TRL as NUMBERS
from runs_fixture import ROOT, train
from test_golden_trl import trl_batch
from transformers import get_scheduler

from rlkl import cli
from rlkl.errors import UserError
from rlkl.explain.from_trl import FIELDS, OVER_THE_ROLLOUT, translate
from rlkl.losses import token_weights
from rlkl.policy.optimizer import lr_scale
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.folder import flat
from rlkl.run.names import TRL_AROUND
from rlkl.run.schema import Config
from rlkl.run.state import State


def tree_of(fields: dict[str, Any]) -> dict:
    """TRL's fields as a tree of ours."""
    tree: dict = {}
    for key, value in translate(fields, "c.yaml").options.items():
        tree = config.merge(tree, config.nested(key, value))
    return tree


def cfg_of(fields: dict[str, Any]) -> Config:
    return config.build(config.merge(config.defaults(), tree_of(fields)))


def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        translate(fields, "c.yaml")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ------------------------------------------------------------------ every field


EXAMPLES = {  # a value that is not the default, and fields without which it would not matter
    "dtype": ("bfloat16", {}),
    "bf16": (False, {}),
    "gradient_checkpointing": (False, {}),
    "activation_checkpointing": (False, {}),
    "scale_rewards": ("batch", {}),
    "loss_type": ("grpo", {}),
    "importance_sampling_level": ("sequence", {}),
    "lr_scheduler_type": ("cosine", {}),
    "warmup_steps": (3, {}),
    "warmup_ratio": (0.1, {"max_steps": 100}),
    "optim": ("adafactor", {}),
    "num_generations": (4, {}),
    "generation_batch_size": (16, {}),
    "per_device_train_batch_size": (16, {"steps_per_generation": 4}),
    "gradient_accumulation_steps": (2, {"steps_per_generation": 4}),
    "use_bias_correction_kl": (False, {"beta": 0.1}),
    "reward_weights": ([2.0], {"reward_funcs": ["a.b"]}),
    "lora_dropout": (0.1, {}),
    "max_steps": (50, {}),
    "datasets": ([{"path": "d"}], {}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "dataset_test_split": ("validation", {"dataset_name": "d"}),
    **{name: (0.5, {"loss_type": "sapo"}) for name in FIELDS if name.startswith("sapo_")},
    **{name: (0.5, {"loss_type": "vespo"}) for name in FIELDS if name.startswith("vespo_")},
}
SWITCHES = {"dataset_name": "d", "deepspeed": "d", "fsdp": "full_shard", "beta": 0.1}


def example(name: str) -> tuple[Any, dict[str, Any]]:
    """A value of a field that is not its default, and the fields that make it matter."""
    switches = {}
    switch = FIELDS[name].only_with
    while switch:
        switches[switch] = SWITCHES.get(switch, True)
        switch = FIELDS[switch].only_with
    if name in EXAMPLES:
        value, others = EXAMPLES[name]
        return value, switches | others
    default = FIELDS[name].default
    if isinstance(default, bool):
        return not default, switches
    if isinstance(default, float):
        return default / 2 or 0.5, switches
    if isinstance(default, int):
        return default + 1, switches
    for value in ("x", 16, 0.5, ["x"], [2.0]):
        with suppress(UserError):
            config.checked(value, FIELDS[name].kind, name)
            return value, switches
    raise AssertionError(name)


def test_every_field_is_an_option_here_or_it_is_said_why_not():
    """The option that the table names is the one that changes."""
    silent, elsewhere = [], []
    for name, f in FIELDS.items():
        value, others = example(name)
        before, after = translate(others, "c.yaml"), translate(others | {name: value}, "c.yaml")
        changed = {key for key, _ in differences(flat(before.options), flat(after.options))}
        said = {key for key, _ in differences(before.left_out, after.left_out)}
        if changed and f.here:
            if not any(key.startswith(tuple(f.here.split(" and "))) for key in changed):
                elsewhere.append(name)
        elif name not in said and not (f.here and said):
            silent.append(name)
    assert (silent, elsewhere) == ([], [])


def differences(one: dict, other: dict) -> list[tuple[str, Any]]:
    """The items that are in one of the two alone."""
    return [(k, x) for k, x in [*one.items(), *other.items()] if one.get(k) != other.get(k)]


def test_fields_that_only_surround_the_training_are_listed():
    given = dict.fromkeys(TRL_AROUND, "x")
    translation = translate(given, "c.yaml")
    assert sorted(translation.around) == sorted(TRL_AROUND)
    assert translation.options == translate({}, "c.yaml").options


def test_a_field_that_trl_does_not_read_is_told_so():
    for fields, name in (
        ({"vespo_k_pos": 1.0}, "vespo_k_pos"),
        ({"epsilon": 0.1, "loss_type": "sapo"}, "epsilon"),
        ({"delta": 2.0, "loss_type": "cispo"}, "delta"),
        ({"lora_r": 4}, "lora_r"),
        ({"vllm_mode": "server"}, "vllm_mode"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "warmup_steps"),
    ):
        assert name in translate(fields, "c.yaml").unread


def test_the_defaults_of_trl_are_written_down():
    """Most of ours are others, so all that matter stand in what is printed."""
    cfg = cfg_of({})
    assert (cfg.sampling.prompts, cfg.sampling.group_size) == (1, 8)
    assert (cfg.sampling.max_new_tokens, cfg.optim.lr, cfg.seed) == (512, 1e-6, 42)
    assert (cfg.optim.schedule, cfg.optim.warmup, cfg.optim.weights) == ("linear", 0, "token")
    assert (cfg.loss, cfg.advantage) == ({"name": "clip", "epsilon": 0.2}, {"name": "grpo"})
    assert cfg.kl_ref.coef == 0
    assert "num_train_epochs" in translate({}, "c.yaml").left_out or cfg.optim.steps


def test_dr_grpo_s_loss_leaves_the_std_to_scale_rewards():
    assert cfg_of({"loss_type": "dr_grpo"}).advantage == {"name": "grpo"}
    both = cfg_of({"loss_type": "dr_grpo", "scale_rewards": False})
    assert both.advantage == {"name": "dr_grpo"}
    assert both.optim.weights == "constant"


# ------------------------------------------------------------------ TRL's own gradients


def fields_of(case: dict) -> dict[str, Any]:
    """The fields of a frozen case. Rows without a token are truncated ones that are masked."""
    settings = NUMBERS["defaults"] | case["config"]
    return {name: x for name, x in settings.items() if name in FIELDS} | {
        "per_device_train_batch_size": 6,
        "num_generations": 6,
        "gradient_accumulation_steps": settings["grad_accum"],
        "mask_truncated_completions": case["batch"] == "masked_rows",
    }


def is_ours(case: dict) -> bool:
    """Has the case no vLLM, is it training, and does the translation say that nothing differs?

    LUSPO's differs by a constant, which the test takes out.
    """
    case_config = case["config"]
    if case_config.get("vllm_is") or case_config.get("mode") == "eval":
        return False
    translation = translate(fields_of(case), "c.yaml")
    noted = {*translation.differs, *translation.left_out} - {"num_train_epochs"}
    if case_config.get("loss_type") == "luspo":
        noted -= {"loss_type"}
    return not noted


CASES = {str(case["id"]): case for case in NUMBERS["losses"] if is_ours(case)}


def test_a_translated_configuration_has_trl_s_gradient():
    """By the objective of train.py and its weights, with every option from the translation."""
    wrong = []
    for name, case in CASES.items():
        ours, theirs = our_gradient(case), tensor(case["grad_logps"])
        if not torch.allclose(ours, theirs, **EXACT):
            wrong.append((name, case["config"]))
    assert wrong == []


def our_gradient(case: dict) -> torch.Tensor:
    """With respect to the log-probs. TRL's counts of tokens and of micro-batches are taken over."""
    cfg, loss_type = cfg_of(fields_of(case)), case["config"].get("loss_type", "dapo")
    new, batch = trl_batch(case["batch"])
    state = State(cfg.kl_ref.coef, 0.0)
    loss, _ = train.objective(cfg, resolve_algorithm(cfg), state, new, batch)
    weights = token_weights(batch.mask, cfg.optim.weights, cfg.sampling.max_new_tokens)
    accumulated, window = (case["config"].get(n) for n in ("grad_accum", "num_items_in_batch"))
    if window and loss_type in OVER_THE_ROLLOUT:
        weights = weights * int(batch.mask.sum()) / window
    else:
        weights = weights / (accumulated or 1)
    if loss_type == "luspo":
        weights = weights * cfg.sampling.max_new_tokens
    return gradient((weights * loss)[batch.mask].sum(), new.logprobs)


def test_most_of_trl_s_loss_cases_are_translated_without_a_difference():
    """All loss types are among them; most of the others are noted because they have vLLM."""
    loss_types = {case["config"].get("loss_type", "dapo") for case in CASES.values()}
    assert loss_types == {"grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"}
    page = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    assert f"compares {len(CASES)} frozen" in page.replace("\n", " ")
    assert any(case["config"].get("beta") for case in CASES.values())
    assert any(case["config"].get("delta") for case in CASES.values())


# ------------------------------------------------------------------ batches


def updates_of_trl(micro: int, accumulated: int, steps: int, iterations: int, count: int):
    """[{(rollout, row), …}, …]: the distinct rows of each of TRL's first updates."""
    updates = []
    for update in range(count):
        rows = set()
        for step in range(update * accumulated, (update + 1) * accumulated):
            rollout, part = step // (steps * iterations), step % steps
            rows |= {(rollout, part * micro + row) for row in range(micro)}
        updates.append(rows)
    return updates


def test_a_rollout_and_its_updates_have_the_rows_that_trl_s_have():
    """Simulated by TRL's rule: which rollout and which part of it each micro-batch is."""
    checked = 0
    for micro, accumulated, steps, iterations in itertools.product((2, 4), *[(1, 2, 3, 4)] * 3):
        fields = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulated,
            "steps_per_generation": steps,
            "num_iterations": iterations,
            "num_generations": 2,
        }
        if "gradient_accumulation_steps" in translate(fields, "c.yaml").differs:
            continue
        cfg = cfg_of(fields)
        rows, epochs = cfg.sampling.rows, cfg.optim.epochs
        minibatch = cfg.optim.minibatch or rows
        count = 12 * steps * iterations  # so that the last rollout is whole
        updates = updates_of_trl(micro, accumulated, steps, iterations, count)
        assert {len(update) for update in updates} == {minibatch}
        visits: dict = defaultdict(int)
        for update in updates:
            for row in update:
                visits[row] += 1
        assert {*visits.values()} == {epochs}
        # the updates before a new rollout is sampled
        assert epochs * rows // minibatch * len(visits) == len(updates) * rows
        checked += 1
    assert checked > 60


def test_batch_sizes_that_trl_refuses_are_refused_with_the_numbers():
    for fields, words in (
        ({"per_device_train_batch_size": 4}, ["4 rows", "num_generations=8"]),
        ({"num_generations": 1}, ["num_generations=1"]),
        ({"generation_batch_size": 12}, ["generation_batch_size=12", "8"]),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, ["leave one of them out"]),
        ({"num_iterations": 0}, ["num_iterations=0"]),
    ):
        message = refused(fields)
        assert [word for word in words if word not in message] == []


def test_steps_and_warm_up_are_counted_in_rollouts():
    updates = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2}
    cfg = cfg_of(updates | {"max_steps": 100, "warmup_steps": 10})
    assert (cfg.optim.steps, cfg.optim.warmup) == (25, 3)
    assert cfg_of({"max_steps": 100, "warmup_ratio": 0.1}).optim.warmup == 10
    assert cfg_of({"max_steps": 100, "warmup_steps": 0.05}).optim.warmup == 5


def test_a_schedule_without_warm_up_is_that_of_transformers():
    """Which names them, and applies them to each update."""
    for name in ("linear", "cosine", "constant", "constant_with_warmup"):
        cfg = cfg_of({"lr_scheduler_type": name, "max_steps": 10})
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
        for step in range(10):
            ours = lr_scale(step, cfg.optim.steps, cfg.optim.warmup, cfg.optim.schedule)
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


# ------------------------------------------------------------------ the command


FILE = """
model_name_or_path: tiny
beta: 0.04
num_generations: 4
max_completion_length: 6
loss_type: dr_grpo
use_vllm: true
logging_steps: 10
vespo_k_pos: 1.0
max_steps: 20
"""


@pytest.fixture
def trl_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trl.yaml").write_text(FILE)
    return "trl.yaml"


def test_what_is_printed_is_a_configuration_with_comments(trl_file, capsys, tmp_path):
    assert cli.main(["explain", "--trl", trl_file, "task.digits=1", "optim.lr=1e-4"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "ours.yaml").write_text(out)
    cfg = config.load(["ours.yaml"])
    fields = yaml.safe_load(FILE)
    expected = config.overridden(tree_of(fields), ["task.digits=1", "optim.lr=1e-4"])
    assert cfg == config.build(config.merge(config.defaults(), expected))
    assert (cfg.kl_ref.estimator, cfg.optim.lr) == ("wk3_token", 1e-4)
    for line in (
        "#   use_vllm: there is no vLLM backend",
        "#   vespo_k_pos: loss_type=dr_grpo does not",
        "#   logging_steps",
        "#   maximise  E[score] - 0.04",
        "add",
    ):
        assert line in out, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_generation: 8", ["num_generation", "did you mean num_generations?"]),
        ("num_generations: eight", ["num_generations='eight'", "integer"]),
        ("beta: high", ["beta='high'", "number"]),
        ("use_vllm: perhaps", ["use_vllm='perhaps'", "boolean"]),
        ("loss_type: ppo", ["loss_type='ppo'", "dapo", "luspo"]),
        ("scale_rewards: global", ["scale_rewards='global'", "group", "batch"]),
        ("importance_sampling_level: word", ["importance_sampling_level='word'", "sequence"]),
        ("reward_funcs: [a.b]\nreward_weights: [1, 2]", ["reward_weights", "1 rewards"]),
        ("learning_rate: -1", ["optim.lr=-1", "greater than or equal"]),
        ("- 1", ["trl.yaml", "key: value"]),
        ("beta: {", ["trl.yaml", "not YAML"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(trl_file, capsys, text, words):
    with open(trl_file, "w", encoding="utf-8") as file:
        file.write(text)
    assert cli.main(["explain", "--trl", trl_file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == []


def test_a_missing_file_is_one_line(trl_file, capsys):
    for argv, words in (
        (["--trl", "nope.yaml"], "error: --trl nope.yaml: no such file"),
        (["--trl"], "--trl needs the YAML file"),
    ):
        assert cli.main(["explain", *argv]) == 2
        assert words in capsys.readouterr().err


def test_rewards_keep_their_weights_and_trl_s_own_come_from_trl():
    tree = tree_of({"reward_funcs": ["accuracy_reward", "mine.short"], "reward_weights": [1, 0.5]})
    assert tree["reward"] == [
        {"name": "trl.rewards:accuracy_reward", "weight": 1.0},
        {"name": "mine:short", "weight": 0.5},
    ]
