"""Does the integer engine decide and compute as the fake-quantized network in torch does? Both, picture by picture.

    python scripts/engine_agrees.py MODEL DATA [--double | --floor] [--data ROOT] [--limit N] [--json]

torch adds products in float32 in an order of its own. One value in a hundred thousand then falls on the other side of a
rounding border, a code differs, later layers multiply the difference, and a choice near a tie turns out differently.
With --double torch computes in float64, and what is left is the rounding of the engine's own float32 results. --floor
leaves the engine out and compares torch in float32 with torch in float64: how well the network agrees with itself where
nothing but the rounding of sums differs. PSNR is that of luma, a border as wide as the scale cut away.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice

import numpy as np

from cadyq.data.sets import load_pairs
from cadyq.functional.fidelity import psnr_y
from cadyq.upscale import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("pictures")
    parser.add_argument("--data", help="root of the data sets (default: CADYQ_DATA)")
    parser.add_argument("--limit", type=int)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--double", action="store_true", help="torch computes in float64")
    precision.add_argument("--floor", action="store_true", help="torch in float32 in place of the engine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = first = load(options.model)
    if options.floor:
        first = load(options.model)
    if options.double or options.floor:
        model.loaded.network.double()
    equal = count = 0
    quality: list[tuple[float, float]] = []
    largest = 0
    pairs = load_pairs(options.pictures, model.scale, root=options.data)
    for pair in islice(pairs, options.limit):
        ours = first.upscale(pair.lr, runtime="torch" if options.floor else "engine")
        theirs = model.upscale(pair.lr, runtime="torch")
        for site, bits in ours.bits.items():
            equal += int((bits == theirs.bits[site]).sum())
            count += bits.size
        largest = max(largest, int(np.abs(ours.pixels.astype(int) - theirs.pixels).max()))
        engine_db, torch_db = (psnr_y(found.pixels, pair.hr, model.scale) for found in (ours, theirs))
        quality.append((engine_db, torch_db))
    engine_db, torch_db = map(float, np.mean(quality, axis=0))
    result = {
        "compared": "torch float32 with float64" if options.floor else "engine with torch",
        "n_images": len(quality),
        "decisions": count,
        "decisions_equal": equal / count,
        "psnr_db": engine_db,
        "psnr_torch_db": torch_db,
        "difference_db": engine_db - torch_db,
        "largest_difference_levels": largest,
    }
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<28}{value:.5f}" if isinstance(value, float) else f"{key:<28}{value}")


if __name__ == "__main__":
    main()
