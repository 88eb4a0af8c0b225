"""Image super-resolution that spends bits only where an image needs them.

>>> import cadyq
>>> "load" in cadyq.__all__
True

``cadyq.load()`` gives a `Model`, ``model.upscale(image)`` a `Result`. Names are imported when they are first
used: importing the package takes no time and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadyq.config import Quantization
    from cadyq.errors import (
        ArgumentError,
        CadyqError,
        CheckpointError,
        DataError,
        ImageError,
        MissingExtraError,
        UnsupportedError,
    )
    from cadyq.functional.fidelity import psnr_y, ssim_y
    from cadyq.functional.resize import imresize
    from cadyq.io.images import Picture, read_image, write_image
    from cadyq.upscale import Model, Result, load

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CadyqError",
    "CheckpointError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "Model",
    "Picture",
    "Quantization",
    "Result",
    "UnsupportedError",
    "__version__",
    "imresize",
    "load",
    "psnr_y",
    "read_image",
    "ssim_y",
    "write_image",
]

_HOMES = {
    "Model": "upscale",
    "Picture": "io.images",
    "Quantization": "config",
    "Result": "upscale",
    "imresize": "functional.resize",
    "load": "upscale",
    "psnr_y": "functional.fidelity",
    "read_image": "io.images",
    "ssim_y": "functional.fidelity",
    "write_image": "io.images",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cadyq' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"cadyq.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
