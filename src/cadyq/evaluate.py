"""Data set -> one row per picture, and their means; files of rows; paired comparison of two models."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cadyq.data.sets import DATA_SETS, find_pictures, load_pairs
from cadyq.errors import ArgumentError, DataError
from cadyq.functional.fidelity import paired_bootstrap, psnr_y, ssim_y
from cadyq.functional.resize import Border
from cadyq.io.files import write_atomic
from cadyq.upscale import Mode, Model, Progress

__all__ = ["Difference", "Evaluation", "Row", "Summary", "compare", "evaluate", "write_csv"]


@dataclass(frozen=True)
class Row:
    """Figures of one picture.

    Attributes:
        name: the file's name without its suffix.
        psnr_db: PSNR of Y of BT.601, scale pixels shaved, 8-bit output, in dB.
        ssim: SSIM by the same protocol; NaN where fewer than 11x11 pixels are left.
        fqr: mean bit-width over the body's sites, then cells.
        fqr_area: the same, cells counting by their area.
        bitops_g: 1e9 BitOPs of the body.
        zeros: share of (cell, site) pairs with 0 bits, in [0, 1].
        exited: share of cells that left the network, in [0, 1].
        seconds: wall time of upscaling.
    """

    name: str
    psnr_db: float
    ssim: float
    fqr: float
    fqr_area: float
    bitops_g: float
    zeros: float
    exited: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Means over the pictures of one data set.

    Attributes:
        dataset: the set's name, or the folder.
        description: what was measured: pictures, how many, how the LR pictures were made.
        model: the model's name.
        scale: enlargement factor.
        mode: how it ran.
        n_images: pictures measured.
        is_complete: whether this is a known benchmark in full, comparable with published figures.
    """

    dataset: str
    description: str
    model: str
    scale: int
    mode: str
    n_images: int
    is_complete: bool
    psnr_db: float
    ssim: float
    fqr: float
    fqr_area: float
    bitops_g: float
    zeros: float
    exited: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Rows and their means."""

    rows: tuple[Row, ...]
    summary: Summary

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON; what is not finite becomes None."""
        return {
            "summary": {k: _finite(v) for k, v in dataclasses.asdict(self.summary).items()},
            "rows": [{k: _finite(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows],
        }


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over pictures, and its 95 % interval by paired bootstrap.

    Attributes:
        figure: what was compared, a field of `Row`.
        mean: mean difference, in the figure's unit.
        low: lower end of the interval.
        high: upper end of the interval.
        n_images: pictures.
    """

    figure: str
    mean: float
    low: float
    high: float
    n_images: int


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    scale: int | None = None,
    mode: Mode = "tiles",
    tile: int | None = None,
    budget: float = 0.0,
    threads: int | None = None,
    border: Border = "symmetric",
    limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on a data set; LR pictures by MATLAB's bicubic, Y-PSNR and SSIM shave the scale.

    Args:
        model: a loaded model.
        data: a name out of `DATA_SETS`, or a folder of HR pictures.
        scale: None, or the model's own (a check that the right model was taken).
        mode: see `Model.upscale`, as ``tile``, ``budget`` and ``threads`` are.
        tile: side of a tile, LR pixels.
        budget: more or fewer bits.
        threads: CPU threads.
        border: how pictures are continued when they are made smaller, see `imresize`.
        limit: measure the first so many pictures only; the result is then not the set's figure, and says so.
        root: folder of all data sets, see `data_root`.
        progress: called after every picture with (done, total).

    Raises:
        ArgumentError: an argument is outside what it accepts. DataError: the set is missing or incomplete.
        ImageError: one of its pictures cannot be read.
    """
    if scale is not None and scale != model.scale:
        raise ArgumentError("scale", scale, f"{model.scale}, the scale of {model.name}")
    if limit is not None and limit < 1:
        raise ArgumentError("limit", limit, "at least 1 picture, or None")
    n_all = len(find_pictures(data, root))
    total = n_all if limit is None else min(limit, n_all)
    rows = []
    for pair in islice(load_pairs(data, model.scale, border, root), total):
        result = model.upscale(pair.lr, mode=mode, tile=tile, budget=budget, threads=threads)
        inner = min(pair.hr.shape[:2]) - 2 * model.scale
        if inner < 1:
            raise DataError(
                f"{pair.name} measures {pair.hr.shape[:2]}, too small to shave {model.scale} pixels"
            )
        rows.append(
            Row(
                name=pair.name,
                psnr_db=psnr_y(result.pixels, pair.hr, model.scale),
                ssim=ssim_y(result.pixels, pair.hr, model.scale) if inner >= 11 else math.nan,
                fqr=result.fqr,
                fqr_area=result.fqr_area,
                bitops_g=result.bitops / 1e9,
                zeros=result.zeros.entries,
                exited=result.exited,
                seconds=result.seconds,
            )
        )
        if progress is not None:
            progress(len(rows), total)
    return Evaluation(tuple(rows), _summary(rows, model, os.fspath(data), n_all, mode, border))


def write_csv(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Write the rows as CSV with a header and a last row ``mean``; an existing file is replaced as a whole.

    Raises:
        DataError: if the file cannot be written.
    """
    buffer = io.StringIO(newline="")
    names = [f.name for f in dataclasses.fields(Row)]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in evaluation.rows)
    means = {key: getattr(evaluation.summary, key) for key in names if key != "name"}
    writer.writerow({"name": "mean", **means})
    try:
        write_atomic(Path(path), buffer.getvalue().encode())
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def compare(a: Sequence[Row], b: Sequence[Row], figure: str = "psnr_db") -> Difference:
    """Compare two models on the same pictures: mean of a - b with a paired bootstrap interval.

    Args:
        a: rows of the one model.
        b: rows of the other, of the same pictures in the same order.
        figure: a numeric field of `Row`.

    Raises:
        ArgumentError: the pictures differ, there are none, or the figure is unknown or not finite.
    """
    if figure not in {f.name for f in dataclasses.fields(Row)} - {"name"}:
        raise ArgumentError("figure", figure, "a numeric field of Row, say psnr_db")
    if [row.name for row in a] != [row.name for row in b]:
        raise ArgumentError(
            "b", [row.name for row in b], f"the same pictures as a, {[row.name for row in a]}"
        )
    first, second = ([getattr(row, figure) for row in rows] for rows in (a, b))
    return Difference(figure, *paired_bootstrap(first, second), n_images=len(a))


def _summary(rows: list[Row], model: Model, data: str, n_all: int, mode: Mode, border: Border) -> Summary:
    known = DATA_SETS.get(data)
    about = known.description if known is not None else f"The pictures of {data}."
    if len(rows) < n_all:
        about += f" Only the first {len(rows)} of {n_all}: not the set's figure."
    if known is not None and not known.is_benchmark:
        about += " Not a published benchmark."
    about += f" LR by MATLAB bicubic, border {border}."
    means = {
        f.name: float(np.mean([getattr(row, f.name) for row in rows]))
        for f in dataclasses.fields(Row)
        if f.name != "name"
    }
    return Summary(
        dataset=data,
        description=about,
        model=model.name,
        scale=model.scale,
        mode=mode,
        n_images=len(rows),
        is_complete=known is not None and known.is_benchmark and len(rows) == n_all,
        **means,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
