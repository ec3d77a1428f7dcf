"""The mutants: where each lies, what it makes of the code, which tests notice, and who had the bug.

A mutant names a function and rewrites one expression or statement of it. Pattern and replacement
are Python:

* A capital letter, or one with a digit, stands for any expression: `A - B`. Where it stands twice,
  both are the same. Write one for every local name, so that renaming it breaks nothing. Attributes,
  called functions, keywords and constants stand for themselves.
* P1, P2, ... stand for the parameters of the function in their order, without self.
* `*A` and `**A`, at the end, stand for the rest of the arguments.
* A letter that stands alone as a statement stands for the rest of a suite: `for A in B: C`.
* The pattern `option cap` is the default of the option `cap`; the replacement is another default.

A pattern matches one place of its function; if there are several, `nth` says which, counted from 1
as they are read. test_mutants.py checks it, and says how to mend a mutant whose function changed.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A one-line bug."""

    module: (
        str  # "kl" is rlkl/kl.py, "rollout.engine" is rlkl/rollout/engine.py, "train" is train.py
    )
    function: str | None  # a method is Class.method; None: outside of all functions
    pattern: str
    replacement: str
    tests: (
        str  # of the test files, the fewest that notice: "kl step" is test_kl.py and test_step.py
    )
    whose: str = ""  # the codebase that had this bug, and what it did
    nth: int = 0


MUTANTS = [
    # kl
    Mutant("kl", "k1", "A - B", "B - A", "kl", whose="rlhf-book, PaLM-rlhf: the sign of k1"),
    Mutant("kl", "k2", "A / 2", "A", "kl"),
    Mutant(
        "kl",
        "k3",
        "(A - B).clamp(max=20)",
        "(B - A).clamp(max=20)",
        "kl",
        whose="rlhf-book: the ratio of k3 upside down",
    ),
    Mutant("kl", "k3", "A.expm1() - B", "A.expm1() - (P2 - P1)", "kl"),
    Mutant("kl", "ref_k2", "k2(A, B)", "k3(A, B)", "kl", whose="TRL: the gradient of the other KL"),
    Mutant("kl", "ref_k3", "k3(A, B)", "k3(B, A)", "kl", whose="ToolRL: the direction"),
    Mutant(
        "kl",
        "ref_k3_straight_through",
        "A - A.detach() + B.detach()",
        "B - B.detach() + A.detach()",
        "kl",
    ),
    Mutant(
        "kl",
        "wk3_token",
        "importance_ratio(A, B)",
        "importance_ratio(A, B).detach()",
        "kl",
        whose="TRL: a bias correction without its gradient",
    ),
    Mutant("kl", "wk2_token", "importance_ratio(A, B)", "importance_ratio(A, B).detach()", "kl"),
    Mutant("kl", "wk3_prefix", "A.cumsum(1)", "A", "kl"),
    Mutant("kl", "k2_sequence", "A.detach().sum(1, keepdim=True) * A", "A.square() / 2", "kl"),
    Mutant("kl", "exact_pi_ref", "return A.kl_pi_ref", "return A.kl_ref_pi", "kl"),
    Mutant("kl", "exact_ref_pi", "return A.kl_ref_pi", "return A.kl_pi_ref", "kl"),
    Mutant("kl", "rao_blackwell", "A.cumsum(1) - A", "A.cumsum(1)", "kl"),
    Mutant("kl", "old_k2", "k2(A, B)", "k1(A, B)", "kl"),
    Mutant("kl", "old_k3", "k3(A, B)", "k3(B, A)", "kl", whose="OpenRLHF: the direction"),
    Mutant("kl", "proportional", "min(A, 0.2)", "min(A, 2)", "kl"),
    Mutant("kl", "proportional", "A * B / C", "A / C", "kl"),
    Mutant("kl", "doubling", "A < B", "A > B", "kl"),
    Mutant("kl", None, "KL_LOSSES = A", "KL_LOSSES = A | {'k2': ref_k3, 'k3': ref_k2}", "kl"),
    Mutant(
        "kl",
        "policy_divergences",
        "k3(A, B)",
        "k1(B, A)",
        "step",
        whose="minRLHF: an early stop that never comes",
        nth=1,
    ),
    # advantages
    Mutant("advantages", "gae", "A if B is None else C", "A if not B else C", "advantages"),
    Mutant("advantages", "gae", "A + P2", "whitened(A, P3) + P2", "advantages"),
    Mutant(
        "advantages",
        "_gae",
        "A = torch.where(B, C, A)",
        "A = C",
        "advantages",
        whose="the sketch's: reads values of the padding",
        nth=2,
    ),
    Mutant(
        "advantages",
        "_gae",
        "torch.zeros_like(A[:, 0])",
        "A[:, -1]",
        "advantages",
        whose="TRL PPO: a value after the EOS",
        nth=1,
    ),
    Mutant(
        "advantages",
        "whitened",
        "A[B]",
        "A.flatten()",
        "advantages",
        whose="TRL PPO: padding in the statistics",
    ),
    Mutant("advantages", "whitened", "A.var()", "A.var(unbiased=False)", "advantages"),
    Mutant("advantages", "grpo", "A == 'group'", "A != 'group'", "advantages"),
    Mutant("advantages", "grpo", "A + 1e-6", "A + 1e-4", "advantages"),
    Mutant(
        "advantages", "dr_grpo", "_, A, _ = _centred(*B)", "A, _, _ = _centred(*B)", "advantages"
    ),
    Mutant("advantages", "rloo", "A * (B / (B - 1).clamp_min(1))", "A", "advantages"),
    Mutant("advantages", "opo", "A * B", "B", "advantages"),
    Mutant("advantages", "opo", "A - B", "A + B", "advantages"),
    Mutant(
        "advantages", "maxrl", "torch.where(A, B / C, 0.0)", "torch.where(A, B, 0.0)", "advantages"
    ),
    Mutant("advantages", "maxrl", "A > 0", "A >= 0", "advantages"),
    Mutant(
        "advantages", "pass_at_k", "_all_wrong(A - 1, B, C)", "_all_wrong(A, B, C)", "advantages"
    ),
    Mutant("advantages", "pass_at_k", "A.masked_fill(B == 0, 0.0)", "A", "advantages"),
    Mutant("advantages", "best_only", "A - B[:, 1:]", "A", "advantages"),
    Mutant(
        "advantages",
        "reinforce_pp",
        "_gae(A, B, C, D, 1.0)",
        "_gae(A, B, C, 1.0, 1.0)",
        "advantages",
    ),
    Mutant("advantages", "reinforce_pp_baseline", "A.masked_fill(~B, 0.0)", "A", "advantages"),
    Mutant("advantages", "remax", "A - B", "A", "advantages"),
    Mutant(
        "advantages",
        "_centred",
        "rearrange(A, '(n g) -> n g', **B)",
        "rearrange(A, '(g n) -> n g', **B)",
        "advantages",
        nth=1,
    ),
    Mutant("advantages", "_centred", "A | B", "B", "advantages"),
    Mutant("advantages", "_all_wrong", "(A - B).clamp_min(1)", "A.clamp_min(1)", "advantages"),
    Mutant("advantages", "_refuse_token_rewards", "A > 1", "A > 2", "advantages"),
    Mutant("advantages", "_per_token", "A.masked_fill(~B, 0.0)", "A", "advantages"),
    Mutant("advantages", None, "rloo", "dr_grpo", "advantages"),
    Mutant(
        "advantages",
        "token_rewards",
        "A.long().cumsum(1).argmax(1, keepdim=True)",
        "A.long().cumsum(1).argmax(1, keepdim=True).add(1).clamp(max=A.shape[1] - 1)",
        "rewards",
        whose="TRL PPO: the score on the slot after the EOS",
    ),
    Mutant(
        "advantages",
        "token_rewards",
        "A.long().cumsum(1).argmax(1, keepdim=True)",
        "A.sum(1, keepdim=True) - 1",
        "rewards",
    ),
    # losses.clip
    Mutant(
        "losses.clip",
        "importance_ratio",
        "A - B",
        "(A - B).sum(1, True)",
        "losses",
        whose="hands-on-modern-rl: a ratio of the sequence for each token",
    ),
    Mutant(
        "losses.clip",
        "clamped_exp",
        "A.clamp(*B)",
        "A",
        "losses",
        whose="TRL: ratios that explode",
    ),
    Mutant("losses.clip", "clip", "A < 0", "A > 0", "losses"),
    Mutant(
        "losses.clip",
        "clip",
        "clipped_surrogate(A, B, C, D)",
        "clipped_surrogate(A, B, D, C)",
        "losses",
    ),
    Mutant("losses.clip", "clip", "A.clamp(max=B)", "A", "losses"),
    Mutant(
        "losses.clip",
        "clipped_surrogate",
        "torch.minimum(A, B)",
        "torch.maximum(A, B)",
        "losses",
        whose="the sketch's: max for min",
    ),
    Mutant(
        "losses.clip",
        "clipped_surrogate",
        "A.clamp(1 - B, 1 + C)",
        "A.clamp(1 - C, 1 + B)",
        "losses",
    ),
    Mutant("losses.clip", "clipped_tokens", "A & (B > 0)", "A", "losses"),
    Mutant("losses.clip", "clipped_tokens", "A | B | C", "A | B", "losses"),
    # losses.value
    Mutant("losses.value", "value_loss", "torch.maximum(A, B)", "torch.minimum(A, B)", "losses"),
    Mutant(
        "losses.value",
        "value_loss",
        "torch.maximum(A, B) / 2",
        "torch.maximum(A, B)",
        "losses",
        whose="torchtune's tests, rtol=1e6: any value passes",
    ),
    # losses.policy_gradient
    Mutant(
        "losses.policy_gradient",
        "surrogate",
        "-A * B.advantages",
        "-A.clamp(0.8, 1.2) * B.advantages",
        "losses",
    ),
    Mutant(
        "losses.policy_gradient",
        "reinforce",
        "A * B.logprobs",
        "A * B.logprobs.exp()",
        "losses",
        whose="PaLM-rlhf: probabilities for log-probabilities",
    ),
    Mutant(
        "losses.policy_gradient",
        "cispo",
        "option cap",
        "0.2",
        "losses",
        whose="TRL: cispo's cap is another loss's clip",
    ),
    Mutant("losses.policy_gradient", "cispo", "A.detach()", "A", "losses"),
    # losses.sequence
    Mutant(
        "losses.sequence",
        "gspo",
        "_row_mean(A, B)",
        "_row_sum(A, B)",
        "losses",
        whose="TRL: the sum of a sequence where its mean is meant",
    ),
    Mutant(
        "losses.sequence",
        "gspo",
        "A * (B - B.detach()).exp()",
        "A.expand_as(B)",
        "losses",
        whose="prime-rl's tests, of the shape alone: no gradient",
    ),
    Mutant("losses.sequence", "gmpo", "A > 0", "A < 0", "losses"),
    Mutant("losses.sequence", "gmpo", "_row_mean(A, B)", "_row_sum(A, B)", "losses"),
    Mutant(
        "losses.sequence",
        "topr",
        "A.clamp(-LOG_RATIO_LIMIT, 0)",
        "A.clamp(-LOG_RATIO_LIMIT, 20)",
        "losses",
    ),
    Mutant("losses.sequence", "topr", "_row_sum(A, B)", "_row_mean(A, B)", "losses"),
    Mutant("losses.sequence", "vespo", "A.detach()", "A", "losses"),
    Mutant("losses.sequence", "vespo", "(A - B).exp()", "A - B", "losses"),
    Mutant(
        "losses.sequence",
        "_row_sum",
        "A.masked_fill(~B, 0.0)",
        "A",
        "losses",
        whose="TRL: padding in the sum of a sequence (luspo)",
    ),
    Mutant(
        "losses.sequence",
        "_row_mean",
        "A.sum(1, keepdim=True).clamp_min(1)",
        "A.shape[1]",
        "losses",
        whose="PaLM-rlhf: a mean over padding",
    ),
    # losses.gated
    Mutant("losses.gated", "sapo", "A > 0", "A < 0", "losses"),
    Mutant("losses.gated", "sapo", "A / B", "A", "losses"),
    Mutant("losses.gated", "spo", "2 * A", "A", "losses"),
    # losses.divergence
    Mutant(
        "losses.divergence", "dppo_tv", "A.sampler_logprobs.exp()", "A.old_logprobs.exp()", "losses"
    ),
    Mutant(
        "losses.divergence",
        "dppo_kl",
        "A.sampler_logprobs - B.logprobs",
        "B.logprobs - A.sampler_logprobs",
        "losses",
    ),
    Mutant("losses.divergence", "_masked", "A & (B > 0)", "A", "losses"),
    Mutant("losses.divergence", "_masked", "A.clamp(max=B)", "A", "losses"),
    # losses.selected
    Mutant("losses.selected", "top_entropy", "~A", "A", "losses"),
    Mutant(
        "losses.selected",
        "clip_cov",
        "_selected(A, 'clip_cov')",
        "~_selected(A, 'clip_cov')",
        "losses",
    ),
    Mutant("losses.selected", "kl_cov", "A + B", "A - B", "losses"),
    Mutant("losses.selected", "kl_cov", "A.abs()", "A", "losses"),
    Mutant("losses.selected", "_selected", "raise ValueError(A)", "return P1.mask", "losses"),
    # losses.weights
    Mutant(
        "losses.weights",
        "token_weights",
        "A or (B, C)",
        "(B, C)",
        "weights",
        whose="nanochat, TRL, rlhf-book: each pass has a denominator of its own",
    ),
    Mutant(
        "losses.weights",
        "token_weights",
        "max(A, 1)",
        "P1.numel()",
        "weights",
        whose="PaLM-rlhf, nano-aha-moment: divided by all positions",
        nth=1,
    ),
    Mutant("losses.weights", "truncated_importance_weights", "A.clamp(max=B)", "A", "weights"),
    Mutant("losses.weights", "accepted", "A >= B", "A > B", "weights"),
    Mutant("losses.weights", "_sampler_ratio", "A - B", "B - A", "weights"),
    Mutant(
        "losses.weights",
        "_sampler_ratio",
        "A == 'mean'",
        "False",
        "weights",
        whose="TRL: the sum of a sequence for its mean",
    ),
    # losses.selectors
    Mutant("losses.selectors", "top_entropy", "_highest(A, *B)", "_highest(-A, *B)", "selectors"),
    Mutant("losses.selectors", "kl_cov", "covariance(A)", "covariance(A).abs()", "selectors"),
    Mutant("losses.selectors", "clip_cov", "A & (B < C)", "A", "selectors"),
    Mutant(
        "losses.selectors",
        "clip_cov",
        "_highest(A, *B)",
        "_highest(covariance(P1), *B)",
        "selectors",
    ),
    Mutant("losses.selectors", "covariance", "A[B.mask]", "A", "selectors", nth=1),
    Mutant(
        "losses.selectors",
        "_highest",
        "torch.zeros_like(A, dtype=torch.bool)",
        "A >= A.sort(descending=True).values[: max(int(P3 + 1e-9), 1)].amin()"
        " if len(A) else A.bool()",
        "selectors",
        whose="TRL: a threshold, and all that tie with it",
    ),
    # logprobs.reference
    Mutant(
        "logprobs.reference",
        "logits",
        "A.to(B) @ C.to(B).T",
        "(A @ C.T).to(B)",
        "logprobs",
        whose="TRL, verl: logits rounded to bf16",
    ),
    Mutant("logprobs.reference", "logits_of_products", "A * B.scale", "A * 1.0", "logprobs"),
    Mutant(
        "logprobs.reference",
        "reference_logprobs",
        "A.gather(-1, B)",
        "A.exp().gather(-1, B)",
        "logprobs",
        whose="PaLM-rlhf: probabilities for log-probabilities",
    ),
    Mutant(
        "logprobs.reference",
        "reference_logprobs",
        "A._replace(kl_pi_ref=B, kl_ref_pi=C)",
        "A._replace(kl_pi_ref=C, kl_ref_pi=B)",
        "logprobs",
        whose="ToolRL, OpenRLHF: the direction",
    ),
    Mutant(
        "logprobs.reference",
        "_expectation",
        "A.sum(-1)",
        "A.sum(-1).detach()",
        "logprobs",
        whose="TRL: entropies under no_grad",
    ),
    Mutant(
        "logprobs.reference", "_expectation", "A.masked_fill(B == -torch.inf, 0.0)", "A", "logprobs"
    ),
    Mutant("logprobs.reference", "vocabulary", "A.vocab_size or B", "B", "logprobs"),
    # logprobs
    Mutant(
        "logprobs",
        "token_logprobs",
        "A(B, C, D, P4, *E)",
        "A(B, C, D, 1.0, *E)",
        "logprobs",
        whose="rlhf-book, simple_GRPO, TRL: scored at temperature 1",
    ),
    Mutant("logprobs", "check_reference", "raise ValueError(A)", "pass", "logprobs", nth=1),
    Mutant("logprobs", "check_reference", "vocabulary(A) != vocabulary(B)", "False", "logprobs"),
    Mutant("logprobs", "in_tiles", "A if B else A._replace(entropy=None)", "A", "logprobs"),
    Mutant("logprobs", "choose_backend", "A * 4", "A", "logprobs"),
    Mutant(
        "logprobs",
        "fused",
        "in_tiles(*A, functions=TRITON)",
        "in_tiles(*A, functions=TORCH)",
        "logprobs",
    ),
    Mutant(
        "logprobs.reference",
        "head_logits",
        "product(A, B)",
        "A @ B.T",
        "logprobs",
        whose="TRL, verl: logits rounded to bf16",
    ),
    # logprobs.tiled
    Mutant(
        "logprobs.tiled",
        "tile_products",
        "(A.clone(), _copy(B) if C else None)",
        "(A, B if C else None)",
        "logprobs",
        whose="simple_GRPO: the backward pass overwrites saved logits",
    ),
    Mutant("logprobs.reference", "product", "A.to(B) @ C.to(B).T", "(A @ C.T).to(B)", "tiles"),
    Mutant("logprobs.tiled", "add_product", "A.addmm_(B, C)", "A.copy_(B @ C)", "tiles"),
    Mutant("logprobs.tiled", "spans", "range(0, A, B)", "range(0, A - B + 1, B)", "tiles"),
    Mutant("logprobs.tiled", "Tiled.forward", "(_copy(A), _copy(B))", "(A, B)", "tiles"),
    Mutant(
        "logprobs.tiled",
        "Tiled.backward",
        "A[B] += C.sum(0, dtype=D)",
        "A[B] = C.sum(0, dtype=D)",
        "tiles",
    ),
    Mutant("logprobs.tiled", "tile_inputs", "A - B.start", "A", "tiles"),
    Mutant("logprobs.tiled", "tile_for", "B * max(A, 1)", "max(A, 1)", "tiles"),
    Mutant("logprobs.tiled", "tiled_logprobs", "1 / A", "A", "tiles"),
    # logprobs.tile_torch
    Mutant(
        "logprobs.tile_torch",
        "Sums.start",
        "torch.promote_types(A.dtype, torch.float32)",
        "A.dtype",
        "tiles",
    ),
    Mutant("logprobs.tile_torch", "finish", "A / B - C", "A / B + C", "tiles"),
    Mutant("logprobs.tile_torch", "Totals.of", "A[P1]", "A", "tiles"),
    Mutant("logprobs.tile_torch", "Upstream.of", "A[P1]", "A", "tiles"),
    Mutant("logprobs.tile_torch", "Upstream.of_kl", "A or B", "A", "tiles"),
    Mutant("logprobs.tile_torch", "_to_logits", "A.scale / A.softcap", "1 / A.softcap", "tiles"),
    Mutant(
        "logprobs.tile_torch", "accumulate", "(A - B).exp()", "torch.ones_like(A)", "tiles", nth=1
    ),
    Mutant("logprobs.tile_torch", "dlogits", "-A.entropy", "A.entropy", "tiles"),
    # types
    Mutant(
        "types",
        "Batch._masked",
        "A.masked_fill(B, 0.0)",
        "A.masked_fill_(B, 0.0)",
        "types",
        whose="nano-aha-moment: zeros written into the caller's tensor",
    ),
    Mutant(
        "types", "Batch._masked", "A.masked_fill(B, 0.0)", "A + 0 * A.masked_fill(B, 0.0)", "types"
    ),
    Mutant(
        "types",
        "Batch.attended",
        "self.mask.flip(1).cummax(1).values.flip(1)",
        "self.mask",
        "types",
    ),
    Mutant("types", "Batch.cat", "A = (B - C, 0)", "A = (0, B - C)", "types"),
    Mutant(
        "types",
        "Batch.trim",
        "max(int(self.attended.sum(1).max()), 1)",
        "self.mask.shape[1]",
        "types",
        whose="TRL: padded to the longest of the whole rollout",
    ),
    Mutant(
        "types",
        "nonzero_variance",
        "A > B",
        "A <= B",
        "step",
        whose="TRL: groups that teach nothing are kept",
    ),
    Mutant(
        "types",
        "Batch.drop_zero_variance",
        "A if A.any() else torch.ones_like(A)",
        "A",
        "step",
        whose="GRPO-Zero: a batch that is left empty",
    ),
    # rewards
    Mutant(
        "rewards",
        "compute_scores",
        "raise A from B",
        "return torch.zeros(len(P3)), {}",
        "rewards",
        whose="simple_GRPO: any error is swallowed",
    ),
    # rewards.penalties
    Mutant(
        "rewards.penalties", "overlong", "A - B.sum(1)", "A - B.shape[1] + 0 * B.sum(1)", "rewards"
    ),
    # tasks.addition
    Mutant(
        "tasks.addition",
        "Addition.score",
        "A == B",
        "B in A",
        "tasks",
        whose="tiny-grpo: paid for an answer among others",
    ),
    # tasks.gsm8k
    Mutant(
        "tasks.gsm8k",
        "strict",
        "A.rpartition('####')",
        "A.partition('####')",
        "tasks_judges",
        whose="verl, once: the first #### of a response",
    ),
    Mutant("tasks.gsm8k", "flexible", "A[-1]", "A[0]", "tasks_judges"),
    # tasks.extract
    Mutant("tasks.extract", "number", "A.replace(',', '')", "A", "tasks_judges"),
    # tasks.countdown
    Mutant(
        "tasks.countdown",
        "Countdown.score",
        "float(sorted(A[1]) == sorted(B.info['numbers']))",
        "1.0",
        "tasks_judges",
        whose="a target written down is a target reached",
    ),
    # tasks.arithmetic
    Mutant(
        "tasks.arithmetic",
        "evaluate",
        "re.fullmatch(A, B)",
        "re.fullmatch('.+', B)",
        "tasks_judges",
    ),
    # tasks.gym
    Mutant(
        "tasks.gym",
        "ReasoningGym.score",
        "self.evaluates and not harmless(A)",
        "False",
        "tasks_judges",
        whose="reasoning-gym: eval of a response",
    ),
    # tasks.bounded
    Mutant("tasks.bounded", "bounded", "raise A", "raise TimeoutError", "tasks_judges"),
    # policy.policy
    Mutant("policy.policy", "pack_by_tokens", "A + 1", "A", "types"),
    Mutant("policy.policy", "pack_by_tokens", "-sum(A[B])", "B", "engine"),
    Mutant(
        "policy.policy",
        "Policy.read_states",
        "A[:, :-1]",
        "A[:, 1:]",
        "model",
        whose="the sketch's: hidden state off by one",
    ),
    Mutant(
        "policy.policy",
        "Policy.read_states",
        "PolicyOutput(**A, **B)",
        "PolicyOutput(**(A | {'entropy': -A['logprobs']}), **B)",
        "model",
        whose="nano-aha-moment: entropy of the sampled token alone",
    ),
    Mutant("policy.policy", "reference_of", "copy.deepcopy(A)", "A", "model"),
    # policy.hidden_states
    Mutant(
        "policy.policy",
        "hidden_states",
        "[A, B.attended]",
        "[A & (B.prompt_ids != B.response_ids.gather(1, B.mask.sum(1, True).sub(1).clamp_min(0))),"
        " B.attended]",
        "rollout",
        whose="tiny-grpo: prompt tokens that equal the EOS are hidden",
    ),
    Mutant(
        "policy.policy",
        "hidden_states",
        "A(input_ids=B, attention_mask=C, position_ids=positions(C), **D)",
        "A(input_ids=B, attention_mask=C, **D)",
        "model",
        whose="TRL, lm-human-preference-details: no position_ids",
    ),
    Mutant("policy.policy", "positions", "A - 1", "A", "model"),
    # policy.critic
    Mutant(
        "policy.critic",
        "Critic.forward",
        "A.sum(1, keepdim=True)",
        "A.sum(1, keepdim=True).sub(1).clamp_min(0)",
        "model",
        whose="TRL PPO: the value off by one",
    ),
    Mutant("policy.critic", "Critic.forward", "A[:, :-1]", "A[:, 1:]", "model"),
    Mutant(
        "policy.critic",
        "Critic.__init__",
        "nn.init.zeros_(self.head.weight)",
        "nn.init.normal_(self.head.weight)",
        "model",
    ),
    # policy.model
    Mutant(
        "policy.model",
        "load",
        "(A.eval(), B)",
        "(A.train(), B)",
        "model",
        whose="TRL: dropout, so that the ratio is not 1 before any update",
    ),
    Mutant(
        "policy.model",
        "sampling_params",
        "{A, *B} - C",
        "{A, None} - C",
        "model",
        whose="TRL: one EOS of many ends a response",
    ),
    Mutant(
        "policy.model",
        "sampling_params",
        "A and B not in C",
        "A",
        "model",
        whose="tiny-grpo, simple_GRPO, torchrl: pad = eos",
    ),
    Mutant(
        "policy.model",
        "_checkpointed",
        "checkpoint(A, *B, **C)",
        "checkpoint(A, *(x.detach() for x in P2), **C)",
        "memory",
    ),
    # policy.tokens
    Mutant(
        "rollout.sampling",
        "left_pad",
        "(torch.tensor(A, **B), torch.tensor(C, **D))",
        "(torch.tensor(A, **B), torch.tensor(A, **B) != P2)",
        "model",
        whose="tiny-grpo: the mask read off the ids",
    ),
    Mutant(
        "rollout.sampling",
        "encode",
        "A(B).input_ids",
        "A(B).input_ids[:24]",
        "model",
        whose="lm-human-preference-details: prompts cut to another length",
    ),
    # policy.lora
    Mutant(
        "policy.lora", "switched_off", "A.enable_adapters(False)", "A.enable_adapters(True)", "lora"
    ),
    Mutant(
        "policy.lora",
        "switched_off",
        "for A in B: C",
        "for A in B[:1]: C",
        "lora",
        whose="transformers: layers trained beside an adapter are frozen once it was off",
        nth=2,
    ),
    Mutant("policy.lora", "merged", "A.requires_grad_(True)", "A", "lora"),
    Mutant("policy.lora", "adapt", "torch.manual_seed(A)", "torch.manual_seed(0)", "lora"),
    # policy.optimizer
    Mutant(
        "policy.optimizer",
        "master_of",
        "A == B.dtype and C",
        "C",
        "optim",
        whose="tiny-grpo, rlhf-book: Adam on bf16 weights",
    ),
    Mutant(
        "policy.optimizer",
        "Optimizer.step",
        "A.clip_grad_norm_(B, self.max_grad_norm)",
        "A.clip_grad_norm_(B, math.inf)",
        "optim",
        whose="nanochat, TRL PPO: no gradient clipping",
    ),
    Mutant("policy.optimizer", "Optimizer.step", "if A: B", "if True: B", "optim"),
    Mutant(
        "policy.optimizer",
        "Optimizer.load_state_dict",
        "for (A, B), C in D: B.copy_(C); E",
        "for (A, B), C in D: B.copy_(C.to(A.dtype)); E",
        "optim",
        whose="TRL: state that a resume loses",
    ),
    Mutant("policy.optimizer", "lr_scale", "(A + 1) / B", "A / B", "optim"),
    # rollout.naive
    Mutant(
        "rollout.sampling",
        "sample_responses",
        "Batch(prompt_ids=A, prompt_mask=B, response_ids=C, mask=D, **E)",
        "Batch(prompt_ids=A, prompt_mask=B, response_ids=C, mask=D & ~torch.isin(C,"
        " torch.tensor(P5.eos_ids, device=C.device, dtype=C.dtype)), **E)",
        "rollout",
        whose="nanochat, tiny-grpo, simple_GRPO: the EOS is not learned",
    ),
    Mutant(
        "rollout.sampling",
        "generate",
        "sampling_mode(A)",
        "__import__('contextlib').nullcontext()",
        "rollout",
        whose="TRL: dropout while sampling",
    ),
    Mutant("rollout.sampling", "decode", "A[B]", "A", "rollout", nth=2),
    Mutant(
        "rollout.sampling",
        "with_system",
        "[{'role': 'system', 'content': A}, *B]",
        "[*B, {'role': 'system', 'content': A}]",
        "chat",
    ),
    Mutant("rollout.sampling", "check_template_options", "A and not B", "A and B", "chat"),
    Mutant("rollout.sampling", "right_pad", "len(A)", "len(A) - 1", "supervised", nth=3),
    Mutant(
        "rollout.sampling",
        "sample_responses",
        "A or 1.0",
        "A",
        "rollout",
        whose="nano-vllm: no greedy",
    ),
    Mutant(
        "rollout.naive",
        "naive",
        "A(input_ids=B, attention_mask=C, position_ids=positions(C), **D)",
        "A(input_ids=B, attention_mask=C, **D)",
        "rollout",
        whose="TRL: no position_ids",
    ),
    Mutant(
        "rollout.naive",
        "naive",
        "repeat(A, 'n p -> (n g) p', **B)",
        "repeat(A, 'n p -> (g n) p', **B)",
        "rollout",
        nth=1,
    ),
    # rollout.cached
    Mutant(
        "rollout.cached",
        "cached",
        "repeat(A, 'n v -> (n g) v', **B)",
        "repeat(A, 'n v -> (g n) v', **B)",
        "rollout",
    ),
    Mutant(
        "rollout.cached", "cached", "positions(A)[:, -1:]", "positions(A)[:, -1:] + 1", "rollout"
    ),
    # rollout.sampling
    Mutant(
        "rollout.sampling",
        "draw_uniforms",
        "torch.rand(A, B, generator=C, **D)",
        "torch.rand(A, B, **D)",
        "rollout",
    ),
    Mutant(
        "rollout.sampling",
        "pick",
        "A.gather(-1, B)",
        "P1.log_softmax(-1).gather(-1, B)",
        "rollout",
        whose="open-instruct, simple_GRPO: log-probs without the temperature",
    ),
    Mutant(
        "rollout.sampling",
        "pick",
        "A.log_softmax(-1)",
        "A",
        "rollout",
        whose="nanochat, rlhf-book, prime-rl: top-k sampled, the full softmax reported",
        nth=2,
    ),
    Mutant("rollout.sampling", "allowed_ids", "A - B", "A", "rollout"),
    Mutant("rollout.sampling", "allowed_ids", "A[:, B:]", "A[:, B + 1:]", "rollout"),
    Mutant(
        "rollout.sampling",
        "sampling_mode",
        "A.eval()",
        "A.train()",
        "rollout",
        whose="TRL: dropout in the rollout",
    ),
    Mutant("rollout.sampling", "sampling_mode", "A.train(B)", "A.train(True)", "rollout"),
    Mutant("rollout.sampling", "cut_at_stop", "A[B] = False", "pass", "engine"),
    Mutant(
        "rollout.sampling",
        "first_above",
        "torch.searchsorted(A, B, right=True)",
        "torch.searchsorted(A, B, right=False)",
        "engine",
        whose="a uniform of 0 picks an id of probability 0",
    ),
    Mutant(
        "rollout.sampling", "first_above", "torch.nextafter(A, torch.zeros_like(A))", "A", "engine"
    ),
    Mutant("rollout.sampling", "widest_float", "A.type == 'mps'", "True", "rollout"),
    Mutant("rollout.sampling", "shortest_stop", "A[:B]", "A", "engine"),
    # rollout.slots
    Mutant(
        "rollout.slots",
        "SlotCache.mask",
        "A <= B",
        "A < B",
        "engine",
        whose="a token that does not see itself",
    ),
    Mutant(
        "rollout.slots",
        "SlotCache.mask",
        "A & (B > C - D)",
        "A",
        "engine",
        whose="the window of sliding layers ignored",
    ),
    Mutant(
        "rollout.slots",
        "SlotCache.copy_prompts",
        "A.keys[B] = C",
        "A.keys[B] = 0.0",
        "engine",
        whose="a resampled group without its prompt",
    ),
    Mutant(
        "rollout.slots",
        "SlotLayer.update",
        "self.keys[A, B]",
        "self.keys[A, B + 1]",
        "engine",
        whose="keys that lie one late",
    ),
    Mutant(
        "rollout.slots",
        "SlotCache.move",
        "self.positions[A] = self.positions[B]",
        "pass",
        "engine",
        whose="the position lost when gaps close",
    ),
    Mutant(
        "rollout.slots",
        "flash_attention",
        "A[:B] + 1",
        "A[:B]",
        "engine",
        whose="lengths that leave the newest key out",
    ),
    Mutant(
        "rollout.slots",
        "flash_attention",
        "(A - 1, 0)",
        "(A, 0)",
        "engine",
        whose="a window of one too many",
    ),
    Mutant(
        "rollout.slots",
        "attention_over_slots",
        "A.set_attn_implementation(B)",
        "A.set_attn_implementation(ATTENTION)",
        "engine",
        whose="transformers: the attention of generate_batch stays",
        nth=2,
    ),
    Mutant(
        "rollout.slots",
        "slot_attention",
        "rearrange(A, 'b (kv g) 1 d -> b kv g d', **B)",
        "rearrange(A, 'b (g kv) 1 d -> b kv g d', **B)",
        "engine",
    ),
    Mutant(
        "rollout.slots",
        "prefill",
        "A[:-1] + [0] * B",
        "[0] * (B - len(A) + 1) + A[:-1]",
        "engine",
        whose="a prefill padded on the left",
    ),
    Mutant("rollout.slots", "prefill", "A - 1", "A", "engine"),
    Mutant(
        "rollout.slots", "batch_dependent_rope", "('dynamic', 'longrope')", "('dynamic',)", "engine"
    ),
    Mutant(
        "rollout.slots",
        "unsupported",
        "A - SUPPORTED_LAYERS",
        "A - SUPPORTED_LAYERS - {'linear_attention'}",
        "engine",
    ),
    Mutant(
        "rollout.slots",
        "flash_serves",
        "FLASH_READS_LENGTHS and A.is_cuda and B and C",
        "FLASH_READS_LENGTHS and B and C",
        "engine",
    ),
    Mutant(
        "rollout.slots",
        "SlotLayer.lazy_initialization",
        "(A.slots, A.capacity, B)",
        "(A.slots, A.capacity - 1, B)",
        "engine",
    ),
    Mutant(
        "rollout.slots",
        "SlotCache.begin_step",
        "math.ceil(A)",
        "math.floor(A)",
        "engine",
        whose="the newest keys not read",
    ),
    # rollout.one_pass
    Mutant(
        "rollout.one_pass",
        "one_pass",
        "A / B.temperature",
        "A",
        "engine",
        whose="open-instruct, simple_GRPO: log-probs without the temperature",
    ),
    Mutant("rollout.one_pass", "one_pass", "A or B.top_k or C or D", "A or C or D", "engine"),
    Mutant("rollout.one_pass", "inverse_cdf", "A.clamp_max(B.shape[1] - 1)", "A", "engine"),
    # rollout.engine
    Mutant(
        "rollout.engine",
        "ContinuousBatch.decode_step",
        "self.uniforms[A, B]",
        "self.uniforms[A, B * 0]",
        "engine",
    ),
    Mutant("rollout.engine", "ContinuousBatch.decode_step", "A != self.idle_row", "True", "engine"),
    Mutant(
        "rollout.engine", "engine", "decode_in_slots(slot_divisor=2)", "decode_in_slots()", "engine"
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.batch",
        "A.gather(1, B[:, None] - 1)",
        "A[:, -1:]",
        "engine",
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.sync",
        "A is not None and B(self.response(A))",
        "False",
        "engine",
        whose="a response with a stop string goes on",
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.response",
        "self.tokens[A, :self.lengths[A]]",
        "self.tokens[A]",
        "engine",
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.fill_slots",
        "A = A[B:]",
        "A = []",
        "engine",
        whose="slots that wait for the next look",
        nth=1,
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.prefill_next_chunk",
        "[A for B in C for D in E]",
        "[A for D in E for B in C][::2]",
        "engine",
        whose="rows that are never started",
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.longest_sequence",
        "A + B",
        "A",
        "engine",
        whose="keys beyond the first look are not read",
    ),
    Mutant("rollout.engine", "warn_once", "logging.getLogger('rlkl').warning(A)", "pass", "engine"),
    Mutant("rollout.engine", "default_slots", "SLOTS.get(A, 128)", "SLOTS.get(A, 127)", "memory"),
    Mutant("rollout.engine", "ContinuousBatch.slots_that_fit", "A * 1e9", "A * 2**40", "engine"),
    Mutant("rollout.engine", "ContinuousBatch.compact", "A if B else C", "A", "engine"),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.start",
        "A - 1",
        "A",
        "engine",
        whose="every position off by one",
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.__init__",
        "min(A, B, self.slots_that_fit(C, D))",
        "min(A, B)",
        "engine",
    ),
    Mutant(
        "rollout.engine", "ContinuousBatch.decode", "self.steps += A", "self.steps = A", "engine"
    ),
    Mutant(
        "rollout.engine", "ContinuousBatch.longest_remaining", "A - min(B)", "A + min(B)", "engine"
    ),
    Mutant(
        "rollout.engine", "ContinuousBatch.decoded", "self.steps - self.started[A]", "0", "engine"
    ),
    Mutant(
        "rollout.engine",
        "ContinuousBatch.prompt_of",
        "P1 // self.group_size",
        "P1 % self.group_size",
        "engine",
    ),
    Mutant("rollout.engine", "ContinuousBatch.move", "A[B] = A[C]", "pass", "engine", nth=1),
    # run.seeds
    Mutant("run.seeds", "epoch_order", "max(A - B * C, 0)", "A % C", "optim"),
    # run.evaluate
    Mutant(
        "run.evaluate",
        "evaluate",
        "A[B] += C",
        "A[P3.examples.index(P3.examples[B])] += C",
        "evaluate",
        whose="GRPO-Zero: two copies of a prompt merge",
    ),
    Mutant(
        "run.evaluate",
        "pass_at_k",
        "math.comb(A - B, C) / math.comb(A, C)",
        "(1 - B / A) ** C",
        "evaluate",
    ),
    Mutant("run.evaluate", "graded_responses", "A >= 1", "A > 0", "evaluate"),
    Mutant("run.evaluate", "mean_grades", "sum(A[B] for A in C) / len(C)", "C[-1][B]", "tasks_run"),
    # run.learning_signal, and a step without one
    Mutant("run.learning_signal", "has_signal", "not A or bool(B)", "not A", "learning_signal"),
    Mutant("run.algorithm", "only_advantages", "A and B and not C", "A and B", "learning_signal"),
    # run.metrics
    Mutant(
        "run.metrics",
        "advantage_metrics",
        "A.advantages[A.mask]",
        "A.advantages.flatten()",
        "golden_verl",
        whose="TRL PPO, tiny-grpo: means over padding",
    ),
    Mutant(
        "run.metrics",
        "rollout_metrics",
        "A.sum(1)",
        "A.logical_not().sum(1)",
        "golden_verl",
        whose="TRL: completion lengths",
    ),
    Mutant("run.metrics", "distinct_2", "A & B[:, :-1]", "A", "reward_hacking"),
    Mutant("run.metrics", "distinct_2", "A.max() + 1", "A.max()", "reward_hacking"),
    # run.reward_hacking
    Mutant("run.reward_hacking", "suspicion", "not A.risen or B", "B", "reward_hacking"),
    Mutant(
        "run.reward_hacking", "MetricTrend.risen", "A and not self.fallen", "A", "reward_hacking"
    ),
    Mutant("run.reward_hacking", "is_news", "A[-1 - QUIET : -1]", "A[:-1]", "reward_hacking"),
    # train
    Mutant(
        "train",
        "objective",
        "A + B.critic.coef * C",
        "-A + B.critic.coef * C",
        "golden_steps",
        whose="torchtune's tests: 0.8 expected, -0.368 returned",
    ),
    Mutant(
        "train",
        "objective",
        "A - B * C",
        "A - B * C.detach()",
        "golden_steps",
        whose="TRL: an entropy bonus without a gradient",
    ),
    Mutant(
        "train",
        "accumulate_gradient",
        "A.sums[B] += C",
        "A.sums[B] = C",
        "step_options",
        whose="GRPO-Zero: the last micro-batch is reported",
    ),
    Mutant(
        "train",
        "accumulate_gradient",
        "A.tokens += B",
        "A.tokens += 1",
        "step_options",
        whose="TRL: means of unequal micro-batches averaged",
    ),
    Mutant(
        "train",
        "accumulate_gradient",
        "A.masked_fill(~B, -torch.inf)",
        "A",
        "step_options",
        whose="a peak of the padding",
    ),
    Mutant(
        "train",
        "accumulate_gradient",
        "A = trained_tokens(B, C)",
        "A = C.mask",
        "step",
        whose="TRL: truncated responses in the denominator alone",
    ),
    Mutant(
        "train",
        "accumulate_gradient",
        "token_weights(A, B, C, D)",
        "token_weights(A, B, C)",
        "step",
        whose="nanochat, TRL, rlhf-book: each pass has a denominator of its own",
    ),
    Mutant(
        "train",
        "compute_advantages",
        "A * B.truncated",
        "A * 0",
        "step",
        whose="cleanrl, TRL PPO: truncation treated as the end",
    ),
    Mutant("train", "compute_advantages", "A - B", "A + B", "step"),
    Mutant(
        "train",
        "update_policy",
        "A.optim.lr * B",
        "1e-6",
        "step",
        whose="nano-aha-moment: another learning rate is reported",
    ),
    Mutant(
        "train",
        "update_policy",
        "A[0] if A else B",
        "B",
        "step",
        whose="minRLHF: metrics of the empty dict they should fill",
    ),
]
