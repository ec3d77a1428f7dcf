"""NeMo-RL's frozen numbers, and how many comparisons with TRL, verl and NeMo-RL there are: see docs/oracles.md."""

from collections import Counter
from pathlib import Path

import test_golden_trl
import test_golden_verl
import test_golden_verl_losses
from golden.reading import DEFINED, EXACT, FLOAT32, INPUTS, NEMO, compared, label, tensor

from rlkl.advantages import dr_grpo, gae, grpo, rloo
from rlkl.kl import KL
from rlkl.rewards import token_rewards

PAGE = Path(__file__).parents[1] / "docs" / "oracles.md"
MODULES = (  # imported for what they add to DEFINED
    test_golden_trl, test_golden_verl, test_golden_verl_losses)
NAMES = {"lam": "gae_lambda", "critic": "gae_lambda_value", "policy": "gae_lambda_policy",
    "alpha": "length_adaptive_alpha", "kl": "kl_coef"}


def gae_cases() -> dict[str, dict]:
    return {f"{n}-{label(**{k: c[v] for k, v in NAMES.items()})}": c | {"input": n} for n in INPUTS for c in
        NEMO[n]["gae"]}


@compared("NeMo-RL", "advantages", gae_cases(), ["raw", "whitened", "returns"])
def test_gae(c, same):
    """A λ for the critic, VAPO's λ = 1 - 1/max(α·length, 1), which NeMo-RL takes in float32, and k1 in the reward."""
    inputs, m = INPUTS[c["input"]], INPUTS[c["input"]].mask
    lam = c["gae_lambda"] if c["gae_lambda_policy"] is None else c["gae_lambda_policy"]
    options = {"gamma": c["gamma"], "lam": lam, "lam_critic": c["gae_lambda_value"]}
    options["lam_alpha"] = c["length_adaptive_alpha"]
    kl = KL["k1"](inputs["old_log_prob"], inputs["ref_log_prob"])
    rewards = token_rewards(inputs["scores"], m) - c["kl_coef"] * kl * m
    raw, returns = gae(rewards, inputs["values"], m, whiten=False, **options)
    white, _ = gae(rewards, inputs["values"], m, **options)
    tolerance = FLOAT32 if c["length_adaptive_alpha"] else EXACT
    same("raw", raw[m], tensor(c["advantages_raw"])[m], tolerance)
    same("whitened", white, c["advantages"], tolerance)
    same("returns", returns[m], tensor(c["returns"])[m])


@compared("NeMo-RL", "advantages", {n: {"input": n, "theirs": NEMO[n]["grpo_baseline"]} for n in INPUTS},
    ["dr_grpo", "rloo", "grpo"])
def test_group_baselines(c, same):
    """score - baseline is dr_grpo, or rloo if the reply is left out; over std + 1e-6 it is grpo. A singleton's baseline
    is its own score, so it is 0 there too."""
    inputs, (everyone, others) = INPUTS[c["input"]], c["theirs"]
    assert (everyone["leave_one_out"], others["leave_one_out"]) == (False, True)
    scores, rewards = inputs["scores"], token_rewards(inputs["scores"], inputs.mask)
    centred, std = scores - tensor(everyone["baseline"]), tensor(everyone["std"])
    same("dr_grpo", inputs.grouped(dr_grpo, rewards), centred)
    same("rloo", inputs.grouped(rloo, rewards), scores - tensor(others["baseline"]))
    same("grpo", inputs.grouped(grpo, rewards), centred / (std + 1e-6))


def test_how_many_comparisons_there_are(capsys):
    """One is one case and one quantity. Each test is held to compare exactly what it declares; here is the sum of what
    is declared, whatever of it runs today, and the table of the page says the same."""
    total = sum(DEFINED.values())
    with capsys.disabled():
        by_peer = Counter()
        for (peer, _), n in DEFINED.items():
            by_peer[peer] += n
        print(f"\n{total} comparisons: " + ", ".join(f"{peer} {n}" for peer, n in by_peer.items()))
    assert total >= 1500
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page
    assert f"{total:,} comparisons" in page


def table() -> str:
    """The counts, as docs/oracles.md shows them."""
    peers, kinds = ("verl", "TRL", "NeMo-RL"), sorted({kind for _, kind in DEFINED})
    rows = [["quantity", *peers, "all"]]
    rows += [[kind, *counts, sum(counts)] for kind in kinds if (counts := [DEFINED[p, kind] for p in peers])]
    rows.append(["all", *(sum(row[i] for row in rows[1:]) for i in range(1, 5))])
    lines = ["| " + " | ".join(str(x or "") for x in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * 5 + "|", *lines[1:]])
