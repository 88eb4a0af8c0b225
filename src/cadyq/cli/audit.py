"""`cadyq audit`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import add_running, progress, running

if TYPE_CHECKING:
    from cadyq.audit import Audit

__all__ = ["add"]


def add(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="check that b bits mean at most 2^b levels",
        description="Count every convolution's distinct input levels; exit code 1 if they are too many.",
    )
    audit.add_argument("model", metavar="MODEL", help="name of a shipped model, or a model file")
    audit.add_argument("image", metavar="IMAGE", help="picture to run it on")
    audit.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_running(audit)
    audit.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.audit import audit
    from cadyq.io.images import read_image
    from cadyq.upscale import load

    picture = read_image(options.image)
    with progress("parts", None) as step:
        result = audit(load(options.model), picture, progress=step, **running(options))
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
