"""`cadyq download`."""

from __future__ import annotations

import argparse
from typing import Any

from cadyq.cli.common import progress

__all__ = ["add"]


def add(commands: Any) -> None:
    download = commands.add_parser(
        "download",
        help="fetch a data set",
        description="Fetch a data set for training, checked, into its usual folders. Interrupted, it goes on "
        "where it was. DIV2K (3.7 GB) is for academic research only.",
    )
    download.add_argument("name", metavar="NAME", help="DIV2K")
    download.add_argument("root", metavar="ROOT", help="folder of all data sets; made if missing")
    download.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.data.download import download

    with progress(options.name, None) as step:
        folders = download(options.name, options.root, step)
    for folder in folders:
        print(folder)
    return 0
