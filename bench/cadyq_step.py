"""What a CADyQ step costs beside a float step of the same network: time and peak memory.

    python bench/cadyq_step.py [--network edsr-x4] [--threads 2] [--batch 16] [--patch 48] [--rounds 3] [--json]

Form and losses are the paper's (`paper/` recipes): selectors choose among 4, 6 and 8 bits, the gradient is the
mixture's. With a teacher, the 8-bit network runs as well and the attention transfer is added. Every kind has a
process of its own in every round (one unmeasured step, then five), so that peak memory is its own; ratios are of
medians. Pictures are noise: what is in them does not change the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from machine import commit, cpu, peak_mb

from cadyq.backbones import build_backbone
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.training import fastconv
from cadyq.training.device import Device
from cadyq.training.loss import StepLoss
from cadyq.training.stages import read_training

KINDS = ("float", "CADyQ", "CADyQ, taught")
BARS = {"CADyQ": 1.4, "CADyQ, taught": 1.8}
MEMORY_BAR = 1.6
STEPS = 5


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of five steps, and the process's peak memory in MB."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    training = read_training(f"paper/{options.network}")
    stage = training.stage("float" if kind == "float" else "cadyq")
    network, teacher = build_backbone(training.backbone, **training.options).eval(), None
    lr = torch.rand(options.batch, 3, options.patch, options.patch)
    hr = torch.rand(options.batch, 3, *(options.patch * training.scale,) * 2)
    if stage.quantization is not None:
        floating, static = network, training.stage("static").quantization
        assert static is not None
        seen = observe(floating, [lr[:2]])
        network = convert(floating, stage.quantization)
        calibrate(network, seen, stage.quantization)
        if kind == "CADyQ, taught":
            teacher = convert(floating, static).eval()
            calibrate(teacher, seen, static)
    network.train()
    loss_of = StepLoss(network, teacher, stage.recipe, Device())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        loss, _ = loss_of(lr, hr, None, stage.quantization is not None, 1e-4)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="edsr-x4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options)))
        return
    found: dict[str, dict[str, list[float]]] = {kind: {"seconds": [], "peak_mb": []} for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found[kind]["seconds"] += one["seconds"]
            found[kind]["peak_mb"].append(one["peak_mb"])
    result: dict[str, Any] = {"network": options.network, "threads": options.threads, "cpu": cpu()}
    result |= {"isas": fastconv.isas(), "commit": commit(), "torch": torch.__version__}
    for kind, each in found.items():
        middle, peak = statistics.median(each["seconds"]), max(each["peak_mb"])
        row = {"median_s": middle, "min_s": min(each["seconds"]), "peak_mb": peak}
        if kind != "float":
            row["time_ratio"] = middle / result["float"]["median_s"]
            row["memory_ratio"] = peak / result["float"]["peak_mb"]
        result[kind] = row
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['cpu']}\n{options.network}, {options.threads} threads, batch {options.batch}")
    for kind in KINDS:
        row = result[kind]
        line = f"  {kind:<14} min {row['min_s']:.3f} s, median {row['median_s']:.3f} s, peak {row['peak_mb']:.0f} MB"
        if kind in BARS:
            line += f"; {row['time_ratio']:.2f} of float's time (bar {BARS[kind]})"
            line += f", {row['memory_ratio']:.2f} of its memory (bar {MEMORY_BAR})"
        print(line)


if __name__ == "__main__":
    main()
