"""Print the figures by which the basics are judged, each beside what it should be.

    python scripts/bars.py [--weights FOLDER] [--data ROOT]

Parameters, BitOPs and patch overheads need nothing; Y-PSNR of imported float networks needs the float weights and
the data sets, and is left out without them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cadyq.backbones import build_backbone
from cadyq.evaluate import evaluate
from cadyq.functional.cost import PAPER_OVERHEAD, bitops, grid_overhead, tile_overhead
from cadyq.io.importers import import_float
from cadyq.io.models import save_model
from cadyq.quant.site import sites_of
from cadyq.upscale import load

# backbone: (LR height, LR width, BitOPs of S7 / S8 in G at float and at 8 bit, extra float operations in G)
BITOPS: dict[str, tuple[int, int, float | None, float]] = {
    "edsr": (180, 320, 135.90, 8.49),
    "srresnet": (180, 320, 136.13, 8.51),
    "idn": (180, 320, 59.12, 3.70),
    "carn": (540, 960, None, 43.0),
}
# Batch norm of SRResNet: 2 operations per value, 2 norms of 64 channels in each of 16 blocks, scaled as a convolution.
BATCH_NORM = {"srresnet": 2 * 2 * 16 * 64}
PARAMETERS: list[tuple[str, dict[str, Any], int, int]] = [
    ("edsr", {}, 0, 1_517_571),
    ("idn", {}, 0, 590_915),
    ("srresnet", {}, 0, 1_546_838),
    ("srresnet", {"keras": True}, 4_224, 1_554_883),  # Keras counts the batch norms' moving statistics
    (
        "carn",
        {"multi": True},
        24 + 54,
        1_592_017,
    ),  # mean-shift convolutions and 18 x 3 clips of the reference
]
PSNR = [
    ("srresnet_x4_float.npz", 4, {"Set5": 32.00, "Set14": 28.53}),
    ("idn_x4_float_y.npz", 4, {"Set5": 31.81, "Urban100": 25.40}),
    ("idn_x2_float_y.npz", 2, {"Set5": 37.83}),
]


def line(what: str, found: float, wanted: float, tolerance: float) -> None:
    """Print one figure, what it should be, and whether it is within the tolerance."""
    print(
        f"{what:<52} {found:>14,.3f} {wanted:>14,.3f}  {'ok' if abs(found - wanted) <= tolerance else 'NOT REACHED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default="../shared/weights", type=Path)
    parser.add_argument("--data", help="root of the data sets (default: CADYQ_DATA)")
    options = parser.parse_args()
    print(f"{'figure':<52} {'found':>14} {'wanted':>14}")
    for name, config, extra, wanted in PARAMETERS:
        found = build_backbone(name, scale=4, **config).n_parameters() + extra
        line(f"parameters, {name} x4 {config or ''}", found, wanted, 0)
    for name, (height, width, as_float, at_8) in BITOPS.items():
        sites = [s for s in sites_of(build_backbone(name, scale=4), "body", "fixed") if s.macs_per_pixel]
        pixels = height * width
        macs = sum(s.macs_per_pixel for s in sites) * pixels
        norm = BATCH_NORM.get(name, 0) * pixels
        if as_float is not None:
            line(f"BitOPs, {name} float, G", (bitops(macs, 32, 32) + norm) / 1e9, as_float, 0.005 * as_float)
        line(f"BitOPs, {name} 8 bit, G", (bitops(macs, 8, 8) + norm / 16) / 1e9, at_8, 0.005 * at_8)
    for height, width, grid in ((180, 320, 1.0375), (540, 960, 1.103)):
        print(f"overhead of patches at LR {width}x{height}: paper's formula {PAPER_OVERHEAD:.4f},")
        line("  released grid (96, step 90)", grid_overhead(height, width), grid, 0.001)
        print(f"  ours, tiles of 48 with two rings: {tile_overhead(height, width, 48):.4f}")
    if not options.weights.is_dir():
        print(f"no float weights in {options.weights}: PSNR of imported networks is left out")
        return
    for file, scale, wanted_psnr in PSNR:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"imported-x{scale}.safetensors"
            save_model(path, import_float(options.weights / file, scale), None)
            for data, value in wanted_psnr.items():
                result = evaluate(load(path), data, root=options.data)
                line(f"Y-PSNR, {file} on {data}, dB", result.summary.psnr_db, value, 0.03)


if __name__ == "__main__":
    main()
