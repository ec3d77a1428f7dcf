"""What the pages in docs/ say is what the code does: numbers recomputed, snippets run, names and links looked up."""

import ast
import contextlib
import functools
import io
import math
import re
from pathlib import Path

import pytest
import torch

from rlkl import config
from rlkl.advantages import ADVANTAGES
from rlkl.algorithm import algorithm
from rlkl.explain import explain
from rlkl.explain.tabular import BANDIT, TREE, probabilities
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL, KL_LOSSES, KL_OLD_LOSSES
from rlkl.losses import LOSSES, SELECTORS
from rlkl.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXPLAIN, EQUATIONS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("explain.md", "equations.md"))


@functools.cache
def functions(path):
    """Every function of a file, at any depth, with its docstring; classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: ast.get_docstring(node) or "" for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


# Every page
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_function_and_test_that_a_link_names_exists(page):
    """`[losses.py:ppo](../rlkl/losses.py)`, `[test_losses.py::test_x](../tests/test_losses.py)`."""
    for file, name, link in re.findall(r"\[([\w./\\]+\.py)::?(\w+)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path = (page.parent / link).resolve()
        assert str(path).endswith("/" + file.replace("\\", "")), link
        assert name in functions(path), f"{name} in {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_line_of_prose_is_over_125_characters_long(page):
    if page.name in ("explain.md", "equations.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            assert len(line) <= 125 or line.startswith("|"), line


# docs/equations.md
def section(title):
    """The rows of the table under a heading that ends in `title`, as lists of cells."""
    body = re.search(rf"^## [^\n]*{re.escape(title)}\n(.*?)(?=^## |\Z)", EQUATIONS, re.S | re.M)[1]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


TABLES = {"LOSSES": LOSSES, "SELECTORS": SELECTORS, "ADVANTAGES": ADVANTAGES, ", KL": KL, "KL_LOSSES": KL_LOSSES,
          "KL_OLD_LOSSES": KL_OLD_LOSSES}


@pytest.mark.parametrize("title", TABLES)
def test_the_equation_map_has_a_row_for_every_entry_and_links_its_function(title):
    rows = section(title)
    named = [re.match(r"`([^`]+)`", row[0])[1] for row in rows]
    assert set(named) == set(TABLES[title])
    for name, row in zip(named, rows, strict=True):
        if row[0] == f"`{name}`":
            assert f":{TABLES[title][name].__name__}]" in row[3]
    assert [row[0] for row in rows if row[0].count("`") == 2 and "," not in row[0]] == list(dict.fromkeys(
        f"`{n}`" for n in named))  # once each


def test_every_row_of_the_equation_map_names_a_test():
    rows = [row for title in (*TABLES, "Around them") for row in section(title)]
    assert all(len(row) == 5 and "::test_" in row[4] and ".py:" in row[3] for row in rows)
    assert all(len(row) == 3 and "::test_" in row[2] for row in section("Algorithms that are a configuration"))
    assert {row[0].strip("`") for row in section("Around them")} == {
        "kl_ref.target", "kl_old.target", "optim.weights=token", "optim.weights=sequence", "optim.weights=constant",
        "mismatch.truncate", "mismatch.reject", "overlong"}


def test_every_row_of_where_it_ends_names_a_test_that_follows_the_functions_there():
    rows = section("Where it ends")
    assert len(rows) >= 16
    assert all(len(row) == 4 and ".py:" in row[2] and "test_fixed_points.py::test_" in row[3] for row in rows)


def test_every_equation_number_and_paper_of_a_row_stands_in_the_file_it_links():
    """In the docstring, of the function or of its neighbours; a number is invented nowhere."""
    for title in (*TABLES, "Around them"):
        for name, paper, _, function, _ in section(title):
            file = ROOT / "docs" / re.search(r"\]\(([^)]+)\)", function)[1]
            source = " ".join(file.read_text(encoding="utf-8").split())
            numbers = re.findall(r"\b(?:eq|sec)\. [\d.]*\d", paper)
            for quoted in re.findall(r"\b\d{4}\.\d{5}\b", paper) + numbers:
                assert quoted in source, f"{name}: {quoted}"
            own = functions(file.resolve())[re.search(r":(\w+)\]", function)[1]]
            if "same paper" not in paper and name != "`ppo`":  # eq. 7 is that of the surrogate it calls
                assert all(n in " ".join(own.split()) for n in numbers), name


def test_papers_elsewhere_on_the_page_are_known():
    """Those that no file of the library names, by hand."""
    known = {"2602.05261": "LUSPO", "2601.05242": "GDPO", "1502.05477": "TRPO", "2602.05494": "ATR-GRPO",
             "2512.23075": "TRM", "2505.17508": "RPG", "2606.09821": "DRPO", "2606.23932": "KLip-PPO"}
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "rlkl").rglob("*.py"))
    for number in re.findall(r"\b\d{4}\.\d{5}\b", EQUATIONS):
        assert number in sources or re.search(rf"{known[number]}[^\n]*{number}", EQUATIONS), number


@pytest.mark.parametrize("row", section("Algorithms that are a configuration"), ids=lambda row: row[0].split(",")[0])
def test_every_algorithm_that_is_a_configuration_is_one(row):
    options = re.match(r"`([^`]+)`", row[1])[1].split()
    cfg = config.load(options)
    algorithm(cfg)
    assert cfg != Config()
    for option in options:  # each as it is written
        key, _, value = option.partition("=")
        found = functools.reduce(lambda x, k: x[k] if isinstance(x, dict) else getattr(x, k), key.split("."), cfg)
        found = found["name"] if isinstance(found, dict) else found
        assert type(found)(value) == found, option


# docs/explain.md
ARGUMENTS = re.search(r"^ +rlkl explain (configs/.*) --verify$", EXPLAIN, re.M)[1].split()


def test_the_quoted_output_is_that_of_the_quoted_command(monkeypatch):
    """Each line: those of explain as they are printed, that of --verify from where the functions lead."""
    monkeypatch.chdir(ROOT)
    cfg = config.load(ARGUMENTS)
    told = {line.strip() for lines in explain(cfg).topics.values() for line in lines}
    quoted = re.search(r"```text\n(.*?)```", EXPLAIN, re.S)[1].splitlines()
    assert len(quoted) == 8  # "eight of its lines"
    pi, ref = ended(ARGUMENTS), probabilities(BANDIT, BANDIT.table)
    kl = float((pi * (pi / ref).log()).sum())
    assert quoted[:-1] == [line for line in quoted if line in told]
    assert quoted[-1] == f"mean score {float(pi @ BANDIT.scores):.6f}   KL(pi || ref) {kl:.6f} nats"


def ended(arguments, game=BANDIT, **precision):
    cfg = config.load(arguments)
    expected = Expected(cfg, algorithm(cfg), game)
    return expected.probability(converge(expected, **precision)[0]).detach()


def apart(p, q):
    return float((p - q).abs().sum() / 2)


def tilted(game, beta):
    weight = probabilities(game, game.table) * (game.scores / beta).exp()
    return weight / weight.sum()


def roots(pi):
    """The first token of the nine replies: three to each."""
    return pi.view(3, 3).sum(1).tolist()


def kl(p, q):
    return float((p * (p / q).log()).sum())


def threshold(p_ref):
    """2 asinh(b) - logit p_ref = (2/b) √(1 + b²), by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        b = (low + high) / 2
        above = 2 * math.asinh(b) - math.log(p_ref / (1 - p_ref)) > 2 / b * math.sqrt(1 + b * b)
        low, high = (low, b) if above else (b, high)
    return b


def drive(p, group=8):
    """E[A | right] - E[A | wrong] of scores over their std (ddof 1), the others of the group right with chance p."""
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
    """{as printed in the prose: value}."""
    ref = probabilities(BANDIT, BANDIT.table)
    loss = ["advantage=rloo", "sampling.group_size=2", "kl_ref.place=loss"]
    reverse, forward = tilted(BANDIT, 0.7), ended([*loss, "kl_ref.coef=0.7", "kl_ref.estimator=k3"])
    star, token = tilted(TREE, 0.5), ended([*loss, "kl_ref.coef=0.5", "kl_ref.estimator=k2"], TREE)
    whitened = ended(["advantage=reinforce_pp", "sampling.group_size=2", "kl_ref.coef=0.5"], TREE, tolerance=1e-4)
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]], dtype=torch.float64)
    k3 = 0.5 + 0.5 / math.sqrt(1 + 0.04**2)  # beta (p - 1/2) = √(p (1-p)) = √(1/4 - (p - 1/2)²)
    return {
        "0.05": float(ref[4]), "0.3299": float(reverse[4]), "0.5955": float(forward[4]), "0.5420": kl(reverse, ref),
        "1.1490": kl(forward, ref), "0.2788": apart(reverse, forward),
        "0.6970": threshold(0.1), "1.5089": threshold(0.5), "4.1370": threshold(0.9), "0.9996": k3,
        "61.9": max(map(drive, (1e-6, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6))) / 0.04,
        **dict(zip(("0.6069", "0.3120", "0.0811"), roots(token), strict=True)),
        **dict(zip(("0.5337", "0.3312", "0.1352"), roots(star), strict=True)),
        "0.0733": apart(star, token), "0.027": apart(tilted(TREE, 0.5), whitened),
        "0.0339798": kl(p, q), "0.0490225": kl(p, q) / math.log(2),
        "0.0353349": kl(q, p), "0.0509775": kl(q, p) / math.log(2),
    }


GIVEN = {"0.7", "0.5", "0.1", "0.9", "0.04", "0.0915"}  # betas, shares of right replies, and the wrong note


def test_every_decimal_of_the_page_is_recomputed():
    prose = re.sub(r"```.*?```|^    .*?$", "", EXPLAIN, flags=re.S | re.M)
    prose = re.sub(r"^For P = .*$", "", prose, flags=re.M)
    values = recomputed()
    assert set(re.findall(r"\d+\.\d+", prose)) == set(values) | GIVEN
    for printed, value in values.items():
        assert f"{value:.{len(printed.partition('.')[2])}f}" == printed


def test_the_snippet_prints_what_the_page_says_and_no_reading_gives_the_notes_number():
    snippet = re.search(r"```python\n(.*?)```", EXPLAIN, re.S)[1]
    assert len(snippet.splitlines()) == 4
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(snippet, {})
    assert out.getvalue().splitlines() == re.findall(r"`(0\.\d+ nats = 0\.\d+ bits)`", EXPLAIN)
    nats = [float(x) for x in re.findall(r"(\S+) nats", out.getvalue())]
    for reading in (*nats, sum(nats), sum(nats) / 2):
        assert all(abs(reading / unit - 0.0915) > 5e-3 for unit in (1, math.log(2), math.log(10)))


def test_the_table_of_the_law_holds_by_automatic_differentiation():
    """E_pi[∇f(u)] = ∇ Σ ref F(pi/ref), with the columns f, f' and F of the page."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ref = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
    rows = {"k1 = u": (lambda u: u, lambda u: u**0, lambda x: x),
            "k2 = u²/2": (lambda u: u**2 / 2, lambda u: u, lambda x: x * x.log() - x),
            "k3 = e^-u - 1 + u": (lambda u: (-u).exp() - 1 + u, lambda u: 1 - (-u).exp(), lambda x: x - x.log())}
    for name, (f, slope, potential) in rows.items():
        assert f"| {name} |" in EXPLAIN
        pi = logits.softmax(0)
        u = (pi / ref).log()
        left = torch.autograd.grad((pi.detach() * f(u)).sum(), logits, retain_graph=True)[0]
        law = torch.autograd.grad((pi.detach() * slope(u).detach() * u).sum(), logits, retain_graph=True)[0]
        right = torch.autograd.grad((ref * potential(pi / ref)).sum(), logits)[0]
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
        torch.testing.assert_close(law, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("held", "converges"), [(0.6, True), (0.4, False)])
def test_explicit_and_implicit_are_as_the_table_says(held, converges):
    """beta = 1, b = `held`; each rollout solved exactly; distances are between log-probs, up to a constant."""
    ref, r, beta = probabilities(BANDIT, BANDIT.table).log(), BANDIT.scores, 1.0
    star, start = ref + r / beta, torch.linspace(0, 1, 5, dtype=torch.float64)

    def distance(x):
        return (x - star) - (x - star).mean()

    first = distance(ref + start)
    loss = (held * (ref + start) + beta * ref + r) / (held + beta)  # argmax E[r] - beta KL(ref) - held KL(pi_k)
    reward = ref + start + (r - beta * start) / held
    torch.testing.assert_close(distance(loss), held / (held + beta) * first)
    torch.testing.assert_close(distance(reward), (1 - beta / held) * first)
    assert (abs(1 - beta / held) < 1) == converges == (held > beta / 2)


# docs/rewards.md
def test_the_rewards_of_the_page_and_its_section_work_as_they_stand(tmp_path, monkeypatch):
    from rlkl.rewards import judge
    from rlkl.rewards.scoring import Scoring, assemble
    from rlkl.types import Batch, Example

    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    (section,), (code,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("yaml", "python"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    (tmp_path / "page.yaml").write_text(section, encoding="utf-8")
    cfg = config.load(["page.yaml"])
    ids, mask = torch.tensor([[5, 5, 5, 5, 5], [5, 6, 0, 0, 0]]), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    batch = Batch(ids, mask, ids, mask, torch.zeros(2, 5), torch.zeros(2, dtype=torch.bool))
    scoring = Scoring(0, cfg.scoring.seconds, cfg.scoring.failed, cfg.scoring.memory_gb, steps=1, say=print)
    reward = assemble([*cfg.reward, {"name": "my_rewards.py:length"}], lambda e, r, b: ([1.0, 0.0], {}), scoring)
    scores, parts = judge(reward, [Example("1+1=", "2"), Example("hi")], ["so 2", "x" * 10], batch)
    expected = {"task": [1, 0], "brevity": [0.8, 0.5], "format_reward": [1, math.nan], "compute_score": [0, 0],
                "repetition": [-0.1, 0], "length": [5, 2]}
    for name, values in expected.items():
        torch.testing.assert_close(parts[name], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    torch.testing.assert_close(scores, torch.tensor([1 + 0.08 + 1 - 0.1 + 5, 0.05 + 2]))
    assert parts["failed"].tolist() == [0, 0]
