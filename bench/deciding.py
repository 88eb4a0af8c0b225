"""What deciding costs: a network whose selectors always say 8 bits, against the static one of the same shape.

    python bench/deciding.py [--size 480x270 960x540] [--threads 2] [--rounds 9] [--json FILE]

The selectors look at every tile and add up their scores as ever; a bias makes the largest candidate win. The networks
take turns. ``free`` decides as trained. Random plans with the shapes of the other backbones come after the shipped one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from engine import SHAPES
from machine import commit, cpu

from cadyq.engine.plan import Plan
from cadyq.engine.run import Engine
from cadyq.engine.runtime import with_budget
from cadyq.engine.synthetic import random_picture, random_plan
from cadyq.io.plans import load_plan
from cadyq.io.shipped import plan_path

ALWAYS = 1e6  # budget at which the most bits win every tile


def pairs() -> dict[str, tuple[Plan, Plan]]:
    """Static and dynamic plans by name."""
    static, dynamic = (load_plan(found(name)).plan for name in ("srresnet-x4-pams8", "srresnet-x4-cadyq"))
    result = {"srresnet-x4": (static, dynamic)}
    for name, shape in SHAPES.items():
        one, three = (random_plan(replace(shape, tile=dynamic.tile, bits=bits)) for bits in ((8,), (4, 6, 8)))
        result[f"random, {name}"] = (one, three)
    return result


def found(name: str) -> Path:
    path = plan_path(name) or Path("models") / f"{name}.plan.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run this in the repository's root")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["480x270", "960x540"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
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
            image = random_picture(height, width)
            times: dict[str, list[float]] = {key: [] for key in engines}
            for round_ in range(args.rounds + 1):
                for key, engine in engines.items():
                    start = time.perf_counter()
                    bits = engine.upscale(image).bits
                    if round_:
                        times[key].append(1e3 * (time.perf_counter() - start))
                    if key == "always 8" and not (bits == 8).all():
                        raise SystemExit(f"{name}: selectors chose {np.unique(bits)} bits")
            row = {"network": name, "size": size, "isa": engines["static"].isa}
            for key, each in times.items():
                row[key] = {"min_ms": min(each), "median_ms": statistics.median(each)}
            row["ratio"] = statistics.median(times["always 8"]) / statistics.median(times["static"])
            row["ratio_of_minima"] = min(times["always 8"]) / min(times["static"])
            results.append(row)
            middles = ", ".join(f"{key} {statistics.median(each):.1f}" for key, each in times.items())
            print(
                f"{name:<20} {size}: medians {middles} ms; always 8 / static {row['ratio']:.3f} "
                f"(minima {row['ratio_of_minima']:.3f})"
            )
    if args.json:
        facts = {"cpu": cpu(), "commit": commit(), "threads": args.threads, "rounds": args.rounds}
        args.json.write_text(json.dumps({**facts, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
