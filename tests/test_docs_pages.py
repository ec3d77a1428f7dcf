"""docs/kl.md, ppo.md, grpo.md, extend.md, metrics.md: numbers, equations, commands and code."""

import contextlib
import difflib
import io
import re
import subprocess
import sys
from pathlib import Path

import contract
import pytest
import torch
from matplotlib.mathtext import MathTextParser
from models import prompts, sampling_params, tiny_policy, uniforms
from runs_fixture import ROOT, SMALL, furnish, rows
from test_kl import F64, P_NATS, Q_NATS, enumerated, grad, gradients, kl
from test_rollout import assert_same

import train
from rlkl import cli
from rlkl.explain.tabular import TREE, probabilities
from rlkl.kl import KL, KL_LOSSES, REFUSED, TRAPS, k1, k3
from rlkl.losses import LOSSES, token_weights
from rlkl.plugins import resolve
from rlkl.rollout import naive
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm, updates_per_rollout
from rlkl.run.dynamic_sampling import solved_fractions
from rlkl.run.terminal import COLUMNS
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)

NAMES = ("kl.md", "ppo.md", "grpo.md", "extend.md", "metrics.md")
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in NAMES}
EVERY_PAGE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[name], re.S | re.M)


# ------------------------------------------------------------------ all pages


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_anchor_that_a_link_names_is_a_heading():
    missing = []
    for page in EVERY_PAGE:
        links = re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            if "://" not in target:
                linked = page.parent / target if target else page
                if anchor not in anchors(linked):
                    missing.append(f"{page.name}: {target}#{anchor}")
    assert missing == []


def test_every_equation_is_one_line_of_valid_tex():
    equations = [(name, equation) for name in NAMES for equation in blocks(name, "math")]
    assert len(equations) >= 14
    for name, equation in equations:
        assert len(equation.splitlines()) == 1, name  # GitHub reads line breaks as Markdown
        MathTextParser("path").parse(f"${equation.strip()}$")
    with pytest.raises(ValueError, match="Expected"):
        MathTextParser("path").parse(r"$\frac{1}{2$")


COMMANDS = [
    (name, command)
    for name, text in PAGES.items()
    for command in re.findall(r"^    python train.py (configs/.*)$", text, re.M)
]


def test_every_command_of_a_page_names_a_valid_configuration(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    assert len(COMMANDS) >= 9
    for _, command in COMMANDS:
        file, *options = command.split()
        resolve_algorithm(config.load([str(ROOT / file), *options]))


# ------------------------------------------------------------------ kl.md


def table(name: str, title: str, header: str) -> list[list[str]]:
    """The cells of the table under a heading, whose first row starts with `header`."""
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
    body = re.search(pattern, PAGES[name], re.S | re.M)[1]
    lines = body[body.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_snippet_of_the_kl_page_prints_what_the_page_shows():
    (code,) = blocks("kl.md", "python")
    (shown,) = blocks("kl.md", "text")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == shown


def test_every_number_of_the_kl_page_is_recomputed():
    """The table has moments of k1, k2 and k3 under P. The snippet's numbers are printed by it."""
    p, u = P_NATS.exp(), P_NATS - Q_NATS
    shown = {}
    for row in table("kl.md", "Estimators: the value", "| value"):
        shown[re.search(r":(\w+)\]", row[0])[1]] = row[3:5]
    for name, estimator in KL.items():
        x = estimator(P_NATS, Q_NATS)
        mean = (p * x).sum()
        std = (p * (x - mean).square()).sum().sqrt()
        assert shown[name] == [f"{mean:.6f}", f"{std:.6f}"]
    assert shown["exact_pi_ref"] == [f"{(p * u).sum():.6f}", "0"]

    allowed = {number for cells in shown.values() for number in cells}
    allowed |= {f"{term:.6f}" for term in (p * u).tolist()}
    allowed.add(f"{(p * u).sum() / torch.tensor(2.0).log():.6f}")  # in bits
    allowed |= {"0.01", "0.0915"}  # kl_old.target, and the note's wrong number
    prose = re.sub(r"^```.*?^```|^    .*?$", "", PAGES["kl.md"], flags=re.S | re.M)
    decimals = set(re.findall(r"-?\b\d+\.\d+", re.sub(r"arXiv:\S+", "", prose)))
    assert decimals - allowed == set()


def test_kl_is_not_negative_by_jensen_and_not_term_by_term():
    """A term P log(P/Q) may be negative; P (x - 1 - log x), which have the same sum, are not."""
    p, q = P_NATS.exp(), Q_NATS.exp()
    terms = p * k1(P_NATS, Q_NATS)
    assert float(terms.min()) == pytest.approx(-0.081093, abs=5e-7)
    other_terms = p * k3(P_NATS, Q_NATS)
    assert (other_terms >= 0).all()
    torch.testing.assert_close(other_terms.sum(), terms.sum())
    log_of_mean = float(-(p * q / p).sum().log())
    assert float(terms.sum()) > log_of_mean - 1e-15  # Jensen
    torch.testing.assert_close((p * q / p).sum(), torch.ones((), dtype=F64))


def test_samples_of_the_policy_estimate_the_kl_whose_first_argument_it_is():
    """E_pi[log pi - log ref] = KL(pi || ref); under ref its mean is -KL(ref || pi)."""
    pi, ref = P_NATS, Q_NATS
    torch.testing.assert_close((pi.exp() * k1(pi, ref)).sum(), kl(pi, ref))
    torch.testing.assert_close((ref.exp() * k1(pi, ref)).sum(), -kl(ref, pi))
    assert abs(float(kl(pi, ref) - kl(ref, pi))) > 1e-3


def test_the_kl_of_a_response_is_the_mean_sum_of_the_kls_of_its_tokens():
    """The chain rule over all nine responses of two tokens: by u, and by the KL of each state."""
    rng = torch.Generator().manual_seed(0)
    table = TREE.table + torch.randn(TREE.table.shape, generator=rng, dtype=F64)
    pi, ref = probabilities(TREE, table), probabilities(TREE, TREE.table)
    whole = (pi * (pi / ref).log()).sum()

    def first(x):
        """(3,) the probability of each first token."""
        return x.view(3, 3).sum(1)

    def second(x):
        """(3, 3) the probability of each second token given the first."""
        return x.view(3, 3) / first(x)[:, None]

    kl_first = (first(pi) * (first(pi) / first(ref)).log()).sum()
    kl_second = (second(pi) * (second(pi) / second(ref)).log()).sum(1)
    torch.testing.assert_close(kl_first + (first(pi) * kl_second).sum(), whole)
    assert float(whole) > 0.1


IN_THE_LOSS = table("kl.md", "Estimators: the gradient", "`kl_ref.estimator` | on-policy")
IN_THE_REWARD = table("kl.md", "Estimators: the gradient", "`kl_ref.estimator` | leads")


def test_the_tables_name_every_estimator_once_and_every_trap():
    tables = {"loss": IN_THE_LOSS, "reward": IN_THE_REWARD}
    names = {
        place: [name for row in cells for name in re.findall(r"`([^`]+)`", row[0])]
        for place, cells in tables.items()
    }
    refused_in_reward = {name for place, name in REFUSED if place == "reward"}
    assert sorted(names["loss"]) == sorted({*KL_LOSSES, "k1"})
    assert sorted(names["reward"]) == sorted({*KL, *refused_in_reward})
    for place, cells in tables.items():
        for row in cells:
            for name in re.findall(r"`([^`]+)`", row[0]):
                text = " ".join(row)
                assert ("refused" in text) == ((place, name) in REFUSED), name
                assert ("a run warns" in text) == ((place, name) in TRAPS), name


def test_each_row_of_the_loss_table_has_its_gradient_and_is_stale_or_not():
    """By enumeration of a vocabulary, on-policy and off-policy, and of responses of two tokens."""
    for estimator, gradient_of, of_what, stale in IN_THE_LOSS[1:]:
        term = KL_LOSSES[estimator.split("`")[1]]
        got, right = gradients(term, 0, on_policy=True)
        of_the_response = float((got - right).abs().max()) < 1e-12
        assert of_the_response == (of_what == "the response"), estimator

        rng = torch.Generator().manual_seed(1)
        logits = torch.randn(7, generator=rng, dtype=F64, requires_grad=True)
        ref, old = torch.randn(2, 7, generator=rng, dtype=F64).log_softmax(-1)
        pi = logits.log_softmax(-1)
        targets = {
            "KL(pi": kl(pi, ref),
            "KL(re": kl(ref, pi),
            "E_pi[": (pi.exp() * (pi - ref).square() / 2).sum(),
        }
        target = grad(targets[gradient_of[:5]], logits)

        def error(sampled, term=term, pi=pi, ref=ref, logits=logits, target=target):
            """The relative error of the expected gradient on samples of this policy."""
            new, batch = enumerated(pi, ref_logprobs=ref, old_logprobs=sampled)
            expected = (sampled.exp()[:, None] * term(new, batch)).sum()
            return float((grad(expected, logits) - target).norm() / target.norm())

        assert error(pi.detach()) < 1e-12, estimator
        assert (error(old) < 1e-12) == (stale == "yes"), estimator
        assert stale == "yes" or error(old) > 0.1, estimator


def test_ppos_two_objectives_are_two_configurations():
    """Eq. 7 has a clip and no KL; eq. 8 has KL(pi_old || pi), not KL(pi || pi_old), and no clip."""
    clipped = config.load([str(ROOT / "configs/tiny-ppo.yaml")])
    assert (clipped.kl_old.coef, clipped.loss["epsilon"]) == (0, 0.2)
    (command,) = [c for name, c in COMMANDS if name == "ppo.md" and "kl_old.target" in c]
    file, *options = command.split()
    penalty = config.load([str(ROOT / file), *options])
    algorithm = resolve_algorithm(penalty)
    assert penalty.kl_old.coef == 1

    rng = torch.Generator().manual_seed(0)
    logits, old = torch.randn(2, 7, generator=rng, dtype=F64)
    logits.requires_grad_()
    pi, old = logits.log_softmax(-1), old.log_softmax(-1)
    new, batch = enumerated(pi, old_logprobs=old)
    batch.advantages = torch.ones_like(new.logprobs)
    loss, _ = algorithm.policy_loss(new, batch)
    torch.testing.assert_close(loss[:, 0], -(pi - old).exp())  # -w A, whatever w is
    gradient = grad((old.exp()[:, None] * algorithm.kl_old(new, batch)).sum(), logits)
    torch.testing.assert_close(gradient, grad(kl(old, pi), logits))
    assert (gradient - grad(kl(pi, old), logits)).norm() > 0.1 * gradient.norm()


def test_without_one_over_g_the_step_would_grow_with_the_group():
    """With every response twice, the weighted sum stays the same and the bare one doubles."""
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    per_token = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)

    def sums(copies):
        m, x = mask.repeat(copies, 1), per_token.repeat(copies, 1)
        weights = token_weights(m, "sequence", 5)
        each = torch.full((4 * copies,), 1 / (4 * copies), dtype=F64)
        torch.testing.assert_close(weights.sum(1), each)  # whatever its length
        return (weights * x)[m].sum(), (x / m.sum(1, keepdim=True))[m].sum()

    weighted, bare = sums(1)
    weighted_twice, bare_twice = sums(2)
    torch.testing.assert_close(weighted_twice, weighted)
    torch.testing.assert_close(bare_twice, 2 * bare)


# ------------------------------------------------------------------ ppo.md, grpo.md


def test_the_pages_follow_the_functions_of_a_step():
    """training_step calls them in this order, and train.py defines them in this order."""
    step = ["generate_and_score", "evaluate_logprobs", "compute_advantages", "update_policy"]
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    definitions = [source.index(f"\ndef {name}(") for name in [*step, "objective"]]
    assert definitions == sorted(definitions)
    body = source.split("def training_step(")[1].split("\ndef ")[0]
    calls = [body.index(f"{name}(") for name in ["algorithm.rollout", *step[1:]]]
    assert calls == sorted(calls)
    for name in ("ppo.md", "grpo.md"):
        page = PAGES[name]
        links = [page.index(f"[train.py:{function}]") for function in [*step, "objective"]]
        assert links == sorted(links), name
        titles = re.findall(r"^## (\d)\. ([\w-]+)", page, re.M)
        assert [number for number, _ in titles] == list("123456"), name
        expected = ["Generate", "Score", "Log-probs", "Advantages", "Update", "Metrics"]
        assert [title for _, title in titles] == expected, name


def test_the_diff_of_the_two_configs_is_their_diff():
    (shown,) = blocks("grpo.md", "diff")
    lines = []
    for name in ("ppo", "grpo"):
        text = (ROOT / f"configs/tiny-{name}.yaml").read_text(encoding="utf-8")
        lines.append([line for line in text.splitlines() if not line.startswith("#")])
    diff = list(difflib.unified_diff(*lines, lineterm="", n=99))
    assert shown.splitlines() == diff[3:]


def test_the_responses_and_updates_of_the_two_configs_are_those_on_the_page():
    text = " ".join(PAGES["grpo.md"].split())
    sentence = (
        r"PPO makes (\d+) updates with its (\d+) responses, GRPO at most (\d+) with its (\d+)"
    )
    numbers = []
    for name in ("ppo", "grpo"):
        cfg = config.load([str(ROOT / f"configs/tiny-{name}.yaml")])
        numbers += [updates_per_rollout(cfg), cfg.sampling.rows]
    assert [int(x) for x in re.search(sentence, text).groups()] == numbers


def test_each_relative_of_grpo_is_a_configuration():
    relatives = table("grpo.md", "Relatives that are a configuration", "")
    assert len(relatives) >= 4
    for _, options in relatives:
        argv = [str(ROOT / "configs/tiny-grpo.yaml"), *options.strip("`").split()]
        resolve_algorithm(config.load(argv))


# ------------------------------------------------------------------ extend.md

SNIPPETS = {code.split()[1].rstrip(":"): code for code in blocks("extend.md", "python")}
TRAIN = [command for name, command in COMMANDS if name == "extend.md"]


def write_snippets(folder: Path) -> None:
    """Write every plug-in of the page into the folder."""
    for file, code in SNIPPETS.items():
        (folder / file).write_text(code, encoding="utf-8")


def test_every_plug_in_of_the_page_has_a_command_that_trains_with_it():
    kinds = ["loss", "advantage", "reward", "task", "sampler"]
    assert list(SNIPPETS) == [f"my_{kind}.py" for kind in kinds]
    assert [re.search(r"my_\w+\.py", command)[0] for command in TRAIN] == list(SNIPPETS)


@pytest.mark.parametrize("command", TRAIN, ids=lambda c: re.search(r"my_\w+", c)[0])
def test_a_plug_in_of_the_page_trains_by_the_command_under_it(command, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    file, *options = command.split()
    small = [o for o in SMALL if not o.startswith("task") or "my_task" not in command]
    argv = [
        str(ROOT / file),
        f"model.name={base}",
        *small,
        "optim.minibatch=8",
        "optim.steps=1",
        "eval.every=0",
        "scoring.processes=0",
        "sampling.zero_variance=keep",
        "run=out",
        *options,
    ]
    train.main(argv)
    assert len(rows(Path("out"))) == 1
    assert (tmp_path / "out" / "plugins" / re.search(r"my_\w+\.py", command)[0]).exists()


def test_the_plug_ins_of_the_page_pass_the_contract_by_the_commands_under_them(tmp_path):
    """All four in one run of the tests; none is an expected failure."""
    write_snippets(tmp_path)
    commands = re.findall(r"^    pytest tests/contract.py (--\w+ \S+)$", PAGES["extend.md"], re.M)
    assert len(commands) == 4
    options = [word for command in commands for word in command.split()]
    pytest_options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest_options += ["-c", str(ROOT / "pyproject.toml")]
    argv = [sys.executable, "-m", "pytest", *pytest_options, str(ROOT / "tests/contract.py")]
    done = subprocess.run([*argv, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "failed" not in done.stdout
    assert "xfailed" not in done.stdout


def test_the_loss_of_the_page_is_explained_by_the_command_under_it(tmp_path, monkeypatch, capsys):
    """Past the clip its gradient is `slope`, with the other sign."""
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    (command,) = re.findall(r"^    rlkl explain (.*)$", PAGES["extend.md"], re.M)
    file, *options = command.split()
    assert cli.main(["explain", str(ROOT / file), *options]) == 0
    assert "A > 0: 0.5 and -0.6, A < 0: -0.15 and 2" in capsys.readouterr().out


def test_the_sampler_of_the_page_returns_the_tokens_of_naive(tmp_path, monkeypatch):
    """In float64 at a temperature, in parts that do not divide the number of prompts."""
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    sampler = resolve({"name": "my_sampler.py:in_parts", "prompts": 2}, {}, "sampling.backend")
    policy = tiny_policy("llama", torch.float64)
    ids, mask = prompts()
    assert len(ids) % 2 == 1
    inputs = policy, ids, mask, uniforms(4 * len(ids), 12, seed=5), sampling_params(0.7)
    assert_same(sampler(*inputs), naive(*inputs), 1e-12)


def test_the_advantage_of_the_page_subtracts_the_median(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    median = resolve({"name": "my_advantage.py:median"}, {}, "advantage")
    mask = torch.tensor([[True], [True], [True], [False], [True], [True]])  # row 3: no score
    scores = torch.tensor([[1.0], [2.0], [90.0], [7.0], [3.0], [5.0]])
    advantages, returns = median(scores, None, mask, group_size=3)
    assert advantages.flatten().tolist() == [-1, 0, 88, 0, 0, 2]
    assert returns is None


def test_the_reward_of_the_page_is_the_share_that_is_correct_from_the_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_snippets(tmp_path)
    leading = resolve({"name": "my_reward.py:leading", "power": 2}, {}, "reward")
    example = Example("12+34=", "46")
    scores = {"46": 1, " 46\n": 1, "47": 0.25, "4": 0.25, "461": 4 / 9, "": 0, "64": 0}
    assert {text: leading(example, text) for text in scores} == pytest.approx(scores)


# ------------------------------------------------------------------ metrics.md

GRADED = """import torch

from reward import Digits


class Graded(Digits):
    def grade(self, example, response):
        return {"long": float(len(response) > 2)}
"""


def metrics_of_the_page() -> set[str]:
    """The first column of every table but the last, which has the names in other frameworks."""
    text = PAGES["metrics.md"].split("## Names in other frameworks")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def name_on_the_page(metric: str) -> str:
    """The parts of a reward are rewards/NAME on the page, and grades eval/NAME."""
    if metric.startswith("rewards/"):
        return "rewards/NAME"
    if metric.startswith("eval/") and metric != "eval/accuracy":
        return "eval/NAME"
    return metric


@pytest.fixture(scope="module")
def two_runs(base, tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of two steps of tiny-ppo, and of tiny-grpo with reward parts and grades."""
    metrics = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("metrics"))
        furnish(Path.cwd())
        patch.syspath_prepend(str(Path.cwd()))
        Path("graded.py").write_text(GRADED, encoding="utf-8")
        small = [option for option in SMALL if not option.startswith("task")]
        runs = {
            "ppo": ["sampling.group_size=1", "optim.minibatch=4"],
            "grpo": ["task=graded.py:Graded", "overlong.buffer=2", "optim.minibatch=null"],
        }
        for name, options in runs.items():
            argv = [
                str(ROOT / f"configs/tiny-{name}.yaml"),
                f"model.name={base}",
                *small,
                "optim.steps=2",
                *options,
                "reward=reward.py:digits",
                "scoring.processes=0",
                f"run={name}",
            ]
            train.main(argv)
            metrics[name] = rows(Path(name))
    return metrics


def test_the_page_names_exactly_the_metrics_that_runs_write(two_runs):
    """Those of the two runs, and the diagnostics of every loss."""
    written = {name_on_the_page(key) for run in two_runs.values() for row in run for key in row}
    for loss in LOSSES.values():
        written |= set(loss(*contract.problem())[1])
    # of sampling.zero_variance=resample and of sampling.curriculum
    written |= {"resampled_prompts", *solved_fractions({})}
    assert metrics_of_the_page() == written - {"step", "sample"}
    rare = {"explained_variance", "eval/NAME", "rewards/NAME", "kl_pi_ref_sequence"}
    assert rare | {"grad_norm/critic"} <= written


def test_the_page_names_the_columns_of_the_terminal_and_their_metrics():
    """In their order, percentages as such; the head that the page shows has those of GRPO."""
    cells = re.findall(r"^\| (\w+) \| `([^`]+)`(, in percent)?", PAGES["metrics.md"], re.M)
    assert [(title, metric, bool(percent)) for title, metric, percent in cells] == [
        (column.title, column.metric, column.percent) for column in COLUMNS
    ]
    (head,) = re.findall(r"^     (step .*)$", PAGES["metrics.md"], re.M)
    assert head.split()[1:] == [c.title for c in COLUMNS if c.title != "expl_var"]


def test_every_metric_of_the_table_of_other_frameworks_is_one_of_the_page():
    text = PAGES["metrics.md"].split("## Names in other frameworks")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert len(names) > 20
    assert names - metrics_of_the_page() == set()


def test_with_one_update_a_rollout_ratio_and_clip_are_what_the_page_says(two_runs):
    """pi_old is scored separately here, because the KL in the reward needs it.

    So the ratio is 1 to rounding: the micro-batches of the two passes differ.
    """
    for row in two_runs["grpo"]:
        assert row["updates"] == 1
        assert (row["ratio"], row["ratio_max"]) == pytest.approx((1, 1), abs=1e-5)
        assert row["clip_fraction"] == 0


def test_the_kl_per_response_is_the_kl_per_token_times_the_mean_length(two_runs):
    """In a run in which no group is dropped."""
    for row in two_runs["ppo"]:
        per_response = row["kl_pi_ref_token"] * row["response_length"]
        assert row["kl_pi_ref_sequence"] == pytest.approx(per_response, abs=1e-9)
