"""One whole step of GRPO, PPO and LoRA on every architecture, with rewards that vary in groups."""

import math

import pytest
import torch
from models import COMMON, CONFIGS
from runs_fixture import arguments
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import train
from rlkl.run import config
from rlkl.run.build import build
from rlkl.run.session import step_inputs
from rlkl.run.state import State
from rlkl.supervised.scratch import character_tokenizer, write

pytest_plugins = ("runs_fixture",)

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = CONFIGS | {
    "mixtral": (MixtralConfig, COMMON | {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, COMMON | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": (Qwen3MoeConfig, COMMON | EXPERTS | {"head_dim": 16}),
    # one layer of a short convolution and one of attention
    "lfm2": (
        Lfm2Config,
        COMMON | {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    ),
}
# The states of a convolution cannot be repeated yet for the samples of a group.
BACKENDS = {"lfm2": "naive"}
STEPS = {  # options, and the share of the policy's weight tensors that move at least
    "GRPO": ((), 0.9),
    "PPO": (("advantage=gae", "critic.kind=network"), 0.9),
    "LoRA": (("lora.r=4",), 0.5),  # B starts at 0, so A has no gradient yet
}
PARITY = """
def parity(examples, responses, batch):
    return (batch.response_ids[:, 0] % 2).float(), {}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{architecture: the folder of a model of random weights, large enough to matter}."""
    tokenizer = character_tokenizer()
    ids = {
        "vocab_size": len(tokenizer) + 5,  # the embedding has rows for no token
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    made = {}
    for name, (kind, options) in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(kind(**(options | ids))).eval()
            with torch.no_grad():
                for p in lm.parameters():
                    mean = 0 if p.dim() > 1 else p  # the weights of norms stay around 1
                    p.copy_(0.2 * torch.randn(p.shape) + mean)
        made[name] = write(tmp_path_factory.mktemp("models") / name, lm, tokenizer)
    return made


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_one_step_moves_every_architecture(here, folders, name, step):
    (here / "parity.py").write_text(PARITY)
    options, least_moved = STEPS[step]
    cfg = config.load(
        arguments(
            folders[name],
            "reward=parity.py:parity",
            f"sampling.backend={BACKENDS.get(name, 'engine')}",
            *options,
        )
    )
    models, algorithm, data = build(cfg, train.generate_and_score)
    before = {
        group: [p.detach().clone() for p in parameters]
        for group, parameters in models.optimizer.groups.items()
    }
    state = State(cfg.kl_ref.coef, cfg.kl_old.coef)
    inputs = step_inputs(cfg, data, state)
    metrics, _ = train.training_step(cfg, models, algorithm, data, state, *inputs)
    assert metrics["frac_reward_zero_std"] < 1
    assert metrics["sampler_gap"] < 1e-4
    moved = {}
    for group, parameters in models.optimizer.groups.items():
        norm = metrics[f"grad_norm/{group}"]
        assert math.isfinite(norm)
        assert norm > 0
        pairs = zip(parameters, before[group], strict=True)
        moved[group] = sum(not torch.equal(p, old) for p, old in pairs) / len(parameters)
    assert moved["policy"] >= least_moved
    assert min(moved.values()) > 0
