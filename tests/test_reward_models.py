"""Reward models: the score of a text, loading, and the pipeline from labels to PPO, GRPO, DPO."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from preference_models import classifier, word_tokenizer
from runs_fixture import make_base
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train
from rlkl import cli
from rlkl.cli.label import generate_responses
from rlkl.cli.reward_model import normalise
from rlkl.errors import UserError
from rlkl.policy.model import load
from rlkl.rewards import REWARDS, compute_scores
from rlkl.rewards.models import load_reward_model, reward_model
from rlkl.supervised.data import collate, tokenize
from rlkl.supervised.schema import LabelSampling
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)
TEXTS = ["a", "hello there", "12+34=46", "The quick brown fox, and so on."]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A Llama classifier with one label. Tests that change files copy it."""
    return classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


def batch_of(tokenizer, prompts, responses, truncated=None):
    """The arguments of a reward: examples, responses, and the batch a sampler would have given."""
    truncated = truncated or [False] * len(responses)
    items = [
        tokenize(tokenizer, prompt, [response], [cut])
        for prompt, response, cut in zip(prompts, responses, truncated, strict=True)
    ]
    batch = collate(items, tokenizer.pad_token_id)
    batch.truncated = torch.tensor(truncated)
    return [Example(prompt) for prompt in prompts], responses, batch


# ------------------------------------------------------------------ the score of one text


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert"])
def test_a_score_depends_on_no_other_row_and_on_no_padding(tmp_path, kind, pad_is_eos):
    model = load_reward_model(str(classifier(tmp_path, kind, pad_is_eos=pad_is_eos)), "path")
    rows = [model.tokenize("q: ", text, True) for text in TEXTS]
    alone = torch.stack([model.score([row], 1)[0] for row in rows])
    assert alone.std() > 1e-2
    for order, max_tokens in (([0, 1, 2, 3], 10**6), ([2, 0, 3, 1], 10**6), ([3, 2, 1, 0], 40)):
        scores = model.score([rows[i] for i in order], max_tokens)
        torch.testing.assert_close(scores, alone[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_scores_a_padded_row_alike_unless_pad_is_eos(tmp_path, kind):
    """With pad = eos transformers reads the token before the EOS."""
    for pad_is_eos in (False, True):
        path = classifier(tmp_path / str(pad_is_eos), kind, pad_is_eos=pad_is_eos)
        model = load_reward_model(str(path), "path")
        lm = AutoModelForSequenceClassification.from_pretrained(path)
        row = model.tokenize("q: ", "yes", True)
        ids = torch.tensor([row + [model.tokenizer.pad_token_id] * 3])
        mask = torch.tensor([[1] * len(row) + [0] * 3])
        with torch.no_grad():
            theirs = lm(input_ids=ids, attention_mask=mask).logits[0, 0]
        agree = abs(model.score([row], 99)[0] - theirs) < 1e-5
        assert agree != pad_is_eos


def test_prompt_response_and_the_eos_of_a_finished_response_are_read(path, tokenizer):
    cases = [("q", "a", False), ("r", "a", False), ("q", "b", False), ("q", "a", True)]
    prompts, responses, truncated = map(list, zip(*cases, strict=True))
    scores = reward_model(*batch_of(tokenizer, prompts, responses, truncated), path=str(path))[0]
    assert len({round(x, 4) for x in scores.tolist()}) == 4


def test_sampled_ids_are_read_as_they_are_if_they_mean_the_same_text(path):
    model = load_reward_model(str(path), "path")
    prompt, response = model.tokenizer("ab").input_ids, model.tokenizer("cd").input_ids
    eos = model.tokenizer.eos_token_id
    assert model.tokenize("ab", "cd", False, [*response, eos]) == [*prompt, *response, eos]
    # These ids are from another vocabulary, so the text is read.
    assert model.tokenize("ab", "cd", True, [40, 41, 42]) == [*prompt, *response, eos]


def test_a_reward_model_with_another_tokenizer_reads_the_text(tmp_path, tokenizer):
    """Its tokens are words and those of the policy characters."""
    words = word_tokenizer("good", "bad", "film", "a")
    path = str(classifier(tmp_path, tokenizer=words))
    prompts, responses = ["a film", "a film"], ["good film", "bad film"]
    scores = reward_model(*batch_of(tokenizer, prompts, responses), path=path)[0]
    rows = [[*words(f"a film {response}").input_ids, words.eos_token_id] for response in responses]
    torch.testing.assert_close(scores, load_reward_model(path, "path").score(rows, 99))
    assert (scores[0] - scores[1]).abs() > 1e-2


def test_chat_messages_go_through_the_models_own_template_as_one_conversation(path):
    model = load_reward_model(str(path), "path")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
    model.tokenizer.chat_template = template
    ids = model.tokenize([{"role": "user", "content": "hi"}], "yo", True, [1, 2])
    assert model.tokenizer.decode(ids) == "[user]hi.[assistant]yo."


def test_a_text_longer_than_the_context_loses_its_beginning(path):
    model = load_reward_model(str(path), "path")
    ids = model.tokenize("x" * 200, "end", True)
    assert len(ids) == 64
    assert model.tokenizer.decode(ids, skip_special_tokens=True).endswith("xend")


def test_rewards_are_normalised_by_the_configs_mean_and_std_unless_switched_off(
    tmp_path, path, tokenizer
):
    folder = shutil.copytree(path, tmp_path / "normalised")
    config = json.loads((folder / "config.json").read_text())
    config |= {"reward_mean": 3.0, "reward_std": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    batch = batch_of(tokenizer, ["q"] * 4, TEXTS)
    raw = reward_model(*batch, path=str(folder), normalise=False)[0]
    torch.testing.assert_close(reward_model(*batch, path=str(folder))[0], (raw - 3) / 2)


def test_normalising_on_one_text_gives_its_mean_and_a_std_of_1(path):
    model = load_reward_model(str(path), "path")
    row = model.tokenize("q: ", "hello there", True)
    normalise(model, [row], 64)
    assert model.lm.config.reward_mean == pytest.approx(model.score([row], 64).item())
    assert model.lm.config.reward_std == 1.0


def test_the_score_of_a_classifier_of_several_labels_is_the_log_odds_of_one(tmp_path, tokenizer):
    path = classifier(tmp_path, labels=("bad", "fair", "good"))
    examples, responses, batch = batch_of(tokenizer, ["q"], ["hello"])
    lm = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
        p = lm(input_ids=ids).logits[0].softmax(-1)[2].item()
    score = reward_model(examples, responses, batch, path=str(path), label="good")[0].item()
    assert score == pytest.approx(torch.logit(torch.tensor(p)).item(), abs=1e-4)
    with pytest.raises(UserError, match=r"has 3 labels.*bad, fair, good"):
        reward_model(examples, responses, batch, path=str(path), label="nice")


def test_what_is_not_a_reward_model_is_refused(tmp_path, base):
    batch = batch_of(AutoTokenizer.from_pretrained(base), ["q"], ["hello"])
    headless = "no weights for score.weight.*rlkl reward-model"
    for path, message in ((base, headless), (tmp_path, "not a sequence class")):
        with pytest.raises(UserError, match=message):
            reward_model(*batch, path=str(path))
        with pytest.raises(UserError, match=message):
            compute_scores(lambda *x, p=path: REWARDS["reward_model"](*x, path=str(p)), *batch)


# ------------------------------------------------------------------ the pipeline
# Sample, label, train a reward model. Then PPO and GRPO against it, and DPO on the pairs, measured
# by the score that the labels came from.

TASK = '''from rlkl.types import Example


class LargeDigits:
    """Paid: the share of a response's 6 characters that are digits from 5 on."""

    def __init__(self, split):
        self.prompts = [f"{i}:" for i in range(3000)][:: 1 if split == "train" else -1][:2900]

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return Example(self.prompts[index])

    def score(self, example, response):
        return sum(c in "56789" for c in response) / 6
'''
TASK_OPTIONS = ["task=large.py:LargeDigits", "sampling.max_new_tokens=6"]


def task_score(response: str) -> float:
    """The score of TASK, which PPO, GRPO and DPO are never shown."""
    return sum(c in "56789" for c in response) / 6


def run(*argv: str) -> None:
    """A command that must succeed."""
    assert cli.main(list(argv)) == 0


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy (base), labelled pairs of its responses, and a reward model trained on them."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_base(folder / "base")
    (folder / "large.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        label = ["label", *TASK_OPTIONS, "model.name=base", "sampling.samples=4"]
        run(*label, "sampling.prompts=2900", "out=pairs.jsonl")
        for name, seed in (("one", 0), ("again", 0), ("other", 1)):
            run(*label, "sampling.prompts=50", f"seed={seed}", f"out={name}.jsonl")
        optim = ["optim.epochs=6", "optim.batch=32", "optim.lr=1e-2"]
        run("reward-model", "data=pairs.jsonl", "model.name=base", "run=reward", *optim)
    return folder


@pytest.fixture(scope="module")
def base_score(folder) -> float:
    return mean_task_score(folder / "base")


def mean_task_score(path: Path) -> float:
    """The mean score of 400 responses."""
    policy, tokenizer = load(str(path))
    sampling = LabelSampling(samples=20, max_new_tokens=6)
    examples = [Example(f"{i}:") for i in range(20)]
    responses = []
    for _, texts, _ in generate_responses(policy, tokenizer, examples, sampling, seed=1):
        responses += texts
    return sum(map(task_score, responses)) / len(responses)


def test_the_response_with_the_higher_score_is_chosen(folder):
    rows = read_rows(folder / "pairs.jsonl")
    assert len(rows) > 2000
    assert all(task_score(row["chosen"]) > task_score(row["rejected"]) for row in rows)


def test_the_same_seed_labels_the_same_pairs(folder):
    one, again, other = (
        (folder / f"{name}.jsonl").read_text() for name in ("one", "again", "other")
    )
    assert one == again
    assert one != other


def test_the_reward_model_is_right_on_nine_held_out_pairs_in_ten_and_calibrated(folder):
    result = json.loads((folder / "reward" / "heldout.json").read_text())
    assert result["accuracy"] >= 0.9
    assert result["margin"] > 1
    assert result["calibration_error"] < 0.1
    assert sum(b["pairs"] for b in result["bins"]) > 50


def test_the_rewards_of_the_references_responses_have_mean_0_and_std_1(folder):
    rows = read_rows(folder / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    responses = [row[name] for row in rows for name in ("chosen", "rejected")]
    truncated = [cut for row in rows for cut in row.get("truncated", [False, False])]
    batch = batch_of(tokenizer, prompts, responses, truncated)
    scores = reward_model(*batch, path=str(folder / "reward" / "model"))[0]
    assert scores.mean().abs() < 0.1  # the mean is that of the training pairs, 9 in 10 of these
    assert scores.std() == pytest.approx(1, abs=0.1)


def test_rewards_may_be_normalised_on_responses_of_a_policy_instead(folder, monkeypatch):
    monkeypatch.chdir(folder)
    reference = ["reference.name=base", "reference.prompts=8", "reference.max_new_tokens=6"]
    argv = ["reward-model", "data=pairs.jsonl", "model.name=base", "run=other", "optim.lr=0"]
    run(*argv, *reference)
    config, of_pairs = (
        json.loads(Path(f"{run}/model/config.json").read_text()) for run in ("other", "reward")
    )
    assert config["reward_std"] > 0
    assert config["reward_mean"] != of_pairs["reward_mean"]


PPO = ["advantage=gae", "critic.kind=head", "sampling.prompts=48", "sampling.group_size=1"]
GRPO = ["advantage=dr_grpo", "sampling.prompts=12", "sampling.group_size=4"]


@pytest.mark.parametrize("options", [PPO, GRPO], ids=["ppo", "grpo"])
def test_training_on_the_reward_model_improves_the_score_it_was_trained_to_imitate(
    folder, base_score, monkeypatch, options
):
    monkeypatch.chdir(folder)
    out = Path(f"run-{options[0].removeprefix('advantage=')}")
    train.main(
        [
            *TASK_OPTIONS,
            *options,
            "model.name=base",
            "reward=reward_model",
            "reward.path=reward/model",
            f"run={out}",
            "kl_ref.coef=0.2",
            "optim.steps=25",
            "optim.lr=5e-3",
            "critic.lr=1e-2",
            "optim.warmup=0",
            "eval.every=0",
            "eval.prompts=10",
            "eval.samples=1",
            "scoring.processes=0",
        ]
    )
    rows = read_rows(out / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    assert 0.1 < rows[-1]["kl_pi_ref_sequence"] < 10
    assert mean_task_score(max((out / "checkpoints").iterdir())) > base_score + 0.3


def test_dpo_on_the_same_pairs_raises_its_accuracy_and_the_score(folder, base_score, monkeypatch):
    monkeypatch.chdir(folder)
    optim = ["optim.epochs=3", "optim.batch=32", "optim.lr=3e-3"]
    run("dpo", "data=pairs.jsonl", "model.name=base", "run=dpo", "beta=0.3", *optim)
    rows = read_rows(Path("dpo/metrics.jsonl"))
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["eval/accuracy"] > 0.8
    assert mean_task_score(Path("dpo/model")) > base_score + 0.3
    weights, start = (load_file(f"{name}/model.safetensors") for name in ("dpo/model", "base"))
    assert weights.keys() == start.keys()


def test_labels_with_noise_are_bradley_terrys(folder, monkeypatch):
    """Scores of 1 and 0, noise 1: the better one is chosen with probability sigmoid(1) = 0.73."""
    monkeypatch.chdir(folder)
    rows = [{"prompt": f"{i}", "responses": ["7" * 6, "1"]} for i in range(400)]
    Path("given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["label", *TASK_OPTIONS, "model.name=base", "responses=given.jsonl", "noise=1"]
    run(*argv, "out=noisy.jsonl")
    chosen = [row["chosen"] for row in read_rows(Path("noisy.jsonl"))]
    assert len(chosen) == 400
    assert chosen.count("777777") / 400 == pytest.approx(0.731, abs=0.06)


MINE = """
def brevity(example, response):
    return None if response.startswith("?") else -len(response)


def sampler(policy, prompt_ids, prompt_mask, uniforms, params):
    import torch
    from rlkl.rollout import naive
    assert not torch.is_grad_enabled()
    batch = naive(policy, prompt_ids, prompt_mask, uniforms, params)
    batch.sampler_logprobs[~batch.mask] = float("nan")
    return batch


def wrong(policy, prompt_ids, prompt_mask, uniforms, params):
    from rlkl.rollout import naive
    batch = naive(policy, prompt_ids, prompt_mask, uniforms, params)
    batch.truncated = batch.truncated[:, None]
    return batch
"""


@pytest.fixture
def mine(folder, monkeypatch) -> list[str]:
    """The arguments of `rlkl label` beside a file mine.py."""
    monkeypatch.chdir(folder)
    Path("mine.py").write_text(MINE)
    return ["label", *TASK_OPTIONS, "model.name=base"]


def test_a_text_reward_from_a_file_labels_given_texts_as_they_are(mine):
    """Characters that the tokenizer does not know stay; what has no score is left out."""
    rows = [
        {"prompt": "1", "responses": ["caf\u00e9\t\u00fc", "a long response", "?"]},
        {"prompt": "2", "responses": ["?", "?!"]},
        {"prompt": "3", "responses": ["same", "size"]},
    ]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(*mine, "responses=texts.jsonl", "reward=mine.py:brevity", "out=short.jsonl")
    (pair,) = read_rows(Path("short.jsonl"))
    assert (pair["chosen"], pair["rejected"]) == ("caf\u00e9\t\u00fc", "a long response")


def test_label_samples_with_a_backend_from_a_file_as_training_does(mine, capsys):
    """Without gradients, and what it returns is checked."""
    sampled = [*mine, "sampling.prompts=4", "sampling.samples=4"]
    run(*sampled, "sampling.backend=mine.py:sampler", "out=sampled.jsonl")
    run(*sampled, "sampling.backend=naive", "out=naive.jsonl")
    assert read_rows(Path("sampled.jsonl")) == read_rows(Path("naive.jsonl"))
    assert cli.main([*sampled, "sampling.backend=mine.py:wrong", "out=wrong.jsonl"]) == 2
    assert "Batch.truncated: shape" in capsys.readouterr().err


def test_label_drops_prompts_without_room_for_a_response(mine, capsys):
    assert cli.main([*mine, "sampling.max_new_tokens=64", "out=long.jsonl"]) == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err
    run(*mine, "sampling.prompts=90", "sampling.max_prompt_tokens=4", "out=long.jsonl")
    assert "train prompts are empty or longer than 4 tokens" in capsys.readouterr().out
    assert all(len(row["prompt"]) <= 4 for row in read_rows(Path("long.jsonl")))
