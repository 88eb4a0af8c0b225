"""How long does a float training step take, with torch's convolutions and with ours?

    python bench/train_step.py [--threads 2] [--batch 16] [--patch 48] [--repeats 5] [--json]

Steps of EDSR-baseline x4 (16 blocks, 64 channels) and of a CARN-like x4 network (3x3 residual blocks with
cascading 1x1 convolutions): forward, L1 loss, backward and Adam. torch in both memory layouts and ours are
interleaved, after one unmeasured step each; minimum and median in seconds. Under load compare the minima.
CADYQ_ISA=avx2 holds ours to AVX2; for a fair peer set ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2
too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadyq.training import fastconv


class Conv(nn.Conv2d):
    """A convolution and its surroundings: our kernels inside of ``fastconv.use()``, torch's outside."""

    def __init__(self, c_in: int, c_out: int, k: int = 3, relu: bool = False, shuffle: int = 1) -> None:
        super().__init__(c_in, c_out, k, padding=k // 2)
        self.relu, self.shuffle = relu, shuffle

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if fastconv.enabled():
            act: Any = "relu" if self.relu else None
            return fastconv.conv2d(x, self.weight, self.bias, act, residual, self.shuffle)
        y = super().forward(x)
        if self.shuffle > 1:
            y = F.pixel_shuffle(y, self.shuffle)
        if self.relu:
            y = F.relu(y, inplace=True)
        return y if residual is None else y + residual


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(64, 64, relu=True), Conv(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x), x)
        return y


class Edsr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.last = (
            Conv(3, 64),
            nn.Sequential(*(Block() for _ in range(16))),
            Conv(64, 64),
        )
        self.up1, self.up2, self.tail = Conv(64, 256, shuffle=2), Conv(64, 256, shuffle=2), Conv(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y: Tensor = self.tail(self.up2(self.up1(self.last(self.body(x), x))))
        return y


class Cascade(nn.Module):
    """Three stages whose outputs are concatenated and fused by 1x1 convolutions: both levels of CARN."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.fuse = nn.ModuleList(Conv(64 * (i + 2), 64, k=1, relu=True) for i in range(len(stages)))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for stage, fuse in zip(self.stages, self.fuse, strict=True):
            seen.append(stage(x))
            x = fuse(torch.cat(seen, 1))
        return x


class Carn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Conv(3, 64)
        self.body = Cascade([Cascade([Block() for _ in range(3)]) for _ in range(3)])
        self.up1, self.up2 = Conv(64, 256, relu=True, shuffle=2), Conv(64, 256, relu=True, shuffle=2)
        self.tail = Conv(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.up2(self.up1(self.body(self.head(x)))))
        return y


NETWORKS = {"EDSR-baseline x4": Edsr, "CARN-like x4": Carn}


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, its vector flags, versions, forced instruction sets."""
    flags, model = [], platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = [f for f in line.split() if f.startswith(("avx", "fma"))]
                break
    forced = {
        k: os.environ[k]
        for k in ("CADYQ_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
        if k in os.environ
    }
    return {
        "cpu": model,
        "flags": " ".join(flags),
        "torch": torch.__version__,
        "isas": fastconv.isas(),
        **forced,
    }


class Step:
    """One way to train one network."""

    def __init__(
        self, network: type[nn.Module], layout: torch.memory_format, ours: bool, batch: int, patch: int
    ) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = network()
        if not ours:
            self.net.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-4)
        self.x = torch.rand(batch, 3, patch, patch).contiguous(memory_format=layout)
        self.target = torch.rand(batch, 3, 4 * patch, 4 * patch).contiguous(memory_format=layout)
        self.ours = ours

    def __call__(self) -> float:
        start = time.perf_counter()
        with fastconv.use(self.ours):
            self.optimizer.zero_grad()
            F.l1_loss(self.net(self.x), self.target).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("threads", 2), ("batch", 16), ("patch", 48), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not fastconv.available():
        parser.exit(1, "the native training kernels are not built\n")
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
    }
    if not args.json:
        print(*(f"{k}: {v}" for k, v in result["machine"].items()), sep="\n")
    for name, network in NETWORKS.items():
        ways = {
            "torch NCHW": Step(network, torch.contiguous_format, False, args.batch, args.patch),
            "torch channels_last": Step(network, torch.channels_last, False, args.batch, args.patch),
            "ours": Step(network, torch.channels_last, True, args.batch, args.patch),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(args.repeats + 1):
            for way, step in ways.items():
                seconds = step()
                if repeat:
                    times[way].append(seconds)
        rows = {w: {"min": min(t), "median": statistics.median(t)} for w, t in times.items()}
        peers = [w for w in rows if w != "ours"]
        gain = {k: min(rows[w][k] for w in peers) / rows["ours"][k] for k in ("min", "median")}
        result[name] = {**rows, "gain over the faster layout": gain}
        if not args.json:
            setting = f"{args.threads} threads, batch {args.batch}, {args.patch}x{args.patch}"
            print(f"\n{name}, {setting}: min, median (s)")
            for way, row in rows.items():
                print(f"  {way:20s} {row['min']:7.3f} {row['median']:7.3f}")
            print(f"  gain                 {gain['min']:6.2f}x {gain['median']:6.2f}x")
    if args.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
