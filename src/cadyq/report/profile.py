"""What a model costs on a picture: parameters, storage, operations, energy by a stated model, and measured time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cadyq.functional.cost import bitops, energy_joules
from cadyq.functional.tiling import Grid
from cadyq.report.timing import STAGES, cpu_name, engine_stages, interleaved, with_tile
from cadyq.upscale import Model, describe

if TYPE_CHECKING:
    from cadyq.engine.plan import Conv

__all__ = ["ENERGY_MODEL", "ConvCost", "Profile", "profile"]

ENERGY_MODEL = (
    "Arithmetic only, 45 nm, 0.9 V (Horowitz, ISSCC 2014): 0.2 pJ per 8x8-bit product, scaled by the product of the "
    "bit-widths, 0.1 pJ per 32-bit sum; 4.6 pJ per float MAC. Memory traffic, which may cost more, is left out."
)


@dataclass(frozen=True)
class ConvCost:
    """One convolution on one picture.

    Attributes:
        name: its site in the network, or its kind and size.
        stage: ``head``, ``body`` (blocks), ``between`` blocks, or ``tail``.
        macs: multiply-accumulates.
        weight_bits: bit-width of the weights.
        bits: mean bit-width of its input, tiles counting by their area; 32 is float.
        bitops: 2 MACs (weight bits / 32) (bits / 32), summed over tiles.
        energy_j: joules by `ENERGY_MODEL`.
        seconds: measured time, None where it was not measured.
        seconds_from: ``measured``, or ``block`` where a measured block's time is shared out by MACs.
    """

    name: str
    stage: str
    macs: float
    weight_bits: int
    bits: float
    bitops: float
    energy_j: float
    seconds: float | None
    seconds_from: str


@dataclass(frozen=True)
class Profile:
    """What `profile` found; sums are over ``convs``, ``body_bitops_g`` over those that a model's figures count."""

    model: str
    runtime: str
    parameters: int
    storage_bytes: int
    image: tuple[int, int]
    scale: int
    tile: int
    n_tiles: int
    fqr: float
    macs_g: float
    bitops_g: float
    body_bitops_g: float
    energy_mj: float
    seconds: float
    seconds_min: float
    seconds_per_body_tile: float
    repeats: int
    threads: int | None
    cpu: str
    stages: Mapping[str, float]
    convs: tuple[ConvCost, ...]
    energy_model: str = ENERGY_MODEL

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON."""
        return asdict(self)


def profile(
    model: Model,
    image: NDArray[np.uint8],
    *,
    tile: int | None = None,
    threads: int | None = None,
    repeats: int = 5,
) -> Profile:
    """Profile a model on a picture, uint8 RGB ``(H, W, 3)``; times are medians of ``repeats`` runs after one more.

    Raises:
        ArgumentError: as `Model.upscale` does. MissingExtraError: the model has no plan and torch is missing.
    """
    side = tile or model.tile
    if model.plan is not None and model.runtime("tiles", side) == "engine":
        seconds, stages, convs = _on_engine(model, image, side, threads, repeats)
        runtime = "engine"
    else:
        seconds, stages, convs = _on_torch(model, image, side, threads, repeats)
        runtime = "torch"
    about = describe(model.name)
    grid = Grid(image.shape[0], image.shape[1], side)
    kinds = {site.name: site.kind for site in model.sites}
    counted = [c for c in convs if c.name in kinds]
    return Profile(
        model=os.fspath(model.name),
        runtime=runtime,
        parameters=about["parameters"],
        storage_bytes=about["storage_bytes"],
        image=(image.shape[0], image.shape[1]),
        scale=model.scale,
        tile=side,
        n_tiles=grid.rows * grid.cols,
        fqr=float(np.mean([c.bits for c in counted if kinds[c.name] == "body"])),
        macs_g=sum(c.macs for c in convs) / 1e9,
        bitops_g=sum(c.bitops for c in convs) / 1e9,
        body_bitops_g=sum(c.bitops for c in counted) / 1e9,
        energy_mj=sum(c.energy_j for c in convs) * 1e3,
        seconds=float(np.median(seconds)),
        seconds_min=min(seconds),
        seconds_per_body_tile=stages.get("body", float("nan")) / (grid.rows * grid.cols),
        repeats=repeats,
        threads=threads,
        cpu=cpu_name(),
        stages=stages,
        convs=tuple(convs),
    )


def _on_engine(
    model: Model, image: NDArray[np.uint8], tile: int, threads: int | None, repeats: int
) -> tuple[list[float], dict[str, float], list[ConvCost]]:
    from cadyq.engine.plan import Block, Layer
    from cadyq.engine.run import Engine

    assert model.plan is not None
    plan = with_tile(model.plan.plan, tile)
    engine = Engine(plan, threads)
    timed = interleaved({"": (engine, None)}, image, repeats)[""]
    stages = engine_stages(engine)
    left = engine.profile()
    areas = Grid(image.shape[0], image.shape[1], tile).areas
    bits = timed.bits.reshape(len(areas), -1)
    convs: list[ConvCost] = []
    column = {site.name: i for i, site in enumerate(plan.sites)}
    blocks = [i for i, step in enumerate(plan.steps) if isinstance(step, Block)]
    for i, step in enumerate(plan.steps):
        if isinstance(step, Block):
            taken = _take(left, "block")
            sizes = np.array([_macs(layer.conv, areas.sum()) for layer in step.layers])
            for layer, share in zip(step.layers, sizes / sizes.sum(), strict=True):
                conv, site = layer.conv, layer.conv.site
                name = site.name if site is not None else _label(conv)
                own = bits[:, column[name]] if name in column else np.full(len(areas), _width(conv))
                part = None if taken is None else taken * float(share)
                convs.append(_cost(name, "body", _macs(conv, areas), 8, own, part, "block"))
        elif isinstance(step, Layer):
            stage = "head" if i < blocks[0] else "tail" if i > blocks[-1] else "between"
            pixels = areas.sum() * (plan.planes[step.dst].level / step.shuffle) ** 2
            total, own = np.array([_macs(step.conv, pixels)]), np.array([_width(step.conv)])
            name, site = _label(step.conv), step.conv.site
            taken = _take(left, "layer " + name)
            if site is not None and site.kind == "fixed":  # costs, but does not choose: part of the body
                name, stage = site.name, "body"
            convs.append(_cost(name, stage, total, 8, own, taken, "measured"))
    return list(timed.seconds), stages, convs


def _take(left: list[tuple[str, float]], name: str) -> float | None:
    """Seconds of the first entry of this name, which is used up."""
    for i, (found, seconds) in enumerate(left):
        if found.startswith(name):
            del left[i]
            return seconds
    return None


def _label(conv: Conv) -> str:
    return f"{conv.kernel}x{conv.kernel} {conv.c_in}->{conv.c_out}"


def _width(conv: Conv) -> int:
    """Bits of what a convolution takes in that does not choose: its site's, else the plane's 16."""
    return 16 if conv.site is None else conv.site.bits[-1]


def _macs(conv: Conv, pixels: Any) -> Any:
    return float(np.prod(conv.weight.shape)) * pixels


def _cost(
    name: str, stage: str, macs: Any, weight_bits: int, bits: Any, seconds: float | None, source: str
) -> ConvCost:
    return ConvCost(
        name,
        stage,
        float(np.sum(macs)),
        weight_bits,
        float(np.average(bits, weights=macs)),
        bitops(macs, weight_bits, bits),
        energy_joules(macs, weight_bits, bits),
        seconds,
        source if seconds is not None else "",
    )


def _on_torch(
    model: Model, image: NDArray[np.uint8], tile: int, threads: int | None, repeats: int
) -> tuple[list[float], dict[str, float], list[ConvCost]]:
    """Every convolution is timed by hooks; what lies between them (quantizers, selectors) is the rest."""
    import torch
    from torch import nn

    from cadyq.quant.context import Context
    from cadyq.quant.infer import run_tiles
    from cadyq.quant.infer import threads as with_threads
    from cadyq.quant.site import sites_of

    network = model.loaded.network
    clocks: dict[str, list[float]] = {}
    started: dict[str, float] = {}
    macs: dict[str, float] = {}
    named = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}

    def count(name: str, conv: Any, y: Any) -> None:
        source = y[0] if isinstance(conv, nn.Conv2d) else y[1]
        macs[name] = macs.get(name, 0.0) + float(conv.weight.numel()) * source.shape[-1] * source.shape[-2]

    small = 16  # operations per pixel do not depend on the picture
    counters = [
        m.register_forward_hook(lambda m, x, y, n=n: count(n, m, (y, x[0]))) for n, m in named.items()
    ]
    with torch.inference_mode():
        lr = torch.zeros(1, 3, small, small, dtype=next(network.parameters()).dtype)
        network(lr, Context.of(lr))
    for handle in counters:
        handle.remove()

    def begin(name: str) -> None:
        started[name] = time.perf_counter()

    def end(name: str) -> None:
        clocks[name][-1] += time.perf_counter() - started[name]

    hooks = [m.register_forward_pre_hook(lambda m, x, n=n: begin(n)) for n, m in named.items()]
    hooks += [m.register_forward_hook(lambda m, x, y, n=n: end(n)) for n, m in named.items()]
    seconds = []
    with with_threads(threads):
        for round_ in range(repeats + 1):
            for name in named:
                clocks.setdefault(name, []).append(0.0)
            start = time.perf_counter()
            found = run_tiles(network, image, tile)
            if round_:
                seconds.append(time.perf_counter() - start)
    for handle in hooks:
        handle.remove()
    pixels, areas = image.shape[0] * image.shape[1], Grid(image.shape[0], image.shape[1], tile).areas
    owner = {id(site.conv): site for site in sites_of(network) if site.conv is not None}
    body = {site.name for site in model.sites}
    convs, stage = [], "head"
    last = max(
        i for i, conv in enumerate(named.values()) if id(conv) in owner and owner[id(conv)].name in body
    )
    behind = set(list(named)[last + 1 :])
    for name, conv in named.items():
        site = owner.get(id(conv))
        is_body = site is not None and site.name in body
        stage = "body" if is_body else "head" if stage == "head" else "tail" if name in behind else "between"
        weight_bits = int(getattr(conv, "weight_bits", None) or 32)
        total = macs.get(name, 0.0) / small**2 * pixels
        if is_body and site is not None:
            own: Any = found.bits[site.name]
            each: Any = total * areas / areas.sum()
        else:
            quantized = site is not None and (site.quantizer is not None or float(site.grid) > 0)
            own, each = np.array([site.static_bits if quantized and site else 32]), np.array([total])
        taken = float(np.median(clocks[name][1:]))
        label = site.name if is_body and site is not None else name
        convs.append(_cost(label, stage, each, weight_bits, own, taken, "measured"))
    stages: dict[str, float] = {}
    for conv_cost in convs:
        key = STAGES[conv_cost.stage]
        stages[key] = stages.get(key, 0.0) + (conv_cost.seconds or 0.0)
    stages["between convolutions"] = float(np.median(seconds)) - sum(stages.values())
    return seconds, stages, convs
