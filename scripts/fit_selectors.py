"""Fit a model's bit selectors to error increases measured on training crops.

    python scripts/fit_selectors.py MODEL.safetensors OUT.safetensors --fqr 5.0

The integer engine measures them, where it runs the model. OUT gets selectors, tile and budget.
See `cadyq.training.supervise` for the model behind it. Only training crops are looked at.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch

from cadyq.data.crops import load_crops
from cadyq.deploy import runner
from cadyq.io.models import load_model, save_model
from cadyq.quant.site import sites_of
from cadyq.training.supervise import Sensitivity, chosen_bits, fit_selectors, measure, reach


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--fqr", type=float, required=True)
    parser.add_argument("--tile", type=int, default=48)
    parser.add_argument("--crops", type=int, default=300)
    parser.add_argument("--site-crops", type=int, default=40)
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument(
        "--measured", help="file that keeps the measurement, to fit again without repeating it"
    )
    options = parser.parse_args()
    loaded = load_model(options.model)
    network = loaded.network
    assert loaded.quantization is not None
    crops = load_crops("train", network.scale, options.cache)

    try:
        seen = Sensitivity(**torch.load(options.measured, weights_only=True))
    except (FileNotFoundError, AttributeError):
        seen = measure(
            network,
            crops,
            n_crops=options.crops,
            n_site_crops=options.site_crops,
            tile=options.tile,
            run=runner(network, loaded.quantization),
            log=print,
        )
        if options.measured:
            torch.save(vars(seen), options.measured)
    for b, error in seen.errors.items():
        print(f"{b} bits everywhere: mean relative error {float((error / seen.group_error).mean()):.4f}")
    for site in sites_of(network, "body"):
        # Inputs are standardised by what tiles of this size look like.
        selector = site.selector
        assert selector is not None
        selector.center.zero_()
        selector.spread.fill_(1.0)
        vector = selector.features(seen.gradient, seen.deviations[site.name])
        selector.center.copy_(vector.mean(0))
        selector.spread.copy_(vector.std(0).clamp_min(1e-3) * vector.shape[1] ** 0.5)
    explained = fit_selectors(network, seen, ridge=options.ridge)
    print(f"deviance explained: {np.mean(list(explained.values())):.3f} on average over sites")
    print(f"FQR on the measured tiles: {reach(network, seen, options.fqr):.3f}")
    for site in sites_of(network, "body"):
        assert site.selector is not None
        shares = [(b, (chosen_bits(site, seen) == b).float().mean()) for b in site.selector.bits.tolist()]
        print(f"{site.name:<14} {', '.join(f'{b}: {float(share):.2f}' for b, share in shares)}")
    config = dataclasses.replace(loaded.quantization, tile=options.tile)
    record = {
        **loaded.metadata["training"],
        "selectors": f"fitted on {options.crops} crops, FQR {options.fqr}",
    }
    save_model(options.out, network, config, training=record, exit_rule=loaded.exit_rule)


if __name__ == "__main__":
    main()
