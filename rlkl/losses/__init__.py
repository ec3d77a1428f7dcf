"""Policy losses by family, the value loss, and the weights of tokens in the sum.

    clip.py             PPO, GRPO, DAPO: the clipped surrogate. Start here.
    value.py            the critic's loss
    weights.py          denominators; correction for a sampler that is not the trainer
    policy_gradient.py  no clip: surrogate, reinforce, cispo
    sequence.py         the ratio of the whole response: gspo, gmpo, topr, vespo
    gated.py            smooth trust regions: sapo, spo
    divergence.py       masks by probability: dppo_tv, dppo_kl
    selected.py         a few tokens treated differently: top_entropy, clip_cov, kl_cov
    selectors.py        which tokens those are

A policy loss is `loss(new, batch, **options) -> (B, T) loss, {name: (B, T)} diagnostics`. Its
keyword-only arguments are its options in YAML. It is one term of the objective and nothing else: no
value loss, no entropy bonus and no KL (train.py adds those), no division by a token count, no
comparison of rows. To add your own: a function like these in any file, and
`loss.name=file.py:function`.
"""

from rlkl.losses.clip import Loss, clip, clipped_surrogate, clipped_tokens, importance_ratio
from rlkl.losses.divergence import dppo_kl, dppo_tv
from rlkl.losses.gated import sapo, spo
from rlkl.losses.policy_gradient import cispo, reinforce, surrogate
from rlkl.losses.selected import clip_cov, kl_cov, top_entropy
from rlkl.losses.selectors import SELECTORS
from rlkl.losses.sequence import gmpo, gspo, topr, vespo
from rlkl.losses.value import value_loss
from rlkl.losses.weights import accepted, token_weights, truncated_importance_weights

LOSSES = {
    "clip": clip,
    "surrogate": surrogate,
    "reinforce": reinforce,
    "cispo": cispo,
    "gspo": gspo,
    "gmpo": gmpo,
    "topr": topr,
    "vespo": vespo,
    "sapo": sapo,
    "spo": spo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "top_entropy": top_entropy,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}

__all__ = [
    "LOSSES",
    "SELECTORS",
    "Loss",
    "accepted",
    "clip",
    "clipped_surrogate",
    "clipped_tokens",
    "importance_ratio",
    "token_weights",
    "truncated_importance_weights",
    "value_loss",
]
