"""`cadyq export`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadyq.engine.plan import Plan

__all__ = ["add"]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origin.
FORMS = ("dynamic", "qdq")
CROP = 96


def add(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a model for other runtimes: ONNX",
        description="Write a model as an ONNX file of standard operators. 'dynamic' computes what the integer engine "
        "computes, choices of bits included, one per site and picture (or patch, in a batch of patches); 'qdq' is "
        "for networks of fixed 8 bits and runs in 8-bit integers in other runtimes. Needs the extra 'onnx'.",
    )
    export.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    export.add_argument("-o", "--output", required=True, type=Path, metavar="FILE.onnx")
    export.add_argument("--form", choices=FORMS, default="dynamic", help="(default: %(default)s)")
    export.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    export.add_argument(
        "--calibration", metavar="FOLDER", help="low-resolution pictures for 'qdq' (say 20 typical ones)"
    )
    export.add_argument(
        "--check", metavar="DATA", help="run the file in onnxruntime beside the engine on this data set"
    )
    export.add_argument("--limit", type=int, help="check the first so many pictures only")
    export.add_argument("--threads", type=int, help="CPU threads of the check (default: all)")
    export.add_argument("--json", action="store_true", help="print JSON instead of text")
    export.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.data.sets import load_pairs
    from cadyq.errors import ArgumentError
    from cadyq.export.check import compare
    from cadyq.export.graph import OPSET
    from cadyq.export.onnx import export_onnx
    from cadyq.upscale import load

    if options.limit is not None and options.limit < 1:
        raise ArgumentError("limit", options.limit, "at least 1 picture")
    if options.form == "qdq" and options.calibration is None:
        raise ArgumentError("calibration", None, "a folder of pictures for --form qdq")
    model = load(options.model)
    plan = _plan(options.model)
    pictures = [] if options.calibration is None else _crops(options.calibration)
    record = {"model": model.name, "license": str(model.metadata.get("license", "not stated"))}
    export_onnx(
        plan,
        options.output,
        options.form,
        budget=options.budget,
        calibration=pictures,
        metadata=record,
    )
    result: dict[str, Any] = {
        "file": str(options.output),
        "form": options.form,
        "opset": OPSET,
        "storage_bytes": options.output.stat().st_size,
    }
    if model.exit_rule is not None:
        result["exits"] = False
        print(
            f"cadyq: {model.name}: cells that exit have no form in ONNX; the file computes all.",
            file=sys.stderr,
        )
    if options.check is not None:
        pairs = islice(load_pairs(options.check, plan.scale), options.limit)
        found = compare(options.output, plan, (pair.lr for pair in pairs), options.threads)
        result["check"] = {"data": options.check, **dataclasses.asdict(found)}
    print(json.dumps(result, indent=2) if options.json else _text(result))
    return 0


def _plan(model: str) -> Plan:
    from cadyq.errors import UnsupportedError
    from cadyq.upscale import load

    found = load(model)
    if found.plan is None:
        raise UnsupportedError(f"{model} cannot be exported: {found.no_plan_because}")
    return found.plan.plan


def _crops(folder: str) -> list[Any]:
    """The middle of each picture of a folder, at most 96x96: ranges need variety more than area."""
    from cadyq.data.sets import find_pictures
    from cadyq.io.images import read_image

    result = []
    for path in find_pictures(folder):
        pixels = read_image(path).pixels
        y, x = (max(0, (n - CROP) // 2) for n in pixels.shape[:2])
        result.append(pixels[y : y + CROP, x : x + CROP])
    return result


def _text(result: dict[str, Any]) -> str:
    text = (
        f"{result['file']}: {result['form']}, opset {result['opset']}, {result['storage_bytes'] / 1e6:.1f} MB"
    )
    found = result.get("check")
    if found is None:
        return text
    return (
        f"{text}\n{found['data']}, {found['n_images']} pictures, onnxruntime against the engine: at most "
        f"{found['max_difference']} grey levels, {found['share_different']:.3%} of the pixels differ, PSNR "
        f"{found['psnr_db']:.1f} dB, {found['decisions_equal']:.2%} of the decisions are equal"
    )
