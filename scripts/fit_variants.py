"""Fit the variants of a network that comparisons need: selectors that see other inputs, and look-ups by a score.

    python scripts/fit_variants.py MODEL.safetensors --measured FILE [--fqr 5.0] [-o FOLDER]

FILE is what ``scripts/fit_selectors.py --measured FILE`` kept: one measurement serves all variants, so that they differ
in nothing but what they look at. Every variant's threshold is set so that training tiles get ``--fqr`` bits on
average. OUT is FOLDER/NAME.safetensors (src/cadyq/report/selectors, or models/selectors).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cadyq.data.crops import load_crops
from cadyq.functional.image import gray
from cadyq.io.checkpoints import save_checkpoint
from cadyq.quant.selector import SELECTOR_INPUTS, BitSelector
from cadyq.report.networks import read_network
from cadyq.report.variants import SCORES, score_tiles
from cadyq.training.supervise import Sensitivity, _quasi_poisson, site_increments

Array = NDArray[Any]
BINS = 16  # rows of a look-up per tile
SHARES = (0.1, 0.9)  # AdaBM's thresholds: the easiest and the hardest tenth of the pictures


def bits_of(log_cost: Array, log_gain: Array, candidates: list[int], price: float) -> Array:
    """Cheapest bits per tile and site: every step up whose log cost + log gain exceeds the price, (tiles, sites)."""
    step = (log_cost[:, :, None] + log_gain[None] > price).sum(axis=2)
    return np.asarray(candidates)[step]


def price_for(fqr: float, mean_bits: Callable[[float], float]) -> float:
    """Bisect the price until tiles get ``fqr`` bits on average."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_bits(middle) > fqr else (low, middle)
    return (low + high) / 2


def log_gains(seen: Sensitivity, sites: list[str], candidates: list[int]) -> Array:
    """Logarithm of the error saved per bit by each step up, (sites, steps)."""
    return np.log([site_increments(candidates, seen.site_gain[name]) for name in sites])


def fit_linear(
    seen: Sensitivity, sites: list[str], inputs: Any, candidates: list[int], fqr: float, ridge: float
) -> tuple[Array, Array, float]:
    """Slopes on the logarithmic inputs (sites, width), offsets per step (sites, steps), and the share explained.

    ``width`` is that of the site with the most inputs; the slopes of others end in zeros.
    """
    target = seen.target()
    slopes, offsets, costs, explained = [], [], [], []
    for name in sites:
        selector = BitSelector(seen.deviations[name].shape[1], candidates, inputs)
        vector = selector.features(seen.gradient, seen.deviations[name])
        # Standardized for the regression, as a selector is, so that the ridge means the same everywhere.
        center, spread = vector.mean(0), vector.std(0).clamp_min(1e-3) * vector.shape[1] ** 0.5
        slope, offset, share = _quasi_poisson((vector - center) / spread, target, ridge)
        raw = (slope / spread).double()
        slopes.append(raw.numpy())
        offsets.append(offset - float(raw @ center.double()))
        costs.append((vector.double() @ raw + offsets[-1]).numpy())
        explained.append(share)
    gains, cost = log_gains(seen, sites, candidates), np.stack(costs, axis=1)
    price = price_for(fqr, lambda p: float(bits_of(cost, gains, candidates, p).mean()))
    padded = np.zeros((len(slopes), max(len(slope) for slope in slopes)))
    for row, slope in zip(padded, slopes, strict=True):
        row[: len(slope)] = slope
    return padded, np.asarray(offsets)[:, None] + gains - price, float(np.mean(explained))


def monotone(values: Array, weights: Array) -> Array:
    """Nearest non-decreasing sequence in weighted least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # value, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, max(weight, 1e-12), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, v, n), (b, w, m) = blocks[-2:]
            blocks[-2:] = [[(a * v + b * w) / (v + w), v + w, n + m]]
    return np.concatenate([np.full(int(n), value) for value, _, n in blocks])


def fit_lookup(
    seen: Sensitivity, sites: list[str], score: Array, limits: Array, fqr: float, *, uniform: bool
) -> Array:
    """Bits per bin of the score and site, (bins, sites)."""
    candidates = sorted(seen.errors)
    row = np.searchsorted(limits, score, side="right")
    target = seen.target().double().numpy()
    mean = np.array([target[row == k].mean() if (row == k).any() else 1.0 for k in range(len(limits) + 1)])
    weight = np.bincount(row, minlength=len(mean)) / len(row)
    mean = monotone(mean, weight)  # the successors' rules are: a busier tile never gets fewer bits
    gains = log_gains(seen, sites, candidates)
    if uniform:  # one bit-width for all sites of a tile
        gains = np.broadcast_to(np.log(np.exp(gains).mean(axis=0)), gains.shape)
    # Pooled bins would change together; a hair between them lets the price fall within a pool.
    log_mean = np.log(np.maximum(mean, 1e-6)) + 1e-7 * np.arange(len(mean))
    cost = np.broadcast_to(log_mean[:, None], (len(mean), len(sites)))

    def table(price: float) -> Array:
        return bits_of(cost, gains, candidates, price)

    price = price_for(fqr, lambda p: float(weight @ table(p).mean(axis=1)))
    return table(price).astype(np.uint8)


def picture_scores(lr: Array, tile: int) -> dict[str, Array]:
    """Scores per tile of every crop, and AdaBM's per crop, repeated for its tiles."""
    result = {name: np.concatenate([score_tiles(x, tile, name).ravel() for x in lr]) for name in SCORES}
    n_tiles = len(result["edges"]) // len(lr)
    whole = [SCORES["gradient"](gray(x.astype(np.float32) / 255)) for x in lr]
    result["picture"] = np.repeat(whole, n_tiles)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--measured", required=True)
    parser.add_argument("--fqr", type=float, default=5.0)
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--crops", type=int, default=300, help="as given to fit_selectors.py")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("-o", "--output", type=Path, default=Path("src/cadyq/report/selectors"))
    options = parser.parse_args()
    network = read_network(options.model)
    seen = Sensitivity(**torch.load(options.measured, weights_only=True))
    sites, candidates = list(seen.deviations), sorted(seen.errors)
    arrays: dict[str, Array] = {}
    variants: dict[str, Any] = {}
    wanted = [(name, name, candidates) for name in SELECTOR_INPUTS]
    if candidates == [4, 6, 8]:
        wanted.append(("candidates {4;8}", "both", [4, 8]))
    for name, inputs, offered in wanted:
        slope, offset, share = fit_linear(seen, sites, inputs, offered, options.fqr, options.ridge)
        arrays[f"{name}/slope"], arrays[f"{name}/offset"] = slope.astype(np.float32), offset
        variants[name] = {"kind": "selector", "inputs": inputs, "bits": offered, "explained": share}
        print(f"{name}: explains {share:.3f} of the deviance")
    crops = load_crops("train", network.scale, options.cache)
    order = np.random.default_rng(0).permutation(len(crops.lr))[: options.crops]
    tile = int(network.conversion["tile"])
    scores = picture_scores(np.stack([crops.lr[i] for i in order]), tile)
    for name, source, limits, uniform in (
        ("lookup by edges", "edges", np.linspace(0, 1, BINS + 1)[1:-1], False),
        ("lookup by entropy", "entropy", np.linspace(0, 1, BINS + 1)[1:-1], True),
        ("picture thresholds", "picture", np.array(SHARES), False),
    ):
        edges = np.quantile(scores[source], limits)
        table = fit_lookup(seen, sites, scores[source], edges, options.fqr, uniform=uniform)
        arrays[f"{name}/limits"], arrays[f"{name}/table"] = edges, table
        per_picture = source == "picture"
        variants[name] = {
            "kind": "lookup",
            "score": "gradient" if per_picture else source,
            "per_picture": per_picture,
        }
        print(f"{name}: {table.mean(axis=1).round(2).tolist()} bits per bin")
    record = {
        "base": network.weights_digest(),
        "variants": variants,
        "fqr": options.fqr,
        "crops": options.crops,
        "tile": tile,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{network.name}.safetensors"
    metadata = {"backbone": network.backbone, "scale": network.scale, "quantization": record}
    save_checkpoint(path, arrays, {**metadata, "license": "Apache-2.0"})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
