"""`cadyq calibrate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from cadyq.calibrate import Calibrated
    from cadyq.training.float_target import Report

__all__ = ["add"]


def add(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="make your own float network content-aware",
        description="Turn a float network and a few LR pictures into a content-aware one; no HR pictures are needed.",
    )
    calibrate.add_argument(
        "float",
        metavar="FLOAT",
        help="FILE.py:NAME (a torch.nn.Module, or what makes one), a float model file, weights of a known layout, or "
        "any file that spandrel recognizes, if it is installed",
    )
    calibrate.add_argument(
        "-o", "--output", required=True, help="model file to write, *.safetensors or *.safetensors.xz"
    )
    calibrate.add_argument(
        "--images", required=True, metavar="FOLDER", help="LR pictures; about 100 are enough"
    )
    calibrate.add_argument("--weights", help="state dict for FILE.py:NAME")
    calibrate.add_argument(
        "--scale", type=int, help="for a forward that asks for it, or weights that do not tell it"
    )
    calibrate.add_argument(
        "--range",
        default="auto",
        help="what the network takes and returns: 0:1, 0:255, -1:1 or 0:1,-1:1 (default: auto)",
    )
    calibrate.add_argument("--bits", default="4,6,8", help="candidate bit-widths (default: 4,6,8)")
    calibrate.add_argument("--target-fqr", type=float, default=5.5, help="mean bits (default: 5.5)")
    calibrate.add_argument("--minutes", type=float, default=5.0, help="time for everything (default: 5)")
    calibrate.add_argument("--steps", type=int, help="steps of the fine-tuning, in place of a time")
    calibrate.add_argument("--tile", type=int, default=32, help="side of a tile in LR pixels (default: 32)")
    calibrate.add_argument("--seed", type=int, default=0, help="of crops, patches and bits (default: 0)")
    calibrate.add_argument("--license", default="not stated", help="SPDX identifier of the weights' license")
    calibrate.add_argument("--threads", type=int, help="CPU threads (default: all)")
    calibrate.add_argument("--json", action="store_true", help="print JSON instead of text")
    calibrate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        import torch

        from cadyq.calibrate import calibrate
        from cadyq.io.modules import load_module
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "torch":
            raise
        raise MissingExtraError(
            "torch is not installed, and calibration runs on it; install it with: pip install 'cadyq[train]'"
        ) from error
    output = Path(options.output)
    if not output.parent.is_dir():
        raise ArgumentError("output", options.output, "an existing folder to write to", "create it first")
    if options.threads is not None:
        if options.threads < 1:
            raise ArgumentError("threads", options.threads, "at least 1")
        torch.set_num_threads(options.threads)
    module = load_module(options.float, weights=options.weights, scale=options.scale)
    settings = {key: getattr(options, key) for key in ("target_fqr", "minutes", "steps", "tile", "seed")}
    with _bar() as report:
        result = calibrate(
            module,
            options.images,
            scale=options.scale,
            value_range=options.range,
            report=report,
            bits=_bits(options.bits),
            **settings,
        )
    reason = result.save(output, options.license)
    runtime = {"runtime": "torch" if reason else "engine", "no_plan_because": reason}
    record = {"model": str(output), "scale": result.network.scale, **runtime, **result.record}
    print(json.dumps(record, indent=2) if options.json else _text(output, result, reason))
    return 0


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError("bits", text, "whole numbers with commas, say 4,6,8") from error


def _text(output: Path, result: Calibrated, reason: str) -> str:
    r = result.record
    return (
        f"{output}: x{result.network.scale}, {r['fqr']:.2f} bits on average (wanted {r['target_fqr']:.2f}), "
        f"{r['psnr_to_float_db']:.2f} dB to the float network's own results (with the most bits "
        f"{r['psnr_to_float_db_most_bits']:.2f} dB); {r['n_crops']} crops, {r['steps']} steps, {r['seconds']:.0f} s\n"
        + (f"it runs on torch: {reason}" if reason else "it runs on the integer engine")
    )


@contextmanager
def _bar() -> Iterator[Report]:
    """A bar that tells what is being done; silent where the error stream is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
