"""Times the integer engine: whole network and per stage, on random plans.

    python bench/engine.py [--size 480x270] [--threads 1 2] [--shape SHAPE ...] [--runs 9] [--isa ...]

Configurations are interleaved; minimum and median are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from machine import cpu

from cadyq.engine.run import Engine, available_isas
from cadyq.engine.synthetic import Shape, random_picture, random_plan

SHAPES = {
    "prelu9": Shape(),
    "relu3": Shape(act="relu", stage_act="none", head=3, tail=3),
    # the same with its tail as one convolution, and its blocks' codes as shortcuts
    "collapsed": Shape(act="relu", head=3, tail=5, quantized_skip=True, collapsed=True),
    "fusions": Shape(
        blocks=9, act="relu", stage_act="relu", head=3, head_bits=8, tail=3, rectify=True, fusions=True
    ),
    "distilled": Shape(
        blocks=4, head=3, head_bits=8, distilled=True, collapsed=True, tail=5, bicubic="symmetric"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="480x270")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["prelu9"])
    parser.add_argument("--isa", nargs="+", default=available_isas()[:1])
    parser.add_argument("--tile", type=int, default=48)
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[8], help="candidates; several make it dynamic"
    )
    parser.add_argument("--force", type=int, default=-1, help="force this candidate everywhere")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    image = random_picture(height, width)
    engines, times, stages = {}, {}, {}
    for name in args.shape:
        shape = Shape(**{**SHAPES[name].__dict__, "tile": args.tile, "bits": tuple(args.bits)})
        plan = random_plan(shape)
        for isa in args.isa:
            for threads in args.threads:
                engines[name, isa, threads] = Engine(plan, threads, isa)
                times[name, isa, threads], stages[name, isa, threads] = [], []
    print(cpu())
    for i in range(args.runs + 1):
        for key, engine in engines.items():
            rows, cols = -(-height // args.tile), -(-width // args.tile)
            choice = None
            if args.force >= 0:
                choice = np.full((rows, cols, len(engine.plan.sites)), args.force, np.int8)
            start = time.perf_counter()
            engine.upscale(image, choice)
            if i:
                times[key].append(time.perf_counter() - start)
                stages[key].append(engine.profile())
    for key, values in times.items():
        print(f"{key}: min {min(values) * 1e3:.1f} ms, median {statistics.median(values) * 1e3:.1f} ms")
        best = stages[key][values.index(min(values))]
        merged: dict[str, float] = {}
        for stage, seconds in best:
            merged[stage] = merged.get(stage, 0.0) + seconds
        print("   " + "; ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in merged.items()))


if __name__ == "__main__":
    main()
