"""Curves and sample pictures for TensorBoard, an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import MissingExtraError

__all__ = ["Board"]


class Board:
    """Writes event files to a folder. Raises `MissingExtraError` without TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                'TensorBoard is not installed; pip install "cadyq[tensorboard]", or train without it'
            ) from error
        self._writer: Any = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Add a picture, uint8 (H, W, 3)."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not yet on the disk."""
        self._writer.close()
