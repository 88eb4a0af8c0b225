"""`cadyq info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    info = commands.add_parser("info", help="say what a model is", description="Say what models are.")
    info.add_argument("model", nargs="?", metavar="MODEL", help="name or file (default: all shipped models)")
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.upscale import describe, shipped_models

    names = [options.model] if options.model is not None else shipped_models()
    records = [describe(name) for name in names]
    if options.json:
        print(json.dumps(records[0] if options.model is not None else {"models": records}, indent=2))
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
