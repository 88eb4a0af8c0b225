"""Every backbone under every conversion of the paper: runs, records its bits, and passes the audit in every mode."""

import numpy as np
import pytest
import torch

from cadyq.audit import audit
from cadyq.backbones import BACKBONES, build_backbone
from cadyq.config import Quantization
from cadyq.io.models import LoadedModel
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.quant.site import sites_of
from cadyq.upscale import Model

CONVERSIONS = {
    "PAMS": {"quantizer": "pams", "bits": (8,)},
    "LinQ": {"quantizer": "linq", "bits": (8,)},
    "DAQ": {"quantizer": "daq", "bits": (4,)},
    "FQSR": {"quantizer": "lsq", "bits": (8,), "edges": "integer", "skips": True},
    "CADyQ": {"quantizer": "pams", "bits": (4, 6, 8), "dynamic": True},
    "LinQ-CADyQ": {"quantizer": "linq", "bits": (4, 6, 8), "dynamic": True, "channel_power": 0.5},
    "FQSR-CADyQ": {
        "quantizer": "lsq", "bits": (4, 6, 8), "dynamic": True, "edges": "integer", "skips": True
    },
    "odd, signed, per layer": {"bits": (2, 3, 5, 7), "dynamic": True, "unsigned": False},
    "engine's": {
        "bits": (4, 6, 8), "dynamic": True, "edges": "integer", "stream_bits": 16, "channel_power": 0.8
    },
}  # fmt: skip
SMALL = {
    "edsr": {"channels": 8, "n_blocks": 2},
    "srresnet": {"channels": 8, "n_blocks": 2, "norm": False},
}


@pytest.mark.parametrize("mode", ["tiles", "image"])
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
@pytest.mark.parametrize("name", list(BACKBONES))
def test_conversion(name, conversion, mode):
    torch.manual_seed(0)
    base = build_backbone(name, scale=2, **SMALL.get(name, {})).eval()
    config = Quantization(**{"tile": 16, **CONVERSIONS[conversion]})
    network = convert(base, config)
    calibrate(network, observe(base, [torch.rand(2, 3, 20, 20)]), config)
    for site in sites_of(network, "body"):
        if site.selector is not None:
            torch.nn.init.normal_(site.selector.linear.weight, std=2)
    model = Model(LoadedModel(network.eval(), config, None, {}), name)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 27, 3), dtype=np.uint8)
    picture[:, :10] = 90
    result = model.upscale(picture, mode=mode)
    assert result.pixels.shape == (40, 54, 3)
    assert {int(b) for bits in result.bits.values() for b in bits.ravel()} <= set(config.bits)
    assert audit(model, picture, mode=mode).is_clean


def test_everything_is_quantized_in_the_fully_quantized_form():
    base = build_backbone("idn", scale=2).eval()
    network = convert(base, Quantization(quantizer="lsq", edges="integer", skips=True))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert module.weight_bits == 8
    x = torch.rand(1, 64, 5, 6)
    difference = (network.up(x) - base.up(x)).detach().abs().max()
    assert 0 < float(difference) < 0.02
