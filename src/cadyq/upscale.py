"""Picture in, larger picture and the bits of every tile out.

Here pictures are cut and joined, opacity and gray are handled, and cells that left the network are filled in.
The network itself runs in `cadyq.quant.infer`, which is imported when a model is loaded: importing this
module needs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadyq.bands import ArrayRows, Bands, RowSource, part_of
from cadyq.cells import Force, Inferred, Levels, SiteCost
from cadyq.config import to_mapping
from cadyq.engine.runtime import MAX_TILE, EngineRuntime
from cadyq.errors import ArgumentError, CadyqError, MissingExtraError
from cadyq.functional.alpha import fill_transparent
from cadyq.functional.cost import ZeroShare, bitops, fqr, zero_share
from cadyq.functional.image import gray
from cadyq.functional.resize import imresize, imresize_rows
from cadyq.functional.tiling import published_patches
from cadyq.io.images import Picture, from_pil, read_image, write_image
from cadyq.io.plans import LoadedPlan, load_plan
from cadyq.io.shipped import default_model, model_path, plan_path, shipped_models
from cadyq.io.stream import split_channels

if TYPE_CHECKING:
    from cadyq.io.models import LoadedModel

__all__ = [
    "MODES",
    "Figures",
    "ImageLike",
    "Mode",
    "Model",
    "Part",
    "PictureRows",
    "Progress",
    "Result",
    "Runtime",
    "StreamedResult",
    "default_model",
    "describe",
    "load",
    "shipped_models",
]

Mode: TypeAlias = Literal["tiles", "image", "patches"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""``tiles``: one plane, bits per tile (default); ``image``: one choice for the whole picture; ``patches``:
independent overlapping patches, as published."""

Runtime: TypeAlias = Literal["auto", "engine", "torch"]

ImageLike: TypeAlias = "Levels | Image.Image | Picture | str | os.PathLike[str]"
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""
OnPart: TypeAlias = "Callable[[Part], None]"
"""Called with every `Part` as soon as it is computed."""

DEFAULT_TILE = 48
_PATCHES_AT_ONCE = 4
_PATCH, _PATCH_OVERLAP = 96, 6
_ROWS_AT_ONCE = 64
_LARGEST_TILE = 1024


class Part(NamedTuple):
    """A finished part of a picture, for those who watch; views, valid until the callback returns.

    Attributes:
        box: ``(y0, y1, x0, x1)`` in LR pixels; it begins and ends on the grid of tiles.
        pixels: RGB, ``(scale h, scale w, 3)``, in the picture's type.
        bits: per counted site, the bit-width of every tile of the box, uint8 ``(rows, cols)``.
    """

    box: tuple[int, int, int, int]
    pixels: Levels
    bits: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Figures:
    """What upscaling a picture cost.

    A cell is a tile, a patch or the whole picture, according to the mode. FQR is the mean bit-width over the
    body's sites, then over cells; where it counts zeros, state ``zeros`` with it.

    Attributes:
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
    """

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


@dataclass(frozen=True, eq=False)
class Result(Figures):
    """An upscaled picture, and what it cost (`Figures`).

    Attributes:
        pixels: uint8 ``(scale H, scale W, C)``, uint16 for a picture of 16 bits: 1 channel for gray, 3 for RGB,
            one more with opacity.
        source: the picture as it was read; its color profile and metadata are kept on saving.
    """

    pixels: Levels
    source: Picture = field(repr=False)

    def picture(self) -> Picture:
        """Return the result as `cadyq.io.images` writes it."""
        color, alpha = split_channels(self.pixels)
        is_gray = self.pixels.shape[2] < 3
        return Picture(color, alpha, is_gray, self.source.icc, metadata=self.source.metadata)

    def save(self, path: str | os.PathLike[str], quality: int | None = None) -> None:
        """Write the picture in the format that the suffix names; see `write_image`."""
        write_image(path, self.picture(), quality)


class PictureRows(RowSource, Protocol):
    """A picture read row by row: RGB rows whose hidden colors are filled, and opacity beside them.

    Attributes:
        is_gray: whether the three channels are equal, and one is wanted in the result.
        has_alpha: whether there is opacity.
    """

    is_gray: bool
    has_alpha: bool

    def alpha(self, top: int, bottom: int) -> Levels:
        """Opacity of rows that `RowSource.forget` has not passed, ``(rows, width)``."""


class StreamedResult:
    """An upscaled picture that is computed while its rows are asked for; `Model.upscale_rows` makes it.

    Attributes:
        shape: height, width and channels of the result.
        dtype: uint8 or uint16, that of the picture.
    """

    def __init__(
        self,
        source: PictureRows,
        bands: Bands,
        scale: int,
        figures: Callable[[_Cells], Figures],
        on_part: OnPart | None = None,
    ) -> None:
        height, width = source.shape
        self.shape = (height * scale, width * scale, (1 if source.is_gray else 3) + source.has_alpha)
        self.dtype = source.dtype
        self._source, self._bands, self._scale, self._figures = source, bands, scale, figures
        self._on_part = on_part

    def rows(self) -> Iterator[Levels]:
        """Compute the picture from top to bottom, ``(rows, width, channels)`` at a time; once."""
        height, width, _ = self.shape
        lr_height, top = self._source.shape[0], 0
        for band in self._bands:
            alpha = None
            if self._source.has_alpha:
                # Bicubic reads two rows on either side.
                first = max(0, top // self._scale - 4)
                last = min(lr_height, (top + len(band)) // self._scale + 4)
                part = self._source.alpha(first, last)
                alpha = imresize_rows(part, first, lr_height, (height, width), (top, top + len(band)))
            _tell(self._on_part, self._bands, self._scale, top, band)
            top += len(band)
            pieces = _joined(band, self._source.is_gray, alpha)
            del band, alpha
            # Small pieces, so that what writes them need not hold a second band.
            for first in range(0, len(pieces), _ROWS_AT_ONCE):
                yield pieces[first : first + _ROWS_AT_ONCE]
            del pieces

    def figures(self) -> Figures:
        """What it cost, when all rows were computed."""
        bands = self._bands
        areas = bands.grid.areas.reshape(bands.exits.shape)
        return self._figures(_Cells(np.empty((0, 0, 3), self.dtype), bands.bits, areas, bands.exits))


class Model:
    """A loaded network, ready to upscale. `load` makes it, and `of`.

    It has up to two forms: a plan, which the integer engine runs without torch, and the fake-quantised network on
    torch, which is loaded when it is first asked for, or when a plan has to be made of it.

    Attributes:
        name: what it was loaded as.
        plan: the integer form, or None; ``no_plan_because`` says why there is none.
        sites: the sites that are counted, see `SiteCost`.
        scale: how many times wider and higher the result is.
        tile: side of the tiles it was made for, in LR pixels.
        radius: receptive radius, LR pixels.
        exit_rule: which cells leave before the body, or None.
        metadata: the file's record.
    """

    def __init__(
        self,
        loaded: LoadedModel | None,
        name: str = "",
        plan: LoadedPlan | None = None,
        no_plan_because: str = "",
    ) -> None:
        self._loaded = loaded
        self.plan, self.no_plan_because = plan, no_plan_because
        self.engine = EngineRuntime(plan.plan) if plan is not None else None
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

    @classmethod
    def of(cls, loaded: LoadedModel, name: str = "") -> Model:
        """A model from its network on torch; a plan is made of it where it has an integer form."""
        from cadyq.deploy import lowered

        try:
            return cls(loaded, name, lowered(loaded))
        except CadyqError as error:
            return cls(loaded, name, no_plan_because=str(error))

    @property
    def loaded(self) -> LoadedModel:
        """The network on torch. Raises `MissingExtraError` without torch."""
        if self._loaded is None:
            self._loaded = _torch_side().load_model(self.name)
        return self._loaded

    def __repr__(self) -> str:
        return f"Model({self.name!r}, scale={self.scale})"

    @property
    def candidate_bits(self) -> list[int]:
        """Bit-widths that a tile can get at one of the body's sites, ascending; 0 is among them if tiles can exit."""
        offered = {bits for site in self.sites if site.kind == "body" for bits in site.candidates}
        return sorted(offered | ({0} if self.exit_rule is not None else set()))

    def runtime(self, mode: Mode, tile: int, wanted: Runtime = "auto") -> Runtime:
        """Which runtime serves a mode: the engine where it can run the model, for tiles it can hold; else torch.

        Raises:
            ArgumentError: the engine is wanted where it cannot run.
        """
        fits = self.engine is not None and mode == "tiles" and tile <= MAX_TILE
        if wanted == "engine" and not fits:
            reason = f"the engine needs mode 'tiles' and tiles of at most {MAX_TILE}"
            if self.engine is None:
                reason = f"the engine cannot run this model ({self.no_plan_because or 'it has no plan'})"
            raise ArgumentError("runtime", wanted, f"'torch', as {reason}")
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
        force_bits: Force = None,
        progress: Progress | None = None,
        on_part: OnPart | None = None,
        runtime: Runtime = "auto",
    ) -> Result:
        """Upscale a picture.

        Args:
            image: a path, a Pillow image, a `Picture`, or uint8 or uint16 ``(H, W)`` or ``(H, W, C)`` with 1 to
                4 channels (gray, gray and opacity, RGB, RGBA). A picture of 16 bits stays one (a file of
                color needs the extra ``photo`` for that). Gray stays gray. Opacity is upscaled by bicubic;
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
            progress: called after each part with (done, total). What it raises ends the work and passes through.
            on_part: called with every part as it is computed (mode ``tiles`` only).
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
        tell = progress or (lambda done, total: None)
        job = _Job(self, rgb, tile, budget, force_bits, tell, on_part, chosen, threads)
        if mode == "tiles":
            cells = job.tiles()
        else:
            _torch_side()
            from cadyq.quant import infer

            with infer.threads(threads):
                cells = getattr(job, mode)()
        alpha = None
        if picture.alpha is not None:
            alpha = imresize(picture.alpha, (cells.pixels.shape[0], cells.pixels.shape[1]))
        pixels = _joined(cells.pixels, picture.is_gray, alpha)
        figures = self._figures(cells, mode, tile, start, chosen)
        return Result(**vars(figures), pixels=pixels, source=picture)

    def upscale_rows(
        self,
        source: PictureRows,
        *,
        tile: int | None = None,
        budget: float = 0.0,
        threads: int | None = None,
        progress: Progress | None = None,
        on_part: OnPart | None = None,
        runtime: Runtime = "auto",
    ) -> StreamedResult:
        """Upscale a picture that does not fit into memory: rows in, rows out, as `upscale` in mode ``tiles``.

        Arguments and errors are those of `upscale`; the pixels are equal to its result's.
        """
        tile = self._checked("tiles", tile, budget, threads, None)
        chosen = self.runtime("tiles", tile, runtime)
        start = time.perf_counter()
        bands = self.bands(source, tile, budget, None, progress, chosen, threads)
        figures = partial(self._figures, mode="tiles", tile=tile, start=start, runtime=chosen)
        return StreamedResult(source, bands, self.scale, figures, on_part)

    def bands(
        self,
        source: RowSource,
        tile: int,
        budget: float,
        force_bits: Force,
        progress: Progress | None,
        runtime: Runtime,
        threads: int | None,
    ) -> Bands:
        """The bands of a picture, see `cadyq.bands`; arguments as of `upscale`, checked by the caller."""
        height, width = source.shape
        force = _flat(force_bits, (-(-height // tile), -(-width // tile)))
        engine = self.engine

        def run(rgb: Levels, active: NDArray[np.bool_], force: Force) -> Inferred:
            if runtime == "engine" and engine is not None:
                return engine.run_tiles(rgb, tile, active=active, force=force, budget=budget, threads=threads)
            _torch_side()
            from cadyq.quant import infer

            with infer.threads(threads):
                network = self.loaded.network
                return infer.run_tiles(network, rgb, tile, active=active, force=force, budget=budget)

        return Bands(
            source,
            self.sites,
            run,
            scale=self.scale,
            tile=tile,
            radius=self.radius,
            rule=self.exit_rule,
            budget=budget,
            force=force,
            progress=progress or (lambda done, total: None),
            threads=threads,
        )

    def _checked(
        self, mode: str, tile: int | None, budget: float, threads: int | None, force_bits: Force
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

    def _figures(self, cells: _Cells, mode: Mode, tile: int, start: float, runtime: Runtime) -> Figures:
        flat = {name: grid.reshape(-1) for name, grid in cells.bits.items()}
        body = [site.name for site in self.sites if site.kind == "body"]
        table = np.stack([flat[name] for name in body], axis=1)
        areas = cells.areas.reshape(-1)
        # Fixed sites with a convolution (IDN's fusion blocks) cost, but are not among those that choose.
        total = sum(
            bitops(site.macs_per_pixel * areas, site.weight_bits, flat[site.name]) for site in self.sites
        )
        return Figures(
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
        )


def _tell(on_part: OnPart | None, bands: Bands, scale: int, top: int, band: Levels) -> None:
    """Show a band that begins at a row of the result."""
    if on_part is not None:
        y0, y1 = top // scale, (top + len(band)) // scale
        rows = slice(y0 // bands.grid.tile, -(-y1 // bands.grid.tile))
        found = {name: grid[rows] for name, grid in bands.bits.items()}
        on_part(Part((y0, y1, 0, bands.grid.width), band, found))


def _joined(rgb: Levels, is_gray: bool, alpha: Levels | None) -> Levels:
    """The channels of a result: gray or RGB, and opacity ``(H, W)`` if there is any."""
    layers = [rgb]
    if is_gray:
        light = np.floor(gray(rgb.astype(np.float32)) + 0.5).clip(0, np.iinfo(rgb.dtype).max)
        layers = [light.astype(rgb.dtype)[..., None]]
    if alpha is not None:
        layers.append(alpha[..., None])
    return np.concatenate(layers, axis=2) if len(layers) > 1 else layers[0]


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
        "no_plan_because": found.no_plan_because or None,
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
    """Load a model: its plan, or else the network on torch and, where it has an integer form, a plan made of it.

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
    result = (
        Model.of(_torch_side().load_model(name), name) if plan is None else Model(None, name, load_plan(plan))
    )
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
            "torch is not installed, and a model without a plan beside it needs it; install it with: "
            "pip install 'cadyq[torch]'"
        ) from error
    return models


class _Cells(NamedTuple):
    """What a mode hands back: the RGB result, and bits, areas and exits per cell, all ``(rows, cols)``."""

    pixels: Levels
    bits: dict[str, NDArray[np.uint8]]
    areas: NDArray[np.int64]
    exits: NDArray[np.bool_]


@dataclass
class _Job:
    model: Model
    rgb: Levels
    tile_size: int
    budget: float
    force_bits: Force
    progress: Progress
    on_part: OnPart | None
    runtime: Runtime
    threads: int | None

    def image(self) -> _Cells:
        """One decision for the whole picture."""
        from cadyq.quant.infer import run_batch

        found = run_batch(
            self._network, self.rgb[None], force=_flat(self.force_bits, (1, 1)), budget=self.budget
        )
        self.progress(1, 1)
        areas = np.array([[self.rgb.shape[0] * self.rgb.shape[1]]], np.int64)
        bits = {name: value.reshape(1, 1) for name, value in found.bits.items()}
        return _Cells(found.pixels[0], bits, areas, np.zeros((1, 1), bool))

    def patches(self) -> _Cells:
        """Independent patches that overlap by 6 pixels, equal sizes batched (released reference)."""
        from cadyq.quant.infer import run_batch

        size = self.tile_size
        height, width = self.rgb.shape[:2]
        cut = published_patches(height, width, size, max(1, size - _PATCH_OVERLAP))
        shape = (len(np.unique(cut.read[:, 0])), len(np.unique(cut.read[:, 2])))
        sizes = np.stack([cut.read[:, 1] - cut.read[:, 0], cut.read[:, 3] - cut.read[:, 2]], axis=1)
        result, bits, done = self._canvas(), self._no_bits(shape), 0
        for size in np.unique(sizes, axis=0):
            equal = np.flatnonzero((sizes == size).all(axis=1))
            for part in np.split(equal, range(_PATCHES_AT_ONCE, len(equal), _PATCHES_AT_ONCE)):
                batch = np.stack([self.rgb[y0:y1, x0:x1] for y0, y1, x0, x1 in cut.read[part]])
                force = part_of(_flat(self.force_bits, shape), part)
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
        bands = self.model.bands(
            ArrayRows(self.rgb),
            self.tile_size,
            self.budget,
            self.force_bits,
            self.progress,
            self.runtime,
            self.threads,
        )
        result, top = self._canvas(), 0
        for band in bands:
            if len(band) == len(result):  # the only one: no second copy
                result = band
            else:
                result[top : top + len(band)] = band
            _tell(self.on_part, bands, self.model.scale, top, band)
            top += len(band)
        return _Cells(result, bands.bits, bands.grid.areas.reshape(bands.exits.shape), bands.exits)

    @property
    def _network(self) -> Any:
        return self.model.loaded.network

    def _canvas(self) -> Levels:
        s = self.model.scale
        return np.empty((self.rgb.shape[0] * s, self.rgb.shape[1] * s, 3), self.rgb.dtype)

    def _no_bits(self, shape: tuple[int, int]) -> dict[str, NDArray[np.uint8]]:
        return {site.name: np.zeros(shape, np.uint8) for site in self.model.sites}

    def _paste(
        self,
        result: Levels,
        pixels: Levels,
        origin: tuple[int, int],
        box: tuple[int, ...],
    ) -> None:
        """Copy the LR box ``box`` out of ``pixels``, whose corner lies at the LR pixel ``origin``."""
        s, (y, x), (y0, y1, x0, x1) = self.model.scale, origin, box
        part = pixels[(y0 - y) * s : (y1 - y) * s, (x0 - x) * s : (x1 - x) * s]
        result[y0 * s : y1 * s, x0 * s : x1 * s] = part


def _flat(force: Force, shape: tuple[int, ...]) -> Force:
    """Forced bits with arrays ``(cells,)``. Raises `ArgumentError` where one does not fit the grid of cells."""
    if not isinstance(force, Mapping):
        return force
    forced: dict[str, int | NDArray[Any]] = {}
    for name, value in force.items():
        if isinstance(value, np.ndarray) and value.shape != shape:
            raise ArgumentError(f"force_bits[{name!r}].shape", value.shape, f"the grid of cells, {shape}")
        forced[name] = value.reshape(-1) if isinstance(value, np.ndarray) else value
    return forced


def _as_picture(image: ImageLike) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, str | os.PathLike):
        return read_image(image, deep=True)
    if not isinstance(image, np.ndarray):
        raise ArgumentError(
            "image", type(image).__name__, "a path, a Picture, a Pillow image or a uint8 or uint16 array"
        )
    pixels = image[..., None] if image.ndim == 2 else image
    known = pixels.dtype in (np.uint8, np.uint16)
    if not known or pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] > 4:
        found = f"{image.dtype}{list(image.shape)}"
        raise ArgumentError(
            "image",
            found,
            "a non-empty uint8 or uint16 (H, W) or (H, W, 1 to 4)",
            "convert it to 0..255 or 0..65535",
        )
    return Picture(*split_channels(pixels), pixels.shape[2] < 3)


def _check_bits(value: int | NDArray[Any], candidates: tuple[int, ...]) -> None:
    wrong = sorted(set(np.unique(np.asarray(value)).tolist()) - set(candidates))
    if wrong:
        raise ArgumentError("force_bits", wrong, f"candidates of the model, {candidates}")
