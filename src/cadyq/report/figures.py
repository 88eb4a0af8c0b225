"""Figures: S1 (channels), S2 (trade-off), S3 (crops side by side). Each comes with its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.data.sets import Pair, load_pairs
from cadyq.functional.fidelity import psnr_y
from cadyq.functional.image import luma, sobel
from cadyq.functional.resize import imresize
from cadyq.report.bench import Bench, figures_of
from cadyq.report.lab import Request
from cadyq.report.networks import Network
from cadyq.report.plots import COLORS, curve_style, figure, label_values, save
from cadyq.report.table import Column, Table

__all__ = ["fig_s1", "fig_s2", "fig_s3"]

Array = NDArray[Any]

BUDGETS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
"""Points of the trade-off; a budget is added to every selector's scores per bit."""

_LAYER = 16
_CROP = 48  # LR pixels
_PICTURES = (
    "img_012",
    "img_024",
    "img_092",
    "img_004",
)  # textures that tell networks apart; fixed, not searched


def fig_s1(bench: Bench) -> Table:
    """Channels of one layer, and channel-wise beside layer-wise deviation of all layers."""
    title = "Channel distributions, channel-wise and layer-wise deviation"
    network = bench.find("edsr", 4, "FP32") or next(iter(bench.dynamic()), None)
    if network is None or not bench.lab.has("Urban100"):
        status = "not trained" if network is None else "no data: Urban100 was not found"
        return Table("figS1", title, [Column("site", "Layer")], [{"site": "-", "status": status}])
    if bench.lab.is_planning:
        return Table("figS1", title, [], [])
    picture = next(iter(load_pairs("Urban100", 4, root=bench.lab.root)))
    channels, stds, names = _features(network, picture.lr[:96, :96], _LAYER)
    rows = [
        {
            "site": name,
            "layer_std": float(layer),
            "channel_std_min": float(each.min()),
            "channel_std_median": float(np.median(each)),
            "channel_std_max": float(each.max()),
            "max_over_median": float(each.max() / np.median(each)),
            **network.facts(),
            "status": "measured",
        }
        for name, (layer, each) in zip(names, stds, strict=True)
    ]
    files = _plot_s1(bench, channels, stds)
    columns = (
        Column("site", "Layer"),
        Column("layer_std", "Deviation of the layer", 3),
        Column("channel_std_min", "of a channel: smallest", 3),
        Column("channel_std_median", "median", 3),
        Column("channel_std_max", "largest", 3),
        Column("max_over_median", "largest / median", 1),
    )
    note = (
        f"{network.name}, the feature behind {_LAYER} body convolutions (what the next one takes in), "
        f"first 96x96 LR pixels of Urban100's {picture.name}; "
        f"schedule {network.schedule}."
    )
    wanted = [] if network.backbone == "edsr" else ["The paper shows EDSR, which is not trained here."]
    return Table("figS1", title, columns, rows, [note], wanted, files)


def _features(network: Network, lr: Array, index: int) -> tuple[Array, list[tuple[Any, Array]], list[str]]:
    """Values of one site (C, n), deviations of all body sites (layer, channels), and their names."""
    import torch

    from cadyq.io.models import load_model
    from cadyq.quant.context import Context
    from cadyq.quant.site import Site, SiteObserver, sites_of

    found: dict[str, torch.Tensor] = {}

    class Spy(SiteObserver):
        def observe(self, site: Site, x: torch.Tensor, ctx: Context) -> None:
            found[site.name] = x[0].flatten(1).clone()

    loaded = load_model(network.path).network
    sites = sites_of(loaded, "body")
    for site in sites:
        site.observer = Spy()
    x = torch.from_numpy(np.ascontiguousarray(lr.transpose(2, 0, 1))[None]).float() / 255
    with torch.inference_mode():
        loaded(x, Context.of(x))
    names = [site.name for site in sites]
    stds = [(found[n].std().item(), found[n].std(1).numpy()) for n in names]
    return found[names[min(index, len(names) - 1)]].numpy(), stds, names


def _plot_s1(bench: Bench, channels: Array, stds: Sequence[tuple[Any, Array]]) -> list[str]:
    with figure(7.0, 2.9, 1, 2) as (made, (left, right)):
        order = np.argsort(channels.std(axis=1))
        levels = np.percentile(channels[order], [1, 25, 50, 75, 99], axis=1)
        x = np.arange(len(order))
        left.vlines(x, levels[0], levels[4], color=COLORS[5], linewidth=1.2, label="1st to 99th percentile")
        left.vlines(x, levels[1], levels[3], color=COLORS[0], linewidth=2.6, label="quartiles")
        left.plot(x, levels[2], "o", color="black", markersize=1.8, label="median")
        left.set_xlabel("channel, sorted by deviation")
        left.set_ylabel("value of the feature")
        left.set_title(f"(a) channels behind the {_LAYER}th layer", loc="left")
        left.legend(loc="upper left", handlelength=1.2)
        layers = np.arange(1, len(stds) + 1)
        each = np.array([np.percentile(s, [5, 50, 95]) for _, s in stds])
        floor = 1e-3 * each[:, 2].max()  # channels that are dead here have none to show on a log scale
        right.vlines(
            layers,
            np.maximum(each[:, 0], floor),
            each[:, 2],
            color=COLORS[5],
            linewidth=3,
            label="channel-wise: 5th to 95th percentile",
        )
        right.plot(layers, each[:, 1], "o", color=COLORS[0], markersize=3, label="channel-wise: median")
        right.plot(
            layers,
            [s for s, _ in stds],
            "_",
            color=COLORS[1],
            markersize=7,
            markeredgewidth=2,
            label="layer-wise",
        )
        right.set_yscale("log")
        right.set_xlabel("body convolution")
        right.set_ylabel("standard deviation (log scale)")
        right.set_title("(b) deviation of every layer", loc="left")
        right.legend(loc="lower left", bbox_to_anchor=(0, -0.02), handlelength=1.2)
        right.set_ylim(bottom=floor / 8)
        return save(made, bench.folder, "figS1")


def fig_s2(bench: Bench) -> Table:
    """The trade-off between bits and quality."""
    rows: list[dict[str, Any]] = []
    for network in _trained_by_w_reg(bench):
        found, status = bench.measure(Request(bench.subject(network), "Urban100"))
        rows.append(_trade_row(network, "w_reg", network.w_reg, found, status))
    for network in bench.dynamic():
        for budget in BUDGETS:
            found, status = bench.measure(Request(bench.subject(network), "Urban100", budget=budget))
            rows.append(_trade_row(network, "budget", budget, found, status))
    if not rows:
        rows = [{"model": "CARN-CADyQ", "status": "not trained"}]
    filled = [row for row in rows if row["status"] == "measured"]
    files = _plot_s2(bench, filled) if filled and not bench.lab.is_planning else []
    columns = (
        Column("model", "Network"),
        Column("knob", "Knob"),
        Column("value", "Value"),
        Column("fqr", "FQR"),
        Column("psnr_db", "PSNR dB", 3),
        Column("bitops_g", "BitOPs G", 3),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    notes = [
        "The supplement prints no numbers for this figure.",
        "w_reg: one network trained per value, as in the paper. budget (ours): one network, its selectors shifted at "
        "run time, which costs no training; the two are not the same experiment.",
    ]
    differences = ["Measured on Urban100; the paper chose w_reg on DIV2K's validation set."]
    return Table("figS2", "Trade-off between bits and quality", columns, rows, notes, differences, files)


def _trained_by_w_reg(bench: Bench) -> list[Network]:
    """Dynamic networks of one backbone that differ in w_reg, if at least two were trained."""
    known = [n for n in bench.networks if n.method == "CADyQ" and n.scale == 4 and n.w_reg]
    groups: dict[str, list[Network]] = {}
    for network in known:
        groups.setdefault(network.backbone, []).append(network)
    return [n for group in groups.values() if len({n.w_reg for n in group}) > 1 for n in group]


def _trade_row(network: Network, knob: str, value: Any, found: Any, status: str) -> dict[str, Any]:
    return {
        "model": network.name,
        "knob": knob,
        "value": None if value is None else float(value),
        **figures_of(found),
        **network.facts(),
        "dataset": "Urban100",
        "status": status,
    }


def _plot_s2(bench: Bench, rows: Sequence[dict[str, Any]]) -> list[str]:
    with figure(5.2, 2.9) as (made, axes):
        curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            curves.setdefault((row["model"], row["knob"]), []).append(row)
        for i, ((model, knob), points) in enumerate(curves.items()):
            points = sorted(points, key=lambda r: r["fqr"])
            axes.plot(
                [p["fqr"] for p in points],
                [p["psnr_db"] for p in points],
                label=f"{model}, {knob}",
                **curve_style(i),
            )
            label_values(axes, ((p["fqr"], p["psnr_db"], p["value"]) for p in points))
        axes.set_xlabel("FQR (mean bits)")
        axes.set_ylabel("PSNR on Urban100 (dB)")
        axes.margins(0.08)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return save(made, bench.folder, "figS2")


def fig_s3(bench: Bench) -> Table:
    """Crops side by side."""
    title = "Crops: LR, bicubic, float, PAMS, CADyQ, HR"
    networks = bench.dynamic()
    if not networks or not bench.lab.has("Urban100"):
        status = "not trained" if not networks else "no data: Urban100 was not found"
        return Table("figS3", title, [Column("model", "Network")], [{"model": "-", "status": status}])
    if bench.lab.is_planning:
        return Table("figS3", title, [], [])
    wanted = _PICTURES[:1] if bench.lab.quick else _PICTURES
    pairs = [pair for pair in load_pairs("Urban100", 4, root=bench.lab.root) if pair.name in wanted]
    rows: list[dict[str, Any]] = []
    strips: list[list[tuple[str, Array | None]]] = []
    for pair in pairs:
        y, x = _busiest(pair)
        for network in networks:
            strip, found = _strip(bench, network, pair, y, x)
            strips.append(strip)
            rows += found
    files = _plot_s3(bench, strips)
    columns = (
        Column("picture", "Picture"),
        Column("model", "Network"),
        Column("method", "Method"),
        Column("psnr_db", "PSNR dB"),
        Column("fqr", "FQR"),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    note = (
        f"PSNR and FQR are of the whole picture; the crop is its {_CROP}x{_CROP} LR pixels of largest "
        "gradient, chosen by "
        "the original alone."
    )
    return Table("figS3", title, columns, rows, [note], [], files)


def _busiest(pair: Pair) -> tuple[int, int]:
    """LR corner of the crop with the largest mean gradient, on a grid."""
    light = np.hypot(*sobel(luma(pair.lr)))
    corners = [
        (y, x)
        for y in range(0, max(1, light.shape[0] - _CROP), _CROP // 2)
        for x in range(0, max(1, light.shape[1] - _CROP), _CROP // 2)
    ]
    return max(corners, key=lambda c: float(light[c[0] : c[0] + _CROP, c[1] : c[1] + _CROP].std()))


def _strip(
    bench: Bench, network: Network, pair: Pair, y: int, x: int
) -> tuple[list[tuple[str, Array | None]], list[dict[str, Any]]]:
    """Panels (caption, crop) and rows of one picture and backbone."""
    s = network.scale
    box = np.s_[y * s : (y + _CROP) * s, x * s : (x + _CROP) * s]
    lr = pair.lr[y : y + _CROP, x : x + _CROP].repeat(s, axis=0).repeat(s, axis=1)
    bicubic = imresize(pair.lr, pair.hr.shape[:2])
    plain = psnr_y(bicubic, pair.hr, s)
    panels: list[tuple[str, Array | None]] = [
        (f"LR\n{pair.name}", lr),
        (f"bicubic\n{plain:.2f} dB", bicubic[box]),
    ]
    rows: list[dict[str, Any]] = [
        {"picture": pair.name, "model": "-", "method": "bicubic", "psnr_db": plain, "status": "counted"}
    ]
    for method in ("FP32", "PAMS", "CADyQ"):
        found = bench.find(network.backbone, s, method)
        name = f"{network.backbone} {'float' if method == 'FP32' else method}"
        row: dict[str, Any] = {"picture": pair.name, "model": network.backbone, "method": method}
        if found is None:
            panels.append((f"{name}\nnot trained", None))
            rows.append({**row, "status": "not trained"})
            continue
        result = bench.subject(found).load().upscale(pair.lr, threads=bench.lab.threads)
        db = psnr_y(result.pixels, pair.hr, s)
        panels.append((f"{name}\n{db:.2f} dB, FQR {result.fqr:.2f}", result.pixels[box]))
        rows.append({**row, "psnr_db": db, "fqr": result.fqr, **found.facts(), "status": "measured"})
    panels.append(("HR", pair.hr[box]))
    return panels, rows


def _plot_s3(bench: Bench, strips: Sequence[Sequence[tuple[str, Array | None]]]) -> list[str]:
    with figure(7.2, 1.6 * len(strips), len(strips), 6, squeeze=False) as (made, grid):
        for line, strip in zip(grid, strips, strict=True):
            for axes, (caption, crop) in zip(line, strip, strict=True):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                for side in axes.spines.values():
                    side.set_visible(True)
                    side.set_color("#999999")
                if crop is None:
                    axes.text(
                        0.5,
                        0.5,
                        "not\ntrained",
                        ha="center",
                        va="center",
                        transform=axes.transAxes,
                        color="#666666",
                    )
                    axes.set_aspect("equal")
                else:
                    axes.imshow(crop, interpolation="nearest")
                axes.set_xlabel(caption, fontsize=7)
        return save(made, bench.folder, "figS3")
