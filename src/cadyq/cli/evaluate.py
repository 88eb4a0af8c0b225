"""`cadyq evaluate`."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import add_running, progress, running
from cadyq.errors import ArgumentError

if TYPE_CHECKING:
    from cadyq.evaluate import Evaluation
    from cadyq.upscale import Model

__all__ = ["add"]


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="measure a model on data sets", description="Print PSNR, SSIM, FQR and BitOPs."
    )
    evaluate.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    evaluate.add_argument("data", nargs="+", metavar="DATA", help="Set5, Set14, Urban100, ... or a folder")
    evaluate.add_argument("--csv", help="file for one row per picture (one data set only)")
    evaluate.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: the figures, and those of each picture; of several data sets or models a list "
        'of such objects, "evaluations"',
    )
    evaluate.add_argument("--against", metavar="MODEL", help="second model, compared picture by picture")
    evaluate.add_argument("--limit", type=int, help="measure only the first so many pictures")
    evaluate.add_argument("--root", help="folder of the data sets (default: the variable CADYQ_DATA)")
    evaluate.add_argument(
        "--border", choices=("symmetric", "replicate"), default="symmetric", help="of the LR"
    )
    add_running(evaluate)
    evaluate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.evaluate import compare, evaluate, write_csv
    from cadyq.upscale import load

    if options.csv is not None and len(options.data) > 1:
        raise ArgumentError("csv", options.csv, "one data set", "evaluate them one after the other")
    models = [load(name) for name in (options.model, options.against) if name is not None]
    evaluations: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for data in options.data:
        found = []
        for model in models:
            with progress(f"{model.name} on {data}", None) as step, _convolutions(model):
                extra = {"border": options.border, "limit": options.limit, "root": options.root}
                found.append(evaluate(model, data, progress=step, **running(options), **extra))
        difference = compare(found[0].rows, found[1].rows) if len(found) > 1 else None
        if options.csv is not None:
            write_csv(options.csv, found[0])
        if not options.json:
            for one in found:
                print(_evaluation_text(one, header=not evaluations and one is found[0]))
            if difference is not None:
                print(
                    f"  {models[0].name} - {models[1].name}: {difference.mean:+.3f} dB, 95 % interval "
                    f"[{difference.low:+.3f}, {difference.high:+.3f}], {difference.n_images} pictures"
                )
        evaluations += [_plain(one) for one in found]
        if difference is not None:
            differences.append({"dataset": found[0].summary.dataset, **vars(difference)})
    if options.json:
        several = {"evaluations": evaluations, "differences": differences}
        print(json.dumps(evaluations[0] if len(evaluations) == 1 else several, indent=2))
    return 0


def _convolutions(model: Model) -> AbstractContextManager[None]:
    """Training's kernels for a float network: twice as fast as torch's, and the same but for float32's rounding.

    Quantized networks that run on torch keep torch's own, as another rounding may make another code.
    """
    if model.plan is not None or model.loaded.quantization is not None:
        return nullcontext()
    from cadyq.training.loss import native_convolutions

    return native_convolutions()


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    """One object with the figures as keys of their own, and the pictures beneath."""
    mapping = evaluation.to_mapping()
    return {**mapping["summary"], "pictures": mapping["rows"]}


def _evaluation_text(evaluation: Evaluation, *, header: bool) -> str:
    s = evaluation.summary
    names = f"{'data':<12} {'model':<28} {'n':>4} {'PSNR dB':>8} {'SSIM':>7} {'FQR':>6} {'FQR area':>8}"
    names += f" {'BitOPs G':>9} {'exited':>6} {'s':>7}"
    line = f"{s.dataset:<12} {s.model:<28} {s.n_images:>4} {s.psnr_db:>8.3f} {s.ssim:>7.4f} {s.fqr:>6.2f}"
    line += f" {s.fqr_area:>8.2f} {s.bitops_g:>9.3f} {s.exited:>6.1%} {s.seconds:>7.2f}"
    return (f"{names}\n" if header else "") + f"{line}\n  {s.description} Mode {s.mode}, x{s.scale}."
