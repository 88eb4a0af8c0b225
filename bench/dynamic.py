"""A dynamic network against its static form: total time over a data set, and what it costs in PSNR.

    CADYQ_DATA=DATA python bench/dynamic.py [--sets Urban100 Large2K] [--threads 2] [--rounds 3]

Contestants take turns on every picture, complete upscaling of an array in memory (judging, filling and figures
included); the medians are summed. A third one is the control: the static network made about as fast as the dynamic
one by leaving out the same blocks everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from machine import commit, cpu

from cadyq.cells import Levels
from cadyq.data.sets import load_pairs
from cadyq.engine.plan import Block, Plan
from cadyq.engine.run import Engine
from cadyq.functional.fidelity import psnr_y
from cadyq.upscale import Model, load

Call: TypeAlias = Callable[[Levels], Levels]


def without_blocks(plan: Plan, n: int) -> Plan:
    """The plan less n of the blocks that can be left out, evenly spread."""
    free = [i for i, s in enumerate(plan.steps) if isinstance(s, Block) and s.residual and s.src == s.dst]
    gone = {free[int((k + 0.5) * len(free) / n)] for k in range(n)}
    return replace(plan, steps=tuple(s for i, s in enumerate(plan.steps) if i not in gone))


def runner(model: Model, threads: int) -> Call:
    return lambda lr: model.upscale(lr, threads=threads).pixels


def bare(engine: Engine) -> Call:
    return lambda lr: engine.upscale(lr).image


def seconds(call: Call, pictures: list[Levels]) -> float:
    total = 0.0
    for lr in pictures:
        call(lr)
        start = time.perf_counter()
        call(lr)
        total += time.perf_counter() - start
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dynamic", default="srresnet-x4-exit")
    parser.add_argument("--static", default="srresnet-x4-pams8")
    parser.add_argument("--sets", nargs="+", default=["Urban100", "Large2K"])
    parser.add_argument("--limit", type=int, help="only the first so many pictures of a set")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    dynamic, static = load(options.dynamic), load(options.static)
    if static.plan is None:
        parser.error(f"--static: {options.static} has no integer form: {static.no_plan_because}")
    threads, plan = options.threads, static.plan.plan
    assert dynamic.engine is not None
    print(cpu())
    print(f"{dynamic.engine.isa()}, {threads} threads, commit {commit()}")
    free = sum(isinstance(s, Block) and s.residual and s.src == s.dst for s in plan.steps)
    found: dict[str, object] = {
        "cpu": cpu(),
        "isa": dynamic.engine.isa(),
        "threads": threads,
        "commit": commit(),
    }
    for name in options.sets:
        pairs = [(p.lr, p.hr) for p in islice(load_pairs(name, static.scale), options.limit)]
        # How many blocks, from a few pictures; then all contestants on all of them.
        few = [lr for lr, _ in pairs[:: max(1, len(pairs) // 6)]]
        shortest = bare(Engine(without_blocks(plan, free), threads))
        slow, fast, least = (
            seconds(call, few) for call in (runner(static, threads), runner(dynamic, threads), shortest)
        )
        n = min(free, max(1, round((slow - fast) / (slow - least) * free)))
        control = Engine(without_blocks(plan, n), threads)
        calls = {
            "static": runner(static, threads),
            "dynamic": runner(dynamic, threads),
            f"static, {n} of {free} blocks left out": bare(control),
        }
        totals = dict.fromkeys(calls, 0.0)
        quality: dict[str, list[float]] = {label: [] for label in calls}
        exited = []
        for lr, hr in pairs:
            taken: dict[str, list[float]] = {label: [] for label in calls}
            for round_ in range(options.rounds + 1):
                for label, call in calls.items():
                    start = time.perf_counter()
                    pixels = call(lr)
                    if round_:
                        taken[label].append(time.perf_counter() - start)
                    else:  # the first one warms up
                        quality[label].append(psnr_y(pixels, hr, static.scale))
            for label, values in taken.items():
                totals[label] += statistics.median(values)
            exited.append(dynamic.upscale(lr, threads=threads).exited)
        print(f"\n{name}, {len(pairs)} pictures, {np.mean(exited):.1%} of the cells exited")
        print(f"{'':40} {'s':>8} {'times':>6} {'PSNR dB':>8} {'':>7}")
        base, reference = totals["static"], float(np.mean(quality["static"]))
        for label, total in totals.items():
            psnr = float(np.mean(quality[label]))
            print(f"{label:40} {total:8.2f} {base / total:6.2f} {psnr:8.3f} {psnr - reference:+7.3f}")
        found[name] = {
            label: {"seconds": totals[label], "psnr_db": float(np.mean(quality[label]))} for label in calls
        } | {"exited": float(np.mean(exited)), "n_images": len(pairs)}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
