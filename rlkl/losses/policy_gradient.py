"""Policy gradients without a clip: the importance ratio as it is, not at all, or truncated.

Members share the form -(weight) · A · (w or log pi). Nothing here ever sets a token's gradient to
zero, so what keeps pi near pi_old, if anything, is the number of updates, `kl_old`, or a cap on w.
"""

from __future__ import annotations

from rlkl.losses.clip import Loss, importance_ratio
from rlkl.types import Batch, PolicyOutput


def surrogate(new: PolicyOutput, batch: Batch) -> Loss:
    """-w A, unclipped (Schulman et al. 2017, arXiv:1707.06347, eq. 6).

    With `kl_old` it is PPO-penalty (eq. 8). The paper weights all tokens alike:
    optim.weights=token.
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    return -ratio * batch.advantages, {"ratio": ratio}


def reinforce(new: PolicyOutput, batch: Batch) -> Loss:
    """-A log pi, without a ratio (Williams 1992): unbiased for the first update of a rollout.

    optim.weights=constant gives the gradient of E[score].
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    return -batch.advantages * new.logprobs, {"ratio": ratio}


def cispo(new: PolicyOutput, batch: Batch, *, cap: float = 5.0) -> Loss:
    """-sg(min(w, cap)) A log pi (CISPO, MiniMax 2025, arXiv:2506.13585), sg = stop gradient.

    A truncated importance weight: every token keeps a gradient. `cap` bounds w itself, as in
    ScaleRL and TRL. verl clips w to [1 - low, 1 + high] instead, which also raises small w. The
    paper has optim.weights=token. The diagnostic `cap_fraction` is 1.0 where w is above the cap.
    """
    ratio = importance_ratio(new.logprobs, batch.old_logprobs)
    loss = -ratio.clamp(max=cap).detach() * batch.advantages * new.logprobs
    return loss, {"ratio": ratio, "cap_fraction": (ratio > cap).to(ratio.dtype)}
