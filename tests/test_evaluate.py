"""Figures of a data set, written once and compared pairwise."""

import csv
import dataclasses

import numpy as np
import pytest
from networks import scene
from PIL import Image

from cadyq.errors import ArgumentError, DataError
from cadyq.evaluate import Row, compare, evaluate, write_csv
from cadyq.functional.fidelity import psnr_y, ssim_y
from cadyq.functional.resize import downscale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, one whose sides are no multiples of 4."""
    root = tmp_path_factory.mktemp("pictures")
    for k, (height, width) in enumerate([(80, 96), (101, 67), (64, 64)]):
        Image.fromarray(scene(height, width, seed=k)).save(root / f"p{k}.png")
    return root


def test_rows_and_summary(models, folder):
    steps = []
    result = evaluate(models["srresnet"], folder, threads=1, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [row.name for row in result.rows] == ["p0", "p1", "p2"]
    hr = scene(101, 67, seed=1)[:100, :64]
    found = models["srresnet"].upscale(downscale(hr, 4))
    row = result.rows[1]
    assert row.psnr_db == psnr_y(found.pixels, hr, 4)
    assert row.ssim == ssim_y(found.pixels, hr, 4)
    assert (row.fqr, row.fqr_area) == (found.fqr, found.fqr_area)
    assert row.bitops_g == found.bitops / 1e9
    summary = result.summary
    for name in ("psnr_db", "ssim", "fqr", "fqr_area", "bitops_g"):
        assert getattr(summary, name) == pytest.approx(np.mean([getattr(r, name) for r in result.rows]))
    assert summary.n_images == 3
    assert not summary.is_complete
    assert "symmetric" in summary.description
    assert result.to_mapping()["summary"]["dataset"] == str(folder)


def test_a_part_is_named_as_one(models, folder):
    result = evaluate(models["edsr"], folder, limit=2)
    assert len(result.rows) == 2
    assert "first 2 of 3" in result.summary.description


def test_benchmarks_and_stand_ins(models, tmp_path):
    for name, count in (("Set5", 5), ("Large4K", 4)):
        (tmp_path / "eval" / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(scene(32, 32, seed=k)).save(tmp_path / "eval" / name / f"{k}.png")
    assert evaluate(models["edsr"], "Set5", root=tmp_path).summary.is_complete
    assert not evaluate(models["edsr"], "Set5", root=tmp_path, limit=4).summary.is_complete
    stand_in = evaluate(models["edsr"], "Large4K", root=tmp_path).summary
    assert not stand_in.is_complete
    assert "Not a published benchmark" in stand_in.description


def test_tiny_pictures(models, tmp_path, raises_clearly):
    Image.fromarray(scene(16, 16)).save(tmp_path / "a.png")
    result = evaluate(models["edsr"], tmp_path)
    assert np.isnan(result.rows[0].ssim)
    assert result.to_mapping()["rows"][0]["ssim"] is None
    Image.fromarray(scene(8, 8)).save(tmp_path / "a.png")
    raises_clearly(DataError, lambda: evaluate(models["edsr"], tmp_path), "a measures", "4 pixels")


def test_csv(models, folder, tmp_path, raises_clearly):
    result = evaluate(models["edsr"], folder, limit=2)
    write_csv(tmp_path / "rows.csv", result)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["p0", "p1", "mean"]
    assert float(rows[0]["psnr_db"]) == result.rows[0].psnr_db
    assert float(rows[2]["fqr"]) == result.summary.fqr
    raises_clearly(DataError, lambda: write_csv(tmp_path / "no" / "rows.csv", result), "cannot be written")


def test_compare(models, folder, raises_clearly):
    rows = [Row(f"p{k}", 30 + k, 0.9, 5, 5, 1, 0, 0, 1) for k in range(8)]
    better = [dataclasses.replace(row, psnr_db=row.psnr_db + 0.1) for row in rows]
    found = compare(better, rows)
    assert found.mean == pytest.approx(0.1)
    assert found.low <= 0.1 + 1e-9
    assert found.high >= 0.1 - 1e-9
    assert found.n_images == 8
    assert compare(rows, rows, "fqr").mean == 0
    raises_clearly(ArgumentError, lambda: compare(rows, rows[1:]), "same pictures")
    raises_clearly(ArgumentError, lambda: compare(rows, rows, "name"), "figure")


def test_wrong_arguments(models, folder, raises_clearly):
    raises_clearly(ArgumentError, lambda: evaluate(models["edsr"], folder, scale=2), "scale", "4")
    raises_clearly(ArgumentError, lambda: evaluate(models["edsr"], folder, limit=0), "limit")
    raises_clearly(DataError, lambda: evaluate(models["edsr"], folder / "none"), "none")
