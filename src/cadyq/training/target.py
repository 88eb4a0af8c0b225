"""A mean bit-width as the goal, instead of a weight that happens to lead there.

Minimising L1 under the constraint FQR = target is done as usual, by an augmented Lagrangian: the bit loss has the
weight lambda + rho * (FQR - target), and lambda grows by a share of rho * (FQR - target) with every step. In words:
a proportional-integral controller, whose weight may become negative, so that bits are given back where they were
taken too fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cadyq.errors import CheckpointError

__all__ = ["BitController"]


class BitController:
    """Weight of the bit loss per site and patch, in gray levels per unit of log-bits.

    Args:
        target: FQR to reach.
        proportional: rho, gray levels per bit of deviation.
        integral: share of the proportional term that is added to lambda with every step.
        smoothing: decay of the running mean of the measured FQR: one batch's mean is noisy.
        limit: largest weight of either sign, so that a selector that cannot follow does not wind lambda up.
    """

    def __init__(
        self,
        target: float,
        *,
        proportional: float = 2.0,
        integral: float = 0.02,
        smoothing: float = 0.8,
        limit: float = 8.0,
    ) -> None:
        self.target = target
        self.proportional = proportional
        self.integral = integral
        self.smoothing = smoothing
        self.limit = limit
        self.multiplier = 0.0
        self.fqr: float | None = None

    def weight(self) -> float:
        """Weight for the next step."""
        error = 0.0 if self.fqr is None else self.fqr - self.target
        return self._bounded(self.multiplier + self.proportional * error)

    def observe(self, fqr: float) -> None:
        """Take the mean bits of the last batch into account."""
        self.fqr = fqr if self.fqr is None else self.smoothing * self.fqr + (1 - self.smoothing) * fqr
        error = self.fqr - self.target
        self.multiplier = self._bounded(self.multiplier + self.integral * self.proportional * error)

    def _bounded(self, value: float) -> float:
        return max(-self.limit, min(self.limit, value))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"multiplier": self.multiplier, "fqr": self.fqr}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        try:
            self.multiplier, self.fqr = float(state["multiplier"]), state["fqr"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the controller's state is {state!r}, expected what state() gave"
            ) from error
