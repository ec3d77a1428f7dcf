"""NeMo-RL's frozen numbers, and how many comparisons there are with all peers: docs/oracles.md."""

from collections import Counter
from pathlib import Path

import pytest
import test_golden_trl
import test_golden_verl
import test_golden_verl_losses
from golden.reading import DEFINED, EXACT, FLOAT32, INPUTS, NEMO, compared, label, tensor

from rlkl.advantages import dr_grpo, gae, grpo, rloo, token_rewards
from rlkl.kl import KL

PAGE = Path(__file__).parents[1] / "docs" / "oracles.md"
PEERS = ("verl", "TRL", "NeMo-RL")
MODULES = (test_golden_trl, test_golden_verl, test_golden_verl_losses)  # they add to DEFINED
SHORT_NAMES = {
    "lam": "gae_lambda",
    "critic": "gae_lambda_value",
    "policy": "gae_lambda_policy",
    "alpha": "length_adaptive_alpha",
    "kl": "kl_coef",
}


def gae_cases() -> dict[str, dict]:
    cases = {}
    for name in INPUTS:
        for case in NEMO[name]["gae"]:
            options = label(**{short: case[long] for short, long in SHORT_NAMES.items()})
            cases[f"{name}-{options}"] = case | {"input": name}
    return cases


@compared("NeMo-RL", "advantages", gae_cases(), ["raw", "whitened", "returns"])
def test_gae(case, same):
    """A λ for the critic, VAPO's λ = 1 - 1/max(α·length, 1), and k1 in the reward.

    NeMo-RL computes VAPO's λ in float32.
    """
    inputs = INPUTS[case["input"]]
    mask = inputs.mask
    lam = case["gae_lambda"] if case["gae_lambda_policy"] is None else case["gae_lambda_policy"]
    options = {
        "gamma": case["gamma"],
        "lam": lam,
        "lam_critic": case["gae_lambda_value"],
        "lam_alpha": case["length_adaptive_alpha"],
    }
    kl = KL["k1"](inputs["old_log_prob"], inputs["ref_log_prob"])
    rewards = token_rewards(inputs["scores"], mask) - case["kl_coef"] * kl * mask
    raw, returns = gae(rewards, inputs["values"], mask, whiten=False, **options)
    whitened, _ = gae(rewards, inputs["values"], mask, **options)
    tolerance = FLOAT32 if case["length_adaptive_alpha"] else EXACT
    same("raw", raw[mask], tensor(case["advantages_raw"])[mask], tolerance)
    same("whitened", whitened, case["advantages"], tolerance)
    same("returns", returns[mask], tensor(case["returns"])[mask])


BASELINES = {name: {"input": name, "theirs": NEMO[name]["grpo_baseline"]} for name in INPUTS}


@compared("NeMo-RL", "advantages", BASELINES, ["dr_grpo", "rloo", "grpo"])
def test_group_baselines(case, same):
    """score - baseline is dr_grpo, or rloo if the response is left out; over std + 1e-6 it is grpo.

    The baseline of a group of one is its own score, so it is 0 in NeMo-RL too.
    """
    inputs = INPUTS[case["input"]]
    everyone, others = case["theirs"]
    assert not everyone["leave_one_out"]
    assert others["leave_one_out"]
    scores, rewards = inputs["scores"], token_rewards(inputs["scores"], inputs.mask)
    centred, std = scores - tensor(everyone["baseline"]), tensor(everyone["std"])
    same("dr_grpo", inputs.grouped(dr_grpo, rewards), centred)
    same("rloo", inputs.grouped(rloo, rewards), scores - tensor(others["baseline"]))
    same("grpo", inputs.grouped(grpo, rewards), centred / (std + 1e-6))


def test_a_failure_names_every_case_and_quantity_that_fails():
    """The harness: a wrong number, and a comparison that was declared but not made."""
    declared = dict(DEFINED)

    @compared("NeMo-RL", "none", {"good": {"x": 1.0}, "bad": {"x": 2.0}, "lost": {}}, ["x"])
    def check(case, same):
        if case:
            same("x", case["x"], 1.0)

    DEFINED.clear()
    DEFINED.update(declared)
    with pytest.raises(AssertionError) as error:
        check()
    message = str(error.value)
    assert "case bad: x: " in message
    assert "case lost: compared []" in message
    assert "case good" not in message


def test_how_many_comparisons_there_are(capsys):
    """docs/oracles.md states the number of comparisons. One is one case and one quantity.

    Each test compares exactly what it declares, so the declarations can be counted, whichever tests
    run today.
    """
    total = sum(DEFINED.values())
    by_peer = Counter()
    for (peer, _), count in DEFINED.items():
        by_peer[peer] += count
    with capsys.disabled():
        print(f"\n{total} comparisons: " + ", ".join(f"{p} {n}" for p, n in by_peer.items()))
    assert total == 2968, "a comparison was lost or added: change docs/oracles.md too"
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page
    assert f"{total:,} comparisons" in page
    for peer, count in by_peer.items():
        assert f"{count:,} with {peer}" in page


def table() -> str:
    """The counts, as docs/oracles.md shows them."""
    rows = [["quantity", *PEERS, "all"]]
    for quantity in sorted({quantity for _, quantity in DEFINED}):
        counts = [DEFINED[peer, quantity] for peer in PEERS]
        rows.append([quantity, *counts, sum(counts)])
    totals = [sum(row[i] for row in rows[1:]) for i in range(1, 5)]
    rows.append(["all", *totals])
    lines = ["| " + " | ".join(str(x or "") for x in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * 5 + "|", *lines[1:]])
