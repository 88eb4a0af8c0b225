"""`cadyq compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cadyq.cli.common import progress
from cadyq.cli.reproduce import add_bench, bench

__all__ = ["add"]


def add(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="all networks of a backbone by one protocol, with Pareto fronts",
        description="Measure every network of a backbone, static bits and successors' selectors on the same pictures; "
        "write a table with paired intervals, and PSNR over BitOPs and over measured time.",
    )
    compare.add_argument("dataset", nargs="?", default="Urban100", metavar="DATA", help="set, or folder")
    compare.add_argument("--backbone", default="srresnet", help="srresnet (default), edsr, idn or carn")
    compare.add_argument("--scale", type=int, default=4, help="enlargement factor (default: 4)")
    add_bench(compare, "comparison")
    compare.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.errors import ArgumentError
    from cadyq.report.comparison import comparison, contestants
    from cadyq.report.reproduce import page, provenance
    from cadyq.report.table import write_table

    made = bench(options)
    if not contestants(made, options.backbone, options.scale):
        known = sorted({f"{n.backbone} x{n.scale}" for n in made.networks})
        raise ArgumentError(
            "backbone", f"{options.backbone} x{options.scale}", f"one of {', '.join(known)}", "see --models"
        )
    if not made.lab.has(options.dataset):
        from cadyq.data.sets import find_pictures

        find_pictures(options.dataset, options.data)  # says what is missing
        raise ArgumentError("dataset", options.dataset, "a set that --quick does not leave out")
    made.folder.mkdir(parents=True, exist_ok=True)
    with progress("pictures", None) as step:
        made.lab.progress = step
        table = comparison(made, options.backbone, options.scale, options.dataset)
    head = provenance(made.lab)
    write_table(made.folder, table, head)
    (made.folder / "index.html").write_text(page(table.title, [table], head), encoding="utf-8")
    if options.json:
        print(json.dumps({**head, **table.to_mapping()}, indent=2))
    else:
        print(table.to_markdown())
        print(made.folder / "index.html")
    return 0
