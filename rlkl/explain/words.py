"""What a configuration really optimises: its objective, its two KLs, its optimum, its traps, its size.

Every statement about a function is measured by calling it (measure.py), so that yours are explained like ours.
A line is a template and its numbers; docs/explain.md derives them, tests/test_explain.py recomputes each one.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

import torch

from rlkl.algorithm import Algorithm, algorithm, in_reward, updates
from rlkl.errors import UserError
from rlkl.explain.footprint import architecture, described, memory, tokens, width_of
from rlkl.explain.measure import FORWARD, NOTHING, OTHER, SEQUENCE, TOKEN, games_for, pull
from rlkl.explain.optimum import binary_forward, binary_reverse, binary_threshold
from rlkl.explain.predict import Law, law, predict
from rlkl.explain.tabular import probabilities
from rlkl.explain.verify import compares_groups
from rlkl.kl import TRAPS
from rlkl.schema import Config

GRADIENT_OF = {
    NOTHING: "nothing: zero on average",
    SEQUENCE: "KL(pi || ref) of whole replies: a token pays for what it leads to",
    TOKEN: "KL(pi || ref) token by token: what a token leads to is charged to nobody",
    FORWARD: "KL(ref || pi) token by token: the other direction, which asks pi to cover ref",
    OTHER: "no KL that is known here",
}
IN_SYMBOLS = {SEQUENCE: "KL(pi || ref)", TOKEN: "Σ_t KL(pi || ref)(s_t)", FORWARD: "Σ_t KL(ref || pi)(s_t)",
              OTHER: "[the KL term as it is]"}
COUNTS = {
    "token": "every token of an update counts the same, 1/tokens: long replies weigh more, and by what else is there",
    "sequence": "every reply counts the same, a token 1/(replies · its length): in long replies tokens learn less, "
                "so wrong ones grow long and right ones short",
    "constant": "every token counts 1/(replies · sampling.max_new_tokens): the gradient of E[score], to a constant",
}
SHARES = (0.1, 0.5, 0.9)  # of right replies under ref, for scores of 0 and 1


@dataclass
class Explanation:
    """Lines by topic. All numbers that a line prints are in `numbers`, under the name in its template."""

    numbers: dict[str, float] = field(default_factory=dict)
    topics: dict[str, list[str]] = field(default_factory=dict)

    def say(self, topic: str, template: str, **numbers: float) -> None:
        self.numbers |= numbers
        self.topics.setdefault(topic, []).append(template.format(**{n: number(x) for n, x in numbers.items()}))


def number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.6g}"


def explain(cfg: Config, cuda: bool = False) -> Explanation:
    """All that can be said without training. UserError where the configuration itself is wrong."""
    chosen = algorithm(cfg)
    found, said = law(cfg, chosen), Explanation()
    objective(said, found)
    kl_to_reference(said, found)
    trust_region(said, cfg, chosen)
    optimum(said, found)
    normalisation(said, cfg, chosen)
    for trap in traps(cfg, chosen, found):
        said.say("traps", escaped(trap))
    size(said, cfg, chosen.exact, cuda)
    return said


def objective(said: Explanation, found: Law) -> None:
    cfg, terms = found.cfg, ["E[score]"]
    if found.held:
        terms.append("{beta} · " + IN_SYMBOLS[found.kl])
    symbols = " - ".join(terms) + (" + {entropy_bonus} · Σ_t H(pi)(s_t)" if found.entropy else "")
    numbers = {"beta": cfg.kl_ref.coef, "entropy_bonus": found.entropy}
    said.say("objective", "maximise  " + symbols, **{n: x for n, x in numbers.items() if f"{{{n}}}" in symbols})
    end = "and stay near the frozen reference" if found.held else \
        "with nothing that holds it to the reference: it drifts as long as it trains"
    said.say("objective", f"in words  score as high as possible, {end}")
    for kind, spec, function in (("advantage", cfg.advantage, found.algorithm.advantage),
                                 ("loss", cfg.loss, found.algorithm.loss)):
        said.say("objective", f"{kind:9s} {spec['name']}: {escaped(summary(function.func))}")
    if found.credit.standardised and compares_groups(found.algorithm, cfg):
        said.say("objective", "advantages are divided by their std over the whole rollout; terms beside them are not")
    elif found.credit.standardised:
        said.say("objective", "the scores of a prompt are divided by their std: one that is nearly solved, or nearly "
                 "hopeless, pulls as hard as any other")


def kl_to_reference(said: Explanation, found: Law) -> None:
    cfg, topic = found.cfg, "KL to the reference"
    if cfg.kl_ref.coef == 0:
        said.say(topic, "off: nothing holds pi to ref; a trust region sets the pace, not the destination")
        return
    where = "reward, before baseline and normalisation" if in_reward(cfg) else "loss, beside the policy objective"
    said.say(topic, "between   pi, the policy in training, and ref, the frozen first policy; samples come from pi_old")
    said.say(topic, f"place     in the {where}; estimator {escaped(cfg.kl_ref.estimator)}; coefficient {{beta}}",
             beta=cfg.kl_ref.coef)
    said.say(topic, f"gradient  on-policy, that of {GRADIENT_OF[found.kl]}")
    if in_reward(cfg) and updates(cfg) > 1:
        said.say(topic, "it is frozen over the {updates} updates of a rollout: here the trust region is needed for "
                 "stability, and not only for speed", updates=updates(cfg))
    if cfg.kl_ref.target is not None:
        said.say(topic, "adaptive  after each step coef · (1 + clip(KL / {kl_target} - 1, ±0.2) · {rows} / {horizon}), "
                 "KL in nats per reply", kl_target=cfg.kl_ref.target, rows=cfg.sampling.rows,
                 horizon=cfg.kl_ref.horizon)


def trust_region(said: Explanation, cfg: Config, chosen: Algorithm) -> None:
    topic = "trust region"
    said.say(topic, "between   pi and pi_old, the policy that sampled this rollout; it changes the way, not the end")
    kinds = (True, False) if chosen.selector is not None else (True,)
    for selected in kinds:
        shares = {f"pull_{sign}_{name}_{selected}": pull(chosen.loss, ratio, x, selected)
                  for sign, x in (("up", 1.0), ("down", -1.0)) for name, ratio in (("half", 0.5), ("twice", 2.0))}
        whose = "" if len(kinds) == 1 else "selected tokens: " if selected else "other tokens: "
        said.say(topic, f"{whose}a token's pull (1 = REINFORCE, 0 = stopped), once pi is half and twice pi_old: "
                 f"A > 0: {{pull_up_half_{selected}}} and {{pull_up_twice_{selected}}}, "
                 f"A < 0: {{pull_down_half_{selected}}} and {{pull_down_twice_{selected}}}", **shares)
    if updates(cfg) == 1:
        said.say(topic, "{updates} update per rollout: pi is pi_old when the gradient is taken, no clip can ever act",
                 updates=1)
    else:
        said.say(topic, "{updates} updates per rollout: the clip can act from the second on", updates=updates(cfg))
    if cfg.kl_old.coef > 0:
        said.say(topic, "penalty   {kl_old_coef} · KL(pi_old || pi) in the loss", kl_old_coef=cfg.kl_old.coef)
    if cfg.kl_old.target is not None:
        said.say(topic, "adaptive  coef halves below {kl_old_low} nats per token and doubles above {kl_old_high}",
                 kl_old_low=cfg.kl_old.target / 1.5, kl_old_high=cfg.kl_old.target * 1.5)
    if cfg.kl_old.stop is not None:
        said.say(topic, "stop      a rollout's other updates are skipped once KL(pi_old || pi) is above {kl_old_stop} "
                 "nats per token", kl_old_stop=cfg.kl_old.stop)


def optimum(said: Explanation, found: Law) -> None:
    """Of a tabular policy, which can be anything: what the objective wants, before any network is asked."""
    cfg, topic = found.cfg, "optimum of a tabular policy"
    if found.factor is None or found.kl == OTHER:
        why = "at ratio 1 the loss is not REINFORCE" if found.factor is None else "the KL is none that is known"
        said.say(topic, f"no closed form is known, as {why}; --verify measures where it leads")
    elif found.entropy:
        with_entropy(said, found)
    elif not found.held and found.credit.rises:
        said.say(topic, "all mass on the best-scored replies, shared among them as ref shares it")
    elif not found.held:
        said.say(topic, "no closed form is known, as the best score has not the best advantage; --verify measures it")
    elif in_reward(cfg):
        said.say(topic, f"pi* ∝ ref · exp(score / {{beta}}){how_long(found)}", beta=cfg.kl_ref.coef)
    else:
        in_loss(said, found)


def how_long(found: Law) -> str:
    """What to add to a closed form that is one for short replies only."""
    games = games_for(found.cfg, found.algorithm)
    known = [predict(found, game, probabilities(game, game.table)) for game in games]
    return "" if all(known) else "; so for replies of one token, for longer ones no closed form is known"


def with_entropy(said: Explanation, found: Law) -> None:
    topic, b, c = "optimum of a tabular policy", found.effective_beta, found.effective_entropy
    if b is None or c is None or found.kl == FORWARD:
        said.say(topic, "with the entropy bonus no closed form in the scores is known; --verify measures its end")
    elif found.held:
        said.say(topic, "pi ∝ (ref^b · exp(score))^(1/(b + c)) for replies of one token, with b = {beta_eff} and "
                 "c = {entropy_eff}", beta_eff=b, entropy_eff=c)
    else:
        said.say(topic, f"pi ∝ exp(score / {{entropy_eff}}), each token for itself{how_long(found)}", entropy_eff=c)


def in_loss(said: Explanation, found: Law) -> None:
    topic, forward, cfg = "optimum of a tabular policy", found.kl == FORWARD, found.cfg
    form = "pi = b · ref / (λ - score)" if forward else "pi* ∝ ref · exp(score / b)"
    state, limits = "" if found.kl == SEQUENCE else ", each token for itself", how_long(found)
    if (beta := found.effective_beta) is not None:
        said.say(topic, form + state + ", with b = {beta_eff}" + limits, beta_eff=beta)
        strength, size = found.credit.slope * found.factor, cfg.sampling.group_size
        if abs(found.factor - 1) < 1e-9 and abs(strength * size - (size - 1)) < 1e-9:
            said.say(topic, "b = beta · G/(G-1) for G = {group}: a mean that contains the reply itself shrinks its "
                     "advantage, so the KL weighs more than its coefficient says", group=size)
        elif abs(strength - 1) > 1e-9:
            said.say(topic, "b = beta / {strength}, the strength of the policy gradient", strength=strength)
        return
    beta = found.beta / found.factor
    if not found.credit.standardised or compares_groups(found.algorithm, cfg):
        said.say(topic, form.replace("score", "A(pi)") + state + ", with b = {beta_eff} and A(pi) the mean advantage "
                 "under pi itself" + limits, beta_eff=beta)
        return
    said.say(topic, f"{form}{state}, with b = beta · std(score) under pi itself, in large groups")
    for share in SHARES:
        key = f"{share:.1f}".replace("0.", "")
        if forward:
            said.say(topic, f"scores of 0 and 1, {{share_{key}}} right under ref: {{right_{key}}} right in the end",
                     **{f"share_{key}": share, f"right_{key}": binary_forward(share, beta)})
        else:
            threshold = binary_threshold(share)
            end = "collapses to 1" if beta < threshold else f"ends at {{right_{key}}}"
            numbers = {f"share_{key}": share, f"threshold_{key}": threshold}
            if beta >= threshold:
                numbers[f"right_{key}"] = binary_reverse(share, beta)
            said.say(topic, f"scores of 0 and 1, {{share_{key}}} right under ref: beta_c = {{threshold_{key}}}, below "
                     f"which the KL cannot hold the policy; the share of right replies {end}", **numbers)


def normalisation(said: Explanation, cfg: Config, chosen: Algorithm) -> None:
    said.say("normalisation", f"weights   {cfg.optim.weights}: {COUNTS[cfg.optim.weights]}")
    paper = re.search(r"Weights: (token|sequence|constant)", inspect.getdoc(chosen.loss.func) or "")
    if paper and paper[1] != cfg.optim.weights:
        said.say("normalisation", f"the paper of loss {escaped(cfg.loss['name'])} has weights {paper[1]}")
    if cfg.overlong.buffer:
        said.say("normalisation", "score     falls by up to {overlong} over the last {buffer} tokens of the room",
                 overlong=cfg.overlong.coef, buffer=cfg.overlong.buffer)
    if cfg.sampling.unanimous != "keep":
        said.say("normalisation", "prompts   whose replies all score the same are left out, of the count too")
    if cfg.sampling.unanimous == "refill":
        said.say("normalisation", "refill    others are sampled in their place, {refills} times at most",
                 refills=cfg.sampling.refills)
    if cfg.mismatch.truncate != "none":
        said.say("normalisation", f"mismatch  advantages times min(pi_old / sampler, {{cap}}), by "
                 f"{cfg.mismatch.truncate}", cap=cfg.mismatch.cap)
    if cfg.mismatch.reject != "none":
        said.say("normalisation", f"mismatch  weight 0 where pi_old / sampler, by {cfg.mismatch.reject}, is outside "
                 "[{low}, {high}]", low=cfg.mismatch.low, high=cfg.mismatch.high)


def traps(cfg: Config, chosen: Algorithm, found: Law | None = None) -> list[str]:
    """One line each: what a configuration does that its author may not expect."""
    if cfg.kl_ref.coef == 0:
        return []
    known = cfg.kl_ref.place, cfg.kl_ref.estimator
    lines = [TRAPS[known]] if known in TRAPS else []
    try:
        found = found or law(cfg, chosen)
    except UserError:  # a run is not stopped by what cannot be measured
        return lines
    if not found.credit.standardised or compares_groups(chosen, cfg):
        return lines
    if not in_reward(cfg):
        beyond = ", and below a threshold it cannot hold the policy at all" if found.kl in (SEQUENCE, TOKEN) else ""
        lines.append(f"advantages over their std, and the KL in the loss: it is as strong as beta · std(score), "
                     f"which falls to 0 as replies agree{beyond}; kl_ref.place=reward has no such coupling")
    else:
        lines.append("advantages over their std, and the KL in the reward: where all replies of a prompt score the "
                     "same, the KL alone is blown up to unit strength, whatever beta")
    return lines


def size(said: Explanation, cfg: Config, exact: bool, cuda: bool) -> None:
    try:
        config, tokenizer = architecture(cfg)
        count = tokens(cfg, tokenizer)
    except UserError as error:
        said.say("size of a step", escaped(f"not estimated: {error}"))
        return
    said.say("size of a step", "tokens    at most {sampled_tokens} sampled, {scored_tokens} scored, {learned_tokens} "
             "learned from; prompts of up to {prompt_tokens}", sampled_tokens=count.sampled, scored_tokens=count.scored,
             learned_tokens=count.learned, prompt_tokens=count.prompt)
    for line, numbers in described(memory(cfg, config, count.prompt, width_of(cfg, cuda), exact, cuda)):
        said.say("size of a step", line, **numbers)


def summary(function: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(function) or "no docstring").split("\n\n")[0].split())


def escaped(text: object) -> str:
    """Braces doubled, for str.format."""
    return str(text).replace("{", "{{").replace("}", "}}")


def on_cuda(cfg: Config) -> bool:
    return cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
