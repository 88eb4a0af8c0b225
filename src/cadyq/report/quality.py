"""Tables of quality: S1 (LinQ), S2 (x2), S3 (fully quantized), S4 (candidates), B1 (what selectors see)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cadyq.data.sets import DATA_SETS
from cadyq.evaluate import Evaluation, compare
from cadyq.report import published
from cadyq.report.bench import Bench, figures_of
from cadyq.report.lab import Request
from cadyq.report.networks import Network
from cadyq.report.table import Column, Table

__all__ = ["b1", "s1", "s2", "s3", "s4"]

TRAINING_DATA = (
    "Training data: 384x384 photo crops (JPEG 95 originals) instead of DIV2K; compare a network with our own "
    "float one."
)
TILES = "Inference: bits per tile on one feature plane; the paper cuts independent 96x96 patches (table S7 has both)."
_QUALITY = (
    Column("model", "Model"),
    Column("published_fqr", "FQR, published"),
    Column("fqr", "FQR, ours"),
    Column("published_psnr_db", "PSNR dB, published"),
    Column("psnr_db", "PSNR dB, ours"),
    Column("published_ssim", "SSIM, published", 3),
    Column("ssim", "SSIM, ours", 3),
    Column("published_gain_db", "dB over float, published"),
    Column("gain_db", "dB over float, ours"),
    Column("network", "Our network"),
    Column("schedule", "Schedule"),
    Column("status", "Status"),
)


def s1(bench: Bench) -> Table:
    """LinQ instead of PAMS, x4."""
    return _quality_table(bench, "S1", "LinQ as the quantizer, x4")


def s2(bench: Bench) -> Table:
    """Networks for x2."""
    return _quality_table(bench, "S2", "Networks for x2")


def _quality_table(bench: Bench, name: str, title: str) -> Table:
    printed = published.quality(name)
    floats = {(p.backbone, p.dataset): p.psnr_db for p in printed if p.method == "FP32"}
    rows, stand_ins = [], set()
    for dataset in ("Urban100", "Test2K", "Test4K"):
        ours = dataset if dataset == "Urban100" else bench.lab.large_set(dataset)
        group = dataset
        if ours != dataset:
            group = f"{dataset} as published, beside {_called(ours)} of ours: not comparable"
            stand_ins.add(f"{dataset} was not found; {_called(ours)} stands in and is named as what it is.")
        own_float: dict[str, float] = {}
        for p in (p for p in printed if p.dataset == dataset):
            backbone = published.BACKBONES[p.backbone]
            row = {
                "group": group,
                "model": p.backbone if p.method == "FP32" else f"{p.backbone}-{p.method}",
                "source": p.source,
                "scale": p.scale,
                "published_dataset": dataset,
                "published_fqr": p.fqr,
                "published_psnr_db": p.psnr_db,
                "published_ssim": p.ssim,
                "published_gain_db": _difference(p.psnr_db, floats.get((p.backbone, dataset)), p.method),
                "dataset": ours,
                **_ours(bench, bench.find(backbone, p.scale, p.method), ours),
            }
            if p.method == "FP32" and "psnr_db" in row:
                own_float[backbone] = row["psnr_db"]
            row["gain_db"] = _difference(row.get("psnr_db"), own_float.get(backbone), p.method)
            rows.append(row)
    return Table(
        name,
        title,
        _QUALITY,
        rows,
        [*published.slips(name), *sorted(stand_ins), *_schedules(rows)],
        [TRAINING_DATA, TILES, *_conversions(bench, rows)],
    )


def s3(bench: Bench) -> Table:
    """Every layer quantized (FQSR)."""
    from cadyq.report.costs import whole_network_bitops

    rows = []
    for p in published.cost("S3"):
        network = bench.find("edsr", 4, p.method)
        ours = _ours(bench, network, "Urban100")
        quality = [q for q in published.quality("S3") if q.method == p.method]
        share = ours["fqr_area"] if "fqr_area" in ours else {"FP32": 32.0, "FQSR": 8.0}.get(p.method)
        rows.append(
            {
                "model": "EDSR-baseline" if p.method == "FP32" else f"EDSR-baseline-{p.method}",
                "source": p.source,
                "scale": 4,
                "published_fqr": p.fqr,
                "published_psnr_db": p.psnr_db,
                "published_ssim": quality[0].ssim if quality else 0.784,
                "published_bitops_g": p.bitops_g,
                "whole_bitops_g": None if share is None else whole_network_bitops("edsr", share) / 1e9,
                "dataset": "Urban100",
                **ours,
            }
        )
    columns = [c for c in _QUALITY if not c.key.endswith("gain_db")]
    columns[3:3] = [
        Column("published_bitops_g", "BitOPs G, published", 1),
        Column("whole_bitops_g", "BitOPs G, ours", 1),
    ]
    notes = [
        *published.slips("S3"),
        "BitOPs of the whole network for a 1280x720 picture: body convolutions by the measured bits, all "
        "others at 8 bits "
        "(32 in the float network).",
        *_schedules(rows),
    ]
    return Table(
        "S3", "Fully quantized EDSR-baseline x4, Urban100", columns, rows, notes, [TRAINING_DATA, TILES]
    )


def s4(bench: Bench) -> Table:
    """Sets of candidate bit-widths."""
    rows: list[dict[str, Any]] = []
    printed = {p.method: p for p in published.quality("S4")}
    methods = {"CADyQ{4;8}": "{4, 8}", "CADyQ{4;6;8}": "{4, 6, 8}", "CADyQ{2;4;6;8}": "{2, 4, 6, 8}"}
    for backbone in ("carn", *(n.backbone for n in bench.dynamic() if n.backbone != "carn")):
        base = bench.find(backbone, 4, "CADyQ")
        for method, candidates in methods.items():
            network = base if method == "CADyQ{4;6;8}" else bench.find(backbone, 4, method)
            variant = ""
            if network is None and base is not None and method == "CADyQ{4;8}":
                network, variant = base, "candidates {4;8}"
            p = printed[method] if backbone == "carn" else None
            rows.append(
                {
                    "group": "CARN, the paper's backbone" if backbone == "carn" else f"{backbone}, ours only",
                    "model": candidates,
                    "source": "" if p is None else p.source,
                    "published_fqr": None if p is None else p.fqr,
                    "published_psnr_db": None if p is None else p.psnr_db,
                    "published_ssim": None if p is None else p.ssim,
                    "dataset": "Urban100",
                    **_ours(bench, network, "Urban100", variant=variant),
                    "weights": "those of {4, 6, 8}, selectors fitted again" if variant else "own",
                }
            )
    columns = [c for c in _QUALITY if not c.key.endswith("gain_db")]
    columns[0] = Column("model", "Candidates")
    columns.insert(-1, Column("weights", "Weights"))
    notes = [*published.slips("S4"), *_schedules(rows)]
    return Table("S4", "Candidate bit-widths, Urban100", columns, rows, notes, [TRAINING_DATA, TILES])


_SEEN = {
    "gradient": "gradient of the picture",
    "layer": "deviation of the layer",
    "gradient+layer": "gradient and deviation of the layer",
    "channel": "deviation of every channel",
    "both": "gradient and deviation of every channel (CADyQ)",
}


def b1(bench: Bench) -> Table:
    """What selectors see, from one measurement."""
    rows: list[dict[str, Any]] = []
    notes = [
        "The supplement refers to table 3 of the main paper for these figures and prints none itself.",
        "All selectors of a network were fitted on one measurement of training tiles and set to the same "
        "mean bits there; "
        "they differ in nothing but their inputs.",
        "Differences in dB are paired over pictures, with a 95 % bootstrap interval.",
    ]
    for network in bench.dynamic():
        full, _ = bench.measure(Request(bench.subject(network, variant="both"), "Urban100"))
        for inputs, seen in _SEEN.items():
            own = bench.find(network.backbone, 4, "CADyQ" if inputs == "both" else f"CADyQ [{inputs}]")
            trained = own is not None and inputs != "both"
            chosen = own if trained and own is not None else network
            variant = "" if trained else inputs
            row = {
                "group": f"{network.backbone} x4, Urban100",
                "model": seen,
                "inputs": inputs,
                "selectors": "trained" if trained else "fitted",
                "dataset": "Urban100",
                **_ours(bench, chosen, "Urban100", variant=variant),
            }
            found, _ = bench.measure(Request(bench.subject(chosen, variant=variant), "Urban100"))
            if found is not None and full is not None and inputs != "both":
                row.update(_against(found, full))
            rows.append(row)
    if not rows:
        rows = [{"model": seen, "status": "not trained"} for seen in _SEEN.values()]
    columns = (
        Column("model", "Selectors see"),
        Column("fqr", "FQR"),
        Column("psnr_db", "PSNR dB", 3),
        Column("ssim", "SSIM", 4),
        Column("against_both_db", "dB over both", 3),
        Column("interval_db", "95 % interval"),
        Column("selectors", "Selectors"),
        Column("network", "Network"),
        Column("schedule", "Schedule"),
        Column("status", "Status"),
    )
    differences = [TRAINING_DATA, TILES, "Selectors are fitted to measured errors, not trained end to end."]
    return Table("B1", "What the bit selectors see", columns, rows, notes, differences)


def _against(found: Evaluation, other: Evaluation) -> dict[str, Any]:
    difference = compare(found.rows, other.rows)
    return {
        "against_both_db": difference.mean,
        "interval_db": f"{difference.low:+.3f} to {difference.high:+.3f}",
    }


def _ours(bench: Bench, network: Network | None, data: str, *, variant: str = "") -> dict[str, Any]:
    """Our half of a row."""
    if network is None:
        return {"status": "not trained"}
    found, status = bench.measure(Request(bench.subject(network, variant=variant), data))
    return {**network.facts(), **figures_of(found), "status": status}


def _difference(value: float | None, base: float | None, method: str) -> float | None:
    return None if value is None or base is None or method == "FP32" else value - base


def _called(data: str) -> str:
    return data if data in DATA_SETS else f"folder {Path(data).name}"


def _schedules(rows: Iterable[dict[str, Any]]) -> list[str]:
    used = {str(row["network"]): str(row["schedule"]) for row in rows if "network" in row}
    if not used:
        return []
    return ["Schedules: " + "; ".join(f"{name}: {schedule}" for name, schedule in sorted(used.items())) + "."]


def _conversions(bench: Bench, rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the networks of a table were quantized otherwise than in the paper."""
    used = {row.get("network") for row in rows}
    result = []
    for network in bench.networks:
        c = network.conversion
        if network.name not in used or not c:
            continue
        facts = [
            "8-bit weights per output channel" if c.get("per_channel_weights") else "",
            f"channel scales range^{c['channel_power']}" if c.get("channel_power") else "",
            "integer edges" if c.get("edges") == "integer" else "",
            "unsigned codes after ReLU" if c.get("unsigned") else "",
        ]
        if any(facts):
            result.append(f"{network.name}: {', '.join(f for f in facts if f)}.")
    return result
