"""Sweeps go on where they stopped, and share work."""

import csv

import pytest
from filelock import FileLock

from cadyq.cli import main
from cadyq.report.lab import Lab, Request
from cadyq.report.networks import read_network
from cadyq.report.sweep import CSV_COLUMNS, sweep
from cadyq.report.variants import Subject


@pytest.fixture
def requests(folder_of_networks):
    subject = Subject(read_network(folder_of_networks / "srresnet-cadyq.safetensors"))
    return [Request(subject, "Urban100", "tiles", 16, budget) for budget in (-1.0, 0.0, 1.0)]


def lab(data_root, folder):
    return Lab(folder / ".measured", root=str(data_root), quick=True, threads=1)


def rows_of(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_resumes(requests, data_root, tmp_path, monkeypatch):
    import cadyq.report.lab as module

    original, calls = module.evaluate, []

    def interrupted(*args, **options):
        calls.append(options["budget"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(requests, lab(data_root, tmp_path), tmp_path, lambda text: None)
    assert [row["budget"] for row in rows_of(tmp_path)] == ["-1.0"]
    assert sweep(requests, lab(data_root, tmp_path), tmp_path, lambda text: None) == 0
    assert calls == [-1.0, 0.0, 0.0, 1.0]
    rows = rows_of(tmp_path)
    assert [row["budget"] for row in rows] == ["-1.0", "0.0", "1.0"]
    assert tuple(rows[0]) == CSV_COLUMNS
    assert float(rows[0]["fqr"]) < float(rows[2]["fqr"])
    assert "first 3 of 100" in rows[0]["description"]


def test_leaves_what_another_process_measures(requests, data_root, tmp_path):
    mine = lab(data_root, tmp_path)
    (tmp_path / ".measured").mkdir()
    with FileLock(tmp_path / ".measured" / f"{mine.key(requests[1])}.lock"):
        assert sweep(requests, mine, tmp_path, lambda text: None) == 1
    assert [row["budget"] for row in rows_of(tmp_path)] == ["-1.0", "1.0"]


def test_side_by_side(folder_of_networks, data_root, tmp_path, capsys):
    model = str(folder_of_networks / "srresnet-cadyq.safetensors")
    words = ["sweep", model, "--budgets", "-1", "1", "--tiles", "16", "24", "--quick", "--threads", "1"]
    assert main([*words, "--data", str(data_root), "-o", str(tmp_path / "s"), "--jobs", "2"]) == 0
    assert "4 of 4 points" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "s")) == 4
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 1000
    assert not list((tmp_path / "s").rglob("*.tmp"))
