"""The names of TRL and verl: what an unknown key is answered with, and that the table is true."""

import json
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
from runs_fixture import ROOT

import rlkl
from rlkl import cli
from rlkl.errors import UserError
from rlkl.plugins import options_of
from rlkl.run.config import load, options
from rlkl.run.names import AROUND, TRAINER, TRL, TRL_AROUND, VERL, names
from rlkl.run.schema import Config
from rlkl.run.tables import TABLES
from rlkl.supervised.schema import SFTConfig

PAGE = ROOT / "docs" / "coming-from.md"
TRL_FIELDS = json.loads((ROOT / "tests/golden/trl_fields.json").read_text())  # of TRL 1.16
OLDER = {  # of TRL before 1.0 and of transformers 4, or of accelerate's part of a YAML file
    *("max_prompt_length", "warmup_ratio", "use_liger_loss"),
    *("logging_dir", "overwrite_output_dir", "save_safetensors"),
    *("accelerate_config", "config", "datasets", "env", "num_processes"),
}


def message(override: str, schema: type = Config) -> str:
    with pytest.raises(UserError) as error:
        load([override], schema=schema)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_an_unknown_key_of_trl_or_verl_is_answered_with_what_to_write_here():
    for override, answer in {
        "num_generations=8": "TRL's num_generations is sampling.group_size here",
        "beta=0.04": "TRL's beta is kl_ref.coef here: with kl_ref.place=loss",
        "train_dataset=x": "TRL's train_dataset is task here: {name: datasets, path: …}",
        "peft_config=x": "TRL's peft_config is lora.r here",
        "chat_template_kwargs={enable_thinking: 0}": "chat_template_kwargs is chat.template here",
        "model_init_kwargs={dtype: auto}": "TRL's model_init_kwargs has no counterpart here: only",
        "callbacks=[]": "TRL's callbacks has no counterpart here: the rows of a run",
        "learning_rate=1e-6": "TRL's learning_rate is optim.lr here",
        "optim.learning_rate=1e-6": "TRL's learning_rate is optim.lr here",
        "epsilon=0.2": "TRL's epsilon is loss.epsilon here",
        "loss.beta=0.1": "TRL's beta is kl_ref.coef here",
        "num_iterations=2": "TRL's num_iterations is optim.epochs here",
        "max_completion_length=256": "TRL's max_completion_length is sampling.max_new_tokens here",
        "use_vllm=true": "TRL's use_vllm has no counterpart here: there is no vLLM backend",
        "logging_steps=10": "TRL's logging_steps is log.every here",
        "actor_rollout_ref.rollout.n=8": "rollout.n is sampling.group_size here",
        "algorithm.adv_estimator=gae": "algorithm.adv_estimator is advantage here: gae,",
        "clip_ratio=0.2": "actor_rollout_ref.actor.clip_ratio is loss.epsilon here",
        "loss.clip_ratio=0.2": "actor_rollout_ref.actor.clip_ratio is loss.epsilon here",
        "critic.optim.lr=1e-5": "verl's critic.optim.lr is critic.lr here",
        "custom_reward_function.path=a": "custom_reward_function.path is reward.name here",
        "advantage.lam=0.9": "verl's algorithm.lam is advantage.lam here: of advantage=gae",
    }.items():
        assert answer in message(override), override


def test_a_misspelt_key_is_answered_with_the_one_that_is_meant():
    """Options of the functions that the configuration names are among them."""
    for override, answer in {
        "optim.lrr=1": "did you mean optim.lr?",
        "sampling.temprature=1": "did you mean sampling.temperature?",
        "group_size=4": "did you mean sampling.group_size?",
        "weight_decay2=1": "did you mean optim.weight_decay?",
        "epsilom=0.2": "did you mean loss.epsilon?",
        "loss.epsilom=0.2": "did you mean loss.epsilon?",
        "task={name: gsm8k, methd: strict}": "did you mean task.method?",
        "reward=[{name: repetition, wieght: 2, coeff: 1}]": "repetition has no option 'wieght'",
        "lr=1e-5": "did you mean optim.lr or critic.lr?",
        "kl.coef=1": "did you mean kl_ref.coef or kl_old.coef?",
    }.items():
        assert answer in message(override), override
    assert message("sprocket=1").startswith("unknown key sprocket; there is seed, device")
    assert "did you mean" not in message("sprocket=1")


def test_another_command_is_not_answered_with_names_of_the_trainer():
    assert "TRL" not in message("learning_rate=1", SFTConfig)
    assert message("optim.lrr=1", SFTConfig).endswith("did you mean optim.lr?")


def test_every_field_of_trl_is_in_the_table_once_with_its_default():
    """Those of GRPOConfig, of the classes it inherits from, and of TRL's command line."""
    theirs = {name: x for fields in TRL_FIELDS.values() for name, x in fields.items()}
    theirs |= TRL_FIELDS["GRPOConfig"]
    ours = [f.name for f in TRL] + list(TRL_AROUND)
    assert sorted(ours) == sorted({*theirs} | OLDER)
    assert {
        f.name: f.default for f in TRL if f.name in theirs and f.default != theirs[f.name]
    } == {}
    by_name = {f.name: f for f in TRL}
    assert [f.name for f in TRL if f.only_with and f.only_with not in by_name] == []
    assert [f.name for f in TRL if not f.here and not f.note] == []


def test_every_option_that_the_table_names_exists():
    known = {row[0] for row in options()} | {"loss", "advantage", "selector", "reward", "task"}
    for key, table in TABLES.items():
        known |= {f"{key}.{o}" for function in table.values() for o in options_of(function)}
        known.add(f"{key}.name")
    sections = {key.split(".")[0] for key in known}
    unknown = []
    for name in names():
        for text in (name.here, name.note):
            for word in re.findall(r"(?<![\w./'])[a-z_]+(?:\.[a-z_]+)+", text):
                if word.split(".")[0] in sections and word not in known:
                    unknown.append((name.name, word))
        if name.library == "verl" or name.name not in TRL_AROUND:
            words = re.split(r" and ", name.here) if name.here else []
            unknown += [
                (name.name, w)
                for w in words
                if w not in known and w not in ("chat", "optim", "seed")
            ]
    assert unknown == []


# ------------------------------------------------------------------ docs/coming-from.md


def code(text: str) -> str:
    """An option, or two of them, as code."""
    return " and ".join(f"`{word}`" for word in text.split(" and "))


def trl_table() -> str:
    """The fields that have an option here; then the others, by the reason why they have none."""
    lines = ["| TRL | default | here | |", "|---|---|---|---|"]
    reasons = defaultdict(list)
    for f in TRL:
        if f.here:
            default = "" if f.default is None else f"`{f.default}`"
            lines.append(f"| `{f.name}` | {default} | {code(f.here)} | {f.note} |")
        else:
            reasons[f.note].append(f"`{f.name}`")
    lines += ["", "| not here | why |", "|---|---|"]
    lines += [f"| {', '.join(fields)} | {why} |" for why, fields in reasons.items()]
    named = [f"`{name}` ({code(here)})" for name, here in TRL_AROUND.items() if here]
    others = [f"`{name}`" for name, here in TRL_AROUND.items() if not here]
    text = f"These are accepted, and {AROUND.replace('it does', 'do')}: "
    lines += ["", text + ", ".join(named + others) + "."]
    lines += ["", "Arguments of `GRPOTrainer` itself:", "", "| TRL | here | |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {code(here) if here else ''} | {note} |" for name, here, note in TRAINER
    ]
    return "\n".join(lines)


def verl_table() -> str:
    lines = ["| verl | here | |", "|---|---|---|"]
    for name, here, note in VERL:
        lines.append(f"| `{name}` | {code(here) if here else 'not here'} | {note} |")
    return "\n".join(lines)


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("trl", trl_table()), ("verl", verl_table())):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def test_the_tables_of_the_page_are_those_of_the_code():
    """`python tests/test_names.py` writes them."""
    assert page() == PAGE.read_text(encoding="utf-8")


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    (override,) = re.findall(r"^    python train.py configs/\S+ (\S+=\S+)$", text, re.M)
    error, shown = re.findall(r"```text\n(.*?)```", text, re.S)
    assert error == f"error: {message(override)}\n"
    (file,) = re.findall(r"```yaml\n# trl.yaml\n(.*?)```", text, re.S)
    (tmp_path / "trl.yaml").write_text(file)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^    rlkl (explain --trl .*) > ours.yaml$", text, re.M)
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line not in printed.splitlines()] == []
    assert len(shown.splitlines()) == 9  # as the page says
    (tmp_path / "ours.yaml").write_text(printed)
    assert load(["ours.yaml"]).task == {"name": "addition"}


def test_the_call_on_the_page_is_a_valid_one(monkeypatch):
    """Up to the model and the dataset, which are on the hub."""
    started = SimpleNamespace(train=lambda cfg, command: cfg)
    monkeypatch.setattr("rlkl.run.from_python.trainer", lambda: started)
    (call,) = re.findall(r"```python\nrun = (rlkl.train.*?)```", PAGE.read_text("utf-8"), re.S)
    cfg = eval(call, {"rlkl": rlkl, "accuracy_reward": lambda completions, solution: [0.0]})
    assert cfg.model.name == "Qwen/Qwen3-0.6B"
    assert (cfg.task["path"], cfg.lora.r, cfg.optim.lr) == ("trl-lib/DeepMath-103K", 16, 1e-5)
    assert cfg.reward["name"].startswith("python:")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
