"""A reward model's score is about one text, whatever pads it; the whole pipeline learns what the labels mean."""

import json
from pathlib import Path

import pytest
import torch
from preference_models import classifier, words
from runs_fixture import make_base
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train
from rlkl import cli
from rlkl.cli.reward_model import normalise
from rlkl.errors import UserError
from rlkl.model import decode, load
from rlkl.rewards import REWARDS, judge
from rlkl.rewards.models import load_reward_model, reward_model
from rlkl.supervised import collate, item_of
from rlkl.types import Example

pytest_plugins = ("runs_fixture",)
TEXTS = ["a", "hello there", "12+34=46", "The quick brown fox, and so on."]


def batch_of(tokenizer, prompts, replies, truncated=()):
    """What a sampler would have given, and the examples it was asked."""
    items = [item_of(tokenizer, p, [r], [c]) for p, r, c in
             zip(prompts, replies, truncated or [False] * len(replies), strict=True)]
    batch = collate(items, tokenizer.pad_token_id)
    batch.truncated = torch.tensor(truncated or [False] * len(replies))
    return [Example(p) for p in prompts], replies, batch


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert"])
def test_a_score_depends_on_no_other_row_and_on_no_padding(tmp_path, kind, pad_is_eos):
    """Also where pad = eos, at which Hugging Face's own rule reads the token before the EOS."""
    model = load_reward_model(str(classifier(tmp_path, kind, pad_is_eos=pad_is_eos)), "path")
    rows = [model.read("q: ", text, True) for text in TEXTS]
    alone = torch.stack([model.score([r], 1)[0] for r in rows])
    assert alone.std() > 1e-2
    for order, budget in (([0, 1, 2, 3], 10**6), ([2, 0, 3, 1], 10**6), ([3, 2, 1, 0], 40)):
        torch.testing.assert_close(model.score([rows[i] for i in order], budget), alone[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_transformers_gives_the_same_score_to_a_padded_row_unless_pad_is_eos(tmp_path, kind):
    for pad_is_eos in (False, True):
        path = classifier(tmp_path / str(pad_is_eos), kind, pad_is_eos=pad_is_eos)
        model, lm = load_reward_model(str(path), "path"), AutoModelForSequenceClassification.from_pretrained(path)
        row = model.read("q: ", "yes", True)
        pad = model.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * 3])
        mask = torch.tensor([[1] * len(row) + [0] * 3])
        with torch.no_grad():
            theirs = lm(input_ids=ids, attention_mask=mask).logits[0, 0]
        agree = abs(model.score([row], 99)[0] - theirs) < 1e-5
        assert agree != pad_is_eos


def test_the_whole_text_is_read_prompt_reply_and_the_eos_of_a_finished_one(tmp_path):
    path = str(classifier(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    scores = {}
    for prompt, reply, cut in (("q", "a", False), ("r", "a", False), ("q", "b", False), ("q", "a", True)):
        scores[prompt, reply, cut] = judge_one(path, *batch_of(tokenizer, [prompt], [reply], [cut]))
    assert len({round(x, 4) for x in scores.values()}) == 4


def judge_one(path, examples, replies, batch, **options) -> float:
    return reward_model(examples, replies, batch, path=path, **options)[0].item()


def test_the_ids_that_were_sampled_are_scored_where_the_model_reads_them_as_the_same_text(tmp_path):
    model = load_reward_model(str(classifier(tmp_path)), "path")
    ids = model.tokenizer("cd").input_ids
    eos = model.tokenizer.eos_token_id
    asked = model.tokenizer("ab").input_ids
    assert model.read("ab", "cd", False, [*ids, eos]) == [*asked, *ids, eos]
    assert model.read("ab", "cd", True, [40, 41, 42]) == [*asked, *ids, eos]  # another tokenizer's: the text is read


def test_a_reward_model_with_another_tokenizer_reads_the_text(tmp_path):
    """Words to it, characters to the policy: its score is that of the words, and the two policies' batches agree."""
    other = words("good", "bad", "film", "a")
    path = str(classifier(tmp_path / "words", tokenizer=other))
    ours = AutoTokenizer.from_pretrained(classifier(tmp_path / "chars"))
    prompts, replies = ["a film", "a film"], ["good film", "bad film"]
    by_text = reward_model(*batch_of(ours, prompts, replies), path=path)[0]
    model = load_reward_model(path, "path")
    end = [other.eos_token_id]
    expected = model.score([other(f"a film {r}").input_ids + end for r in replies], 99)
    torch.testing.assert_close(by_text, expected)
    assert (by_text[0] - by_text[1]).abs() > 1e-2


def test_chat_messages_go_through_the_models_own_template_as_one_conversation(tmp_path):
    path = classifier(tmp_path)
    model = load_reward_model(str(path), "path")
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
    ids = model.read([{"role": "user", "content": "hi"}], "yo", True, [1, 2])
    assert model.tokenizer.decode(ids) == "[user]hi.[assistant]yo."


def test_what_is_longer_than_the_context_loses_its_beginning(tmp_path):
    model = load_reward_model(str(classifier(tmp_path)), "path")
    ids = model.read("x" * 200, "end", True)
    assert len(ids) == 64
    assert model.tokenizer.decode(ids, skip_special_tokens=True).endswith("xend")


def test_rewards_are_normalised_by_the_configs_mean_and_std_unless_switched_off(tmp_path):
    path = classifier(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"reward_mean": 3.0, "reward_std": 2.0}))
    asked = batch_of(AutoTokenizer.from_pretrained(path), ["q"] * 4, TEXTS)
    raw = reward_model(*asked, path=str(path), normalise=False)[0]
    torch.testing.assert_close(reward_model(*asked, path=str(path))[0], (raw - 3) / 2)


def test_a_single_reply_of_the_reference_has_a_mean_and_no_spread_to_divide_by(tmp_path):
    model = load_reward_model(str(classifier(tmp_path)), "path")
    row = model.read("q: ", "hello there", True)
    normalise(model, [row], 64)
    assert model.lm.config.reward_mean == pytest.approx(model.score([row], 64).item())
    assert model.lm.config.reward_std == 1.0


def test_the_score_of_a_classifier_of_several_labels_is_the_log_odds_of_one(tmp_path):
    path = classifier(tmp_path, labels=("bad", "fair", "good"))
    asked = batch_of(AutoTokenizer.from_pretrained(path), ["q"], ["hello"])
    lm, ids = AutoModelForSequenceClassification.from_pretrained(path), asked[2]
    row = torch.cat([ids.prompt_ids, ids.response_ids], 1)
    with torch.no_grad():
        p = lm(input_ids=row).logits[0].softmax(-1)
    assert judge_one(str(path), *asked, label="good") == pytest.approx((p[2] / (1 - p[2])).log().item(), abs=1e-4)
    with pytest.raises(UserError, match=r"tells 3 labels apart.*bad, fair, good"):
        reward_model(*asked, path=str(path), label="nice")


def test_what_is_no_reward_model_is_one_line(tmp_path, base):
    asked = batch_of(AutoTokenizer.from_pretrained(base), ["q"], ["hello"])
    for path, message in ((base, "no weights for score.weight.*rlkl reward-model"), (tmp_path, "not a sequence class")):
        with pytest.raises(UserError, match=message):
            reward_model(*asked, path=str(path))
        with pytest.raises(UserError, match=message):
            judge(lambda *x, p=path: REWARDS["reward_model"](*x, path=str(p)), *asked)


# The pipeline: sample, label, reward model; then PPO and GRPO against it, measured by the rule the labels came from
LARGE = '''from rlkl.types import Example


class Large:
    """How many of a reply's 6 characters are digits from 5 on. A rule that the policy is never shown."""

    def __init__(self, split):
        self.prompts = [f"{i}:" for i in range(3000)][:: 1 if split == "train" else -1][:2900]

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return Example(self.prompts[index])

    def score(self, example, reply):
        return sum(c in "56789" for c in reply) / 6
'''


def rule(reply: str) -> float:
    return sum(c in "56789" for c in reply) / 6


SMALL = ("task=large.py:Large", "sampling.max_new_tokens=6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a policy, pairs of its replies labelled by the rule, and the reward model of the pairs."""
    folder = tmp_path_factory.mktemp("pipeline")
    base = make_base(folder / "base")
    (folder / "large.py").write_text(LARGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        label = ["label", *SMALL, f"model.name={base}", "sampling.samples=4"]
        assert cli.main([*label, "sampling.prompts=2900", "out=pairs.jsonl"]) == 0
        for name, seed in (("one", 0), ("again", 0), ("other", 1)):
            assert cli.main([*label, "sampling.prompts=50", f"seed={seed}", f"out={name}.jsonl"]) == 0
        assert cli.main(["reward-model", "data=pairs.jsonl", f"model.name={base}", "run=reward", "optim.epochs=6",
                         "optim.batch=32", "optim.lr=1e-2"]) == 0
    return folder


def test_the_labels_are_the_rules(trained):
    rows = [json.loads(line) for line in (trained / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 2000
    assert all(rule(r["chosen"]) > rule(r["rejected"]) for r in rows)
    one, other, again = ((trained / f"{name}.jsonl").read_text() for name in ("one", "other", "again"))
    assert one == again != other  # the same seed, the same file


def test_the_reward_model_is_right_on_nine_held_out_pairs_in_ten_and_says_how_sure_it_is(trained):
    found = json.loads((trained / "reward" / "heldout.json").read_text())
    assert found["accuracy"] >= 0.9
    assert found["margin"] > 1
    assert found["calibration_error"] < 0.1
    assert sum(b["pairs"] for b in found["bins"]) > 50


def test_the_rewards_of_the_references_replies_have_mean_0_and_std_1(trained):
    rows = [json.loads(line) for line in (trained / "pairs.jsonl").read_text().splitlines()]
    tokenizer = load(str(trained / "base"))[1]
    prompts = [r["prompt"] for r in rows for _ in range(2)]
    replies = [r[k] for r in rows for k in ("chosen", "rejected")]
    cut = [c for r in rows for c in r.get("truncated", [False, False])]
    scores = reward_model(*batch_of(tokenizer, prompts, replies, cut), path=str(trained / "reward" / "model"))[0]
    assert scores.mean().abs() < 0.1  # the training pairs are 8 in 10 of these
    assert scores.std() == pytest.approx(1, abs=0.1)


def test_rewards_may_be_normalised_on_replies_of_a_policy_instead(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert cli.main(["reward-model", "data=pairs.jsonl", "model.name=base", "run=other", "optim.lr=0",
                     "reference.name=base", "reference.prompts=8", "reference.max_new_tokens=6"]) == 0
    config = json.loads(Path("other/model/config.json").read_text())
    assert config["reward_std"] > 0
    assert config["reward_mean"] != json.loads(Path("reward/model/config.json").read_text())["reward_mean"]


@pytest.mark.parametrize("options", [
    ("loss=ppo", "advantage=gae", "model.critic=head", "sampling.prompts=48", "sampling.group_size=1"),
    ("loss=grpo", "advantage=dr_grpo", "sampling.prompts=12", "sampling.group_size=4")], ids=["ppo", "grpo"])
def test_training_on_the_reward_model_under_the_kl_improves_the_rule_it_was_never_shown(trained, monkeypatch, options):
    monkeypatch.chdir(trained)
    folder = f"run-{options[0][5:]}"
    assert train.main([*SMALL, "model.name=base", "reward=reward_model", "reward.path=reward/model", f"run={folder}",
                       "kl_ref.coef=0.2", "optim.steps=25", "optim.lr=5e-3", "optim.critic_lr=1e-2", "optim.warmup=0",
                       "eval.every=0", "eval.prompts=10", "eval.samples=1", *options]) == 0
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert sum(r["reward"] for r in rows[-5:]) > sum(r["reward"] for r in rows[:5]) + 1
    assert 0.1 < rows[-1]["kl_pi_ref_seq"] < 10
    assert gold(str(max(Path(folder, "checkpoints").iterdir()))) > gold("base") + 0.3


def gold(name: str) -> float:
    """The mean of the rule over 400 replies."""
    from rlkl.cli.label import sampled
    from rlkl.schema_supervised import Draws

    policy, tokenizer = load(name)
    draws = Draws(samples=20, max_new_tokens=6)
    replies = [r for _, b in sampled(policy, tokenizer, [Example(f"{i}:") for i in range(20)], draws, seed=1)
               for r in decode(tokenizer, b)]
    return sum(map(rule, replies)) / len(replies)


def test_dpo_on_the_same_file_raises_the_accuracy_of_the_implicit_reward_and_the_rule(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert cli.main(["dpo", "data=pairs.jsonl", "model.name=base", "run=dpo", "beta=0.3", "optim.epochs=3",
                     "optim.batch=32", "optim.lr=3e-3"]) == 0
    rows = [json.loads(line) for line in Path("dpo/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert [r["heldout/accuracy"] for r in rows if "heldout/accuracy" in r][-1] > 0.8
    assert gold("dpo/model") > gold("base") + 0.3
    assert load_file("base/model.safetensors").keys() == load_file("dpo/model/model.safetensors").keys()


def test_labels_with_noise_are_bradley_terrys(trained, monkeypatch):
    """Scores 0 and 1, noise 1: chosen wins with probability sigmoid(1) = 0.73."""
    monkeypatch.chdir(trained)
    Path("given.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}", "replies": ["7" * 6, "1"]}) + "\n" for i in range(400)))
    assert cli.main(["label", *SMALL, "model.name=base", "replies=given.jsonl", "noise=1", "out=noisy.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("noisy.jsonl").read_text().splitlines()]
    assert len(rows) == 400
    assert sum(r["chosen"] == "777777" for r in rows) / 400 == pytest.approx(0.731, abs=0.06)
