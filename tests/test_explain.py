"""What `rlkl explain` prints, against numbers that are derived here by hand.

Each table has a configuration on the left and on the right what explain must say of it: a closed
form, a count, or a root whose equation is checked. `check_lines` compares every number that is
printed with those, and a test asserts that the tables reach every line of the report.
"""

import ast
import contextlib
import functools
import inspect
import math
import re
import runpy
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlkl import cli
from rlkl.advantages import ADVANTAGES
from rlkl.errors import UserError
from rlkl.explain import Explanation, explain, footprint, on_cuda, report_text, traps
from rlkl.explain.footprint import LOGITS_HELD, TILES_HELD, logits
from rlkl.explain.predict import measure_algorithm
from rlkl.explain.tabular import BANDIT
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL, KL_LOSSES, TRAPS
from rlkl.logprobs import token_logprobs
from rlkl.logprobs.tiled import tile_for
from rlkl.losses import LOSSES
from rlkl.run import config
from rlkl.run.algorithm import resolve_algorithm
from rlkl.run.terminal import console
from rlkl.types import Head

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_LOSS = "kl_ref.coef=0.5 kl_ref.place=loss kl_ref.estimator="
PPO = "advantage=gae critic.kind=head"
DISCOUNT = "advantage=gae advantage.gamma=0.9 advantage.whiten=false critic.kind=head"
GREEDY = "advantage=remax sampling.baseline=greedy"

USER_CODE = '''
def ratio(new, batch):
    return (new.logprobs - batch.old_logprobs).exp()


def twice(new, batch):
    """Two times the surrogate."""
    return -2 * ratio(new, batch) * batch.advantages, {}


def half(new, batch):
    return -0.5 * ratio(new, batch) * batch.advantages, {}


def sign(new, batch):
    return -ratio(new, batch) * batch.advantages.sign(), {}


def with_entropy(new, batch):
    return -ratio(new, batch) * batch.advantages - 0.1 * new.entropy, {}


def third(rewards, values, mask, *, group_size):
    """A third of what is {paid}."""
    return (rewards.sum(1, keepdim=True) / 3).expand_as(rewards) * mask, None


def negative(rewards, values, mask, *, group_size):
    return -rewards.sum(1, keepdim=True).expand_as(rewards) * mask, None


def squared(new, batch):
    return (new.logprobs - batch.ref_logprobs) ** 2 / 2


def exponential(new, batch):
    u = new.logprobs - batch.ref_logprobs
    return (-u).exp() - 1 + u


def exact(new, batch):
    return new.kl_pi_ref


def absolute(new, batch):
    return (new.logprobs - batch.ref_logprobs).abs()


def no_gradient(new, batch):
    return new.logprobs - batch.ref_logprobs


def log_ratio(logprobs, ref_logprobs):
    return logprobs - ref_logprobs


def double_log_ratio(logprobs, ref_logprobs):
    return 2 * (logprobs - ref_logprobs)
'''


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory of this file: user.py, and the loss of the README."""
    path = tmp_path_factory.mktemp("user")
    (path / "user.py").write_text(USER_CODE, encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    loss = next(block for block in blocks if "my_loss.py" in block)
    (path / "my_loss.py").write_text(loss, encoding="utf-8")
    with contextlib.chdir(path):
        yield path


def load(case):
    return config.load([str(ROOT / a) if a.startswith("configs/") else a for a in case.split()])


WRITTEN = {}  # configuration → lines of report_text.py that wrote its report


@functools.cache
def explained(case):
    lines = WRITTEN.setdefault(case, set())
    add = Explanation.add

    def recording(report, topic, template, **numbers):
        lines.add(sys._getframe(1).f_lineno)
        add(report, topic, template, **numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Explanation, "add", recording)
        return explain(load(case))


@functools.cache
def measured(case):
    """What is known of a configuration before anything is written; the slow part of `explain`."""
    cfg = load(case)
    return measure_algorithm(cfg, resolve_algorithm(cfg))


@functools.cache
def section(case, name):
    """One section of the report alone: objective, kl_to_reference, trust_region, optimum."""
    report = Explanation()
    cfg = load(case)
    if name == "trust_region":
        report_text.trust_region(report, cfg, resolve_algorithm(cfg))
    else:
        getattr(report_text, name)(report, measured(case))
    return report


def lines_of(case, name):
    (lines,) = section(case, name).topics.values()
    return lines


def traps_of(case):
    m = measured(case)
    return traps(m.cfg, m.algorithm, m)


# ------------------------------------------------------------------ every number that is printed

CLIP = (0.5, 0.0, 0.0, 2.0)  # gradient where pi is half and twice pi_old: A > 0, then A < 0
FREE = (0.5, 2.0, 0.5, 2.0)
ZERO = (0.0, 0.0, 0.0, 0.0)


def expected_numbers(updates=1, gradient=CLIP, **more):
    return {"updates": updates} | gradient_numbers(gradient) | more


def gradient_numbers(values, suffix=""):
    names = ("up_half", "up_twice", "down_half", "down_twice")
    return {f"weight_{name}{suffix}": x for name, x in zip(names, values, strict=True)}


def selector_numbers(selected, others):
    return gradient_numbers(selected, "_selected") | gradient_numbers(others, "_others")


def tokens_of(prompt, sampled, scored, learned):
    return {
        "prompt_tokens": prompt,
        "sampled_tokens": sampled,
        "scored_tokens": scored,
        "learned_tokens": learned,
    }


def check_lines(case, expected, report=None):
    """The numbers are those expected, and each number in a line is one of them, and the reverse."""
    report = report or explained(case)
    numbers = {name: x for name, x in report.numbers.items() if not name.endswith("_gb")}
    if "sampled_tokens" not in expected:  # TOKENS has them
        numbers = {name: x for name, x in numbers.items() if not name.endswith("_tokens")}
    assert numbers == pytest.approx(expected, rel=1e-7, abs=1e-12), case
    for name, x in numbers.items():
        assert isinstance(x, int) == isinstance(expected[name], int), (case, name)
    assert printed(report) == {
        f"{x:,}" if isinstance(x, int) else f"{x:.6g}".lstrip("-") for x in report.numbers.values()
    }, case


def check_plan(case):
    """The GB that are printed are those of `footprint.memory`; SIZES and test_memory check it."""
    cfg = load(case)
    model_config, _ = footprint.architecture(cfg)
    numbers = explained(case).numbers
    width = footprint.width_of(cfg, cuda=False)
    exact = resolve_algorithm(cfg).exact_kl
    plan = footprint.memory(cfg, model_config, numbers["prompt_tokens"], width, exact, cuda=False)
    names = {"resident", "sampling", "learning", "peak", *plan._fields}
    if not plan.host:
        names.remove("host")
    assert {n for n in numbers if n.endswith("_gb")} == {f"{name}_gb" for name in names}
    for name in names:  # rounded to three digits
        size = getattr(plan, name) / 1e9
        assert numbers[f"{name}_gb"] == pytest.approx(size, rel=6e-3), (case, name)


CONSTANTS = (  # numbers of the sentences themselves
    "scores of 0 and 1",
    "^(1/(b + c))",
    "G/(G-1)",
    "A > 0:",
    "A < 0:",
    "1 = REINFORCE, 0 = clipped",
    "±0.2",
    "coef · (1 +",
    " - 1, ",
    "1/tokens",
    "1/(responses",
    "E[u²]/2",
    "weight 0 where",
    "falls to 0",
    "runs away to 0",
    "collapses to 1",
)
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def printed(report):
    """The numbers in the lines, without those of quoted docstrings and of CONSTANTS."""
    constants = re.compile("|".join(map(re.escape, CONSTANTS)))
    numbers = set()
    for lines in report.topics.values():
        for line in lines:
            if not line.startswith(("advantage ", "loss ", "not estimated")):
                numbers |= set(NUMBER.findall(constants.sub(" ", line)))
    return numbers


# Rows of a rollout, tokens of a response and of the longest prompt, passes over it: see TOKENS.
TINY_READ = 96 * 6 + 768 * 6  # tokens of 96 prompts and 768 responses
TINY = tokens_of(6, 768 * 6, 2 * TINY_READ, TINY_READ)
SHIPPED = {
    "countdown-3b": {"updates": 2},  # 16 · 8 rows in minibatches of 64
    "gsm8k-1.5b-grpo": {"updates": 4, "resample_rounds": 1},
    "gsm8k-1.5b-ppo": {"updates": 4, "beta": 0.001, "entropy_bonus": 0.001},
    "gsm8k-grpo": {"updates": 4},
    "gsm8k-lora-24gb": {"updates": 4},
    "gsm8k-ppo": {"updates": 4, "beta": 0.001, "entropy_bonus": 0.001},
    "question": {"updates": 4, "beta": 0.5},
    "real-grpo": {"updates": 1},
    "real-replies": {"updates": 1, "beta": 0.2},
    "real-ppo": {"updates": 2},
    "rlhf-0.5b": {"updates": 2, "beta": 0.05},
    "scratch-countdown": {"updates": 4, "resample_rounds": 3},
    "tiny-countdown": {
        "updates": 4,
        **tokens_of(11, 512 * 8, 2 * (64 * 11 + 512 * 8), 64 * 11 + 512 * 8),
    },
    "tiny-dapo": {"updates": 4, "overlong": 0.5, "buffer": 2, **TINY},
    "tiny-grpo": {"updates": 4, **TINY},
    "tiny-gym": {  # a second round of sampling, at most
        "updates": 4,
        "resample_rounds": 1,
        **tokens_of(18, 2 * 384 * 4, 2 * (48 * 18 + 384 * 4), 48 * 18 + 384 * 4),
    },
    "tiny-lora": {"updates": 4, **TINY},
    "tiny-ppo": {"updates": 2, **tokens_of(6, 512 * 6, 2 * 512 * 12, 512 * 12)},
    "tiny-rlhf-grpo": {"updates": 2, "beta": 0.2},
    "tiny-rlhf-ppo": {"updates": 2, "beta": 0.2},
    "tiny-rloo": {"updates": 4, "beta": 0.01, **TINY},
}


def test_every_number_of_the_shipped_configurations():
    paths = (ROOT / "configs").glob("*.yaml")
    runs = {p.stem for p in paths if not p.read_text().startswith("# rlkl ")}
    assert set(SHIPPED) == runs
    for name, expected in SHIPPED.items():
        case = f"configs/{name}.yaml"
        check_lines(case, expected_numbers(**expected))
        if "sampled_tokens" in expected:
            check_plan(case)


SELECTOR = "loss=clip_cov selector=clip_cov"
CASES = {  # these, with SHIPPED and BINARY, reach every line of the report
    # a mean that contains the response itself: the slope of A is (G-1)/G, and b = beta / slope
    f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=2": {
        "beta": 0.5,
        "beta_eff": 1.0,
        "group": 2,
    },
    f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=16": {  # measured in groups of 8
        "beta": 0.5,
        "beta_eff": 0.5 * 16 / 15,
        "group": 16,
    },
    f"{IN_LOSS}k3 advantage=dr_grpo sampling.group_size=5": {
        "beta": 0.5,
        "beta_eff": 0.5 * 5 / 4,
        "group": 5,
    },
    f"{IN_LOSS}rao_blackwell advantage=opo sampling.group_size=4": {
        "beta": 0.5,
        "beta_eff": 0.5 * 4 / 3,
        "group": 4,
    },
    # in the reward the KL passes through the same slope as the score
    "kl_ref.coef=0.05 entropy.coef=0.2 advantage=dr_grpo sampling.group_size=2": {
        "beta": 0.05,
        "entropy_bonus": 0.2,
        "beta_eff": 0.05,
        "entropy_eff": 0.4,
    },
    f"{IN_LOSS}k2 advantage=opo sampling.group_size=12 entropy.coef=0.1": {
        "beta": 0.5,
        "entropy_bonus": 0.1,
        "beta_eff": 0.5 * 12 / 11,
        "entropy_eff": 0.1 * 12 / 11,
    },
    "advantage=dr_grpo entropy.coef=0.01 optim.weights=constant": {
        "entropy_bonus": 0.01,
        "entropy_eff": 0.01 * 8 / 7,
    },
    # not linear in the score: no effective coefficient, or one beside the mean advantage
    "kl_ref.coef=0.05 entropy.coef=0.2": {"beta": 0.05, "entropy_bonus": 0.2},
    "kl_ref.coef=0.3 advantage=reinforce_pp": {"beta": 0.3},
    f"{IN_LOSS}k2 advantage=maxrl": {"beta": 0.5, "beta_eff": 0.5},
    "kl_ref.coef=0.1 kl_ref.estimator=k2": {"beta": 0.1},
    f"{IN_LOSS}wk2_token advantage=rloo entropy.coef=0.2": {"beta": 0.5, "entropy_bonus": 0.2},
    f"{GREEDY} kl_ref.coef=0.3 sampling.group_size=1 loss=reinforce": {
        "beta": 0.3,
        "gradient": (1.0, 1.0, 1.0, 1.0),
    },
    # coefficients that adapt, and the ends of their bands
    f"{PPO} kl_ref.coef=0.15 kl_ref.target=6 kl_ref.horizon=9000": {
        "beta": 0.15,
        "kl_target": 6.0,
        "rows": 64 * 8,
        "horizon": 9000,
    },
    "loss=surrogate kl_old.coef=0.5 kl_old.target=0.03": {
        "gradient": FREE,
        "kl_old_coef": 0.5,
        "kl_old_low": 0.02,
        "kl_old_high": 0.045,
    },
    "kl_old.coef=0.2 kl_old.stop=0.03 kl_old.estimator=k2": {
        "kl_old_coef": 0.2,
        "kl_old_stop": 0.03,
    },
    # updates: 400 rows in four minibatches, three times
    "kl_ref.coef=0.05 optim.epochs=3 optim.minibatch=100 sampling.prompts=50": {
        "beta": 0.05,
        "updates": 12,
    },
    "overlong.buffer=3 overlong.coef=0.25 sampling.zero_variance=drop optim.epochs=2": {
        "overlong": 0.25,
        "buffer": 3,
        "updates": 2,
    },
    "mismatch.truncate=token mismatch.cap=3 mismatch.reject=mean mismatch.low=0.9 "
    "mismatch.high=1.1": {"cap": 3.0, "low": 0.9, "high": 1.1},
    "model.name=no/such-model kl_ref.coef=0.5": {"beta": 0.5},
    "loss=user.py:sign": {"gradient": FREE},
    # user code
    f"{IN_LOSS}k2 advantage=rloo sampling.group_size=2 loss=user.py:twice": {
        "beta": 0.5,
        "beta_eff": 0.25,
        "strength": 2.0,
        "gradient": (1.0, 4.0, 1.0, 4.0),
    },
    f"{IN_LOSS}k2 advantage=maxrl loss=user.py:twice": {
        "beta": 0.5,
        "beta_eff": 0.25,
        "gradient": (1.0, 4.0, 1.0, 4.0),
    },
    "advantage=user.py:negative": {},
    "advantage=rloo loss=user.py:with_entropy entropy.coef=0.2": {
        "gradient": FREE,
        "entropy_bonus": 0.3,
        "entropy_eff": 0.3,
    },
}


def test_every_number_of_chosen_configurations():
    for case, expected in CASES.items():
        check_lines(case, expected_numbers(**expected))
    check_lines(SELECTOR, {"updates": 1} | selector_numbers(ZERO, CLIP))


def test_the_tables_reach_every_line_of_the_report():
    """So no line prints a number that is not checked above."""
    calls = {
        node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(report_text)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "report.add"
    }
    assert len(calls) > 35
    for case in [*CASES, SELECTOR, *(f"configs/{name}.yaml" for name in SHIPPED), *BINARY]:
        explained(case)
        calls -= WRITTEN[case]
    assert sorted(calls) == []


# ------------------------------------------------------------------ gradients of the losses


def gate(w, tau):
    """SAPO: 4 w σ(1-σ) of τ(w - 1), and 4 σ(1-σ) = 1/cosh²."""
    return w / math.cosh(tau * (w - 1) / 2) ** 2


GRADIENTS = {  # -∂loss/∂log pi over A, from pi_old = 0.2: to 0.1 and 0.4 where A > 0, then A < 0
    "loss=clip loss.epsilon=0.6 loss.epsilon_high=1.5": FREE,
    "loss=clip loss.delta=1.5 loss.epsilon_high=0.9": (0.5, 0.0, 0.0, 0.0),
    "loss=surrogate": FREE,
    "loss=reinforce": (1.0, 1.0, 1.0, 1.0),
    "loss=cispo": FREE,
    "loss=cispo loss.cap=1.4": (0.5, 1.4, 0.5, 1.4),
    "loss=gspo": CLIP,  # one token: its ratio is that of the response
    "loss=gspo loss.epsilon=0.6 loss.epsilon_high=1.1": FREE,
    "loss=gmpo": CLIP,  # |log 2| = 0.69 is beyond 0.4
    "loss=gmpo loss.epsilon=0.8 loss.epsilon_high=0.3": (0.5, 0.0, 0.5, 2.0),
    "loss=topr": (1.0, 1.0, 0.5, 1.0),
    "loss=vespo": (
        0.5**2 * math.exp(1.5),
        2**2 * math.exp(-3),
        0.5**3 * math.exp(1),
        2**3 * math.exp(-2),
    ),
    "loss=vespo loss.k=1 loss.lam=2 loss.k_negative=2 loss.lam_negative=1": (
        0.5 * math.exp(1),
        2 * math.exp(-2),
        0.5**2 * math.exp(0.5),
        2**2 * math.exp(-1),
    ),
    "loss=sapo": (gate(0.5, 1), gate(2, 1), gate(0.5, 1.05), gate(2, 1.05)),
    "loss=sapo loss.tau=2 loss.tau_negative=0.5": (
        gate(0.5, 2),
        gate(2, 2),
        gate(0.5, 0.5),
        gate(2, 0.5),
    ),
    "loss=spo": (1.75, -8.0, -0.75, 12.0),  # w (1 ∓ (w - 1)/0.2)
    "loss=spo loss.epsilon=0.5": (1.0, -2.0, 0.0, 6.0),
    "loss=dppo_tv": (0.5, 0.0, 0.5, 2.0),  # it moved by 0.1 and by 0.2; the limit is 0.15
    "loss=dppo_tv loss.epsilon=0.05 loss.epsilon_high=0.3 loss.cap=1.5": (0.5, 1.5, 0.0, 1.5),
    "loss=dppo_kl": (0.5, 0.0, 0.5, 2.0),  # KLs of 0.044 and 0.092; the limit is 0.05
    "loss=dppo_kl loss.epsilon=0.04 loss.epsilon_high=0.1": (0.5, 2.0, 0.0, 2.0),
}
SELECTED = {  # the same of selected tokens and of the others
    "loss=top_entropy selector=top_entropy": (CLIP, ZERO),
    "loss=clip_cov selector=clip_cov": (ZERO, CLIP),
    "loss=kl_cov selector=kl_cov": ((1.5, 1.0, -0.5, 3.0), FREE),  # w ∓ coef · sign(log w)
    "loss=kl_cov selector=kl_cov loss.coef=0.25": ((0.75, 1.75, 0.25, 2.25), FREE),
}


def test_the_gradient_of_a_token_that_has_moved_under_each_loss():
    for case, expected in GRADIENTS.items():
        report = section(case, "trust_region")
        check_lines(case, expected_numbers(gradient=expected), report)
    for case, (selected, others) in SELECTED.items():
        numbers = {"updates": 1} | selector_numbers(selected, others)
        check_lines(case, numbers, section(case, "trust_region"))
    named = {re.search(r"loss=(\w+)", case)[1] for case in [*GRADIENTS, *SELECTED]}
    assert named == set(LOSSES)


@pytest.mark.parametrize(
    ("case", "updates"),
    [
        ("", 1),
        ("sampling.prompts=8 optim.minibatch=64", 1),
        ("sampling.prompts=8 optim.minibatch=40", 2),
        ("sampling.prompts=8 optim.minibatch=16 optim.epochs=3", 12),
    ],
)
def test_with_one_update_no_clip_can_act_and_with_more_from_the_second_on(case, updates):
    lines = " ".join(lines_of(case, "trust_region"))
    several = f"{updates} updates per rollout: the clip can act from the second on"
    assert ("no clip can ever act" in lines) == (updates == 1)
    assert (several in lines) == (updates > 1)
    with_kl = " ".join(lines_of(f"{case} kl_ref.coef=0.1", "kl_to_reference"))
    assert (f"frozen over the {updates} updates" in with_kl) == (updates > 1)


# ------------------------------------------------------------------ the KL to the reference, traps

GRADIENT = {
    "sequence": "gradient  on-policy, that of KL(pi || ref) of whole responses",
    "token": "gradient  on-policy, that of KL(pi || ref) token by token",
    "forward": "gradient  on-policy, that of KL(ref || pi) token by token",
    "other": "gradient  on-policy, that of no KL that is known here",
}
OBJECTIVE = {
    "sequence": "maximise  E[score] - 0.5 · KL(pi || ref)",
    "token": "maximise  E[score] - 0.5 · Σ_t KL(pi || ref)(s_t)",
    "forward": "maximise  E[score] - 0.5 · Σ_t KL(ref || pi)(s_t)",
    "other": "maximise  E[score] - 0.5 · [the KL term as it is]",
}
KINDS = {  # whose gradient each estimator has: docs/explain.md derives it
    ("reward", "k1"): "sequence",
    ("reward", "k2"): "other",
    ("reward", "k3"): "other",
    ("loss", "k2"): "token",
    ("loss", "k3"): "forward",
    ("loss", "k3+"): "token",
    ("loss", "k2_sequence"): "sequence",
    ("loss", "wk2_token"): "other",
    ("loss", "wk3_token"): "token",
    ("loss", "wk3_prefix"): "sequence",
    ("loss", "exact_pi_ref"): "token",
    ("loss", "exact_ref_pi"): "forward",
    ("loss", "rao_blackwell"): "sequence",
    ("reward", "user.py:log_ratio"): "sequence",
    ("reward", "user.py:double_log_ratio"): "other",
    ("loss", "user.py:squared"): "token",
    ("loss", "user.py:exponential"): "forward",
    ("loss", "user.py:exact"): "token",
    ("loss", "user.py:absolute"): "other",
}


def charged(place, estimator, advantage):
    return (
        f"kl_ref.coef=0.5 kl_ref.place={place} kl_ref.estimator={estimator} advantage={advantage}"
    )


def test_each_kl_has_the_direction_that_theory_gives():
    built_in = {("reward", n) for n in KL} | {("loss", n) for n in KL_LOSSES}
    assert built_in == {pair for pair in KINDS if ":" not in pair[1]}
    for (place, estimator), kind in KINDS.items():
        case = charged(place, estimator, "rloo")
        check_lines(case, {"beta": 0.5}, section(case, "kl_to_reference"))
        # rloo has the slope 1, so b = beta where the KL is a known one in the loss
        effective = {"beta_eff": 0.5} if place == "loss" and kind != "other" else {}
        in_reward = {"beta": 0.5} if (place, kind) == ("reward", "sequence") else {}
        check_lines(case, effective | in_reward, section(case, "optimum"))
        lines = lines_of(case, "kl_to_reference")
        gradients = [line for line in lines if line.startswith("gradient")]
        assert len(gradients) == 1, case
        assert gradients[0].startswith(GRADIENT[kind]), case
        assert lines_of(case, "objective")[0] == OBJECTIVE[kind], case
        assert "pi, the policy in training, and ref, the frozen first policy" in lines[0]
        assert f"place     in the {place}" in lines[1]


def test_a_kl_term_without_a_gradient_is_found_out():
    case = f"{IN_LOSS}user.py:no_gradient advantage=rloo"
    assert "that of nothing: zero on average" in " ".join(lines_of(case, "kl_to_reference"))
    assert lines_of(case, "objective")[0] == "maximise  E[score]"


@pytest.mark.parametrize(
    ("place", "name", "reason"),
    [
        ("loss", "k1", "expected gradient is zero"),
        ("reward", "exact_pi_ref", "only a baseline"),
        ("reward", "exact_ref_pi", "only a baseline"),
        ("reward", "rao_blackwell", "only a baseline"),
    ],
)
def test_a_kl_that_would_constrain_nothing_is_refused_with_the_reason(place, name, reason):
    case = f"kl_ref.place={place} kl_ref.estimator={name}"
    with pytest.raises(UserError, match=reason):
        explained(f"kl_ref.coef=0.1 {case}")
    assert traps_of(f"kl_ref.coef=0 {case}") == []


STD_TRAP = {
    "loss": "advantages are divided by their std, and the KL is in the loss",
    "reward": "advantages are divided by their std, and the KL is in the reward",
}


def test_a_trap_is_one_line_and_only_where_it_is_one():
    """A std over the scores of a prompt is one; a std over the whole rollout is not."""
    assert set(TRAPS) <= set(KINDS)
    expected = {}
    for place, estimator in KINDS:
        own = [TRAPS[place, estimator]] if (place, estimator) in TRAPS else []
        expected[charged(place, estimator, "rloo")] = own
        if ":" not in estimator:
            expected[charged(place, estimator, "grpo")] = [*own, STD_TRAP[place]]
    for advantage in ("dr_grpo", "grpo advantage.scale=batch", "reinforce_pp"):
        expected[charged("reward", "k1", advantage)] = []
        expected[charged("loss", "k2", advantage)] = []
    for case, starts in expected.items():
        lines = traps_of(case)
        assert len(lines) == len(starts), case
        for line, start in zip(lines, starts, strict=True):
            assert line.startswith(start), case
            assert "\n" not in line


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_without_a_kl_there_is_no_trap_and_nothing_that_constrains(advantage):
    case = f"advantage={advantage}"
    assert traps_of(case) == []
    (line,) = lines_of(case, "kl_to_reference")
    assert line.startswith("off: nothing constrains pi to ref")
    assert "drifts as long as it trains" in lines_of(case, "objective")[1]


# ------------------------------------------------------------------ the optimum

ONE_TOKEN = "; this holds for responses of one token, for longer ones no closed form is known"
BEST = "all mass on the best-scored responses"
STAR = "pi* ∝ ref · exp(score / 0.25)"
REVERSE, FORWARD = "pi* ∝ ref · exp(score / b)", "pi = b · ref / (λ - score)"
EACH = ", each token for itself"
MEAN = "with b = 0.5 and A(pi) the mean advantage under pi itself"
BOTH = "pi ∝ (ref^b · exp(score))^(1/(b + c)) for responses of one token, with"
NO_ENTROPY_FORM = "with the entropy bonus no closed form in the scores is known"
UNKNOWN_KL = "no closed form is known, as the KL is none that is known; --verify"
NOT_REINFORCE = "no closed form is known, as at ratio 1 the loss is not REINFORCE; --verify"
FALLING = (
    "no closed form is known, as the highest-scoring response does not have the highest advantage"
)

FORMS = {  # the first line about the optimum; whether it holds for one token only is checked too
    "": BEST,
    DISCOUNT: BEST,
    "advantage=user.py:negative": FALLING,
    # the KL in the reward: pi* whatever the baseline and the scale
    **dict.fromkeys(
        [
            f"kl_ref.coef=0.25 {advantage}"
            for advantage in (
                "advantage=grpo",
                "advantage=grpo advantage.scale=batch",
                "advantage=rloo",
                "advantage=dr_grpo",
                "advantage=opo",
                "advantage=best_only",
                "advantage=reinforce_pp_baseline",
                GREEDY,
                PPO,
            )
        ],
        STAR,
    ),
    # a discount, and a std over tokens that differ, leave a gradient in longer responses
    "kl_ref.coef=0.25 advantage=reinforce_pp": STAR + ONE_TOKEN,
    f"kl_ref.coef=0.25 {DISCOUNT}": STAR + ONE_TOKEN,
    # the KL in the loss
    f"{IN_LOSS}k2_sequence advantage=rloo": f"{REVERSE}, with b = 0.5",
    f"{IN_LOSS}k2 advantage=rloo": f"{REVERSE}{EACH}, with b = 0.5",
    f"{IN_LOSS}k3 advantage=rloo": f"{FORWARD}{EACH}, with b = 0.5",
    f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=2": f"{REVERSE}{EACH}, with b = 1",
    f"{IN_LOSS}k2": f"{REVERSE}{EACH}, with b = beta · std(score)",
    f"{IN_LOSS}k2 {DISCOUNT}": f"{REVERSE}{EACH}, with b = 0.5{ONE_TOKEN}",
    f"{IN_LOSS}k2_sequence {DISCOUNT}": f"{REVERSE}, with b = 0.5{ONE_TOKEN}",
    f"{IN_LOSS}k3 {DISCOUNT}": f"{FORWARD}{EACH}, with b = 0.5{ONE_TOKEN}",
    # ... beside an advantage that is not linear in the score
    **dict.fromkeys(
        [
            f"{IN_LOSS}k2 advantage={advantage}"
            for advantage in (
                "grpo advantage.scale=batch",
                "reinforce_pp",
                "reinforce_pp_baseline",
                "best_only",
                "maxrl",
                # linear in pairs, in scores of 0 and 1, and in no others
                "maxrl sampling.group_size=2",
                "pass_at_k advantage.k=1 sampling.group_size=2",
            )
        ],
        f"pi* ∝ ref · exp(A(pi) / b){EACH}, {MEAN}",
    ),
    f"{IN_LOSS}k2 {PPO}": f"pi* ∝ ref · exp(A(pi) / b){EACH}, {MEAN}{ONE_TOKEN}",
    f"{IN_LOSS}k3 advantage=best_only": f"pi = b · ref / (λ - A(pi)){EACH}, {MEAN}",
    f"{IN_LOSS}wk2_token advantage=rloo": UNKNOWN_KL,
    # an entropy bonus
    "entropy.coef=0.25": NO_ENTROPY_FORM,
    "entropy.coef=0.25 advantage=rloo": f"pi ∝ exp(score / 0.25){EACH}",
    f"entropy.coef=0.25 {DISCOUNT}": f"pi ∝ exp(score / 0.25){EACH}{ONE_TOKEN}",
    "entropy.coef=0.25 advantage=dr_grpo sampling.group_size=2": f"pi ∝ exp(score / 0.5){EACH}",
    "entropy.coef=0.25 advantage=rloo kl_ref.coef=0.5": f"{BOTH} b = 0.5 and c = 0.25",
    f"{IN_LOSS}k2 entropy.coef=0.25 advantage=dr_grpo sampling.group_size=2": (
        f"{BOTH} b = 1 and c = 0.5"
    ),
    f"{IN_LOSS}k3 entropy.coef=0.25 advantage=rloo": NO_ENTROPY_FORM,
    f"{IN_LOSS}k2 entropy.coef=0.25 advantage=maxrl": NO_ENTROPY_FORM,
    f"{IN_LOSS}wk2_token entropy.coef=0.25 advantage=rloo": UNKNOWN_KL,
    # losses that leave tokens out
    "loss=clip_cov selector=clip_cov": NOT_REINFORCE,
    f"loss=clip_cov selector=clip_cov {IN_LOSS}wk2_token": NOT_REINFORCE,
    "loss=user.py:sign": NOT_REINFORCE,
}


def test_the_optimum_has_the_form_that_theory_gives():
    for case, form in FORMS.items():
        line = lines_of(case, "optimum")[0]
        assert line.startswith(form), case
        assert (ONE_TOKEN in line) == form.endswith(ONE_TOKEN), case
    assert {re.search(r"advantage=(\w+)", case + " advantage=grpo")[1] for case in FORMS} >= set(
        ADVANTAGES
    )


BINARY = {f"{IN_LOSS}{name} kl_ref.coef={beta}" for name in ("k2", "k3") for beta in (1, 1.6, 5)}
TWICE_BINARY = f"{IN_LOSS}k2 kl_ref.coef=3.2 loss=user.py:twice"
SHARES = {"1": 0.1, "5": 0.5, "9": 0.9}


def logit(p):
    return math.log(p / (1 - p))


def smallest_beta(p_ref):
    """The least beta, on a fine grid of l = logit p, with l - logit p_ref = 1/(beta √(p(1-p)))."""
    rise = torch.linspace(0.01, 20, 2_000_001, dtype=torch.float64)
    return float((2 * torch.cosh((logit(p_ref) + rise) / 2) / rise).min())


def test_where_scores_of_0_and_1_over_their_std_end():
    """The printed shares solve their equations; below the smallest beta there is no share."""
    for case in BINARY:
        numbers = explained(case).numbers
        beta = numbers["beta"]
        expected = expected_numbers(beta=beta)
        for key, p_ref in SHARES.items():
            expected[f"share_{key}"] = p_ref
            p = numbers.get(f"right_{key}")
            if "k3" in case:
                assert beta * (p - p_ref) == pytest.approx(math.sqrt(p * (1 - p)), rel=1e-9)
                expected[f"right_{key}"] = p
                continue
            expected[f"threshold_{key}"] = smallest_beta(p_ref)
            assert (p is None) == (beta < expected[f"threshold_{key}"]), case
            if p is not None:
                drift = 1 / (beta * math.sqrt(p * (1 - p)))
                assert logit(p) - logit(p_ref) == pytest.approx(drift, rel=1e-9)
                assert logit(p) < 2 * math.asinh(beta)  # the lower root, which is stable
                expected[f"right_{key}"] = p
        check_lines(case, expected)


def test_the_numbers_of_the_literature():
    """For a half, beta_c is 1 over the Laplace limit. Twice the policy gradient halves the KL."""
    numbers = explained(f"{IN_LOSS}k2 kl_ref.coef=1.6").numbers
    assert numbers["threshold_5"] == pytest.approx(1 / 0.662743419349, abs=1e-11)
    assert numbers["threshold_1"] == pytest.approx(0.697006, abs=5e-7)
    assert numbers["threshold_9"] == pytest.approx(4.136987, abs=5e-7)
    assert numbers["right_5"] == pytest.approx(0.855232049, abs=5e-10)
    assert section(TWICE_BINARY, "optimum").numbers["right_5"] == pytest.approx(
        0.855232049, abs=5e-10
    )
    numbers = explained(f"{IN_LOSS}k2 kl_ref.coef=1").numbers
    assert numbers["right_1"] == pytest.approx(0.453051419, abs=5e-10)
    numbers = explained(f"{IN_LOSS}k3 kl_ref.coef=1").numbers
    assert numbers["right_5"] == pytest.approx(0.853553391, abs=5e-10)
    assert numbers["right_1"] == pytest.approx(0.591547595, abs=5e-10)


# ------------------------------------------------------------------ user code


def end_of(case):
    """(5,) where the exact expected gradient ends on the game of one token."""
    cfg = load(case)
    expected = Expected(cfg, resolve_algorithm(cfg), BANDIT)
    return expected.probability(converge(expected)[0]).detach().tolist()


def tilted(beta, entropy=0.0):
    """pi ∝ (ref^beta · e^score)^(1/(beta + entropy)) on that game."""
    game = zip((0.35, 0.25, 0.2, 0.15, 0.05), (0, 0.5, 1, -0.5, 2), strict=True)
    mass = [(p**beta * math.exp(r)) ** (1 / (beta + entropy)) for p, r in game]
    return pytest.approx([x / sum(mass) for x in mass], abs=1e-9)


@pytest.mark.parametrize(
    ("advantage", "loss", "group", "strength"),
    [
        ("user.py:third", "clip", 2, 1 / 3),
        ("user.py:third", "user.py:twice", 4, 2 / 3),
        ("rloo", "user.py:twice", 4, 2),
        ("dr_grpo", "user.py:twice", 4, 1.5),
        ("dr_grpo", "user.py:twice", 2, 1),
        ("rloo", "user.py:half", 2, 0.5),
    ],
)
def test_a_scale_of_the_policy_gradient_divides_beta(advantage, loss, group, strength):
    """b = beta / strength, and the exact gradient ends there. It is not the G/(G-1) of a mean."""
    case = f"{IN_LOSS}k2 sampling.group_size={group} advantage={advantage} loss={loss}"
    numbers = section(case, "optimum").numbers
    assert numbers["beta_eff"] == pytest.approx(0.5 / strength)
    assert "group" not in numbers
    assert numbers.get("strength", 1) == pytest.approx(strength)
    reason = f"b = beta / {strength:.6g}, the strength of the policy gradient"
    assert lines_of(case, "optimum")[1:] == ([] if strength == 1 else [reason])
    assert end_of(case) == tilted(0.5 / strength)


@pytest.mark.parametrize("group", [2, 5])
@pytest.mark.parametrize("kl", ["", "kl_ref.coef=0.5", f"{IN_LOSS}k2", f"{IN_LOSS}k2_sequence"])
def test_an_entropy_bonus_leads_where_its_line_says(kl, group):
    case = f"{kl} advantage=dr_grpo sampling.group_size={group} entropy.coef=0.2"
    numbers = section(case, "optimum").numbers
    assert numbers["entropy_eff"] == pytest.approx(0.2 * group / (group - 1))
    assert end_of(case) == tilted(numbers.get("beta_eff", 0.0), numbers["entropy_eff"])


def test_the_entropy_bonus_of_a_users_loss_adds_to_the_option():
    case = "advantage=rloo sampling.group_size=2 loss=user.py:with_entropy entropy.coef=0.2"
    assert section(case, "objective").numbers["entropy_bonus"] == pytest.approx(0.3)
    assert end_of(f"{case} kl_ref.coef=0.5") == tilted(0.5, 0.3)


def test_a_users_docstring_is_quoted_as_it_is():
    advantage, _ = lines_of("advantage=user.py:third", "objective")[2:4]
    assert advantage == "advantage user.py:third: A third of what is {paid}."
    assert "no docstring" in lines_of("loss=user.py:sign", "objective")[3]


@pytest.mark.parametrize("estimator", ["squared", "exact"])
def test_a_users_kl_of_a_known_kind_leads_to_its_closed_form(estimator):
    case = f"{IN_LOSS}user.py:{estimator} advantage=rloo sampling.group_size=2"
    assert end_of(case) == tilted(0.5)


# ------------------------------------------------------------------ tokens and memory

READ = 64 * 6 + 512 * 8  # tokens of 64 prompts and 512 responses; each prompt is read once
TOKENS = {  # scored by the reference, and by pi_old where it is read
    "": tokens_of(6, 512 * 8, READ, READ),
    "kl_ref.coef=0.05": tokens_of(6, 512 * 8, 2 * READ, READ),
    PPO: tokens_of(6, 512 * 8, 2 * READ, READ),
    "mismatch.truncate=token": tokens_of(6, 512 * 8, 2 * READ, READ),
    "optim.epochs=2": tokens_of(6, 512 * 8, 2 * READ, 2 * READ),
    # the reference passes once over a rollout with an exact KL too
    f"{IN_LOSS}exact_pi_ref advantage=rloo": tokens_of(6, 512 * 8, READ, READ),
    # three more rounds, and a greedy response per prompt
    "sampling.zero_variance=resample": tokens_of(6, 4 * 512 * 8, READ, READ),
    f"{GREEDY} sampling.group_size=3 sampling.prompts=5": tokens_of(
        6, (15 + 5) * 8, 5 * 6 + 15 * 8, 5 * 6 + 15 * 8
    ),
    "model.reference=false task.digits=3 sampling.max_prompt_tokens=7 sampling.max_new_tokens=16": (
        # a prompt is 123+456=, and one over the limit is cut
        tokens_of(7, 512 * 16, 0, 64 * 7 + 512 * 16)
    ),
}


def test_the_tokens_of_a_step():
    for case, expected in TOKENS.items():
        numbers = size_numbers(case, cuda=False)
        assert {name: numbers[name] for name in expected} == expected, case


# The tiny model: 99 tokens, width 128, 4 layers with 2 heads of 64, an MLP of 384.
VOCAB, WIDTH, LAYERS = 99, 128, 4
LAYER = 4 * WIDTH**2 + 3 * WIDTH * 384 + 2 * WIDTH  # q, k, v, o; gate, up, down; two norms
BACKBONE = VOCAB * WIDTH + LAYERS * LAYER + WIDTH  # embedding, layers, norm
POLICY = BACKBONE + VOCAB * WIDTH
VALUE = WIDTH + 1  # the head of a critic
ADAPTER = 16 * LAYERS * (4 * 2 * WIDTH + 3 * (WIDTH + 384)) + WIDTH  # rank 16, and the last norm


def layer_activations(prompt, response, samples, width, rank=0):
    """Bytes that a layer saves for a group, operation by operation.

    Of each token: a norm, which saves its input in float32, one number, and the factor of its
    output; and the inputs of the products. Attention: q and its output of a segment, k and v of
    what the segment sees, and a number per head and query. With LoRA seven A x more, and the
    frozen norms save no factor.
    """
    tokens = prompt + samples * response
    norm = 4 * WIDTH + 4 + (0 if rank else width * WIDTH)
    products = width * (3 * WIDTH + 4 * 384) + 7 * rank * width
    seen = prompt + samples * (prompt + response)
    attention = 2 * width * WIDTH * (tokens + seen) + max(width, 4) * 2 * tokens
    return tokens * (2 * norm + products) + attention


def other_activations(prompt, response, samples, width, rank=0):
    """Bytes outside the layers: ids, cosines and sines, a norm; masks and places of the attention.

    With LoRA the input of the first norm needs no gradient.
    """
    tokens = prompt + samples * response
    rest = tokens * (8 + 2 * 64 * width + 4 * WIDTH + 4 + width * WIDTH)
    masks = samples * response * (prompt + response) * width
    places = (8 + 1) * tokens + 8 * (prompt + samples * (prompt + response))
    places += 8 * samples * (response + 1)  # of the states
    return rest + masks + places - (tokens * (4 * WIDTH + 4) if rank else 0)


def saved_activations(prompt, response, samples, width, rank=0, checkpointing=False):
    """Bytes of a group, with one more layer that is being computed."""
    group = prompt, response, samples, width, rank
    layer = layer_activations(*group)
    layer_input = width * WIDTH * (prompt + samples * response)
    if checkpointing:
        stored = LAYERS * layer_input + 2 * (layer - layer_input)
    else:
        stored = LAYERS * layer + layer - layer_input
    return stored + other_activations(*group)


# 20,000 groups of 70 tokens, of which 8 · 8 are of responses: 17,142 in a micro-batch
MANY = "sampling.prompts=20000 optim.micro_tokens=1200000"
MANY_TOKENS = 17_142 * 64
KV = 2 * LAYERS * WIDTH  # keys and values of a token
SIZES = [  # options, is it on CUDA, bytes; 128 slots on a CPU and 256 on a GPU
    (
        "",
        False,
        {
            "weights": 4 * POLICY,
            "reference": 4 * POLICY,
            "masters": 0,
            "moments": 8 * POLICY,
            "kv_cache": 4 * KV * 128 * 14,
            "sampling_logits": (2 * 4 + 2 * 8) * 128 * VOCAB,
            "gradients": 4 * POLICY,
            "activations": 64 * saved_activations(6, 8, 8, 4),
            "logits": 6 * 512 * 8 * VOCAB * 4,
        },
    ),
    (
        "model.gradient_checkpointing=true optim.micro_tokens=1000",  # 14 groups of 70 tokens
        True,
        {
            "weights": 2 * POLICY,
            "reference": 2 * POLICY,
            "masters": 4 * POLICY,
            "moments": 8 * POLICY,
            "kv_cache": 2 * KV * 256 * 14,
            "sampling_logits": (2 * 4 + 2 * 8) * 256 * VOCAB,
            "gradients": 2 * POLICY,
            "activations": 14 * saved_activations(6, 8, 8, 2, checkpointing=True),
            "logits": 6 * (14 * 64) * VOCAB * 4,
        },
    ),
    (
        "model.dtype=bfloat16 optim.offload=true sampling.backend.slots=9 optim.head_tokens=300",
        False,
        {
            "weights": 2 * POLICY,
            "reference": 2 * POLICY,
            "masters": 0,
            "moments": 0,
            "host": (4 + 8) * POLICY,
            "kv_cache": 2 * KV * 9 * 14,
            "sampling_logits": (2 * 4 + 2 * 8) * 9 * VOCAB
            + 4 * VOCAB * WIDTH,  # a float32 unembedding
            "gradients": 2 * POLICY,
            "activations": 64 * saved_activations(6, 8, 8, 2),
            # bf16 on a CPU: four tiles, and what is kept
            "logits": 4 * 300 * VOCAB * 4 + 300 * VOCAB * 4,
        },
    ),
    (
        "configs/tiny-lora.yaml",  # a cache and a micro-batch hold all 768 rows
        False,
        {
            "weights": 4 * (POLICY + ADAPTER - WIDTH),
            "reference": 0,
            "masters": 0,
            "moments": 8 * ADAPTER,
            "kv_cache": 4 * KV * 768 * 12,
            "sampling_logits": (2 * 4 + 2 * 8) * 768 * VOCAB,
            "gradients": 4 * ADAPTER,
            "activations": 96 * saved_activations(6, 6, 8, 4, rank=16),
            "logits": 6 * (768 * 6) * VOCAB * 4,
        },
    ),
    (
        # the critic's head is float32; one row at a time, so that the optimizer step needs most
        f"{PPO} model.dtype=bfloat16 optim.micro_tokens=14",
        True,
        {
            "weights": 2 * POLICY + 4 * VALUE,
            "reference": 2 * POLICY,
            "masters": 4 * POLICY,
            "moments": 8 * (POLICY + VALUE),
            "kv_cache": 2 * KV * 256 * 14,
            "sampling_logits": (2 * 4 + 2 * 8) * 256 * VOCAB,
            "gradients": 2 * POLICY + 4 * VALUE,
            "activations": saved_activations(6, 8, 1, 2),
            "logits": 6 * 8 * VOCAB * 4,
        },
    ),
    (
        f"advantage=gae critic.kind=network model.dtype=float64 {IN_LOSS}exact_pi_ref {MANY} "
        "optim.head_tokens=700000",
        False,
        {
            "weights": 8 * (POLICY + BACKBONE + VALUE),
            "reference": 8 * POLICY,
            "masters": 0,
            "moments": 16 * (POLICY + BACKBONE + VALUE),
            "kv_cache": 8 * KV * 128 * 14,
            "sampling_logits": (2 * 8 + 2 * 8) * 128 * VOCAB,
            "gradients": 8 * (POLICY + BACKBONE + VALUE),
            "activations": 17_142 * 2 * saved_activations(6, 8, 8, 8),
            # more than 256 MiB: six tiles of 512 rows, and the logits of both policies kept
            "logits": 6 * 512 * VOCAB * 8 + 2 * 700_000 * VOCAB * 8,
        },
    ),
    (f"{MANY} model.keep_logits_gb=0.03", False, {"logits": 4 * 512 * VOCAB * 4 + 30_000_000}),
    (f"{MANY} model.logprobs=reference", False, {"logits": 6 * MANY_TOKENS * VOCAB * 4}),
    (f"{MANY} optim.head_tokens=600000", False, {"logits": 6 * 600_000 * VOCAB * 4}),
]


def test_the_memory_of_a_step_is_that_of_a_count_by_hand():
    for case, cuda, parts in SIZES:
        numbers = size_numbers(case, cuda)
        if "weights" in parts:
            parts = parts | totals(parts)
        for name, size in parts.items():
            printed_gb = numbers[f"{name}_gb"]
            assert printed_gb == pytest.approx(size / 1e9, rel=6e-3), (case, name)


def size_numbers(case, cuda):
    report = Explanation()
    cfg = load(case)
    report_text.size_of_step(report, cfg, resolve_algorithm(cfg).exact_kl, cuda)
    return report.numbers


def totals(parts):
    resident = parts["weights"] + parts["reference"] + parts["masters"] + parts["moments"]
    sampling = parts["kv_cache"] + parts["sampling_logits"]
    # in the optimizer step masters have gradients of their own width
    step = parts["gradients"] * (2 if parts["masters"] else 1)
    backward = parts["gradients"] + parts["activations"] + parts["logits"]
    learning = max(backward, step)
    return {
        "resident": resident,
        "sampling": sampling,
        "learning": learning,
        "peak": resident + max(sampling, learning),
    }


def test_the_logits_of_a_large_vocabulary_are_whole_or_in_tiles():
    """Whole up to 2^28 bytes, else tiles within 8 MiB (512 MiB on CUDA), and what is kept."""
    v = 151_936
    whole = 441 * v  # 441 rows fit, 442 do not

    def size(tokens, options="", exact=False, cuda=False):
        return logits(load(options), tokens, v, 4, exact, cuda)

    assert size(1) == 6 * v * 4
    assert size(441) == 6 * whole * 4
    assert size(441, exact=True) == 2 * 6 * whole * 4
    assert size(441, "model.logprobs=tiled") == 4 * 441 * 4096 * 4  # 2²¹ / 441 = 4755
    assert size(442) == 4 * 442 * 4096 * 4
    assert size(442, exact=True) == 6 * 442 * 4096 * 4
    assert size(20_000) == 4 * 512 * 4096 * 4
    assert size(20_000, cuda=True) == 4 * 8192 * 16_384 * 4
    assert size(20_000, "model.keep_logits_gb=2.5") == 4 * 512 * 4096 * 4 + 2_500_000_000
    assert size(500, "model.keep_logits_gb=2.5") == 4 * 500 * 4096 * 4 + 500 * v * 4
    assert size(20_000, "optim.head_tokens=3000") == 4 * 512 * 4096 * 4 + 3000 * v * 4
    assert size(20_000, "optim.head_tokens=300") == 6 * 300 * v * 4
    both = 2 * 3000 * v * 4
    assert size(20_000, "optim.head_tokens=3000", exact=True) == 6 * 512 * 4096 * 4 + both


# ------------------------------------------------------------------ tensors that log-probs hold


class Living(TorchDispatchMode):
    """Counts the most bytes alive at one time, of new tensors of at least `least` bytes."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.now = 0
        self.most = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else ()
            if len(storage) >= self.least and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = len(storage)
                weakref.finalize(storage, self.freed, storage._cdata)
                self.now += len(storage)
                self.most = max(self.most, self.now)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def random_head(tokens, vocabulary, hidden_size, exact):
    """Hidden states, unembedding and ids, and the reference's of an exact KL."""
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    head = Head(torch.randn(vocabulary, hidden_size, requires_grad=True))
    ids = torch.randint(vocabulary, (tokens,))
    if not exact:
        return (hidden, head, ids), {}
    reference = Head(torch.randn(vocabulary, hidden_size))
    return (hidden, head, ids), {
        "ref_hidden": torch.randn(tokens, hidden_size),
        "ref_head": reference,
    }


def peak_of(backend, exact, outputs, keep_bytes=0):
    """Bytes at the peak of a forward and a backward pass, and bytes of all logits or of a tile."""
    tokens, vocabulary = 512, 10_000
    shape = tile_for(tokens, vocabulary, 4, False) if backend == "tiled" else (tokens, vocabulary)
    unit = shape[0] * shape[1] * 4
    arguments, reference = random_head(tokens, vocabulary, 4, exact)
    with Living(unit // 8) as living:
        stats = token_logprobs(*arguments, backend=backend, keep_bytes=keep_bytes, **reference)
        sum(getattr(stats, name).sum() for name in outputs).backward()
    return living.most, unit


@pytest.mark.parametrize(
    ("exact", "outputs"),
    [
        (False, ["logprobs"]),
        (False, ["logprobs", "entropy"]),
        (True, ["logprobs", "kl_pi_ref"]),
        (True, ["logprobs", "kl_ref_pi"]),
        (True, ["logprobs", "entropy", "kl_pi_ref", "kl_ref_pi"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_the_constants_cover_the_peak_of_a_log_prob(exact, outputs):
    """LOGITS_HELD is tight, twice for an exact KL; TILES_HELD is an upper bound."""
    policies = 2 if exact else 1
    most, unit = peak_of("reference", exact, outputs)
    assert (LOGITS_HELD - 1) * policies < most / unit <= LOGITS_HELD * policies
    most, unit = peak_of("tiled", exact, outputs)
    assert most / unit <= TILES_HELD[exact]


def test_the_plain_log_prob_saves_three_tensors_and_needs_two_gradients_more():
    """Saved: log-probs, probabilities, the finite log-probs, and a mask of bytes."""
    tokens, vocabulary = 64, 500
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments, _ = random_head(tokens, vocabulary, 4, exact=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        stats = token_logprobs(*arguments, backend="reference")
    assert stats.logprobs.requires_grad
    saved = sum(sizes.values()) / (tokens * vocabulary * 4)
    assert 3.2 < saved < 3.4
    assert saved + 2 <= LOGITS_HELD


def test_logits_kept_with_an_exact_kl_take_no_more_bytes_than_allowed():
    keep = 4 * 512 * 4096 * 4
    without, _ = peak_of("tiled", True, ["logprobs", "kl_pi_ref"])
    with_logits, _ = peak_of("tiled", True, ["logprobs", "kl_pi_ref"], keep_bytes=keep)
    assert with_logits - without <= keep
    cfg = load(f"model.logprobs=tiled model.keep_logits_gb={keep / 1e9}")
    plain = load("model.logprobs=tiled")
    arguments = (8192, 151_936, 4, True, False)
    assert logits(cfg, *arguments) - logits(plain, *arguments) == keep


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(monkeypatch, capsys):
    """rlkl ARGUMENTS on a wide terminal: exit code, stdout, stderr."""
    monkeypatch.setattr(console, "width", 250)

    def call(*arguments):
        paths = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
        code = cli.main(paths)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.mark.parametrize("name", ["configs/tiny-ppo.yaml", "configs/gsm8k-1.5b-grpo.yaml"])
def test_the_command_prints_the_whole_explanation(run, name):
    """[pi] and other square brackets are no markup."""
    code, out, err = run("explain", name, "kl_ref.coef=0.2", "kl_ref.estimator=k2")
    assert (code, err) == (0, "")
    cfg = load(f"{name} kl_ref.coef=0.2 kl_ref.estimator=k2")
    lines = []
    for topic, topic_lines in explain(cfg, on_cuda(cfg)).topics.items():
        lines += [topic, *topic_lines]
    assert [line.strip() for line in out.splitlines() if line.strip()] == lines
    assert "[the KL term as it is]" in out


SMALL = "sampling.group_size=4"
VERIFIED = {
    "ppo": "configs/tiny-ppo.yaml",
    "grpo": f"configs/tiny-grpo.yaml {SMALL}",
    "dr_grpo": f"advantage=dr_grpo {SMALL}",
    "dr_grpo and k2": f"{IN_LOSS}k2 advantage=dr_grpo {SMALL}",
    "grpo and k3": f"{IN_LOSS}k3 {SMALL}",
    "rloo and k1": f"advantage=rloo kl_ref.coef=0.5 {SMALL}",
    "gae and k1": f"{PPO} kl_ref.coef=0.5 sampling.group_size=1",
    "the README's loss": f"loss=my_loss.py:sapo advantage=rloo kl_ref.coef=0.5 {SMALL}",
}


def distances(out, form="closed form"):
    """The total variations that --verify prints of a form."""
    return [float(x) for x in re.findall(rf"^ +{re.escape(form)}.* TV (\S+)$", out, re.M)]


def not_converged(out):
    """Of each game: does a line say that it has not converged? Checked against its gradient."""
    ends = re.findall(r"gradient left (\S+e[+-]\d+)(: it has not converged)?$", out, re.M)
    assert len(ends) == 2
    assert all(bool(flag) == (float(left) >= 1e-9) for left, flag in ends)
    return [bool(flag) for _, flag in ends]


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_ends_at_the_closed_form(run, name):
    code, out, err = run("explain", *VERIFIED[name].split(), "--verify")
    assert (code, err) == (0, "")
    not_converged(out)
    closed = distances(out)
    assert len(closed) == 2  # one game of one token, one of two
    assert max(closed) <= 1e-6
    assert len(re.findall(r"^│ \d", out, re.M)) == 5 + 9  # each response of each game
    star = distances(out, "pi*")
    assert len(star) == (2 if "kl_ref.coef" in VERIFIED[name] else 0)  # without a KL, no pi*
    elsewhere = name in ("dr_grpo and k2", "grpo and k3")
    assert (min(star, default=0) > 0.01) == elsewhere


def test_a_greedy_baseline_changes_no_optimum(run):
    case = f"{GREEDY} kl_ref.coef=0.5 sampling.group_size=1"
    _, out, _ = run("explain", *case.split(), "--verify")
    assert max(distances(out, "pi*")) <= 1e-6


def test_verify_says_where_no_closed_form_is_known(run):
    case = "loss=user.py:sign advantage=rloo kl_ref.coef=0.5 sampling.group_size=2"
    code, out, _ = run("explain", *case.split(), "--verify")
    assert code == 0
    assert distances(out) == []
    assert out.count("closed form   none is known") == 2


@pytest.mark.parametrize(
    ("advantage", "estimator"), [("maxrl", "k2"), ("pass_at_k advantage.k=1", "k3")]
)
def test_a_form_measured_on_scores_of_0_and_1_is_not_claimed_for_others(run, advantage, estimator):
    """In pairs both are linear in such scores, but the line is about any scores."""
    case = f"{IN_LOSS}{estimator} advantage={advantage} sampling.group_size=2"
    assert "A(pi)" in lines_of(case, "optimum")[0]
    _, out, _ = run("explain", *case.split(), "--verify")
    assert len(re.findall(r"^  closed form .*A\(pi\)", out, re.M)) == 2
    assert max(distances(out)) <= 1e-6


@pytest.mark.parametrize("kl", ["kl_ref.coef=0.5", f"{IN_LOSS}k2", f"{IN_LOSS}k2_sequence"])
def test_with_a_discount_only_responses_of_one_token_have_a_closed_form(run, kl):
    case = f"{DISCOUNT} {kl} sampling.group_size=1"
    _, out, _ = run("explain", *case.split(), "--verify")
    assert len(distances(out)) == 1
    assert distances(out)[0] <= 1e-6
    assert out.index("closed form   pi ∝") < out.index("closed form   none is known")
    assert distances(out, "pi*")[1] > 1e-3  # of a form in the score


def test_verify_says_what_has_not_converged(run):
    """|u| in the loss has one gradient on both sides of 0: no step size comes to rest there."""
    case = f"{IN_LOSS}user.py:absolute advantage=rloo sampling.group_size=2"
    _, out, _ = run("explain", *case.split(), "--verify")
    assert True in not_converged(out)


@pytest.mark.parametrize(
    ("case", "title"),
    [
        ("advantage=rloo sampling.group_size=16", ["groups of 8", "groups of 4"]),
        ("advantage=reinforce_pp sampling.group_size=2", ["rollouts of 3 responses"] * 2),
        ("advantage=reinforce_pp sampling.group_size=8", ["rollouts of 3 responses"] * 2),
        (f"{PPO} sampling.group_size=1", ["rollouts of 3 responses"] * 2),
        ("advantage=reinforce_pp_baseline sampling.group_size=2", ["rollouts of 4 responses"] * 2),
    ],
)
def test_verify_says_how_many_responses_a_rollout_has(run, monkeypatch, case, title):
    monkeypatch.setattr("rlkl.cli.explain.converge", lambda expected: (expected.game.table, 0.0))
    _, out, _ = run("explain", *case.split(), "--verify")
    titles = re.findall(r"responses of \w+ tokens?, in (\w+ of \d+(?: responses)?)", out)
    assert titles == title


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explane"], "error: no command 'explane'; did you mean explain?"),
        (["sprocket"], "error: no command 'sprocket'; there is train, explain"),
        (["explain", "--verfy"], "error: rlkl explain has no option '--verfy'; it takes --verify"),
        (["explain", "nope.yaml"], "error: nope.yaml: no such config file"),
        (
            ["explain", "loss.epsylon=1"],
            "error: clip has no option 'epsylon'; it takes epsilon, epsilon_high, delta",
        ),
        (["explain", "kl.coef=1"], "error: unknown key kl"),
        (
            ["explain", "kl_ref.coef=1", "kl_ref.place=loss"],
            "error: kl_ref.place=loss with kl_ref.estimator=k1: ",
        ),
        (
            ["explain", "loss=top_entropy", "selector=top_entropy", "--verify"],
            "error: --verify enumerates rollouts",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  rlkl {name} +\S", out, re.M) for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "arguments", [["explain", "--help"], ["explain", "configs/tiny-ppo.yaml", "-h"]]
)
def test_help_of_explain_shows_its_usage(run, arguments):
    code, out, _ = run(*arguments)
    assert code == 0
    assert out.startswith("usage: rlkl explain [CONFIG.yaml …] [key=value …] [--verify]")


def test_without_the_models_config_all_but_the_size_is_printed(run):
    code, out, err = run("explain", "model.name=./none", "kl_ref.coef=0.5")
    assert (code, err) == (0, "")
    assert "maximise  E[score] - 0.5 · KL(pi || ref)" in out
    assert "not estimated: model.name=" in out
    assert "Traceback" not in out


def test_python_m_rlkl_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlkl", "explain", "kl_ref.coef=0.04"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rlkl", run_name="__main__")
    assert end.value.code == 0
    out = capsys.readouterr()
    assert "maximise  E[score] - 0.04 · KL(pi || ref)" in out.out
    assert out.err == ""


def test_ctrl_c_ends_it_without_a_traceback(run, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlkl.cli.explain.main", interrupted)
    assert run("explain")[0] == 130
