"""`cadyq explain`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="a page that shows where a picture's bits went, and why",
        description="Write a self-contained page and pictures: bits per tile and layer, what the selectors saw, and "
        "what other budgets would cost.",
    )
    explain.add_argument("image", metavar="IMAGE", help="picture to upscale")
    explain.add_argument("-o", "--output", help="folder (default: IMAGE's name with -explained)")
    explain.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    explain.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    explain.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    explain.add_argument("--threads", type=int, help="CPU threads (default: all)")
    explain.add_argument("--json", action="store_true", help="print JSON instead of text")
    explain.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.report.explain import explain, write_explanation
    from cadyq.upscale import load

    folder = Path(options.output or f"{Path(options.image).stem}-explained")
    found = explain(
        load(options.model),
        options.image,
        tile=options.tile,
        budget=options.budget,
        threads=options.threads,
    )
    paths = write_explanation(found, folder)
    if options.json:
        print(json.dumps({"files": [str(p) for p in paths], **found.to_mapping()}))
    else:
        r = found.result
        print(f"{folder / 'explanation.html'}: FQR {r.fqr:.2f}, {r.bitops / 1e9:.3f} G BitOPs in the body")
    return 0
