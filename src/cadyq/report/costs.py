"""Tables of cost: S5 (patch sizes), S6 (settings), S7 (parameters and BitOPs), S8 (overhead, measured)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np

from cadyq.config import load_toml
from cadyq.data.sets import load_pairs
from cadyq.errors import DataError
from cadyq.evaluate import Evaluation
from cadyq.functional.cost import PAPER_OVERHEAD, bitops, grid_overhead, tile_overhead
from cadyq.functional.image import gray, sobel
from cadyq.functional.tiling import published_patches
from cadyq.report import published
from cadyq.report.bench import Bench, figures_of
from cadyq.report.lab import Lab, Request, lr_sizes
from cadyq.report.networks import PAPER_STEPS, Network, find
from cadyq.report.table import Column, Table
from cadyq.report.timing import Timed, cpu_name, interleaved, with_tile

__all__ = ["s5", "s6", "s7", "s8", "whole_network_bitops"]

HD_PIXELS = 320 * 180
"""LR pixels of a 1280x720 picture at x4, on which the supplement counts."""

UHD = (540, 960)
"""LR height and width of a 3840x2160 picture at x4."""

_PATCHES = (192, 96, 48)
_BATCH_NORM = {"srresnet": 2 * 2 * 16 * 64}  # two operations per value, two norms of 64 channels in 16 blocks
_WITHIN = 0.005


def s5(bench: Bench) -> Table:
    """Patch sizes, and the claim about the variance of the gradient."""
    printed = {int(p.setting.split("x")[1]): p for p in published.cost("S5")}
    have = bench.lab.has("Urban100") and not bench.lab.is_planning
    variance = {size: _gradient_variance(bench.lab, size) if have else None for size in _PATCHES}
    rows: list[dict[str, Any]] = []
    names = ["carn", *(n.backbone for n in bench.dynamic() if n.backbone != "carn")]
    for backbone in names:
        network = bench.find(backbone, 4, "CADyQ")
        for size in _PATCHES:
            p = printed[size] if backbone == "carn" else None
            row: dict[str, Any] = {
                "group": "CARN, the paper's backbone" if p else f"{backbone}, ours only",
                "patch": size,
                "step": size - 6,
                "source": p.source if p else "",
                "published_grad_variance": p.grad_variance if p else None,
                "grad_variance": variance[size],
                "grad_variance_ratio": _ratio(variance[size], variance[_PATCHES[0]]),
                "published_grad_variance_ratio": _ratio(p.grad_variance, printed[192].grad_variance)
                if p
                else None,
                "published_psnr_db": p.psnr_db if p else None,
                "published_bitops_g": p.bitops_g if p else None,
                "status": "not trained",
            }
            if network is not None:
                request = Request(bench.subject(network), "Urban100", "patches", size)
                found, status = bench.measure(request)
                row |= {**network.facts(), "runtime": "torch", **figures_of(found), "status": status}
                row["bitops_g"] = _per_hd_picture(bench.lab, request, found)
                row["bitops_once_g"] = _per_hd_picture(bench.lab, request, found, overlap=size)
            rows.append(row)
    columns = (
        Column("patch", "Patch"),
        Column("published_grad_variance", "Variance of gradient, published (no unit)"),
        Column("grad_variance", "ours (gray levels²)"),
        Column("published_grad_variance_ratio", "relative to 192, published"),
        Column("grad_variance_ratio", "relative to 192, ours"),
        Column("published_psnr_db", "PSNR dB, published"),
        Column("psnr_db", "PSNR dB, ours"),
        Column("published_bitops_g", "BitOPs G, published"),
        Column("bitops_g", "BitOPs G, ours", 3),
        Column("bitops_once_g", "without overlap", 3),
        Column("fqr", "FQR, ours", 3),
        Column("network", "Our network"),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    notes = [
        *published.slips("S5"),
        "Gradient of a patch: mean over its pixels of the Sobel magnitude (kernel / 8) of the gray LR picture in "
        "levels 0 to 255; its variance over all patches of the measured pictures, in squared gray levels.",
        "BitOPs: body convolutions per 320x180 LR pixels (a 1280x720 picture), with the overlap that these "
        "patches really "
        "have on the measured pictures, and without it. The paper adds the same 1.9 % at every size.",
        *_claim(rows),
    ]
    differences = [
        "The last patch of a row or column takes the rest, as in the released reference.",
        "CARN stands where it is trained; other backbones are shown beside it, without a published figure.",
    ]
    return Table(
        "S5", "Size of inference patches (step = size - 6), Urban100", columns, rows, notes, differences
    )


def _claim(rows: list[dict[str, Any]]) -> list[str]:
    """Whether larger patches have the smaller variance and the more BitOPs."""
    result = []
    ordered = [row["grad_variance"] for row in rows[: len(_PATCHES)]]
    if None not in ordered:
        holds = all(a < b for a, b in pairwise(ordered))
        result.append(f"Claim 'larger patches vary less': {'holds' if holds else 'does NOT hold'} here.")
    for network in dict.fromkeys(row.get("network") for row in rows):
        for key, how in (("bitops_g", "overlap counted"), ("bitops_once_g", "overlap not counted")):
            cost = [float(row.get(key) or np.nan) for row in rows if row.get("network") == network]
            if network is not None and np.isfinite(cost).all():
                holds = all(a > b for a, b in pairwise(cost))
                verdict = "holds" if holds else "does NOT hold"
                result.append(f"Claim 'larger patches need more BitOPs', {network}, {how}: {verdict} here.")
    return result


def _gradient_variance(lab: Lab, size: int) -> float:
    means = []
    for i, pair in enumerate(load_pairs("Urban100", 4, root=lab.root)):
        if i == lab.limit("Urban100"):
            break
        dx, dy = sobel(gray(pair.lr.astype(np.float64) / 255) * 255)
        magnitude = np.hypot(dx, dy)
        height, width = magnitude.shape
        boxes = published_patches(height, width, size, size - 6).read
        means += [float(magnitude[y0:y1, x0:x1].mean()) for y0, y1, x0, x1 in boxes]
    return float(np.var(means))


def s6(bench: Bench) -> Table:
    """The paper's settings beside those of our networks and recipes."""
    rows: list[dict[str, Any]] = [
        {"group": "Paper (supplement, table S6 and section C)", "status": "counted", **row}
        for row in published.settings()
    ]
    named = list(published.BACKBONES)
    ours = {name: bench.find(published.BACKBONES[name], 4, "CADyQ") for name in named}
    flat = {name: _flat(n.training) if n else {} for name, n in ours.items()}
    for key in dict.fromkeys(key for record in flat.values() for key in record):
        cells = {name: str(record[key]) if key in record else None for name, record in flat.items()}
        rows.append(
            {"group": "Ours: records of the CADyQ x4 networks", "setting": key, **cells, "status": "counted"}
        )
    for name, n in ours.items():
        if n is None:
            rows.append(
                {
                    "group": "Ours: records of the CADyQ x4 networks",
                    "setting": f"{name}: no network",
                    "status": "not trained",
                }
            )
    notes = [
        "Updates of the paper's schedule: " + ", ".join(f"{k} {v}" for k, v in PAPER_STEPS.items()) + "."
    ]
    recipes = _recipes()
    for name, record in recipes.items():
        text = "; ".join(f"{key} = {value}" for key, value in _flat(record).items())
        rows.append({"group": "Recipes in the package", "setting": name, "recipe": text, "status": "counted"})
    columns = [Column("setting", "Setting"), *(Column(name, name) for name in named)]
    if recipes:
        columns.append(Column("recipe", "Recipe"))
    return Table("S6", "Settings", columns, rows, notes)


def _recipes() -> dict[str, dict[str, Any]]:
    """The x4 recipes that ship, the paper's and ours, by file."""
    home = files("cadyq").joinpath("recipes")
    found = {}
    for room, prefix in ((home.joinpath("paper"), "paper/"), (home, "")):
        names = sorted(f.name for f in room.iterdir() if f.name.endswith("-x4.toml")) if room.is_dir() else []
        found.update({prefix + name: load_toml(str(room.joinpath(name))) for name in names})
    return found


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return result


def s7(bench: Bench) -> Table:
    """Parameters and BitOPs, image-wise and patch-wise."""
    rows: list[dict[str, Any]] = []
    for p in published.cost("S7"):
        backbone = published.BACKBONES[p.backbone]
        whole = p.setting == "full image"
        network = bench.find(backbone, 4, p.method)
        row: dict[str, Any] = {
            "group": "Full image" if whole else "Patches of 96x96",
            "model": p.backbone if p.method == "FP32" else f"{p.backbone}-{p.method}",
            "source": p.source,
            "published_params_k": p.params_k,
            "params_k": _parameters(backbone, dynamic=p.method == "CADyQ") / 1e3,
            "published_psnr_db": p.psnr_db,
            "published_bitops_g": p.bitops_g,
            "status": "not trained",
        }
        if p.method != "CADyQ":
            bits = 32 if p.method == "FP32" else 8
            counted = _body_bitops(backbone, bits) * (1 if whole else PAPER_OVERHEAD)
            row |= {"bitops_g": counted / 1e9, "status": "counted"}
            if not whole:
                row["real_bitops_g"] = _body_bitops(backbone, bits) * grid_overhead(180, 320) / 1e9
        if network is not None:
            request = Request(bench.subject(network), "Urban100", "image" if whole else "patches")
            found, status = bench.measure(request)
            row |= {**network.facts(), "runtime": "torch", "status": status}
            if found is not None:
                row |= {"psnr_db": found.summary.psnr_db, "fqr": found.summary.fqr}
                if p.method == "CADyQ":
                    row["bitops_g"] = _per_hd_picture(bench.lab, request, found)
        if p.method != "CADyQ" and p.bitops_g:
            row["off_percent"] = 100 * (row["bitops_g"] / p.bitops_g - 1)
        rows.append(row)
    columns = (
        Column("model", "Model"),
        Column("published_params_k", "Parameters K, published", 1),
        Column("params_k", "ours", 1),
        Column("published_bitops_g", "BitOPs G, published"),
        Column("bitops_g", "ours"),
        Column("off_percent", "off, %"),
        Column("real_bitops_g", "released patch grid"),
        Column("published_psnr_db", "PSNR dB, published"),
        Column("psnr_db", "PSNR dB, ours"),
        Column("fqr", "FQR, ours"),
        Column("network", "Our network"),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    image_wise = [r for r in rows if r["group"] == "Full image" and "off_percent" in r]
    worst = max(abs(r["off_percent"]) for r in image_wise)
    verdict = "all within 0.5 %" if worst <= 100 * _WITHIN else "NOT within 0.5 %"
    notes = [
        *published.slips("S7"),
        f"Float and 8-bit rows, image-wise: {verdict} of the published BitOPs (largest difference {worst:.2f} %).",
        "Parameters and BitOPs of float and 8-bit rows are counted on the paper's architectures (SRResNet "
        "with batch norm); "
        "they need no training. PSNR and the CADyQ rows are measured.",
        f"The supplement's patch-wise rows are its image-wise ones times {PAPER_OVERHEAD:.4f}; patches of "
        "the released code "
        f"(96, step 90) cost {grid_overhead(180, 320):.4f} at 320x180: column 'released patch grid'.",
        f"Tiles on one plane (our default, 48 LR pixels) cost {tile_overhead(180, 320, 48):.4f}.",
        "CADyQ: mean over Urban100 of the body's BitOPs per LR pixel, times 320x180.",
    ]
    return Table("S7", "Parameters and BitOPs for a 1280x720 picture", columns, rows, notes)


@cache
def _parameters(backbone: str, *, dynamic: bool) -> int:
    from cadyq.backbones import build_backbone
    from cadyq.quant.site import sites_of

    network = build_backbone(backbone, scale=4)
    added = sum(3 * (site.channels + 3) for site in sites_of(network, "body")) if dynamic else 0
    return network.n_parameters() + added


@cache
def _macs_per_pixel(backbone: str) -> tuple[float, float]:
    """Multiply-accumulates per LR pixel of the body (fixed convolutions included), and of all others."""
    from cadyq.backbones import build_backbone
    from cadyq.quant.site import sites_of

    network = build_backbone(backbone, scale=4)
    body = sum(s.macs_per_pixel for s in sites_of(network, "body", "fixed"))
    return body, sum(s.macs_per_pixel for s in sites_of(network, "edge"))


def _body_bitops(backbone: str, bits: int) -> float:
    """Of a 1280x720 picture, with the batch norms, which the supplement counts."""
    norm = _BATCH_NORM.get(backbone, 0) * HD_PIXELS * (bits / 32) ** 2
    return bitops(_macs_per_pixel(backbone)[0] * HD_PIXELS, bits, bits) + norm


def whole_network_bitops(backbone: str, body_bits: float) -> float:
    """BitOPs of a 1280x720 picture: body at these mean bits and 8-bit weights, the rest at 8 bits; 32 is float."""
    body, rest = _macs_per_pixel(backbone)
    if body_bits == 32:
        return bitops((body + rest) * HD_PIXELS, 32, 32)
    return bitops(body * HD_PIXELS, 8, body_bits) + bitops(rest * HD_PIXELS, 8, 8)


def _per_hd_picture(
    lab: Lab, request: Request, found: Evaluation | None, overlap: int | None = None
) -> float | None:
    """Mean over pictures of the body's BitOPs per LR pixel, in G per 320x180 pixels.

    With ``overlap``, the side of the patches, what they compute twice is taken out.
    """
    if found is None:
        return None
    sizes = lr_sizes(request.data, request.subject.network.scale, lab.root, len(found.rows))
    twice = [1.0 if overlap is None else grid_overhead(h, w, overlap, overlap - 6) for h, w in sizes]
    density = [
        row.bitops_g / (h * w * factor) for row, (h, w), factor in zip(found.rows, sizes, twice, strict=True)
    ]
    return float(np.mean(density)) * HD_PIXELS


_S8 = {
    "(a)": "8 bit, whole picture, no selector",
    "(b)": "8 bit, in tiles, no selector",
    "(c)": "8 bit, in tiles, selectors decide and are forced to 8",
    "(d)": "CADyQ: in tiles, selectors decide",
}


def s8(bench: Bench) -> Table:
    """Overhead of tiles and selectors for a 3840x2160 picture, measured with the integer engine."""
    rows: list[dict[str, Any]] = []
    notes = [*published.slips("S8")]
    printed = {p.setting[:3]: p for p in published.cost("S8")}
    names = ["carn", *(n.backbone for n in bench.dynamic() if n.backbone != "carn")]
    repeats = 3 if bench.lab.quick else 9
    for backbone in names:
        dynamic, static = (find(bench.networks, backbone, 4, m, executed=True) for m in ("CADyQ", "PAMS"))
        group = "CARN, the paper's backbone" if backbone == "carn" else f"{backbone}, ours only"
        timed, counted, why = _overhead(bench, dynamic, static, repeats)
        for key, text in _S8.items():
            p = printed[key] if backbone == "carn" else None
            row: dict[str, Any] = {
                "group": group,
                "row": key,
                "model": text,
                "source": p.source if p else "",
                "published_fqr": p.fqr if p else None,
                "published_latency_ms": p.latency_ms if p else None,
                "published_bitops_g": p.bitops_g if p else None,
                "status": why or "measured",
            }
            if dynamic is not None:
                row |= dynamic.facts()
            if key in timed:
                row |= _timed_row(timed, key)
            if key in counted:
                row["bitops_g"] = counted[key]
            rows.append(row)
        notes += _verdict(backbone, timed)
    columns = (
        Column("row", "Row"),
        Column("model", "What"),
        Column("published_fqr", "FQR, published"),
        Column("fqr", "FQR, ours"),
        Column("published_latency_ms", "ms, published", 1),
        Column("latency_ms", "ms, ours", 1),
        Column("difference_ms", "over (a), ms", 1),
        Column("input_and_head_ms", "head", 1),
        Column("body_ms", "body", 1),
        Column("tail_and_output_ms", "tail", 1),
        Column("published_bitops_g", "BitOPs G, published", 1),
        Column("bitops_g", "BitOPs G, ours", 1),
        Column("network", "Network"),
        Column("status", "Status"),
    )
    threads = bench.lab.threads or "all"
    notes += [
        f"Integer engine, {threads} threads, {cpu_name()}; median of {repeats} interleaved runs of one "
        "960x540 LR picture "
        "(decoding not included). Times change from run to run; everything else does not.",
        "BitOPs: body convolutions, with the recomputed ring of every tile, and for (c) and (d) the selectors: one "
        "product of 16x16 bits per value for the deviation, and 32x32 bits per weight of the linear layer.",
        "(a) uses the engine's largest tiles (256 LR pixels), whose ring is the smallest: with equal bits "
        "the result does "
        "not depend on the tile.",
    ]
    return Table(
        "S8",
        "Overhead for a 3840x2160 picture",
        columns,
        rows,
        notes,
        [
            "The paper measures fake-quantized networks on a GPU; here bits are executed in integers on a CPU.",
            "Tiles share one plane: only the ring of the hidden layer is computed twice, not whole "
            "overlapping patches.",
        ],
    )


def _overhead(
    bench: Bench, dynamic: Network | None, static: Network | None, repeats: int
) -> tuple[dict[str, Timed], dict[str, float], str]:
    """Times and BitOPs (G) of the four rows, or why there are none."""
    from cadyq.engine.plan import MAX_TILE
    from cadyq.engine.run import Engine
    from cadyq.engine.runtime import with_budget

    if dynamic is None:
        return {}, {}, "not trained"
    model = bench.subject(dynamic).load()
    if model.plan is None or model.engine is None:
        return {}, {}, f"not run by the integer engine: {model.no_plan_because}"
    if bench.lab.is_planning:
        return {}, {}, "planned"
    plan, threads = model.plan.plan, bench.lab.threads
    fixed = plan
    if static is not None and (other := bench.subject(static).load().plan) is not None:
        fixed = other.plan
    image = _uhd_picture(bench.lab)
    tile = plan.tile
    rows, cols = -(-image.shape[0] // tile), -(-image.shape[1] // tile)
    generous = with_budget(plan, 1e6)  # selectors run, and the largest candidate always wins
    engines: dict[str, tuple[Engine, Any]] = {
        "(a)": (Engine(with_tile(fixed, MAX_TILE), threads), _largest(fixed, image.shape, MAX_TILE)),
        "(b)": (Engine(with_tile(fixed, tile), threads), _largest(fixed, image.shape, tile)),
        "(c)": (Engine(generous, threads), None),
        "(d)": (Engine(plan, threads), None),
    }
    timed = interleaved(engines, image, repeats)
    macs = np.array([site.macs_per_pixel for site in model.sites if site.kind == "body"])
    counted = {}
    for key, found in timed.items():
        side = MAX_TILE if key == "(a)" else tile
        ring = tile_overhead(*UHD, side)
        share = found.bits.reshape(-1, len(macs)).mean(axis=0)
        total = bitops(macs * UHD[0] * UHD[1] * ring, 8, share)
        if key in ("(c)", "(d)"):
            total += _selector_bitops(plan, rows * cols)
        counted[key] = total / 1e9
    return timed, counted, ""


def _largest(plan: Any, shape: tuple[int, ...], tile: int) -> Any:
    """Forced choice of the largest candidate; None where there is nothing to choose."""
    if all(len(site.bits) == 1 for site in plan.sites):
        return None
    last = np.array([len(site.bits) - 1 for site in plan.sites], np.int8)
    grid = (-(-shape[0] // tile), -(-shape[1] // tile), len(last))
    return np.ascontiguousarray(np.broadcast_to(last, grid))


def _selector_bitops(plan: Any, n_tiles: int) -> float:
    total = 0.0
    for site in plan.sites:
        channels = site.multiplier.shape[1]
        total += bitops(channels * UHD[0] * UHD[1], 16, 16)
        if site.selector is not None:
            total += bitops(n_tiles * site.selector.weight.size, 32, 32)
    return total


def _uhd_picture(lab: Lab) -> Any:
    """The first Large4K (or Test4K) picture made smaller, or a drawn one where there is no data."""
    data = lab.large_set("Test4K")
    try:
        pair = next(iter(load_pairs(data, 4, root=lab.root)))
    except (DataError, StopIteration):
        from cadyq.engine.synthetic import random_picture

        return random_picture(*UHD)
    picture = pair.lr
    tall, wide = (-(-n // m) for n, m in zip(UHD, picture.shape[:2], strict=True))
    return np.ascontiguousarray(np.tile(picture, (tall, wide, 1))[: UHD[0], : UHD[1]])


def _timed_row(timed: dict[str, Timed], key: str) -> dict[str, Any]:
    found = timed[key]
    stages = {f"{name.replace(' ', '_')}_ms": 1e3 * s for name, s in found.stages.items()}
    difference = None if key == "(a)" else 1e3 * (found.median - timed["(a)"].median)
    return {"fqr": found.fqr, "latency_ms": 1e3 * found.median, "difference_ms": difference, **stages}


def _verdict(backbone: str, timed: dict[str, Timed]) -> list[str]:
    if not timed:
        return []
    a, b, c, d = (1e3 * timed[key].median for key in _S8)
    answer = "Yes" if d < a else "No"
    return [
        f"Is the overhead overcome ({backbone})? {answer}: tiles cost {b - a:+.1f} ms, selectors "
        f"{c - b:+.1f} ms, fewer bits "
        f"save {c - d:+.1f} ms; (d) - (a) = {d - a:+.1f} ms ({100 * (d / a - 1):+.1f} %)."
    ]


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base
