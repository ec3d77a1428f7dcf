"""Pick the numbers of TRL, verl and NeMo-RL that apply to what is here, and write them small beside this file.

python tests/golden/freeze.py FOLDER, where FOLDER has trl.json, verl.json and nemo.json: what they computed on fixed
inputs, masked positions holding garbage on purpose. Numbers only; tests/test_golden.py says how they are read.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
TRL_LOSSES = (0, 1, 4, 6, 18, 22, 36, 37, 40, 54, 55, 58, 118, 124, 127, 139, 160, 166, 176, 187, 190)
TRL_LOSSES += (9, 72, 73, 84, 202, 223)  # gspo, cispo, sapo
TRL_OPTIONS = ("loss_type", "beta", "epsilon", "epsilon_high", "entropy_coef", "max_completion_length", "grad_accum")
TRL_OPTIONS += ("importance_sampling_level",)
TRL_ADVANTAGES = ("adv000", "adv002", "adv004", "adv006", "adv008", "adv014", "adv016", "adv020")
VERL_GAE = ((1.0, 1.0, "dense_rewards"), (1.0, 0.95, "dense_rewards"), (0.99, 0.95, "outcome_rewards"))
VERL_GAE += ((0.9, 0.5, "outcome_rewards"), (0.9, 0.0, "dense_rewards"))
VERL_INPUTS = ("log_prob", "old_log_prob", "ref_log_prob", "values", "vpreds", "returns", "advantages", "scores")
VERL_INPUTS += ("outcome_rewards", "dense_rewards", "response_mask", "groups", "seq_advantages", "reward_baselines")
VERL_LOSSES = ("gspo", "sapo", "gpg", "geo_mean", "cispo", "dppo_tv", "dppo_kl")
VERL_AGGREGATED = {"gpg": ("token-mean",), "geo_mean": ("seq-mean-token-mean",), "gspo": ("seq-mean-token-mean",)}
VERL_AGGREGATED |= {"sapo": ("seq-mean-token-mean",)}  # the others in two ways
VERL_KEPT = ("loss", "agg", "config", "advantages", "value", "grad")


def short(x: object) -> object:
    """Floats to 13 digits, far below the tolerance of 1e-9."""
    if isinstance(x, float):
        return float(f"{x:.13g}")
    if isinstance(x, dict):
        return {k: short(v) for k, v in x.items()}
    return [short(v) for v in x] if isinstance(x, list) else x


def keys(x: dict, *names: str) -> dict:
    return {n: x[n] for n in names}


def only(cases: list[dict], **wanted: object) -> list[dict]:
    return [c for c in cases if all(c[k] == v for k, v in wanted.items())]


def wanted(c: dict) -> bool:
    """One or two aggregations of each loss; A by token, and for GMPO by reply too; of CISPO the one-sided clip."""
    aggregations = VERL_AGGREGATED.get(c["loss"], ("token-mean", "seq-mean-token-mean"))
    by_token = c["advantages"] == "advantages" or c["loss"] == "geo_mean"
    one_sided = c["loss"] != "cispo" or c["config"].get("clip_ratio_low", 0) > 1
    return c["loss"] in VERL_LOSSES and c["agg"] in aggregations and by_token and one_sided and not c["is_weights"]


def verl(data: dict) -> dict:
    """Advantages, the (dual-)clipped surrogate, other policy losses, value loss, k1 k2 k3, aggregation, controller."""
    frozen = {"inputs": {}, "results": {}, "adaptive_kl": data["results"]["global"]["adaptive_kl"]}
    for name, result in ((n, data["results"][n]) for n in ("padded", "edge")):
        frozen["inputs"][name] = keys(data["inputs"][name], *VERL_INPUTS)
        surrogates = only(result["policy_loss"], loss="vanilla", advantages="advantages", is_weights=False)
        surrogates = [c for c in surrogates if c["config"].get("clip_ratio_c") != 1.5]
        gae = [c for c in result["advantages"]["gae"] if (c["gamma"], c["lam"], c["rewards"]) in VERL_GAE]
        group = {n: result["advantages"][n]["advantages"] for n in ("grpo", "dr_grpo(no std)", "rloo", "opo")}
        credit = {n: x["advantages"] for n, x in result["advantages"].items() if n.startswith(("reinforce_", "remax"))}
        frozen["results"][name] = {
            "gae": gae,
            "group": {n: [row[0] for row in rows] for n, rows in group.items()},  # one number a reply
            "credit": credit,
            "losses": [keys(c, *VERL_KEPT) for c in result["policy_loss"] if wanted(c)],
            "surrogate": [
                keys(c, "agg", "config", "value", "grad") for c in surrogates if c["agg"] != "seq-mean-token-sum"
            ],
            "value": [
                keys(c, "agg", "cliprange_value", "value", "grad")
                for c in result["value_loss"]
                if c["agg"] == "token-mean" or c["cliprange_value"] == 0.2
            ],
            "kl": {n: result["kl_penalty"][n] for n in ("k1", "k2", "k3")},
            "kl_in_reward": {
                c["kl_penalty"]: c["token_level_rewards"]
                for c in result["kl_in_reward"]
                if c["controller"] == "FixedKLController"
            }
            if "kl_in_reward" in result
            else {},
            "aggregation": {n: v for n, v in result["agg_loss"].items() if "|" not in n},
            "whitened": result["masked_utils"]["masked_whiten"],
        }
    return frozen


def trl(data: dict) -> dict:
    """GRPO's and other losses with their gradients, group advantages, RLOO with a KL in the reward, and all of PPO."""
    losses = [c for c in data["grpo_loss_cases"] if int(c["id"]) in TRL_LOSSES]
    kept = ("loss", "grad_logps")
    batch = ("logps", "old_logps", "ref_logps", "entropies", "mask", "advantages")
    ppo, rloo = data["ppo"], data["rloo"]
    gae = [c for c in ppo["gae_cases"] if c["config"]["kl_estimator"] == "k1" and not c["config"]["whiten_rewards"]]
    return {
        "batches": {n: keys(data["batches"][n], *batch) for n in ("offpolicy", "masked_rows")},
        "losses": [
            keys(c, "id", "batch", *kept)
            | {"config": keys(c["config"], *TRL_OPTIONS, "num_items_in_batch")}
            | ({"grad_entropies": c["grad_entropies"]} if "grad_entropies" in c else {})
            for c in losses
        ],
        "advantages": [
            keys(c, "rewards_per_func", "advantages_f32") | keys(c["config"], "scale_rewards", "num_generations")
            for c in data["grpo_advantage_cases"]
            if c["id"] in TRL_ADVANTAGES
        ],
        "rloo": keys(rloo, "advantage_rewards", "advantage_logps_f32", "advantage_ref_logps_f32", "advantage_lens")
        | {
            "cases": [
                keys(c["config"], "beta", "num_generations") | keys(c, "advantages_f32")
                for c in rloo["advantage_cases"]
                if not c["config"]["normalize_advantages"] and c["config"]["reward_clip_range"] is None
            ]
        },
        "ppo": ppo["loss_inputs"]
        | keys(ppo["inputs"], "new_logprobs", "vpred")
        | {
            "cases": [
                keys(c, "config", "pg_loss", "vf_loss", "loss", "pg_clipfrac", "grad_new_logprobs", "grad_vpred")
                for c in ppo["loss_cases"]
            ]
        },
        "gae": {"padding_mask": gae[0]["padding_mask"], "padding_mask_p1": gae[0]["padding_mask_p1"]}
        | {
            "cases": [
                keys(c["config"], "gamma", "lam")
                | keys(c, "rewards", "values", "advantages_before_whitening", "advantages", "returns")
                for c in gae
            ]
        },
    }


def nemo(data: dict) -> dict:
    """GAE with a λ of its own for the critic or for each length, and group baselines; the inputs are verl's."""
    frozen = {}
    for name, result in data["results"].items():
        gae = only(result["gae"], length_adaptive_alpha=0.0, kl_coef=0.0)
        kept = (
            "gamma",
            "gae_lambda",
            "gae_lambda_value",
            "gae_lambda_policy",
            "advantages",
            "advantages_raw",
            "returns",
        )
        adaptive = [c for c in only(result["gae"], kl_coef=0.0) if c["length_adaptive_alpha"] > 0]
        frozen[name] = {
            "gae": [keys(c, *kept) for c in gae],
            "adaptive": [keys(c, "length_adaptive_alpha", "advantages_raw") for c in adaptive],
            "baselines": result["grpo_baseline"],
        }
    return frozen


def main(folder: Path) -> None:
    raw = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("trl", "verl", "nemo")}
    assert raw["nemo"]["inputs"] == raw["verl"]["inputs"]
    total = 0
    for name, pick in (("trl", trl), ("verl", verl), ("nemo", nemo)):
        frozen = {"torch": raw[name]["meta"]["torch"], **short(pick(raw[name]))}
        text = json.dumps(frozen, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n")
        total += len(text)
    print(f"{total / 1000:.0f} kB in {HERE}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/golden/freeze.py FOLDER (with trl.json, verl.json and nemo.json)")
    main(Path(sys.argv[1]))
