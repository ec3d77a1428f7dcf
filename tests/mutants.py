"""One-line bugs, most of them real ones of other codebases, each of which a test must notice:  make mutants

Every mutant is applied to a copy of the library, and the named test files are run against it. A survivor is a hole in
the tests: exit 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

MUTANTS = [  # file, line as it is, line as it must not be, the test files that notice
    # KL
    ("kl.py", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", "kl"),
    ("kl.py", "(ref_logprobs - logprobs).clamp(max=20)", "(logprobs - ref_logprobs).clamp(max=20)", "kl"),
    ("kl.py", ".square() / 2", ".square()", "kl"),
    ("kl.py", "return k3(batch.old_logprobs, new.logprobs)", "return k3(new.logprobs, batch.old_logprobs)", "kl"),
    ("kl.py", "max(kl / target - 1, -0.2), 0.2)", "max(kl / target - 1, -0.2), 2)", "kl"),
    ("kl.py", "if kl < target / 1.5", "if kl > target / 1.5", "kl"),
    # advantages
    ("advantages.py", "next_value = torch.where(m, v, next_value)", "next_value = v", "advantages"),
    ("advantages.py", "running = torch.where(m, r", "running = torch.where(m | True, r", "advantages"),
    ("advantages.py", "+ gamma * lam * running", "+ lam * running", "advantages"),
    ("advantages.py", "(targets + values)", "(whitened(targets, mask) + values)", "advantages"),
    ("advantages.py", "inside.var()", "inside.var(unbiased=False)", "advantages"),
    ("advantages.py", "(x - inside.mean()) *", "x *", "advantages"),
    ("advantages.py", ".masked_fill(unanimous, 0.0)", "", "advantages"),
    ("advantages.py", "group_size / max(group_size - 1, 1)", "1", "advantages"),
    ("advantages.py", 'if scale == "group" else returns.std()', 'if scale != "group" else returns.std()', "advantages"),
    ("advantages.py", "centred / (std + 1e-6)", "centred / (std + 1e-1)", "advantages"),
    # losses
    ("losses.py", "-torch.minimum(ratio", "-torch.maximum(ratio", "losses"),
    ("losses.py", "ratio.clamp(1 - low, 1 + high)", "ratio.clamp(1 - high, 1 + low)", "losses"),
    ("losses.py", "(logprobs - old_logprobs).clamp(-20, 20).exp()", "(logprobs - old_logprobs).exp()", "losses"),
    ("losses.py", "(logprobs - old_logprobs).clamp", "(old_logprobs - logprobs).clamp", "losses"),
    ("losses.py", "(ratio > 1 + high) & (advantages > 0)", "(ratio > 1 + high)", "losses"),
    ("losses.py", "torch.maximum((values - returns)", "torch.minimum((values - returns)", "losses"),
    ("losses.py", "value_coef * value - entropy_coef", "value_coef * value + entropy_coef", "losses"),
    ("losses.py", "return m / max(tokens, 1)", "return m / mask.numel()", "losses"),
    ("losses.py", "clamp_min(1) / max(rows, 1)", "clamp_min(1)", "losses"),
    ("losses.py", "max(rows, 1) * max_tokens", "max_tokens", "losses"),
    ("losses.py", "totals or (int(mask.any(1).sum()), int(mask.sum()))", "(len(mask), int(mask.sum()))", "losses"),
    # types
    ("types.py", "return value.masked_fill(~(mask", "return value + 0 * value.masked_fill(~(mask", "types"),
    ("types.py", "return self.mask.flip(1).cummax(1).values.flip(1)", "return self.mask", "types model"),
    ("types.py", "(len(rows) + 1) * sum(wider) > max_tokens", "len(rows) * sum(wider) > max_tokens", "types"),
    # rewards
    (
        "rewards/__init__.py",
        "mask.long().cumsum(1).argmax(1, keepdim=True)",
        "mask.sum(1, keepdim=True) - 1",
        "rewards",
    ),
    ("rewards/__init__.py", "groups.amax(1) != groups.amin(1)", "groups.amax(1) == groups.amin(1)", "rewards step"),
    # log-probs
    ("logprobs.py", "head_logits(hidden, head) / temperature", "head_logits(hidden, head)", "logprobs"),
    ("logprobs.py", "logits = logits * head.scale", "pass", "logprobs"),
    ("logprobs.py", "hidden.to(wide) @ head.weight.to(wide).T", "(hidden @ head.weight.T).to(wide)", "logprobs"),
    ("logprobs.py", "torch.tanh(logits / head.softcap)", "torch.tanh(logits)", "logprobs"),
    ("logprobs.py", "_expectation(logp, gap)", "_expectation(ref_logp, gap)", "logprobs"),
    ("logprobs.py", "h = -_expectation(logp, logp)", "h = -_expectation(logp, logp).detach()", "logprobs"),
    # policy
    ("model.py", "[:, batch.prompt_ids.shape[1] - 1 :]", "[:, batch.prompt_ids.shape[1] :]", "model"),
    ("model.py", "position_ids=positions(attended), ", "", "model"),
    ("model.py", "temperature=batch.temperature,", "temperature=1.0,", "rollout"),
    ("model.py", ".masked_fill(~attended, 0)", "", "model"),
    ("model.py", "nn.init.zeros_(self.head.weight)", "nn.init.normal_(self.head.weight)", "model"),
    ("model.py", "if i is not None and i not in eos", "if i is not None", "model"),
    # rollout
    ("rollout/naive.py", "masks.append(alive)", "masks.append(alive & ~torch.isin(token, eos))", "rollout"),
    ("rollout/naive.py", "alive = alive & ~torch.isin(token, eos)", "alive = alive & (token != eos[0])", "rollout"),
    ("rollout/naive.py", "truncated=alive", "truncated=~alive", "rollout"),
    ("rollout/cached.py", '"n v -> (n g) v"', '"n v -> (g n) v"', "rollout"),
    ("rollout/cached.py", "positions(attended)[:, -1:]", "positions(attended)[:, -1:] + 1", "rollout"),
    ("rollout/sample.py", "right=True", "right=False", "rollout"),
    ("rollout/sample.py", "logits / (rule.temperature or 1.0)", "logits", "rollout"),
    ("rollout/sample.py", "policy.train(training)", "policy.train(True)", "rollout"),
    ("rollout/sample.py", "if rule.vocab_size is not None:", "if False:", "rollout"),
    # optimizer
    ("optim.py", "p if p.dtype in (torch.float32, torch.float64) else", "p if True else", "optim"),
    ("optim.py", "if finite:", "if True:", "optim"),
    ("optim.py", "p.grad = None  # AdamW passes", "pass  # AdamW passes", "optim"),
    # the loop
    ("../train.py", "rewards - state.kl_ref_coef *", "rewards + state.kl_ref_coef *", "step"),
    ("../train.py", "if micro.old_logprobs is None:", "if True:", "step"),
    ("../train.py", 'mini.mask & ~mini.truncated[:, None] if cfg.truncation == "mask" else', "", "step"),
    ("../train.py", "last_values * batch.truncated", "last_values", "step"),
]


def run(mutant: tuple[str, str, str, str]) -> str:
    """killed | survived | not applied."""
    path, before, after, tests = mutant
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("rlkl", "tests", "configs"):
            shutil.copytree(ROOT / name, Path(scratch) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("train.py", "pyproject.toml"):
            shutil.copy(ROOT / name, scratch)
        file = Path(scratch) / "rlkl" / path
        source = file.read_text(encoding="utf-8")
        if before not in source:
            return "not applied"
        file.write_text(source.replace(before, after, 1), encoding="utf-8")
        files = [f"tests/test_{name}.py" for name in tests.split()]
        environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
            cwd=scratch, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    return {0: "survived", 1: "killed"}.get(done.returncode, "killed" if "rror" in done.stdout else "broken")


def main() -> int:
    console = Console()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(run, MUTANTS))
    table = Table("file", "line", "bug", "verdict")
    for (path, before, after, _), verdict in zip(MUTANTS, verdicts, strict=True):
        if verdict != "killed":
            table.add_row(path, before, after, verdict)
    killed = verdicts.count("killed")
    if killed < len(MUTANTS):
        console.print(table)
    console.print(f"{killed} of {len(MUTANTS)} mutants killed")
    return int(killed < len(MUTANTS))


if __name__ == "__main__":
    sys.exit(main())
