"""The neutral comparison: everything there is of one backbone, on the same pictures, by one protocol."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.data.sets import load_pairs
from cadyq.errors import CadyqError, DataError
from cadyq.evaluate import Evaluation, Row, compare
from cadyq.report.bench import Bench, figures_of
from cadyq.report.lab import Request, data_facts
from cadyq.report.networks import Network
from cadyq.report.plots import curve_style, figure, save
from cadyq.report.table import Column, Table
from cadyq.report.timing import cpu_name
from cadyq.report.variants import Subject, fitted_for

__all__ = ["Contestant", "comparison", "contestants", "pareto"]

_NAMES = {
    "FP32": "float",
    "PAMS": "PAMS 8",
    "LinQ": "LinQ 8",
    "DAQ": "DAQ 4",
    "FQSR": "FQSR 8",
}
_LOOKUPS = {
    "lookup by edges": "look-up by edges (as CABM)",
    "picture thresholds": "picture + layer thresholds (as AdaBM)",
    "lookup by entropy": "look-up by entropy (as Granular-DQ)",
}
_TIMED = (270, 480)


@dataclass(frozen=True)
class Contestant:
    """A method: its label, and one subject per seed that it was trained with."""

    label: str
    subjects: tuple[Subject, ...]


def contestants(bench: Bench, backbone: str, scale: int) -> list[Contestant]:
    """What is compared: every network of the backbone for bicubic pictures, and variants of its CADyQ network.

    Networks that differ in nothing but their seed are one contestant.
    """
    own = [
        n
        for n in bench.networks
        if (n.backbone, n.scale, n.degradation) == (backbone, scale, "bicubic") and n.method[-1:] != "]"
    ]
    order = list(_NAMES)
    own.sort(key=lambda n: (order.index(n.method) if n.method in order else len(order), n.method, n.name))
    groups: dict[str, list[Network]] = {}
    for network in own:
        alone = network.name if network.seed is None else ""
        kind = json.dumps([network.method, network.steps, dict(network.conversion), alone], sort_keys=True)
        groups.setdefault(kind, []).append(network)
    methods = [group[0].method for group in groups.values()]
    result = []
    for group in groups.values():
        method, name = group[0].method, group[0].name
        label = _NAMES.get(method, method) + (f" ({name})" if methods.count(method) > 1 else "")
        result.append(Contestant(label, tuple(bench.subject(network) for network in group)))
    dynamic = bench.find(backbone, scale, "CADyQ")
    if dynamic is not None:
        for bits in (b for b in dynamic.bits if b):
            result.append(Contestant(f"static {bits}, CADyQ's weights", (bench.subject(dynamic, bits=bits),)))
        result += [
            Contestant(label, (bench.subject(dynamic, variant=variant),))
            for variant, label in _LOOKUPS.items()
            if _is_fitted(bench, dynamic, variant)
        ]
    return result


def _is_fitted(bench: Bench, network: Network, variant: str) -> bool:
    try:
        return variant in fitted_for(network, bench.models).variants
    except CadyqError:
        return False


def comparison(bench: Bench, backbone: str, scale: int, data: str) -> Table:
    """One table with paired intervals, and PSNR over BitOPs and over measured time with their Pareto fronts.

    Raises:
        DataError: the data set is missing.
    """
    found: list[tuple[Contestant, list[Evaluation]]] = []
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for contestant in contestants(bench, backbone, scale):
        evaluations = []
        for subject in contestant.subjects:
            evaluation, status = bench.measure(Request(subject, data))
            if evaluation is None:
                failed.append({"model": contestant.label, **subject.network.facts(), "status": status})
            else:
                evaluations.append(evaluation)
        if evaluations:
            found.append((contestant, evaluations))
    title = f"{backbone} x{scale} on {data_facts(bench.lab, data)['dataset']}: one protocol for all"
    if bench.lab.is_planning:
        return Table("comparison", title, [], [])
    times = _times([(contestant.label, contestant.subjects[0]) for contestant, _ in found], bench)
    reference = _over_seeds(found[0][1]) if found else []
    for contestant, evaluations in found:
        each = [evaluation.summary.psnr_db for evaluation in evaluations]
        row: dict[str, Any] = {
            "model": contestant.label,
            **contestant.subjects[0].network.facts(),
            "seeds": len(each),
            "deviation_db": statistics.stdev(each) if len(each) > 1 else None,
            "dataset": data,
            **_means([figures_of(evaluation) for evaluation in evaluations]),
            "n_images": evaluations[0].summary.n_images,
            "ms": times[contestant.label],
            "status": "measured",
        }
        if evaluations is not found[0][1]:
            d = compare(_over_seeds(evaluations), reference)
            row |= {"against_db": d.mean, "low_db": d.low, "high_db": d.high}
            row["interval_db"] = f"{d.low:+.3f} to {d.high:+.3f}"
        rows.append(row)
    for key, flag in (("bitops_g", "front_bitops"), ("ms", "front_ms")):
        front = pareto([(row[key], row["psnr_db"]) for row in rows])
        for row, is_best in zip(rows, front, strict=True):
            row[flag] = is_best
    files = _plot(bench, rows, data) if rows else []
    first = found[0][0].label if found else "the first row"
    columns = (
        Column("model", "Method"),
        Column("fqr", "FQR"),
        Column("bitops_g", "BitOPs G", 3),
        Column("psnr_db", "PSNR dB", 3),
        Column("ssim", "SSIM", 4),
        Column("against_db", f"dB over {first}", 3),
        Column("interval_db", "95 % interval"),
        Column("seeds", "Seeds"),
        Column("deviation_db", "deviation over seeds, dB", 3),
        Column("ms", "ms", 1),
        Column("runtime", "on"),
        Column("front_bitops", "front, BitOPs"),
        Column("front_ms", "front, ms"),
        Column("network", "Network"),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    notes = [
        "Intervals: paired bootstrap over pictures, each one's mean over seeds. BitOPs: body, mean per picture. Front: "
        "no other row is both cheaper and better.",
        f"ms: {_TIMED[1]}x{_TIMED[0]} LR pixels, median of {_repeats(bench)} interleaved runs, "
        f"{bench.lab.threads or 'all'} threads, {cpu_name()}; the integer engine where the network has a plan, else a "
        "simulation on torch, whose time says nothing about a chip.",
        "Rows named after successors are their ideas as a selector on CADyQ's own weights, fitted on the same "
        "measurement and to the same mean bits on training tiles; they are not those papers' networks.",
        _seeds(rows),
    ]
    return Table("comparison", title, columns, [*rows, *failed], notes, [], files)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, quality) no other point beats: none cheaper or equal is better, none equal is cheaper."""
    return [
        not any((c <= cost and q > quality) or (c < cost and q >= quality) for c, q in points)
        for cost, quality in points
    ]


def _over_seeds(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Rows of the first one, with each picture's mean PSNR over all."""
    return [
        dataclasses.replace(same[0], psnr_db=statistics.fmean(row.psnr_db for row in same))
        for same in zip(*(evaluation.rows for evaluation in evaluations), strict=True)
    ]


def _means(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.fmean(each[key] for each in figures) for key in figures[0]}


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    single = [row["model"] for row in rows if row["seeds"] == 1 and row["fqr"] < 32]
    if not single:
        return "Deviations over seeds are of the mean PSNR."
    return (
        f"One seed alone: {', '.join(single)}. What differs by less than another seed would change is not settled "
        "for them."
    )


def _repeats(bench: Bench) -> int:
    return 3 if bench.lab.quick else 7


def _times(labelled: Sequence[tuple[str, Subject]], bench: Bench) -> dict[str, float]:
    """Median milliseconds per subject on one picture, in turns."""
    image = _picture(bench)
    models = {label: subject.load() for label, subject in labelled}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for round_ in range(_repeats(bench) + 1):
        for label, model in models.items():
            start = time.perf_counter()
            model.upscale(image, threads=bench.lab.threads)
            if round_:
                seconds[label].append(time.perf_counter() - start)
    return {label: 1e3 * statistics.median(each) for label, each in seconds.items()}


def _picture(bench: Bench) -> NDArray[np.uint8]:
    """Of fixed size: the first picture of Large2K, cut, or a drawn one where there is no data."""
    try:
        lr = next(iter(load_pairs(bench.lab.large_set("Test2K"), 4, root=bench.lab.root))).lr
    except (DataError, StopIteration):
        from cadyq.engine.synthetic import random_picture

        return np.asarray(random_picture(*_TIMED), np.uint8)
    tall, wide = (-(-n // m) for n, m in zip(_TIMED, lr.shape[:2], strict=True))
    return np.ascontiguousarray(np.tile(lr, (tall, wide, 1))[: _TIMED[0], : _TIMED[1]])


def _plot(bench: Bench, rows: Sequence[dict[str, Any]], data: str) -> list[str]:
    files: list[str] = []
    plots = (
        ("bitops_g", "front_bitops", "BitOPs of the body (G, log scale)", "comparison-bitops"),
        (
            "ms",
            "front_ms",
            f"ms for {_TIMED[1]}x{_TIMED[0]} LR pixels, measured (log scale)",
            "comparison-ms",
        ),
    )
    for key, flag, label, name in plots:
        with figure(7.0, 3.6) as (made, axes):
            front = sorted((row[key], row["psnr_db"]) for row in rows if row[flag])
            axes.plot(
                *zip(*front, strict=True),
                color="#888888",
                linewidth=1,
                linestyle="--",
                zorder=1,
                label="Pareto front",
            )
            for i, row in enumerate(rows):
                error, style = None, curve_style(i)
                if "low_db" in row:
                    error = [[row["against_db"] - row["low_db"]], [row["high_db"] - row["against_db"]]]
                axes.errorbar(
                    row[key],
                    row["psnr_db"],
                    yerr=error,
                    linestyle="none",
                    **style,
                    markerfacecolor=style["color"] if row[flag] else "white",
                    markeredgewidth=1.2,
                    markersize=6.5,
                    elinewidth=0.8,
                    capsize=2,
                    label=row["model"] + ("" if key != "ms" or row["runtime"] == "engine" else " [torch]"),
                )
            axes.set_xscale("log")
            _plain_ticks(axes, [row[key] for row in rows])
            axes.set_xlabel(label)
            axes.set_ylabel(f"PSNR on {data_facts(bench.lab, data)['dataset']} (dB)")
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            files += save(made, bench.folder, name)
    return files


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Few plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values) / 1.15, max(values) * 1.15
    steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    ticks = [s for s in steps if low <= s <= high]
    while len(ticks) > 8:
        ticks = ticks[::2]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks or [low, high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
