"""The question's experiment: its judge, its blind reward, its arms, and a page that says what was measured."""

from __future__ import annotations

import json
from random import Random
from statistics import median

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
from rlkl import config
from rlkl.algorithm import algorithm
from rlkl.explain.measure import pull
from rlkl.log import read_rows
from rlkl.preferences import Pair
from rlkl.types import Example

WORDS = st.lists(st.sampled_from([*LETTER, PROMPT]), max_size=24)
NOUN_PHRASES = ["dn", "dkn", "dpn"]
SENTENCES = {f"{subject}v{object}." for subject in NOUN_PHRASES for object in NOUN_PHRASES}  # all nine kinds


def slowly_parsed(words: list[str]) -> tuple[int, float]:
    """From the left: the sentence that starts here, if one of the nine does; else one word on."""
    classes = ["".join(k for k, members in CLASSES.items() if word in members) or "?" for word in words]
    kind = inside = i = 0
    while i < len(words):
        found = [s for s in SENTENCES if classes[i : i + len(s)] == list(s)]
        kind += sum(s.count("k") for s in found)
        inside += sum(map(len, found))
        i += max([1, *map(len, found)])
    return kind, inside / len(words) if words else 0.0


# The judge
@pytest.mark.parametrize(("reply", "gold", "valid"), [
    ("a great cat pulls a great tree . the great tree sees the bright dog .", 4, 1),
    ("the cat sees a dog .", 0, 1),
    ("the cat sees a dog", -2, 0),  # not finished
    ("great great great great great", -2, 0),
    ("the happy happy happy happy", -2, 0),
    ("the lovely car sees a big great cat . the great man .", -2, 0),  # two adjectives, and no verb
    ("the cat sees a dog . great", 0 - 2 / 7, 6 / 7),
    ("great the happy cat sees a dog .", 1 - 2 / 8, 7 / 8),
    ("happy the cat likes", -2, 0),
    ("", -2, 0),  # what the KL without a clip collapses to
    ("say: the cat sees the cat .", -2 / 7, 6 / 7),
])
def test_the_gold_score_counts_kind_words_in_complete_sentences_and_nothing_else(reply, gold, valid):
    task = Grammar("train", size=1)
    assert sum(task.score(task[0], reply).values()) == pytest.approx(gold)
    assert task.grade(task[0], reply) == pytest.approx(
        {"gold": gold, "valid": valid, "distinct": distinct(reply.split())})


@given(WORDS)
@settings(max_examples=300, deadline=None)
def test_the_judge_agrees_with_one_that_tries_every_kind_of_sentence_at_every_place(words):
    assert parse(words) == pytest.approx(slowly_parsed(words))


@given(st.integers(0, 10**6), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_the_judge_agrees_on_texts_that_are_nearly_right(seed, cut):
    rng = Random(seed)
    words = Grammar("train", size=1).examples[0].answer.split() + Grammar(str(seed), size=1)[0].answer.split()
    words[cut % len(words)] = rng.choice(list(LETTER))
    assert parse(words) == pytest.approx(slowly_parsed(words))


def test_what_the_base_learns_is_the_language_and_kind_words_are_rare_in_it():
    answers = [Grammar("train", size=500)[i].answer.split() for i in range(500)]
    assert all(parse(words)[1] == 1 for words in answers)
    assert 0.1 < sum(parse(words)[0] for words in answers) / 500 < 0.35
    assert max(map(len, answers)) <= 16
    assert Grammar("train", size=9).examples == Grammar("train", size=9).examples != Grammar("heldout", size=9).examples


# The reward with a blind spot
@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    """A reward model as `prepare` makes one, from pairs of the language that the judge labels."""
    task, pairs = Grammar("train", size=1500), []
    for one, other in zip(task.examples[::2], task.examples[1::2], strict=True):
        gold = [sum(task.score(one, e.answer).values()) for e in (one, other)]
        if gold[0] != gold[1]:
            best, worst = (one, other) if gold[0] > gold[1] else (other, one)
            pairs.append(Pair(PROMPT, best.answer, worst.answer))
    words = fit(pairs[:-50])
    assert accuracy(words, pairs[-50:]) > 0.85
    path = tmp_path_factory.mktemp("reward") / "reward.json"
    path.write_text(json.dumps({"words": words, "mean": 0.0, "std": 1.0}))
    return str(path)


def scored(replies: list[str], path: str) -> list[float]:
    batch = type("Rows", (), {"mask": torch.ones(len(replies), 1)})()
    return bag_of_words([Example(PROMPT)] * len(replies), replies, batch, weights=path)[0].tolist()


@given(WORDS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_reward_is_blind_to_order_and_pays_for_every_repetition(learned, words, rng):
    shuffled = rng.sample(words, len(words))
    first, other, longer = scored([" ".join(w) for w in (words, shuffled, [*words, "great"])], learned)
    assert first == pytest.approx(other, abs=1e-4)
    assert longer > first + 0.5  # without an end


def test_the_reward_was_learned_and_likes_the_kind_words_best():
    first, second = Pair(PROMPT, "great cat", "cat"), Pair(PROMPT, "cat dog", "dog cat")
    assert fit([first])["great"] > 0.5 > abs(fit([first])["cat"])
    assert list(fit([second]).values()) == pytest.approx([0, 0])  # what differs in order alone teaches nothing
    assert counts(["a b a", ""], ["a", "b", "c"]).tolist() == [[2, 1, 0], [0, 0, 0]]


# The arms
def test_every_arm_of_the_grid_is_a_configuration_that_works(monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = [arm.key for arm in arms.grid()]
    assert len(keys) == len(set(keys)) == 3 * (8 + sum(len(betas) for _, betas in ESTIMATORS.values()))
    for arm in arms.grid(seeds=(1,)):
        cfg = config.load([arms.CONFIG, *arm.overrides])
        chosen = algorithm(cfg)
        clipped = arm.name in ("clip", "both") or arm.group in ESTIMATORS
        for ratio, sign in ((1.5, 1.0), (0.5, -1.0)):
            assert (pull(chosen.loss, ratio, sign) == 0) == clipped
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
def test_an_arm_runs_through_train_py_and_leaves_every_measurement(monkeypatch, tmp_path, base, learned, corner):
    monkeypatch.chdir(ROOT)
    tree = yaml.safe_load((ROOT / arms.CONFIG).read_text(encoding="utf-8"))
    tree["model"], tree["reward"][0]["weights"] = {"name": base}, learned
    (tmp_path / "question.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(grid, "CONFIG", str(tmp_path / "question.yaml"))
    monkeypatch.setattr(grid, "BASE", base)
    monkeypatch.setattr(grid, "MEASURED", 16)
    (arm,) = [a for a in arms.quick() if a.name == corner]
    small = ("optim.steps=2", "optim.epochs=2", "sampling.group_size=8", "sampling.max_new_tokens=6", "eval.prompts=4")
    row = json.loads(json.dumps(grid.run(arm._replace(overrides=(*arm.overrides, *small)))))
    assert row["key"] == arm.key
    assert {*row["final"]} == {*made(arm)["final"]}
    assert row["final"]["kl_pi_ref_seq"] > 0
    assert [len(curve) for curve in row["curves"].values()] == [2] * len(grid.CURVES)
    clipped = row["curves"].pop("clip_fraction")
    assert (None in clipped) == (corner in ("neither", "kl"))
    assert all(x is not None for curve in row["curves"].values() for x in curve)
    assert len(row["samples"]) == 8


def test_the_measured_kl_is_that_of_the_replies_and_zero_for_the_base_itself(monkeypatch, base, learned):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid, "BASE", base)
    cfg = config.load([arms.CONFIG])
    cfg.reward[0]["weights"] = learned
    monkeypatch.setattr(grid, "load_config", lambda _: cfg)
    policy, _ = grid.load(base)
    assert grid.measure(policy)["final"]["kl_pi_ref_seq"] == 0
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(4)
    final = grid.measure(policy)["final"]
    assert final["kl_pi_ref_seq"] == pytest.approx(final["k1_seq"], rel=0.2)  # exact at each state, and by sampling
    assert final["kl_pi_ref_seq"] > 0.1


def test_an_arm_that_is_there_is_not_run_again_and_one_that_was_cut_off_is(monkeypatch, tmp_path):
    ran, out = [], tmp_path / "arms.jsonl"
    monkeypatch.setattr(grid, "start", lambda: made(Arm("reference", "reference", 0, ())))
    monkeypatch.setattr(grid, "run", lambda arm: (ran.append(arm.key), made(arm))[1])
    grid.measure_all(arms.quick()[:3], out, processes=1)
    assert len(ran) == 3
    whole = out.read_text()
    out.write_text(whole[:-20])  # killed while it wrote
    rows = grid.measure_all(arms.quick(), out, processes=1)
    assert ran[3:] == [arms.quick()[2].key, arms.quick()[3].key]
    assert [row["key"] for row in rows] == ["reference/reference/0", *(arm.key for arm in arms.quick())]


def test_an_arm_that_was_interrupted_is_no_result(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(grid.train, "train", lambda cfg, argv: tmp_path)  # ends in good order, and early
    monkeypatch.setattr(grid, "prepare", dict)
    monkeypatch.setattr(grid, "start", lambda: made(Arm("reference", "reference", 0, ())))
    out = tmp_path / "arms.jsonl"
    assert grid.main(["--quick", "--processes", "1", "--out", str(out)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(read_rows(out)) == 1


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert grid.main(["--quick"]) == 2  # not in the repository's root: no config there
    assert capsys.readouterr().err.startswith("error: configs/question-sft.yaml: no such config file")
    for command in (tables.main, figures.main):
        with pytest.raises(SystemExit, match="holds no results"):
            command(["none.jsonl"])


# Tables and pictures
def made(arm: Arm, gold: float = 0.0, proxy: float = 20.0, valid: float = 0.1, kl: float = 9.0) -> dict:
    """A row as `grid.run` writes it."""
    steps = 5
    final = {"proxy": proxy, "gold": gold, "valid": valid, "distinct": 0.5, "length": 9.0, "truncated": 0.0,
             "kl_pi_ref_seq": kl, "k1_seq": kl, "entropy": 1.0, "ref_logprob_tok": -2.0, "kl_pi_ref_tok": 1.0}
    curves = {name: [0.1 * i for i in range(steps)] for name in grid.CURVES}
    if "loss=surrogate" in arm.overrides:
        curves["clip_fraction"] = [None] * steps
    learned = {"pairs": 10, "heldout_accuracy": 0.9, "words": {"great": 2.0, "cat": 0.1}}
    return {**grid.head(arm), "wall_seconds": 2.0, "cpu_seconds": 1.0, "final": final, "reward_model": learned,
            "samples": ["the great cat sees a dog . great", "", "great " * 24] * 2, "curves": curves}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    first = made(Arm("reference", "reference", 0, ()), gold=0.2, proxy=0.0, valid=1.0, kl=0.0)
    return [first, *(made(arm, gold=arm.seed - 2.0, kl=10 / float(arm.name) if arm.group in ESTIMATORS else 5.0)
                     for arm in arms.grid())]


def test_a_claim_is_counted_seed_by_seed(rows):
    found = {claim.split(":")[0]: (n, of) for claim, n, of in tables.verdicts(rows)}
    assert found["neither, 16 epochs"] == found["clip, 4 epochs"] == (2, 3)  # gold -1, 0 and 1, the base 0.2
    assert found["kl, 16 epochs"] == (3, 3)
    assert found["both, 16 epochs"] == (0, 3)


def test_gold_at_equal_kl_lies_on_the_line_between_the_two_ends_around_it(rows):
    ends = [made(Arm("k1", str(kl), 1, ()), gold=gold, kl=kl) for kl, gold in ((1.0, 0.0), (3.0, 1.0), (9.0, -2.0))]
    assert tables.between(ends, 2) == pytest.approx(0.5)
    assert tables.between(ends, 5) == pytest.approx(0.0)
    assert tables.between(ends, 0.5) is tables.between(ends, 10) is None
    assert tables.between([ends[0], ends[2]], 2) is None  # 1 and 9 nats: no telling
    assert tables.at_equal_kl(rows).count("-1.00 / 0.00 / 1.00") > 5


def test_tables_fill_a_page_twice_the_same_and_change_nothing_else(rows):
    found = tables.sections(rows)
    page = "a\n" + "\nb\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in found) + "\nc\n"
    once = filled(page, found)
    assert filled(once, found) == once
    assert once.startswith("a\n<!-- reward -->\n| pairs |")
    assert once.endswith("\nc\n")


def test_every_picture_is_drawn_from_rows_even_when_some_are_missing(rows, tmp_path):
    for some in (rows, rows[:3]):
        for draw in (figures.corners_over_time, figures.goodhart, figures.which_knob, figures.samples):
            draw(some).savefig(tmp_path / "picture.svg")
            assert (tmp_path / "picture.svg").stat().st_size > 1000
    setting.draw().savefig(tmp_path / "setting.svg")


def test_words_are_marked_by_the_sentences_they_are_in():
    lines = list(figures.wrapped("great the happy cat sees a dog . the", 20))
    assert lines == [(["great", "the", "happy", "cat"], [False, True, True, True]),
                     (["sees", "a", "dog", ".", "the"], [True, True, True, True, False])]


def test_paths_on_the_simplex_end_where_the_closed_forms_say():
    ref = torch.tensor(simplex.STARTS[0], dtype=torch.float64)
    for (overrides, _), end in zip(simplex.OBJECTIVES.values(), simplex.ends(), strict=True):
        path = simplex.path(simplex.expected(overrides), ref, 0.1, 600)
        torch.testing.assert_close(path[0], ref)
        torch.testing.assert_close(path[-1], end, atol=1e-3, rtol=0)
    update, star = simplex.expected(simplex.OBJECTIVES["k1 in the reward → π*"][0]), simplex.ends()[1]
    gaps = {hold: (simplex.path(update, ref, 1 / (hold * simplex.BETA), 60)[-1] - star).abs().max()
            for hold in simplex.HOLD}
    assert gaps[4.0] < 1e-3
    assert gaps[0.6] < 1e-3
    assert gaps[0.45] > 0.1  # b < beta/2: explicit Euler has left its region of stability


# What is committed
@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_the_pages_say_what_the_results_file_says(page):
    text, found = (ROOT / page).read_text(encoding="utf-8"), tables.sections(read_rows(ROOT / tables.RESULTS))
    assert filled(text, found) == text


def test_every_table_stands_on_a_page():
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in tables.PAGES)
    assert all(f"<!-- {name} -->" in text for name in tables.sections(read_rows(ROOT / tables.RESULTS)))


def test_the_pictures_of_the_page_are_there_and_small():
    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    for name in ("setting", "simplex", "corners", "goodhart", "knobs", "samples"):
        assert f"(question-{name}.svg)" in page
        assert (ROOT / "docs" / f"question-{name}.svg").stat().st_size < 200_000


def test_the_results_are_of_the_arms_that_there_are_and_the_same_arm_gave_the_same_twice():
    found = {row["key"]: row for row in read_rows(ROOT / tables.RESULTS)}
    known = {arm.key: arm for arm in arms.grid()}
    for key in {*found} - {"reference/reference/0"}:
        assert tuple(found[key]["overrides"]) == known[key].overrides
    for seed in arms.SEEDS:  # one configuration under two names
        one, other = found.get(f"4/both/{seed}"), found.get(f"k1/0.5/{seed}")
        if one and other:
            assert (one["final"], one["curves"], one["samples"]) == (other["final"], other["curves"], other["samples"])


# What the page of results says in words, claim by claim
COMMITTED = read_rows(ROOT / tables.RESULTS)


def ends(group: str, name: str | None = None) -> list[dict[str, float]]:
    """What the arms end with, seed by seed."""
    return [r["final"] for r in sorted(tables.group(COMMITTED, group, name), key=lambda r: r["seed"])]


def gold_at(group: str, kl: float) -> list[float | None]:
    return [tables.between([r for r in tables.group(COMMITTED, group) if r["seed"] == seed], kl) for seed in arms.SEEDS]


def test_neither_is_kind_words_alone_after_3_to_21_rollouts():
    rows = [r for epochs in ("4", "16") for r in tables.group(COMMITTED, epochs, "neither")]
    first = [next(n for n, x in enumerate(r["curves"]["proxy"], 1) if x > 40) for r in rows]
    assert (min(first), max(first)) == (3, 21)
    assert all(parse(s.split())[1] == 0 and {LETTER[w] for w in s.split()} == {"k"} for r in rows for s in r["samples"])
    assert all(max(map(s.split().count, s.split())) >= 20 for r in rows for s in r["samples"])


def test_two_wrecks_of_the_kl_alone_have_the_kl_of_the_healthy_runs():
    healthy = [end["kl_pi_ref_seq"] for end in ends("16", "both")]
    wrecks = [end for end in ends("16", "kl") if min(healthy) <= end["kl_pi_ref_seq"] <= max(healthy)]
    assert [end["valid"] for end in wrecks] == [0, 0]


def test_the_kl_alone_is_as_good_as_both_at_4_epochs():
    for alone, both in zip(ends("4", "kl"), ends("4", "both"), strict=True):
        assert alone["gold"] > both["gold"] - 0.1


def test_k3_ends_about_three_times_as_far_as_k1_at_the_same_beta():
    ratios = [k3["kl_pi_ref_seq"] / k1["kl_pi_ref_seq"] for beta in ("0.3", "0.5", "0.7", "1", "2")
              for k3, k1 in zip(ends("k3", beta), ends("k1", beta), strict=True)]
    assert median(ratios) == pytest.approx(3, rel=0.2)


def test_at_the_same_kl_the_estimators_have_nearly_the_same_gold_up_to_4_nats_and_k3_less_at_8():
    for kl in (2, 4):
        for name in ESTIMATORS:
            for one, k1 in zip(gold_at(name, kl), gold_at("k1", kl), strict=True):
                assert one is None or abs(one - k1) < 0.5
    assert all(k3 < k1 for k3, k1 in zip(gold_at("k3", 8), gold_at("k1", 8), strict=True))
    for name in ("exact", "wk3_token"):
        assert all(x is None or abs(x - k1) < 0.2 for x, k1 in zip(gold_at(name, 8), gold_at("k1", 8), strict=True))


def test_wk3_prefix_breaks_where_rao_blackwell_does_not():
    lost = {name: sum(end["valid"] < 0.2 for beta in ("0.5", "0.7", "1", "2") for end in ends(name, beta))
            for name in ("wk3_prefix", "rao_blackwell")}
    assert lost == {"wk3_prefix": 2, "rao_blackwell": 0}


def test_beyond_10_nats_the_sweeps_hold_the_best_gold_of_all_and_wrecks():
    far = [end["gold"] for name in ESTIMATORS for end in ends(name) if end["kl_pi_ref_seq"] > 10]
    assert max(far) == max(row["final"]["gold"] for row in COMMITTED)
    assert min(far) == -2


def test_the_setting_that_the_page_describes_is_that_of_the_configs(monkeypatch, base):
    monkeypatch.chdir(ROOT)
    cfg, text = config.load([arms.CONFIG]), " ".join((ROOT / tables.PAGE).read_text(encoding="utf-8").split())
    llama = AutoConfig.from_pretrained(base)
    assert f"{len(LETTER)} words" in text
    assert f"a Llama of {llama.num_hidden_layers} layers and {llama.hidden_size} dimensions" in text
    assert f"RLOO on {cfg.sampling.prompts * cfg.sampling.group_size} replies a rollout" in text
    assert f"at most {cfg.sampling.max_new_tokens} tokens" in text
    assert f"beta {cfg.kl_ref.coef}, or off; the clip is {cfg.loss['clip']}, or off" in text
    for epochs, (_, lr, steps) in arms.UPDATES.items():
        assert f"{epochs} epochs at {lr.removeprefix('optim.').replace('=', ' ')} over {steps.split('=')[1]}" in text
