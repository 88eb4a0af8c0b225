"""Exit (0 bits for a whole cell): which cells leave before the body and become plain bicubic.

The decision is a linear model on the logarithms of six LR statistics of the cell, fitted to the logarithm of the
error increase per pixel, against a threshold. Where an exited cell meets a computed one, the two pictures are
cross-faded over a few pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError
from cadyq.functional.image import CELL_STATISTICS, cell_statistics

__all__ = ["ExitRule"]

EPSILON = 1e-5


@dataclass(frozen=True)
class ExitRule:
    """Linear rule for leaving the network.

    Attributes:
        weights: one per statistic of :data:`cadyq.functional.image.CELL_STATISTICS`.
        bias: added to the weighted logarithms; the sum predicts log(error increase per pixel, squared grey levels).
        threshold: cells whose prediction is below it exit.
        fade: width of the cross-fade, LR pixels.
    """

    weights: tuple[float, ...]
    bias: float
    threshold: float
    fade: int = 2

    def __post_init__(self) -> None:
        if len(self.weights) != len(CELL_STATISTICS):
            raise ArgumentError("weights", self.weights, f"{len(CELL_STATISTICS)} numbers")

    def scores(self, rgb01: NDArray[Any], cell: int) -> NDArray[np.float64]:
        """Predicted log error increase of each cell of an LR picture (H, W, 3) in [0, 1]: (rows, cols)."""
        features = np.log(cell_statistics(rgb01, cell) + EPSILON)
        return np.asarray(features @ np.asarray(self.weights) + self.bias)

    def exits(self, rgb01: NDArray[Any], cell: int, shift: float = 0.0) -> NDArray[np.bool_]:
        """Which cells exit: (rows, cols). ``shift`` moves the threshold (a budget knob)."""
        return self.scores(rgb01, cell) < self.threshold + shift

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON."""
        return {
            "weights": list(self.weights),
            "bias": self.bias,
            "threshold": self.threshold,
            "fade": self.fade,
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ExitRule:
        """Inverse of :meth:`to_mapping`."""
        return cls(tuple(values["weights"]), values["bias"], values["threshold"], values["fade"])
