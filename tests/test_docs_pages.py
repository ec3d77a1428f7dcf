"""docs/kl.md, ppo.md, grpo.md, extend.md, metrics.md: numbers recomputed, equations parsed, commands and code run."""

import contextlib
import difflib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.mathtext import MathTextParser
from models import prompts, rule, tiny_policy, uniforms
from runs_fixture import ROOT, SMALL, rows
from test_kl import F64, P_NATS, Q_NATS, enumerated, grad, gradients, kl

import train
from rlkl import cli, config, dynamic
from rlkl.algorithm import algorithm, updates
from rlkl.explain.tabular import TREE, probabilities
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES, REFUSED, TRAPS, k1, k3
from rlkl.losses import LOSSES, clipped_surrogate, token_weights
from rlkl.rollout import naive

pytest_plugins = ("runs_fixture",)

NAMES = ("kl.md", "ppo.md", "grpo.md", "extend.md", "metrics.md")
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in NAMES}
EVERY_PAGE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# What every page keeps
@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_short_in_lines_and_in_columns(name):
    prose = re.sub(r"^```.*?^```|^    .*?$|^\|.*?$", "", PAGES[name], flags=re.S | re.M)
    assert len(PAGES[name].splitlines()) <= 150
    for line in re.sub(r"\[\S+\]\(\S+\)\S?", "", prose).splitlines():  # a link cannot be broken
        assert len(line) <= 125, line


def slugs(page: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda p: p.name)
def test_every_anchor_that_a_link_of_a_page_names_is_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert anchor in slugs(page.parent / target if target else page), f"{target}#{anchor}"


EQUATIONS = [(n, x) for n, text in PAGES.items() for x in re.findall(r"^```math\n(.*?)^```", text, re.S | re.M)]


@pytest.mark.parametrize(("name", "equation"), EQUATIONS)
def test_an_equation_is_sound_tex(name, equation):
    """It parses; and it is of one line, so that a forge has nothing else to read into it."""
    assert len(equation.splitlines()) == 1
    MathTextParser("path").parse(f"${equation.strip()}$")


def test_a_broken_equation_would_be_noticed():
    with pytest.raises(ValueError, match="Expected"):
        MathTextParser("path").parse(r"$\frac{1}{2$")
    assert len(EQUATIONS) >= 14


COMMANDS = [(n, x) for n, text in PAGES.items() for x in re.findall(r"^    python train.py (configs/.*)$", text, re.M)]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_config_of_a_command_is_one(name, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    file, *options = command.split()
    algorithm(config.load([str(ROOT / file), *options]))


# kl.md
def table(name: str, title: str, header: str) -> list[list[str]]:
    """The cells of the table under a heading whose first row starts with `header`."""
    body = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGES[name], re.S | re.M)[1]
    lines = body[body.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_snippet_of_the_kl_page_prints_what_stands_below_it():
    code, printed = (re.search(rf"```{kind}\n(.*?)```", PAGES["kl.md"], re.S)[1] for kind in ("python", "text"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed


def test_every_number_of_the_kl_page_is_recomputed():
    """Those of the snippet are printed by it; the table's are moments of k1, k2 and k3 under P."""
    p, u = P_NATS.exp(), P_NATS - Q_NATS
    found = {row[0].split(":")[1].split("]")[0]: row[3:5] for row in table("kl.md", "Estimators: the value", "| value")}
    for name, estimator in KL.items():
        x = estimator(P_NATS, Q_NATS)
        mean = (p * x).sum()
        std = (p * (x - mean).square()).sum().sqrt()
        assert found[name] == [f"{mean:.6f}", f"{std:.6f}"]
    assert found["exact_pi_ref"] == [f"{(p * u).sum():.6f}", "0"]
    prose = re.sub(r"^```.*?^```|^    .*?$", "", PAGES["kl.md"], flags=re.S | re.M)
    terms = {f"{x:.6f}" for x in (p * u).tolist()} | {f"{(p * u).sum() / torch.tensor(2.0).log():.6f}"}
    options = {"0.01"}  # kl_old.target
    wrong = {"0.0915"}  # the note's
    decimals = set(re.findall(r"-?\b\d+\.\d+", re.sub(r"arXiv:\S+", "", prose)))
    assert decimals <= {x for pair in found.values() for x in pair} | terms | options | wrong


def test_kl_is_not_negative_by_jensen_and_not_term_by_term():
    """Terms P log(P/Q) are negative, -0.081 in the example; P (x - 1 - log x), of the same sum, are not. The mean of
    -log is at least -log of the mean."""
    p, q = P_NATS.exp(), Q_NATS.exp()
    terms = p * k1(P_NATS, Q_NATS)
    assert float(terms.min()) == pytest.approx(-0.081093, abs=5e-7)
    held = p * k3(P_NATS, Q_NATS)
    assert (held >= 0).all()
    torch.testing.assert_close(held.sum(), terms.sum())
    assert float(terms.sum()) > float(-(p * q / p).sum().log()) - 1e-15
    torch.testing.assert_close((p * q / p).sum(), torch.ones((), dtype=F64))


def test_samples_of_the_policy_estimate_the_kl_whose_first_argument_it_is():
    """E_pi[log pi - log ref] = KL(pi || ref); with samples of ref the same log-ratio gives minus the other one."""
    pi, ref = P_NATS, Q_NATS
    torch.testing.assert_close((pi.exp() * k1(pi, ref)).sum(), kl(pi, ref))
    torch.testing.assert_close((ref.exp() * k1(pi, ref)).sum(), -kl(ref, pi))
    assert abs(float(kl(pi, ref) - kl(ref, pi))) > 1e-3


def test_the_kl_of_a_reply_is_the_mean_sum_of_the_kls_of_its_tokens():
    """The chain rule, over all nine replies of two tokens: by u, and by the KL of each state."""
    game = TREE
    table = game.table + torch.randn(game.table.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    pi, ref = probabilities(game, table), probabilities(game, game.table)
    whole = (pi * (pi / ref).log()).sum()

    def first(x):
        return x.view(3, 3).sum(1)

    by_state = (first(pi) * (first(pi) / first(ref)).log()).sum()
    given = [(x.view(3, 3) / first(x)[:, None]) for x in (pi, ref)]
    by_state += (first(pi) * (given[0] * (given[0] / given[1]).log()).sum(1)).sum()
    torch.testing.assert_close(by_state, whole)
    assert float(whole) > 0.1


IN_THE_LOSS = table("kl.md", "Estimators: the gradient", "`kl_ref.estimator` | on-policy")
IN_THE_REWARD = table("kl.md", "Estimators: the gradient", "`kl_ref.estimator` | leads")


def test_the_tables_name_every_estimator_once_and_every_trap():
    loss, reward = ([re.findall(r"`([^`]+)`", row[0]) for row in t] for t in (IN_THE_LOSS, IN_THE_REWARD))
    assert sorted(n for names in loss for n in names) == sorted({*KL_LOSSES, "k1"})
    assert sorted(n for names in reward for n in names) == sorted(
        {*KL, *(name for place, name in REFUSED if place == "reward")})
    for place, names, rows_ in (("loss", loss, IN_THE_LOSS), ("reward", reward, IN_THE_REWARD)):
        for each, row in zip(names, rows_, strict=True):
            for name in each:
                assert ("refused" in " ".join(row)) == ((place, name) in REFUSED), name
                assert ("said at the start" in " ".join(row)) == ((place, name) in TRAPS), name


@pytest.mark.parametrize("row", IN_THE_LOSS[1:], ids=lambda row: row[0].split("`")[1])
def test_each_row_of_the_loss_table_has_its_gradient_and_is_stale_or_not(row):
    """By enumeration of a vocabulary, on-policy and from another pi_old; and of replies of two tokens, whether it is
    about the reply or about each token."""
    name = row[0].split("`")[1]
    got, want = gradients(KL_LOSSES[name], 0, on_policy=True)
    assert (float((got - want).abs().max()) < 1e-12) == (row[2] == "the reply")
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=g, dtype=F64, requires_grad=True)
    ref, old = torch.randn(2, 7, generator=g, dtype=F64).log_softmax(-1)
    pi = logits.log_softmax(-1)
    squares = (pi.exp() * (pi - ref).square() / 2).sum()
    target = {"KL(pi": kl(pi, ref), "KL(re": kl(ref, pi), "E_pi[": squares}[row[1][:5]]

    def off(sampled):
        new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=sampled)
        expected = (sampled.exp()[:, None] * KL_LOSSES[name](new, batch)).sum()
        return float((grad(expected, logits) - grad(target, logits)).norm() / grad(target, logits).norm())

    assert off(pi.detach()) < 1e-12
    assert (off(old) < 1e-12) == (row[3] == "yes")
    assert row[3] == "yes" or off(old) > 0.1


# The note's PPO and GRPO
def test_ppos_two_objectives_are_two_configurations():
    """Eq. 7 has a clip and no KL, eq. 8 the KL(pi_old || pi) and no clip; that KL is not KL(pi || pi_old)."""
    clipped = config.load([str(ROOT / "configs/tiny-ppo.yaml")])
    assert (clipped.kl_old.coef, clipped.loss["clip"]) == (0, 0.2)
    command = next(c for n, c in COMMANDS if n == "ppo.md" and "kl_old.target" in c)
    file, *options = command.split()
    penalty = config.load([str(ROOT / file), *options])
    assert penalty.kl_old.coef == 1
    logits, old = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    logits.requires_grad_()
    pi, old = logits.log_softmax(-1), old.log_softmax(-1)
    far = clipped_surrogate(pi, old, torch.ones_like(pi), penalty.loss["clip"], penalty.loss["clip"])[0]
    torch.testing.assert_close(far, -(pi - old).exp())  # -w A, whatever w is
    new, batch = enumerated(pi, old_logprobs=old)
    found = grad((old.exp()[:, None] * KL_OLD_LOSSES[penalty.kl_old.estimator](new, batch)).sum(), logits)
    torch.testing.assert_close(found, grad(kl(old, pi), logits))
    assert (found - grad(kl(pi, old), logits)).norm() > 0.1 * found.norm()


def test_without_one_over_g_the_step_would_grow_with_the_group():
    """Every reply twice: the weighted sum is what it was, the bare one is doubled. Any length counts alike."""
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    per_token = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    sums = []
    for copies in (1, 2):
        m, x = mask.repeat(copies, 1), per_token.repeat(copies, 1)
        w = token_weights(m, "sequence", 5)
        torch.testing.assert_close(w.sum(1), torch.full((4 * copies,), 1 / (4 * copies), dtype=F64))
        sums.append(((w * x)[m].sum(), (x / m.sum(1, keepdim=True))[m].sum()))
    torch.testing.assert_close(sums[1][0], sums[0][0])
    torch.testing.assert_close(sums[1][1], 2 * sums[0][1])


# ppo.md, grpo.md
def test_the_diff_of_the_two_configs_is_their_diff():
    told = re.search(r"```diff\n(.*?)```", PAGES["grpo.md"], re.S)[1].splitlines()
    files = ([line for line in (ROOT / f"configs/tiny-{name}.yaml").read_text(encoding="utf-8").splitlines()
              if not line.startswith("#")] for name in ("ppo", "grpo"))
    assert told == list(difflib.unified_diff(*files, lineterm="", n=99))[3:]


def test_the_replies_and_updates_of_the_two_configs_are_those_the_page_says():
    said = re.search(r"PPO makes (\d+) updates of its (\d+) replies, GRPO at most (\d+) of its (\d+)", PAGES["grpo.md"])
    found = []
    for name in ("ppo", "grpo"):
        cfg = config.load([str(ROOT / f"configs/tiny-{name}.yaml")])
        found += [updates(cfg), cfg.sampling.prompts * cfg.sampling.group_size]
    assert [int(x) for x in said.groups()] == found


RELATIVES = table("grpo.md", "Relatives that are a configuration", "")


@pytest.mark.parametrize("row", RELATIVES, ids=lambda row: row[0].split(":")[0])
def test_each_relative_is_a_configuration(row):
    algorithm(config.load([str(ROOT / "configs/tiny-grpo.yaml"), *row[1].strip("`").split()]))


@pytest.mark.parametrize("name", ["ppo.md", "grpo.md"])
def test_a_page_goes_in_the_order_of_the_code(name):
    steps = re.findall(r"^## \d\. (\w+)$", PAGES[name], re.M)
    code = re.findall(r"^    # \d\. (\w+)[:,.]", Path(train.__file__).read_text(encoding="utf-8"), re.M)
    assert steps == code == ["Act", "Judge", "Evaluate", "Credit", "Learn", "Report"]


# extend.md
SNIPPETS = {code.split()[1].rstrip(":"): code for code in re.findall(r"```python\n(.*?)```", PAGES["extend.md"], re.S)}
TRAIN = [command for name, command in COMMANDS if name == "extend.md"]


def write_snippets(folder: Path) -> None:
    for file, code in SNIPPETS.items():
        (folder / file).write_text(code, encoding="utf-8")


def test_every_plug_in_of_the_page_is_one_file_of_at_most_fifteen_lines_of_code():
    assert list(SNIPPETS) == ["my_loss.py", "my_advantage.py", "my_reward.py", "my_task.py", "my_sampler.py"]
    for code in SNIPPETS.values():
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
    assert [re.search(r"my_\w+\.py", c)[0] for c in TRAIN] == list(SNIPPETS)


@pytest.mark.parametrize("command", TRAIN, ids=lambda c: re.search(r"my_\w+", c)[0])
def test_a_plug_in_of_the_page_trains_by_the_command_under_it(command, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    file, *options = command.split()
    small = [o for o in SMALL if not o.startswith("task") or "my_task" not in command]
    argv = [str(ROOT / file), f"model.name={base}", *small, "optim.minibatch=8", "optim.steps=1", "eval.every=0",
            "scoring.processes=0", "sampling.unanimous=keep", "run=out", *options]
    assert train.main(argv) == 0
    assert len(rows(Path("out"))) == 1
    assert (tmp_path / "out" / "plugins" / re.search(r"my_\w+\.py", command)[0]).exists()


def test_the_plug_ins_of_the_page_keep_the_contract_by_the_commands_under_them(tmp_path):
    """All four in one run of the tests: every check that there is, and none that is only told of."""
    write_snippets(tmp_path)
    found = re.findall(r"^    pytest tests/contract.py (--\w+ \S+)$", PAGES["extend.md"], re.M)
    assert len(found) == 4
    options = [word for each in found for word in each.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "contract.py")]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "failed" not in done.stdout
    assert "xfailed" not in done.stdout


def test_the_loss_of_the_page_is_explained_by_the_command_under_it(tmp_path, monkeypatch, capsys):
    """Its gradient past the clip is the slope the other way."""
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    command, = re.findall(r"^    rlkl (explain) (\S+) (.*)$", PAGES["extend.md"], re.M)
    assert cli.main([command[0], str(ROOT / command[1]), *command[2].split()]) == 0
    assert "A > 0: 0.5 and -0.6, A < 0: -0.15 and 2" in capsys.readouterr().out


def test_the_sampler_of_the_page_gives_the_tokens_of_naive(tmp_path, monkeypatch):
    """In float64, in parts that do not divide the prompts, at a temperature."""
    from test_rollout import assert_same

    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    sampler = config.resolve({"name": "my_sampler.py:in_parts", "prompts": 2}, {}, "sampling.backend")
    policy, (ids, mask) = tiny_policy("llama", torch.float64), prompts()
    assert len(ids) % 2, "one part must be smaller than the others"
    u = uniforms(4 * len(ids), 12, seed=5)
    assert_same(sampler(policy, ids, mask, u, rule(0.7)), naive(policy, ids, mask, u, rule(0.7)), 1e-12)


def test_the_advantage_of_the_page_is_what_its_first_line_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    median = config.resolve({"name": "my_advantage.py:median"}, {}, "advantage")
    mask = torch.tensor([[True], [True], [True], [False], [True], [True]])
    scores = torch.tensor([[1.0], [2.0], [90.0], [7.0], [3.0], [5.0]])
    assert median(scores, None, mask, group_size=3)[0].flatten().tolist() == [-1, 0, 88, 0, 0, 2]  # row 3 is not there


# metrics.md
GRADED = '''import torch

from reward import Digits


class Graded(Digits):
    def grade(self, example, reply):
        return {"long": float(len(reply) > 2)}
'''


def named_metrics() -> dict[str, str]:
    """{metric: its row} of every table of the page."""
    lines = [line for line in PAGES["metrics.md"].splitlines() if line.startswith("| `")]
    return {name: line for line in lines for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def as_named(key: str) -> str:
    """reward/brevity is reward/PART on the page."""
    kind, _, rest = key.partition("/")
    if kind == "reward" and rest:
        return "reward/PART"
    return "heldout/NAME" if kind == "heldout" and rest != "accuracy" else key


@pytest.fixture(scope="module")
def two_runs(base, tmp_path_factory):
    """The keys of two steps of tiny-ppo and of tiny-grpo with a KL, parts of the reward and grades of the task."""
    from runs_fixture import furnish

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("metrics"))
        furnish(Path.cwd())
        patch.syspath_prepend(str(Path.cwd()))
        Path("graded.py").write_text(GRADED, encoding="utf-8")
        small = [option for option in SMALL if not option.startswith("task")]
        for name, options in (("ppo", ["sampling.group_size=1", "optim.minibatch=4"]),
                              ("grpo", ["task=graded.py:Graded", "overlong.buffer=2", "optim.minibatch=null"])):
            argv = [str(ROOT / f"configs/tiny-{name}.yaml"), f"model.name={base}", *small, "optim.steps=2", *options,
                    "reward=reward.py:digits", "scoring.processes=0", f"run={name}"]
            assert train.main(argv) == 0
            found[name] = rows(Path(name))
    return found


def test_the_page_names_exactly_the_metrics_that_runs_write(two_runs):
    """Those of the two runs, with the diagnostics of every other loss."""
    import contract

    written = {as_named(key) for run in two_runs.values() for row in run for key in row}
    for loss in LOSSES.values():
        written |= set(loss(*contract.problem())[1])
    written |= {"refilled", *dynamic.solved({})}  # of sampling.unanimous=refill and sampling.curriculum
    assert set(named_metrics()) == written - {"step", "sample"}
    assert {"explained_variance", "heldout/NAME", "reward/PART", "kl_pi_ref_seq", "grad_norm/critic"} <= written


def test_with_one_update_a_rollout_ratio_and_clip_are_what_the_page_says(two_runs):
    """pi_old is scored apart, as the KL in the reward needs it: in other micro-batches a log-prob is rounded anew."""
    said = named_metrics()
    assert all("with one update a rollout 1 to rounding" in said[name] for name in ("ratio", "ratio_max"))
    assert "with one update a rollout exactly 0" in said["clip_fraction"]
    for row in two_runs["grpo"]:
        assert row["updates"] == 1
        assert (row["ratio"], row["ratio_max"]) == pytest.approx((1, 1), abs=1e-5)
        assert row["clip_fraction"] == 0


def test_the_sequences_kl_is_the_tokens_times_the_mean_length(two_runs):
    """As metrics.md and kl.md say, in a run in which no group is dropped."""
    for row in two_runs["ppo"]:
        assert row["kl_pi_ref_seq"] == pytest.approx(row["kl_pi_ref_tok"] * row["length"], abs=1e-9)
