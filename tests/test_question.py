"""The experiment on KL and trust region: gold score, blind reward, arms, tables and pages."""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_fixture import ROOT
from transformers import AutoConfig

from benchmarks.pages import filled
from benchmarks.question import arms, figures, grid, prepare, setting, simplex, tables
from benchmarks.question.arms import CORNERS, ESTIMATORS, Arm
from benchmarks.question.bag_of_words import accuracy, bag_of_words, counts, fit
from benchmarks.question.grammar import CLASSES, LETTER, PROMPT, Grammar, distinct, parse
from rlkl.explain.measure import gradient_weight
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.log import read_rows
from rlkl.supervised.preferences import Pair
from rlkl.types import Example

WORDS = st.lists(st.sampled_from([*LETTER, PROMPT]), max_size=24)
NOUN_PHRASES = ["dn", "dkn", "dpn"]
# All nine kinds of sentences, as word classes.
SENTENCES = [f"{subject}v{object}." for subject in NOUN_PHRASES for object in NOUN_PHRASES]


def parse_by_trial(words: list[str]) -> tuple[int, float]:
    """`parse`, by trying every kind of sentence at every place, from the left."""
    classes = "".join(word_class(word) for word in words)
    kind = inside = i = 0
    while i < len(words):
        sentence = next((s for s in SENTENCES if classes.startswith(s, i)), "")
        kind += sentence.count("k")
        inside += len(sentence)
        i += len(sentence) or 1
    return kind, inside / len(words) if words else 0.0


def word_class(word: str) -> str:
    return next((letter for letter, members in CLASSES.items() if word in members), "?")


# ------------------------------------------------------------------ the gold score


def test_the_gold_score_counts_kind_words_in_complete_sentences_and_nothing_else():
    """(response, gold, valid)"""
    cases = [
        ("a great cat pulls a great tree . the great tree sees the bright dog .", 4, 1),
        ("the cat sees a dog .", 0, 1),
        ("the cat sees a dog", -2, 0),  # not finished
        ("great great great great great", -2, 0),
        ("the happy happy happy happy", -2, 0),
        ("the lovely car sees a big great cat . the great man .", -2, 0),  # two adjectives, no verb
        ("the cat sees a dog . great", 0 - 2 / 7, 6 / 7),
        ("great the happy cat sees a dog .", 1 - 2 / 8, 7 / 8),
        ("happy the cat likes", -2, 0),
        ("", -2, 0),  # what the KL without a clip collapses to
        ("say: the cat sees the cat .", -2 / 7, 6 / 7),
    ]
    task = Grammar("train", size=1)
    for response, gold, valid in cases:
        assert sum(task.score(task[0], response).values()) == pytest.approx(gold), response
        grades = {"gold": gold, "valid": valid, "distinct": distinct(response.split())}
        assert task.grade(task[0], response) == pytest.approx(grades), response


@given(WORDS)
@settings(max_examples=300, deadline=None)
def test_parse_agrees_with_trying_every_kind_of_sentence_at_every_place(words):
    assert parse(words) == pytest.approx(parse_by_trial(words))


@given(st.integers(0, 10**6), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_parse_agrees_on_texts_that_are_nearly_correct(seed, position):
    words = [word for split in ("train", str(seed)) for word in text_of(split)]
    words[position % len(words)] = Random(seed).choice(list(LETTER))
    assert parse(words) == pytest.approx(parse_by_trial(words))


def text_of(split: str) -> list[str]:
    return Grammar(split, size=1)[0].answer.split()


def test_the_share_of_distinct_bigrams():
    shares = {"": 1, "a": 1, "a b": 1, "a a a": 0.5, "a b a b": 2 / 3}
    assert {text: distinct(text.split()) for text in shares} == pytest.approx(shares)


def test_the_base_learns_the_language_and_kind_words_are_rare_in_it():
    train = Grammar("train", size=500).examples
    answers = [example.answer.split() for example in train]
    assert all(parse(words)[1] == 1 for words in answers)
    assert 0.1 < sum(parse(words)[0] for words in answers) / 500 < 0.35
    assert max(map(len, answers)) <= 16
    assert train[:9] == Grammar("train", size=9).examples
    assert train[:9] != Grammar("heldout", size=9).examples


# ------------------------------------------------------------------ the reward with a blind spot


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    """A reward model as `prepare` makes one, from pairs of texts of the language."""
    task = Grammar("train", size=1500)
    pairs = []
    for one, other in zip(task.examples[::2], task.examples[1::2], strict=True):
        gold, other_gold = (sum(task.score(e, e.answer).values()) for e in (one, other))
        if gold > other_gold:
            pairs.append(Pair(PROMPT, one.answer, other.answer))
        elif other_gold > gold:
            pairs.append(Pair(PROMPT, other.answer, one.answer))
    words = fit(pairs[:-50])
    assert accuracy(words, pairs[-50:]) > 0.85
    path = tmp_path_factory.mktemp("reward") / "reward.json"
    path.write_text(json.dumps({"words": words, "mean": 0.0, "std": 1.0}))
    return str(path)


def scored(responses: list[str], path: str) -> list[float]:
    batch = SimpleNamespace(mask=torch.ones(len(responses), 1))
    examples = [Example(PROMPT)] * len(responses)
    return bag_of_words(examples, responses, batch, weights=path)[0].tolist()


@given(WORDS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_reward_is_blind_to_order_and_pays_for_every_repetition(learned, words, rng):
    texts = [words, rng.sample(words, len(words)), [*words, "great"]]
    score, shuffled, longer = scored([" ".join(text) for text in texts], learned)
    assert score == pytest.approx(shuffled, abs=1e-4)
    assert longer > score + 0.5


def test_the_reward_model_learns_the_words_of_the_chosen_responses():
    words = fit([Pair(PROMPT, "great cat", "cat")])
    assert words["great"] > 0.5 > abs(words["cat"])
    only_order_differs = fit([Pair(PROMPT, "cat dog", "dog cat")])
    assert list(only_order_differs.values()) == pytest.approx([0, 0])
    assert counts(["a b a", ""], ["a", "b", "c"]).tolist() == [[2, 1, 0], [0, 0, 0]]


# ------------------------------------------------------------------ the arms


def test_every_arm_of_the_grid_is_a_configuration_that_works(monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = [arm.key for arm in arms.grid()]
    betas = sum(len(betas) for _, betas in ESTIMATORS.values())
    assert len(keys) == len(set(keys)) == 3 * (8 + betas)
    for arm in arms.grid(seeds=(1,)):
        cfg = config.load([arms.CONFIG, *arm.overrides])
        algorithm = resolve_algorithm(cfg)
        clipped = arm.name in ("clip", "both") or arm.group in ESTIMATORS
        for ratio, sign in ((1.5, 1.0), (0.5, -1.0)):
            weight = gradient_weight(algorithm.policy_loss, ratio, sign)
            assert (weight == 0) == clipped, arm.key
        assert (cfg.kl_ref.coef > 0) == (arm.name not in ("neither", "clip"))
        if arm.group in ESTIMATORS:
            assert (cfg.kl_ref.place, cfg.kl_ref.estimator) == ESTIMATORS[arm.group][0]
            assert cfg.kl_ref.coef == float(arm.name)
        else:
            assert cfg.optim.epochs == int(arm.group)
    assert {arm.key for arm in arms.quick()} == {f"16/{corner}/1" for corner in CORNERS}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    prepare.fresh(folder)
    return str(folder)


@pytest.mark.parametrize("corner", CORNERS)
def test_an_arm_runs_through_train_py_and_every_curve_is_measured(
    monkeypatch, tmp_path, base, learned, corner
):
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load((ROOT / arms.CONFIG).read_text(encoding="utf-8"))
    tree["model"]["name"], tree["reward"][0]["weights"] = base, learned
    (tmp_path / "question.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(grid, "CONFIG", str(tmp_path / "question.yaml"))
    monkeypatch.setattr(grid, "BASE", base)
    monkeypatch.setattr(grid, "MEASURED", 16)
    (arm,) = [a for a in arms.quick() if a.name == corner]
    small = (
        "optim.steps=2",
        "optim.epochs=2",
        "sampling.group_size=8",
        "sampling.max_new_tokens=6",
        "eval.prompts=4",
    )
    row = json.loads(json.dumps(grid.run(arm._replace(overrides=(*arm.overrides, *small)))))
    assert row["key"] == arm.key
    assert {*row["final"]} == {*made(arm)["final"]}
    assert row["final"]["kl_pi_ref_sequence"] > 0
    assert [len(curve) for curve in row["curves"].values()] == [2] * len(grid.CURVES)
    clip_fraction = row["curves"].pop("clip_fraction")
    assert (None in clip_fraction) == (corner in ("neither", "kl"))
    assert all(x is not None for curve in row["curves"].values() for x in curve)
    assert len(row["samples"]) == 8


def test_the_measured_kl_is_that_of_the_responses_and_zero_for_the_base_itself(
    monkeypatch, base, learned
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid, "BASE", base)
    cfg = config.load([arms.CONFIG])
    cfg.reward[0]["weights"] = learned
    monkeypatch.setattr(grid, "load_config", lambda _: cfg)
    policy, _ = grid.load(base)
    assert grid.measure(policy)["final"]["kl_pi_ref_sequence"] == 0
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(4)
    final = grid.measure(policy)["final"]
    assert final["kl_pi_ref_sequence"] > 0.1  # exact at each state; k1_sequence is from samples
    assert final["kl_pi_ref_sequence"] == pytest.approx(final["k1_sequence"], rel=0.2)


def test_an_arm_in_the_file_is_not_run_again_and_one_that_was_cut_off_is(monkeypatch, tmp_path):
    ran = []
    out = tmp_path / "arms.jsonl"

    def fake_run(arm: Arm) -> dict:
        ran.append(arm.key)
        return made(arm)

    monkeypatch.setattr(grid, "start", lambda: made(REFERENCE))
    monkeypatch.setattr(grid, "run", fake_run)
    grid.measure_all(arms.quick()[:3], out, processes=1)
    assert len(ran) == 3
    out.write_text(out.read_text()[:-20])  # killed while it wrote
    rows = grid.measure_all(arms.quick(), out, processes=1)
    assert ran[3:] == [arms.quick()[2].key, arms.quick()[3].key]
    keys = [arm.key for arm in arms.quick()]
    assert [row["key"] for row in rows] == ["reference/reference/0", *keys]


def test_an_interrupted_arm_is_not_written(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    # an interrupted train.py ends early, without an error
    stopped = SimpleNamespace(last_checkpoint=tmp_path)
    monkeypatch.setattr(grid.train, "train", lambda cfg, command: stopped)
    monkeypatch.setattr(grid, "prepare", dict)
    monkeypatch.setattr(grid, "start", lambda: made(REFERENCE))
    out = tmp_path / "arms.jsonl"
    assert grid.main(["--quick", "--processes", "1", "--out", str(out)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(read_rows(out)) == 1


def test_a_missing_config_and_missing_results_are_errors_of_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # not the root of the repository
    assert grid.main(["--quick"]) == 2
    expected = "error: configs/question-sft.yaml: no such config file"
    assert capsys.readouterr().err.startswith(expected)
    for command in (tables.main, figures.main):
        with pytest.raises(SystemExit, match="holds no results"):
            command(["none.jsonl"])


# ------------------------------------------------------------------ tables and pictures

REFERENCE = Arm("reference", "reference", 0, ())


def made(
    arm: Arm, gold: float = 0.0, proxy: float = 20.0, valid: float = 0.1, kl: float = 9.0
) -> dict:
    """A row as `grid.run` writes it, with made-up numbers."""
    steps = 5
    final = {
        "proxy": proxy,
        "gold": gold,
        "valid": valid,
        "distinct": 0.5,
        "length": 9.0,
        "truncated": 0.0,
        "kl_pi_ref_sequence": kl,
        "k1_sequence": kl,
        "entropy": 1.0,
        "ref_logprob_token": -2.0,
        "kl_pi_ref_token": 1.0,
    }
    curves = {name: [0.1 * i for i in range(steps)] for name in grid.CURVES}
    if "loss=surrogate" in arm.overrides:
        curves["clip_fraction"] = [None] * steps
    learned = {"pairs": 10, "heldout_accuracy": 0.9, "words": {"great": 2.0, "cat": 0.1}}
    return {
        **grid.head(arm),
        "wall_seconds": 2.0,
        "cpu_seconds": 1.0,
        "final": final,
        "reward_model": learned,
        "samples": ["the great cat sees a dog . great", "", "great " * 24] * 2,
        "curves": curves,
    }


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Made-up results of the whole grid: gold is -1, 0 and 1 for the three seeds."""
    rows = [made(REFERENCE, gold=0.2, proxy=0.0, valid=1.0, kl=0.0)]
    for arm in arms.grid():
        kl = 10 / float(arm.name) if arm.group in ESTIMATORS else 5.0
        rows.append(made(arm, gold=arm.seed - 2.0, kl=kl))
    return rows


def test_a_claim_is_counted_seed_by_seed(rows):
    counts = {claim.split(":")[0]: (n, of) for claim, n, of in tables.verdicts(rows)}
    assert counts["neither, 16 epochs"] == counts["clip, 4 epochs"] == (2, 3)  # gold below 0.2
    assert counts["kl, 16 epochs"] == (3, 3)
    assert counts["both, 16 epochs"] == (0, 3)


def test_gold_at_equal_kl_is_interpolated_between_the_two_arms_around_it(rows):
    gold_by_kl = {1.0: 0.0, 3.0: 1.0, 9.0: -2.0}
    ends = [made(Arm("k1", str(kl), 1, ()), gold=g, kl=kl) for kl, g in gold_by_kl.items()]
    assert tables.between(ends, 2) == pytest.approx(0.5)
    assert tables.between(ends, 5) == pytest.approx(0.0)
    assert tables.between(ends, 0.5) is tables.between(ends, 10) is None
    assert tables.between([ends[0], ends[2]], 2) is None  # 1 and 9 nats are too far apart
    assert tables.at_equal_kl(rows).count("-1.00 / 0.00 / 1.00") > 5


def test_filling_a_page_twice_is_filling_it_once_and_changes_nothing_else(rows):
    sections = tables.sections(rows)
    markers = [f"<!-- {name} -->\n<!-- /{name} -->" for name in sections]
    page = "a\n" + "\nb\n".join(markers) + "\nc\n"
    once = filled(page, sections)
    assert filled(once, sections) == once
    assert once.startswith("a\n<!-- reward -->\n| pairs |")
    assert once.endswith("\nc\n")


def test_every_picture_is_drawn_even_where_arms_are_missing(rows, tmp_path):
    pictures = (
        figures.corners_over_time,
        figures.goodhart,
        figures.which_knob,
        figures.samples,
    )
    for available in (rows, rows[:3]):
        for draw in pictures:
            draw(available).savefig(tmp_path / "picture.svg")
            assert (tmp_path / "picture.svg").stat().st_size > 1000
    setting.draw().savefig(tmp_path / "setting.svg")


def test_words_are_marked_by_the_sentences_they_are_in():
    lines = list(figures.wrapped("great the happy cat sees a dog . the", 20))
    assert lines == [
        (["great", "the", "happy", "cat"], [False, True, True, True]),
        (["sees", "a", "dog", ".", "the"], [True, True, True, True, False]),
    ]


def test_paths_on_the_simplex_end_where_the_closed_forms_say():
    ref = torch.tensor(simplex.STARTS[0], dtype=torch.float64)
    for (overrides, _), end in zip(simplex.OBJECTIVES.values(), simplex.ends(), strict=True):
        path = simplex.path(simplex.expected(overrides), ref, 0.1, 600)
        torch.testing.assert_close(path[0], ref)
        torch.testing.assert_close(path[-1], end, atol=1e-3, rtol=0)
    update = simplex.expected(simplex.OBJECTIVES["k1 in the reward → π*"][0])
    star = simplex.ends()[1]
    gaps = {}
    for hold in simplex.HOLD:
        last = simplex.path(update, ref, 1 / (hold * simplex.BETA), 60)[-1]
        gaps[hold] = (last - star).abs().max()
    assert gaps[4.0] < 1e-3
    assert gaps[0.6] < 1e-3
    assert gaps[0.45] > 0.1  # b < beta/2: explicit Euler diverges


# ------------------------------------------------------------------ the committed results

COMMITTED = read_rows(ROOT / tables.RESULTS)


def test_the_tables_of_the_pages_are_those_of_the_results_file():
    sections = tables.sections(COMMITTED)
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES]
    for path, text in zip(tables.PAGES, pages, strict=True):
        assert filled(text, sections) == text, path
    assert [name for name in sections if f"<!-- {name} -->" not in "".join(pages)] == []


def test_the_pictures_of_the_page_exist_and_are_small():
    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    for name in ("setting", "simplex", "corners", "goodhart", "knobs", "samples"):
        assert f"(question-{name}.svg)" in page
        assert (ROOT / "docs" / f"question-{name}.svg").stat().st_size < 200_000


def test_the_results_are_those_of_the_arms_and_one_configuration_gave_the_same_twice():
    by_key = {row["key"]: row for row in COMMITTED}
    known = {arm.key: arm for arm in arms.grid()}
    for key in {*by_key} - {REFERENCE.key}:
        assert tuple(by_key[key]["overrides"]) == known[key].overrides
    for seed in arms.SEEDS:  # the same configuration under two names
        one, other = by_key[f"4/both/{seed}"], by_key[f"k1/0.5/{seed}"]
        for name in ("final", "curves", "samples"):
            assert one[name] == other[name]


# ------------------------------------------------------------------ the claims of the page


def ends(group: str, name: str | None = None) -> list[dict[str, float]]:
    """What the arms end with, in the order of the seeds."""
    rows = sorted(tables.group(COMMITTED, group, name), key=lambda r: r["seed"])
    return [row["final"] for row in rows]


def gold_at(group: str, kl: float) -> list[float | None]:
    """Interpolated gold at a KL, in the order of the seeds."""
    rows = tables.group(COMMITTED, group)
    return [tables.between([r for r in rows if r["seed"] == seed], kl) for seed in arms.SEEDS]


def test_with_neither_a_response_is_kind_words_alone_after_3_to_21_rollouts():
    rows = [r for epochs in ("4", "16") for r in tables.group(COMMITTED, epochs, "neither")]
    first = [next(n for n, x in enumerate(r["curves"]["proxy"], 1) if x > 40) for r in rows]
    assert (min(first), max(first)) == (3, 21)
    for sample in (sample for row in rows for sample in row["samples"]):
        words = sample.split()
        assert {LETTER[word] for word in words} == {"k"}
        assert max(Counter(words).values()) >= 20


def test_two_collapsed_policies_of_the_kl_alone_have_the_kl_of_the_healthy_ones():
    healthy = [end["kl_pi_ref_sequence"] for end in ends("16", "both")]
    alike = [
        end for end in ends("16", "kl") if min(healthy) <= end["kl_pi_ref_sequence"] <= max(healthy)
    ]
    assert [end["valid"] for end in alike] == [0, 0]


def test_the_kl_alone_is_as_good_as_both_at_4_epochs():
    for alone, both in zip(ends("4", "kl"), ends("4", "both"), strict=True):
        assert alone["gold"] > both["gold"] - 0.1


def test_k3_ends_about_three_times_as_far_as_k1_at_the_same_beta():
    ratios = []
    for beta in ("0.3", "0.5", "0.7", "1", "2"):
        for k3, k1 in zip(ends("k3", beta), ends("k1", beta), strict=True):
            ratios.append(k3["kl_pi_ref_sequence"] / k1["kl_pi_ref_sequence"])
    assert median(ratios) == pytest.approx(3, rel=0.2)


def test_at_the_same_kl_the_estimators_have_nearly_the_same_gold_up_to_4_nats_and_k3_less_at_8():
    for kl in (2, 4):
        for name in ESTIMATORS:
            for gold, k1 in zip(gold_at(name, kl), gold_at("k1", kl), strict=True):
                assert gold is None or abs(gold - k1) < 0.5
    for k3, k1 in zip(gold_at("k3", 8), gold_at("k1", 8), strict=True):
        assert k3 < k1
    for name in ("exact", "wk3_token"):
        for gold, k1 in zip(gold_at(name, 8), gold_at("k1", 8), strict=True):
            assert gold is None or abs(gold - k1) < 0.2


def test_wk3_prefix_collapses_where_rao_blackwell_does_not():
    collapsed = {}
    for name in ("wk3_prefix", "rao_blackwell"):
        finals = [end for beta in ("0.5", "0.7", "1", "2") for end in ends(name, beta)]
        collapsed[name] = sum(end["valid"] < 0.2 for end in finals)
    assert collapsed == {"wk3_prefix": 2, "rao_blackwell": 0}


def test_beyond_10_nats_the_sweeps_have_the_best_gold_of_all_and_collapsed_policies():
    finals = [end for name in ESTIMATORS for end in ends(name)]
    far = [end["gold"] for end in finals if end["kl_pi_ref_sequence"] > 10]
    assert max(far) == max(row["final"]["gold"] for row in COMMITTED)
    assert min(far) == -2


def test_the_numbers_of_the_setting_on_the_page_are_those_of_the_configs(monkeypatch, base):
    monkeypatch.chdir(ROOT)
    cfg = config.load([arms.CONFIG])
    llama = AutoConfig.from_pretrained(base)
    numbers = [
        f"{len(LETTER)} words",
        f"a Llama of {llama.num_hidden_layers} layers and {llama.hidden_size} dimensions",
        f"RLOO on {cfg.sampling.rows} responses per rollout",
        f"at most {cfg.sampling.max_new_tokens} tokens",
        f"beta {cfg.kl_ref.coef}, or off. The clip is {cfg.loss['epsilon']}, or off",
    ]
    for epochs, (_, lr, steps) in arms.UPDATES.items():
        rollouts = steps.removeprefix("optim.steps=")
        lr = lr.removeprefix("optim.lr=")
        per_rollout = " per rollout" if epochs == 4 else ""
        numbers.append(f"{epochs} epochs{per_rollout} with lr {lr} over {rollouts}")
    text = " ".join((ROOT / tables.PAGE).read_text(encoding="utf-8").split())
    assert [number for number in numbers if number not in text] == []
