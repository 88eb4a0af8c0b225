"""Every table and figure of the supplement, from one call."""

from __future__ import annotations

import html
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import cadyq
from cadyq.errors import ArgumentError
from cadyq.io.files import write_atomic
from cadyq.report import costs, figures, quality
from cadyq.report.bench import Bench, Builder
from cadyq.report.lab import Lab, Request
from cadyq.report.table import Table, write_table

__all__ = ["REPORTS", "commit", "estimate", "page", "provenance", "reproduce"]

REPORTS: dict[str, Builder] = {
    "S1": quality.s1,
    "S2": quality.s2,
    "S3": quality.s3,
    "S4": quality.s4,
    "S5": costs.s5,
    "S6": costs.s6,
    "S7": costs.s7,
    "S8": costs.s8,
    "figS1": figures.fig_s1,
    "figS2": figures.fig_s2,
    "figS3": figures.fig_s3,
    "B1": quality.b1,
}
"""What can be reproduced, in the order of the summary."""

Say = Callable[[str], None]


def reproduce(names: Sequence[str], bench: Bench, say: Say = lambda text: None) -> list[Table]:
    """Build and write the named tables and figures, and a summary (``index.html``, ``summary.json``).

    Args:
        names: keys of `REPORTS`, or ``all``.
        bench: networks, lab and folder.
        say: told what happens.

    Raises:
        ArgumentError: an unknown name. CadyqError: the data or a model cannot be read.
    """
    chosen = list(REPORTS) if "all" in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in REPORTS:
            raise ArgumentError("name", name, f"one of {', '.join(REPORTS)}, or all")
    bench.folder.mkdir(parents=True, exist_ok=True)
    say(estimate([REPORTS[name] for name in chosen], bench))
    head = provenance(bench.lab)
    tables = []
    for name in chosen:
        table = REPORTS[name](bench)
        write_table(bench.folder, table, head)
        tables.append(table)
        say(f"{name}: {state(table)}")
    title = "CADyQ supplement, reproduced" + (" (quick: a part of every set)" if bench.lab.quick else "")
    write_atomic(bench.folder / "index.html", page(title, tables, head).encode())
    summary = {**head, "tables": {table.name: state(table) for table in tables}}
    write_atomic(bench.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return tables


def state(table: Table) -> str:
    """How far a table is filled, in a sentence."""
    text = f"{table.measured} of {len(table.rows)} rows filled by a trained network"
    return text + (f", {table.counted} counted" if table.counted else "")


def estimate(builders: Sequence[Builder], bench: Bench) -> str:
    """What is left to measure, and roughly how long that takes here."""
    with bench.lab.planning() as wanted:
        for build in builders:
            build(bench)
    if not wanted:
        return "everything was measured before"
    seconds = _seconds(wanted, bench.lab)
    return f"{len(wanted)} measurements, about {timedelta(seconds=round(seconds))} (h:mm:ss)"


def _seconds(wanted: Sequence[Request], lab: Lab) -> float:
    speed: dict[tuple[str, bool], float] = {}
    total = 0.0
    for request in wanted:
        network = request.subject.network
        key = (network.name, request.mode == "tiles")
        if key not in speed:
            speed[key] = lab.seconds_per_pixel(network, request.mode)
        total += speed[key] * lab.pixels(request)
    return total


def provenance(lab: Lab) -> dict[str, Any]:
    """What stands on top of every table."""
    return {
        "made_with": f"cadyq {cadyq.__version__}",
        "commit": commit(),
        "quick": lab.quick,
        "data_note": "quick: only the first pictures of every set, not the set's figures"
        if lab.quick
        else "whole sets, LR by MATLAB bicubic, symmetric border",
    }


def commit() -> str:
    """Commit of the source tree, or of the one that the package was built from, with a + where it was changed since."""
    package = Path(cadyq.__file__).parent
    home, built_from = package.parents[1], package / "commit.txt"
    if built_from.is_file():
        return built_from.read_text().strip()
    if not (home / ".git").exists():
        return "unknown (not built from a repository)"
    try:
        name = _git(home, "rev-parse", "HEAD")
        return name + ("+" if _git(home, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(home: Path, *what: str) -> str:
    command = ["git", "-C", os.fspath(home), *what]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1.2rem;color:#1a1a1a}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin:2.4rem 0 .6rem;border-top:1px solid #ccc;padding-top:1rem}
h3{font-size:.9rem;margin:.8rem 0 .2rem;color:#444} ul{margin:.2rem 0 .6rem;font-size:.85rem;color:#333}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:.8rem;margin:.5rem 0 1rem;
font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.22rem .55rem;text-align:left;vertical-align:bottom}
thead th{border-bottom:1.5px solid #333;font-weight:600;max-width:8.5rem} tbody tr{border-bottom:1px solid #e3e3e3}
.n{text-align:right} .empty td{color:#767676} img{max-width:min(100%,56rem);height:auto;margin:.5rem 0}
.meta{font-size:.85rem;color:#444}
nav a{margin-right:.8rem} td:first-child{white-space:nowrap} td:last-child{min-width:5.5rem}
"""


def page(title: str, tables: Sequence[Table], head: dict[str, Any]) -> str:
    """One page with all tables and figures, and how far each is filled."""
    facts = " · ".join(f"{html.escape(k.replace('_', ' '))}: {html.escape(str(v))}" for k, v in head.items())
    links = "".join(f'<a href="#{t.name}">{t.name}</a>' for t in tables)
    states = "".join(f"<li>{t.name}: {html.escape(state(t))}</li>" for t in tables)
    body = "\n".join(table.to_html() for table in tables)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p class=meta>{facts}</p>"
        f"<nav>{links}</nav><ul>{states}</ul>{body}</body></html>\n"
    )
