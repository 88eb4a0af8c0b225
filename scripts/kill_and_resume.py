"""Kill a training with SIGKILL at random moments, go on, and compare the weights with those of an unbroken run.

    python scripts/kill_and_resume.py [--kills 20] [--steps 120] [--seed 0]

A tiny dynamic network with a teacher, a target for its mean bits, damaged patches and validation: everything that has
a state. Prints where the kills fell, and fails unless every weight is bit-identical.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cadyq.backbones import Backbone, build_backbone
from cadyq.config import Quantization
from cadyq.data.crops import CropArrays
from cadyq.functional.resize import downscale
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.training.loop import Recipe, to_tensor, train


def crops() -> CropArrays:
    rng = np.random.default_rng(0)
    hr = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    return CropArrays(np.stack([downscale(h, 2) for h in hr]), hr)


def networks() -> tuple[Backbone, Backbone]:
    torch.manual_seed(0)
    base = build_backbone("edsr", scale=2, channels=8, n_blocks=1).eval()
    config = Quantization(bits=(4, 6, 8), dynamic=True, channel_power=0.8)
    result = convert(base, config)
    calibrate(result, observe(base, [to_tensor(crops().lr)]), config)
    return result, base


def run(folder: Path, steps: int) -> None:
    """Train (from the last checkpoint, if there is one) and write the final weights."""
    recipe = Recipe(
        steps=steps,
        batch=2,
        patch=16,
        small_patch=12,
        small_share=0.5,
        bits="mixed",
        target_fqr=5.0,
        w_teacher=0.5,
        degrade=True,
        validate_every=7,
        validation_crops=1,
        lr_selector=1e-2,
    )
    network, teacher = networks()
    quiet = {"log": lambda _: None, "save_every": 2, "keep": 3}
    train(network, crops(), recipe, folder, teacher=teacher, validation=crops(), **quiet)  # type: ignore[arg-type]
    torch.save(network.state_dict(), folder / "final.pt")


def child(folder: Path, steps: int) -> int:
    """Run in a child process, which shares the imports and nothing else; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(folder, steps)
            code = 0
        finally:
            os._exit(code)
    return pid


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        run(Path(name) / "first", 1)  # here, so that no child spends its time on imports
        began = time.monotonic()
        _, status = os.waitpid(child(whole, options.steps), 0)
        duration = time.monotonic() - began
        if status:
            sys.exit("the unbroken run failed")
        kills = runs = 0
        while kills < options.kills:
            pid = child(broken, options.steps)
            time.sleep(moments.uniform(0.02, 1.6 / options.kills) * duration)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                # Between two renames there is no state.pt for a moment, but the one before.
                newest = next((p for p in (broken / "state.pt", broken / "state.1.pt") if p.exists()), None)
                step = 0 if newest is None else torch.load(newest, weights_only=True)["step"]
                print(f"kill {kills}: {newest and newest.name} at step {step}", flush=True)
            else:  # faster than its kill: begin anew
                runs += 1
                broken = Path(name) / f"broken{runs}"
        _, status = os.waitpid(child(broken, options.steps), 0)
        if status:
            sys.exit("the run did not go on")
        one, other = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, broken))
        different = [key for key in one if not torch.equal(one[key], other[key])]
    if different:
        sys.exit(f"different after {kills} kills: {', '.join(different)}")
    print(f"bit-identical after {kills} kills")


if __name__ == "__main__":
    main()
