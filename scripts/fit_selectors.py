"""Fit a model's bit selectors to error increases measured with the integer engine on training crops.

    python scripts/fit_selectors.py MODEL.safetensors OUT.safetensors --fqr 5.0

The model needs its plan beside it (scripts/lower_model.py); OUT gets selectors, tile and budget, and no plan yet.
See `cadyq.training.supervise` for the model behind it. Only training crops are looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from cadyq.data.crops import CropArrays, load_crops
from cadyq.functional.image import luma
from cadyq.io.models import load_model, save_model
from cadyq.quant.context import Context, TileContext
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.loop import native_convolutions, to_tensor
from cadyq.training.supervise import Sensitivity, fit_selectors, set_budget
from cadyq.upscale import Model, load

Array = NDArray[np.float64]


class Deviations(SiteObserver):
    """Collects every body site's deviations, tiles of all pictures in one list."""

    def __init__(self) -> None:
        self.found: dict[str, list[torch.Tensor]] = {}

    def observe(self, site: Site, x: torch.Tensor, ctx: Context) -> None:
        if site.kind == "body":
            self.found.setdefault(site.name, []).append(ctx.deviation(x))


def tile_errors(model: Model, crops: CropArrays, index: int, tile: int, force: Any) -> Array:
    """Mean squared luma error of every tile, (tiles,)."""
    sr = model.upscale(crops.lr[index], tile=tile, force_bits=force).pixels
    square = (luma(sr) - luma(crops.hr[index])) ** 2
    side = tile * model.scale
    rows, cols = square.shape[0] // side, square.shape[1] // side
    return square[: rows * side, : cols * side].reshape(rows, side, cols, side).mean((1, 3)).ravel()


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
    loaded, model = load_model(options.model), load(options.model)
    network = loaded.network
    assert loaded.quantization is not None
    try:
        seen = Sensitivity(**torch.load(options.measured, weights_only=True))
    except (FileNotFoundError, AttributeError):
        seen = measure(network, model, options)
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
    reach(network, seen, options.fqr)
    config = dataclasses.replace(loaded.quantization, tile=options.tile)
    record = {
        **loaded.metadata["training"],
        "selectors": f"fitted on {options.crops} crops, FQR {options.fqr}",
    }
    save_model(options.out, network, config, training=record, exit_rule=loaded.exit_rule)


def measure(network: torch.nn.Module, model: Model, options: argparse.Namespace) -> Sensitivity:
    """Errors per tile for equal bits, mean gains per site, and selector inputs."""
    crops = load_crops("train", model.scale, options.cache)
    order = np.random.default_rng(0).permutation(len(crops.lr))[: options.crops]
    body = sites_of(network, "body")
    assert body[0].quantizer is not None
    bits = [int(b) for b in body[0].quantizer.bits]
    top = bits[-1]
    errors: dict[int, list[Array]] = {b: [] for b in bits}
    groups: list[Array] = []
    for i in track(order, "errors", transient=True):
        for b in bits:
            errors[b].append(tile_errors(model, crops, i, options.tile, b))
        groups.append(np.full(len(errors[top][-1]), errors[top][-1].mean()))
    gains: dict[str, dict[int, float]] = {}
    for site in track(body, "sites", transient=True):
        gains[site.name] = {}
        for b in bits[:-1]:
            force = {s.name: b if s is site else top for s in body}
            values = np.array(
                [
                    (tile_errors(model, crops, i, options.tile, force) - errors[top][k]).mean() / groups[k][0]
                    for k, i in enumerate(order[: options.site_crops])
                ]
            )
            # Noise must not make a site look free: at least half a standard error.
            gains[site.name][b] = float(max(values.mean(), 0.5 * values.std() / len(values) ** 0.5))
    spy, gradients = Deviations(), []
    for site in body:
        site.observer = spy
    for i in track(order, "inputs", transient=True):
        ctx = TileContext(to_tensor(crops.lr[i : i + 1]), options.tile, force_bits=top)
        with torch.no_grad(), native_convolutions():
            network(to_tensor(crops.lr[i : i + 1]), ctx)
        gradients.append(ctx.gradient)
    for site in body:
        site.observer = None
    joined = {b: torch.from_numpy(np.concatenate(e)).float() for b, e in errors.items()}
    group = torch.from_numpy(np.concatenate(groups)).float().clamp_min(1e-2)
    deviations = {name: torch.cat(parts) for name, parts in spy.found.items()}
    return Sensitivity(joined, group, torch.cat(gradients), deviations, gains)


@torch.no_grad()
def reach(network: torch.nn.Module, seen: Sensitivity, fqr: float) -> None:
    """Bisect the budget until the mean bits over tiles and sites are ``fqr``, and print what sites choose."""
    sites = sites_of(network, "body")
    start = {s.name: s.selector.linear.bias.clone() for s in sites if s.selector is not None}

    def chosen(site: Site) -> torch.Tensor:
        assert site.selector is not None
        scores = site.selector(seen.gradient, seen.deviations[site.name])
        return site.selector.bits[scores.argmax(1)].float()

    low, high = -25.0, 25.0
    for _ in range(40):
        middle = (low + high) / 2
        for site in sites:
            assert site.selector is not None
            site.selector.linear.bias.copy_(start[site.name])
        set_budget(network, middle)
        if float(torch.stack([chosen(s).mean() for s in sites]).mean()) > fqr:
            low = middle
        else:
            high = middle
    for site in sites:
        assert site.selector is not None
        shares = [
            f"{b}: {float((chosen(site) == b).float().mean()):.2f}" for b in site.selector.bits.tolist()
        ]
        print(f"{site.name:<14} {', '.join(shares)}")


if __name__ == "__main__":
    main()
