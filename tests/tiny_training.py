"""A tiny dynamic network and crops to train it on, for tests of training."""

from __future__ import annotations

import numpy as np
import torch

from cadyq.backbones import Backbone, build_backbone
from cadyq.config import Quantization
from cadyq.data.crops import CropArrays
from cadyq.functional.resize import downscale
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.training.loop import to_tensor

torch.set_num_threads(1)  # more of them would wait for each other on networks this small


def crops(n: int = 4) -> CropArrays:
    """Half flat, half textured pictures."""
    rng = np.random.default_rng(0)
    hr = np.full((n, 96, 96, 3), 128, np.uint8)
    hr[:, :, 48:] = rng.integers(0, 256, (n, 96, 48, 3), dtype=np.uint8)
    return CropArrays(np.stack([downscale(h, 2) for h in hr]), hr)


def network(seed: int = 0, **kw: object) -> Backbone:
    torch.manual_seed(seed)
    base = build_backbone("edsr", scale=2, channels=8, n_blocks=2).eval()
    config = Quantization(bits=(2, 4, 8), dynamic=True, **kw)  # type: ignore[arg-type]
    result = convert(base, config)
    calibrate(result, observe(base, [to_tensor(crops().lr)]), config)
    return result


def weights(net: Backbone) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]
