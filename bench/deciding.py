"""What deciding costs: a network whose selectors always say 8 bits, against the static one of the same shape.

    CADYQ_MODELS=models python bench/deciding.py [--size 480x270 960x540] [--threads 2] [--rounds 5] [--out FILE]

The selectors look at every tile and add up their scores as ever; a bias makes the largest candidate win. The networks
take turns. ``free`` decides as trained. Random plans with the shapes of the other backbones come after the shipped one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from engine import SHAPES
from machine import commit, cpu

from cadyq.engine.plan import Plan
from cadyq.engine.run import Engine
from cadyq.engine.runtime import with_budget
from cadyq.engine.synthetic import random_picture, random_plan
from cadyq.report.timing import interleaved
from cadyq.upscale import load

ALWAYS = 1e6  # budget at which the most bits win every tile


def pairs() -> dict[str, tuple[Plan, Plan]]:
    """Static and dynamic plans by name."""
    found = [load(name).plan for name in ("srresnet-x4-pams8", "srresnet-x4-cadyq")]
    static, dynamic = (loaded.plan for loaded in found if loaded is not None)
    result = {"srresnet-x4": (static, dynamic)}
    for name, shape in SHAPES.items():
        one, three = (random_plan(replace(shape, tile=dynamic.tile, bits=bits)) for bits in ((8,), (4, 6, 8)))
        result[f"random, {name}"] = (one, three)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["480x270", "960x540"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    results = []
    print(cpu())
    for name, (static, dynamic) in pairs().items():
        engines = {
            "static": Engine(static, args.threads),
            "always 8": Engine(with_budget(dynamic, ALWAYS), args.threads),
            "free": Engine(dynamic, args.threads),
        }
        for size in args.size:
            width, height = map(int, size.split("x"))
            turns = {key: (engine, None) for key, engine in engines.items()}
            times = interleaved(turns, random_picture(height, width), args.rounds)
            if times["always 8"].fqr != 8:
                raise SystemExit(f"{name}: selectors chose {np.unique(times['always 8'].bits)} bits")
            row = {"network": name, "size": size, "isa": engines["static"].isa}
            for key, timed in times.items():
                row[key] = {"min_ms": 1e3 * min(timed.seconds), "median_ms": 1e3 * timed.median}
            row["ratio"] = times["always 8"].median / times["static"].median
            row["ratio_of_minima"] = min(times["always 8"].seconds) / min(times["static"].seconds)
            results.append(row)
            middles = ", ".join(f"{key} {1e3 * timed.median:.1f}" for key, timed in times.items())
            print(
                f"{name:<20} {size}: medians {middles} ms; always 8 / static {row['ratio']:.3f} "
                f"(minima {row['ratio_of_minima']:.3f})"
            )
    if args.out:
        facts = {"cpu": cpu(), "commit": commit(), "threads": args.threads, "rounds": args.rounds}
        args.out.write_text(json.dumps({**facts, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
