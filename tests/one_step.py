"""One step of a configuration as plain numbers, to be compared with tests/golden/steps.json.gz.

A helper, not a test. The golden numbers were taken from version 0.1, before train.py and rlkl were
rewritten, so they have the names of that time: what is returned here is translated back. Only the
overrides of the entries have today's names.

Nothing here depends on the CPU but through float64 rounding: the base's weights lie on a grid, no
normal deviate is drawn, and Llama's norm and rotary angles, float32 in transformers whatever the
model's dtype, are float64 (`float64_llama`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_fixture import ROOT, make_base
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama as llama

import train
from rlkl.cli import dpo, label, reward_model, sft
from rlkl.run import config
from rlkl.run.build import Models, build
from rlkl.run.schema import Config
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.types import Batch

GRID = 2.0**12
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_gb")
COMMANDS = {"sft": sft, "dpo": dpo, "reward-model": reward_model, "label": label}
OLD_METRICS = {  # of today → of the golden numbers
    "frac_reward_zero_std": "unanimous",
    "response_length": "length",
    "truncated_fraction": "truncated",
    "distinct_2": "distinct",
    "advantage_mean": "advantage",
    "skipped_updates": "skipped",
    "effective_sample_size": "ess",
    "kl_pi_ref_token": "kl_pi_ref_tok",
    "kl_pi_ref_sequence": "kl_pi_ref_seq",
    "resampled_prompts": "refilled",
}
OLD_PREFIXES = {"rewards/": "reward/", "eval/": "heldout/"}
BATCH = (
    "prompt_ids",
    "prompt_mask",
    "response_ids",
    "mask",
    "truncated",
    "sampler_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "rewards",
    "advantages",
    "returns",
    "old_entropy",
)
REWARD = """
import torch


def count(response):
    return sum(c.isdigit() for c in response)


def digits(examples, responses, batch):
    return torch.tensor([count(r) // 2 / 2 for r in responses]), {}


def binary(examples, responses, batch):
    return torch.tensor([float(count(r) % 3 == 0) for r in responses]), {}


def missing(examples, responses, batch):
    return [None if i % 5 == 2 else count(r) / 4 for i, r in enumerate(responses)], {}
"""


# ------------------------------------------------------------------ what every entry starts from


def float64_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and rotary angles of Llama in the dtype of the model; cos and sin in float64."""

    def norm(self, x):
        variance = x.square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    @torch.no_grad()
    def rotary(self, x, position_ids):
        half = len(self.inv_freq)
        theta = self.config.rope_parameters["rope_theta"]
        freq = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = position_ids[..., None].to(torch.float64) * freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", rotary)


def golden_base(folder: Path) -> Path:
    """`make_base` with weights that are the same bits on every CPU."""
    make_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(lm.named_parameters()):
            spread = 0.1 if "norm" in name else 0.3 * 3**0.5
            x = uniform(p, g) * spread
            p.copy_(((x + float("norm" in name)) * GRID).round() / GRID)
        ids = torch.tensor([tokenizer("0123456789+=").input_ids])
        mean = lm.base_model(ids).last_hidden_state.mean((0, 1))
        end = tokenizer.eos_token_id
        likely = torch.tensor([end, *tokenizer("0123456789").input_ids])
        lm.lm_head.weight[likely] += (9 * mean / mean.square().sum() * GRID).round() / GRID
        # some responses end
        lm.lm_head.weight[end] += (4 * mean / mean.square().sum() * GRID).round() / GRID
    lm.float().save_pretrained(folder)
    return folder


def digest(base: Path) -> str:
    """The sha256 of all weights, by name."""
    found = hashlib.sha256()
    for name, x in sorted(load_file(base / "model.safetensors").items()):
        found.update(name.encode() + x.numpy().tobytes())
    return found.hexdigest()


def furnish(folder: Path) -> None:
    """The files that the overrides name."""
    (folder / "reward.py").write_text(REWARD)
    prompts = [
        {
            "prompt": "1234567890+"[: 1 + i % 11] + f"{i}=",
            "answer": "12345678"[: 1 + i % 7],
        }
        for i in range(40)
    ]
    pairs = [
        {
            "prompt": f"{i}+{i % 7}=",
            "chosen": str(i * 37 % 101),
            "rejected": "9876543"[: 1 + i % 5],
            "truncated": [False, i % 4 == 0],
        }
        for i in range(30)
    ]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ numbers


def uniform(like: Tensor, g: torch.Generator) -> Tensor:
    """Of [-1, 1)."""
    return 2 * torch.rand(like.shape, generator=g, dtype=torch.float64) - 1


def nested(x: Tensor | None) -> list | None:
    """NaN is None."""
    if x is None:
        return None
    x = x.detach().to(torch.float64).tolist() if x.is_floating_point() else x.long().tolist()
    return json.loads(json.dumps(x).replace("NaN", "null"))


def fingerprint(x: Tensor | None) -> list[float] | None:
    """[Σ x cos(i), Σ x²] of the flattened tensor."""
    if x is None:
        return None
    x = x.detach().to(torch.float64).flatten()
    index = torch.arange(len(x), dtype=torch.float64)
    return [(x * index.cos()).sum().item(), x.square().sum().item()]


def fingerprints(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, list[float] | None]:
    return {name: fingerprint(p) for name, p in parameters}


def timeless(metrics: dict[str, float]) -> dict[str, float | None]:
    """Without clocks, under the old names; None where it is not finite."""
    return {
        old_name(name): x if math.isfinite(x) else None
        for name, x in metrics.items()
        if not name.startswith(CLOCKS)
    }


def old_name(metric: str) -> str:
    for prefix, old in OLD_PREFIXES.items():
        if metric.startswith(prefix):
            return old + metric.removeprefix(prefix)
    return OLD_METRICS.get(metric, metric)


# ------------------------------------------------------------------ a step of train.py


class Recorder:
    """Stands for the optimizer: a fingerprint of each gradient, before clipping."""

    def __init__(self, optimizer: Any, names: dict[int, str]) -> None:
        self.optimizer, self.names, self.updates = optimizer, names, []

    def step(self, scale: float, loss: float = 0.0, frozen: tuple[str, ...] = ()) -> dict:
        gradients = {
            group: fingerprints((self.names[id(p)], p.grad) for p in parameters)
            for group, parameters in self.optimizer.groups.items()
        }
        norms = self.optimizer.step(scale, loss, frozen)
        update = {"scale": scale, "loss": loss, "norms": norms, "gradients": gradients}
        self.updates.append(update)
        return norms

    def zero(self) -> None:
        self.optimizer.zero()


def move(cfg: Config, models: Models, g: torch.Generator) -> None:
    """Critic, adapter and reference away from where they start: there some gradients are 0."""
    with torch.no_grad():
        if models.policy.critic is not None:  # in the order weight, bias
            for p in models.policy.critic.head.parameters():
                p.copy_(0.2 * uniform(p, g))
        if cfg.lora.r:  # B = 0 would leave A without a gradient
            for name, p in sorted(models.policy.named_parameters()):
                if "lora_B" in name:
                    p.copy_(0.05 * uniform(p, g))
                elif "lora_A" in name:  # a float32 draw, whose last bit depends on the CPU
                    p.copy_((p * GRID).round() / GRID)
        elif models.reference is not None:
            for _, p in sorted(models.reference.lm.named_parameters()):
                p.add_(0.03 * uniform(p, g))


def noisy_sampler(sampler: Callable[..., Batch], g: torch.Generator) -> Callable[..., Batch]:
    """A sampler whose log-probs are not the trainer's."""

    def sample(*args: Any) -> Batch:
        batch = sampler(*args)
        noise = 0.3 * uniform(batch.sampler_logprobs, g)
        batch.fill(sampler_logprobs=batch.sampler_logprobs + noise)
        return batch

    return sample


def step(base: Path, path: str, overrides: list[str], noisy: str) -> dict:
    """Build, `move`, and take one training step.

    noisy: "sampler" or "old", the log-probs that get noise; or "".
    """
    cfg = config.load([str(ROOT / path), *(o.replace("{base}", str(base)) for o in overrides)])
    rounds: list[dict] = []
    caught: dict[str, Any] = {}
    update_policy, token_rewards = train.update_policy, train.token_rewards

    def generate_and_score(cfg, models, data, state, prompts, rng):
        rollout = train.generate_and_score(cfg, models, data, state, prompts, rng)
        lengths = rollout.responses.mask.sum(1)
        rounds.append(
            {
                "prompts": [data.train[i].prompt for i in prompts[: cfg.sampling.prompts]],
                "scores": nested(rollout.responses.scores),
                "lengths": lengths.masked_fill(rollout.responses.scores.isnan(), 0).tolist(),
            }
        )
        return rollout

    def see_scores(scores, mask):
        caught["scores"] = nested(scores)
        return token_rewards(scores, mask)

    def see_batch(cfg, models, algorithm, state, batch, rng):
        if noisy == "old":  # |log w| has a kink at 0, where the first update would be
            batch.fill(old_logprobs=batch.old_logprobs + 0.3 * uniform(batch.old_logprobs, g))
        caught["batch"] = {name: nested(getattr(batch, name)) for name in BATCH}
        values = batch.baseline if batch.values is None else batch.values  # were one field
        caught["batch"]["values"] = nested(values)
        return update_policy(cfg, models, algorithm, state, batch, rng)

    models, algorithm, data = build(cfg, generate_and_score)
    g = torch.Generator().manual_seed(0)
    move(cfg, models, g)
    if noisy == "sampler":
        models.sampler = noisy_sampler(models.sampler, g)
    names = {id(p): name for name, p in models.policy.named_parameters()}
    before = fingerprints(models.policy.named_parameters())
    models.optimizer = recorder = Recorder(models.optimizer, names)
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "token_rewards", see_scores)
        monkeypatch.setattr(train, "update_policy", see_batch)
        inputs = step_inputs(cfg, data, state)
        metrics, _ = train.training_step(cfg, models, algorithm, data, state, *inputs)
    metrics.pop("kl_old_coef")  # was the one after the step, which is in the state
    if cfg.loss["name"] == "kl_cov":  # policy_loss was without the penalty of the selected tokens
        metrics["policy_loss"] -= cfg.loss.get("coef", 1.0) * metrics["moved"]
    return {
        "rounds": rounds,
        **caught,
        "metrics": timeless(metrics),
        "updates": recorder.updates,
        "weights_before": before,
        "weights_after": fingerprints(models.policy.named_parameters()),
        "state": {
            "kl_ref_coef": state.kl_ref_coef,
            "kl_old_coef": state.kl_old_coef,
            "skips": state.skips,
            "refilled": state.resampled,
            "success": state.success,
        },
    }


# ------------------------------------------------------------------ a command of rlkl


def command(base: Path, kind: str, path: str, overrides: list[str]) -> dict:
    """Run `rlkl label`, sft, dpo or reward-model: pairs, or metrics and weights."""
    argv = [str(ROOT / path), *(o.replace("{base}", str(base)) for o in overrides)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        COMMANDS[kind].main(argv)
    options = dict(o.split("=", 1) for o in overrides)
    if kind == "label":
        return {"pairs": json_lines(Path(options["out"]))}
    run = Path(options["run"])
    weights = load_file(run / "model" / "model.safetensors")
    found = {
        "rows": [timeless(row) for row in json_lines(run / "metrics.jsonl")],
        "weights_after": fingerprints(sorted(weights.items())),
    }
    if kind == "reward-model":
        found["heldout"] = json.loads((run / "heldout.json").read_text())
        saved = json.loads((run / "model" / "config.json").read_text())
        found["normalised"] = {name: saved[name] for name in ("reward_mean", "reward_std")}
    return found


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_step(base: Path, entry: dict) -> dict:
    """What the code of today makes of an entry of tests/golden/steps.json.gz."""
    if entry["kind"] == "step":
        return step(base, entry["config"], entry["overrides"], entry["noisy"])
    return command(base, entry["kind"], entry["config"], entry["overrides"])
