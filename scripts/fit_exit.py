"""Fit the rule by which cells leave the network for bicubic, and place its threshold on validation photos.

    python scripts/fit_exit.py MODEL.safetensors OUT.safetensors --cell 16 --loss 0.02 [--degraded]

On training crops every cell's squared luma error is measured twice, through the network (at the most bits) and by
bicubic. A linear model on the logarithms of six LR statistics predicts the logarithm of the difference (least
squares), and cells below a threshold exit. It rises with the mean prediction around the cell as the network's own
error does (fitted, too), and is the largest at which no third of the validation photos, from the hardest to the
calmest, loses more than ``--loss`` dB. OUT is MODEL with the rule; its plan is written by scripts/lower_model.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from cadyq.data.crops import Split, load_crops, read_manifest, read_split
from cadyq.data.degrade import degrade
from cadyq.functional.exit import EPSILON, ExitRule
from cadyq.functional.image import cell_statistics, luma
from cadyq.functional.logarithm import logarithm
from cadyq.functional.resize import imresize
from cadyq.io.models import load_model, save_model
from cadyq.upscale import Model, load

Array = NDArray[np.float64]


def cells_of(square: NDArray[Any], side: int) -> Array:
    """Mean of every whole cell of an error plane (H, W), (rows, cols)."""
    rows, cols = square.shape[0] // side, square.shape[1] // side
    return square[: rows * side, : cols * side].reshape(rows, side, cols, side).mean((1, 3), dtype=np.float64)


def measure(
    model: Model, split: Split, limit: int | None, cache: str, is_degraded: bool
) -> tuple[Array, Array]:
    """Errors (crops, rows, cols, 2), network's and bicubic's, and logarithms of statistics (crops, rows, cols, 6)."""
    crops = load_crops(split, model.scale, cache)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(crops.lr))[:limit] if limit else range(len(crops.lr))
    top = max(bits for site in model.sites for bits in site.candidates)
    errors, features = [], []
    for i in track(order, split, transient=True):
        truth, side = luma(crops.hr[i]), model.tile * model.scale
        lr = degrade(crops.lr[i][None], rng)[0] if is_degraded else crops.lr[i]
        sr, plain = model.upscale(lr, force_bits=top).pixels, imresize(lr, truth.shape[:2])
        pair = [cells_of((luma(x) - truth) ** 2, side) for x in (sr, plain)]
        rows, cols = pair[0].shape
        statistics = cell_statistics(lr, model.tile)[:rows, :cols]
        errors.append(np.stack(pair, -1))
        features.append(logarithm(statistics + EPSILON))
    return np.array(errors), np.array(features)


def fit(errors: Array, features: Array) -> Array:
    """Weights of the statistics and, last, the bias."""
    increase = (errors[..., 1] - errors[..., 0]).ravel()
    flat = features.reshape(-1, features.shape[-1])
    inputs = np.c_[flat, np.ones(len(flat))]
    # Increases below a hundredth of a squared grey level are all the same to the eye, and to the logarithm.
    found: Array = np.linalg.lstsq(inputs, np.log(np.maximum(increase, 1e-2)), rcond=None)[0]
    return found


def validation_photos() -> NDArray[np.int64]:
    """Index of the photo of every validation crop."""
    split = read_split()
    names = [(c.source, c.photo) for c in read_manifest() if split[(c.source, c.photo)] == "validation"]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names])


def slope(scores: Array, errors: Array) -> float:
    """How much the logarithm of a crop's error grows with its mean score."""
    return float(np.polyfit(scores.mean((1, 2)), np.log(errors[..., 0].mean((1, 2))), 1)[0])


def place(
    rule: ExitRule, loss: float, scores: Array, errors: Array, photo: NDArray[np.int64]
) -> tuple[ExitRule, float]:
    """The rule with the largest threshold at which no third of the photos loses more than ``loss`` dB, and the share.

    Thirds from the hardest to the calmest: in a mean over all, some would pay for others.
    """
    n = int(photo.max()) + 1
    plain = np.array([errors[photo == p, ..., 0].mean() for p in range(n)])
    third = np.argsort(np.argsort(-plain)) * 3 // n
    best, best_share = replace(rule, threshold=float("-inf")), 0.0
    for threshold in np.arange(-10, 10, 0.05):
        placed = replace(rule, threshold=float(threshold))
        exits = np.array([placed.leaves(crop) for crop in scores])
        mixed = np.where(exits, errors[..., 1], errors[..., 0])
        lost = np.array([10 * np.log10(mixed[photo == p].mean() / plain[p]) for p in range(n)])
        if max(lost[third == t].mean() for t in range(3)) <= loss:
            best, best_share = placed, float(exits.mean())
    return best, best_share


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--loss", type=float, default=0.02, help="dB (default: 0.02)")
    parser.add_argument(
        "--cell", type=int, help="LR pixels; another one than the tile only if no bits are chosen"
    )
    parser.add_argument(
        "--degraded", action="store_true", help="for a network that is meant for JPEG pictures"
    )
    parser.add_argument("--crops", type=int, default=1500)
    parser.add_argument("--cache", default="runs/cache")
    options = parser.parse_args()
    loaded, model = load_model(options.model), load(options.model)
    config = loaded.quantization
    if options.cell and options.cell != model.tile:
        if config is None or config.dynamic:
            parser.error("--cell: this network chooses bits by tiles of its own")
        config = replace(config, tile=options.cell)
        model.tile = options.cell
    model.exit_rule = None
    errors, features = measure(model, "train", options.crops, options.cache, options.degraded)
    weights = fit(errors, features)
    found = slope(features @ weights[:-1] + weights[-1], errors)
    rule = ExitRule(tuple(weights[:-1].tolist()), float(weights[-1]), 0.0, slope=found)
    errors, features = measure(model, "validation", None, options.cache, options.degraded)
    scores = features @ weights[:-1] + weights[-1]
    rule, share = place(rule, options.loss, scores, errors, validation_photos())
    print(f"{share:.1%} of the validation crops' cells of {model.tile} exit at {options.loss} dB; {rule}")
    kind = "degraded crops" if options.degraded else "crops"
    record = {**loaded.metadata["training"], "exit": f"fitted on {options.crops} {kind}, {options.loss} dB"}
    save_model(options.out, loaded.network, config, training=record, exit_rule=rule)


if __name__ == "__main__":
    main()
