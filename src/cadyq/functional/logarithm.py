"""The natural logarithm, with the same result on every machine: decisions hang on it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["logarithm"]

SQRT_HALF, LN2 = 0.7071067811865476, 0.6931471805599453


def logarithm(x: NDArray[Any]) -> NDArray[Any]:
    """Natural logarithm of positive float64 values in a fixed order of operations; equation (10a).

    The libraries' own may differ in the last bit from machine to machine, and with it a choice.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < SQRT_HALF
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    exponent = exponent - small
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.full_like(t, 1.0 / 21.0)
    for k in range(19, 0, -2):
        series = series * square + 1.0 / k
    result: NDArray[Any] = exponent * LN2 + (t + t) * series
    return result
