"""Picture in, larger picture and the bits of every tile out.

Here pictures are cut and joined, opacity and gray are handled, and cells that left the network are filled in.
The network itself runs in `cadyq.quant.infer`, which is imported when a model is loaded: importing this
module needs no torch.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadyq.cells import Inferred, SiteCost
from cadyq.config import to_mapping
from cadyq.engine.runtime import MAX_TILE, EngineRuntime
from cadyq.errors import ArgumentError, MissingExtraError
from cadyq.functional.cost import ZeroShare, bitops, fqr, zero_share
from cadyq.functional.image import gray
from cadyq.functional.resize import imresize
from cadyq.functional.tiling import Grid, published_patches, strips
from cadyq.io.images import Picture, from_pil, read_image, write_image
from cadyq.io.plans import LoadedPlan, load_plan
from cadyq.io.shipped import model_path, plan_path, shipped_models

if TYPE_CHECKING:
    from cadyq.io.models import LoadedModel

__all__ = [
    "MODES",
    "ImageLike",
    "Mode",
    "Model",
    "Progress",
    "Result",
    "Runtime",
    "default_model",
    "describe",
    "fill_transparent",
    "load",
    "shipped_models",
]

Mode: TypeAlias = Literal["tiles", "image", "patches"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""``tiles``: one plane, bits per tile (default); ``image``: one choice for the whole picture; ``patches``:
independent overlapping patches, as published."""

Runtime: TypeAlias = Literal["auto", "engine", "torch"]

ImageLike: TypeAlias = "NDArray[np.uint8] | Image.Image | Picture | str | os.PathLike[str]"
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""
ForceBits: TypeAlias = "int | Mapping[str, int | NDArray[Any]] | None"

DEFAULT_TILE = 48
# A block of a large picture: wide enough that the halo costs little, small enough for 2 to 3 GB. Fixed
# numbers, so that a result never depends on the memory of the machine.
_BLOCK_WIDTH = 1536
_BLOCK_PIXELS = 768 * 768
_PATCHES_AT_ONCE = 4
_PATCH, _PATCH_OVERLAP = 96, 6
_LARGEST_TILE = 1024


@dataclass(frozen=True, eq=False)
class Result:
    """An upscaled picture, and what it cost.

    A cell is a tile, a patch or the whole picture, according to the mode. FQR is the mean bit-width over the
    body's sites, then over cells; where it counts zeros, state ``zeros`` with it.

    Attributes:
        pixels: uint8 ``(scale H, scale W, C)``: 1 channel for gray, 3 for RGB, one more with opacity.
        bits: per site of the body, the bit-width of every cell, uint8 ``(rows, cols)``; 32 is float, 0 is not
            computed.
        grid: ``(rows, cols)`` of cells.
        tile: side of a tile in LR pixels, or None in another mode.
        mode: ``tiles``, ``image`` or ``patches``.
        areas: LR pixels of every cell, int64 ``(rows, cols)``.
        fqr: feature quantization rate in bits, cells counting equally (the paper's).
        fqr_area: the same, cells counting by their area.
        zeros: shares of cells and of (cell, site) pairs that got 0 bits.
        exited: share of the cells that left the network before the body and became bicubic, in [0, 1].
        bitops: BitOPs of the body: 2 MACs (weight bits / 32) (feature bits / 32), summed.
        seconds: wall time from the decoded picture to the result.
        runtime: ``engine`` or ``torch``.
        source: the picture as it was read; its color profile is kept on saving.
    """

    pixels: NDArray[np.uint8]
    bits: dict[str, NDArray[np.uint8]]
    grid: tuple[int, int]
    tile: int | None
    mode: Mode
    areas: NDArray[np.int64]
    fqr: float
    fqr_area: float
    zeros: ZeroShare
    exited: float
    bitops: float
    seconds: float
    runtime: Runtime
    source: Picture = field(repr=False)

    def picture(self) -> Picture:
        """Return the result as `cadyq.io.images` writes it."""
        channels = self.pixels.shape[2]
        color = self.pixels[..., :1].repeat(3, axis=2) if channels < 3 else self.pixels[..., :3]
        alpha = np.ascontiguousarray(self.pixels[..., -1]) if channels in (2, 4) else None
        return Picture(np.ascontiguousarray(color), alpha, channels < 3, self.source.icc)

    def save(self, path: str | os.PathLike[str], quality: int | None = None) -> None:
        """Write the picture in the format that the suffix names; see `write_image`."""
        write_image(path, self.picture(), quality)


class Model:
    """A loaded network, ready to upscale. `load` makes it.

    It has up to two forms: a plan, which the integer engine runs without torch, and the fake-quantised network on
    torch, which is loaded when it is first asked for.

    Attributes:
        name: what it was loaded as.
        plan: the integer form, or None.
        sites: the sites that are counted, see `SiteCost`.
        scale: how many times wider and higher the result is.
        tile: side of the tiles it was made for, in LR pixels.
        radius: receptive radius, LR pixels.
        exit_rule: which cells leave before the body, or None.
        metadata: the file's record.
    """

    def __init__(self, loaded: LoadedModel | None, name: str = "", plan: LoadedPlan | None = None) -> None:
        self._loaded = loaded
        self.plan = plan
        self.engine = EngineRuntime(plan.plan, plan.macs) if plan is not None else None
        if plan is not None and self.engine is not None:
            self.name = name
            self.sites: list[SiteCost] = self.engine.sites
            self.scale, self.tile, self.radius = plan.plan.scale, plan.plan.tile, plan.radius
            self.exit_rule, self.metadata = plan.exit_rule, plan.metadata
        else:
            assert loaded is not None
            from cadyq.quant.infer import site_costs

            quantization = loaded.quantization
            self.name = name or loaded.network.name
            self.sites = site_costs(loaded.network)
            self.scale, self.radius = loaded.network.scale, loaded.network.radius
            self.tile = quantization.tile if quantization is not None else DEFAULT_TILE
            self.exit_rule, self.metadata = loaded.exit_rule, loaded.metadata

    @property
    def loaded(self) -> LoadedModel:
        """The network on torch. Raises `MissingExtraError` without torch."""
        if self._loaded is None:
            self._loaded = _torch_side().load_model(self.name)
        return self._loaded

    def __repr__(self) -> str:
        return f"Model({self.name!r}, scale={self.scale})"

    def runtime(self, mode: Mode, tile: int, wanted: Runtime = "auto") -> Runtime:
        """Which runtime serves a mode: the engine where there is a plan, for tiles it can hold; else torch.

        Raises:
            ArgumentError: the engine is wanted where it cannot run.
        """
        fits = self.engine is not None and mode == "tiles" and tile <= MAX_TILE
        if wanted == "engine" and not fits:
            reason = (
                "a model with a plan" if self.engine is None else f"mode 'tiles', tiles of at most {MAX_TILE}"
            )
            raise ArgumentError("runtime", wanted, f"'torch', as the engine needs {reason}")
        if wanted not in get_args(Runtime):
            raise ArgumentError("runtime", wanted, f"one of {', '.join(get_args(Runtime))}")
        return "engine" if fits and wanted != "torch" else "torch"

    def upscale(
        self,
        image: ImageLike,
        *,
        mode: Mode = "tiles",
        tile: int | None = None,
        budget: float = 0.0,
        threads: int | None = None,
        force_bits: ForceBits = None,
        progress: Progress | None = None,
        runtime: Runtime = "auto",
    ) -> Result:
        """Upscale a picture.

        Args:
            image: a path, a Pillow image, a `Picture`, or uint8 ``(H, W)`` or ``(H, W, C)`` with 1 to 4
                channels (gray, gray and opacity, RGB, RGBA). Gray stays gray. Opacity is upscaled by bicubic;
                colors below fully transparent pixels are replaced by their surroundings', so that they cannot
                bleed.
            mode: one of `MODES`. Only ``tiles`` lets cells leave the network (exit) and cuts large pictures.
            tile: side of a tile in LR pixels, 8 to 1024; None is the model's own. With ``patches`` the side of a
                patch, None is 96.
            budget: more (positive) or fewer (negative) bits than the model would choose. It is added to the
                selectors' scores per bit, and subtracted from the exit threshold (a log error).
            threads: CPU threads, None for torch's own choice.
            force_bits: bit-widths in place of the selectors' choices: one for all sites, or by site name one
                or an array ``(rows, cols)``. It does not bring back cells that exit.
            progress: called after each part with (done, total).
            runtime: ``engine`` (integers), ``torch`` (the same network simulated in float), or ``auto``.

        Raises:
            ArgumentError: an argument is outside what it accepts.
            ImageError: the picture cannot be read.
        """
        tile = self._checked(mode, tile, budget, threads, force_bits)
        picture = _as_picture(image)
        start = time.perf_counter()
        rgb = picture.pixels
        if picture.alpha is not None:
            rgb = fill_transparent(rgb, picture.alpha)
        chosen = self.runtime(mode, tile, runtime)
        job = _Job(
            self, rgb, tile, budget, force_bits, progress or (lambda done, total: None), chosen, threads
        )
        if chosen == "engine":
            cells = job.tiles()
        else:
            _torch_side()
            from cadyq.quant import infer

            with infer.threads(threads):
                cells = getattr(job, mode)()
        return self._result(picture, mode, tile, cells, start, chosen)

    def _checked(
        self, mode: str, tile: int | None, budget: float, threads: int | None, force_bits: ForceBits
    ) -> int:
        if mode not in MODES:
            raise ArgumentError("mode", mode, f"one of {', '.join(MODES)}")
        if tile is None:
            tile = _PATCH if mode == "patches" else self.tile
        if not isinstance(tile, int) or not 8 <= tile <= _LARGEST_TILE:
            raise ArgumentError("tile", tile, f"8 to {_LARGEST_TILE} LR pixels")
        if not np.isfinite(budget):
            raise ArgumentError("budget", budget, "a finite number")
        if threads is not None and threads < 1:
            raise ArgumentError("threads", threads, "at least 1, or None")
        forced = force_bits if isinstance(force_bits, Mapping) else {}
        body = {site.name: site for site in self.sites if site.kind == "body"}
        for name, value in forced.items():
            if name not in body:
                raise ArgumentError("force_bits", name, f"names of the body's sites ({', '.join(body)})")
            _check_bits(value, body[name].candidates)
        if isinstance(force_bits, int):
            for site in body.values():
                _check_bits(force_bits, site.candidates)
        return tile

    def _result(
        self, picture: Picture, mode: Mode, tile: int, cells: _Cells, start: float, runtime: Runtime
    ) -> Result:
        layers = [cells.pixels]
        if picture.is_gray:
            light = np.floor(gray(cells.pixels.astype(np.float32)) + 0.5).clip(0, 255)
            layers = [light.astype(np.uint8)[..., None]]
        if picture.alpha is not None:
            size = (cells.pixels.shape[0], cells.pixels.shape[1])
            layers.append(imresize(picture.alpha, size)[..., None])
        flat = {name: grid.reshape(-1) for name, grid in cells.bits.items()}
        body = [site.name for site in self.sites if site.kind == "body"]
        table = np.stack([flat[name] for name in body], axis=1)
        areas = cells.areas.reshape(-1)
        # Fixed sites with a convolution (IDN's fusion blocks) cost, but are not among those that choose.
        total = sum(
            bitops(site.macs_per_pixel * areas, site.weight_bits, flat[site.name]) for site in self.sites
        )
        return Result(
            pixels=np.concatenate(layers, axis=2),
            bits={name: cells.bits[name] for name in body},
            grid=(cells.areas.shape[0], cells.areas.shape[1]),
            tile=tile if mode == "tiles" else None,
            mode=mode,
            areas=cells.areas,
            fqr=fqr(table),
            fqr_area=fqr(table, areas),
            zeros=zero_share(table),
            exited=float(cells.exits.mean()),
            bitops=float(total),
            seconds=time.perf_counter() - start,
            runtime=runtime,
            source=picture,
        )


def default_model(scale: int = 4) -> str:
    """Return the name of the shipped model for a scale; a content-aware one is preferred.

    Raises:
        ArgumentError: none is shipped for this scale.
    """
    fitting = [name for name in shipped_models() if f"x{scale}" in re.split("[-_.]", name)]
    if not fitting:
        shipped = ", ".join(shipped_models()) or "none"
        raise ArgumentError(
            "scale", scale, f"the scale of a shipped model ({shipped})", "or pass a model file"
        )
    return str(min(fitting, key=lambda name: ("cadyq" not in name, name)))


def describe(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what a model is: a dictionary fit for JSON, for people to read.

    ``parameters`` counts the float network's (and, apart, what conversion added), ``storage_bytes`` the file.
    Arguments and errors are those of `load`.
    """
    found = load(model)
    metadata, conversion, rule = found.metadata, None, found.exit_rule
    if found.plan is not None:
        plain, added, kind = found.plan.parameters, None, metadata["backbone"]
        conversion = metadata["quantization"].get("conversion")
    else:
        models, network = _torch_side(), found.loaded.network
        plain = models.build_backbone(network.name, **network.config).n_parameters()
        added, kind = network.n_parameters() - plain, network.name
        if found.loaded.quantization is not None:
            conversion = to_mapping(found.loaded.quantization)
    path = model_path(model)
    body = [site for site in found.sites if site.kind == "body"]
    return {
        "name": found.name,
        "file": str(path),
        "backbone": kind,
        "scale": found.scale,
        "runtime": "engine" if found.engine is not None else "torch",
        "isa": found.engine.isa() if found.engine is not None else None,
        "parameters": plain,
        "parameters_of_quantization": added,
        "storage_bytes": path.stat().st_size,
        "weight_bits": sorted({site.weight_bits for site in body}),
        "candidate_bits": sorted({bits for site in body for bits in site.candidates}),
        "sites": len(body),
        "conversion": conversion,
        "exit_rule": None if rule is None else rule.to_mapping(),
        "license": metadata.get("license", "not stated"),
        "figures": metadata.get("figures", {}),
        "training": metadata.get("training", {}),
        "format_version": metadata.get("format_version"),
    }


def load(model: str | os.PathLike[str] | None = None, scale: int | None = None) -> Model:
    """Load a model.

    Args:
        model: name of a shipped model, or a model file; None is the shipped one for ``scale``.
        scale: enlargement factor that is wanted; None is 4, or what ``model`` has.

    Raises:
        ArgumentError: unknown model, or one of another scale.
        CheckpointError: the file is damaged, of a newer format, or not a model.
        MissingExtraError: torch is not installed.
    """
    name = os.fspath(model) if model is not None else default_model(4 if scale is None else scale)
    model_path(name)
    plan = plan_path(name)
    loaded = None if plan is not None else _torch_side().load_model(name)
    result = Model(loaded, name, None if plan is None else load_plan(plan))
    if scale is not None and result.scale != scale:
        raise ArgumentError(
            "scale", scale, f"{result.scale}, which is what {name} does", "choose another model"
        )
    return result


def _torch_side() -> Any:
    """Import what needs torch."""
    try:
        from cadyq.io import models
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "torch":
            raise
        raise MissingExtraError(
            "torch is not installed, and models run on it; install it with: pip install 'cadyq[torch]'"
        ) from error
    return models


class _Cells(NamedTuple):
    """What a mode hands back: the RGB result, and bits, areas and exits per cell, all ``(rows, cols)``."""

    pixels: NDArray[np.uint8]
    bits: dict[str, NDArray[np.uint8]]
    areas: NDArray[np.int64]
    exits: NDArray[np.bool_]


@dataclass
class _Job:
    model: Model
    rgb: NDArray[np.uint8]
    tile_size: int
    budget: float
    force_bits: ForceBits
    progress: Progress
    runtime: Runtime
    threads: int | None

    def image(self) -> _Cells:
        """One decision for the whole picture."""
        from cadyq.quant.infer import run_batch

        found = run_batch(self._network, self.rgb[None], force=self._force((1, 1)), budget=self.budget)
        self.progress(1, 1)
        areas = np.array([[self.rgb.shape[0] * self.rgb.shape[1]]], np.int64)
        bits = {name: value.reshape(1, 1) for name, value in found.bits.items()}
        return _Cells(found.pixels[0], bits, areas, np.zeros((1, 1), bool))

    def patches(self) -> _Cells:
        """Independent patches that overlap by 6 pixels, equal sizes batched (released reference)."""
        from cadyq.quant.infer import run_batch

        size = self.tile_size
        height, width = self.rgb.shape[:2]
        cut = published_patches(height, width, size, size - _PATCH_OVERLAP)
        shape = (len(np.unique(cut.read[:, 0])), len(np.unique(cut.read[:, 2])))
        sizes = np.stack([cut.read[:, 1] - cut.read[:, 0], cut.read[:, 3] - cut.read[:, 2]], axis=1)
        result, bits, done = self._canvas(), self._no_bits(shape), 0
        for size in np.unique(sizes, axis=0):
            equal = np.flatnonzero((sizes == size).all(axis=1))
            for part in np.split(equal, range(_PATCHES_AT_ONCE, len(equal), _PATCHES_AT_ONCE)):
                batch = np.stack([self.rgb[y0:y1, x0:x1] for y0, y1, x0, x1 in cut.read[part]])
                force = _part_of(self._force(shape), part)
                found = run_batch(self._network, batch, force=force, budget=self.budget)
                for pixels, read, paste in zip(found.pixels, cut.read[part], cut.paste[part], strict=True):
                    self._paste(result, pixels, (read[0], read[2]), tuple(paste))
                for name, value in found.bits.items():
                    bits[name].reshape(-1)[part] = value
                done += len(part)
                self.progress(done, len(sizes))
        areas = np.prod(sizes, axis=1, dtype=np.int64).reshape(shape)
        return _Cells(result, bits, areas, np.zeros(shape, bool))

    def tiles(self) -> _Cells:
        """One plane, decisions per tile; a large picture in blocks that see their whole receptive field."""
        height, width = self.rgb.shape[:2]
        grid = Grid(height, width, self.tile_size)
        shape = (grid.rows, grid.cols)
        exits = self._exits(shape)
        result, bits = self._canvas(), self._no_bits(shape)
        blocks = _blocks(height, width, self.tile_size, self.model.radius)
        for done, (read, keep) in enumerate(blocks, start=1):
            if not exits[self._cells(keep)].all():
                self._block(read, keep, exits, result, bits)
            self.progress(done, len(blocks))
        if exits.any():
            self._fill_exits(result, exits)
        return _Cells(result, bits, grid.areas.reshape(shape), exits)

    def _block(
        self,
        read: tuple[int, int, int, int],
        keep: tuple[int, int, int, int],
        exits: NDArray[np.bool_],
        result: NDArray[np.uint8],
        bits: dict[str, NDArray[np.uint8]],
    ) -> None:
        y0, y1, x0, x1 = read
        outer, inner = self._cells(read), self._cells(keep)
        index = np.arange(exits.size).reshape(exits.shape)[outer]
        found = self._run(
            self.rgb[y0:y1, x0:x1],
            active=~exits[outer].reshape(-1),
            force=_part_of(self._force(exits.shape), index.reshape(-1)),
        )
        self._paste(result, found.pixels[0], (y0, x0), keep)
        ys, xs = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
        for name, value in found.bits.items():
            bits[name][inner] = value.reshape(index.shape)[ys, xs]

    def _run(self, rgb: NDArray[np.uint8], active: NDArray[np.bool_], force: ForceBits) -> Inferred:
        """One block of tiles on the chosen runtime."""
        engine = self.model.engine
        if self.runtime == "engine" and engine is not None:
            return engine.run_tiles(
                rgb,
                self.tile_size,
                active=active,
                force=force,
                budget=self.budget,
                threads=self.threads,
            )
        from cadyq.quant.infer import run_tiles

        return run_tiles(self._network, rgb, self.tile_size, active=active, force=force, budget=self.budget)

    def _exits(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Which tiles leave before the body, ``(rows, cols)``; judged in bands to save memory."""
        rule, tile = self.model.exit_rule, self.tile_size
        result = np.zeros(shape, bool)
        if rule is None:
            return result
        height, width = self.rgb.shape[:2]
        for read, keep in strips(height, tile, max(1, _BLOCK_PIXELS // (width * tile)), 1):
            light = self.rgb[read[0] : read[1]].astype(np.float32) / 255
            first = (keep[0] - read[0]) // tile
            rows = slice(keep[0] // tile, -(-keep[1] // tile))
            result[rows] = rule.exits(light, tile, -self.budget)[first : first + rows.stop - rows.start]
        return result

    def _fill_exits(self, result: NDArray[np.uint8], exits: NDArray[np.bool_]) -> None:
        """Bicubic where cells left, with a cross-fade inside the computed cells that touch them."""
        plain = imresize(self.rgb, result.shape[:2])
        rule = self.model.exit_rule
        assert rule is not None
        fade, side = rule.fade * self.model.scale, self.tile_size * self.model.scale
        around = np.pad(exits, 1)
        for row, col in np.ndindex(*exits.shape):
            box = (slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side))
            if exits[row, col]:
                result[box] = plain[box]
            elif fade and (near := around[row : row + 3, col : col + 3]).any():
                weight = _fade_weights(near, result[box].shape[:2], fade)[..., None]
                mixed = plain[box] + weight * (result[box].astype(np.float32) - plain[box])
                result[box] = np.floor(mixed + 0.5).clip(0, 255)

    @property
    def _network(self) -> Any:
        return self.model.loaded.network

    def _cells(self, box: tuple[int, int, int, int]) -> tuple[slice, slice]:
        y0, y1, x0, x1 = box
        t = self.tile_size
        return slice(y0 // t, -(-y1 // t)), slice(x0 // t, -(-x1 // t))

    def _canvas(self) -> NDArray[np.uint8]:
        s = self.model.scale
        return np.empty((self.rgb.shape[0] * s, self.rgb.shape[1] * s, 3), np.uint8)

    def _no_bits(self, shape: tuple[int, int]) -> dict[str, NDArray[np.uint8]]:
        return {site.name: np.zeros(shape, np.uint8) for site in self.model.sites}

    def _paste(
        self,
        result: NDArray[np.uint8],
        pixels: NDArray[np.uint8],
        origin: tuple[int, int],
        box: tuple[int, ...],
    ) -> None:
        """Copy the LR box ``box`` out of ``pixels``, whose corner lies at the LR pixel ``origin``."""
        s, (y, x), (y0, y1, x0, x1) = self.model.scale, origin, box
        part = pixels[(y0 - y) * s : (y1 - y) * s, (x0 - x) * s : (x1 - x) * s]
        result[y0 * s : y1 * s, x0 * s : x1 * s] = part

    def _force(self, shape: tuple[int, ...]) -> ForceBits:
        if not isinstance(self.force_bits, Mapping):
            return self.force_bits
        forced: dict[str, int | NDArray[Any]] = {}
        for name, value in self.force_bits.items():
            if isinstance(value, np.ndarray) and value.shape != shape:
                raise ArgumentError(f"force_bits[{name!r}].shape", value.shape, f"the grid of cells, {shape}")
            forced[name] = value.reshape(-1) if isinstance(value, np.ndarray) else value
        return forced


def _part_of(force: ForceBits, index: NDArray[Any]) -> ForceBits:
    if not isinstance(force, Mapping):
        return force
    return {name: v[index] if isinstance(v, np.ndarray) else v for name, v in force.items()}


def _blocks(
    height: int, width: int, tile: int, halo: int
) -> list[tuple[tuple[int, int, int, int], tuple[int, int, int, int]]]:
    """Cut a picture into (read, keep) boxes on the tile grid, of a size that depends on its width alone."""
    n_cols = -(-width // tile)
    n_across = -(-width // _BLOCK_WIDTH)
    across = strips(width, tile, -(-n_cols // n_across), halo)
    rows = max(1, _BLOCK_PIXELS // (min(width, _BLOCK_WIDTH) * tile))
    return [
        ((*down.read, *side.read), (*down.keep, *side.keep))
        for down in strips(height, tile, rows, halo)
        for side in across
    ]


def _fade_weights(near: NDArray[np.bool_], shape: tuple[int, ...], fade: int) -> NDArray[np.float32]:
    """Weight of the network in a computed cell: 0 at exited neighbors (3, 3), 1 from ``fade`` pixels on."""
    ramps = []
    for length in shape:
        up = np.minimum((np.arange(length, dtype=np.float32) + 0.5) / fade, 1)
        ramps.append((up, np.ones_like(up), up[::-1]))
    result = np.ones(shape, np.float32)
    for i, j in np.argwhere(near):
        down, side = ramps[0][i][:, None], ramps[1][j][None]
        # Distance to a neighbor at a corner is the larger of the two; to one at a side only that side counts.
        ramp = np.maximum(down, side) if i != 1 and j != 1 else (down if i != 1 else side)
        result = np.minimum(result, ramp)
    return result


def fill_transparent(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Replace the colors of fully transparent pixels by the opacity-weighted mean of their surroundings.

    Colors below opacity 0 mean nothing, but a network would let them bleed into visible pixels (fringes).
    They are filled from ever coarser means of premultiplied colors; visible colors stay as they are.

    Args:
        rgb: uint8 ``(H, W, 3)``, not premultiplied.
        alpha: uint8 ``(H, W)``.
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return rgb
    weight = alpha.astype(np.float32)[..., None]
    levels = [(rgb * weight, weight)]
    while (levels[-1][1] == 0).any():
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    color = levels[-1][0] / levels[-1][1]
    for total, amount in levels[-2::-1]:
        coarse = color.repeat(2, axis=0).repeat(2, axis=1)[: total.shape[0], : total.shape[1]]
        color = np.where(amount > 0, total / np.maximum(amount, 1e-6), coarse)
    filled = np.floor(color + 0.5).clip(0, 255).astype(np.uint8)
    return np.where(hidden[..., None], filled, rgb)


def _halved(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum 2x2 pixels; a missing last row or column counts as zero."""
    height, width = (-(-n // 2) * 2 for n in plane.shape[:2])
    padded = np.pad(plane, ((0, height - plane.shape[0]), (0, width - plane.shape[1]), (0, 0)))
    summed = padded.reshape(height // 2, 2, width // 2, 2, -1).sum(axis=(1, 3))
    # Scaled, so that deep pyramids stay within range; only the ratio of color and opacity matters.
    return np.asarray(summed / 4, np.float32)


def _as_picture(image: ImageLike) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if not isinstance(image, np.ndarray):
        raise ArgumentError(
            "image", type(image).__name__, "a path, a Picture, a Pillow image or a uint8 array"
        )
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] > 4:
        found = f"{image.dtype}{list(image.shape)}"
        raise ArgumentError(
            "image", found, "a non-empty uint8 (H, W) or (H, W, 1 to 4)", "convert it to 0..255"
        )
    channels = pixels.shape[2]
    color = pixels[..., :1].repeat(3, axis=2) if channels < 3 else pixels[..., :3]
    alpha = np.ascontiguousarray(pixels[..., -1]) if channels in (2, 4) else None
    return Picture(np.ascontiguousarray(color), alpha, channels < 3)


def _check_bits(value: int | NDArray[Any], candidates: tuple[int, ...]) -> None:
    wrong = sorted(set(np.unique(np.asarray(value)).tolist()) - set(candidates))
    if wrong:
        raise ArgumentError("force_bits", wrong, f"candidates of the model, {candidates}")
