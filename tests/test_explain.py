"""What `rlkl explain` says: every number recomputed here from the formulas, by code that shares nothing with it.

The tables below say by *name* what explain finds out by *calling*; the two have to agree.
"""

import contextlib
import dis
import functools
import itertools
import math
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlkl.explain.words
from rlkl import cli, config
from rlkl.advantages import ADVANTAGES
from rlkl.algorithm import algorithm
from rlkl.errors import UserError
from rlkl.explain import explain, on_cuda
from rlkl.explain.footprint import LOGITS_HELD, TILES_HELD, logits
from rlkl.explain.tabular import BANDIT
from rlkl.explain.verify import Expected, converge
from rlkl.kl import KL, KL_LOSSES
from rlkl.logprobs import token_logprobs
from rlkl.losses import LOSSES
from rlkl.terminal import console
from rlkl.tiles import tile_for
from rlkl.types import Head

ROOT = Path(__file__).parents[1]
CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if not p.read_text().startswith("# rlkl ")]

# What explain measures, by name
KIND = {("reward", "k1"): "sequence", ("reward", "k2"): "other", ("reward", "k3"): "other"} | {
    ("loss", name): kind for name, kind in {
        "k2": "token", "k3": "forward", "k3+": "token", "k2_sequence": "sequence", "wk2_token": "other",
        "wk3_token": "token", "wk3_prefix": "sequence", "exact_pi_ref": "token", "exact_ref_pi": "forward",
        "rao_blackwell": "sequence"}.items()}
SLOPE = {"rloo": lambda g: 1.0, "remax": lambda g: 1.0, "dr_grpo": lambda g: (g - 1) / g, "opo": lambda g: (g - 1) / g}
NOT_LINEAR = {"best_only", "maxrl", "pass_at_k"}  # in scores other than 0 and 1, or in any
STANDARDISED = {"gae", "grpo", "reinforce_pp", "reinforce_pp_baseline"}  # gae unless whiten is off
EXACT = {"exact_pi_ref", "exact_ref_pi", "rao_blackwell"}
NOT_REINFORCE = {"top_entropy", "clip_cov"}  # they leave tokens out


# The pull of a token (-∂loss/∂log pi) / A at w = pi/pi_old, pi_old = 0.2; `up`: A > 0
def clipped(low, high, cap=math.inf):
    return lambda w, up, selected: w if (w <= 1 + high if up else 1 - low <= w <= cap) else 0.0


def clip_of(o, **more):
    low = o.get("clip", 0.2)
    return clipped(low, o.get("clip_high") or low, **more)


def gmpo(o):
    return lambda w, up, selected: w * (math.log(w) <= o.get("clip_high", 0.4) if up else
                                        math.log(w) >= -o.get("clip", 0.4))


def sapo(o):
    def f(w, up, selected):
        gate = 1 / (1 + math.exp(-(o.get("tau", 1.0) if up else o.get("tau_negative", 1.05)) * (w - 1)))
        return 4 * w * gate * (1 - gate)
    return f


def dppo(o, clip, distance):
    def f(w, up, selected):
        low = o.get("clip", clip)
        gone = (w > 1) == up and distance(0.2, 0.2 * w) > ((o.get("clip_high") or low) if up else low)
        return 0.0 if gone else min(w, o.get("cap", 10.0))
    return f


def binary_kl(mu, pi):
    return mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))


def vespo(o):
    def f(w, up, selected):
        k, rate = (o.get("k", 2.0), o.get("lam", 3.0)) if up else (o.get("k_negative", 3.0), o.get("lam_negative", 2.0))
        return w**k * math.exp(rate * (1 - w))
    return f


PULL = {
    "ppo": lambda o: clip_of(o, cap=o.get("cap", math.inf)),
    "grpo": clip_of,
    "dual_clip": lambda o: clip_of(o, cap=o.get("cap", 3.0)),
    "surrogate": lambda o: lambda w, up, selected: w,
    "reinforce": lambda o: lambda w, up, selected: 1.0,
    "gspo": lambda o: clipped(o.get("clip", 3e-4), o.get("clip_high", 4e-4)),
    "gmpo": gmpo,
    "cispo": lambda o: lambda w, up, selected: min(w, o.get("cap", 5.0)),
    "sapo": sapo,
    "dppo_tv": lambda o: dppo(o, 0.15, lambda mu, pi: abs(pi - mu)),
    "dppo_kl": lambda o: dppo(o, 0.05, binary_kl),
    "topr": lambda o: lambda w, up, selected: 1.0 if up else min(w, 1.0),
    "spo": lambda o: lambda w, up, selected: w * (1 - (1 if up else -1) * (w - 1) / o.get("clip", 0.2)),
    "vespo": vespo,
    "top_entropy": lambda o: lambda w, up, selected: clip_of(o)(w, up, True) if selected else 0.0,
    "clip_cov": lambda o: lambda w, up, selected: 0.0 if selected else clip_of(o)(w, up, True),
    "kl_cov": lambda o: lambda w, up, selected: w - selected * o.get("coef", 1.0) * (1 if up else -1) * (
        1 if w > 1 else -1),
}


# The share of right replies with scores 0 and 1 over their std, from l - logit p_ref = 1/(beta sqrt(p (1-p)))
def first_root(f, low, high, cells=20_000):
    """The first sign change of f from `low` up, or None."""
    grid = [low + (high - low) * i / cells for i in range(1, cells)]
    for a, b in itertools.pairwise(grid):
        if f(a) <= 0 <= f(b) or f(a) >= 0 >= f(b):
            for _ in range(100):
                m = (a + b) / 2
                a, b = (a, m) if (f(a) <= 0) != (f(m) <= 0) else (m, b)
            return (a + b) / 2
    return None


def logit(p):
    return math.log(p / (1 - p))


def held_at(p_ref, beta):
    return first_root(lambda p: logit(p) - logit(p_ref) - 1 / (beta * math.sqrt(p * (1 - p))), p_ref, 1.0)


def covered_at(p_ref, beta):
    """With k3: beta (p - p_ref) = sqrt(p (1-p)), a quadratic in p: solved in the complement q = 1 - p."""
    c = 1 - p_ref  # beta² (c - q)² = q - q²
    a, b = beta**2 + 1, 2 * beta**2 * c + 1
    return 1 - (b - math.sqrt(b * b - 4 * a * beta**2 * c**2)) / (2 * a)


def threshold(p_ref):
    """The least beta over p of 1/(sqrt(p (1-p)) (logit p - logit p_ref)), by ternary search in x = logit p."""
    def beta(x):
        return 2 * math.cosh(x / 2) / (x - logit(p_ref))
    low, high = logit(p_ref) + 1e-9, logit(p_ref) + 60
    for _ in range(400):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if beta(a) < beta(b) else (a, high)
    return beta((low + high) / 2)


def expected(cfg, cuda=False):
    """All numbers that explain may print of this config, from the config alone."""
    group, beta, loss = cfg.sampling.group_size, cfg.kl_ref.coef, dict(cfg.loss)
    rows = cfg.sampling.prompts * group
    e = {"updates": cfg.optim.epochs * math.ceil(rows / (cfg.optim.minibatch or rows))}
    if cfg.sampling.unanimous == "refill":
        e["refills"] = cfg.sampling.refills
    entropy, kind = loss.get("entropy_coef", 0.0), KIND[cfg.kl_ref.place, cfg.kl_ref.estimator] if beta else None
    if entropy:
        e["entropy_bonus"] = entropy
    if beta:
        e["beta"] = beta
    if cfg.kl_ref.target:
        e |= {"kl_target": cfg.kl_ref.target, "horizon": cfg.kl_ref.horizon, "rows": rows}
    of = PULL[loss["name"]](loss)
    for sign, name, selected in itertools.product(("up", "down"), ("half", "twice"),
                                                  (True, False) if cfg.selector else (True,)):
        e[f"pull_{sign}_{name}_{selected}"] = of({"half": 0.5, "twice": 2.0}[name], sign == "up", selected)
    if cfg.kl_old.coef:
        e["kl_old_coef"] = cfg.kl_old.coef
    if cfg.kl_old.target:
        e |= {"kl_old_low": cfg.kl_old.target * 2 / 3, "kl_old_high": cfg.kl_old.target * 3 / 2}
    if cfg.kl_old.stop:
        e["kl_old_stop"] = cfg.kl_old.stop
    if loss["name"] not in NOT_REINFORCE and kind != "other":
        e |= of_the_optimum(cfg.advantage, group, beta, kind, cfg.kl_ref.place, entropy)
    if cfg.overlong.buffer:
        e |= {"overlong": cfg.overlong.coef, "buffer": cfg.overlong.buffer}
    if cfg.mismatch.truncate != "none":
        e["cap"] = cfg.mismatch.cap
    if cfg.mismatch.reject != "none":
        e |= {"low": cfg.mismatch.low, "high": cfg.mismatch.high}
    return e | (of_the_step(cfg, rows, e["updates"], cuda) if sized(cfg) else {})


def sized(cfg):
    """Of other models and tasks the size is known where their files are."""
    return cfg.model.name == "tiny" and cfg.task["name"] == "addition"


def slope_of(advantage, group):
    """E[A | reply] = slope · (score - E score); None if it is not linear in the score."""
    name = advantage["name"]
    if name == "gae":
        return None if advantage.get("whiten", True) else 1.0
    return SLOPE[name](group) if name in SLOPE else None


def of_the_optimum(advantage, group, beta, kind, place, entropy):
    slope = slope_of(advantage, group)
    if entropy:
        if slope is None or kind == "forward":
            return {}
        held = {"beta_eff": beta if place == "reward" else beta / slope} if kind else {}
        return held | {"entropy_eff": entropy / slope}
    if kind is None or place == "reward":
        return {}
    if slope is not None:
        return {"beta_eff": beta / slope} | ({"group": group} if slope != 1 else {})
    if advantage["name"] != "grpo" or advantage.get("scale") == "batch":
        return {"beta_eff": beta}  # in terms of A(pi)
    e = {}
    for key, p in (("1", 0.1), ("5", 0.5), ("9", 0.9)):
        e[f"share_{key}"] = p
        if kind == "forward":
            e[f"right_{key}"] = covered_at(p, beta)
            continue
        e[f"threshold_{key}"] = threshold(p)
        if beta >= threshold(p):
            e[f"right_{key}"] = held_at(p, beta)
    return e


def of_the_step(cfg, rows, updates, cuda):
    """The tiny model: 99 tokens, width 128, 4 layers of 2 heads, an MLP of 384; a prompt of the addition 12+34=."""
    vocab, d, layers, heads, mlp = 3 + 10 + 26 + 26 + 32 + 2, 128, 4, 2, 384
    backbone = vocab * d + layers * (4 * d * d + 3 * d * mlp + 2 * d) + d  # embedding; q k v o, MLP, two norms; a norm
    policy = backbone + vocab * d
    critic = {"none": 0, "head": d + 1, "network": backbone + d + 1}[cfg.model.critic]
    room = cfg.sampling.max_new_tokens
    prompt = min(2 * cfg.task.get("digits", 2) + 2, cfg.sampling.max_prompt_tokens or 10**9)
    care = cfg.mismatch.truncate != "none" or cfg.mismatch.reject != "none"
    old = (updates > 1 or (cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "reward") or care or critic > 0
           or cfg.selector is not None)
    width = {"auto": 2 if cuda else 4, "float32": 4, "bfloat16": 2, "float64": 8}[cfg.model.dtype]
    wide = max(width, 4)  # of AdamW's two moments, and of a critic's head
    replied = int(min(cfg.optim.micro_tokens, rows * (prompt + room)) * room / (prompt + room))
    exact = cfg.kl_ref.coef > 0 and cfg.kl_ref.place == "loss" and cfg.kl_ref.estimator in EXACT
    value, r = d + 1 if critic else 0, cfg.lora.r  # beside q k v o, and gate, up, down; and a norm
    adapter = r * layers * (4 * 2 * d + 3 * (d + mlp)) + d * len(cfg.lora.full) if r else 0
    moving, sampled = (adapter or policy) + critic - value, max(rows, cfg.eval.samples)
    if cfg.sampling.backend["name"] == "engine":
        sampled = min(sampled, cfg.sampling.backend.get("slots") or (256 if cuda else 128))
    trained = moving * width + value * wide
    held = {"weights": (policy + adapter + critic - value) * width + value * wide,
            "reference": policy * width if cfg.model.reference and not r else 0,
            "masters": moving * 4 if width == 2 else 0, "moments": 2 * (moving + value) * wide,
            "kv_cache": 2 * layers * d * width * sampled * (prompt + room),  # d = heads · 64
            # logits and log-probs, two of float64; a float32 copy of the unembedding
            "choices": (2 * wide + 2 * 8) * sampled * vocab + (4 * vocab * d if width == 2 and not cuda else 0),
            "gradients": trained,
            "activations": activations_held(cfg, rows, prompt + room, width, layers, d, heads, mlp),
            "logits": logits_held(cfg, replied, vocab, wide, exact, cuda)}
    held["resident"] = sum(held[name] for name in ("weights", "reference", "masters", "moments"))
    held["sampling"] = held["kv_cache"] + held["choices"]
    held["learning"] = trained + max(held["activations"] + held["logits"], trained if width == 2 else 0)
    held["peak"] = held["resident"] + max(held["sampling"], held["learning"])
    assert d == heads * 64
    greedy = cfg.sampling.prompts if cfg.sampling.baseline == "greedy" else 0
    return {"prompt_tokens": prompt, "sampled_tokens": (rows + greedy) * room,
            "scored_tokens": (cfg.model.reference + old) * rows * (prompt + room),
            "learned_tokens": cfg.optim.epochs * rows * (prompt + room)} | {
                f"{n}_gb": x / 1e9 for n, x in held.items()}


def activations_held(cfg, rows, length, width, layers, d, heads, mlp):
    """What each operation of the tiny model keeps, counted by hand: a norm its input in float32, one number and its
    output's factor; q, k, v and the gates what comes in; the attention q, k, v, its output, a mask and a number a head.
    """
    frozen, norm = 4 * d + 4, 4 * d + 4 + width * d
    layer = 2 * norm + width * (d + 4 * d + d + 4 * mlp + length) + max(width, 4) * heads
    rest = 8 + 2 * 64 * width + norm  # an id, the cosines and sines of its position, the last norm
    if cfg.lora.r:  # seven A x more; norms are frozen but for the last, and the first one's input asks for no gradient
        layer += 2 * (frozen - norm) + 7 * cfg.lora.r * width
        rest -= frozen
    tokens = length * min(max(cfg.optim.micro_tokens // length, 1), rows)
    stored = layers * layer + rest + layer - width * d  # and one layer at work
    return tokens * stored * (2 if cfg.model.critic == "network" else 1)


def logits_held(cfg, tokens, vocab, width, exact, cuda):
    """Six tensors of all logits, twice as many with the reference's; or four tiles, six with it, and what is kept."""
    tokens = min(tokens, cfg.optim.head_tokens or tokens)
    whole = tokens * vocab * width * (2 if exact else 1)
    if cfg.model.logprobs == "reference" or (cfg.model.logprobs == "auto" and tokens * vocab <= 64 * 1024**2):
        return 6 * whole
    high, budget = min(tokens, 8192 if cuda else 512), (512 if cuda else 8) * 1024**2
    wide = max([256, *(c for c in range(256, vocab + 256, 256) if high * c * width <= budget)])
    kept = whole if cfg.optim.head_tokens else min(whole, cfg.model.keep_logits_gb * 1e9)
    return (6 if exact else 4) * high * min(wide, vocab) * width + kept


IN_LOSS = "kl_ref.coef=0.5 kl_ref.place=loss kl_ref.estimator="
MANY = "sampling.prompts=20000 optim.micro_tokens=2000000"  # tokens whose logits are beyond the budget
CASES = [  # the first 18, and those of OWN, reach every line
    "kl_ref.coef=0.05 loss.entropy_coef=0.2 advantage=dr_grpo sampling.group_size=2",
    "kl_ref.coef=0.05 loss.entropy_coef=0.2", "kl_ref.coef=0.3 advantage=reinforce_pp",
    f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=16",
    f"{IN_LOSS}k2 kl_ref.coef=5",
    "kl_ref.coef=0.15 kl_ref.target=6 kl_ref.horizon=9000 advantage=gae loss=ppo model.critic=head",
    f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=2",
    "mismatch.truncate=token mismatch.cap=3 mismatch.reject=mean mismatch.low=0.9 mismatch.high=1.1",
    f"{IN_LOSS}k2 advantage=maxrl", "loss=surrogate kl_old.coef=0.5 kl_old.target=0.01", f"{IN_LOSS}k3",
    "kl_old.coef=0.2 kl_old.stop=0.03 kl_old.estimator=k2",
    "advantage=dr_grpo loss.entropy_coef=0.01 optim.weights=constant", "kl_ref.coef=0.1 kl_ref.estimator=k2",
    "selector=top_entropy loss=top_entropy loss.clip=0.3",
    "overlong.buffer=3 overlong.coef=0.25 sampling.unanimous=drop optim.epochs=2",
    "kl_ref.coef=0.05 optim.epochs=3 optim.minibatch=100 sampling.prompts=50",
    "model.name=no/such-model kl_ref.coef=0.5", *(str(p.relative_to(ROOT)) for p in CONFIGS), "", "kl_ref.coef=0.05",
    "kl_ref.coef=0.1 kl_ref.estimator=k3 advantage=rloo", *(f"{IN_LOSS}{name} advantage=rloo" for name in KL_LOSSES),
    f"{IN_LOSS}k2", f"{IN_LOSS}k2 kl_ref.coef=1.55", f"{IN_LOSS}k3 kl_ref.coef=0.04",
    f"{IN_LOSS}wk3_prefix advantage.scale=batch kl_ref.coef=2", f"{IN_LOSS}k3 advantage=dr_grpo sampling.group_size=5",
    f"{IN_LOSS}rao_blackwell advantage=opo sampling.group_size=4", f"{IN_LOSS}k3 advantage=pass_at_k advantage.k=3",
    f"{IN_LOSS}k3+ advantage=best_only", f"{IN_LOSS}k2 advantage=reinforce_pp sampling.group_size=1 kl_ref.coef=3",
    f"{IN_LOSS}k2 advantage=reinforce_pp_baseline sampling.group_size=4",
    f"{IN_LOSS}k3 advantage=remax sampling.baseline=greedy sampling.group_size=1",
    f"{IN_LOSS}k2 advantage=gae loss=ppo model.critic=head sampling.group_size=1",
    f"{IN_LOSS}k2 advantage=gae advantage.whiten=false loss=ppo model.critic=network sampling.group_size=1",
    "advantage=remax sampling.baseline=greedy sampling.group_size=1 loss=reinforce kl_ref.coef=0.3",
    "model.dtype=bfloat16 optim.micro_tokens=1000", "model.dtype=float64 model.critic=network advantage=gae loss=ppo",
    "model.reference=false task.digits=3 sampling.max_prompt_tokens=7 sampling.max_new_tokens=16",
    *(f"loss={name}" for name in LOSSES if name not in ("ppo", "top_entropy", "clip_cov", "kl_cov")),
    f"selector=clip_cov loss=clip_cov {IN_LOSS}k2", "selector=kl_cov loss=kl_cov loss.coef=0.25",
    "selector=kl_cov loss=kl_cov advantage=rloo " + IN_LOSS + "wk3_token", "loss.clip=0.6 loss.clip_high=1.5",
    "loss=dual_clip loss.cap=1.5 loss.clip_high=0.9", "loss=gspo loss.clip=0.6 loss.clip_high=1.1",
    "loss=gmpo loss.clip=0.8 loss.clip_high=0.3", "loss=cispo loss.cap=1.4",
    "loss=sapo loss.tau=2 loss.tau_negative=0.5", "loss=dppo_tv loss.clip=0.05 loss.clip_high=0.3 loss.cap=1.5",
    "loss=dppo_kl loss.clip=0.04 loss.clip_high=0.1", "loss=spo loss.clip=0.7",
    "loss=vespo loss.k=1 loss.lam=2 loss.k_negative=2 loss.lam_negative=1",
    *(f"{kl} advantage={a} loss.entropy_coef=0.2" for kl in ("", "kl_ref.coef=0.5", f"{IN_LOSS}k2", f"{IN_LOSS}k3",
                                                              f"{IN_LOSS}k2_sequence", f"{IN_LOSS}wk2_token")
      for a in ("rloo", "opo", "best_only")),
    f"{IN_LOSS}k2 advantage=opo sampling.group_size=12 loss.entropy_coef=0.1",
    *(f"{IN_LOSS}k2 advantage={a} sampling.group_size=2" for a in ("maxrl", "pass_at_k advantage.k=1", "best_only")),
    "advantage=remax sampling.baseline=greedy sampling.group_size=3 sampling.prompts=5", MANY,
    f"{MANY} model.keep_logits_gb=0.03 model.dtype=bfloat16", f"{MANY} model.logprobs=reference {IN_LOSS}exact_pi_ref",
    f"{MANY} {IN_LOSS}rao_blackwell model.dtype=float64", f"{MANY} optim.head_tokens=700000",
    f"{MANY} optim.head_tokens=600000", "optim.head_tokens=300", "model.logprobs=tiled model.keep_logits_gb=1",
    "model.logprobs=tiled optim.head_tokens=100", f"model.logprobs=fused {IN_LOSS}exact_ref_pi advantage=rloo",
]


def load(case):
    return config.load([str(ROOT / a) if a.startswith("configs/") else a for a in case.split()])


@functools.cache
def said(case):
    return explain(load(case))


def lines_of(case, topic=None):
    topics = said(case).topics
    return [line for name, lines in topics.items() if topic in (None, name) for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_the_one_the_formulas_give(case):
    cfg = load(case)
    check(cfg, said(case).numbers, expected(cfg))


def check(cfg, found, want):
    if not sized(cfg):
        found = {n: x for n, x in found.items() if not n.endswith(("_gb", "_tokens"))}
    assert set(found) == set(want)
    for name, value in found.items():  # memory is rounded to three digits before it is kept
        assert value == pytest.approx(want[name], rel=6e-3 if name.endswith("_gb") else 1e-7, abs=1e-12), name
        assert isinstance(value, int) == isinstance(want[name], int), name


@pytest.mark.parametrize("case", [
    "", f"{IN_LOSS}exact_pi_ref", MANY, "model.logprobs=fused",
    f"{MANY} {IN_LOSS}exact_ref_pi model.keep_logits_gb=0.02",
    f"{MANY} optim.head_tokens=9000 model.logprobs=tiled model.dtype=float32"])
def test_the_size_on_a_gpu_is_that_of_bf16_weights_and_larger_tiles(case):
    check(load(case), explain(load(case), cuda=True).numbers, expected(load(case), cuda=True))


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("options", ["", "model.keep_logits_gb=2.5", "optim.head_tokens=3000", "model.logprobs=tiled"])
@pytest.mark.parametrize(("tokens", "vocab"), [
    (1, 151936), (441, 151936), (442, 151936), (8192, 151936), (20000, 151936), (300, 50257), (5000, 700), (511, 4096)])
def test_the_logits_of_larger_vocabularies_are_whole_or_in_tiles(tokens, vocab, options, exact, cuda):
    cfg = load(options)
    assert logits(cfg, tokens, vocab, 4, exact, cuda) == logits_held(cfg, tokens, vocab, 4, exact, cuda)


CONSTANTS = (
    "scores of 0 and 1", "^(1/(b + c))", "G/(G-1)", "A > 0:", "A < 0:", "1 = REINFORCE, 0 = stopped", "±0.2",
    "coef · (1 +", " - 1, ", "1/tokens", "1/(replies", "E[u²]/2", "weight 0 where", "falls to 0", "run away to 0",
    "collapses to 1")
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


@pytest.mark.parametrize("case", CASES)
def test_no_line_has_a_number_that_is_not_among_those(case):
    assert printed(said(case)) == told(said(case).numbers)


def printed(e):
    """The numbers in the lines, but for docstrings, which are quoted on two, and the constants of the sentences."""
    found = set()
    for line in itertools.chain(*e.topics.values()):
        if not line.startswith(("advantage ", "loss ", "not estimated")):
            found |= set(NUMBER.findall(re.sub("|".join(map(re.escape, CONSTANTS)), " ", line)))
    return found


def told(numbers):
    return {f"{x:,}" if isinstance(x, int) else f"{x:.6g}".lstrip("-") for x in numbers.values()}


ADVANTAGE = ("def mine(rewards, values, mask, *, group_size):\n    r = rewards.sum(1, keepdim=True)\n"
             "    return ({}).expand_as(rewards) * mask, None\n")
OWN = (("", "-r"), (f"{IN_LOSS}k2", "r / 3"))  # what no built-in advantage does


def test_the_cases_reach_every_line_of_explain(tmp_path):
    """Else a line could print what nobody recomputes."""
    file, reached, lines = rlkl.explain.__file__, set(), set()
    codes = [f.__code__ for f in vars(rlkl.explain.words).values() if isinstance(f, types.FunctionType)
             and f.__module__ == "rlkl.explain.words" and f.__name__ != "on_cuda"]
    while codes:
        code = codes.pop()
        if code.co_filename == file:  # not what @dataclass writes
            lines |= {line for _, line in dis.findlinestarts(code) if line and line > code.co_firstlineno}
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]

    def local(frame, event, arg):
        reached.add(frame.f_lineno)
        return local

    own = [f"{case} advantage={written(tmp_path, ADVANTAGE.format(source), f'own{i}')}:mine"
           for i, (case, source) in enumerate(OWN)]
    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: local(frame, event, arg) if frame.f_code.co_filename == file else None)
    try:
        for case in (*CASES[:18], *own, *CASES[18:]):
            if lines - reached:
                explain(load(case))
    finally:
        sys.settrace(before)
    assert sorted(lines - reached) == []


def test_the_tables_here_name_every_plug_in():
    assert set(PULL) == set(LOSSES)
    assert set(KIND) == {("reward", n) for n in KL} | {("loss", n) for n in KL_LOSSES}
    assert set(SLOPE) | STANDARDISED | NOT_LINEAR == set(ADVANTAGES)
    assert set(KL_LOSSES) > EXACT


def test_the_thresholds_are_those_of_the_literature():
    """For a half, beta_c is 1 over the Laplace limit."""
    numbers = said(f"{IN_LOSS}k2 kl_ref.coef=1.6").numbers
    assert numbers["threshold_5"] == pytest.approx(1 / 0.662743419349, abs=1e-11)
    assert numbers["threshold_1"] == pytest.approx(0.697006, abs=5e-7)
    assert numbers["threshold_9"] == pytest.approx(4.136987, abs=5e-7)
    assert numbers["right_5"] == pytest.approx(0.855232049, abs=5e-10)
    numbers = said(f"{IN_LOSS}k2 kl_ref.coef=1").numbers
    assert numbers["right_1"] == pytest.approx(0.453051419, abs=5e-10)
    assert "right_5" not in numbers
    numbers = said(f"{IN_LOSS}k3 kl_ref.coef=1").numbers
    assert (numbers["right_5"], numbers["right_1"]) == (pytest.approx(0.853553391, abs=5e-10),
                                                        pytest.approx(0.591547595, abs=5e-10))


def saved_for_backward(exact):
    """Tensors of (M, V) float32 that one call keeps for its backward pass, each storage once."""
    m, v, d, kept = 64, 500, 4, {}
    hidden, head = torch.randn(m, d, requires_grad=True), Head(torch.randn(v, d, requires_grad=True))
    more = {"ref_hidden": torch.randn(m, d), "ref_head": Head(torch.randn(v, d))} if exact else {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        stats = token_logprobs(hidden, head, torch.randint(v, (m,)), backend="reference", **more)
    assert stats.logprobs.requires_grad
    return sum(kept.values()) / (m * v * 4)


def test_logits_held_covers_what_the_plain_log_prob_keeps_and_the_gradients_of_it():
    """Kept: log-probs, probabilities, the finite log-probs, a mask of bytes. At its peak, in the backward pass, two
    gradients more are alive, 5.3 (M, V) tensors by the profiler.
    """
    kept = saved_for_backward(exact=False)
    assert 3.2 < kept < 3.4
    assert kept + 2 <= LOGITS_HELD


class Living(TorchDispatchMode):
    """The most bytes that tensors of at least `least` bytes, made while it is on, take at one time."""

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.most, self.sizes = least, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else ()
            if len(storage) >= self.least and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = len(storage)
                weakref.finalize(storage, self.gone, storage._cdata)
                self.now += len(storage)
                self.most = max(self.most, self.now)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def most_held(backend, exact, outputs, keep_bytes=0):
    """Bytes at the peak of a forward and backward pass, beside what is as small as the weights; bytes of the unit."""
    m, v, d = 512, 10_000, 4
    shape = tile_for(m, v, 4, False) if backend == "tiled" else (m, v)
    unit = shape[0] * shape[1] * 4
    hidden, head = torch.randn(m, d, requires_grad=True), Head(torch.randn(v, d, requires_grad=True))
    more = {"ref_hidden": torch.randn(m, d), "ref_head": Head(torch.randn(v, d))} if exact else {}
    with Living(unit // 8) as living:
        found = token_logprobs(hidden, head, torch.randint(v, (m,)), backend=backend, keep_bytes=keep_bytes, **more)
        sum(getattr(found, name).sum() for name in outputs).backward()
    return living.most, unit


OUTPUTS = [(False, ["logprobs"]), (False, ["logprobs", "entropy"]), (True, ["logprobs", "kl_pi_ref"]),
           (True, ["logprobs", "kl_ref_pi"]), (True, ["logprobs", "entropy", "kl_pi_ref", "kl_ref_pi"])]


@pytest.mark.parametrize(("exact", "outputs"), OUTPUTS, ids=lambda x: "-".join(x) if isinstance(x, list) else "")
def test_logits_held_covers_the_peak_of_the_plain_log_prob_and_twice_that_of_the_exact_kl(exact, outputs):
    most, unit = most_held("reference", exact, outputs)
    assert (LOGITS_HELD - 1) * (1 + exact) < most / unit <= LOGITS_HELD * (1 + exact)


@pytest.mark.parametrize(("exact", "outputs"), OUTPUTS, ids=lambda x: "-".join(x) if isinstance(x, list) else "")
def test_tiles_held_covers_the_peak_of_the_tiled_log_prob(exact, outputs):
    most, unit = most_held("tiled", exact, outputs)
    assert most / unit <= TILES_HELD[exact]


def test_logits_kept_with_an_exact_kl_are_as_many_bytes_as_was_asked_for():
    keep = 4 * 512 * 4096 * 4
    more = [most_held("tiled", exact=True, outputs=["logprobs", "kl_pi_ref"], keep_bytes=k)[0] for k in (0, keep)]
    assert more[1] - more[0] <= keep
    cfgs = [load(f"model.logprobs=tiled model.keep_logits_gb={k / 1e9}") for k in (0, keep)]
    told = [logits(cfg, 8192, 151936, 4, exact=True, cuda=False) for cfg in cfgs]
    assert told[1] - told[0] == keep


def test_the_reference_passes_once_over_a_rollout_with_an_exact_kl_too():
    """One pass gives its log-probs and the states that are kept."""
    plain, exact = (said(f"{IN_LOSS}{name} advantage=rloo").numbers["scored_tokens"] for name in ("k2", "exact_pi_ref"))
    assert exact == plain


def test_the_group_size_of_large_groups_is_theirs():
    """They are measured in groups of 8 and fewer."""
    numbers = said(f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=16").numbers
    assert numbers["beta_eff"] == pytest.approx(0.5 * 16 / 15)
    assert numbers["group"] == 16


# Sentences
GRADIENT = {
    "sequence": "gradient  on-policy, that of KL(pi || ref) of whole replies",
    "token": "gradient  on-policy, that of KL(pi || ref) token by token",
    "forward": "gradient  on-policy, that of KL(ref || pi) token by token",
    "other": "gradient  on-policy, that of no KL that is known here",
}
OBJECTIVE = {"sequence": "maximise  E[score] - 0.5 · KL(pi || ref)", "forward": "- 0.5 · Σ_t KL(ref || pi)(s_t)",
             "token": "- 0.5 · Σ_t KL(pi || ref)(s_t)", "other": "- 0.5 · [the KL term as it is]"}


@pytest.mark.parametrize(("pair", "kind"), KIND.items(), ids=lambda x: "-".join(x) if isinstance(x, tuple) else "")
def test_the_direction_of_each_kl_is_the_one_theory_gives(pair, kind):
    case = f"kl_ref.coef=0.5 kl_ref.place={pair[0]} kl_ref.estimator={pair[1]} advantage=rloo"
    gradient = [line for line in lines_of(case, "KL to the reference") if line.startswith("gradient")]
    assert len(gradient) == 1
    assert gradient[0].startswith(GRADIENT[kind])
    assert lines_of(case, "objective")[0].endswith(OBJECTIVE[kind])
    between = next(line for line in lines_of(case, "KL to the reference") if line.startswith("between"))
    assert "pi, the policy in training, and ref, the frozen first policy" in between


@pytest.mark.parametrize(("place", "name", "reason"), [
    ("loss", "k1", "expected gradient is zero"), ("reward", "exact_pi_ref", "it is a baseline, and holds nothing"),
    ("reward", "exact_ref_pi", "it is a baseline"), ("reward", "rao_blackwell", "it is a baseline")])
def test_a_kl_that_would_hold_nothing_is_refused_with_the_reason(place, name, reason):
    with pytest.raises(UserError, match=reason):
        said(f"kl_ref.coef=0.1 kl_ref.place={place} kl_ref.estimator={name}")
    assert said(f"kl_ref.coef=0 kl_ref.place={place} kl_ref.estimator={name}").topics.get("traps") is None


OWN_TRAP = {("reward", "k2"): "k2 in the reward does not lead", ("reward", "k3"): "k3 in the reward does not lead",
            ("loss", "k3"): "k3 in the loss has the gradient of KL(ref || pi)",
            ("loss", "wk2_token"): "w·k2 has the gradient of E[u²]/2"}
COUPLED = {"loss": "advantages over their std, and the KL in the loss: it is as strong as beta · std(score)",
           "reward": "advantages over their std, and the KL in the reward: where all replies of a prompt score"}


@pytest.mark.parametrize(("pair", "advantage"), [
    *((pair, advantage) for pair in KIND for advantage in ("rloo", "grpo")),
    *(((place, name), advantage) for place, name in (("reward", "k1"), ("loss", "k2")) for advantage in
      ("dr_grpo", "grpo advantage.scale=batch", "reinforce_pp", "reinforce_pp_baseline"))])
def test_a_trap_is_one_line_and_there_only_where_it_is_one(pair, advantage):
    case = f"kl_ref.coef=0.5 kl_ref.place={pair[0]} kl_ref.estimator={pair[1]} advantage={advantage}"
    traps = lines_of(case, "traps")
    want = [OWN_TRAP[pair]] if pair in OWN_TRAP else []
    want += [COUPLED[pair[0]]] if advantage == "grpo" else []  # over the whole rollout the std is one number
    assert len(traps) == len(want)
    for line, start in zip(traps, want, strict=True):
        assert line.startswith(start)
        assert "\n" not in line


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_without_a_kl_there_is_no_trap_and_nothing_that_holds(advantage):
    e = said(f"advantage={advantage}")
    assert "traps" not in e.topics
    assert e.topics["KL to the reference"] == ["off: nothing holds pi to ref; a trust region sets the pace, not "
                                               "the destination"]
    assert "drifts as long as it trains" in e.topics["objective"][1]


@pytest.mark.parametrize(("case", "updates"), [
    ("", 1), ("sampling.prompts=8 optim.minibatch=64", 1), ("optim.epochs=2", 2),
    ("sampling.prompts=8 optim.minibatch=40", 2), ("sampling.prompts=8 optim.minibatch=16 optim.epochs=3", 12)])
def test_with_one_update_no_clip_can_act_and_with_more_it_can_from_the_second_on(case, updates):
    lines = " ".join(lines_of(case, "trust region"))
    assert ("no clip can ever act" in lines) == (updates == 1)
    assert (f"{updates} updates per rollout: the clip can act from the second on" in lines) == (updates > 1)
    frozen = " ".join(lines_of(case + " kl_ref.coef=0.1", "KL to the reference"))
    assert (f"frozen over the {updates} updates" in frozen) == (updates > 1)


WEIGHTS = {"ppo": "token", "surrogate": "token", "reinforce": "constant", "topr": "constant", "cispo": "token"}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", ["token", "sequence", "constant"])
def test_other_weights_than_the_papers_are_named(name, weights):
    paper = re.search(r"Weights: (\w+)\.", LOSSES[name].__doc__)[1]
    assert paper == WEIGHTS.get(name, paper)
    more = "model.critic=head advantage=gae sampling.group_size=1" if name == "ppo" else ""
    more += f" selector={name}" if name in ("top_entropy", "clip_cov", "kl_cov") else ""
    lines = lines_of(f"loss={name} optim.weights={weights} {more}", "normalisation")
    assert lines[0].startswith(f"weights   {weights}: ")
    assert [line for line in lines if "the paper of loss" in line] == (
        [] if paper == weights else [f"the paper of loss {name} has weights {paper}"])


NO_FORM = "with the entropy bonus no closed form in the scores is known; --verify measures its end"
BOTH = "pi ∝ (ref^b · exp(score))^(1/(b + c)) for replies of one token, with"
ONE_TOKEN = "; so for replies of one token, for longer ones no closed form is known"
DISCOUNT = "advantage=gae advantage.gamma=0.9 advantage.whiten=false loss=ppo model.critic=head"
MEAN = "with b = 0.5 and A(pi) the mean advantage under pi itself"


@pytest.mark.parametrize(("case", "sentence"), [
    ("", "all mass on the best-scored replies, shared among them as ref shares it"),
    ("loss.entropy_coef=0.25", NO_FORM),
    ("loss.entropy_coef=0.25 advantage=rloo", "pi ∝ exp(score / 0.25), each token for itself"),
    ("loss.entropy_coef=0.25 advantage=dr_grpo sampling.group_size=2", "pi ∝ exp(score / 0.5), each token for itself"),
    ("loss.entropy_coef=0.25 advantage=rloo kl_ref.coef=0.5", f"{BOTH} b = 0.5 and c = 0.25"),
    ("loss.entropy_coef=0.25 advantage=dr_grpo sampling.group_size=2 kl_ref.coef=0.5", f"{BOTH} b = 0.5 and c = 0.5"),
    (f"{IN_LOSS}k2 loss.entropy_coef=0.25 advantage=dr_grpo sampling.group_size=2", f"{BOTH} b = 1 and c = 0.5"),
    (f"{IN_LOSS}k3 loss.entropy_coef=0.25 advantage=rloo", NO_FORM),
    (f"{IN_LOSS}k2 loss.entropy_coef=0.25 advantage=maxrl", NO_FORM),
    (f"{IN_LOSS}wk2_token loss.entropy_coef=0.25 advantage=rloo", "no closed form is known, as the KL is none that"),
    *((f"kl_ref.coef=0.25 advantage={a}", f"pi* ∝ ref · exp(score / 0.25){more}") for more, names in {
        "": ["grpo", "grpo advantage.scale=batch", "rloo", "dr_grpo", "opo", "best_only", "reinforce_pp_baseline",
             "remax sampling.baseline=greedy", "gae loss=ppo model.critic=head"],
        ONE_TOKEN: ["reinforce_pp", DISCOUNT.removeprefix("advantage=")],
    }.items() for a in names),
    (f"{IN_LOSS}k2_sequence advantage=rloo", "pi* ∝ ref · exp(score / b), with b = 0.5"),
    (f"{IN_LOSS}k2 advantage=rloo", "pi* ∝ ref · exp(score / b), each token for itself, with b = 0.5"),
    (f"{IN_LOSS}k3 advantage=rloo", "pi = b · ref / (λ - score), each token for itself, with b = 0.5"),
    (f"{IN_LOSS}k2 advantage=dr_grpo sampling.group_size=2",
     "pi* ∝ ref · exp(score / b), each token for itself, with b = 1"),
    (f"{IN_LOSS}k2", "pi* ∝ ref · exp(score / b), each token for itself, with b = beta · std(score)"),
    *((f"{IN_LOSS}k2 advantage={a}", f"pi* ∝ ref · exp(A(pi) / b), each token for itself, {MEAN}{more}")
      for more, names in {
        "": ["grpo advantage.scale=batch", "reinforce_pp", "reinforce_pp_baseline", "best_only", "maxrl",
             "maxrl sampling.group_size=2", "pass_at_k advantage.k=1 sampling.group_size=2"],
        ONE_TOKEN: ["reinforce_pp advantage.gamma=0.9", "gae loss=ppo model.critic=head"]}.items() for a in names),
    (f"{IN_LOSS}k3 advantage=reinforce_pp_baseline", f"pi = b · ref / (λ - A(pi)), each token for itself, {MEAN}"),
    *((f"{IN_LOSS}{name} {DISCOUNT}", f"{form}, with b = 0.5{ONE_TOKEN}") for name, form in (
        ("k2", "pi* ∝ ref · exp(score / b), each token for itself"), ("k2_sequence", "pi* ∝ ref · exp(score / b)"),
        ("k3", "pi = b · ref / (λ - score), each token for itself"))),
    (f"{DISCOUNT} loss.entropy_coef=0.25", f"pi ∝ exp(score / 0.25), each token for itself{ONE_TOKEN}"),
    (f"{DISCOUNT} loss.entropy_coef=0.25 kl_ref.coef=0.5", f"{BOTH} b = 0.5 and c = 0.25"),
    ("loss.entropy_coef=0.25 advantage=maxrl sampling.group_size=2", NO_FORM),
    (DISCOUNT, "all mass on the best-scored replies"),
    (f"{IN_LOSS}wk2_token advantage=rloo", "no closed form is known, as the KL is none that is known; --verify"),
    ("selector=clip_cov loss=clip_cov", "no closed form is known, as at ratio 1 the loss is not REINFORCE; --verify"),
    (f"selector=clip_cov loss=clip_cov {IN_LOSS}wk2_token", "no closed form is known, as at ratio 1 the loss is not"),
])
def test_the_optimum_has_the_form_that_theory_gives(case, sentence):
    line = lines_of(case, "optimum of a tabular policy")[0]
    assert line.startswith(sentence)
    assert (ONE_TOKEN in line) == (sentence.endswith(ONE_TOKEN))


@pytest.mark.parametrize("group", [2, 5])
@pytest.mark.parametrize("kl", ["", "kl_ref.coef=0.5", f"{IN_LOSS}k2", f"{IN_LOSS}k2_sequence"])
def test_where_an_entropy_bonus_leads_is_what_its_line_says(kl, group):
    """pi ∝ (ref^b · exp(score))^(1/(b + c)), b = 0 without a KL, with the numbers of the line."""
    case = f"{kl} advantage=dr_grpo sampling.group_size={group} loss.entropy_coef=0.2"
    b, c = (said(case).numbers.get(name, 0.0) for name in ("beta_eff", "entropy_eff"))
    assert c == pytest.approx(0.2 * group / (group - 1))
    assert reached(case) == tilted(b, c)


# A file of one's own
def written(folder, source, name="mine"):
    path = folder / f"{name}.py"
    path.write_text("import torch\n\n\n" + source, encoding="utf-8")
    return path


def reached(case):
    """(5,) where the exact expected gradient ends on the game of one token."""
    cfg = load(case)
    game = Expected(cfg, algorithm(cfg), BANDIT)
    return game.probability(converge(game)[0]).detach().tolist()


def tilted(beta, entropy=0.0):
    mass = [(p**beta * math.exp(r)) ** (1 / (beta + entropy))
            for p, r in zip((0.35, 0.25, 0.2, 0.15, 0.05), (0, 0.5, 1, -0.5, 2), strict=True)]
    return pytest.approx([x / sum(mass) for x in mass], abs=1e-9)


RATIO = "    w = (new.logprobs - batch.old_logprobs).exp()\n"
LOSS = "def mine(new, batch):\n" + RATIO + "    return {}, {{'ratio': w}}\n"


def test_a_loss_of_twice_the_gradient_halves_the_kl(tmp_path):
    mine = written(tmp_path, LOSS.format("-2 * w * batch.advantages"))
    case = f"{IN_LOSS}k2 advantage=rloo sampling.group_size=2 loss={mine}:mine"
    assert said(case).numbers["beta_eff"] == pytest.approx(0.25)
    assert said(case).numbers["pull_up_twice_True"] == pytest.approx(4.0)
    assert reached(case) == tilted(0.25)


def test_a_loss_of_twice_the_gradient_halves_the_kl_of_standardised_scores_too(tmp_path):
    mine = written(tmp_path, LOSS.format("-2 * w * batch.advantages"))
    assert said(f"{IN_LOSS}k2 kl_ref.coef=3.2 loss={mine}:mine").numbers["right_5"] == pytest.approx(0.855232049)
    assert said(f"{IN_LOSS}k3 kl_ref.coef=2 loss={mine}:mine").numbers["right_5"] == pytest.approx(0.853553391)


@pytest.mark.parametrize("advantage", ["maxrl", "reinforce_pp", "best_only"])
def test_it_halves_the_kl_beside_a_mean_advantage_too(tmp_path, advantage):
    mine = written(tmp_path, LOSS.format("-2 * w * batch.advantages"))
    assert said(f"{IN_LOSS}k2 advantage={advantage} loss={mine}:mine").numbers["beta_eff"] == pytest.approx(0.25)


def test_a_loss_that_is_not_reinforce_has_no_closed_form(tmp_path):
    mine = written(tmp_path, LOSS.format("-w * batch.advantages.sign()"))
    assert "no closed form is known, as at ratio 1 the loss is not REINFORCE" in lines_of(
        f"loss={mine}:mine", "optimum of a tabular policy")[0]
    assert "no docstring" in lines_of(f"loss={mine}:mine", "objective")[3]


@pytest.mark.parametrize(("advantage", "loss", "group", "strength"), [
    ("{}:mine", "grpo", 2, 1 / 3), ("{}:mine", "{}:twice", 4, 2 / 3), ("rloo", "{}:twice", 4, 2),
    ("dr_grpo", "{}:twice", 4, 1.5), ("dr_grpo", "{}:twice", 2, 1), ("rloo", "grpo", 2, 1),
    ("rloo", "{}:half", 2, 0.5)])
def test_the_reason_of_the_effective_beta_gives_its_value(tmp_path, advantage, loss, group, strength):
    """Where it is not the mean that contains the reply alone, the line has the strength and not G/(G-1)."""
    losses = (LOSS.format(f"-{factor} * w * batch.advantages").replace("mine", name)
              for name, factor in (("twice", 2), ("half", 0.5)))
    mine = written(tmp_path, "\n\n".join((ADVANTAGE.format("r / 3"), *losses)))
    case = f"{IN_LOSS}k2 sampling.group_size={group} advantage={advantage} loss={loss}".replace("{}", str(mine))
    e = said(case)
    assert e.numbers["beta_eff"] == pytest.approx(0.5 / strength)
    assert "group" not in e.numbers
    assert e.numbers.get("strength", 1) == pytest.approx(strength)
    assert lines_of(case, "optimum of a tabular policy")[1:] == (
        [] if strength == 1 else [f"b = beta / {strength:.6g}, the strength of the policy gradient"])
    assert printed(e) == told(e.numbers)


def test_an_advantage_that_falls_with_the_score_does_not_end_on_the_best(tmp_path):
    mine = written(tmp_path, ADVANTAGE.format("-r"))
    assert lines_of(f"advantage={mine}:mine", "optimum of a tabular policy") == [
        "no closed form is known, as the best score has not the best advantage; --verify measures it"]
    assert printed(said(f"advantage={mine}:mine")) == told(said(f"advantage={mine}:mine").numbers)


def test_an_advantage_of_ones_own_is_measured(tmp_path):
    mine = written(tmp_path, "def mine(rewards, values, mask, *, group_size):\n    '''A third of what is {paid}.'''\n"
                   "    r = rewards.sum(1, keepdim=True)\n    return (r / 3).expand_as(rewards) * mask, None\n")
    case = f"{IN_LOSS}k2 advantage={mine}:mine sampling.group_size=2"
    assert said(case).numbers["beta_eff"] == pytest.approx(1.5)
    assert lines_of(case, "objective")[2].endswith("A third of what is {paid}.")
    assert reached(case) == tilted(1.5)


@pytest.mark.parametrize(("source", "kind"), [
    ("return (new.logprobs - batch.ref_logprobs) ** 2 / 2", "token"),
    ("u = new.logprobs - batch.ref_logprobs\n    return (-u).exp() - 1 + u", "forward"),
    ("return new.kl_pi_ref", "token"),
    ("return (new.logprobs - batch.ref_logprobs).abs()", "other")])
def test_a_kl_term_of_ones_own_is_measured(tmp_path, source, kind):
    mine = written(tmp_path, f"def mine(new, batch):\n    {source}\n")
    case = f"{IN_LOSS}{mine}:mine advantage=rloo sampling.group_size=2"
    assert any(line.startswith(GRADIENT[kind]) for line in lines_of(case, "KL to the reference"))
    if kind == "token":
        assert reached(case) == tilted(0.5)


def test_k1_in_the_loss_from_a_file_is_found_to_hold_nothing(tmp_path):
    mine = written(tmp_path, "def mine(new, batch):\n    return new.logprobs - batch.ref_logprobs\n")
    case = f"{IN_LOSS}{mine}:mine advantage=rloo"
    assert "that of nothing: zero on average" in " ".join(lines_of(case, "KL to the reference"))
    assert lines_of(case, "objective")[0] == "maximise  E[score]"


@pytest.mark.parametrize(("source", "kind"), [("logprobs - ref_logprobs", "sequence"),
                                              ("2 * (logprobs - ref_logprobs)", "other")])
def test_an_estimator_of_ones_own_in_the_reward_is_measured(tmp_path, source, kind):
    mine = written(tmp_path, f"def mine(logprobs, ref_logprobs):\n    return {source}\n")
    lines = lines_of(f"kl_ref.coef=0.5 kl_ref.estimator={mine}:mine advantage=rloo", "KL to the reference")
    assert any(line.startswith(GRADIENT[kind]) for line in lines)


# The command
@pytest.fixture
def run(monkeypatch, capsys):
    """rlkl ARGUMENTS on a wide terminal: exit code, stdout, stderr."""
    monkeypatch.setattr(console, "width", 250)
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        code = cli.main(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err
    return call


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_command_prints_all_that_explain_says_of_each_config(run, path):
    code, out, err = run("explain", str(path))
    assert (code, err) == (0, "")
    cfg = config.load([str(path)])
    e = explain(cfg, on_cuda(cfg))
    assert [line.strip() for line in out.splitlines() if line.strip()] == [
        line for topic, lines in e.topics.items() for line in (topic, *lines)]


README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "sampling.group_size=4"
VERIFIED = {
    "ppo": "configs/tiny-ppo.yaml", "grpo": f"configs/tiny-grpo.yaml {SMALL}", "dr_grpo": f"advantage=dr_grpo {SMALL}",
    "dr_grpo and k2": f"{IN_LOSS}k2 advantage=dr_grpo {SMALL}", "grpo and k3": f"{IN_LOSS}k3 {SMALL}",
    "rloo and k1": f"advantage=rloo kl_ref.coef=0.5 {SMALL}",
    "gae and k1": "advantage=gae loss=ppo model.critic=head kl_ref.coef=0.5 sampling.group_size=1",
    "mine": f"loss=my_loss.py:sapo advantage=rloo kl_ref.coef=0.5 {SMALL}",
}


def variations(out, of="closed form"):
    return [float(x) for x in re.findall(rf"^ +{re.escape(of)}.* TV (\S+)$", out, re.M)]


def check_the_ends(out):
    """Of each game, what is left of the gradient, and that it is on its way if that is anything."""
    ends = re.findall(r"gradient left (\S+e[+-]\d+)(: it is still on its way)?$", out, re.M)
    assert len(ends) == 2
    assert all(bool(told) == (float(left) >= 1e-9) for left, told in ends)
    return [bool(told) for _, told in ends]


@pytest.mark.parametrize("name", VERIFIED)
def test_what_verify_measures_is_the_closed_form(run, name, tmp_path, monkeypatch):
    arguments = VERIFIED[name].split()
    if name == "mine":
        source = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my_loss.py" in block)
        (tmp_path / "my_loss.py").write_text(source, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
    code, out, err = run("explain", *arguments, "--verify")
    assert (code, err) == (0, "")
    check_the_ends(out)
    found = variations(out)
    assert len(found) == 2  # one game of one token, one of two
    assert max(found) <= 1e-6
    assert len(re.findall(r"^│ \d", out, re.M)) == 5 + 9  # each reply of each game
    apart = variations(out, "pi*")
    assert len(apart) == 2 * ("kl_ref.coef" in VERIFIED[name])  # without a KL there is no pi*
    assert (min(apart, default=0) > 0.01) == (name in ("dr_grpo and k2", "grpo and k3"))


def test_a_greedy_baseline_moves_no_optimum(run):
    out = run("explain", "advantage=remax", "sampling.baseline=greedy", "kl_ref.coef=0.5", "sampling.group_size=1",
              "--verify")[1]
    assert max(variations(out, "pi*")) <= 1e-6


def test_where_no_closed_form_is_known_verify_says_so(run, tmp_path):
    mine = written(tmp_path, LOSS.format("-w * batch.advantages.sign()"))
    code, out, _ = run("explain", f"loss={mine}:mine", "advantage=rloo", "kl_ref.coef=0.5", "sampling.group_size=2",
                       "--verify")
    assert code == 0
    assert variations(out) == []
    assert out.count("closed form   none is known") == 2


@pytest.mark.parametrize(("advantage", "name"), [("maxrl", "k2"), ("pass_at_k advantage.k=1", "k3")])
def test_what_is_measured_on_right_and_wrong_is_not_said_of_other_scores(run, advantage, name):
    """In pairs both are linear in scores of 0 and 1, but the line is about any."""
    case = f"{IN_LOSS}{name} advantage={advantage} sampling.group_size=2"
    assert "A(pi)" in lines_of(case, "optimum of a tabular policy")[0]
    out = run("explain", *case.split(), "--verify")[1]
    assert len(re.findall(r"^  closed form .*A\(pi\)", out, re.M)) == 2
    assert max(variations(out)) <= 1e-6


@pytest.mark.parametrize("kl", ["kl_ref.coef=0.5", f"{IN_LOSS}k2", f"{IN_LOSS}k2_sequence"])
def test_with_a_discount_there_is_a_closed_form_for_replies_of_one_token_alone(run, kl):
    out = run("explain", *f"{DISCOUNT} {kl} sampling.group_size=1".split(), "--verify")[1]
    assert len(variations(out)) == 1
    assert variations(out)[0] <= 1e-6
    assert out.index("closed form   pi ∝") < out.index("closed form   none is known")
    assert variations(out, "pi*")[1] > 1e-3  # what a form in the score would be


def test_what_has_not_ended_is_said_to_be_on_its_way(run, tmp_path):
    """|u| in the loss pulls at one strength from either side: no step comes to rest where they meet."""
    mine = written(tmp_path, "def mine(new, batch):\n    return (new.logprobs - batch.ref_logprobs).abs()\n")
    out = run("explain", *f"{IN_LOSS}{mine}:mine advantage=rloo sampling.group_size=2".split(), "--verify")[1]
    assert True in check_the_ends(out)


def test_large_groups_are_said_to_be_verified_in_smaller_ones(run):
    out = run("explain", "advantage=rloo", "kl_ref.coef=0.5", "sampling.group_size=16", "--verify")[1]
    assert re.findall(r"replies of \w+ tokens?, in groups of (\d+)", out) == ["8", "4"]


@pytest.mark.parametrize(("case", "rows"), [
    ("advantage=reinforce_pp sampling.group_size=2", 3), ("advantage=reinforce_pp sampling.group_size=8", 3),
    ("advantage=gae loss=ppo model.critic=head sampling.group_size=1", 3),
    ("advantage=reinforce_pp_baseline sampling.group_size=2", 4)])
def test_what_compares_groups_is_said_to_be_verified_in_rollouts_of_few_replies(run, monkeypatch, case, rows):
    monkeypatch.setattr("rlkl.cli.explain.converge", lambda expected: (expected.game.table, 0.0))
    out = run("explain", *case.split(), "--verify")[1]
    assert re.findall(r"replies of \w+ tokens?, in (\w+) of (\d+)( replies)?", out) == [
        ("rollouts", str(rows), " replies")] * 2


@pytest.mark.parametrize(("arguments", "says"), [
    (["explane"], "error: no command 'explane'; there is explain"),
    (["explain", "--verfy"], "error: rlkl explain has no option '--verfy'; it takes --verify"),
    (["explain", "nope.yaml"], "error: nope.yaml: no such config file"),
    (["explain", "loss.clipp=1"], "error: grpo has no option 'clipp'; it takes clip, clip_high, entropy_coef"),
    (["explain", "kl.coef=1"], "error: unknown key kl"),
    (["explain", "kl_ref.coef=1", "kl_ref.place=loss"], "error: kl_ref.place=loss with kl_ref.estimator=k1: "),
    (["explain", "loss=top_entropy", "selector=top_entropy", "--verify"], "error: --verify enumerates rollouts"),
])
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, says):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith(says)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  rlkl {name} +\S", out, re.M) for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [["explain", "--help"], ["explain", "configs/tiny-ppo.yaml", "-h"]])
def test_help_of_explain_says_what_verify_does(run, arguments):
    code, out, _ = run(*arguments)
    assert code == 0
    assert out.startswith("usage: rlkl explain [CONFIG.yaml …] [key=value …] [--verify]")


def test_of_a_model_that_cannot_be_read_all_but_the_size_is_printed(run, tmp_path):
    code, out, err = run("explain", f"model.name={tmp_path}/none", "kl_ref.coef=0.5")
    assert (code, err) == (0, "")
    assert "maximise  E[score] - 0.5 · KL(pi || ref)" in out
    assert "not estimated: model.name=" in out
    assert "Traceback" not in out


def test_python_m_rlkl_is_the_command():
    done = subprocess.run([sys.executable, "-m", "rlkl", "explain", "configs/tiny-grpo.yaml", "kl_ref.coef=0.04"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "maximise  E[score] - 0.04 · KL(pi || ref)" in done.stdout
    assert done.stderr == ""


def test_ctrl_c_ends_it_without_a_traceback(run, monkeypatch):
    def stopped(argv):
        raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "explain", stopped)
    with contextlib.suppress(SystemExit):
        assert run("explain")[0] == 130
