"""Pick the numbers of TRL, verl and NeMo-RL that apply to rlkl, and write them beside this file.

    python tests/golden/freeze.py FOLDER

FOLDER has trl.json, verl.json and nemo.json: what each peer computed on fixed inputs, with junk
outside the mask. They hold numbers only; tests/test_golden_*.py read them, and docs/oracles.md says
what was left out.
"""

import gzip
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
VERL_INPUTS = (
    "log_prob",
    "old_log_prob",
    "rollout_log_prob",
    "ref_log_prob",
    "values",
    "vpreds",
    "returns",
    "advantages",
    "seq_advantages",
    "scores",
    "outcome_rewards",
    "dense_rewards",
    "response_mask",
    "groups",
    "rollout_is_weights",
    "reward_baselines",
)
VERL_POLICY = ("loss", "agg", "config", "advantages", "is_weights", "value", "grad")
VERL_OF_THE_GROUP = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "gdpo")
VERL_KL = ("k1", "k2", "k3", "k1+", "k2+", "k3+")
VERL_METRICS = (
    "critic/advantages/mean",
    "critic/vf_explained_var",
    "critic/score/mean",
    "response_length/mean",
    "response_length/clip_ratio",
)
CORRECTION = ("rollout_is", "rollout_rs", "threshold", "batch_normalize", "weights", "mask")
CORRECTION_METRICS = (
    "rollout_corr/kl",
    "rollout_corr/k3_kl",
    "rollout_corr/rollout_rs_masked_fraction",
)
REJECTIONS = ("token_k1", "seq_sum_k1", "seq_mean_k1")
HEADS = (
    "hidden",
    "weight",
    "labels",
    "temperature",
    "grad_logprob",
    "grad_entropy",
    "logprob",
    "entropy",
    "grad_hidden",
    "grad_weight",
)
TRL_METRICS = (
    "kl",
    "clip_ratio/region_mean",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "cispo_clip_ratio",
    "policy_loss",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
)
TRL_BATCH = (
    "logps",
    "old_logps",
    "sampling_logps",
    "ref_logps",
    "entropies",
    "mask",
    "advantages",
    "num_items_in_batch",
)
SAME_FOR_ALL = ("std_eps", "std_unbiased")  # of advantages: 1e-4 and Bessel


def rounded(x: object, digits: int = 13) -> object:
    """Floats to 13 significant digits, far below the tolerance of 1e-9."""
    if isinstance(x, float):
        return float(f"{x:.{digits}g}")
    if isinstance(x, dict):
        return {k: rounded(v, digits) for k, v in x.items()}
    return [rounded(v, digits) for v in x] if isinstance(x, list) else x


def keys(x: dict, *names: str) -> dict:
    """The entries of x with these names, as far as it has them."""
    return {n: x[n] for n in names if n in x}


def without(x: dict, *names: str) -> dict:
    return {n: v for n, v in x.items() if n not in names}


def metrics(c: dict, names: tuple[str, ...]) -> dict:
    return {"metrics": keys(c["metrics"], *names)}


def verl_policy(c: dict) -> dict:
    """A case of a policy loss. Metrics depend on neither aggregation nor importance weights.

    So they are kept once for each loss.
    """
    one_aggregation = c["loss"] in ("gspo", "geo_mean")
    if c["is_weights"] or (c["agg"] != "token-mean" and not one_aggregation):
        return keys(c, *VERL_POLICY)
    return keys(c, *VERL_POLICY) | metrics(c, ("actor/pg_clipfrac", "actor/pg_clipfrac_lower"))


def verl(data: dict) -> dict:
    """Losses, KL, advantages, aggregation, mismatch correction, log-probs, the KL controller."""
    results = data["results"]
    frozen = {"inputs": {}, "results": {}}
    for name in ("padded", "edge"):
        result = results[name]
        frozen["inputs"][name] = keys(data["inputs"][name], *VERL_INPUTS)
        advantages = {
            n: x["advantages"]
            for n, x in result["advantages"].items()
            if n != "gae" and "advantages" in x
        }
        group = {  # one number per response
            n: [row[0] for row in x]
            for n, x in advantages.items()
            if n.startswith(VERL_OF_THE_GROUP)
        }
        frozen["results"][name] = {
            "policy_loss": [verl_policy(c) for c in result["policy_loss"]],
            "value_loss": [without(c, "clipfrac") for c in result["value_loss"]],
            "kl": keys(result["kl_penalty"], *VERL_KL),
            "gae": result["advantages"]["gae"],
            "group": group,
            "credit": {
                n: x for n, x in advantages.items() if n.startswith(("reinforce_", "remax"))
            },
            "aggregation": result["agg_loss"],
            "whitened": result["masked_utils"]["masked_whiten"],
            "correction": [
                keys(c, *CORRECTION) | metrics(c, CORRECTION_METRICS)
                for c in result["rollout_correction"]
                if c.get("rollout_rs", "token_k1") in REJECTIONS
            ],
            "bypass": [
                keys(c, "rollout_correction", "agg", "value", "grad")
                for c in result.get("bypass_mode", [])
            ],
            "kl_in_reward": [without(c, "metrics") for c in result["kl_in_reward"]],
            "metrics": keys(result["data_metrics"]["metrics"], *VERL_METRICS),
        }
    global_results = results["global"]
    validation = global_results["validation"]
    accuracies = {
        n: x
        for n, x in validation["result"]["gsm8k"]["acc"].items()
        if n.endswith("mean") or n.startswith("mean@")
    }
    return frozen | {
        "adaptive_kl": global_results["adaptive_kl"],
        "logprob": [keys(c, *HEADS) for c in global_results["token_logprob"]],
        "overlong": global_results["dapo_overlong"],
        "validation": {"right": validation["acc"], "acc": accuracies},
    }


def trl(data: dict) -> dict:
    """GRPO's and RLOO's losses and advantages, log-probs with their gradients, and all of PPO."""
    ppo = data["ppo"]
    return {
        "defaults": data["meta"]["config_defaults"],
        "batches": {n: keys(b, *TRL_BATCH) for n, b in data["batches"].items()},
        "losses": trl_grpo_losses(data),
        "advantages": [
            keys(c, "id", "rewards_per_func", "advantages_f32")
            | metrics(c, TRL_METRICS)
            | {"config": without(c["config"], *SAME_FOR_ALL)}
            for c in data["grpo_advantage_cases"]
        ],
        "rloo": trl_rloo(data),
        **trl_logprobs(data["logprob"]),
        "ppo": trl_ppo_losses(ppo),
        "gae": keys(ppo["inputs"], "logprobs", "ref_logprobs", "scores")
        | {"cases": [without(c, "non_score_reward") for c in ppo["gae_cases"]]},
        "whitened": keys(
            ppo["helpers"], "values", "mask", "masked_whiten", "masked_whiten_keep_mean"
        ),
    }


def trl_grpo_losses(data: dict) -> list[dict]:
    names = ("id", "batch", "loss", "grad_logps", "grad_entropies", "importance_sampling_ratio")
    default = data["meta"]["config_defaults"]
    return [
        keys(c, *names)
        | {"config": {k: v for k, v in c["config"].items() if v != default[k]}}
        | metrics(c, TRL_METRICS)
        for c in data["grpo_loss_cases"]
    ]


def trl_rloo(data: dict) -> dict:
    rloo = data["rloo"]
    inputs = keys(
        rloo,
        "advantage_rewards",
        "advantage_logps_f32",
        "advantage_ref_logps_f32",
        "advantage_lens",
    )
    return inputs | {
        "losses": [
            keys(c, "batch", "config", "loss", "grad_logps") | metrics(c, TRL_METRICS)
            for c in rloo["loss_cases"]
            if c["batch"] in data["batches"]
        ],
        "advantages": [
            keys(c, "config", "advantages_f32") | metrics(c, TRL_METRICS)
            for c in rloo["advantage_cases"]
        ],
    }


def trl_logprobs(heads: dict) -> dict:
    """From logits, and from hidden states and an unembedding."""
    chunked = keys(
        heads["chunked_lm_head"],
        "hidden_f32",
        "weight_f32",
        "bias_f32",
        "targets",
        "upstream_logp",
        "upstream_entropy",
        "cases",
    )
    return {
        "logprob": keys(heads, "logits", "index", "row_mask", "upstream_logp", "upstream_entropy")
        | {"cases": [without(c, "selective_log_softmax") for c in heads["cases"]]},
        "heads": rounded(chunked, 9),
    }


def trl_ppo_losses(ppo: dict) -> dict:
    names = ("config", "pg_loss", "vf_loss", "loss", "pg_clipfrac", "grad_new_logprobs")
    inputs = ppo["loss_inputs"] | keys(ppo["inputs"], "new_logprobs", "vpred")
    return inputs | {"cases": [keys(c, *names, "grad_vpred") for c in ppo["loss_cases"]]}


def nemo(data: dict) -> dict:
    """GAE with a λ for the critic or for each length, a KL in the reward, and group baselines."""
    return {name: keys(result, "gae", "grpo_baseline") for name, result in data["results"].items()}


def main(folder: Path) -> None:
    raw = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("trl", "verl", "nemo")
    }
    assert raw["nemo"]["inputs"] == raw["verl"]["inputs"]
    total = 0
    for name, pick in (("trl", trl), ("verl", verl), ("nemo", nemo)):
        frozen = {"torch": raw[name]["meta"]["torch"], **rounded(pick(raw[name]))}
        packed = gzip.compress(json.dumps(frozen, separators=(",", ":")).encode(), 9, mtime=0)
        (HERE / f"{name}.json.gz").write_bytes(packed)
        total += len(packed)
    print(f"{total / 1000:.0f} kB in {HERE}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/golden/freeze.py FOLDER, which has trl, verl and nemo.json")
    main(Path(sys.argv[1]))
