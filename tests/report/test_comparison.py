"""The neutral comparison: what is on the front, what is timed, what is left out."""

import dataclasses

import pytest

from cadyq.report.bench import Bench
from cadyq.report.comparison import comparison, contestants, pareto


def test_pareto():
    points = [(1, 10), (2, 12), (2, 11), (3, 12), (4, 15), (5, 14.9), (4, 15)]
    assert pareto(points) == [True, True, False, False, True, False, True]


def test_contestants(bench):
    labels = [each.label for each in contestants(bench, "srresnet", 4)]
    assert labels[:3] == ["float", "PAMS 8", "CADyQ"]
    assert labels[3:] == [f"static {b}, CADyQ's weights" for b in (4, 6, 8)]
    assert [each.label for each in contestants(bench, "edsr", 4)] == ["LinQ 8"]
    assert contestants(bench, "idn", 4) == []


def test_seeds_of_a_method_are_one_contestant(bench, monkeypatch):
    import cadyq.report.comparison as module

    monkeypatch.setattr(module, "_TIMED", (24, 32))
    # Another network in the role of another seed: what matters here is that its figures differ.
    static, dynamic = (bench.find("srresnet", 4, method) for method in ("PAMS", "CADyQ"))
    seeded = [
        dataclasses.replace(static, name=f"pams-seed{seed}", path=path, training={"steps": 7, "seed": seed})
        for seed, path in enumerate((static.path, static.path, dynamic.path))
    ]
    longer = dataclasses.replace(static, name="longer", training={"steps": 8, "seed": 0})
    others = [n for n in bench.networks if n.name in ("srresnet-float", "srresnet-cadyq")]
    bench = Bench([*others, *seeded, longer], bench.lab, bench.folder, bench.models)
    labels = [each.label for each in contestants(bench, "srresnet", 4)]
    assert labels[:4] == ["float", "PAMS 8 (longer)", "PAMS 8 (pams-seed0)", "CADyQ"]
    rows = {row["model"]: row for row in comparison(bench, "srresnet", 4, "Urban100").rows}
    merged, once, other = (rows[name] for name in ("PAMS 8 (pams-seed0)", "PAMS 8 (longer)", "CADyQ"))
    assert (merged["seeds"], once["seeds"], merged["n_images"]) == (3, 1, once["n_images"])
    assert merged["psnr_db"] == pytest.approx((2 * once["psnr_db"] + other["psnr_db"]) / 3)
    assert merged["against_db"] == pytest.approx((2 * once["against_db"] + other["against_db"]) / 3)
    spread = abs(once["psnr_db"] - other["psnr_db"]) / 3**0.5
    assert merged["deviation_db"] == pytest.approx(spread) and once["deviation_db"] is None


def test_table(bench, monkeypatch):
    import cadyq.report.comparison as module

    monkeypatch.setattr(module, "_TIMED", (24, 32))
    table = comparison(bench, "srresnet", 4, "Urban100")
    rows = {row["model"]: row for row in table.rows}
    assert table.measured == len(rows) == 6
    assert rows["float"]["runtime"] == "torch"
    assert rows["CADyQ"]["runtime"] == "engine"
    assert rows["CADyQ"]["low_db"] <= rows["CADyQ"]["against_db"] <= rows["CADyQ"]["high_db"]
    assert "against_db" not in rows["float"]
    assert rows["static 4, CADyQ's weights"]["fqr"] == 4
    assert all(row["ms"] > 0 for row in table.rows)
    for flag in ("front_bitops", "front_ms"):
        assert any(row[flag] for row in table.rows)
    for name in table.figures:
        assert (bench.folder / name).stat().st_size > 1000
