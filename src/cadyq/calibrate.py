"""Float network and a few small pictures -> content-aware network: no large pictures, minutes on a CPU.

1. The float network's own results are the target; the pictures are cut into crops of one size.
2. Clips, channel scales and grids are observed (`cadyq.quant.convert`).
3. A short fine-tuning towards the target, bits at random per patch and site, so that one set of weights serves every
   choice (`cadyq.training.loop`).
4. What fewer bits cost is measured per tile and per site, and the selectors are fitted to it
   (`cadyq.training.supervise`). An error counts relative to what the network adds to bicubic in that crop: the true
   picture is unknown, but its distance grows with the detail there.
5. The threshold is set so that the pictures take the wanted mean bits.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.backbones.graph import Graph, flatten
from cadyq.backbones.srresnet import SRResNet
from cadyq.backbones.structure import build_graph
from cadyq.backbones.trace import RANGES, InRange, simplify, trace
from cadyq.config import Quantization
from cadyq.data.crops import CropArrays
from cadyq.data.sets import find_pictures
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.functional.resize import imresize
from cadyq.io.images import read_image
from cadyq.io.models import save_model
from cadyq.quant import convert as conversion
from cadyq.quant.context import TileContext
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.loop import Recipe, native_convolutions, to_tensor, train
from cadyq.training.supervise import Sensitivity, fit_selectors, set_budget

__all__ = ["Calibrated", "Report", "as_backbone", "calibrate", "cut_crops"]

Crops: TypeAlias = NDArray[np.uint8]
Report: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

SIDE = 96
PATCH, BATCH = 32, 16
N_OBSERVED = 24
LUMA = (0.299, 0.587, 0.114)
WIDE_ABOVE = 0.002
"""An edge keeps 16 bits where 8 would raise the error by more than this share of the network's own detail."""


@dataclass(frozen=True)
class Settings:
    """What is wanted, and how long it may take.

    Attributes:
        bits: candidate bit-widths, ascending, 2 to 8.
        target_fqr: mean bits over the pictures given.
        minutes: wall-clock time for everything. The number of steps follows from the machine's speed.
        steps: steps of the fine-tuning instead: the same result on every machine, in whatever time it takes.
        tile: side of the decision tiles, in LR pixels.
        seed: of crops, patches and random bits.
    """

    bits: tuple[int, ...] = (4, 6, 8)
    target_fqr: float = 5.5
    minutes: float = 5.0
    steps: int | None = None
    tile: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.bits) < 2 or min(self.bits) < 2:
            raise ArgumentError("bits", self.bits, "at least two bit-widths of 2 to 8")
        if not min(self.bits) <= self.target_fqr <= max(self.bits):
            raise ArgumentError("target_fqr", self.target_fqr, f"{min(self.bits)} to {max(self.bits)}")
        if self.steps is not None and self.steps < 0:
            raise ArgumentError("steps", self.steps, "0 or more")
        if not self.minutes > 0:
            raise ArgumentError("minutes", self.minutes, "more than 0")
        if not 8 <= self.tile <= SIDE:
            raise ArgumentError("tile", self.tile, f"8 to {SIDE} LR pixels")

    def quantization(self) -> Quantization:
        """The form that the integer engine runs."""
        return Quantization(
            bits=self.bits,
            dynamic=True,
            edges="integer",
            stream_bits=16,
            channel_power=0.8,
            tile=self.tile,
        )


@dataclass
class Calibrated:
    """The result.

    Attributes:
        network: content-aware, in evaluation mode.
        quantization: its configuration.
        record: what was done and measured: ``fqr`` and ``psnr_to_float_db`` on the crops, ``steps``, ``seconds``.
    """

    network: Backbone
    quantization: Quantization
    record: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], license: str = "not stated") -> None:
        """Write the model file; ``license`` is that of the weights."""
        save_model(path, self.network, self.quantization, training=self.record, license=license)


def calibrate(
    module: nn.Module,
    images: str | os.PathLike[str] | Sequence[Any],
    *,
    scale: int | None = None,
    value_range: str = "auto",
    report: Report = lambda what, done, total: None,
    **settings: Any,
) -> Calibrated:
    """Make a float super-resolution network content-aware.

    Args:
        module: one of our backbones, or any module of supported operators (docs/calibrate.md); it is not changed.
        images: a folder of LR pictures, or a list of paths or uint8 arrays (H, W, 3). The float network's own results
            are the target: no HR is needed.
        scale: handed to a forward that asks for one; otherwise checked.
        value_range: what the network takes and returns, a key of `RANGES`, or ``auto``.
        report: called as the work goes on.
        settings: see `Settings`.

    Raises:
        ArgumentError: an argument is outside what it accepts. UnsupportedError: the network holds a layer that has no
        quantized form (the message names it). DataError, ImageError: the pictures cannot be read.
    """
    try:
        wanted = Settings(**settings)
    except TypeError as error:
        raise ArgumentError(
            "settings", settings, f"keys out of {[f.name for f in dataclasses.fields(Settings)]}"
        ) from error
    start = time.monotonic()
    crops = cut_crops(images, seed=wanted.seed)
    network = as_backbone(module, crops, scale=scale, value_range=value_range)
    with native_convolutions():
        return _Calibration(network, crops, wanted, start, report).run()


def cut_crops(images: str | os.PathLike[str] | Sequence[Any], *, n: int = 100, seed: int = 0) -> Crops:
    """Cut LR pictures into at least ``n`` square crops of one size, where they have as many: (n, side, side, 3).

    Raises:
        ArgumentError: no pictures, or all are smaller than 32 pixels.
    """
    sources = find_pictures(images) if isinstance(images, str | os.PathLike) else list(images)
    pictures = [p if isinstance(p, np.ndarray) else read_image(p).pixels for p in sources]
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ArgumentError("images", (picture.shape, str(picture.dtype)), "uint8 arrays (H, W, 3)")
    sides = sorted(min(p.shape[:2]) for p in pictures)
    side = min(SIDE, sides[len(sides) // 2] // 8 * 8) if sides else 0
    if side < PATCH:
        raise ArgumentError(
            "images", f"{len(pictures)} pictures", f"some of at least {PATCH} x {PATCH} pixels"
        )
    large = [p for p in pictures if min(p.shape[:2]) >= side]
    rng = np.random.default_rng(seed)
    result = []
    for picture in large:
        height, width = picture.shape[:2]
        for _ in range(min(-(-n // len(large)), (height // side) * (width // side))):
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            result.append(picture[top : top + side, left : left + side])
    return np.stack(result)


@torch.no_grad()
def as_backbone(
    module: nn.Module, crops: Crops, *, scale: int | None = None, value_range: str = "auto"
) -> Backbone:
    """Our form of a float network, batch norm folded; checked against the module on a picture of another size.

    Raises:
        ArgumentError: unknown range, or a scale that is not the network's.
        UnsupportedError: a layer that has no quantized form, or a forward that depends on the picture's size.
    """
    if value_range not in (*RANGES, "auto"):
        raise ArgumentError("value_range", value_range, f"auto or one of {', '.join(RANGES)}")
    if isinstance(module, Backbone):
        network = copy.deepcopy(module).eval()
        network = network.folded() if isinstance(network, SRResNet) else network
    else:
        network = _traced(copy.deepcopy(module).eval(), crops, scale, value_range)
    if scale is not None and scale != network.scale:
        raise ArgumentError("scale", scale, f"{network.scale}, which this network has")
    return network


def _traced(module: nn.Module, crops: Crops, scale: int | None, value_range: str) -> Graph:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    asks = any(p.name == "scale" and p.default is p.empty for p in parameters)
    if asks and scale is None:
        raise ArgumentError("scale", scale, "a number, as the network's forward asks for it")
    arguments = {"scale": scale} if asks else {}
    example, other = to_tensor(crops[:1, :24, :24]), to_tensor(crops[:2, :32, :24])
    if value_range == "auto":
        value_range = _detect_range(module, other, arguments)
    wrapped = InRange(module, value_range, arguments)
    graph = build_graph(simplify(trace(wrapped, example)), type(module).__name__)
    difference = float((graph(other).clamp(0, 1) - wrapped(other).clamp(0, 1)).abs().max())
    if not difference < 1e-3:
        raise UnsupportedError(
            f"{type(module).__name__}, traced on 24x24 pixels, differs by {difference:.2g} on 32x24: its forward "
            "depends on the picture's size or pixels"
        )
    return graph


def _detect_range(module: nn.Module, lr: Tensor, arguments: dict[str, Any]) -> str:
    """The range in which the result, made small again, looks most like the picture; 0:1 if none does."""
    best, result = 0.01, next(iter(RANGES))
    for name in RANGES:
        sr = InRange(module, name, arguments)(lr)
        if sr.dim() == 4 and sr.shape[1] == lr.shape[1]:
            error = float(
                (nn.functional.adaptive_avg_pool2d(sr, (lr.shape[2], lr.shape[3])) - lr).square().mean()
            )
            if error < 0.7 * best:
                best, result = error, name
    return result


class _Spy(SiteObserver):
    """Collects the body sites' deviations, tiles of all crops in one list."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def observe(self, site: Site, x: Tensor, ctx: Any) -> None:
        if site.kind == "body":
            self.found.setdefault(site.name, []).append(ctx.deviation(x))


class _Calibration:
    """The work in order; `run` reads from top to bottom."""

    def __init__(
        self, base: Backbone, crops: Crops, settings: Settings, start: float, report: Report
    ) -> None:
        self.base, self.crops, self.settings, self.report = base, crops, settings, report
        self.config = settings.quantization()
        self.start = start
        self.deadline = math.inf if settings.steps is not None else start + 60 * settings.minutes
        self.scale = base.scale
        # As float16 in gray levels: half the memory, and rounded by 1/16 of a level at most.
        side = crops.shape[1] * self.scale
        self.targets = np.empty((len(crops), side, side, 3), np.float16)
        self.detail = np.empty(len(crops))
        self.seconds_per_crop = 0.0

    def run(self) -> Calibrated:
        self._upscale()
        network = self._convert()
        before = self._compare(network, max(self.settings.bits))
        steps = self._fine_tune(network)
        network.eval()
        seen = self._measure(network)
        explained = fit_selectors(network, seen)
        chosen = self._reach(network, seen)
        record = {
            "kind": "calibrated",
            "n_crops": len(self.crops),
            "crop": self.crops.shape[1],
            "target_fqr": self.settings.target_fqr,
            "fqr": chosen["fqr"],
            "psnr_to_float_db": chosen["psnr_db"],
            "psnr_to_float_db_untuned_most_bits": before["psnr_db"],
            "deviance_explained": float(np.mean(list(explained.values()))),
            "steps": steps,
            "seed": self.settings.seed,
            "seconds": round(time.monotonic() - self.start, 1),
        }
        return Calibrated(network, self.config, record)

    # 1. What the float network makes of the crops.

    @torch.no_grad()
    def _upscale(self) -> None:
        size = (self.targets.shape[1], self.targets.shape[2])
        for i, crop in enumerate(self.crops):
            self.report("upscaling with the float network", i, len(self.crops))
            began = time.monotonic()
            sr = self.base(to_tensor(crop[None])).clamp(0, 1)[0].mul(255).permute(1, 2, 0)
            if i:
                self.seconds_per_crop += (time.monotonic() - began - self.seconds_per_crop) / i
            self.targets[i] = sr.numpy()
            plain = imresize(crop, size).astype(np.float32)
            self.detail[i] = np.square(_luma(sr.numpy() - plain)).mean()
        self.detail = np.maximum(self.detail, 0.05 * self.detail.mean() + 1e-3)

    # 2. Quantizers.

    @torch.no_grad()
    def _convert(self) -> Backbone:
        self.report("observing features", 0, 1)
        batches = [to_tensor(self.crops[i : i + 4]) for i in range(0, min(N_OBSERVED, len(self.crops)), 4)]
        stats = conversion.observe(self.base, batches)
        network = self._converted(stats)
        if isinstance(self.base, Graph):
            wide = self._wide_edges(network)
            if wide:
                for op in flatten(self.base.ops):
                    if f"layers.{op.get('layer')}.site" in wide:
                        op["site"]["bits"] = 16
                rebuilt = Graph(self.base.scale, self.base.ops)
                rebuilt.load_state_dict(self.base.state_dict())
                self.base = rebuilt.eval()
                network = self._converted(stats)
        return network

    def _converted(self, stats: dict[str, conversion.SiteStatistics]) -> Backbone:
        network = conversion.convert(self.base, self.config).eval()
        conversion.calibrate(network, stats, self.config)
        if isinstance(network, Graph):
            network.share_grids()
        return network

    def _wide_edges(self, network: Backbone) -> set[str]:
        """Edges whose 8 bits would cost too much: few large values may leave too little to the many small ones."""
        edges = [s for s in sites_of(network, "edge") if s.quantizer is not None and s.static_bits <= 8]
        quantizers = {site.name: site.quantizer for site in edges}
        for site in edges:
            site.quantizer = None
        lr = to_tensor(self.crops[: min(4, len(self.crops)), :48, :48])
        reference, float_sr = network(lr), self.base(lr)
        detail = float(self.detail[: len(lr)].mean())
        base_error = _luma_error(reference, float_sr)
        wide = set()
        for i, site in enumerate(edges):
            self.report("choosing bits of head and tail", i, len(edges))
            site.quantizer = quantizers[site.name]
            if float(_luma_error(network(lr), float_sr).sub(base_error).mean()) > WIDE_ABOVE * detail:
                wide.add(site.name)
            site.quantizer = None
        for site in edges:
            site.quantizer = quantizers[site.name]
        return wide

    # 3. Fine-tuning.

    def _fine_tune(self, network: Backbone) -> int:
        steps, until = self.settings.steps, math.inf
        if steps is None:
            # Measuring takes a part of the time; the steps get what is left.
            until = self.deadline - 0.35 * 60 * self.settings.minutes
            per_step = self._seconds_per_step(network)
            steps = int(max(0.0, until - time.monotonic()) / per_step)
        if steps < 1:
            return 0
        recipe = Recipe(
            steps, batch=BATCH, patch=PATCH, lr=1e-4, warmup=min(20, steps // 5 + 1), ema=0.98, bits="random",
            seed=self.settings.seed,
        )  # fmt: skip
        done = 0

        def stop() -> bool:
            nonlocal done
            self.report("fine-tuning", done, steps)
            done += 1
            return time.monotonic() > until

        with tempfile.TemporaryDirectory() as folder:
            data = CropArrays(self.crops, self.targets)
            train(network, data, recipe, Path(folder), stop=stop, log=lambda text: None, save_every=steps + 1)
        return min(done - 1, steps) if done <= steps else steps

    def _seconds_per_step(self, network: Backbone) -> float:
        """Time one step on a copy."""
        trial = copy.deepcopy(network)
        times = []
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(3, batch=BATCH, patch=PATCH, bits="random")

            def stop() -> bool:
                times.append(time.monotonic())
                return False

            train(
                trial,
                CropArrays(self.crops, self.targets),
                recipe,
                Path(folder),
                stop=stop,
                log=lambda text: None,
            )
        return min(b - a for a, b in pairwise(times))

    # 4. Selectors.

    def _order(self, n: int) -> Iterator[int]:
        order = np.random.default_rng(self.settings.seed).permutation(len(self.crops))
        return iter(order[:n].tolist())

    def _affordable(self, share: float, crops_per_item: float, most: int) -> int:
        """How many items fit into a share of the time; all of them where only the steps count."""
        if self.settings.steps is not None:
            return most
        # Fake quantization about doubles the float network's time.
        cost = 2 * max(self.seconds_per_crop, 1e-4) * crops_per_item
        return int(min(most, max(4, share * 60 * self.settings.minutes / cost)))

    def _tiles(self, square: NDArray[Any]) -> NDArray[np.float64]:
        """Mean over every whole tile of a crop's picture of squares, (tiles,)."""
        side = self.settings.tile * self.scale
        rows = -(-square.shape[0] // side)
        cuts = [slice(i * side, (i + 1) * side) for i in range(rows)]
        return np.array([square[a, b].mean() for a in cuts for b in cuts])

    @torch.no_grad()
    def _run_tiles(
        self, network: Backbone, index: int, force: Any
    ) -> tuple[NDArray[np.float64], TileContext]:
        """Squared luma errors per tile against the float network, and the context with its records."""
        lr = to_tensor(self.crops[index : index + 1])
        ctx = TileContext(lr, self.settings.tile, force_bits=force)
        sr = network(lr, ctx).clamp(0, 1)[0].mul(255).permute(1, 2, 0).numpy()
        return self._tiles(np.square(_luma(sr - self.targets[index].astype(np.float32)))), ctx

    def _measure(self, network: Backbone) -> Sensitivity:
        """Errors per tile for equal bits everywhere, and what each site contributes."""
        bits = sorted(self.settings.bits)
        body = sites_of(network, "body")
        n = self._affordable(0.15, len(bits), len(self.crops))
        spy = _Spy()
        errors: dict[int, list[NDArray[np.float64]]] = {b: [] for b in bits}
        groups, gradients = [], []
        for done, i in enumerate(self._order(n)):
            self.report("measuring what bits are worth", done, n)
            for b in bits:
                for site in body:
                    site.observer = spy if b == bits[-1] else None
                found, ctx = self._run_tiles(network, i, b)
                errors[b].append(found)
            gradients.append(ctx.gradient)
            groups.append(np.full(len(found), self.detail[i]))
        for site in body:
            site.observer = None
        joined = {b: torch.from_numpy(np.concatenate(e)).float() for b, e in errors.items()}
        return Sensitivity(
            errors=joined,
            group_error=torch.from_numpy(np.concatenate(groups)).float(),
            gradient=torch.cat(gradients),
            deviations={name: torch.cat(parts) for name, parts in spy.found.items()},
            site_gain=self._site_gains(network, joined),
        )

    @torch.no_grad()
    def _site_gains(self, network: Backbone, errors: dict[int, Tensor]) -> dict[str, dict[int, float]]:
        """Error of each site alone at the fewest bits; other bit-widths in the proportion of all sites together."""
        bits = sorted(self.settings.bits)
        body = sites_of(network, "body")
        index = list(self._order(12))
        lr = to_tensor(np.stack([self.crops[i, : PATCH + 16, : PATCH + 16] for i in index]))
        detail = torch.from_numpy(self.detail[index]).float()
        crops_per_site = lr.shape[0] * lr.shape[2] ** 2 / self.crops.shape[1] ** 2
        n = self._affordable(0.12, crops_per_site, len(body))
        most = {s.name: bits[-1] for s in body}
        best = self._forced(network, lr, most)
        lowest: dict[str, float] = {}
        # Spread over the depth where not all can be afforded.
        for done, k in enumerate(np.unique(np.linspace(0, len(body) - 1, n).round().astype(int)).tolist()):
            self.report("measuring sites", done, n)
            name = body[k].name
            # Against the same network with all bits: no other error hides this one.
            sr = self._forced(network, lr, {**most, name: bits[0]})
            lowest[name] = max(float((_luma_error(sr, best) / detail).mean()), 1e-9)
        usual = float(np.exp(np.mean(np.log(list(lowest.values())))))
        total = {b: max(float((errors[b] - errors[bits[-1]]).mean()), 0.0) for b in bits}
        share = {b: total[b] / total[bits[0]] if total[bits[0]] > 0 else 0.0 for b in bits[:-1]}
        return {
            s.name: {b: share[b] * lowest.get(s.name, usual) for b in bits[:-1]} | {bits[-1]: 0.0}
            for s in body
        }

    @staticmethod
    def _forced(network: Backbone, lr: Tensor, force: dict[str, int | Tensor] | dict[str, int]) -> Tensor:
        from cadyq.quant.context import Context

        ctx = Context.of(lr)
        ctx.force_bits = dict(force)
        return network(lr, ctx).clamp(0, 1)

    # 5. The threshold.

    @torch.no_grad()
    def _reach(self, network: Backbone, seen: Sensitivity) -> dict[str, float]:
        """Set the threshold from the measured tiles; then correct it by what the network really chooses."""
        sites = [s for s in sites_of(network, "body") if s.selector is not None]
        start = {s.name: s.selector.linear.bias.clone() for s in sites if s.selector is not None}

        def apply(budget: float) -> float:
            for site in sites:
                assert site.selector is not None
                site.selector.linear.bias.copy_(start[site.name])
            set_budget(network, budget)
            chosen = [
                s.selector.bits[s.selector(seen.gradient, seen.deviations[s.name]).argmax(1)].float().mean()
                for s in sites
                if s.selector is not None
            ]
            return float(torch.stack(chosen).mean())

        wanted = self.settings.target_fqr
        found: dict[str, float] = {}
        for _ in range(2):
            low, high = -25.0, 25.0
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if apply(middle) > wanted else (low, middle)
            found = self._compare(network, None)
            wanted += self.settings.target_fqr - found["fqr"]
            if abs(found["fqr"] - self.settings.target_fqr) < 0.05:
                break
        return found

    def _compare(self, network: Backbone, force: Any) -> dict[str, float]:
        """FQR, and PSNR to the float network's result (luma, not rounded), on some of the crops."""
        n = self._affordable(0.03, 1, min(40, len(self.crops)))
        bits, errors = [], []
        for done, i in enumerate(self._order(n)):
            self.report("comparing with the float network", done, n)
            found, ctx = self._run_tiles(network, i, force)
            errors.append(found.mean())
            bits.append(float(torch.stack([r.bits for r in ctx.records if r.kind == "body"]).mean()))
        psnr = float(10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9)))
        return {"fqr": float(np.mean(bits)), "psnr_db": psnr}


def _luma(rgb: NDArray[Any]) -> NDArray[Any]:
    """(..., 3) -> (...)."""
    result: NDArray[Any] = rgb @ np.asarray(LUMA, rgb.dtype)
    return result


def _luma_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared luma difference of each picture, (N,), in squared gray levels."""
    weights = a.new_tensor(LUMA).view(1, 3, 1, 1)
    return ((a - b) * weights).sum(1).mul(255).square().mean((1, 2))
