"""Configuration: what is read is what was written, and every mistake is one line that names the way out."""

import dataclasses
import math
from functools import partial
from typing import get_type_hints

import pytest

import train
from rlkl import algorithm, config, kl, preflight, schema, terminal
from rlkl.advantages import ADVANTAGES
from rlkl.build import TABLES
from rlkl.config import load, resolve
from rlkl.errors import UserError
from rlkl.losses import LOSSES, SELECTORS

PLUGIN = """
import dataclasses

@dataclasses.dataclass
class Thing:
    x: int = 0

def bare(new, batch, *, rate=0.5, count=2, name="a", on=True, anything=None):
    return rate, count, name, on, anything

def strict(new, batch, *, size: int, limit: "float | None" = None):
    return size, limit

class Task:
    def __init__(self, split, *, length: int = 3):
        self.split, self.length = split, length
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(PLUGIN)
    return tmp_path


def mistake(*argv: str) -> str:
    """The one line that this command line is refused with."""
    with pytest.raises(UserError) as error:
        load(list(argv))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def refused(function, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# What is read


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e-4", -2e-4), ("+3e+2", 300.0), ("1.5e3", 1500.0), ("2.e-1", 0.2), ("7", 7)],
)
def test_numbers_are_numbers_in_files_and_overrides(tmp_path, text, number):
    """PyYAML alone reads 1e-3 as a string."""
    assert load([f"loss.clip={text}"]).loss["clip"] == number
    (tmp_path / "c.yaml").write_text(f"loss: {{clip: {text}}}\n")
    read = load([str(tmp_path / "c.yaml")]).loss["clip"]
    assert type(read) is type(number)
    assert read == number


@pytest.mark.parametrize("text", ["1e-3x", "e5", "1e", "step-1e3", "runs/1e-3"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert load([f"run={text}"]).run == text


def test_later_arguments_win_over_earlier_ones_and_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 1.0, steps: 7}\n")
    path = str(tmp_path / "c.yaml")
    assert load([path, "optim.lr=2"]).optim.lr == 2
    assert load(["optim.lr=2", path]).optim.lr == 1
    assert load(["optim.lr=2", "optim.lr=3"]).optim.lr == 3
    assert load([path, "optim.lr=2"]).optim.steps == 7
    assert load([path]).optim.epochs == schema.Optim().epochs


def test_dotted_keys_reach_nested_sections_and_values_may_hold_an_equals_sign():
    cfg = load(["sampling.backend.name=naive", "eval.prompts=3", "run=a=b"])
    assert (cfg.sampling.backend, cfg.eval.prompts, cfg.run) == ({"name": "naive"}, 3, "a=b")


def test_a_plugin_section_partly_overridden_keeps_its_name_and_its_other_arguments(tmp_path):
    (tmp_path / "c.yaml").write_text("loss: {name: ppo, clip: 0.3}\n")
    path = str(tmp_path / "c.yaml")
    assert load(["loss.clip=0.1"]).loss == {"name": "grpo", "clip": 0.1}
    assert load([path, "loss.value_coef=1"]).loss == {"name": "ppo", "clip": 0.3, "value_coef": 1}
    assert load([path, "loss=ppo"]).loss == {"name": "ppo", "clip": 0.3}


@pytest.mark.parametrize("switch", ["loss.name=surrogate", "loss=surrogate"])
def test_switching_the_name_forgets_the_arguments_of_the_previous_plugin(tmp_path, switch):
    (tmp_path / "one.yaml").write_text("loss: {name: ppo, clip: 0.3}\n")
    (tmp_path / "two.yaml").write_text("loss: {name: surrogate, entropy_coef: 0.1}\n")
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    assert load(["loss.clip=0.1", switch]).loss == {"name": "surrogate"}
    assert load([one, switch]).loss == {"name": "surrogate"}
    assert load([one, switch, "loss.entropy_coef=1"]).loss == {"name": "surrogate", "entropy_coef": 1}
    assert load([one, two]).loss == {"name": "surrogate", "entropy_coef": 0.1}


def test_options_may_be_given_before_the_name_where_there_is_no_plugin_yet():
    """`reward` and `selector` have no default: there is no previous name whose options could be meant."""
    assert load(["reward.path=m", "reward.name=reward_model"]).reward == {"path": "m", "name": "reward_model"}
    assert refused(load, ["selector.fraction=0.1", "selector.low=1"]).startswith("selector={'fraction': 0.1, 'low': 1}")


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"PK\x03\x04\x80\xff\xfe")
    assert "model.yaml: not YAML: " in refused(load, [str(tmp_path / "model.yaml")])


def test_a_plugin_may_be_given_by_its_name_alone():
    cfg = load(["loss=ppo", "advantage=gae", "sampling.backend=naive", "reward=my.py:f", "task=jsonl"])
    assert [cfg.loss, cfg.advantage, cfg.sampling.backend, cfg.reward, cfg.task] == [
        {"name": n} for n in ("ppo", "gae", "naive", "my.py:f", "jsonl")
    ]


def test_the_config_survives_a_round_trip_through_plain_values():
    cfg = load(["loss=ppo", "loss.clip=0.1", "kl_ref.coef=0.1", "kl_ref.target=2", "reward=my.py:f"])
    assert config.build(dataclasses.asdict(cfg)) == cfg


# What is refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["optim.lrr=1"], ["optim.lrr", "critic_lr", "max_grad_norm"]),
        (["steps=3"], ["steps", "optim", "sampling"]),
        (["optim.lr=fast"], ["optim.lr", "'fast'", "number"]),
        (["optim.epochs=1.5"], ["optim.epochs", "1.5", "integer"]),
        (["optim=3"], ["optim", "3"]),
        (["optim.lr.x=3"], ["optim.lr", "number"]),
        (["optim.steps=0"], ["optim.steps", "0", "greater than 0"]),
        (["model.reference=perhaps"], ["model.reference", "'perhaps'", "boolean"]),
        (["sampling.temperature=0"], ["sampling.temperature", "0", "greater than 0"]),
        (["sampling.temperature=-1"], ["sampling.temperature", "-1", "greater than 0"]),
        (["truncation=drop"], ["truncation", "'drop'", "terminal", "bootstrap", "mask"]),
        (["optim.weights=rows"], ["optim.weights", "'rows'", "token", "sequence", "constant"]),
        (["model.critic=yes"], ["model.critic", "none", "head", "network"]),
        (["optim.minibatch=33", "sampling.prompts=4", "sampling.group_size=8"], ["optim.minibatch", "33", "32"]),
        (["kl_ref.coef=0.1", "model.reference=false"], ["kl_ref.coef", "0.1", "model.reference=true"]),
        (["truncation=bootstrap"], ["truncation=bootstrap", "model.critic", "head", "network"]),
        (["loss=3"], ["loss", "3"]),
        (["loss.name=3"], ["loss", "3", "name"]),
        (["loss="], ["loss"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and "=" in x[0] else "",
)
def test_a_mistake_names_the_key_the_value_and_the_choices(argv, words):
    message = mistake(*argv)
    assert [w for w in words if w not in message] == [], message


@pytest.mark.parametrize("rows", [1, 31, 32])
def test_a_minibatch_up_to_the_rollout_is_possible(rows):
    cfg = load([f"optim.minibatch={rows}", "sampling.prompts=4", "sampling.group_size=8"])
    assert cfg.optim.minibatch == rows


def test_a_kl_coefficient_of_zero_needs_no_reference():
    assert not load(["model.reference=false"]).model.reference


def test_malformed_yaml_names_the_file_and_the_line(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 0\noptim:\n  lr: 1\n steps: 3\n")
    message = mistake(str(tmp_path / "c.yaml"))
    assert "c.yaml" in message
    assert "line 4" in message


def test_a_repeated_key_is_refused_by_name(tmp_path):
    """Plain YAML would take the second without a word."""
    (tmp_path / "c.yaml").write_text("optim:\n  lr: 1\n  steps: 2\n  lr: 3\n")
    message = mistake(str(tmp_path / "c.yaml"))
    assert "c.yaml" in message
    assert "'lr'" in message


def test_a_file_that_is_not_there_or_holds_no_sections_is_refused(tmp_path):
    assert "nope.yaml" in mistake("nope.yaml")
    assert "key=value" in mistake("optim.lr")
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert "key: value" in mistake(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("# nothing but a comment\n")
    assert load([str(tmp_path / "c.yaml")]) == load([])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_is_refused_where_the_group_is_the_baseline(name):
    advantage, loss = partial(ADVANTAGES[name]), partial(LOSSES["grpo"])
    check = partial(preflight.check_plugins, advantage, loss, names=(name, "grpo"), critic=False)
    message = refused(check, group_size=1)
    assert name in message
    assert "sampling.group_size" in message
    check(group_size=2)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"ppo"}))
def test_a_critic_that_no_loss_trains_is_refused(name):
    """It would cost a backward pass and be the baseline all the same: V = 0 for ever."""
    options = {"critic": True, "group_size": 1, "names": ("gae", name)}
    if name in {"top_entropy", "clip_cov", "kl_cov"}:
        options["selector"] = partial(SELECTORS[name])
    message = refused(preflight.check_plugins, partial(ADVANTAGES["gae"]), partial(LOSSES[name]), **options)
    assert message.startswith(f"loss.name={name} does not train the critic")
    ppo = partial(ADVANTAGES["gae"]), partial(LOSSES["ppo"]), ("gae", "ppo")
    preflight.check_plugins(*ppo, group_size=1, critic=True)


def test_k1_is_refused_as_a_loss_and_only_there():
    """Its expected gradient is zero: it would look like a penalty and hold nothing."""
    message = refused(algorithm.kl_terms, load(["kl_ref.coef=1", "kl_ref.place=loss", "kl_ref.estimator=k1"]))
    assert "k1" in message
    assert "k2, k3" in message
    term, _ = algorithm.kl_terms(load(["kl_ref.coef=1", "kl_ref.place=reward", "kl_ref.estimator=k1"]))
    assert term.func is kl.k1
    term, _ = algorithm.kl_terms(load(["kl_ref.coef=1", "kl_ref.place=loss", "kl_ref.estimator=k2"]))
    assert term.func is kl.ref_k2


@pytest.mark.parametrize(
    ("argv", "key", "choices"),
    [
        (["kl_ref.estimator=k9"], "kl_ref.estimator", "k1, k2, k3"),
        (["kl_ref.estimator=k9", "kl_ref.place=loss", "kl_ref.coef=1"], "kl_ref.estimator", "k2, k3"),
        (["kl_old.estimator=k9"], "kl_old.estimator", "k2, k3"),
    ],
)
def test_an_unknown_estimator_is_refused_with_the_choices(argv, key, choices):
    message = refused(algorithm.kl_terms, load(argv))
    assert key in message
    assert "'k9'" in message
    assert choices in message


# resolve: a name and options → a function with all its options bound


def test_resolve_finds_a_table_name_a_file_and_a_module(plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(plugin))
    assert resolve({"name": "ppo", "clip": 0.1}, LOSSES).func is LOSSES["ppo"]
    assert resolve({"name": "my.py:bare"}, LOSSES)(None, None) == (0.5, 2, "a", True, None)
    assert resolve({"name": "math:floor"}, LOSSES).func is math.floor
    assert resolve({"name": "my:bare"}, LOSSES)(None, None) == (0.5, 2, "a", True, None)
    assert resolve({"name": "my.py:Task", "length": 5}, {})("train").length == 5


def test_resolve_binds_the_defaults_too_so_that_the_loop_may_read_them():
    bound = resolve({"name": "gae", "lam": 0.5}, ADVANTAGES).keywords
    assert bound.items() >= {"gamma": 1.0, "lam": 0.5, "lam_critic": None, "whiten": True}.items()


def test_an_unknown_option_names_the_options_there_are():
    message = refused(resolve, {"name": "grpo", "clipp": 0.3}, LOSSES, "loss")
    assert message == "grpo has no option 'clipp'; it takes clip, clip_high, entropy_coef"


def test_the_group_size_comes_from_the_loop_and_is_no_option():
    assert "group_size" in refused(resolve, {"name": "grpo", "group_size": 4}, ADVANTAGES, "advantage")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "my.py:bare", "rate": "fast"}, ["loss.rate", "'fast'", "number"]),
        ({"name": "my.py:bare", "count": 1.5}, ["loss.count", "1.5", "integer"]),
        ({"name": "my.py:bare", "on": "perhaps"}, ["loss.on", "'perhaps'", "boolean"]),
        ({"name": "my.py:bare", "name_": 1}, ["name_", "rate, count, name, on, anything"]),
        ({"name": "my.py:strict"}, ["my.py:strict", "loss.size"]),
        ({"name": "my.py:strict", "size": "x"}, ["loss.size", "'x'", "integer"]),
        ({"name": "my.py:strict", "size": 1, "limit": "x"}, ["loss.limit", "'x'", "number"]),
        ({"name": "my.py:Task", "length": "x"}, ["loss.length", "'x'", "integer"]),
        ({"name": "nope"}, ["loss", "'nope'", "ppo, grpo, surrogate", "file.py:function"]),
        ({"name": "gone.py:f"}, ["loss", "gone.py", "no such file"]),
        ({"name": "my.py:nope"}, ["loss", "my.py", "'nope'", "Thing, bare, strict, Task"]),
        ({"name": "no.such.module:f"}, ["loss", "no.such.module", "ModuleNotFoundError"]),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_resolve_refuses_a_wrong_name_or_option_in_one_line(plugin, options, words):
    """An option without an annotation takes the type of its default."""
    message = refused(resolve, options, LOSSES, "loss")
    assert [w for w in words if w not in message] == [], message


def test_options_are_converted_to_their_type(plugin):
    found = resolve({"name": "my.py:bare", "rate": 1, "anything": [1, "x"]}, {})(None, None)
    assert found == (1.0, 2, "a", True, [1, "x"])
    assert type(found[0]) is float
    assert resolve({"name": "my.py:strict", "size": 3, "limit": 2}, {})(None, None) == (3, 2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n\ndef f(:\n", ["bad.py", "line 3", "SyntaxError"]),
        ("import no_such_library\n", ["bad.py", "ModuleNotFoundError", "no_such_library"]),
        ("raise ValueError('first\\nsecond')\n", ["bad.py", "ValueError", "first"]),
    ],
    ids=["syntax", "import", "raises"],
)
def test_a_plugin_file_that_cannot_be_loaded_is_named_with_its_error(plugin, text, words):
    (plugin / "bad.py").write_text(text)
    message = refused(resolve, {"name": "bad.py:f"}, LOSSES, "loss")
    assert [w for w in words if w not in message] == [], message


def test_a_decorated_plugin_keeps_the_options_it_was_written_with(plugin):
    """functools.wraps shows the signature of the function inside: its annotations belong to the file of that one."""
    (plugin / "decorated.py").write_text(
        "import functools\nfrom rlkl.advantages import grpo as real\n\n"
        "@functools.wraps(real)\ndef grpo(*args, **options):\n    return real(*args, **options)\n"
    )
    assert resolve({"name": "decorated.py:grpo"}, {}).keywords == {"scale": "group"}


# --help


def leaves(section: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(section)
    return [
        key
        for f in dataclasses.fields(section)
        for key in (
            leaves(hints[f.name], f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(hints[f.name])
            else [prefix + f.name]
        )
    ]


def test_help_lists_every_option_with_type_default_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 400)
    assert train.main(["--help"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    table = config.options(TABLES)
    assert [row[0] for row in table] == leaves(schema.Config)
    for key, kind, default, line in table:
        assert kind
        assert default
        assert line.strip()
        assert len(line.splitlines()) == 1
        assert any(p.split()[:1] == [key] and default in p and p.endswith(line) for p in printed), key


def test_help_shows_the_defaults_that_a_run_without_arguments_has():
    shown = {key: default for key, _, default, _ in config.options(TABLES)}
    cfg = load([])
    assert shown["optim.lr"] == str(cfg.optim.lr)
    assert shown["loss"] == cfg.loss["name"]
    assert shown["sampling.backend"] == cfg.sampling.backend["name"]
