"""Float network and a few small pictures -> content-aware network: no large pictures, minutes on a CPU.

1. The float network's own results are the target; the pictures are cut into crops of one size.
2. Clips, channel scales and grids are observed (`cadyq.quant.convert`), and clips set by what they do to the result.
3. What fewer bits cost is measured per tile and per site (`cadyq.training.float_target`), and the selectors are fitted
   to it (`cadyq.training.supervise`).
4. A short fine-tuning towards the target with the bits that they choose (`cadyq.training.loop`); then 3 again.
5. The threshold is set so that the pictures take the wanted mean bits.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.backbones.adopt import adopt
from cadyq.backbones.graph import Graph, flatten
from cadyq.cells import Run
from cadyq.config import Quantization
from cadyq.data.crops import CropArrays
from cadyq.data.sets import find_pictures
from cadyq.deploy import runner, write_plan
from cadyq.errors import ArgumentError
from cadyq.io.images import read_image
from cadyq.io.models import save_model
from cadyq.quant import convert as conversion
from cadyq.quant.context import Context
from cadyq.quant.pams import PAMS
from cadyq.quant.site import sites_of
from cadyq.training.float_target import FloatTarget, Report, luma_error, site_gains
from cadyq.training.loop import Recipe, native_convolutions, to_tensor, train
from cadyq.training.memory import keep_freed_memory
from cadyq.training.supervise import Sensitivity, fit_selectors, reach

__all__ = ["Calibrated", "Settings", "calibrate", "cut_crops"]

SIDE = 96
PATCH, BATCH = 32, 16
SITE_PATCH = 48
N_OBSERVED, N_COMPARED = 32, 24
MOST_STEPS = 100_000
"""Steps of the fine-tuning where the time decides: more than any machine does."""
N_BEFORE, N_AFTER = 32, 64
"""Crops on which it is measured what bits are worth, before and after the fine-tuning; for sites alone a quarter."""
CLIP_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25)
WIDE_ABOVE = 0.001
"""An edge keeps 16 bits where 8 would raise the error by more than this share of the network's own detail."""
# Shares of the time that measurements may take at most; the rest is for the fine-tuning and for what comes before it.
TILES_SHARE, SITES_SHARE, COMPARE_SHARE = 0.14, 0.10, 0.03
SLACK = 1.3
"""Small patches take longer than their share of a crop, and every comparison packs the network again."""


@dataclass(frozen=True)
class Settings:
    """What is wanted, and how long it may take.

    Attributes:
        bits: candidate bit-widths, ascending, 2 to 8.
        target_fqr: mean bits over the pictures given.
        minutes: wall-clock time for everything. The number of steps follows from the machine's speed.
        steps: steps of the fine-tuning instead: the same work on every machine, in whatever time it takes.
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
        self.quantization()

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

    def save(self, path: str | os.PathLike[str], license: str = "not stated") -> str:
        """Write the model file and, where the integer engine can run it, the plan beside it.

        Args:
            path: customarily ``*.safetensors``.
            license: SPDX identifier of the weights' license.

        Returns:
            Why there is no plan (the model then runs on torch), or an empty string.

        Raises:
            CheckpointError: a file cannot be written.
        """
        save_model(path, self.network, self.quantization, training=self.record, license=license)
        return write_plan(path)


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
        module: one of our backbones, or a module of supported operators (docs/calibrate.md); it is not changed.
        images: a folder of LR pictures, or a list of paths or uint8 arrays (H, W, 3); about 100 are enough.
        scale: handed to a forward that asks for one; otherwise checked.
        value_range: what the network takes and returns: ``0:1``, ``0:255``, ``-1:1``, ``0:1,-1:1`` or ``auto``.
        report: called as the work goes on.
        settings: those of `Settings`.

    Raises:
        ArgumentError: an argument is outside what it accepts.
        UnsupportedError: the network holds a layer that has no quantized form; the message names it.
        DataError: the folder holds no pictures. ImageError: one of them cannot be read.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for key in settings:
        if key not in known:
            raise ArgumentError("settings", key, f"one of {', '.join(known)}")
    wanted = Settings(**settings)
    start = time.monotonic()
    keep_freed_memory()
    crops = cut_crops(images, seed=wanted.seed)
    network = adopt(module, to_tensor(crops[:2]), scale=scale, value_range=value_range)
    with native_convolutions():
        return _Calibration(network, crops, wanted, start, report).run()


def cut_crops(
    images: str | os.PathLike[str] | Sequence[Any], *, n: int = 100, seed: int = 0
) -> NDArray[np.uint8]:
    """Cut LR pictures into about ``n`` square crops of one size, at least one of each: (n, side, side, 3).

    Pictures smaller than most others are left out.

    Raises:
        ArgumentError: no pictures, or all are smaller than 32 pixels. DataError, ImageError: they cannot be read.
    """
    sources = find_pictures(images) if isinstance(images, str | os.PathLike) else list(images)
    pictures = [p if isinstance(p, np.ndarray) else read_image(p).pixels for p in sources]
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ArgumentError("images", (picture.shape, str(picture.dtype)), "uint8 arrays (H, W, 3)")
    sides = sorted(min(p.shape[:2]) for p in pictures)
    side = min(SIDE, sides[len(sides) // 2] // 8 * 8) if sides else 0
    if side < PATCH:
        raise ArgumentError("images", f"{len(sides)} pictures", f"some of at least {PATCH}x{PATCH} pixels")
    large = [p for p in pictures if min(p.shape[:2]) >= side]
    rng = np.random.default_rng(seed)
    result = []
    for picture in large:
        height, width = picture.shape[:2]
        for _ in range(min(-(-n // len(large)), (height // side) * (width // side))):
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            result.append(picture[top : top + side, left : left + side])
    return np.stack(result)


def _rare_colors(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Sixteen of the crops with their mean colors moved to the corners of the RGB cube."""
    some = crops[np.arange(16) * len(crops) // 16].astype(np.float32)
    corners = np.array([[255 * (k >> c & 1) for c in range(3)] for k in range(16)], np.float32)
    moved = some - some.mean((1, 2), keepdims=True) + corners[:, None, None]
    result: NDArray[np.uint8] = moved.clip(0, 255).astype(np.uint8)
    return result


class _Calibration:
    """The work in order; `run` reads from top to bottom."""

    def __init__(
        self, base: Backbone, crops: NDArray[np.uint8], settings: Settings, start: float, report: Report
    ) -> None:
        self.base, self.settings, self.report, self.start = base, settings, report, start
        self.config = settings.quantization()
        self.seconds = 60 * settings.minutes if settings.steps is None else math.inf
        self.target = FloatTarget.of(base, crops, settings.tile, report)
        self.sites = [site.name for site in sites_of(base, "body")]
        self.seconds_per_run = 0.0

    def run(self) -> Calibrated:
        target, bits, wanted = self.target, self.settings.bits, self.settings.target_fqr
        network = self._converted()
        self.seconds_per_run = self._timed(runner(network, self.config))
        self._selectors(network, N_BEFORE)
        steps = self._fine_tune(network)
        seen, explained = self._selectors(network, N_AFTER)
        some = self._some(COMPARE_SHARE, 1, min(N_COMPARED, len(target.crops)))

        def actual(run: Run, force: int | None = None) -> tuple[float, float]:
            return target.compare(run, self.sites, some, force, self.report)

        # The selectors see features of a network in which all others chose, too: a little other than measured.
        reach(network, seen, 2 * wanted - actual(runner(network, self.config))[0])
        run = runner(network, self.config)
        fqr, psnr_db = actual(run)
        record = {
            "kind": "calibrated against the float network",
            "n_crops": len(target.crops),
            "crop": target.crops.shape[1],
            "steps": steps,
            "seed": self.settings.seed,
            "target_fqr": wanted,
            "fqr": round(fqr, 3),
            "psnr_to_float_db": round(psnr_db, 3),
            "psnr_to_float_db_most_bits": round(actual(run, max(bits))[1], 3),
            "deviance_explained": round(explained, 4),
            "seconds": round(time.monotonic() - self.start, 1),
        }
        return Calibrated(network, self.config, record)

    def _selectors(self, network: Backbone, n_crops: int) -> tuple[Sensitivity, float]:
        """Fit the selectors to what bits are worth; also the share of the deviance that they explain."""
        run, (tiles, patches, n_sites) = runner(network, self.config), self._measured(n_crops)
        seen = self.target.sensitivity(run, self.settings.bits, tiles, self.report)
        seen.site_gain = site_gains(
            run, self.sites, self.target, patches, SITE_PATCH, n_sites, seen.errors, self.report
        )
        explained = fit_selectors(network, seen)
        reach(network, seen, self.settings.target_fqr)
        return seen, float(np.mean(list(explained.values())))

    def _measured(self, n_crops: int) -> tuple[list[int], list[int], int]:
        """Crops on which tiles are measured, crops on a patch of which sites are, and how many sites."""
        n_crops = min(n_crops, len(self.target.crops))
        tiles = self._some(TILES_SHARE, len(self.settings.bits), n_crops)
        patches = self._some(1.0, 1, -(-n_crops // 4))
        n_sites = max(4, SITES_SHARE * self.seconds / (self._patch_runs(patches) * self.seconds_per_run))
        return tiles, patches, int(min(len(self.sites), n_sites))

    def _patch_runs(self, patches: list[int]) -> float:
        """Runs over a crop that take as long as one over a patch of each of these."""
        share: float = min(SITE_PATCH / self.target.crops.shape[1], 1.0)
        return len(patches) * share * share

    def _runs_to_come(self) -> float:
        """What is measured after the fine-tuning, in runs over a crop."""
        tiles, patches, n_sites = self._measured(N_AFTER)
        compared = self._some(COMPARE_SHARE, 1, min(N_COMPARED, len(self.target.crops)))
        return (
            len(tiles) * len(self.settings.bits)
            + (n_sites + 1) * self._patch_runs(patches)
            + 3 * len(compared)
        )

    def _timed(self, run: Run) -> float:
        """Seconds for a crop."""
        for _ in range(2):  # the first run also sets things up
            began = time.monotonic()
            self.target.tile_errors(run, 0, max(self.settings.bits))
        return max(time.monotonic() - began, 1e-6)

    def _some(self, share: float, runs: float, most: int) -> list[int]:
        """Random crops for a measurement of ``runs`` runs per crop that may take a share of the time.

        They are always the same; where steps are given instead of minutes, the time does not matter.
        """
        n = min(most, max(4, share * self.seconds / (runs * self.seconds_per_run)))
        order = np.random.default_rng(self.settings.seed).permutation(len(self.target.crops))
        return [int(i) for i in order[: int(n)]]

    # Quantizers.

    @torch.no_grad()
    def _converted(self) -> Backbone:
        self.report("observing features", 0, 1)
        crops = self.target.crops[:: -(-len(self.target.crops) // N_OBSERVED)]
        stats, rare = self._observe(crops), self._observe(_rare_colors(crops))
        network = self._quantizers(stats, rare)
        clips, wide = self._fit_edges(network)
        if wide and isinstance(self.base, Graph):
            for op in flatten(self.base.ops):
                if f"layers.{op.get('layer')}.site" in wide:
                    op["site"]["bits"] = 16
            rebuilt = Graph(self.base.scale, self.base.ops)
            rebuilt.load_state_dict(self.base.state_dict())
            self.base = rebuilt.eval()
            network = self._quantizers(stats, rare)
        for site in sites_of(network, "edge"):
            if isinstance(site.quantizer, PAMS):
                site.quantizer.clip.copy_(clips[site.name])
        self.report("choosing clips", 1, 1)
        some = self.target.crops[:: -(-len(self.target.crops) // 6), :SITE_PATCH, :SITE_PATCH]
        conversion.scale_clips(network, self.base, to_tensor(some))
        return network

    def _observe(self, crops: NDArray[np.uint8]) -> dict[str, conversion.SiteStatistics]:
        return conversion.observe(self.base, [to_tensor(crops[i : i + 4]) for i in range(0, len(crops), 4)])

    def _quantizers(
        self, stats: dict[str, conversion.SiteStatistics], rare: dict[str, conversion.SiteStatistics]
    ) -> Backbone:
        """Quantizers for what was seen; head and tail and stored planes also hold colors that are rare there."""
        network = conversion.convert(self.base, self.config).eval()
        conversion.calibrate(network, stats, self.config)
        for site in sites_of(network):
            if site.name not in rare:
                continue
            # A color that is rare here may fill another picture: CARN-M's edges, with the range of these pictures
            # alone, are 13 dB further from the float network there. All of that range would cost SRResNet 3 dB
            # everywhere, so a few of its largest values are cut off.
            if site.kind == "edge" and isinstance(site.quantizer, PAMS):
                samples, quantizer = torch.cat(rare[site.name].samples, 1), site.quantizer
                if quantizer.channel_scale is not None:
                    samples = samples / quantizer.channel_scale[:, None]
                levels = float(quantizer.levels(torch.tensor([0])))
                quantizer.clip.clamp_(min=conversion.best_clip(samples, levels, quantizer.signed))
            if site.has_grid and site.channels > 3:
                site.set_grid(max(float(site.grid), float(rare[site.name].channel_max.max()) / 32767))
        if isinstance(network, Graph):
            network.share_grids()
        return network

    def _fit_edges(self, network: Backbone) -> tuple[dict[str, Tensor], set[str]]:
        """The edges' clips by what they do to the result, one by one, and the edges for which 8 bits are too few.

        A few large values may leave too little to the many small ones, and how much those matter only the result
        tells: SRResNet's last layer loses 0.3 dB with all of its range, and CARN-M's edges lose 13 dB where colors are
        rare with no more than the range of usual ones.
        """
        natural = self.target.crops[:: -(-len(self.target.crops) // 4)]
        rare = _rare_colors(self.target.crops)[1:16:7]  # red, black, white
        lr = to_tensor(np.concatenate([natural, rare])[:, :SITE_PATCH, :SITE_PATCH])
        edges = {
            site: site.quantizer for site in sites_of(network, "edge") if isinstance(site.quantizer, PAMS)
        }

        def run() -> Tensor:
            ctx = Context.of(lr)
            ctx.force_bits = max(self.settings.bits)
            return network(lr, ctx)

        def error() -> float:
            return float(luma_error(run(), sr).mean())

        for site in edges:
            site.quantizer = None
        sr, wide = run(), set()
        allowed = WIDE_ABOVE * float(self.target.detail.mean())
        for done, (site, quantizer) in enumerate(edges.items()):
            self.report("choosing clips", done, len(edges))
            site.quantizer = quantizer
            clip = [quantizer.clip]
            if conversion.scale_together(clip, CLIP_SHARES, error, while_falling=True) > allowed:
                wide.add(site.name)
            site.quantizer = None
        for site, quantizer in edges.items():
            site.quantizer = quantizer
        return {site.name: quantizer.clip.clone() for site, quantizer in edges.items()}, wide

    # Fine-tuning.

    def _fine_tune(self, network: Backbone) -> int:
        """Train in place, for the time that is left or the steps that are given; returns the steps done."""
        timed, steps, began = self.settings.steps is None, self.settings.steps or 0, time.monotonic()
        to_come = SLACK * self._runs_to_come() * self.seconds_per_run
        left = max(self.start + self.seconds - began - to_come, 1e-6)
        if timed:
            steps = MOST_STEPS
        if steps == 0:
            return 0

        def elapsed() -> float:
            return (time.monotonic() - began) / left  # 0 where steps are given: then there is no end

        def progress(done: int, total: int) -> None:
            self.report("fine-tuning", *((min(int(100 * elapsed()), 100), 100) if timed else (done, total)))

        targets: Any = self.target.sr  # gray levels as HR crops have them, only not rounded
        with tempfile.TemporaryDirectory() as folder:
            return train(
                network,
                CropArrays(self.target.crops, targets),
                Recipe(steps, warmup=steps // 10, ema=0.98, seed=self.settings.seed, **_RECIPE),
                Path(folder),
                teacher=self.base,
                stop=lambda: elapsed() >= 1,
                elapsed=elapsed if timed else None,
                log=lambda text: None,
                progress=progress,
                save_every=steps + 1,
            ).steps


# The target is the float network's result on the very same patch: padding at its edges and turning it change that
# result by more than quantization does. The stored results, which know neither, must hardly count beside it.
_RECIPE: dict[str, Any] = {
    "batch": BATCH,
    "patch": PATCH,
    "lr": 1e-4,
    "bits": "chosen",
    "w_teacher": 100.0,
    "clip_norm": 0.0,
}
