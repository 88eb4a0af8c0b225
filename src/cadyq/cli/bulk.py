"""`cadyq bulk`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import add_result, add_running, suffix_rule, wanted_from
from cadyq.cli.events import shown
from cadyq.errors import ArgumentError

if TYPE_CHECKING:
    from cadyq.bulk import Cluster

__all__ = ["add"]


def add(commands: Any) -> None:
    bulk = commands.add_parser(
        "bulk",
        help="upscale very many pictures, also on many machines, to and from URLs",
        description="Upscale a folder into a folder, each of them a path or any URL that fsspec knows "
        "(s3://, gs://, sftp://, ...). What was done there is skipped the next time; a job that was killed, as a "
        "whole or in parts, is finished by the same command. Without --ray it runs on this machine.",
    )
    bulk.add_argument("source", metavar="SRC", help="folder of pictures, or pattern; path or URL")
    bulk.add_argument("output", metavar="DST", help="folder; path or URL")
    bulk.add_argument("-r", "--recursive", action="store_true", help="also folders inside; the tree is kept")
    bulk.add_argument("--overwrite", action="store_true", help="make all anew, whatever lies there")
    bulk.add_argument(
        "--retries",
        type=int,
        default=3,
        help="how often a failed access, or a picture whose worker died, is tried again (default: 3)",
    )
    cluster = bulk.add_argument_group("many machines (needs: pip install 'cadyq[ray]')")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="work on the Ray cluster at this address (auto, HOST:PORT, ray://HOST:PORT), every machine of which "
        "has cadyq; none or local starts one on this machine",
    )
    cluster.add_argument(
        "--workers", type=int, help="pictures worked on at a time (default: as many as CPUs allow)"
    )
    add_result(bulk)
    bulk.add_argument("--json", action="store_true", help="print events, one JSON object a line")
    add_running(bulk, threads="CPU threads of a worker (default: 1 with --ray, else all)")
    bulk.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.bulk import find_items, make_order, run_bulk
    from cadyq.pictures import model

    wanted, cluster = wanted_from(options), _cluster(options)
    if cluster is not None:
        wanted = replace(wanted, threads=cluster.threads)
    if wanted.model is not None:
        model(wanted.model)  # says what is wrong with it once, not for every picture
        if Path(wanted.model).is_file():
            # A worker on this machine may run in another folder.
            wanted = replace(wanted, model=str(Path(wanted.model).absolute()))
    base, items = find_items(options.source, options.output, suffix_rule(options), options.recursive)
    order = make_order(base, options.output, wanted, overwrite=options.overwrite, retries=options.retries)
    with shown(options.json, len(items)) as emit:
        return run_bulk(order, items, emit, cluster).exit_code


def _cluster(options: argparse.Namespace) -> Cluster | None:
    from cadyq.bulk import Cluster

    if options.ray is None:
        if options.workers is not None:
            raise ArgumentError("workers", options.workers, "to be given together with --ray")
        return None
    return Cluster(options.ray, options.workers, 1 if options.threads is None else options.threads)
