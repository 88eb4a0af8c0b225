"""A table with its provenance, as Markdown, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cadyq.io.files import write_atomic

__all__ = ["Column", "Table", "write_table"]

Row = Mapping[str, Any]  # by the keys of columns; what is missing or None prints as a dash


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: in rows, CSV and JSON.
        heading: for people.
        digits: decimals of numbers.
    """

    key: str
    heading: str
    digits: int = 2


@dataclass(frozen=True)
class Table:
    """A table as it is written.

    Attributes:
        name: ``S1``, ``B1``, ...
        title: what it shows.
        columns: in order.
        rows: one mapping per row; ``status`` is ``measured``, ``counted`` or why it is empty, ``group`` a heading.
        notes: sentences below it.
        differences: what differs from the paper's setting.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    differences: Sequence[str] = ()
    figures: Sequence[str] = field(default=())

    @property
    def measured(self) -> int:
        """Rows filled by a trained network."""
        return sum(row.get("status") == "measured" for row in self.rows)

    @property
    def counted(self) -> int:
        """Rows that need no training: counts, settings."""
        return sum(row.get("status") == "counted" for row in self.rows)

    def to_mapping(self) -> dict[str, Any]:
        """Plain object, fit for JSON."""
        return {
            "table": self.name,
            "title": self.title,
            "rows_total": len(self.rows),
            "rows_measured": self.measured,
            "rows_counted": self.counted,
            "notes": list(self.notes),
            "differences": list(self.differences),
            "figures": list(self.figures),
            "rows": [{k: _plain(v) for k, v in row.items()} for row in self.rows],
        }

    def to_csv(self, head: Mapping[str, Any] | None = None) -> str:
        """All keys of all rows, the columns' first; provenance (``head``) as equal last columns."""
        head = head or {}
        own = [k for row in self.rows for k in row]
        keys = list(dict.fromkeys([*(c.key for c in self.columns), *own, *head]))
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, keys, lineterminator="\n", restval="")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: "" if v is None else v for k, v in {**head, **row}.items()})
        return buffer.getvalue()

    def to_markdown(self, head: Sequence[str] = ()) -> str:
        """Title, provenance (``head``), one table per group, notes, differences."""
        lines = [f"# {self.name}: {self.title}", "", *(f"{line}  " for line in head), ""]
        for group, rows in _grouped(self.rows):
            if group:
                lines += [f"**{group}**", ""]
            lines.append("| " + " | ".join(c.heading for c in self.columns) + " |")
            lines.append("|" + "|".join("--:" if self._is_number(c) else "---" for c in self.columns) + "|")
            for row in rows:
                cells = (_text(row.get(c.key), c.digits).replace("|", "\\|") for c in self.columns)
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        lines += [f"![{name}]({name})\n" for name in self.figures if name.endswith(".png")]
        for title, sentences in (("Notes", self.notes), ("Other than in the paper", self.differences)):
            if sentences:
                lines += [f"{title}:", "", *(f"* {s}" for s in sentences), ""]
        return "\n".join(lines).rstrip() + "\n"

    def to_html(self) -> str:
        """The same as a fragment of a page; figures are linked."""
        parts = [f'<section id="{self.name}"><h2>{self.name}: {html.escape(self.title)}</h2>']
        for group, rows in _grouped(self.rows):
            parts.append("<div class='scroll'><table>")
            if group:
                parts.append(f"<caption>{html.escape(group)}</caption>")
            heads = "".join(
                f"<th{' class=n' if self._is_number(c) else ''}>{html.escape(c.heading)}</th>"
                for c in self.columns
            )
            parts.append(f"<thead><tr>{heads}</tr></thead><tbody>")
            for row in rows:
                filled = row.get("status") in ("measured", "counted")
                parts.append("<tr>" if filled else "<tr class='empty'>")
                for c in self.columns:
                    kind = " class=n" if self._is_number(c) else ""
                    parts.append(f"<td{kind}>{html.escape(_text(row.get(c.key), c.digits))}</td>")
                parts.append("</tr>")
            parts.append("</tbody></table></div>")
        parts += [f'<img src="{name}" alt="{self.name}">' for name in self.figures if name.endswith(".png")]
        for title, sentences in (("Notes", self.notes), ("Other than in the paper", self.differences)):
            if sentences:
                items = "".join(f"<li>{html.escape(s)}</li>" for s in sentences)
                parts.append(f"<h3>{title}</h3><ul>{items}</ul>")
        return "\n".join([*parts, "</section>"])

    def _is_number(self, column: Column) -> bool:
        values = [row.get(column.key) for row in self.rows]
        return any(isinstance(v, int | float) for v in values)


def write_table(folder: Path, table: Table, head: Mapping[str, Any]) -> None:
    """Write ``NAME.md``, ``NAME.csv`` and ``NAME.json``; ``head`` is the provenance, the same in all three."""
    lines = [f"{key.replace('_', ' ')}: {_text(value, 2)}" for key, value in head.items()]
    write_atomic(folder / f"{table.name}.md", table.to_markdown(lines).encode())
    write_atomic(folder / f"{table.name}.csv", table.to_csv(head).encode())
    record = {**{k: _plain(v) for k, v in head.items()}, **table.to_mapping()}
    write_atomic(folder / f"{table.name}.json", (json.dumps(record, indent=1) + "\n").encode())


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("group", "")), []).append(row)
    return list(groups.items())


def _text(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
