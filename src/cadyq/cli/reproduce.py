"""`cadyq reproduce`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import progress

if TYPE_CHECKING:
    from cadyq.report.bench import Bench

__all__ = ["add", "add_bench", "bench"]


def add(commands: Any) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="tables and figures of the CADyQ supplement",
        description="Measure and write tables S1 to S8, figures figS1 to figS3 and B1 (what selectors see), ours "
        "beside the published figures. What was measured is kept in the folder and not measured again.",
    )
    reproduce.add_argument("names", nargs="+", metavar="NAME", help="S1 ... S8, figS1 ... figS3, B1, or all")
    add_bench(reproduce, "reproduced")
    reproduce.set_defaults(run=run)


def add_bench(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of everything that measures networks."""
    parser.add_argument("-o", "--output", default=folder, help=f"folder for the results (default: {folder})")
    parser.add_argument("--quick", action="store_true", help="a few pictures of each set; marked as such")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the data sets (default: CADYQ_DATA)")
    parser.add_argument(
        "--large", metavar="FOLDER", help="large pictures to measure where Test2K and Test4K are missing"
    )
    parser.add_argument(
        "--models",
        metavar="FOLDER",
        action="append",
        help="more networks beside the shipped ones (default: CADYQ_MODELS or models); may be repeated",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def bench(options: argparse.Namespace) -> Bench:
    from cadyq.io.shipped import MODELS_VARIABLE
    from cadyq.report.bench import Bench
    from cadyq.report.lab import Lab
    from cadyq.report.networks import scan

    usual = os.environ.get(MODELS_VARIABLE) or "models"
    given = options.models if options.models is not None else [f for f in (usual,) if Path(f).is_dir()]
    folder = Path(options.output)
    lab = Lab(
        folder / ".measured",
        root=options.data,
        quick=options.quick,
        threads=options.threads,
        large=options.large,
    )
    return Bench(scan(given), lab, folder, tuple(map(Path, given)))


def run(options: argparse.Namespace) -> int:
    from cadyq.report.reproduce import provenance, reproduce

    made = bench(options)

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    with progress("pictures", None) as step:
        made.lab.progress = step
        tables = reproduce(options.names, made, say)
    if options.json:
        print(json.dumps({**provenance(made.lab), "tables": [t.to_mapping() for t in tables]}, indent=2))
    else:
        print(f"{made.folder / 'index.html'}")
    return 0
