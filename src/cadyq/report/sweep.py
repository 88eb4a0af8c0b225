"""Models x tiles x budgets: every point is measured once, whichever process comes first, and survives interruptions."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cadyq.errors import MissingExtraError
from cadyq.evaluate import Summary
from cadyq.io.files import write_atomic
from cadyq.report.lab import Lab, Request
from cadyq.report.plots import curve_style, figure, save

__all__ = ["CSV_COLUMNS", "plot_sweep", "points", "sweep", "write_sweep"]

_SETTINGS = ("model", "data", "mode", "tile", "budget")
CSV_COLUMNS = (
    *_SETTINGS,
    *(f.name for f in dataclasses.fields(Summary) if f.name not in (*_SETTINGS, "dataset")),
)
"""Columns of ``sweep.csv``: the setting, then the fields of `Summary`."""


def sweep(requests: Sequence[Request], lab: Lab, folder: Path, say: Callable[[str], None] = print) -> int:
    """Measure what is not yet measured and nobody else is measuring; returns how many points others still have.

    ``sweep.csv`` is replaced as a whole after every point, so no reader ever sees half a row.

    Raises:
        CadyqError: as `evaluate` does; what was measured before stays. MissingExtraError: filelock is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = 0
    for number, request in enumerate(requests, start=1):
        with _claim(folder / ".measured" / f"{lab.key(request)}.lock") as is_ours:
            if not is_ours:
                elsewhere += 1
                continue
            found = lab.evaluate(request)
        assert found is not None
        write_sweep(requests, lab, folder)
        s = found.summary
        say(
            f"{number}/{len(requests)} {request.subject.label} tile {request.tile} budget {request.budget:+g}: "
            f"{s.psnr_db:.3f} dB, FQR {s.fqr:.2f}"
        )
    write_sweep(requests, lab, folder)
    return elsewhere


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process may work on something; a process that dies loses its claim."""
    try:
        from filelock import FileLock, Timeout
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "filelock is not installed, and sweeps need it; install it with: pip install 'cadyq[report]'"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def points(requests: Sequence[Request], lab: Lab) -> list[dict[str, Any]]:
    """Rows of everything measured so far, in the order of the requests."""
    rows = []
    with lab.planning():  # finds, and measures nothing
        for request in requests:
            found = lab.evaluate(request)
            if found is not None:
                summary = dataclasses.asdict(found.summary)
                setting = {
                    "model": request.subject.label,
                    "data": request.data,
                    "mode": request.mode,
                    "tile": request.tile,
                    "budget": request.budget,
                }
                rows.append({key: {**summary, **setting}[key] for key in CSV_COLUMNS})
    return rows


def write_sweep(requests: Sequence[Request], lab: Lab, folder: Path) -> None:
    """Write ``sweep.csv`` from what was measured so far."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points(requests, lab))
    write_atomic(folder / "sweep.csv", buffer.getvalue().encode())


def plot_sweep(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """PSNR over FQR, one curve per model, data set and tile; returns the files' names."""
    curves: dict[tuple[str, str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["model"], row["data"], row["tile"]), []).append(row)
    with figure(7.0, 3.4) as (made, axes):
        for i, ((model, data, tile), each) in enumerate(curves.items()):
            each.sort(key=lambda r: r["fqr"])
            axes.plot(
                [r["fqr"] for r in each],
                [r["psnr_db"] for r in each],
                **curve_style(i),
                label=f"{model}, {data}, tile {tile or 'own'}",
            )
        axes.set_xlabel("FQR (mean bits)")
        axes.set_ylabel("PSNR (dB)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return save(made, folder, "sweep")
