"""The report of `rlkl explain`: objective, two KLs, optimum, normalisation, traps, size of a step.

Every statement about a function is measured by calling it (measure.py), so that a user's function
is explained like a built-in one. A line is a template and its numbers. docs/explain.md derives
them; tests/test_explain.py checks them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch

from rlkl.errors import UserError
from rlkl.explain.footprint import architecture, memory, memory_lines, tokens, width_of
from rlkl.explain.measure import (
    FORWARD,
    NOTHING,
    OTHER,
    SEQUENCE,
    TOKEN,
    games_for,
    gradient_weight,
)
from rlkl.explain.optimum import binary_forward, binary_reverse, binary_threshold
from rlkl.explain.predict import MeasuredAlgorithm, measure_algorithm, predict
from rlkl.explain.tabular import probabilities
from rlkl.explain.verify import compares_groups
from rlkl.kl import TRAPS
from rlkl.run.algorithm import Algorithm, kl_in_reward, resolve_algorithm, updates_per_rollout
from rlkl.run.schema import Config

GRADIENT_OF = {
    NOTHING: "nothing: zero on average",
    SEQUENCE: "KL(pi || ref) of whole responses: a token is charged for the KL of later tokens too",
    TOKEN: "KL(pi || ref) token by token: a token is not charged for the KL of later tokens",
    FORWARD: "KL(ref || pi) token by token: the other direction, which asks pi to cover ref",
    OTHER: "no KL that is known here",
}
IN_SYMBOLS = {
    SEQUENCE: "KL(pi || ref)",
    TOKEN: "Σ_t KL(pi || ref)(s_t)",
    FORWARD: "Σ_t KL(ref || pi)(s_t)",
    OTHER: "[the KL term as it is]",
}
WEIGHTS = {
    "token": (
        "every token of an update counts the same, 1/tokens: long responses weigh more, and the "
        "weight of a response depends on the others"
    ),
    "sequence": (
        "every response counts the same, a token 1/(responses · its length): the tokens of long "
        "responses learn less, so wrong responses grow long and right ones short"
    ),
    "constant": (
        "every token counts 1/(responses · sampling.max_new_tokens): the gradient of E[score], up "
        "to a constant"
    ),
}
SHARES = (0.1, 0.5, 0.9)  # of right responses under ref, for scores of 0 and 1
OPTIMUM = "optimum of a tabular policy"
EACH_TOKEN = ", each token for itself"


@dataclass
class Explanation:
    """Lines by topic. `numbers` has every number of the lines, by its name in the templates."""

    numbers: dict[str, float] = field(default_factory=dict)
    topics: dict[str, list[str]] = field(default_factory=dict)

    def add(self, topic: str, template: str, **numbers: float) -> None:
        """Append a line to a topic; the names in its braces are those of the numbers."""
        self.numbers |= numbers
        line = template.format(**{name: format_number(x) for name, x in numbers.items()})
        self.topics.setdefault(topic, []).append(line)


def format_number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.6g}"


def explain(cfg: Config, cuda: bool = False) -> Explanation:
    """The whole report. UserError where the configuration is wrong, or cannot be measured.

    cuda: count memory as on a GPU.
    """
    algorithm = resolve_algorithm(cfg)
    measured = measure_algorithm(cfg, algorithm)
    report = Explanation()
    objective(report, measured)
    kl_to_reference(report, measured)
    trust_region(report, cfg, algorithm)
    optimum(report, measured)
    normalisation(report, cfg)
    for trap in traps(cfg, algorithm, measured):
        report.add("traps", escape_braces(trap))
    size_of_step(report, cfg, algorithm.exact_kl, cuda)
    return report


# ------------------------------------------------------------------ objective


def objective(report: Explanation, measured: MeasuredAlgorithm) -> None:
    """What is maximised, and the advantage and the loss in their authors' words."""
    cfg = measured.cfg
    formula = "E[score]"
    numbers = {}
    if measured.constrained:
        formula += " - {beta} · " + IN_SYMBOLS[measured.kl]
        numbers["beta"] = cfg.kl_ref.coef
    if measured.entropy:
        formula += " + {entropy_bonus} · Σ_t H(pi)(s_t)"
        numbers["entropy_bonus"] = measured.entropy
    report.add("objective", f"maximise  {formula}", **numbers)
    if measured.constrained:
        end = "and stay near the frozen reference"
    else:
        end = "with no KL to the reference: the policy drifts as long as it trains"
    report.add("objective", f"in words  score as high as possible, {end}")
    advantage = summary(measured.algorithm.advantage.func)
    loss = summary(measured.algorithm.policy_loss.func)
    report.add("objective", escape_braces(f"advantage {cfg.advantage['name']}: {advantage}"))
    report.add("objective", escape_braces(f"loss      {cfg.loss['name']}: {loss}"))
    if measured.credit.standardised and compares_groups(measured.algorithm, cfg):
        report.add(
            "objective",
            "advantages are divided by their std over the whole rollout; the other terms are not",
        )
    elif measured.credit.standardised:
        report.add(
            "objective",
            "the scores of a prompt are divided by their std: a prompt that is nearly always, or "
            "hardly ever, solved counts as much as any other",
        )


def summary(function: object) -> str:
    """The first paragraph of a docstring, on one line."""
    text = inspect.getdoc(function) or "no docstring"
    return " ".join(text.split("\n\n")[0].split())


def escape_braces(text: str) -> str:
    """Braces doubled, for str.format."""
    return text.replace("{", "{{").replace("}", "}}")


# ------------------------------------------------------------------ the two KLs


def kl_to_reference(report: Explanation, measured: MeasuredAlgorithm) -> None:
    """Between what, where, how strong, and whose gradient it has."""
    cfg, topic = measured.cfg, "KL to the reference"
    updates = updates_per_rollout(cfg)
    if cfg.kl_ref.coef == 0:
        report.add(
            topic,
            "off: nothing constrains pi to ref; a trust region sets the speed, not where it ends",
        )
        return
    if kl_in_reward(cfg):
        place = "reward, before baseline and normalisation"
    else:
        place = "loss, beside the policy loss"
    estimator = escape_braces(cfg.kl_ref.estimator)
    report.add(
        topic,
        "between   pi, the policy in training, and ref, the frozen first policy; samples come from "
        "pi_old",
    )
    report.add(
        topic,
        f"place     in the {place}; estimator {estimator}; coefficient {{beta}}",
        beta=cfg.kl_ref.coef,
    )
    report.add(topic, f"gradient  on-policy, that of {GRADIENT_OF[measured.kl]}")
    if kl_in_reward(cfg) and updates > 1:
        report.add(
            topic,
            "it is frozen over the {updates} updates of a rollout: here the trust region is needed "
            "for stability, and not only for speed",
            updates=updates,
        )
    if cfg.kl_ref.target is not None:
        report.add(
            topic,
            "adaptive  after each step coef · (1 + clip(KL / {kl_target} - 1, ±0.2) · {rows} / "
            "{horizon}), KL in nats per response",
            kl_target=cfg.kl_ref.target,
            rows=cfg.sampling.rows,
            horizon=cfg.kl_ref.horizon,
        )


def trust_region(report: Explanation, cfg: Config, algorithm: Algorithm) -> None:
    """What the loss does to a token that has moved, and what kl_old does."""
    topic = "trust region"
    updates = updates_per_rollout(cfg)
    report.add(
        topic,
        "between   pi and pi_old, the policy that sampled this rollout; it changes the path, not "
        "where it ends",
    )
    if algorithm.selector is None:
        gradient_weights(report, algorithm, "", "", selected=True)
    else:
        gradient_weights(report, algorithm, "selected tokens: ", "_selected", selected=True)
        gradient_weights(report, algorithm, "other tokens: ", "_others", selected=False)
    if updates == 1:
        report.add(
            topic,
            "{updates} update per rollout: pi is pi_old when the gradient is taken, so no clip can "
            "ever act",
            updates=1,
        )
    else:
        report.add(
            topic,
            "{updates} updates per rollout: the clip can act from the second on",
            updates=updates,
        )
    if cfg.kl_old.coef > 0:
        report.add(
            topic,
            "penalty   {kl_old_coef} · KL(pi_old || pi) in the loss",
            kl_old_coef=cfg.kl_old.coef,
        )
    if cfg.kl_old.target is not None:
        report.add(
            topic,
            "adaptive  coef halves below {kl_old_low} nats per token and doubles above "
            "{kl_old_high}",
            kl_old_low=cfg.kl_old.target / 1.5,
            kl_old_high=cfg.kl_old.target * 1.5,
        )
    if cfg.kl_old.stop is not None:
        report.add(
            topic,
            "stop      the remaining updates of a rollout are skipped once KL(pi_old || pi) is "
            "above {kl_old_stop} nats per token",
            kl_old_stop=cfg.kl_old.stop,
        )


def gradient_weights(
    report: Explanation, algorithm: Algorithm, tokens: str, suffix: str, selected: bool
) -> None:
    """One line: the gradient of a token that has moved to half and to twice pi_old."""
    numbers = {}
    for sign_name, sign in (("up", 1.0), ("down", -1.0)):
        for ratio_name, ratio in (("half", 0.5), ("twice", 2.0)):
            name = f"weight_{sign_name}_{ratio_name}{suffix}"
            numbers[name] = gradient_weight(algorithm.policy_loss, ratio, sign, selected)
    up_half, up_twice, down_half, down_twice = (f"{{{name}}}" for name in numbers)
    report.add(
        "trust region",
        f"{tokens}gradient of a token (1 = REINFORCE, 0 = clipped) where pi is half and twice "
        f"pi_old: A > 0: {up_half} and {up_twice}, A < 0: {down_half} and {down_twice}",
        **numbers,
    )


# ------------------------------------------------------------------ optimum


def optimum(report: Explanation, measured: MeasuredAlgorithm) -> None:
    """The optimum of a tabular policy, which can represent any distribution."""
    unknown = "no closed form is known, as {why}; --verify measures where it leads"
    factor = measured.factor
    if factor is None:
        report.add(OPTIMUM, unknown.replace("{why}", "at ratio 1 the loss is not REINFORCE"))
    elif measured.kl == OTHER:
        report.add(OPTIMUM, unknown.replace("{why}", "the KL is none that is known"))
    elif measured.entropy:
        with_entropy(report, measured)
    elif measured.constrained and kl_in_reward(measured.cfg):
        report.add(
            OPTIMUM,
            f"pi* ∝ ref · exp(score / {{beta}}){limits(measured)}",
            beta=measured.cfg.kl_ref.coef,
        )
    elif measured.constrained:
        with_kl_in_loss(report, measured, factor)
    elif measured.credit.rises:
        report.add(
            OPTIMUM, "all mass on the best-scored responses, in the proportions that ref gives them"
        )
    else:
        why = "the highest-scoring response does not have the highest advantage"
        report.add(OPTIMUM, unknown.replace("{why}", why))


def limits(measured: MeasuredAlgorithm) -> str:
    """The end of a line whose closed form holds for responses of one token only, else nothing."""
    games = games_for(measured.cfg, measured.algorithm)
    if all(predict(measured, game, probabilities(game, game.table)) for game in games):
        return ""
    return "; this holds for responses of one token, for longer ones no closed form is known"


def with_entropy(report: Explanation, measured: MeasuredAlgorithm) -> None:
    beta, entropy = measured.effective_beta, measured.effective_entropy
    if beta is None or entropy is None or measured.kl == FORWARD:
        report.add(
            OPTIMUM,
            "with the entropy bonus no closed form in the scores is known; --verify measures where "
            "it leads",
        )
    elif measured.constrained:
        report.add(
            OPTIMUM,
            "pi ∝ (ref^b · exp(score))^(1/(b + c)) for responses of one token, with b = {beta_eff} "
            "and c = {entropy_eff}",
            beta_eff=beta,
            entropy_eff=entropy,
        )
    else:
        report.add(
            OPTIMUM,
            f"pi ∝ exp(score / {{entropy_eff}}){EACH_TOKEN}{limits(measured)}",
            entropy_eff=entropy,
        )


def with_kl_in_loss(report: Explanation, measured: MeasuredAlgorithm, factor: float) -> None:
    """A form in the scores, in their std, or in the mean advantage, by what the advantage is."""
    if measured.kl == FORWARD:
        form = "pi = b · ref / (λ - score)"
    else:
        form = "pi* ∝ ref · exp(score / b)"
    tokens = "" if measured.kl == SEQUENCE else EACH_TOKEN
    beta = measured.effective_beta
    if beta is not None:
        report.add(
            OPTIMUM, f"{form}{tokens}, with b = {{beta_eff}}{limits(measured)}", beta_eff=beta
        )
        effective_beta_reason(report, measured)
    elif measured.credit.standardised and not compares_groups(measured.algorithm, measured.cfg):
        report.add(
            OPTIMUM,
            f"{form}{tokens}, with b = beta · std(score) under pi itself, in large groups",
        )
        binary_scores(report, measured, measured.cfg.kl_ref.coef / factor)
    else:
        report.add(
            OPTIMUM,
            f"{form.replace('score', 'A(pi)')}{tokens}, with b = {{beta_eff}} and A(pi) the mean "
            f"advantage under pi itself{limits(measured)}",
            beta_eff=measured.cfg.kl_ref.coef / factor,
        )


def effective_beta_reason(report: Explanation, measured: MeasuredAlgorithm) -> None:
    """Why b is not beta, where it is not."""
    factor, strength = measured.factor, measured.strength
    if factor is None or strength is None:  # there is no b
        return
    group_size = measured.cfg.sampling.group_size
    unscaled_loss = abs(factor - 1) < 1e-9
    if unscaled_loss and abs(strength * group_size - (group_size - 1)) < 1e-9:
        report.add(
            OPTIMUM,
            "b = beta · G/(G-1) for G = {group}: a mean that contains the response itself shrinks "
            "its advantage, so the KL weighs more than its coefficient says",
            group=group_size,
        )
    elif abs(strength - 1) > 1e-9:
        report.add(
            OPTIMUM,
            "b = beta / {strength}, the strength of the policy gradient",
            strength=strength,
        )


def binary_scores(report: Explanation, measured: MeasuredAlgorithm, beta: float) -> None:
    """Scores of 0 and 1 over their std: where training ends, for three references."""
    for share in SHARES:
        key = f"{share:.1f}".replace("0.", "")
        start = f"scores of 0 and 1, {{share_{key}}} right under ref: "
        numbers = {f"share_{key}": share}
        if measured.kl == FORWARD:
            numbers[f"right_{key}"] = binary_forward(share, beta)
            report.add(OPTIMUM, f"{start}{{right_{key}}} right in the end", **numbers)
            continue
        threshold = binary_threshold(share)
        numbers[f"threshold_{key}"] = threshold
        end = "collapses to 1"
        if beta >= threshold:
            numbers[f"right_{key}"] = binary_reverse(share, beta)
            end = f"ends at {{right_{key}}}"
        report.add(
            OPTIMUM,
            f"{start}beta_c = {{threshold_{key}}}, below which the KL cannot constrain the policy; "
            f"the share of right responses {end}",
            **numbers,
        )


# ------------------------------------------------------------------ normalisation


def normalisation(report: Explanation, cfg: Config) -> None:
    """What changes the weight of a token, a score or a prompt."""
    topic, mismatch = "normalisation", cfg.mismatch
    report.add(topic, f"weights   {cfg.optim.weights}: {WEIGHTS[cfg.optim.weights]}")
    if cfg.overlong.buffer:
        report.add(
            topic,
            "score     falls by up to {overlong} over the last {buffer} tokens before the limit",
            overlong=cfg.overlong.coef,
            buffer=cfg.overlong.buffer,
        )
    if cfg.sampling.zero_variance != "keep":
        report.add(
            topic,
            "prompts   whose responses all score the same are dropped, from the denominators too",
        )
    if cfg.sampling.zero_variance == "resample":
        report.add(
            topic,
            "resample  other prompts are sampled in their place, in at most {resample_rounds} "
            "rounds",
            resample_rounds=cfg.sampling.resample_rounds,
        )
    if mismatch.truncate != "none":
        report.add(
            topic,
            f"mismatch  advantages times min(pi_old / sampler, {{cap}}), by {mismatch.truncate}",
            cap=mismatch.cap,
        )
    if mismatch.reject != "none":
        report.add(
            topic,
            f"mismatch  weight 0 where pi_old / sampler, by {mismatch.reject}, is outside "
            "[{low}, {high}]",
            low=mismatch.low,
            high=mismatch.high,
        )


# ------------------------------------------------------------------ traps


def traps(
    cfg: Config, algorithm: Algorithm, measured: MeasuredAlgorithm | None = None
) -> list[str]:
    """What a configuration does that its author may not expect, one line each.

    measured: of the same configuration, to save time.
    """
    if cfg.kl_ref.coef == 0:
        return []
    placement = cfg.kl_ref.place, cfg.kl_ref.estimator
    lines = [TRAPS[placement]] if placement in TRAPS else []
    try:
        measured = measured or measure_algorithm(cfg, algorithm)
    except UserError:  # what cannot be measured must not stop a run
        return lines
    if measured.credit.standardised and not compares_groups(algorithm, cfg):
        lines.append(std_trap(measured))
    return lines


def std_trap(measured: MeasuredAlgorithm) -> str:
    """What dividing the scores of a prompt by their std does to a KL."""
    if kl_in_reward(measured.cfg):
        return (
            "advantages are divided by their std, and the KL is in the reward: where all responses "
            "of a prompt score the same, the KL alone is scaled up to unit strength, whatever beta"
        )
    threshold = ""
    if measured.kl in (SEQUENCE, TOKEN):
        threshold = ", and below a threshold it cannot constrain the policy at all"
    return (
        "advantages are divided by their std, and the KL is in the loss: it is as strong as "
        f"beta · std(score), which falls to 0 as responses agree{threshold}; kl_ref.place=reward "
        "has no such coupling"
    )


# ------------------------------------------------------------------ size


def size_of_step(report: Explanation, cfg: Config, exact: bool, cuda: bool) -> None:
    """Tokens and memory, if the model's config and the task can be read."""
    topic = "size of a step"
    try:
        config, tokenizer = architecture(cfg)
        count = tokens(cfg, config, tokenizer)
    except UserError as error:
        report.add(topic, escape_braces(f"not estimated: {error}"))
        return
    report.add(
        topic,
        "tokens    at most {sampled_tokens} sampled, {scored_tokens} scored, {learned_tokens} "
        "learned from; prompts of up to {prompt_tokens}",
        sampled_tokens=count.sampled,
        scored_tokens=count.scored,
        learned_tokens=count.learned,
        prompt_tokens=count.prompt,
    )
    plan = memory(cfg, config, count.prompt, width_of(cfg, cuda), exact, cuda)
    for line, numbers in memory_lines(plan):
        report.add(topic, line, **numbers)


def on_cuda(cfg: Config) -> bool:
    """Will a run of this configuration use CUDA on this machine?"""
    return cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
