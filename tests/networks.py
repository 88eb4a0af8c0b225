"""Small converted networks with random weights: fast, and as hard on the code as a trained one."""

from pathlib import Path

import numpy as np

from cadyq.config import Quantization

QUANTIZATION = Quantization(
    bits=(4, 6, 8), dynamic=True, edges="integer", stream_bits=16, channel_power=0.8, tile=16
)

SMALL = {
    "srresnet": {"n_blocks": 2, "norm": False, "keras": True},
    "edsr": {"n_blocks": 2},
    "idn": {"n_blocks": 2, "d": 4},
    "carn": {},
}


def scene(height, width, seed=0):
    """A picture with smooth, flat and busy parts, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = 60 + 100 * y / max(height, 2) + 40 * np.sin(x / 17)
    noise = rng.normal(0, 40, (height, width, 3)) * (x > width / 2)[..., None]
    checks = 50 * ((x // 2 + y // 3) % 2) * (y > height / 2)
    return (smooth[..., None] + checks[..., None] + noise).clip(0, 255).astype(np.uint8)


def build_network(backbone, quantization=QUANTIZATION, seed=0, **config):
    """A calibrated network of few blocks and 16 channels whose selectors spread over all candidates."""
    import torch

    from cadyq.backbones import build_backbone
    from cadyq.quant.convert import calibrate, convert, observe
    from cadyq.quant.site import sites_of

    torch.manual_seed(seed)
    network = build_backbone(backbone, **{"scale": 4, "channels": 16, **SMALL[backbone], **config}).eval()
    if quantization is None:
        return network
    crops = [scene(24, 24, seed=k) for k in range(4)]
    lr = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    result = convert(network, quantization).eval()
    calibrate(result, observe(network, [lr]), quantization)
    for site in sites_of(result, "body"):
        if site.selector is not None:
            torch.nn.init.normal_(site.selector.linear.weight)
            torch.nn.init.normal_(site.selector.linear.bias, std=0.3)
    return result


def save_network(path, backbone, quantization=QUANTIZATION, **options):
    """Write such a network as a model file, and return its path."""
    from cadyq.io.models import save_model

    rule = options.pop("exit_rule", None)
    network = build_network(backbone, quantization, **options)
    save_model(
        path, network, quantization, exit_rule=rule, training={"steps": 0}, figures={"Set5": {"psnr_db": 1.0}}
    )
    return Path(path)
