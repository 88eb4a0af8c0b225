"""`cadyq sweep`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cadyq.cli.common import MODES, progress

__all__ = ["add"]


def add(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="models x tiles x budgets into one CSV; resumable, and several at once",
        description="Measure every combination. Start it again to go on; start it several times, or with --jobs, to "
        "share the work: every point is measured by whoever comes first.",
    )
    sweep.add_argument("models", nargs="+", metavar="MODEL", help="names of shipped models, or model files")
    sweep.add_argument("--on", nargs="+", default=["Urban100"], metavar="DATA", help="data sets or folders")
    sweep.add_argument("--budgets", nargs="+", type=float, default=[0.0], help="default: 0")
    sweep.add_argument(
        "--tiles", nargs="+", type=int, default=[None], help="LR pixels (default: the model's)"
    )
    sweep.add_argument("--mode", choices=MODES, default="tiles", help="how bits are decided (default: tiles)")
    sweep.add_argument("-o", "--output", default="sweep", help="folder (default: sweep)")
    sweep.add_argument("--quick", action="store_true", help="a few pictures of each set; marked as such")
    sweep.add_argument("--data", metavar="FOLDER", help="folder of the data sets (default: CADYQ_DATA)")
    sweep.add_argument("--threads", type=int, help="CPU threads of each process (default: all)")
    sweep.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    sweep.add_argument("--json", action="store_true", help="print the points as JSON when done")
    sweep.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.errors import ArgumentError
    from cadyq.report.lab import Lab, Request
    from cadyq.report.networks import read_network
    from cadyq.report.sweep import plot_sweep, points, sweep
    from cadyq.report.variants import Subject

    if options.jobs < 1:
        raise ArgumentError("jobs", options.jobs, "at least 1")
    folder = Path(options.output)
    lab = Lab(folder / ".measured", root=options.data, quick=options.quick, threads=options.threads)
    requests = [
        Request(Subject(read_network(model)), data, options.mode, tile, budget)
        for model in options.models
        for data in options.on
        for tile in options.tiles
        for budget in options.budgets
    ]
    helpers = [
        subprocess.Popen([sys.executable, "-m", "cadyq", *_arguments(options)], stdout=subprocess.DEVNULL)
        for _ in range(options.jobs - 1)
    ]
    try:
        with progress("pictures", None) as step:
            lab.progress = step
            left = sweep(requests, lab, folder, lambda text: print(text, file=sys.stderr, flush=True))
        codes = [helper.wait() for helper in helpers]
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    if helpers:  # what they measured in the meantime, or left behind
        left = sweep(requests, lab, folder, lambda text: None)
    found = points(requests, lab)
    plot_sweep(found, folder)
    if options.json:
        print(json.dumps({"points": found, "n_wanted": len(requests), "n_elsewhere": left}, indent=2))
    else:
        note = f", {left} still being measured by another process" if left else ""
        print(f"{folder / 'sweep.csv'}: {len(found)} of {len(requests)} points{note}")
    return max(codes, default=0)


def _arguments(options: argparse.Namespace) -> list[str]:
    """The same sweep for one more process."""
    result = ["sweep", *options.models, "--on", *options.on, "--mode", options.mode, "-o", options.output]
    result += ["--budgets", *(str(b) for b in options.budgets)]
    if options.tiles != [None]:
        result += ["--tiles", *map(str, options.tiles)]
    result += ["--quick"] if options.quick else []
    for name in ("data", "threads"):
        value = getattr(options, name)
        result += [f"--{name}", str(value)] if value is not None else []
    return result
