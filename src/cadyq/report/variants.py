"""The same weights under other decisions: forced bits, other selector inputs, look-ups by a score of the picture.

What a variant decides is fitted on one measurement of training tiles (`scripts/fit_variants.py`) and stored beside
the networks as ``selectors/NAME.safetensors``, a few kilobytes each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import CadyqError, CheckpointError
from cadyq.functional.image import gray, laplacian, sobel
from cadyq.functional.tiling import Grid
from cadyq.io.checkpoints import load_checkpoint
from cadyq.report.networks import Network
from cadyq.upscale import ImageLike, Model, Result, load

__all__ = ["SCORES", "Fitted", "Lookup", "Subject", "fitted_for", "score_tiles"]

Array: TypeAlias = NDArray[Any]
ForceMap: TypeAlias = "dict[str, int | Array]"


def _edges(light: Array) -> float:
    """Mean |Laplacian|: the edge score of CABM (Tian et al., CVPR 2023)."""
    return float(np.abs(laplacian(light)).mean())


def _entropy(light: Array) -> float:
    """Entropy of the histogram of gray levels in bits: Granular-DQ (Wang et al., AAAI 2025) judges by it."""
    counts = np.bincount(np.floor(light * 255 + 0.5).astype(np.int64).ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _gradient(light: Array) -> float:
    """Mean gradient magnitude: AdaBM (Hong and Lee, CVPR 2024) judges whole pictures by it."""
    dx, dy = sobel(light)
    return float(np.hypot(dx, dy).mean())


SCORES: dict[str, Callable[[Array], float]] = {"edges": _edges, "entropy": _entropy, "gradient": _gradient}
"""Scores of a gray picture or tile ``(H, W)`` in [0, 1], by name."""


@dataclass(frozen=True)
class Lookup:
    """Bits by a score.

    Attributes:
        score: which one of `SCORES`.
        per_picture: one score for the whole picture instead of one per tile.
        limits: ascending scores between the rows of ``table``, ``(bins - 1,)``.
        table: bit-widths, uint8 ``(bins, sites)``.
    """

    score: str
    per_picture: bool
    limits: Array
    table: Array

    def decide(self, rgb: Array, tile: int, sites: Iterable[str]) -> ForceMap:
        """Bits of every site and tile of an LR picture, uint8 ``(H, W, 3)``: arrays ``(rows, cols)``."""
        scores = score_tiles(rgb, tile, self.score)
        if self.per_picture:
            light = gray(rgb.astype(np.float32) / 255)
            scores = np.full_like(scores, SCORES[self.score](light))
        row = np.searchsorted(self.limits, scores, side="right")
        return {name: self.table[row, i] for i, name in enumerate(sites)}


@dataclass(frozen=True)
class Fitted:
    """What was fitted for one network.

    Attributes:
        path: the file.
        arrays: of all variants, by ``VARIANT/...``.
        record: how they were fitted: ``base`` (`Network.weights_digest`), ``variants``, ``fqr``, ``crops``.
    """

    path: Path
    arrays: Mapping[str, Array]
    record: Mapping[str, Any]

    @property
    def variants(self) -> Mapping[str, Any]:
        """Kinds of the variants by name."""
        found: Mapping[str, Any] = self.record["variants"]
        return found

    def lookup(self, name: str) -> Lookup:
        """A variant of kind ``lookup``."""
        kind = self.variants[name]
        return Lookup(
            kind["score"],
            bool(kind["per_picture"]),
            self.arrays[f"{name}/limits"],
            self.arrays[f"{name}/table"],
        )


@dataclass(frozen=True)
class Subject:
    """Something to measure: a network, or the same weights under another decision.

    Attributes:
        network: whose weights.
        bits: this bit-width at every site, or None.
        variant: name of a fitted variant, or empty.
        models: folders that may hold fitted variants.
    """

    network: Network
    bits: int | None = None
    variant: str = ""
    models: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """Name for files and logs."""
        suffix = f" {self.variant}" if self.variant else f" {self.bits} bit" if self.bits else ""
        return self.network.name + suffix

    def digest(self) -> str:
        """SHA-256 of everything that its results depend on, but the code."""
        total = hashlib.sha256(f"{self.network.digest()} {self.bits} {self.variant}".encode())
        if self.variant:
            total.update(fitted_for(self.network, self.models).path.read_bytes())
        return total.hexdigest()

    def load(self) -> Model:
        """The model, ready to run.

        Raises:
            CadyqError: the variant was not fitted for this network, or a file cannot be read.
        """
        model = load(self.network.path)
        if self.bits is not None:
            bits = self.bits
            return _Decided(model, lambda rgb, tile: bits)
        if not self.variant:
            return model
        fitted = fitted_for(self.network, self.models)
        if self.variant not in fitted.variants:
            raise CadyqError(
                f"{fitted.path} holds no variant {self.variant!r}, expected one of {sorted(fitted.variants)}"
            )
        if fitted.variants[self.variant]["kind"] == "lookup":
            lookup = fitted.lookup(self.variant)
            names = [site.name for site in model.sites if site.kind == "body"]
            return _Decided(model, lambda rgb, tile: lookup.decide(rgb, tile, names))
        return _with_selectors(self.network, fitted, self.variant)


class _Decided(Model):
    """A model whose bits are decided from the LR picture, before it runs."""

    def __init__(self, model: Model, decide: Callable[[Array, int], int | ForceMap]) -> None:
        super().__init__(model._loaded, model.name, model.plan)
        self._decide = decide

    def upscale(self, image: ImageLike, **options: Any) -> Result:
        """As `Model.upscale`, of an RGB array; ``force_bits`` is this model's own affair."""
        assert isinstance(image, np.ndarray) and options.get("force_bits") is None
        decided = self._decide(image, options.get("tile") or self.tile)
        return super().upscale(image, **{**options, "force_bits": decided})


def score_tiles(rgb: Array, tile: int, score: str) -> Array:
    """A score of every tile of a picture, uint8 ``(H, W, 3)``, each on its own: ``(rows, cols)``."""
    light = gray(rgb.astype(np.float32) / 255)
    grid = Grid(light.shape[0], light.shape[1], tile)
    values = [SCORES[score](light[y0:y1, x0:x1]) for y0, y1, x0, x1 in grid.boxes]
    return np.array(values).reshape(grid.rows, grid.cols)


def fitted_for(network: Network, models: Iterable[str | os.PathLike[str]] = ()) -> Fitted:
    """The variants that were fitted for a network: in the package, else in ``FOLDER/selectors``.

    Raises:
        CheckpointError: there are none, or they belong to other weights.
    """
    own = Path(str(files("cadyq.report").joinpath("selectors")))
    for folder in (own, *(Path(m) / "selectors" for m in models)):
        path = folder / f"{network.name}.safetensors"
        if path.is_file():
            arrays, metadata = load_checkpoint(path)
            record = metadata["quantization"]
            if record["base"] != network.weights_digest():
                raise CheckpointError(
                    f"{path} was fitted for other weights than {network.path}; run scripts/fit_variants.py again"
                )
            return Fitted(path, arrays, record)
    raise CheckpointError(f"no variants were fitted for {network.name}; run scripts/fit_variants.py")


def _with_selectors(network: Network, fitted: Fitted, name: str) -> Model:
    """The network with other selectors, on the engine where these have an integer form."""
    import torch

    from cadyq.io.models import load_model
    from cadyq.quant.selector import BitSelector
    from cadyq.quant.site import sites_of

    loaded = load_model(network.path)
    kind = fitted.variants[name]
    assert loaded.quantization is not None
    offered = set(kind.get("bits", loaded.quantization.bits))
    for i, site in enumerate(sites_of(loaded.network, "body")):
        old = site.selector
        assert old is not None
        selector = BitSelector(site.channels, old.bits.tolist(), kind["inputs"], log_features=True)
        # Rows are as long as that of the site with the most channels.
        row = fitted.arrays[f"{name}/slope"][i, : selector.linear.in_features]
        slope = torch.from_numpy(row.astype(np.float32))
        steps = fitted.arrays[f"{name}/offset"][i]
        level, bias = 0, 0.0
        with torch.no_grad():
            # Score of the j-th offered candidate: sum over its steps of (slope . x + offset); the others never win.
            for k, bits in enumerate(old.bits.tolist()):
                if bits not in offered:
                    selector.linear.weight[k], selector.linear.bias[k] = 0.0, -1e9
                    continue
                selector.linear.weight[k], selector.linear.bias[k] = level * slope, bias
                bias += float(steps[level]) if level < len(steps) else 0.0
                level += 1
        site.selector = selector
    return Model.of(loaded, f"{network.name} {name}")
