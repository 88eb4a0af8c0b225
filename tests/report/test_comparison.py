"""The neutral comparison: what is on the front, what is timed, what is left out."""

from cadyq.report.comparison import comparison, pareto, subjects


def test_pareto():
    points = [(1, 10), (2, 12), (2, 11), (3, 12), (4, 15), (5, 14.9), (4, 15)]
    assert pareto(points) == [True, True, False, False, True, False, True]


def test_subjects(bench):
    labels = [label for label, _ in subjects(bench, "srresnet", 4)]
    assert labels[:3] == ["float", "PAMS 8", "CADyQ"]
    assert labels[3:] == [f"static {b}, CADyQ's weights" for b in (4, 6, 8)]
    assert [label for label, _ in subjects(bench, "edsr", 4)] == ["LinQ 8"]
    assert subjects(bench, "idn", 4) == []


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
