"""Configuration: files and overrides are read as written; a mistake is one line with the fix."""

import dataclasses
import inspect
import math
from functools import partial
from typing import get_type_hints

import pytest
import yaml

import train
from rlkl import kl
from rlkl.advantages import ADVANTAGES
from rlkl.errors import UserError
from rlkl.losses import LOSSES, SELECTORS
from rlkl.plugins import resolve
from rlkl.run import algorithm, config, schema, terminal
from rlkl.run.check_plugins import check_plugins
from rlkl.run.config import load
from rlkl.run.folder import configure
from rlkl.supervised.schema import SFTConfig
from rlkl.tasks import TASKS

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
RENAMED = {  # an option of version 0.1, with a value → what to write now
    "model.critic=head": "critic.kind",
    "model.checkpointing=true": "model.gradient_checkpointing",
    "lora.targets=all-linear": "lora.target_modules",
    "lora.full=[]": "lora.modules_to_save",
    "optim.critic_lr=1e-3": "critic.lr",
    "optim.critic_warmup=3": "critic.warmup",
    "sampling.unanimous=refill": "sampling.zero_variance",
    "sampling.refills=3": "sampling.resample_rounds",
    "task.paid=strict": "task.method",
    "loss.value_coef=0.5": "critic.coef",
    "loss.value_clip=0.2": "critic.clip",
    "loss.entropy_coef=0.01": "entropy.coef",
    "loss.clip=0.2": "loss.epsilon",
    "loss.clip_high=0.28": "loss.epsilon_high",
    "loss=ppo": "loss=clip with advantage=gae and critic.kind=head",
    "loss=grpo": "loss=clip with advantage=grpo",
    "loss=dual_clip": "loss=clip with loss.delta=3.0",
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A working directory with my.py in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(PLUGIN)
    return tmp_path


def refused(function, *args, **options) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def mistake(*argv: str) -> str:
    """The one line with which a command line is refused."""
    return refused(load, list(argv))


def incomplete(messages: dict, words: dict) -> dict:
    """{case: message} of the messages that lack one of their words."""
    return {
        case: message
        for case, message in messages.items()
        if any(word not in message for word in words[case])
    }


# ------------------------------------------------------------------ what is read


def test_numbers_are_numbers_in_files_and_overrides(tmp_path):
    """PyYAML alone reads 1e-3 as a string."""
    for text, number in {
        "1e-3": 1e-3,
        "1E5": 1e5,
        "-2e-4": -2e-4,
        "+3e+2": 300.0,
        "1.5e3": 1500.0,
        "2.e-1": 0.2,
        "7": 7,
    }.items():
        (tmp_path / "c.yaml").write_text(f"loss: {{epsilon: {text}}}\n")
        for argument in (f"loss.epsilon={text}", str(tmp_path / "c.yaml")):
            value = load([argument]).loss["epsilon"]
            assert (type(value), value) == (type(number), number), argument


def test_what_only_looks_like_a_number_stays_text():
    for text in ("1e-3x", "e5", "1e", "step-1e3", "runs/1e-3"):
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


def test_an_override_of_a_plugin_s_option_keeps_its_name_and_its_other_options(tmp_path):
    (tmp_path / "c.yaml").write_text("loss: {name: gspo, epsilon: 0.3}\n")
    path = str(tmp_path / "c.yaml")
    assert load(["loss.epsilon=0.1"]).loss == {"name": "clip", "epsilon": 0.1}
    both = {"name": "gspo", "epsilon": 0.3, "epsilon_high": 1}
    assert load([path, "loss.epsilon_high=1"]).loss == both
    assert load([path, "loss=gspo"]).loss == {"name": "gspo", "epsilon": 0.3}


def test_another_name_of_a_plugin_forgets_the_options_of_the_previous_one(tmp_path):
    (tmp_path / "one.yaml").write_text("loss: {name: gspo, epsilon: 0.3}\n")
    (tmp_path / "two.yaml").write_text("loss: {name: sapo, tau: 0.1}\n")
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    for switch in ("loss.name=sapo", "loss=sapo"):
        assert load(["loss.epsilon=0.1", switch]).loss == {"name": "sapo"}
        assert load([one, switch]).loss == {"name": "sapo"}
        assert load([one, switch, "loss.tau=1"]).loss == {"name": "sapo", "tau": 1}
    assert load([one, two]).loss == {"name": "sapo", "tau": 0.1}


def test_options_may_come_before_the_name_where_there_is_no_plugin_yet():
    """`reward` and `selector` have no default, so no previous name can be meant."""
    reward = {"path": "m", "name": "reward_model"}
    assert load(["reward.path=m", "reward.name=reward_model"]).reward == reward
    message = mistake("selector.fraction=0.1", "selector.low=1")
    assert message.startswith("selector={'fraction': 0.1, 'low': 1}")


def test_a_plugin_may_be_given_by_its_name_alone():
    names = {"loss": "gspo", "advantage": "gae", "reward": "my.py:f", "task": "jsonl"}
    cfg = load([*(f"{key}={name}" for key, name in names.items()), "sampling.backend=naive"])
    assert {key: getattr(cfg, key) for key in names} == {k: {"name": n} for k, n in names.items()}
    assert cfg.sampling.backend == {"name": "naive"}


def test_the_config_survives_a_round_trip_through_plain_values():
    options = ("loss.epsilon=0.1", "kl_ref.coef=0.1", "kl_ref.target=2", "reward=my.py:f")
    cfg = load(["advantage=gae", *options])
    assert config.build(dataclasses.asdict(cfg)) == cfg


# ------------------------------------------------------------------ what is refused


def test_a_mistake_names_the_key_the_value_and_the_choices():
    words = {
        "optim.lrr=1": ["optim.lrr", "there is steps, lr,", "max_grad_norm"],
        "steps=3": ["steps", "optim", "sampling"],
        "optim.lr=fast": ["optim.lr", "'fast'", "number"],
        "optim.epochs=1.5": ["optim.epochs", "1.5", "integer"],
        "optim=3": ["optim", "3"],
        "optim.lr.x=3": ["optim.lr", "number"],
        "optim.steps=0": ["optim.steps", "0", "greater than 0"],
        "model.reference=perhaps": ["model.reference", "'perhaps'", "'auto', True or False"],
        "sampling.temperature=0": ["sampling.temperature", "0", "greater than 0"],
        "sampling.temperature=-1": ["sampling.temperature", "-1", "greater than 0"],
        "truncation=drop": ["truncation", "'drop'", "terminal", "bootstrap", "mask"],
        "optim.weights=rows": ["optim.weights", "'rows'", "token", "sequence", "constant"],
        "sampling.zero_variance=refill": ["sampling.zero_variance", "keep", "drop", "resample"],
        "critic.kind=yes": ["critic.kind", "none", "head", "network"],
        "optim.minibatch=33 sampling.prompts=4 sampling.group_size=8": [
            "optim.minibatch",
            "33",
            "32",
        ],
        "kl_ref.coef=0.1 model.reference=false": ["kl_ref.coef", "0.1", "model.reference=true"],
        "truncation=bootstrap": ["truncation=bootstrap", "critic.kind", "head", "network"],
        "loss=3": ["loss", "3"],
        "loss.name=3": ["loss", "3", "name"],
        "loss=": ["loss"],
    }
    messages = {argv: mistake(*argv.split()) for argv in words}
    assert incomplete(messages, words) == {}


def test_a_minibatch_up_to_the_rollout_is_possible():
    for rows in (1, 31, 32):
        cfg = load([f"optim.minibatch={rows}", "sampling.prompts=4", "sampling.group_size=8"])
        assert cfg.optim.minibatch == rows


def test_a_kl_coefficient_of_zero_needs_no_reference():
    assert not load(["model.reference=false"]).model.reference


def test_malformed_yaml_names_the_file_and_the_line(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 0\noptim:\n  lr: 1\n steps: 3\n")
    message = mistake(str(tmp_path / "c.yaml"))
    assert "c.yaml" in message
    assert "line 4" in message
    (tmp_path / "model.yaml").write_bytes(b"PK\x03\x04\x80\xff\xfe")  # no text at all
    assert "model.yaml: not YAML: " in mistake(str(tmp_path / "model.yaml"))


def test_a_repeated_key_is_refused_by_name(tmp_path):
    """PyYAML alone silently takes the second."""
    (tmp_path / "c.yaml").write_text("optim:\n  lr: 1\n  steps: 2\n  lr: 3\n")
    message = mistake(str(tmp_path / "c.yaml"))
    assert "c.yaml" in message
    assert "'lr'" in message


def test_a_file_that_is_missing_or_holds_no_sections_is_refused(tmp_path):
    assert "nope.yaml" in mistake("nope.yaml")
    assert "key=value" in mistake("optim.lr")
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert "key: value" in mistake(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("# nothing but a comment\n")
    assert load([str(tmp_path / "c.yaml")]) == load([])


# ------------------------------------------------------------------ renamed options


def tree_of(override: str) -> dict:
    """{"a": {"b": c}} of a.b=c, and {"loss": {"name": c}} of loss=c."""
    path, _, value = override.partition("=")
    section, _, option = path.partition(".")
    return {section: {option or "name": config.parse_yaml(value, override)}}


def test_a_renamed_option_is_refused_with_its_new_name_from_wherever_it_comes(tmp_path):
    """From an override, from a file, and from the config.yaml of a run that is resumed."""
    assert {x if x.startswith("loss=") else x.split("=")[0] for x in RENAMED} == {*config.RENAMED}
    for override, new_name in RENAMED.items():
        old = override if override.startswith("loss=") else override.split("=")[0]
        expected = f"{old} has a new name: write {new_name}"
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(tree_of(override)))
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        saved = config.merge(config.defaults(), tree_of(override))
        (run / "config.yaml").write_text(yaml.safe_dump(saved))
        from_run = refused(configure, [f"resume={run}"])
        assert mistake(override).startswith(expected)
        assert mistake(str(file)).startswith(expected)
        assert from_run.startswith(
            f"resume={run}: its config.yaml is not of this version: {expected}"
        )


def test_the_new_names_exist():
    known = {row[0] for row in config.options()}
    known |= {f"loss.{name}" for name in inspect.signature(LOSSES["clip"]).parameters}
    known |= {f"task.{name}" for name in inspect.signature(TASKS["gsm8k"]).parameters}
    options = {name for name in RENAMED.values() if not name.startswith("loss=")}
    assert options <= known
    for names in (name for name in RENAMED.values() if name.startswith("loss=")):
        overrides = [word for word in names.split() if "=" in word]
        algorithm.resolve_algorithm(load(overrides))


def test_a_loss_of_ones_own_may_have_an_option_with_an_old_name(plugin):
    (plugin / "my.py").write_text("def loss(new, batch, *, clip=0.2):\n    return new, {}\n")
    assert load(["loss=my.py:loss", "loss.clip=0.1"]).loss == {"name": "my.py:loss", "clip": 0.1}
    assert load(["task=my.py:Task", "task.paid=1"]).task == {"name": "my.py:Task", "paid": 1}


def test_the_options_of_another_command_are_not_answered_with_names_of_training():
    message = refused(load, ["optim.critic_lr=1"], schema=SFTConfig)
    assert "critic_lr" in message
    assert "new name" not in message


# ------------------------------------------------------------------ what goes with what


def test_a_model_may_be_given_by_its_name_alone():
    cfg = load(["model.dtype=float64", "model=some/model"])
    assert (cfg.model.name, cfg.model.dtype) == ("some/model", "float64")
    cfg = load(["reward={name: mine.py:judge}", "reward.model=qwen"])
    assert cfg.reward == {"name": "mine.py:judge", "model": "qwen"}, "an option of one's own"


def test_a_group_of_one_is_refused_where_the_group_is_the_baseline():
    for name in ("grpo", "dr_grpo", "rloo"):
        advantage = partial(ADVANTAGES[name])
        check = partial(check_plugins, advantage, LOSSES["clip"], (name, "clip"), critic=False)
        message = refused(check, group_size=1)
        assert name in message
        assert "sampling.group_size" in message
        check(group_size=2)


def test_every_loss_goes_with_a_critic_and_without_one():
    for name, loss in LOSSES.items():
        selector = SELECTORS.get(name)
        for advantage, critic in (("gae", True), ("grpo", False)):
            check_plugins(
                ADVANTAGES[advantage],
                loss,
                (advantage, name),
                group_size=2,
                critic=critic,
                selector=selector,
            )


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("new.logprobs", "it returned a Tensor"),
        ("1", "it returned a int"),
        ("new.logprobs, new.logprobs", "it returned a tuple"),
        ("new.logprobs, {'x': 1.0}", "x is a float"),
    ],
)
def test_a_loss_must_return_a_tensor_and_diagnostics(given, wrong):
    loss = eval(f"lambda new, batch: ({given})")
    check = partial(check_plugins, ADVANTAGES["grpo"], loss, ("grpo", "mine"), critic=False)
    message = refused(check, group_size=2)
    assert message.startswith("loss.name=mine: must return (loss, diagnostics), a (B, T) tensor")
    assert message.endswith(f"which may be empty; {wrong}")


def test_an_advantage_must_return_the_returns_too():
    def advantage(rewards, values, mask, *, group_size):
        return rewards

    check = partial(check_plugins, advantage, LOSSES["clip"], ("mine", "clip"), critic=False)
    message = refused(check, group_size=2)
    assert message.startswith("advantage.name=mine: must return (advantages, returns)")
    assert message.endswith("it returned a Tensor")


def test_a_critic_that_the_advantage_does_not_train_is_refused():
    check = partial(check_plugins, names=("grpo", "clip"), group_size=2, critic=True)
    message = refused(check, ADVANTAGES["grpo"], LOSSES["clip"])
    assert message.startswith("advantage.name=grpo does not train a critic: set critic.kind=none")


def test_k1_is_refused_as_a_loss_and_only_there():
    """The expectation of its gradient is zero, so as a penalty it would constrain nothing."""

    def kl_ref(place: str, estimator: str):
        options = ["kl_ref.coef=1", f"kl_ref.place={place}", f"kl_ref.estimator={estimator}"]
        return algorithm.kl_terms(load(options))[0].func

    message = refused(kl_ref, "loss", "k1")
    assert "k1" in message
    assert "k2, k3" in message
    assert kl_ref("reward", "k1") is kl.k1
    assert kl_ref("loss", "k2") is kl.ref_k2


def test_an_unknown_estimator_is_refused_with_the_choices():
    words = {
        "kl_ref.estimator=k9": ["kl_ref.estimator", "'k9'", "k1, k2, k3"],
        "kl_ref.estimator=k9 kl_ref.place=loss kl_ref.coef=1": ["kl_ref.estimator", "'k9'", "k2"],
        "kl_old.estimator=k9": ["kl_old.estimator", "'k9'", "k2, k3"],
    }
    messages = {argv: refused(algorithm.kl_terms, load(argv.split())) for argv in words}
    assert incomplete(messages, words) == {}


# ------------------------------------------------------------------ resolve


def test_resolve_finds_a_table_name_a_file_and_a_module(plugin, monkeypatch):
    monkeypatch.syspath_prepend(str(plugin))
    assert resolve({"name": "clip", "epsilon": 0.1}, LOSSES).func is LOSSES["clip"]
    assert resolve({"name": "my.py:bare"}, LOSSES)(None, None) == (0.5, 2, "a", True, None)
    assert resolve({"name": "math:floor"}, LOSSES).func is math.floor
    assert resolve({"name": "my:bare"}, LOSSES)(None, None) == (0.5, 2, "a", True, None)
    assert resolve({"name": "my.py:Task", "length": 5}, {})("train").length == 5


def test_resolve_binds_the_defaults_too():
    bound = resolve({"name": "gae", "lam": 0.5}, ADVANTAGES).keywords
    assert bound.items() >= {"gamma": 1.0, "lam": 0.5, "lam_critic": None, "whiten": True}.items()


def test_an_unknown_option_names_the_options_there_are():
    message = refused(resolve, {"name": "clip", "clipp": 0.3}, LOSSES, "loss")
    assert message == "clip has no option 'clipp'; it takes epsilon, epsilon_high, delta"


def test_the_group_size_is_given_by_the_loop_and_is_no_option():
    section = {"name": "grpo", "group_size": 4}
    assert "group_size" in refused(resolve, section, ADVANTAGES, "advantage")


def test_resolve_refuses_a_wrong_name_or_option_in_one_line(plugin):
    """An option without an annotation takes the type of its default."""
    choices = ["loss", "'nope'", "clip, surrogate, reinforce", "file.py:function"]
    cases = [
        ({"name": "my.py:bare", "rate": "fast"}, ["loss.rate", "'fast'", "number"]),
        ({"name": "my.py:bare", "count": 1.5}, ["loss.count", "1.5", "integer"]),
        ({"name": "my.py:bare", "on": "perhaps"}, ["loss.on", "'perhaps'", "boolean"]),
        ({"name": "my.py:bare", "name_": 1}, ["name_", "rate, count, name, on, anything"]),
        ({"name": "my.py:strict"}, ["my.py:strict", "loss.size"]),
        ({"name": "my.py:strict", "size": "x"}, ["loss.size", "'x'", "integer"]),
        ({"name": "my.py:strict", "size": 1, "limit": "x"}, ["loss.limit", "'x'", "number"]),
        ({"name": "my.py:Task", "length": "x"}, ["loss.length", "'x'", "integer"]),
        ({"name": "nope"}, choices),
        ({"name": "gone.py:f"}, ["loss", "gone.py", "no such file"]),
        ({"name": "my.py:nope"}, ["loss", "my.py", "'nope'", "Thing, bare, strict, Task"]),
        ({"name": "no.such.module:f"}, ["loss", "no.such.module", "ModuleNotFoundError"]),
    ]
    messages = {str(section): refused(resolve, section, LOSSES, "loss") for section, _ in cases}
    assert incomplete(messages, {str(section): words for section, words in cases}) == {}


def test_options_are_converted_to_their_type(plugin):
    values = resolve({"name": "my.py:bare", "rate": 1, "anything": [1, "x"]}, {})(None, None)
    assert values == (1.0, 2, "a", True, [1, "x"])
    assert type(values[0]) is float
    assert resolve({"name": "my.py:strict", "size": 3, "limit": 2}, {})(None, None) == (3, 2.0)


def test_a_plugin_file_that_cannot_be_loaded_is_named_with_its_error(plugin):
    words = {
        "x = 1\n\ndef f(:\n": ["bad.py", "line 3", "SyntaxError"],
        "import no_such_library\n": ["bad.py", "ModuleNotFoundError", "no_such_library"],
        "raise ValueError('first\\nsecond')\n": ["bad.py", "ValueError", "first"],
    }
    messages = {}
    for source in words:
        (plugin / "bad.py").write_text(source)
        messages[source] = refused(resolve, {"name": "bad.py:f"}, LOSSES, "loss")
    assert incomplete(messages, words) == {}


def test_a_decorated_plugin_keeps_its_options(plugin):
    """functools.wraps shows the signature of the function inside, whose annotations it needs."""
    (plugin / "decorated.py").write_text(
        "import functools\nfrom rlkl.advantages import grpo as real\n\n"
        "@functools.wraps(real)\ndef grpo(*args, **options):\n    return real(*args, **options)\n"
    )
    assert resolve({"name": "decorated.py:grpo"}, {}).keywords == {"scale": "group"}


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--lr", "1e-3"], "did you mean optim.lr=1e-3 or critic.lr=1e-3?"),
        (["--epsilon", "0.1"], "did you mean loss.epsilon=0.1?"),
        (["--optim.lr=1e-3"], "did you mean optim.lr=1e-3?"),
        (["--group-size", "4"], "did you mean sampling.group_size=4?"),
        (["--seeds", "--x"], "did you mean seed=…?"),
        (["--run", "seed=1"], "did you mean run=…?"),
        (["--zzz"], "--help lists all"),
    ],
)
def test_a_flag_is_answered_with_the_way_options_are_written(arguments, written):
    message = refused(load, arguments)
    assert message.startswith(f"{arguments[0]}: options are written key=value")
    assert message.endswith(written)


# ------------------------------------------------------------------ --help


def option_keys(section: type, prefix: str = "") -> list[str]:
    """The dotted keys of all options of a schema."""
    hints = get_type_hints(section)
    keys = []
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            keys += option_keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def test_help_lists_every_option_with_type_default_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 400)
    train.main(["--help"])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    table = config.options()
    assert [row[0] for row in table] == option_keys(schema.Config)
    for key, kind, default, description in table:
        assert kind
        assert default
        assert description.strip()
        assert len(description.splitlines()) == 1
        (line,) = [p for p in printed if p.split()[:1] == [key]]
        assert f" {description} [{kind}, default {default}]" in line


def test_help_shows_the_defaults_that_a_run_without_arguments_has():
    shown = {key: default for key, _, default, _ in config.options()}
    cfg = load([])
    assert shown["optim.lr"] == str(cfg.optim.lr)
    assert shown["loss"] == cfg.loss["name"]
    assert shown["sampling.backend"] == cfg.sampling.backend["name"]


def test_steps_for_the_critic_alone_need_a_critic():
    assert "there is none: set critic.kind=head or network" in mistake("critic.warmup=3")
    assert load(["critic.warmup=3", "critic.kind=head", "advantage=gae"]).critic.warmup == 3


def test_an_advantage_that_is_always_zero_is_blamed_on_the_group_only_where_it_is_of_one(plugin):
    (plugin / "my.py").write_text(
        "def zero(rewards, values, mask, *, group_size):\n    return 0 * rewards, None\n"
    )
    with pytest.raises(UserError, match=r"choose sampling\.group_size >= 2"):
        algorithm.resolve_algorithm(load(["advantage=grpo", "sampling.group_size=1"]))
    with pytest.raises(UserError, match=r"with sampling\.group_size=8 is zero.*at its options"):
        algorithm.resolve_algorithm(load(["advantage=my.py:zero"]))


def test_a_kl_estimator_is_tried_wherever_it_is_used(plugin):
    (plugin / "my.py").write_text(
        "def mean(*arguments):\n    return (arguments[0] - arguments[1]).mean()\n"
        "def old(new, batch):\n    return (new.logprobs - batch.old_logprobs).sum(1)\n"
    )
    for options, shape in (
        (["kl_ref.coef=0.1", "kl_ref.estimator=my.py:mean"], r"\(\)"),
        (["kl_old.coef=0.1", "kl_old.estimator=my.py:old"], r"\(4,\)"),
    ):
        name = options[1].split("=")[0]
        with pytest.raises(UserError, match=rf"^{name}: must return a \(B, T\).*{shape}"):
            algorithm.resolve_algorithm(load(options))
    algorithm.resolve_algorithm(load(["kl_old.estimator=my.py:old"]))  # switched off: never called
