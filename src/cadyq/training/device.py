"""Where training runs: placement, number format, compilation, and crops that stay on an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cadyq.data.crops import CropArrays, Place
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.quant.site import sites_of

__all__ = ["Device", "ResidentCrops"]

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Device:
    """A device and how it computes. The CPU in float32 is bit-identical from run to run; nothing else need be.

    Attributes:
        name: as torch names it: ``cpu``, ``cuda``, ``cuda:1``, ...
        precision: ``float32``; ``tf32`` (CUDA: ten bits of mantissa inside convolutions); ``bfloat16`` (autocast,
            for networks without quantizers only: eight bits of mantissa cannot hold the levels that quantizers
            round to, so that quantized networks run as with ``tf32``).
        compile: hand the network to ``torch.compile``. It pays for float networks; sites with selectors branch on
            values and break the graph.
    """

    name: str = "cpu"
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "tf32", "bfloat16"):
            raise ArgumentError("precision", self.precision, "float32, tf32 or bfloat16")
        try:
            kind = torch.device(self.name).type
        except RuntimeError as error:
            raise ArgumentError(
                "device", self.name, "a torch device such as cpu or cuda", str(error)
            ) from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(
                f"device is {self.name!r}, but torch finds no CUDA device; use device = cpu"
            )

    @property
    def is_cpu(self) -> bool:
        return torch.device(self.name).type == "cpu"

    def place(self, network: nn.Module) -> None:
        """Move a network here in place, with channels last off the CPU (our CPU kernels take either)."""
        network.to(self.name)
        if not self.is_cpu:
            torch.backends.cuda.matmul.allow_tf32 = self.precision != "float32"
            torch.backends.cudnn.allow_tf32 = self.precision != "float32"
            torch.backends.cudnn.benchmark = True
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(self, network: nn.Module) -> AbstractContextManager[object]:
        """Mixed precision for this network's forward pass, where it has no quantizers."""
        if self.precision != "bfloat16" or any(s.quantizer is not None for s in sites_of(network)):
            return nullcontext()
        return torch.autocast(torch.device(self.name).type, torch.bfloat16)

    def tensor(self, pictures: object) -> Tensor:
        """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1] on this device, channels last in memory."""
        raw = torch.from_numpy(np.array(pictures))
        return raw.to(self.name, non_blocking=True).permute(0, 3, 1, 2).float() / 255


class ResidentCrops:
    """Crops held on a device as uint8, from which patches are cut there: 0.7 GB for 1,508 crops of 384x384."""

    def __init__(self, crops: CropArrays, device: Device) -> None:
        self.scale = crops.hr.shape[1] // crops.lr.shape[1]
        self.lr, self.hr = (torch.from_numpy(np.array(a)).to(device.name) for a in crops)

    def cut(self, places: Sequence[Place], patch: int) -> tuple[Tensor, Tensor]:
        """Patches as `PairedCrops.cut` gives them, as float (N, 3, h, w) and (N, 3, H, W) in [0, 1]."""
        return self._cut(self.lr, places, patch, 1), self._cut(self.hr, places, patch, self.scale)

    def _cut(self, images: Tensor, places: Sequence[Place], patch: int, factor: int) -> Tensor:
        side = patch * factor
        parts = []
        for i, y, x, pose in places:
            part = images[i, factor * y : factor * y + side, factor * x : factor * x + side]
            part = part.flip(1) if pose >= 4 else part
            parts.append(torch.rot90(part, pose % 4, (0, 1)))
        return torch.stack(parts).permute(0, 3, 1, 2).float() / 255
