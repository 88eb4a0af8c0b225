"""The command line: parse, one call, print. Exit codes are those of `cadyq.errors`; 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq import __version__
from cadyq.errors import ArgumentError, CadyqError

if TYPE_CHECKING:
    from cadyq.audit import Audit
    from cadyq.evaluate import Evaluation
    from cadyq.upscale import Model, Progress, Result

__all__ = ["main"]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origins.
MODES = ("tiles", "image", "patches")
FORMATS = ("png", "jpg", "webp", "tif")
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake never ends in a traceback."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except CadyqError as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("cadyq: interrupted; nothing half-written was left", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (say, head) has seen enough; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _complain(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cadyq",
        description="Image super-resolution that spends bits only where an image needs them.",
        epilog="Exit codes: 0 done, 1 audit failed or other error, 2 argument, 3 picture, 4 model file, "
        "5 data set, 6 unsupported, 7 missing extra, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"cadyq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_upscale(commands)
    _add_evaluate(commands)
    _add_audit(commands)
    _add_info(commands)
    return parser


def _add_upscale(commands: Any) -> None:
    upscale = commands.add_parser("upscale", help="upscale pictures", description="Upscale pictures.")
    upscale.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, or folder of pictures")
    upscale.add_argument(
        "-o", "--output", required=True, help="picture for one picture; folder for several or for a folder"
    )
    upscale.add_argument("--scale", type=int, help="enlargement factor of the shipped model (default: 4)")
    upscale.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    upscale.add_argument("--format", choices=FORMATS, help="format in an output folder (default: png)")
    _add_running(upscale)
    upscale.set_defaults(run=_upscale)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="measure a model on data sets", description="Print PSNR, SSIM, FQR and BitOPs."
    )
    evaluate.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    evaluate.add_argument("data", nargs="+", metavar="DATA", help="Set5, Set14, Urban100, ... or a folder")
    evaluate.add_argument("--csv", help="file for one row per picture (one data set only)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of text")
    evaluate.add_argument("--against", metavar="MODEL", help="second model, compared picture by picture")
    evaluate.add_argument("--limit", type=int, help="measure only the first so many pictures")
    evaluate.add_argument("--root", help="folder of the data sets (default: the variable CADYQ_DATA)")
    evaluate.add_argument(
        "--border", choices=("symmetric", "replicate"), default="symmetric", help="of the LR"
    )
    _add_running(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="check that b bits mean at most 2^b levels",
        description="Count every convolution's distinct input levels; exit code 1 if they are too many.",
    )
    audit.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    audit.add_argument("image", metavar="IMAGE", help="picture to run it on")
    audit.add_argument("--json", action="store_true", help="print JSON instead of text")
    _add_running(audit)
    audit.set_defaults(run=_audit)


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="say what a model is", description="Say what models are.")
    info.add_argument("model", nargs="?", metavar="MODEL", help="name or file (default: all shipped models)")
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.set_defaults(run=_info)


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=MODES, default="tiles", help="how bits are decided (default: tiles)"
    )
    parser.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    parser.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")


def _running(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("mode", "tile", "budget", "threads")}


def _upscale(options: argparse.Namespace) -> int:
    from cadyq.io.images import SUFFIXES
    from cadyq.upscale import load

    jobs, several = _jobs([Path(name) for name in options.inputs], Path(options.output), options.format)
    for source, target in jobs:
        if target.suffix.lower() not in SUFFIXES:
            raise ArgumentError("output", str(target), f"a suffix out of {', '.join(SUFFIXES)}", "add one")
        if not several and not target.parent.is_dir():
            raise ArgumentError("output", str(target), "an existing folder to write to", "create it first")
        if not several and not source.is_file():
            from cadyq.io.images import read_image

            read_image(source)  # says what is wrong with it, before a model is loaded
    model = load(options.model, options.scale)
    codes = []
    with _progress("pictures" if several else "parts", len(jobs) if several else None) as step:
        for done, (source, target) in enumerate(jobs, start=1):
            try:
                result = _upscale_one(model, source, target, options, None if several else step)
                print(_report(model, source, target, result), flush=True)
            except CadyqError as error:
                if not several:
                    raise
                _complain(error)
                codes.append(error.exit_code)
            if several:
                step(done, len(jobs))
    if codes:
        print(f"cadyq: {len(codes)} of {len(jobs)} pictures failed", file=sys.stderr)
    return codes[0] if codes else 0


def _upscale_one(
    model: Model, source: Path, target: Path, options: argparse.Namespace, progress: Progress | None
) -> Result:
    from cadyq.errors import ImageError
    from cadyq.io.images import read_image

    picture = read_image(source)
    if picture.alpha is not None and target.suffix.lower() in (".jpg", ".jpeg"):
        raise ArgumentError("output", str(target), f"a format with transparency, as {source} has", "use .png")
    for note in picture.notes:
        print(f"cadyq: {source}: {note}", file=sys.stderr)
    result = model.upscale(picture, progress=progress, **_running(options))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{target.parent} cannot be created: {error.strerror or error}") from error
    result.save(target)
    return result


def _jobs(inputs: list[Path], output: Path, suffix: str | None) -> tuple[list[tuple[Path, Path]], bool]:
    """Pair every picture with the file it becomes; and whether the output is a folder."""
    from cadyq.data.sets import list_pictures

    into_folder = (
        len(inputs) > 1
        or inputs[0].is_dir()
        or output.is_dir()
        or (not output.suffix and not output.is_file())
        or str(output).endswith(os.sep)
    )
    if not into_folder:
        if suffix is not None and output.suffix.lower() not in (f".{suffix}", *_SAME.get(suffix, ())):
            raise ArgumentError("format", suffix, f"the suffix of the output, {output}", "leave it out")
        jobs = [(inputs[0], output)]
    else:
        if output.is_file():
            raise ArgumentError("output", str(output), "a folder, since there may be several pictures")
        sources: list[Path] = []
        for path in inputs:
            found = list_pictures(path) if path.is_dir() else [path]
            if not found:
                raise ArgumentError("input", str(path), "a folder that holds pictures")
            sources += found
        jobs = [(source, output / f"{source.stem}.{suffix or 'png'}") for source in sources]
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise ArgumentError("output", str(target), f"one picture, not both {taken[target]} and {source}")
        taken[target] = source
    for target in taken:
        if any(target.exists() and source.exists() and target.samefile(source) for source in taken.values()):
            raise ArgumentError("output", str(target), "not one of the inputs", "choose another output")
    return jobs, into_folder


_SAME = {"jpg": (".jpeg",), "tif": (".tiff",)}


def _report(model: Model, source: Path, target: Path, result: Result) -> str:
    height, width = result.pixels.shape[:2]
    parts = [
        f"{source} -> {target}: {width}x{height}",
        model.name,
        f"{result.seconds:.2f} s",
        f"mean {result.fqr:.2f} bits",
    ]
    if result.tile is not None:
        rows, cols = result.grid
        parts.append(f"{rows}x{cols} tiles of {result.tile}")
        parts.append(f"{result.exited:.0%} exited")
    return ", ".join(parts)


def _evaluate(options: argparse.Namespace) -> int:
    from cadyq.evaluate import compare, evaluate, write_csv
    from cadyq.upscale import load

    if options.csv is not None and len(options.data) > 1:
        raise ArgumentError("csv", options.csv, "one data set", "evaluate them one after the other")
    models = [load(name) for name in (options.model, options.against) if name is not None]
    results: list[dict[str, Any]] = []
    for data in options.data:
        found = []
        for model in models:
            with _progress(f"{model.name} on {data}", None) as step:
                extra = {"border": options.border, "limit": options.limit, "root": options.root}
                found.append(evaluate(model, data, progress=step, **_running(options), **extra))
        difference = compare(found[0].rows, found[1].rows) if len(found) > 1 else None
        if options.csv is not None:
            write_csv(options.csv, found[0])
        if not options.json:
            for one in found:
                print(_evaluation_text(one, header=not results and one is found[0]))
            if difference is not None:
                print(
                    f"  {models[0].name} - {models[1].name}: {difference.mean:+.3f} dB, 95 % interval "
                    f"[{difference.low:+.3f}, {difference.high:+.3f}], {difference.n_images} pictures"
                )
        results.append(
            {
                "evaluations": [one.to_mapping() for one in found],
                "difference": None if difference is None else vars(difference),
            }
        )
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


def _evaluation_text(evaluation: Evaluation, *, header: bool) -> str:
    s = evaluation.summary
    names = f"{'data':<12} {'model':<28} {'n':>4} {'PSNR dB':>8} {'SSIM':>7} {'FQR':>6} {'FQR area':>8}"
    names += f" {'BitOPs G':>9} {'exited':>6} {'s':>7}"
    line = f"{s.dataset:<12} {s.model:<28} {s.n_images:>4} {s.psnr_db:>8.3f} {s.ssim:>7.4f} {s.fqr:>6.2f}"
    line += f" {s.fqr_area:>8.2f} {s.bitops_g:>9.3f} {s.exited:>6.1%} {s.seconds:>7.2f}"
    return (f"{names}\n" if header else "") + f"{line}\n  {s.description} Mode {s.mode}, x{s.scale}."


def _audit(options: argparse.Namespace) -> int:
    from cadyq.audit import audit
    from cadyq.io.images import read_image
    from cadyq.upscale import load

    picture = read_image(options.image)
    with _progress("parts", None) as step:
        result = audit(load(options.model), picture, progress=step, **_running(options))
    print(json.dumps(result.to_mapping(), indent=2) if options.json else _audit_text(result))
    return 0 if result.is_clean else 1


def _audit_text(result: Audit) -> str:
    lines = [f"{'convolution':<22} {'kind':<6} {'group':<8} {'cells':>6} {'bits':<12} {'levels':>13} status"]
    for row in result.rows:
        bits = "float" if row.status == "float" else ",".join(map(str, row.bits))
        levels = f"{row.levels} / {row.allowed}" if row.allowed else "-"
        lines.append(
            f"{row.conv:<22} {row.kind:<6} {row.group:<8} {row.n_cells:>6} {bits:<12} {levels:>13} "
            f"{row.status}"
        )
    failed = [row.conv for row in result.rows if row.violations]
    verdict = "clean: no convolution sees more levels than its bits"
    if failed:
        verdict = f"FAILED: {', '.join(failed)}"
    return "\n".join([*lines, f"mode {result.mode}, mean {result.fqr:.2f} bits; {verdict}"])


def _info(options: argparse.Namespace) -> int:
    from cadyq.upscale import describe, shipped_models

    names = [options.model] if options.model is not None else shipped_models()
    records = [describe(name) for name in names]
    if options.json:
        print(json.dumps(records[0] if options.model is not None else records, indent=2))
    elif not records:
        print("no models are shipped with this installation")
    else:
        print("\n\n".join(map(_info_text, records)))
    return 0


def _info_text(record: dict[str, Any]) -> str:
    lines = [str(record["name"])]
    for key, value in record.items():
        if key != "name":
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {key.replace('_', ' ')}: {text}")
    return "\n".join(lines)


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Progress]:
    """Show a bar on the terminal's error stream; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, out_of: bar.update(task, completed=done, total=out_of)


def _complain(error: Exception) -> None:
    print(f"cadyq: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
