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
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.data.crops import load_crops, read_manifest, read_split
from cadyq.functional.fidelity import paired_bootstrap
from cadyq.functional.image import luma
from cadyq.io.models import load_model
from cadyq.quant.context import TileContext
from cadyq.quant.site import sites_of
from cadyq.training.loop import native_convolutions, to_tensor


def photos() -> list[int]:
    """Index of the photo that each validation crop was cut from."""
    split = read_split()
    names = [(c.source, c.photo) for c in read_manifest() if split[(c.source, c.photo)] == "validation"]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]


class Runner:
    """Runs a network over all validation crops with given bits, or with its own choice."""

    def __init__(self, model: str, cache: str, tile: int | None, budget: float) -> None:
        loaded = load_model(model)
        assert loaded.quantization is not None, "a float network has no bits to choose"
        self.network, self.tile = loaded.network, tile or loaded.quantization.tile
        self.budget = budget
        self.crops = load_crops("validation", self.network.scale, cache)
        self.names = [s.name for s in sites_of(self.network, "body")]

    @torch.no_grad()
    def __call__(self, bits: Sequence[Tensor] | None) -> tuple[NDArray[np.float64], list[Tensor]]:
        """Mean squared luma error per crop, and the bits used, one (tiles, sites) table per crop."""
        errors, tables = [], []
        shave = self.network.scale
        for i in range(len(self.crops.lr)):
            lr = to_tensor(self.crops.lr[i : i + 1])
            force = None
            if bits is not None:
                force = {name: bits[i][:, j] for j, name in enumerate(self.names)}
            ctx = TileContext(lr, self.tile, force_bits=force, budget=self.budget)
            with native_convolutions():
                sr = self.network(lr, ctx)
            pixels = (sr[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            difference = (luma(pixels) - luma(self.crops.hr[i]))[shave:-shave, shave:-shave]
            errors.append(float((difference**2).mean()))
            tables.append(torch.stack([r.bits for r in ctx.records if r.kind == "body"], 1))
        return np.array(errors), tables


def psnr_per_photo(errors: NDArray[np.float64], photo: Sequence[int]) -> NDArray[np.float64]:
    """PSNR of each photo from the errors of its crops."""
    index = np.asarray(photo)
    return np.array([10 * np.log10(255**2 / errors[index == p].mean()) for p in range(max(photo) + 1)])


def fixed_bits(table: Tensor, candidates: Sequence[int]) -> Tensor:
    """One bit-width per site whose mean is at least the table's (tiles, sites): (sites,)."""
    means = table.double().mean(0)
    ladder = torch.tensor([c for c in candidates if c], dtype=torch.float64)
    level = torch.bucketize(means + 1e-9, ladder, right=True).sub(1).clamp_min(0)
    while float(ladder[level].mean()) < float(means.mean()) - 1e-9:
        gap = torch.where(
            level < len(ladder) - 1, means - ladder[level], torch.tensor(-1e9, dtype=torch.float64)
        )
        level[int(gap.argmax())] += 1
    return ladder[level]


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
    whole = torch.cat(tables)
    candidates = run.network.get_submodule(run.names[0]).quantizer.bits.tolist()
    fixed = fixed_bits(whole, candidates)
    fixed_psnr = psnr_per_photo(run([fixed.expand(len(t), -1) for t in tables])[0], photo)
    generator = torch.Generator().manual_seed(0)
    shuffled = []
    for k in range(options.permutations):
        moved = whole[torch.randperm(len(whole), generator=generator)]
        shuffled.append(psnr_per_photo(run(moved.split([len(t) for t in tables]))[0], photo))
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
