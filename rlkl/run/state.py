"""What changes from step to step beside weights and optimizer. It is in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlkl.kl import doubling, proportional
from rlkl.run.schema import Config


@dataclass
class State:
    kl_ref_coef: float
    kl_old_coef: float
    step: int = 0
    skips: int = 0  # updates in a row that were not finite
    best_accuracy: float = -1.0  # held out
    best_step: int | None = None
    before: dict[str, float] = field(default_factory=dict)  # held out, before the first step
    resampled: int = 0  # prompts drawn beyond N a step, by sampling.zero_variance=resample
    success: dict[str, float] = field(default_factory=dict)  # success rate by prompt index

    def adapt_kl_coefficients(
        self, cfg: Config, kl_old: float, metrics: dict[str, float], rows: int
    ) -> None:
        """Move the adaptive coefficients towards their targets, after a step.

        kl_old: nats per token, before the step's last update. metrics: of the step's updates.
        """
        if cfg.kl_old.target is not None:
            self.kl_old_coef = doubling(self.kl_old_coef, cfg.kl_old.target, kl_old)
        if cfg.kl_ref.target is not None and "kl_pi_ref_sequence" in metrics:
            kl_ref = metrics["kl_pi_ref_sequence"]
            self.kl_ref_coef = proportional(
                self.kl_ref_coef, cfg.kl_ref.target, kl_ref, rows, cfg.kl_ref.horizon
            )
