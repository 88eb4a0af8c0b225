"""Mean bits to the knob that reaches them: a table in the model file, measured on training crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cadyq.errors import ArgumentError

__all__ = ["budget_for"]


def budget_for(table: Sequence[tuple[float, float]], target_fqr: float) -> float:
    """The ``budget`` (see `cadyq.Model.upscale`) with which a model's mean bits were ``target_fqr``.

    Args:
        table: pairs (FQR, budget) as ``LoadedModel.budgets`` has them, in any order.
        target_fqr: mean bits over sites and tiles; pictures like the training crops reach it on average, a picture
            of its own kind has its own.

    Raises:
        ArgumentError: an empty table, or a target outside of it.
    """
    if not table:
        raise ArgumentError("target_fqr", target_fqr, "a model with a table of budgets", "use budget instead")
    fqr, knob = np.array(sorted(table), np.float64).T
    if not fqr[0] <= target_fqr <= fqr[-1]:
        raise ArgumentError("target_fqr", target_fqr, f"{fqr[0]:.2f} to {fqr[-1]:.2f} for this model")
    return float(np.interp(target_fqr, fqr, knob))
