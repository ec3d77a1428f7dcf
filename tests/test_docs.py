"""The pages of docs/: numbers are recomputed, snippets run, and names and links exist."""

import ast
import functools
import math
import re
from pathlib import Path

import torch

from rlkl.advantages import ADVANTAGES
from rlkl.explain import explain
from rlkl.explain.tabular import BANDIT, TREE, probabilities
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES, SELECTORS
from rlkl.rewards import compute_scores
from rlkl.rewards.scoring import Scoring, assemble
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.schema import Config
from rlkl.types import Batch, Example

ROOT = Path(__file__).parents[1]
PAGES = {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))}
EXPLAIN = PAGES["explain.md"]
EQUATIONS = PAGES["equations.md"]


@functools.cache
def functions(path: Path) -> dict[str, str]:
    """{name: docstring} of every function and class of a file, at any depth."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


# ------------------------------------------------------------------ every page


def test_every_relative_link_of_a_page_is_a_file():
    missing = []
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target = ROOT / "docs" / link.partition("#")[0]
            if "://" not in link and not link.startswith("#") and not target.exists():
                missing.append(f"{page}: {link}")
    assert missing == []


def test_every_function_and_test_that_a_link_names_is_in_that_file():
    """Links such as `[kl.py:k1](../rlkl/kl.py)` and `[test_kl.py::test_y](../tests/test_kl.py)`."""
    missing = []
    for page, text in PAGES.items():
        named = re.findall(r"\[([\w./\\]+\.py)::?(\w+)\]\(([^)]+)\)", text)
        for file, name, link in named:
            path = (ROOT / "docs" / link).resolve()
            right_file = str(path).endswith("/" + file.replace("\\", ""))
            if not right_file or name not in functions(path):
                missing.append(f"{page}: {name} in {link}")
    assert missing == []


# ------------------------------------------------------------------ docs/equations.md


def section(title: str) -> list[list[str]]:
    """The cells of each row of the table under a heading that ends in `title`."""
    pattern = rf"^## [^\n]*{re.escape(title)}\n(.*?)(?=^## |\Z)"
    body = re.search(pattern, EQUATIONS, re.S | re.M)[1]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows[2:]]


TABLES = {
    "LOSSES": LOSSES,
    "SELECTORS": SELECTORS,
    "ADVANTAGES": ADVANTAGES,
    ", KL": KL,
    "KL_LOSSES": KL_LOSSES,
    "KL_OLD_LOSSES": KL_OLD_LOSSES,
}
VALUE_LOSS = "`critic.coef`, `critic.clip`"
AROUND = "Coefficients, weights, corrections"
CONFIGURATIONS = "Algorithms that are a configuration"


def test_the_equation_map_has_a_row_for_every_entry_and_links_its_function():
    for title, table in TABLES.items():
        rows = section(title)
        names = [re.match(r"`([^`]+)`", row[0])[1] for row in rows]
        assert set(names) == set(table), title
        for name, row in zip(names, rows, strict=True):
            assert f":{table[name].__name__}]" in row[3], name
        first_cells = [row[0] for row in rows]
        assert len(first_cells) == len(set(first_cells)), title


def test_every_row_of_the_equation_map_names_a_function_and_a_test():
    for title in (*TABLES, VALUE_LOSS, AROUND):
        for row in section(title):
            assert len(row) == 5, row
            assert ".py:" in row[3], row
            assert "::test_" in row[4], row
    for row in section(CONFIGURATIONS):
        assert len(row) == 3, row
        assert "::test_" in row[2], row
    for row in section("Where it ends"):
        assert len(row) == 4, row
        assert ".py:" in row[2], row
        assert "test_fixed_points.py::test_" in row[3], row
    assert {row[0].strip("`") for row in section(AROUND)} == {
        "kl_ref.target",
        "kl_old.target",
        "optim.weights=token",
        "optim.weights=sequence",
        "optim.weights=constant",
        "mismatch.truncate",
        "mismatch.reject",
        "overlong",
    }


def test_every_paper_and_equation_number_of_a_row_is_in_the_docstrings_of_its_function():
    """A paper may be named elsewhere in the function's file."""
    missing = []
    for title in (*TABLES, VALUE_LOSS, AROUND):
        for name, paper, _, function, _ in section(title):
            file = (ROOT / "docs" / re.search(r"\]\(([^)]+)\)", function)[1]).resolve()
            source = " ".join(file.read_text(encoding="utf-8").split())
            docstring = functions(file)[re.search(r":(\w+)\]", function)[1]]
            docstring = " ".join(docstring.split())
            for number in re.findall(r"\b\d{4}\.\d{5}\b", paper):
                if number not in source:
                    missing.append(f"{name}: {number}")
            if "same paper" not in paper:
                numbers = re.findall(r"\b(?:eq|sec)\. [\d.]*\d", paper)
                missing += [f"{name}: {n}" for n in numbers if n not in docstring]
    assert missing == []


def test_papers_that_no_file_of_the_library_names_are_known():
    """Each was looked up by hand."""
    known = {
        "2602.05261": "LUSPO",
        "2601.05242": "GDPO",
        "1502.05477": "TRPO",
        "2602.05494": "ATR-GRPO",
        "2512.23075": "TRM",
        "2505.17508": "RPG",
        "2606.09821": "DRPO",
        "2606.23932": "KLip-PPO",
    }
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "rlkl").rglob("*.py"))
    for number in re.findall(r"\b\d{4}\.\d{5}\b", EQUATIONS):
        if number not in sources:
            assert re.search(rf"{known[number]}[^\n]*{number}", EQUATIONS), number


def test_every_algorithm_that_is_a_configuration_is_one():
    for row in section(CONFIGURATIONS):
        options = re.match(r"`([^`]+)`", row[1])[1].split()
        cfg = config.load(options)
        resolve_algorithm(cfg)
        assert cfg != Config()
        for option in options:
            key, _, value = option.partition("=")
            assert str(value_of(cfg, key)) == str(type(value_of(cfg, key))(value)), option


def value_of(cfg: Config, key: str):
    """The value of an option; of a plug-in section its name."""
    node = cfg
    for name in key.split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return node["name"] if isinstance(node, dict) else node


# ------------------------------------------------------------------ docs/explain.md

ARGUMENTS = re.search(r"^ +rlkl explain (configs/.*) --verify$", EXPLAIN, re.M)[1].split()


def test_the_quoted_output_is_that_of_the_quoted_command(monkeypatch):
    """Each line: those of explain as printed, that of --verify from where the functions lead."""
    monkeypatch.chdir(ROOT)
    cfg = config.load(ARGUMENTS)
    printed = {line.strip() for lines in explain(cfg).topics.values() for line in lines}
    quoted = re.search(r"```text\n(.*?)```", EXPLAIN, re.S)[1].splitlines()
    assert len(quoted) == 8
    assert [line for line in quoted[:-1] if line not in printed] == []
    pi = ended(ARGUMENTS)
    ref = probabilities(BANDIT, BANDIT.table)
    divergence = float((pi * (pi / ref).log()).sum())
    score = float(pi @ BANDIT.scores)
    assert quoted[-1] == f"mean score {score:.6f}   KL(pi || ref) {divergence:.6f} nats"


def ended(arguments, game=BANDIT, **precision):
    """(R,) the policy at which a configuration converges."""
    cfg = config.load(arguments)
    expected = Expected(cfg, resolve_algorithm(cfg), game)
    return expected.probability(converge(expected, **precision)[0]).detach()


def apart(p, q):
    """The total variation."""
    return float((p - q).abs().sum() / 2)


def tilted(game, beta):
    weight = probabilities(game, game.table) * (game.scores / beta).exp()
    return weight / weight.sum()


def roots(pi):
    """The first token of the nine responses: three to each."""
    return pi.view(3, 3).sum(1).tolist()


def kl(p, q):
    return float((p * (p / q).log()).sum())


def threshold(p_ref):
    """The solution b of 2 asinh(b) - logit p_ref = (2/b) √(1 + b²), by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        b = (low + high) / 2
        left = 2 * math.asinh(b) - math.log(p_ref / (1 - p_ref))
        if left > 2 / b * math.sqrt(1 + b * b):
            high = b
        else:
            low = b
    return b


def advantage_gap(p, group=8):
    """E[A | right] - E[A | wrong] of scores over their std.

    Each other response of the group is right with probability p.
    """

    def mean_advantage(score):
        total = 0.0
        for others in range(group):
            right = others + score
            std = math.sqrt(right * (group - right) / (group * (group - 1)))
            chance = math.comb(group - 1, others) * p**others * (1 - p) ** (group - 1 - others)
            total += chance * (score - right / group) / std if std else 0.0
        return total

    return mean_advantage(1) - mean_advantage(0)


def recomputed():
    """{a number as the page prints it: its value}."""
    ref = probabilities(BANDIT, BANDIT.table)
    loss = ["advantage=rloo", "sampling.group_size=2", "kl_ref.place=loss"]
    reverse, forward = tilted(BANDIT, 0.7), ended([*loss, "kl_ref.coef=0.7", "kl_ref.estimator=k3"])
    star, token = tilted(TREE, 0.5), ended([*loss, "kl_ref.coef=0.5", "kl_ref.estimator=k2"], TREE)
    whiten = ended(
        ["advantage=reinforce_pp", "sampling.group_size=2", "kl_ref.coef=0.5"], TREE, tolerance=1e-4
    )
    # beta (p - 1/2) = √(p (1-p)) = √(1/4 - (p - 1/2)²)
    k3 = 0.5 + 0.5 / math.sqrt(1 + 0.04**2)
    largest_gap = max(map(advantage_gap, (1e-6, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6)))
    return {
        "0.05": float(ref[4]),
        "0.3299": float(reverse[4]),
        "0.5955": float(forward[4]),
        "0.5420": kl(reverse, ref),
        "1.1490": kl(forward, ref),
        "0.2788": apart(reverse, forward),
        "0.6970": threshold(0.1),
        "1.5089": threshold(0.5),
        "4.1370": threshold(0.9),
        "0.9996": k3,
        "61.9": largest_gap / 0.04,
        **dict(zip(("0.6069", "0.3120", "0.0811"), roots(token), strict=True)),
        **dict(zip(("0.5337", "0.3312", "0.1352"), roots(star), strict=True)),
        "0.0733": apart(star, token),
        "0.027": apart(tilted(TREE, 0.5), whiten),
    }


# Values of beta, and shares of right responses.
GIVEN = {"0.7", "0.5", "0.1", "0.9", "0.04"}


def test_every_decimal_of_the_page_is_recomputed():
    prose = re.sub(r"```.*?```|^    .*?$", "", EXPLAIN, flags=re.S | re.M)
    values = recomputed()
    assert set(re.findall(r"\d+\.\d+", prose)) == set(values) | GIVEN
    for printed, value in values.items():
        assert f"{value:.{len(printed.partition('.')[2])}f}" == printed


def test_the_table_of_estimators_holds_by_automatic_differentiation():
    """E_pi[∇f(u)] = ∇ Σ ref F(pi/ref), with the columns f, f' and F of the page."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=rng, dtype=torch.float64).requires_grad_()
    ref = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
    rows = {
        "k1 = u": (lambda u: u, lambda u: u**0, lambda x: x),
        "k2 = u²/2": (lambda u: u**2 / 2, lambda u: u, lambda x: x * x.log() - x),
        "k3 = e^-u - 1 + u": (
            lambda u: (-u).exp() - 1 + u,
            lambda u: 1 - (-u).exp(),
            lambda x: x - x.log(),
        ),
    }
    for name, (f, slope, potential) in rows.items():
        assert f"| {name} |" in EXPLAIN
        pi = logits.softmax(0)
        u = (pi / ref).log()
        left = torch.autograd.grad((pi.detach() * f(u)).sum(), logits, retain_graph=True)[0]
        law = torch.autograd.grad(
            (pi.detach() * slope(u).detach() * u).sum(), logits, retain_graph=True
        )[0]
        right = torch.autograd.grad((ref * potential(pi / ref)).sum(), logits)[0]
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
        torch.testing.assert_close(law, right, atol=1e-12, rtol=0)


def test_explicit_and_implicit_are_as_the_table_says():
    """beta = 1. Distances are between log-probs, up to a constant."""
    ref = probabilities(BANDIT, BANDIT.table).log()
    r = BANDIT.scores
    beta = 1.0
    star = ref + r / beta
    offset = torch.linspace(0, 1, 5, dtype=torch.float64)

    def distance(x):
        return (x - star) - (x - star).mean()

    before = distance(ref + offset)
    for b, converges in ((0.6, True), (0.4, False)):
        # argmax E[r] - beta KL(pi || ref) - b KL(pi || pi_k), with the KL to ref live
        in_the_loss = (b * (ref + offset) + beta * ref + r) / (b + beta)
        torch.testing.assert_close(distance(in_the_loss), b / (b + beta) * before)
        # and with the KL to ref frozen at pi_k
        in_the_reward = ref + offset + (r - beta * offset) / b
        torch.testing.assert_close(distance(in_the_reward), (1 - beta / b) * before)
        assert (abs(1 - beta / b) < 1) == converges == (b > beta / 2)


# ------------------------------------------------------------------ docs/rewards.md


def test_the_rewards_of_the_page_and_its_section_work_as_they_stand(tmp_path, monkeypatch):
    page = PAGES["rewards.md"]
    (section,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    (tmp_path / "page.yaml").write_text(section, encoding="utf-8")
    cfg = config.load(["page.yaml"])
    ids = torch.tensor([[5, 5, 5, 5, 5], [5, 6, 0, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    batch = Batch(ids, mask, ids, mask, torch.zeros(2, 5), torch.zeros(2, dtype=torch.bool))
    scoring = Scoring(
        processes=0,
        seconds=cfg.scoring.seconds,
        failed=cfg.scoring.failed,
        memory_gb=cfg.scoring.memory_gb,
        steps=1,
        say=print,
    )
    sections = [*cfg.reward, {"name": "my_rewards.py:length"}]
    reward = assemble(sections, lambda e, r, b: ([1.0, 0.0], {}), scoring)
    examples = [Example("1+1=", "2"), Example("hi")]
    scores, parts = compute_scores(reward, examples, ["so 2", "x" * 10], batch)
    expected = {
        "task": [1, 0],
        "brevity": [0.8, 0.5],
        "format_reward": [1, math.nan],
        "compute_score": [0, 0],
        "repetition": [-0.1, 0],
        "length": [5, 2],
    }
    for name, values in expected.items():
        right = torch.tensor(values, dtype=torch.float32)
        torch.testing.assert_close(parts[name], right, equal_nan=True)
    torch.testing.assert_close(scores, torch.tensor([1 + 0.08 + 1 - 0.1 + 5, 0.05 + 2]))
    assert parts["failed"].tolist() == [0, 0]
