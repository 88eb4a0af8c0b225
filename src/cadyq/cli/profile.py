"""`cadyq profile`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadyq.report.profile import Profile

__all__ = ["add"]


def add(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="what a model costs, per stage, convolution and tile",
        description="Parameters, storage, MACs, BitOPs, energy by a stated model, and measured time.",
    )
    profile.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    profile.add_argument(
        "image", metavar="IMAGE", nargs="?", help="picture (default: a drawn one of 480x270)"
    )
    profile.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    profile.add_argument("--threads", type=int, help="CPU threads (default: all)")
    profile.add_argument("--repeats", type=int, default=5, help="runs that count (default: 5)")
    profile.add_argument("--json", action="store_true", help="print JSON instead of text")
    profile.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.engine.synthetic import random_picture
    from cadyq.errors import ArgumentError
    from cadyq.io.images import read_image
    from cadyq.report.profile import profile
    from cadyq.upscale import load

    if options.repeats < 1:
        raise ArgumentError("repeats", options.repeats, "at least 1")
    image = random_picture(270, 480) if options.image is None else read_image(options.image).pixels
    model = load(options.model)
    found = profile(model, image, tile=options.tile, threads=options.threads, repeats=options.repeats)
    print(json.dumps(found.to_mapping(), indent=2) if options.json else _text(found))
    return 0


def _text(p: Profile) -> str:
    height, width = p.image
    lines = [
        f"{p.model} on {p.runtime}: {p.parameters:,} parameters, {p.storage_bytes / 1e6:.2f} MB",
        f"picture {width}x{height} -> {width * p.scale}x{height * p.scale}, {p.n_tiles} tiles of {p.tile}, "
        f"FQR (by area) {p.fqr:.2f}",
        f"{p.macs_g:.2f} G MACs, {p.bitops_g:.3f} G BitOPs (body {p.body_bitops_g:.3f}), {p.energy_mj:.2f} mJ",
        f"time: median {1e3 * p.seconds:.1f} ms, best {1e3 * p.seconds_min:.1f} ms of {p.repeats}; "
        f"{1e3 * p.seconds_per_body_tile:.2f} ms per tile in the body; {p.cpu}",
    ]
    lines += [f"  {name:<22} {1e3 * s:>9.1f} ms" for name, s in p.stages.items()]
    lines.append(
        f"{'convolution':<26} {'stage':<5} {'MACs M':>10} {'w':>3} {'bits':>6} {'BitOPs M':>10} {'uJ':>10} {'ms':>9}"
    )
    for c in p.convs:
        taken = (
            "-"
            if c.seconds is None
            else f"{1e3 * c.seconds:.2f}{'' if c.seconds_from == 'measured' else '*'}"
        )
        lines.append(
            f"{c.name:<26} {c.stage:<5} {c.macs / 1e6:>10.1f} {c.weight_bits:>3} {c.bits:>6.2f} "
            f"{c.bitops / 1e6:>10.2f} {c.energy_j * 1e6:>10.1f} {taken:>9}"
        )
    if any(c.seconds_from == "block" for c in p.convs):
        lines.append("* the engine times whole blocks; their time is shared out by MACs")
    return "\n".join([*lines, p.energy_model])
