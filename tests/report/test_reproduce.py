"""Tables fill themselves from the networks there are, invent nothing, and do not change from run to run."""

import csv
import json

import pytest

from cadyq.errors import ArgumentError
from cadyq.report.bench import Bench
from cadyq.report.lab import Lab
from cadyq.report.reproduce import REPORTS, reproduce

TIMELESS = [name for name in REPORTS if name != "S8"]
NUMBERS = ("fqr", "psnr_db", "ssim", "latency_ms")


@pytest.fixture(scope="module")
def results(folder_of_networks, data_root, tmp_path_factory):
    """Everything but timings, made once."""
    from cadyq.report.networks import scan

    folder = tmp_path_factory.mktemp("reproduced")
    lab = Lab(folder / ".measured", root=str(data_root), quick=True, threads=1)
    bench = Bench(scan([folder_of_networks], shipped=False), lab, folder, (folder_of_networks,))
    tables = reproduce(TIMELESS, bench)
    return folder, {table.name: table for table in tables}


def rows_of(table, **wanted):
    return [row for row in table.rows if all(row.get(k) == v for k, v in wanted.items())]


def test_a_trained_network_fills_its_rows_and_no_other(results):
    _, tables = results
    s1 = tables["S1"]
    linq = rows_of(s1, model="EDSR-baseline-LinQ")
    assert [row["status"] for row in linq] == ["measured", "measured", "left out by --quick"]
    assert {row["network"] for row in linq} == {"edsr-linq"}
    for row in s1.rows:
        if row["status"] == "not trained":
            assert not [key for key in NUMBERS if key in row]
        assert row["source"] == "CADyQ supplement, table S1"
    filled = [row for row in s1.rows if row["status"] == "measured"]
    assert s1.measured == len(filled) == 4  # EDSR's LinQ and SRResNet's float network, two sets each
    assert rows_of(s1, model="SRResNet-LinQ-CADyQ")[0]["status"] == "not trained"


def test_stand_ins_are_named(results):
    _, tables = results
    groups = {row["group"] for row in tables["S1"].rows}
    assert any("Large2K of ours: not comparable" in group for group in groups)
    assert all("Test" not in str(row["dataset"]) for row in tables["S1"].rows)


def test_candidates(results):
    _, tables = results
    carn = {row["model"]: row for row in tables["S4"].rows if "CARN" in row["group"]}
    assert carn["{4, 8}"]["network"] == "carn-cadyq-48"
    assert carn["{4, 6, 8}"]["network"] == "carn-cadyq"
    assert carn["{2, 4, 6, 8}"]["status"] == "not trained"
    assert carn["{4, 8}"]["published_fqr"] == 5.02


def test_patch_sizes_are_checked_against_the_claim(results):
    _, tables = results
    text = " ".join(tables["S5"].notes)
    assert "larger patches vary less" in text
    assert "carn-cadyq, overlap not counted" in text
    assert [row["step"] for row in tables["S5"].rows[:3]] == [186, 90, 42]


def test_costs_are_within_half_a_percent(results):
    _, tables = results
    whole = [row for row in tables["S7"].rows if row["group"] == "Full image" and "off_percent" in row]
    assert len(whole) == 6
    assert max(abs(row["off_percent"]) for row in whole) < 0.5
    for row in whole:
        assert row["params_k"] == pytest.approx(row["published_params_k"], abs=0.06)


def test_files(results):
    folder, tables = results
    for name, table in tables.items():
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["quick"] is True
        assert record["commit"]
        assert record["rows_total"] == len(table.rows)
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(table.rows)
        assert rows[0]["commit"] == record["commit"]
        assert (folder / f"{name}.md").read_text().startswith(f"# {name}: ")
        for figure in table.figures:
            assert (folder / figure).stat().st_size > 1000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tables"]["S1"].startswith("4 of 36 rows filled by a trained network")
    page = (folder / "index.html").read_text()
    assert "quick" in page
    assert page.count("<section") == len(tables)


def test_equal_to_the_last_digit_without_the_store(results, folder_of_networks, data_root, tmp_path):
    from cadyq.report.networks import scan

    folder, _ = results
    lab = Lab(None, root=str(data_root), quick=True, threads=2)
    bench = Bench(scan([folder_of_networks], shipped=False), lab, tmp_path, (folder_of_networks,))
    reproduce(["S1", "figS3", "S7"], bench)
    for name in ("S1.json", "S1.csv", "S1.md", "S7.json", "figS3.json", "figS3.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_nothing_is_measured_twice(bench, monkeypatch):
    import cadyq.report.lab as module

    said = []
    reproduce(["S1"], bench, said.append)
    assert "4 measurements" in said[0]
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: pytest.fail("measured again"))
    again = Bench(
        bench.networks, Lab(bench.lab.store, root=bench.lab.root, quick=True), bench.folder, bench.models
    )
    reproduce(["S1"], again, said.append)
    assert "measured before" in said[2]


def test_overhead_is_measured_with_the_engine(bench, monkeypatch):
    import cadyq.report.costs as module

    monkeypatch.setattr(module, "UHD", (48, 64))
    table = module.s8(bench)
    ours = [row for row in table.rows if row["group"].startswith("srresnet")]
    assert [row["row"] for row in ours] == ["(a)", "(b)", "(c)", "(d)"]
    assert [row["fqr"] for row in ours[:3]] == [8, 8, 8]
    assert ours[3]["fqr"] < 8
    assert ours[0]["bitops_g"] <= ours[1]["bitops_g"] < ours[2]["bitops_g"]
    assert ours[3]["bitops_g"] < ours[2]["bitops_g"]
    assert all(row["latency_ms"] > 0 for row in ours)
    assert any("overhead overcome (srresnet)" in note for note in table.notes)
    carn = [row for row in table.rows if row["group"].startswith("CARN")]
    assert {row["status"] for row in carn} == {"measured"}
    linq = next(n for n in bench.networks if n.name == "edsr-linq")
    assert "edges 'float'" in module._overhead(bench, linq, None, 1)[2]
    assert carn[0]["published_latency_ms"] == 216.0


def test_without_data_or_networks(tmp_path, folder_of_networks):
    lab = Lab(None, root=str(tmp_path), quick=True)
    tables = reproduce(["S1", "S5", "S6", "S7", "figS1", "figS3", "B1"], Bench([], lab, tmp_path))
    assert all(table.measured == 0 for table in tables)
    assert tables[3].counted == 12
    from cadyq.report.networks import scan

    some = Bench(scan([folder_of_networks], shipped=False), lab, tmp_path)
    (table,) = reproduce(["S1"], some)
    assert rows_of(table, model="EDSR-baseline-LinQ")[0]["status"] == "no data: Urban100 was not found"


def test_unknown_name(bench, raises_clearly):
    raises_clearly(ArgumentError, lambda: reproduce(["S9"], bench), "S9", "S1", "all")
