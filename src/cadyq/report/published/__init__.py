"""Figures printed in the CADyQ supplement and in successors' papers, as data, each with its source."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["BACKBONES", "Cost", "Quality", "cost", "quality", "settings", "slips"]

BACKBONES = {"IDN": "idn", "EDSR-baseline": "edsr", "SRResNet": "srresnet", "CARN": "carn"}
"""The paper's names of the backbones and ours, in the supplement's order."""


@dataclass(frozen=True)
class Quality:
    """A printed row of quality.

    Attributes:
        source: where it is printed.
        table: number of the table there.
        backbone: the paper's name.
        method: ``FP32``, ``PAMS``, ``CADyQ{4;8}`` and so on.
        scale: enlargement factor.
        dataset: what it was measured on.
        fqr: mean bit-width.
        psnr_db: in dB.
        ssim: in [0, 1].
    """

    source: str
    table: str
    backbone: str
    method: str
    scale: int
    dataset: str
    fqr: float
    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Cost:
    """A printed row of cost; ``None`` where nothing is printed.

    Attributes:
        source: where it is printed.
        table: number of the table there.
        backbone: the paper's name.
        method: as in `Quality`.
        setting: patch size, or which row.
        fqr: mean bit-width.
        params_k: parameters in thousands.
        psnr_db: on Urban100, in dB.
        bitops_g: in 1e9.
        latency_ms: in milliseconds.
        grad_variance: variance of the patches' mean gradient, unit unknown.
    """

    source: str
    table: str
    backbone: str
    method: str
    setting: str
    fqr: float | None
    params_k: float | None
    psnr_db: float | None
    bitops_g: float | None
    latency_ms: float | None
    grad_variance: float | None


def quality(table: str | None = None) -> list[Quality]:
    """Rows of `quality.csv`, all or of one table, in the printed order."""
    return [
        Quality(
            _source(row["source"], row["table"]),
            row["table"],
            row["backbone"],
            row["method"],
            int(row["scale"]),
            row["dataset"],
            float(row["fqr"]),
            float(row["psnr_db"]),
            float(row["ssim"]),
        )
        for row in _rows("quality")
        if table in (None, row["table"])
    ]


def cost(table: str | None = None) -> list[Cost]:
    """Rows of `cost.csv`, all or of one table, in the printed order."""
    numbers = ("fqr", "params_k", "psnr_db", "bitops_g", "latency_ms", "grad_variance")
    return [
        Cost(
            _source("supplement", row["table"]),
            row["table"],
            row["backbone"],
            row["method"],
            row["setting"],
            **{name: float(row[name]) if row[name] else None for name in numbers},
        )
        for row in _rows("cost")
        if table in (None, row["table"])
    ]


def settings() -> list[dict[str, str]]:
    """Table S6 and the text of supplement C: one row per setting, one column per backbone."""
    return _rows("settings")


def slips(table: str) -> list[str]:
    """What is misprinted in a table of the supplement, in sentences."""
    return [
        f"Misprint: {row['printed']}; meant: {row['meant']} ({row['reason']})."
        for row in _rows("slips")
        if row["table"] == table
    ]


def _source(source: str, table: str) -> str:
    if source == "supplement":
        return f"CADyQ supplement, table {table}"
    return "CADyQ, main paper, as quoted by its successors" if table == "main" else f"{table}, its own paper"


def _rows(name: str) -> list[dict[str, str]]:
    text = files("cadyq.report.published").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
