"""Is it content that decides? Compare a network's own choice of bits with two controls on the validation crops.

(i) fixed: one bit-width per site for all tiles, raised site by site until their mean is at least the dynamic mean;
(ii) shuffled: the very same choices, handed to other tiles (permutations over all validation tiles).

    python scripts/content_decides.py MODEL [--permutations 20] [--data ROOT] [--json FILE]

PSNR is taken per photo (mean squared error of luma over its crops); the interval is a paired bootstrap over photos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadyq.data.crops import load_crops, read_manifest, read_split
from cadyq.functional.fidelity import paired_bootstrap
from cadyq.functional.image import luma
from cadyq.upscale import load

Table = NDArray[np.uint8]


def photos() -> list[int]:
    """Index of the photo that each validation crop was cut from."""
    split = read_split()
    names = [(c.source, c.photo) for c in read_manifest() if split[(c.source, c.photo)] == "validation"]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]


class Runner:
    """Runs a model over all validation crops with given bits, or with its own choice."""

    def __init__(self, model: str, cache: str, tile: int | None, budget: float) -> None:
        self.model = load(model)
        self.tile = tile or self.model.tile
        self.budget = budget
        self.crops = load_crops("validation", self.model.scale, cache)
        self.sites = [site for site in self.model.sites if site.kind == "body"]

    def __call__(self, bits: Sequence[Table] | None) -> tuple[NDArray[np.float64], list[Table]]:
        """Mean squared luma error per crop, and the bits used, one (rows, cols, sites) table per crop."""
        errors, tables = [], []
        shave = self.model.scale
        for i in range(len(self.crops.lr)):
            force = None
            if bits is not None:
                force = {
                    site.name: np.ascontiguousarray(bits[i][..., j]) for j, site in enumerate(self.sites)
                }
            found = self.model.upscale(self.crops.lr[i], tile=self.tile, budget=self.budget, force_bits=force)
            difference = (luma(found.pixels) - luma(self.crops.hr[i]))[shave:-shave, shave:-shave]
            errors.append(float((difference**2).mean()))
            tables.append(np.stack([found.bits[site.name] for site in self.sites], axis=-1))
        return np.array(errors), tables


def psnr_per_photo(errors: NDArray[np.float64], photo: Sequence[int]) -> NDArray[np.float64]:
    """PSNR of each photo from the errors of its crops."""
    index = np.asarray(photo)
    return np.array([10 * np.log10(255**2 / errors[index == p].mean()) for p in range(max(photo) + 1)])


def fixed_bits(table: Table, candidates: Sequence[int]) -> Table:
    """One bit-width per site whose mean is at least the table's (tiles, sites): (sites,)."""
    means = table.astype(np.float64).mean(axis=0)
    ladder = np.array([c for c in candidates if c], np.float64)
    level = np.maximum(np.searchsorted(ladder, means + 1e-9, side="right") - 1, 0)
    while ladder[level].mean() < means.mean() - 1e-9:
        gap = np.where(level < len(ladder) - 1, means - ladder[level], -np.inf)
        level[int(gap.argmax())] += 1
    return ladder[level].astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--permutations", type=int, default=20)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--json")
    options = parser.parse_args()
    run, photo = Runner(options.model, options.cache, options.tile, options.budget), photos()
    errors, tables = run(None)
    own = psnr_per_photo(errors, photo)
    shape = tables[0].shape
    whole = np.concatenate([t.reshape(-1, shape[2]) for t in tables])
    fixed = fixed_bits(whole, run.sites[1].candidates)
    fixed_psnr = psnr_per_photo(run([np.broadcast_to(fixed, shape)] * len(tables))[0], photo)
    generator = np.random.default_rng(0)
    shuffled = []
    for k in range(options.permutations):
        moved = generator.permutation(whole).reshape(len(tables), *shape)
        shuffled.append(psnr_per_photo(run(list(moved))[0], photo))
        print(
            f"permutation {k + 1}/{options.permutations}: {own.mean() - shuffled[-1].mean():+.4f} dB",
            flush=True,
        )
    result: dict[str, object] = {
        "model": options.model,
        "tile": run.tile,
        "n_photos": len(own),
        "n_tiles": len(whole),
        "psnr_db": float(own.mean()),
        "fqr": float(whole.mean()),
        "fixed_fqr": float(fixed.mean()),
        "fixed_bits": [int(b) for b in fixed],
    }
    for name, other in (("fixed", fixed_psnr), ("shuffled", np.mean(shuffled, 0) if shuffled else None)):
        if other is not None:
            mean, low, high = paired_bootstrap(own, other)
            result[f"gain_over_{name}_db"] = [mean, low, high]
            print(f"own choice over {name}: {mean:+.4f} dB, 95 % interval [{low:+.4f}, {high:+.4f}]")
    print(f"FQR {result['fqr']:.3f} (fixed {result['fixed_fqr']:.3f}), PSNR {result['psnr_db']:.3f} dB")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
