"""One-line bugs, most of them real ones of other codebases, each of which a test must notice:  make mutants

Every mutant is applied to a copy of the repository, and the named test files are run against it; so are the same files
without a mutant, which they must pass. A survivor is a hole in the tests: exit 1.

    python tests/mutants.py [--only PATTERN] [--jobs N]     PATTERN: of a file, a function, a bug or whose bug it is
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds of one mutant


class Mutant(NamedTuple):
    """A part of one line of a file, which stands there once, and what a bug would make of it."""

    file: str
    before: str
    after: str
    tests: str  # of the test files, the fewest that notice
    whose: str = ""  # the codebase that had this bug, and what it did

    @property
    def place(self) -> tuple[str, int]:
        """(function, line). A method is Class.method, a function within another is a part of it."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        line = source[: source.index(self.before)].count("\n") + 1
        return next((name for name, first, last in functions(source) if first <= line <= last), "<module>"), line


def functions(source: str) -> list[tuple[str, int, int]]:
    """(name, first line, last line) of every function and method."""
    found, kinds = [], (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(source).body:
        inner = [(f"{node.name}.", x) for x in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        found += [(prefix + x.name, x.lineno, x.end_lineno) for prefix, x in inner if isinstance(x, kinds)]
    return found


M = Mutant
MUTANTS = [
    # KL
    M("rlkl/kl.py", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", "kl",
      "rlhf-book, PaLM-rlhf: the sign of k1"),
    M("rlkl/kl.py", ".square() / 2", ".square()", "kl"),
    M("rlkl/kl.py", "(ref_logprobs - logprobs).clamp(max=20)", "(logprobs - ref_logprobs).clamp(max=20)", "kl",
      "rlhf-book: the ratio of k3 upside down"),
    M("rlkl/kl.py", ".expm1() - log_ratio", ".expm1() - (ref_logprobs - logprobs)", "kl"),
    M("rlkl/kl.py", "return k2(new.logprobs, batch.ref_logprobs)", "return k3(new.logprobs, batch.ref_logprobs)", "kl",
      "TRL: the gradient of the other KL"),
    M("rlkl/kl.py", "return k3(new.logprobs, batch.ref_logprobs)", "return k3(batch.ref_logprobs, new.logprobs)", "kl",
      "ToolRL: the direction"),
    M("rlkl/kl.py", "gradient - gradient.detach() + value.detach()", "value - value.detach() + gradient.detach()",
      "kl"),
    M("rlkl/kl.py", "batch.old_logprobs).clamp(-20, 20).exp() * ref_k3", "batch.old_logprobs).clamp(-20, 20).exp()"
      ".detach() * ref_k3", "kl", "TRL: a bias correction without its gradient"),
    M("rlkl/kl.py", "batch.old_logprobs).clamp(-20, 20).exp() * ref_k2", "batch.old_logprobs).clamp(-20, 20).exp()"
      ".detach() * ref_k2", "kl"),
    M("rlkl/kl.py", "return log_ratio.cumsum(1).clamp", "return log_ratio.clamp", "kl"),
    M("rlkl/kl.py", "return u.detach().sum(1, keepdim=True) * u", "return u.square() / 2", "kl"),
    M("rlkl/kl.py", "return new.kl_pi_ref", "return new.kl_ref_pi", "kl"),
    M("rlkl/kl.py", "return new.kl_ref_pi", "return new.kl_pi_ref", "kl"),
    M("rlkl/kl.py", "(log_ratio.cumsum(1) - log_ratio)", "log_ratio.cumsum(1)", "kl"),
    M("rlkl/kl.py", "return k2(batch.old_logprobs, new.logprobs)", "return k1(batch.old_logprobs, new.logprobs)", "kl"),
    M("rlkl/kl.py", "return k3(batch.old_logprobs, new.logprobs)", "return k3(new.logprobs, batch.old_logprobs)", "kl",
      "OpenRLHF: the direction"),
    M("rlkl/kl.py", "max(kl / target - 1, -0.2), 0.2)", "max(kl / target - 1, -0.2), 2)", "kl"),
    M("rlkl/kl.py", "0.2) * rows / horizon)", "0.2) / horizon)", "kl"),
    M("rlkl/kl.py", "if kl < target / 1.5", "if kl > target / 1.5", "kl"),
    M("rlkl/kl.py", '"k2": ref_k2, "k3": ref_k3,', '"k2": ref_k3, "k3": ref_k2,', "kl"),
    # advantages
    M("rlkl/advantages.py", "if lam_critic is None else", "if not lam_critic else", "advantages"),
    M("rlkl/advantages.py", "(targets + values)", "(whitened(targets, mask) + values)", "advantages"),
    M("rlkl/advantages.py", "next_value = torch.where(m, v, next_value)", "next_value = v", "advantages",
      "the sketch's: reads values of the padding"),
    M("rlkl/advantages.py", "next_value, running, columns = torch.zeros_like(values[:, 0])",
      "next_value, running, columns = values[:, -1]", "advantages", "TRL PPO: a value after the EOS"),
    M("rlkl/advantages.py", "inside = x[mask]", "inside = x.flatten()", "advantages",
      "TRL PPO: padding in the statistics"),
    M("rlkl/advantages.py", "inside.var()", "inside.var(unbiased=False)", "advantages"),
    M("rlkl/advantages.py", 'if scale == "group" else (returns.view', 'if scale != "group" else (returns.view',
      "advantages"),
    M("rlkl/advantages.py", "(_std(*over) + 1e-6)", "(_std(*over) + 1e-4)", "advantages"),
    M("rlkl/advantages.py", "return _spread(_centred(rewards, mask, group_size)[1], mask), None",
      "return _spread(_centred(rewards, mask, group_size)[0], mask), None", "advantages"),
    M("rlkl/advantages.py", "centred * (size / (size - 1).clamp_min(1))", "centred", "advantages"),
    M("rlkl/advantages.py", "(lengths * centred).sum(1, keepdim=True)", "centred.sum(1, keepdim=True)", "advantages"),
    M("rlkl/advantages.py", "_spread(centred - shift, mask)", "_spread(centred + shift, mask)", "advantages"),
    M("rlkl/advantages.py", "centred / mean, 0.0)", "centred, 0.0)", "advantages"),
    M("rlkl/advantages.py", "torch.where(mean > 0", "torch.where(mean >= 0", "advantages"),
    M("rlkl/advantages.py", "_all_wrong(wrong - 1, size - 1, k - 1)", "_all_wrong(wrong, size - 1, k - 1)",
      "advantages"),
    M("rlkl/advantages.py", "advantages.masked_fill(std == 0, 0.0)", "advantages", "advantages"),
    M("rlkl/advantages.py", "best.values[:, :1] - best.values[:, 1:]", "best.values[:, :1]", "advantages"),
    M("rlkl/advantages.py", "zeros_like(rewards), mask, gamma, 1.0)", "zeros_like(rewards), mask, 1.0, 1.0)",
      "advantages"),
    M("rlkl/advantages.py", ".masked_fill(~informative, 0.0)", "", "advantages"),
    M("rlkl/advantages.py", "return (to_go - values)", "return to_go", "advantages"),
    M("rlkl/advantages.py", '(rearrange(x, "(n g) -> n g"', '(rearrange(x, "(g n) -> n g"', "advantages"),
    M("rlkl/advantages.py", ".masked_fill(unanimous | ~there, 0.0)", ".masked_fill(~there, 0.0)", "advantages"),
    M("rlkl/advantages.py", "(total[..., None] - drawn)", "total[..., None]", "advantages"),
    M("rlkl/advantages.py", "cumsum(1).flip(1) > 1)", "cumsum(1).flip(1) > 2)", "mutants_holes"),
    M("rlkl/advantages.py", ".expand(mask.shape).masked_fill(~mask, 0.0)", ".expand(mask.shape)", "advantages"),
    M("rlkl/advantages.py", '"rloo": rloo', '"rloo": dr_grpo', "advantages"),
    # losses
    M("rlkl/losses.py", "return (logprobs - old_logprobs).clamp", "return (logprobs - old_logprobs).sum(1, True).clamp",
      "losses", "hands-on-modern-rl: a ratio of the sequence for each token"),
    M("rlkl/losses.py", "(logprobs - old_logprobs).clamp(-20, 20).exp()", "(logprobs - old_logprobs).exp()", "losses",
      "TRL: ratios that explode"),
    M("rlkl/losses.py", "advantages < 0, ratio.clamp(max=cap)", "advantages > 0, ratio.clamp(max=cap)", "losses"),
    M("rlkl/losses.py", "-torch.minimum(ratio * advantages", "-torch.maximum(ratio * advantages", "losses",
      "the sketch's: max for min"),
    M("rlkl/losses.py", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)", "losses"),
    M("rlkl/losses.py", "(ratio > 1 + high) & (advantages > 0)", "(ratio > 1 + high)", "losses"),
    M("rlkl/losses.py", "| (ratio > cap)) &", ") &", "losses"),
    M("rlkl/losses.py", "torch.maximum((values - returns)", "torch.minimum((values - returns)", "losses"),
    M("rlkl/losses.py", "(near - returns).square()) / 2", "(near - returns).square())", "losses",
      "torchtune's tests, rtol=1e6: any value passes"),
    M("rlkl/losses.py", "return policy + value_coef * value", "return -policy + value_coef * value", "losses",
      "torchtune's tests: 0.8 expected, -0.368 returned"),
    M("rlkl/losses.py", "value - entropy_coef * new.entropy,", "value - entropy_coef * new.entropy.detach(),", "losses",
      "TRL: an entropy bonus without a gradient"),
    M("rlkl/losses.py", "batch.old_logprobs, batch.advantages, clip, high)", "batch.old_logprobs, batch.advantages, "
      "high, clip)", "losses"),
    M("rlkl/losses.py", "cap: float = 3.0,", "cap: float = torch.inf,", "losses"),
    M("rlkl/losses.py", "policy = -ratio * batch.advantages", "policy = -ratio.clamp(0.8, 1.2) * batch.advantages",
      "losses"),
    M("rlkl/losses.py", "policy = -batch.advantages * new.logprobs", "policy = -batch.advantages * new.logprobs.exp()",
      "losses", "PaLM-rlhf: probabilities for log-probabilities"),
    M("rlkl/losses.py", "mean = _row_mean(new.logprobs", "mean = _row_sum(new.logprobs", "losses",
      "TRL: the sum of a sequence where its mean is meant"),
    M("rlkl/losses.py", ".exp() * (new.logprobs - new.logprobs.detach()).exp()", ".exp().expand_as(new.logprobs)",
      "losses", "prime-rl's tests, of the shape alone: no gradient"),
    M("rlkl/losses.py", "torch.where(a > 0, log_ratio", "torch.where(a < 0, log_ratio", "losses"),
    M("rlkl/losses.py", "_row_mean(held, batch.mask)", "_row_sum(held, batch.mask)", "losses"),
    M("rlkl/losses.py", "cap: float = 5.0,", "cap: float = 0.2,", "losses", "TRL: cispo's cap is another loss's clip"),
    M("rlkl/losses.py", "-ratio.clamp(max=cap).detach() * batch", "-ratio.clamp(max=cap) * batch", "losses"),
    M("rlkl/losses.py", "torch.where(a > 0, tau", "torch.where(a < 0, tau", "losses"),
    M("rlkl/losses.py", "* (ratio - 1)) * 4 / t", "* (ratio - 1)) * 4", "losses"),
    M("rlkl/losses.py", "new.logprobs.exp() - batch.sampler_logprobs.exp()", "new.logprobs.exp() - "
      "batch.old_logprobs.exp()", "losses"),
    M("rlkl/losses.py", "mu * (batch.sampler_logprobs - new.logprobs)", "mu * (new.logprobs - batch.sampler_logprobs)",
      "losses"),
    M("rlkl/losses.py", "outside = (a > 0) & (moved > 0) &", "outside = (a > 0) &", "losses"),
    M("rlkl/losses.py", "(-ratio.clamp(max=cap).detach() * a", "(-ratio.detach() * a", "losses"),
    M("rlkl/losses.py", "whole.clamp(-20, 0).exp()", "whole.clamp(-20, 20).exp()", "losses"),
    M("rlkl/losses.py", "whole = _row_sum(new.logprobs.detach()", "whole = _row_mean(new.logprobs.detach()", "losses"),
    M("rlkl/losses.py", "a.abs() / (2 * clip)", "a.abs() / clip", "losses"),
    M("rlkl/losses.py", "whole = _row_sum((new.logprobs.detach()", "whole = _row_sum((new.logprobs", "losses"),
    M("rlkl/losses.py", "- rates * whole.exp()).exp()", "- rates * whole.exp())", "losses"),
    M("rlkl/losses.py", '~_selected(batch, "top_entropy")', '_selected(batch, "top_entropy")', "losses"),
    M("rlkl/losses.py", 'policy.masked_fill(_selected(batch, "clip_cov")', 'policy.masked_fill(~_selected(batch, '
      '"clip_cov")', "losses"),
    M("rlkl/losses.py", "policy + coef * moved", "policy - coef * moved", "losses"),
    M("rlkl/losses.py", "(new.logprobs - batch.old_logprobs).abs()", "(new.logprobs - batch.old_logprobs)", "losses"),
    M("rlkl/losses.py", 'raise ValueError(f"{name} acts on', 'return batch.mask  # (', "losses"),
    M("rlkl/losses.py", "return x.masked_fill(~mask, 0.0).sum", "return x.sum", "losses",
      "TRL: padding in the sum of a sequence (luspo)"),
    M("rlkl/losses.py", "(x, mask) / mask.sum(1, keepdim=True).clamp_min(1)", "(x, mask) / mask.shape[1]", "losses",
      "PaLM-rlhf: a mean over padding"),
    M("rlkl/losses.py", "rows, tokens = totals or (", "rows, tokens = (", "losses",
      "nanochat, TRL, rlhf-book: each pass has a denominator of its own"),
    M("rlkl/losses.py", "return m / max(tokens, 1)", "return m / mask.numel()", "losses",
      "PaLM-rlhf, nano-aha-moment: divided by all positions"),
    # selectors
    M("rlkl/selectors.py", "_highest(batch.old_entropy,", "_highest(-batch.old_entropy,", "selectors"),
    M("rlkl/selectors.py", "_highest(covariance(batch),", "_highest(covariance(batch).abs(),", "selectors"),
    M("rlkl/selectors.py", "(cov > low) & (cov < high)", "(cov > low)", "selectors"),
    M("rlkl/selectors.py", "_highest(uniforms, candidates", "_highest(cov, candidates", "selectors"),
    M("rlkl/selectors.py", "x[batch.mask].mean()", "x.mean()", "selectors"),
    M("rlkl/selectors.py", "chosen = torch.zeros_like(inside, dtype=torch.bool)", "chosen = inside >= inside.sort("
      "descending=True).values[: max(int(count + 1e-9), 1)].amin() if len(inside) else inside.bool()", "selectors",
      "TRL: a threshold, and all that tie with it"),
    # the sampler is not the trainer
    M("rlkl/mismatch.py", ".clamp(max=cap)", "", "mismatch"),
    M("rlkl/mismatch.py", "(ratio >= low)", "(ratio > low)", "mismatch"),
    M("rlkl/mismatch.py", "(batch.old_logprobs - batch.sampler_logprobs)", "(batch.sampler_logprobs - batch."
      "old_logprobs)", "mismatch"),
    M("rlkl/mismatch.py", 'if level == "mean":', "if False:", "mismatch", "TRL: the sum of a sequence for its mean"),
    # log-probs
    M("rlkl/logprobs.py", "hidden.to(wide) @ head.weight.to(wide).T", "(hidden @ head.weight.T).to(wide)", "logprobs",
      "TRL, verl: logits rounded to bf16"),
    M("rlkl/logprobs.py", "head.bias.to(wide)) * head.scale", "head.bias.to(wide)) * 1.0", "logprobs"),
    M("rlkl/logprobs.py", "run(hidden, head, ids, temperature,", "run(hidden, head, ids, 1.0,", "logprobs",
      "rlhf-book, simple_GRPO, TRL: scored at temperature 1"),
    M("rlkl/logprobs.py", 'raise ValueError("token_logprobs: ref_hidden and ref_head come together")', "pass",
      "logprobs"),
    M("rlkl/logprobs.py", "chosen = logp.gather", "chosen = logp.exp().gather", "logprobs",
      "PaLM-rlhf: probabilities for log-probabilities"),
    M("rlkl/logprobs.py", "_expectation(logp, logp - ref_logp), _expectation(ref_logp, ref_logp - logp)",
      "_expectation(ref_logp, ref_logp - logp), _expectation(logp, logp - ref_logp)", "logprobs",
      "ToolRL, OpenRLHF: the direction"),
    M("rlkl/logprobs.py", "-torch.inf, 0.0)).sum(-1)", "-torch.inf, 0.0)).sum(-1).detach()", "logprobs",
      "TRL: entropies under no_grad"),
    M("rlkl/logprobs.py", "x.masked_fill(logp == -torch.inf, 0.0)", "x", "logprobs"),
    M("rlkl/logprobs.py", "if vocabulary(ref_head) != vocabulary(head):", "if False:", "logprobs"),
    M("rlkl/logprobs.py", "return found if entropy else found._replace(entropy=None)", "return found", "mutants_holes"),
    M("rlkl/logprobs.py", "* 4 <= LOGITS_BUDGET", "<= LOGITS_BUDGET", "mutants_holes"),
    M("rlkl/logprobs.py", "functions=TRITON", "functions=TORCH", "mutants_holes"),
    M("rlkl/tiles.py", "return z.clone(), r.clone() if with_reference and r is not None else None",
      "return z, r if with_reference and r is not None else None", "mutants_holes",
      "simple_GRPO: the backward pass overwrites saved logits"),
    # types
    M("rlkl/types.py", "return value.masked_fill(~(mask if", "return value.masked_fill_(~(mask if", "types",
      "nano-aha-moment: zeros written into the caller's tensor"),
    M("rlkl/types.py", "return value.masked_fill(~(mask", "return value + 0 * value.masked_fill(~(mask", "types"),
    M("rlkl/types.py", "return self.mask.flip(1).cummax(1).values.flip(1)", "return self.mask", "types"),
    M("rlkl/types.py", "(len(rows) + 1) * sum(wider) > max_tokens", "len(rows) * sum(wider) > max_tokens", "types"),
    M("rlkl/types.py", "((extra, 0) if prompt else (0, extra))", "(0, extra)", "types"),
    M("rlkl/types.py", "last = max(int(self.attended.sum(1).max()), 1)", "last = self.mask.shape[1]", "types",
      "TRL: padded to the longest of the whole rollout"),
    # rewards
    M("rlkl/rewards/__init__.py", "mask.long().cumsum(1).argmax(1, keepdim=True)",
      "mask.long().cumsum(1).argmax(1, keepdim=True).add(1).clamp(max=mask.shape[1] - 1)", "rewards",
      "TRL PPO: the score on the slot after the EOS"),
    M("rlkl/rewards/__init__.py", "mask.long().cumsum(1).argmax(1, keepdim=True)", "mask.sum(1, keepdim=True) - 1",
      "rewards"),
    M("rlkl/rewards/__init__.py", ".amax(1) > groups.", ".amax(1) <= groups.", "step",
      "TRL: groups that teach nothing are kept"),
    M("rlkl/rewards/__init__.py", "return kept if kept.any() else torch.ones_like(kept)", "return kept", "step",
      "GRPO-Zero: a batch that is left empty"),
    M("rlkl/rewards/__init__.py", "raise refused(reward, error) from error", "return torch.zeros(len(replies)), {}",
      "rewards",
      "simple_GRPO: any error is swallowed"),
    M("rlkl/rewards/penalties.py", "(max_tokens - buffer - mask.sum(1))", "(max_tokens - buffer - mask.shape[1] + 0 * "
      "mask.sum(1))", "rewards"),
    M("rlkl/tasks/addition.py", "float(reply == example.answer)", "float(example.answer in reply)", "tasks",
      "tiny-grpo: paid for an answer among others"),
    # the policy
    M("rlkl/model.py", "hidden[:, :-1][mask]", "hidden[:, 1:][mask]", "model", "the sketch's: hidden state off by one"),
    M("rlkl/model.py", "Evaluation(per_token[0], per_token[1],", "Evaluation(per_token[0], -per_token[0],", "model",
      "nano-aha-moment: entropy of the sampled token alone"),
    M("rlkl/model.py", "attended = torch.cat([batch.prompt_mask, batch", "attended = torch.cat([batch.prompt_mask & ("
      "batch.prompt_ids != batch.response_ids.gather(1, batch.mask.sum(1, True).sub(1).clamp_min(0))), batch",
      "rollout", "tiny-grpo: prompt tokens that equal the EOS are hidden"),
    M("rlkl/model.py", "ids, attention_mask=attended, position_ids=positions(attended), ", "ids, attention_mask="
      "attended, ", "model", "TRL, lm-human-preference-details: no position_ids"),
    M("rlkl/model.py", "cumsum(1) - 1).clamp_min(0)", "cumsum(1)).clamp_min(0)", "model"),
    M("rlkl/model.py", "batch.attended.sum(1, keepdim=True)).squeeze(1)", "batch.attended.sum(1, keepdim=True).sub(1)."
      "clamp_min(0)).squeeze(1)", "model", "TRL PPO: the value off by one"),
    M("rlkl/model.py", "return values[:, :-1].masked_fill", "return values[:, 1:].masked_fill", "model"),
    M("rlkl/model.py", "nn.init.zeros_(self.head.weight)", "nn.init.normal_(self.head.weight)", "model"),
    M("rlkl/model.py", "Policy(copy.deepcopy(policy.lm), vocab", "Policy(policy.lm, vocab", "model"),
    M("rlkl/model.py", "return policy.eval(), tokenizer", "return policy.train(), tokenizer", "model",
      "TRL: dropout, so that the ratio is not 1 before any update"),
    M("rlkl/model.py", "*(declared if isinstance(declared, list) else [declared])", "None", "model",
      "TRL: one EOS of many ends a reply"),
    M("rlkl/model.py", "if i is not None and i not in eos", "if i is not None", "model",
      "tiny-grpo, simple_GRPO, torchrl: pad = eos"),
    M("rlkl/model.py", "torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device="
      "device)", "ids != pad_id", "mutants_holes", "tiny-grpo: the mask read off the ids"),
    M("rlkl/model.py", "return tokenizer(prompt).input_ids", "return tokenizer(prompt).input_ids[:24]",
      "mutants_holes", "lm-human-preference-details: prompts cut to another length"),
    M("rlkl/model.py", "return checkpoint(forward, *args,", "return checkpoint(forward, *(x.detach() for x in args),",
      "memory"),
    M("rlkl/lora.py", "layer.enable_adapters(False)", "layer.enable_adapters(True)", "lora"),
    M("rlkl/lora.py", "for layer in layers:  # one by one", "for layer in layers[:1]:  # one by one", "lora",
      "transformers: layers trained beside an adapter are frozen once it was off"),
    M("rlkl/lora.py", "return found.requires_grad_(True)", "return found", "lora"),
    M("rlkl/lora.py", "torch.manual_seed(seed)", "torch.manual_seed(0)", "lora"),
    # rollout
    M("rlkl/rollout/naive.py", "append((token, alive,", "append((token, alive & ~torch.isin(token, eos),", "rollout",
      "nanochat, tiny-grpo, simple_GRPO: the EOS is not learned"),
    M("rlkl/rollout/naive.py", "temperature=rule.temperature or 1.0)", "temperature=rule.temperature)", "rollout",
      "nano-vllm: no greedy"),
    M("rlkl/rollout/naive.py", "position_ids=positions(attended), use_cache=False", "use_cache=False", "rollout",
      "TRL: no position_ids"),
    M("rlkl/rollout/naive.py", '"n p -> (n g) p"', '"n p -> (g n) p"', "rollout"),
    M("rlkl/rollout/cached.py", '"n v -> (n g) v"', '"n v -> (g n) v"', "rollout"),
    M("rlkl/rollout/cached.py", "positions(attended)[:, -1:]", "positions(attended)[:, -1:] + 1", "rollout"),
    M("rlkl/rollout/sample.py", "torch.rand(rows, columns, generator=generator,", "torch.rand(rows, columns,",
      "rollout"),
    M("rlkl/rollout/sample.py", "return ids, logp.gather", "return ids, logits.log_softmax(-1).gather", "rollout",
      "open-instruct, simple_GRPO: log-probs without the temperature"),
    M("rlkl/rollout/sample.py", "-torch.inf).log_softmax(-1)", "-torch.inf)", "rollout",
      "nanochat, rlhf-book, prime-rl: top-k sampled, the full softmax reported"),
    M("rlkl/rollout/sample.py", "- ordered.exp() < rule.top_p", "< rule.top_p", "rollout"),
    M("rlkl/rollout/sample.py", "keep[:, rule.top_k :] = False", "keep[:, rule.top_k + 1 :] = False", "rollout"),
    M("rlkl/rollout/sample.py", "policy.eval()", "policy.train()", "rollout", "TRL: dropout in the rollout"),
    M("rlkl/rollout/sample.py", "policy.train(training)", "policy.train(True)", "rollout"),
    M("rlkl/rollout/sample.py", "truncated[row] = False", "pass", "engine"),
    M("rlkl/rollout/slots.py", "column <= position", "column < position", "engine", "a token that does not see itself"),
    M("rlkl/rollout/slots.py", "seen & (column > position - window)", "seen", "engine",
      "the window of sliding layers ignored"),
    M("rlkl/rollout/slots.py", "keys[which], values[which]", "0.0, 0.0", "engine", "a refill without its prompt"),
    M("rlkl/rollout/slots.py", "self.keys[self.slots.index[:b], position[:b]]",
      "self.keys[self.slots.index[:b], position[:b] + 1]", "engine", "keys that lie one late"),
    M("rlkl/rollout/slots.py", "self.position[to] = self.position[source]", "pass", "engine",
      "the position lost when gaps close"),
    M("rlkl/rollout/slots.py", "(slots.position[:b] + 1).int()", "slots.position[:b].int()", "engine",
      "lengths that leave the newest key out"),
    M("rlkl/rollout/slots.py", "(window - 1, 0)", "(window, 0)", "engine", "a window of one too many"),
    M("rlkl/rollout/slots.py", "set_attn_implementation(own)", "set_attn_implementation(ATTENTION)", "engine",
      "transformers: the attention of generate_batch stays"),
    M("rlkl/rollout/slots.py", '"b (kv g) 1 d -> b kv g d"', '"b (g kv) 1 d -> b kv g d"', "engine"),
    M("rlkl/rollout/slots.py", "[(p[:-1] + [0] * width)", "[([0] * (width - len(p) + 1) + p[:-1])", "engine",
      "a prefill padded on the left"),
    M("rlkl/rollout/slots.py", 'in ("dynamic", "longrope")', 'in ("dynamic",)', "engine"),
    M("rlkl/rollout/slots.py", '"full_attention", "sliding_attention"}', '"full_attention", "sliding_attention", '
      '"linear_attention"}', "engine"),
    M("rlkl/rollout/slots.py", "max(len(p) for p in prompts) - 1, 1)", "max(len(p) for p in prompts), 1)", "engine"),
    M("rlkl/rollout/one_pass.py", "logits / rule.temperature", "logits", "engine",
      "open-instruct, simple_GRPO: log-probs without the temperature"),
    M("rlkl/rollout/one_pass.py", "rule.top_k or rule.top_p < 1", "rule.top_p < 1", "engine"),
    M("rlkl/rollout/one_pass.py", "right=True", "right=False", "engine", "a uniform of 0 picks an id of probability 0"),
    M("rlkl/rollout/one_pass.py", "torch.nextafter(whole, torch.zeros_like(whole))", "whole", "engine"),
    M("rlkl/rollout/engine.py", "self.uniforms[row, count]", "self.uniforms[row, count * 0]", "engine"),
    M("rlkl/rollout/engine.py", "return sampled(slots, part=2)", "return sampled(slots // 2)", "engine"),
    M("rlkl/rollout/engine.py", "tokens.gather(1, length[:, None] - 1)", "tokens[:, -1:]", "engine"),
    M("rlkl/rollout/engine.py", "if row is not None and self.rule.stop(self.reply(row))", "if False", "engine",
      "a reply with a stop string goes on"),
    M("rlkl/rollout/engine.py", "self.tokens[row, : self.length[row]]", "self.tokens[row]", "engine"),
    M("rlkl/rollout/engine.py", "free, self.ready = free[some:], self.ready[some:]", "free, self.ready = [], "
      "self.ready[some:]", "engine", "slots that wait for the next look"),
    M("rlkl/rollout/engine.py", "for n in chunk for g in range(self.group)]", "for g in range(self.group) for n in "
      "chunk][::2]", "engine", "rows that are never started"),
    M("rlkl/rollout/engine.py", "+ self.steps - self.began[i] for i in live)", "for i in live)", "engine",
      "keys beyond the first look are not read"),
    M("rlkl/rollout/engine.py", 'logging.getLogger("rlkl").warning(line)', "pass", "engine"),
    M("rlkl/rollout/engine.py", "SLOTS.get(device, 128)", "SLOTS.get(device, 127)", "memory"),
    M("rlkl/rollout/engine.py", "max_kv_gb * 1e9", "max_kv_gb * 2**40", "engine"),
    M("rlkl/rollout/one_pass.py", "ids = ids.clamp_max(logits.shape[1] - 1)", "ids = ids", "engine"),
    M("rlkl/rollout/slots.py", "query.is_cuda and ", "", "engine"),
    M("rlkl/rollout/slots.py", "self.keys = key_states.new_zeros(self.slots.count, self.slots.room,",
      "self.keys = key_states.new_zeros(self.slots.count, self.slots.room - 1,", "engine"),
    M("rlkl/rollout/slots.py", "-(-reach // STEP) * STEP", "reach // STEP * STEP", "engine",
      "the newest keys not read"),
    M("rlkl/rollout/engine.py", "(row != self.idle)", "True", "engine"),
    M("rlkl/rollout/engine.py", "size = size if halves else live", "size = size", "engine"),
    M("rlkl/rollout/engine.py", "len(self.prompts[n]) - 1 for n in of", "len(self.prompts[n]) for n in of", "engine",
      "every position off by one"),
    M("rlkl/rollout/engine.py", "key=lambda n: -len(prompts[n])", "key=lambda n: n", "engine"),
    M("rlkl/rollout/engine.py", "min(slots, rows, self.affordable(room, max_kv_gb))", "min(slots, rows)", "engine"),
    # optimizer
    M("rlkl/optim.py", "if wide == p.dtype and not offload:", "if not offload:", "optim",
      "tiny-grpo, rlhf-book: Adam on bf16 weights"),
    M("rlkl/optim.py", "clip_grad_norm_(ps, self.max_grad_norm)", "clip_grad_norm_(ps, math.inf)", "optim",
      "nanochat, TRL PPO: no gradient clipping"),
    M("rlkl/optim.py", "if finite:", "if True:", "optim"),
    M("rlkl/optim.py", "master.copy_(value)", "master.copy_(value.to(p.dtype))", "optim",
      "TRL: state that a resume loses"),
    M("rlkl/optim.py", "(step + 1) / (warmup + 1)", "step / (warmup + 1)", "optim"),
    M("rlkl/seeds.py", "max(start - epoch * count, 0)", "start % count", "optim"),
    # what is reported
    M("rlkl/heldout.py", "correct[i] += right", "correct[parts.heldout.index(parts.heldout[i])] += right",
      "mutants_holes", "GRPO-Zero: two copies of a prompt merge"),
    M("rlkl/heldout.py", "math.comb(n - correct, k) / math.comb(n, k)", "(1 - correct / n) ** k", "mutants_holes"),
    M("rlkl/heldout.py", "sum(g[name] for g in grades) / len(grades)", "grades[-1][name]", "tasks_run"),
    # how a reply is judged
    M("rlkl/tasks/gsm8k.py", 'reply.rpartition("####")', 'reply.partition("####")', "tasks_judges",
      "verl, once: the first #### of a reply"),
    M("rlkl/tasks/gsm8k.py", "found[-1]", "found[0]", "tasks_judges"),
    M("rlkl/tasks/extract.py", 'text.replace(",", "")', "text", "tasks_judges"),
    M("rlkl/tasks/countdown.py", "right and sorted(found[1]) == sorted(example.info[\"numbers\"])", "right",
      "tasks_judges", "a target written down is a target reached"),
    M("rlkl/tasks/arithmetic.py", "[0-9+\\-*/() ]+", ".+", "tasks_judges"),
    M("rlkl/tasks/gym.py", "self.evaluates and not harmless(said)", "False", "tasks_judges",
      "reasoning-gym: eval of a reply"),
    M("rlkl/tasks/bounded.py", "raise Late", "raise TimeoutError", "tasks_judges"),
    M("rlkl/log.py", "else before + inside.sum()", "else inside.sum()", "step_options",
      "GRPO-Zero: the last micro-batch is reported"),
    M("rlkl/log.py", "self.counts[name] + len(inside)", "self.counts[name] + 1", "step_options",
      "TRL: means of unequal micro-batches averaged"),
    M("rlkl/metrics.py", "inside = batch.advantages[batch.mask]", "inside = batch.advantages.flatten()", "golden_verl",
      "TRL PPO, tiny-grpo: means over padding"),
    M("rlkl/metrics.py", '"length": batch.mask.sum(1)', '"length": batch.mask.logical_not().sum(1)', "golden_verl",
      "TRL: completion lengths"),
    M("rlkl/metrics.py", "batch.mask[:, 1:] & batch.mask[:, :-1]", "batch.mask[:, 1:]", "hacking"),
    M("rlkl/metrics.py", "(ids.max() + 1)", "ids.max()", "hacking"),
    # the meter of reward hacking
    M("rlkl/hacking.py", "if not reward.risen or any", "if any", "hacking"),
    M("rlkl/hacking.py", "self.gain and not self.fallen", "self.gain", "hacking"),
    M("rlkl/hacking.py", "rows[-1 - QUIET : -1]", "rows[:-1]", "hacking"),
    # the loop
    M("train.py", "last_values * batch.truncated", "last_values * 0", "step",
      "cleanrl, TRL PPO: truncation treated as the end"),
    M("train.py", "rewards - state.kl_ref_coef *", "rewards + state.kl_ref_coef *", "step"),
    M("train.py", "mini.weights = token_weights(trained, cfg.optim.weights, cfg.sampling.max_new_tokens)",
      "mini.weights = token_weights(mini.mask, cfg.optim.weights, cfg.sampling.max_new_tokens) * trained", "step",
      "TRL: truncated replies in the denominator alone"),
    M("train.py", "loss = (micro.weights * per_token)", "loss = (token_weights(micro.mask, cfg.optim.weights, cfg."
      "sampling.max_new_tokens) * per_token)", "step",
      "nanochat, TRL, rlhf-book: each pass has a denominator of its own"),
    M("train.py", '"lr": cfg.optim.lr * scale', '"lr": 1e-6', "mutants_holes",
      "nano-aha-moment: another learning rate is reported"),
    M("train.py", "norms += [found] if found else []", "norms += []", "step",
      "minRLHF: metrics of the empty dict they should fill"),
    M("train.py", '"kl_old_pi": kl.k3(old, logprobs)', '"kl_old_pi": kl.k1(logprobs, old)', "step",
      "minRLHF: an early stop that never comes"),
]


def run(mutant: Mutant | None, tests: str) -> tuple[str, str]:
    """(verdict, output): killed, survived or broken, where the tests could not be run, as where nothing imports."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("rlkl", "tests", "configs", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, Path(scratch) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("train.py", "pyproject.toml"):
            shutil.copy(ROOT / name, scratch)
        if mutant is not None:
            file = Path(scratch) / mutant.file
            source = file.read_text(encoding="utf-8")
            if source.count(mutant.before) != 1:
                return "broken", f"stands {source.count(mutant.before)} times in {mutant.file}: {mutant.before}"
            file.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")
        files = [f"tests/test_{name}.py" for name in tests.split()]
        environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
                cwd=scratch, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "broken", f"more than {LIMIT} s"
    return {0: "survived", 1: "killed"}.get(done.returncode, "broken"), done.stdout + done.stderr


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    options = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    chosen = [m for m in MUTANTS if re.search(options.only, " ".join((*m, m.place[0])))]
    suites = sorted({name for m in chosen for name in m.tests.split()})
    bad, start = Table("file", "function", "line", "bug", "whose", "verdict"), time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(run, None, name): f"tests/test_{name}.py without a mutant" for name in suites}
        jobs |= {pool.submit(run, m, m.tests): m for m in chosen}
        for count, job in enumerate(as_completed(jobs), 1):
            (verdict, output), what = job.result(), jobs[job]
            if isinstance(what, Mutant):
                function, line = what.place
                said, good = f"{what.file}:{line} {function}: {what.before} → {what.after}", verdict == "killed"
                row = (what.file, function, str(line), f"{what.before} → {what.after}", what.whose, verdict)
                said += f"   [{what.whose}]" if what.whose else ""
            else:
                verdict = {"survived": "passed", "killed": "failed"}.get(verdict, verdict)
                said, good, row = what, verdict == "passed", (what, "", "", "", "", verdict)
            if not good:
                bad.add_row(*map(escape, row))
            console.print(escape(f"{count:3}/{len(jobs)} {verdict:8} {said}"))
            if verdict in ("broken", "failed"):
                console.print(escape("\n".join(output.splitlines()[-15:])))
    if bad.row_count:
        console.print(bad)
    survived = bad.row_count
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(f"{len(chosen)} mutants, {len([m for m in chosen if m.whose])} of them bugs of other codebases; "
                  f"{survived or 'none'} not killed; {time.monotonic() - start:.0f} s, "
                  f"{used.ru_utime + used.ru_stime:.0f} s of CPU")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
