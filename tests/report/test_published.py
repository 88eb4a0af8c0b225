"""Published figures: transcribed completely, with their sources, and not silently corrected."""

from cadyq.report import published


def test_quality_is_complete():
    rows = published.quality()
    counts = {table: len(published.quality(table)) for table in ("S1", "S2", "S3", "S4")}
    assert counts == {"S1": 36, "S2": 48, "S3": 2, "S4": 3}
    assert all(row.source for row in rows)
    one = next(
        r for r in rows if (r.table, r.backbone, r.method, r.dataset) == ("S2", "CARN", "CADyQ", "Test4K")
    )
    assert (one.fqr, one.psnr_db, one.ssim, one.scale) == (4.03, 34.25, 0.942, 2)
    assert one.source == "CADyQ supplement, table S2"


def test_cost_is_complete():
    counts = {table: len(published.cost(table)) for table in ("S3", "S5", "S7", "S8")}
    assert counts == {"S3": 3, "S5": 3, "S7": 18, "S8": 4}
    small = next(r for r in published.cost("S5") if "48" in r.setting)
    assert (small.grad_variance, small.psnr_db, small.bitops_g, small.latency_ms) == (2.53, 25.92, 3.12, None)


def test_misprints_stay_as_printed_and_are_named():
    wrong = next(
        r
        for r in published.quality("S1")
        if (r.backbone, r.method, r.dataset) == ("IDN", "LinQ-CADyQ", "Test2K")
    )
    assert wrong.psnr_db == 25.72
    assert "27.5" in " ".join(published.slips("S1"))
    for table in ("S2", "S3", "S4", "S5", "S7", "S8"):
        assert published.slips(table), table


def test_settings():
    rows = {row["setting"]: row for row in published.settings()}
    assert rows["epochs (100 iterations each)"]["CARN"] == "600"
    assert rows["bit selector initial learning rate"]["CARN"] == "1e-3"
    assert rows["bit loss weight step per epoch"]["IDN"] == "1e-6"
