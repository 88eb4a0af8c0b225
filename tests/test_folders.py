"""Folder jobs: which pictures, where to, what is skipped, what a failure stops, and what a kill leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cadyq
from cadyq.errors import ArgumentError, ImageError
from cadyq.folders import Job, check_targets, find_jobs, run_jobs
from cadyq.io.files import replacing


class _Upper:
    """Work without pictures: the target is the source's text in capitals."""

    def __init__(self, job, settings):
        self._job, self.settings = job, settings

    def run(self, progress, ready):
        text = self._job.source.read_text()
        if "bad" in text:
            raise ImageError(f"{self._job.source} is bad")
        progress(1, 2)
        try:
            with replacing(self._job.target, ready) as temporary:
                temporary.write_text(text.upper())
        except OSError as error:
            raise ImageError("cannot be written") from error
        return {"width": 1}


@pytest.fixture
def tree(tmp_path):
    """Pictures in a tree, and what is none."""
    for name in (
        "b.jpg",
        "a.png",
        "sub/c.TIF",
        "sub/deep/d.webp",
        ".hidden.png",
        ".cache/e.png",
        "notes.txt",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "in"


@pytest.fixture
def run(tree):
    """Run a job over the tree: (outcome, events without progress)."""

    def call(output, settings="s", **options):
        events = []
        jobs = find_jobs([tree], output, lambda source: ".png", recursive=True)
        outcome = run_jobs(jobs, output, lambda job: _Upper(job, {"v": settings}), events.append, **options)
        return outcome, [e for e in events if e["event"] != "progress"]

    return call


def _names(jobs, tree, output):
    return [(str(j.source.relative_to(tree)), str(j.target.relative_to(output))) for j in jobs]


def test_find_jobs(tree):
    output = tree / "out"
    flat = [("a.png", "a.png"), ("b.jpg", "b.png")]
    deep = [*flat, ("sub/c.TIF", "sub/c.png"), ("sub/deep/d.webp", "sub/deep/d.png")]

    def found(*inputs, recursive=False):
        return _names(find_jobs(inputs, output, lambda source: ".png", recursive), tree, output)

    assert found(tree) == flat
    assert found(tree, recursive=True) == deep
    output.mkdir()
    (output / "old.png").touch()
    assert found(tree, recursive=True) == deep
    assert found(str(tree / "*.jpg")) == [("b.jpg", "b.png")]
    assert found(str(tree / "**" / "*.[Tw]*")) == [
        d for d in deep if d[0] in ("sub/c.TIF", "sub/deep/d.webp")
    ]
    assert found(tree / "b.jpg", tree / "a.png") == flat[::-1]
    for nothing in (tree.parent, str(tree / "*.gif")):
        with pytest.raises(ArgumentError, match="--recursive"):
            found(nothing)


def test_targets_must_differ_from_each_other_and_from_all_sources(tree):
    with pytest.raises(ArgumentError, match="not both"):
        check_targets([Job(tree / "a.png", tree / "x.png"), Job(tree / "b.jpg", tree / "x.png")])
    (tree / "link.png").symlink_to(tree / "a.png")
    with pytest.raises(ArgumentError, match="not one of the inputs"):
        check_targets([Job(tree / "a.png", tree / "link.png")])


def test_done_is_skipped_and_changes_are_noticed(run, tree, tmp_path):
    output = tmp_path / "out"
    outcome, events = run(output)
    assert (outcome.done, outcome.skipped, outcome.exit_code) == (4, 0, 0)
    assert [e["event"] for e in events] == ["start", *["done"] * 4, "end"]
    assert (output / "sub" / "c.png").read_text() == "SUB/C.TIF"
    assert all(json.dumps(e) for e in events)
    outcome, events = run(output)
    assert (outcome.done, outcome.skipped) == (0, 4)
    assert events[-1]["n_skipped"] == 4
    (tree / "b.jpg").write_text("other")
    outcome, _ = run(output)
    assert (outcome.done, outcome.skipped) == (1, 3)
    assert (output / "b.png").read_text() == "OTHER"
    assert run(output, settings="new")[0].done == 4
    assert run(output, settings="new", overwrite=True)[0].done == 4


def test_a_foreign_file_is_left_alone_unless_told_otherwise(run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").write_text("mine")
    outcome, events = run(output)
    assert (outcome.done, outcome.failed) == (3, (2,))
    failed = next(e for e in events if e["event"] == "failed")
    assert "--overwrite" in failed["message"]
    assert (output / "a.png").read_text() == "mine"
    assert run(output, overwrite=True)[0].exit_code == 0
    assert (output / "a.png").read_text() == "A.PNG"


def test_a_bad_file_is_reported_and_the_rest_goes_on(run, tree, tmp_path):
    (tree / "a.png").write_text("bad")
    outcome, events = run(tmp_path / "out")
    assert (outcome.done, outcome.failed, outcome.exit_code) == (3, (3,), 3)
    assert [e["event"] for e in events][1] == "failed"
    assert events[-1]["exit_code"] == 3


def test_a_full_disk_stops_the_job_and_a_second_run_finishes_it(run, tmp_path, monkeypatch):
    output, calls, flush = tmp_path / "out", [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match="goes on from here"):
        run(output)
    monkeypatch.undo()
    left = sorted(p.name for p in output.rglob("*") if p.is_file())
    assert not [name for name in left if name.endswith(".tmp")]
    outcome, _ = run(output)
    assert outcome.skipped == len(left) - 1
    assert outcome.done == 4 - outcome.skipped > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run, tmp_path):
    output = tmp_path / "out"
    output.mkdir(mode=0o500)
    outcome, events = run(output)
    assert outcome.exit_code == 3
    assert "ermission denied" in events[1]["message"]


def test_time_left_is_told_from_the_first_part_on(tree, tmp_path):
    events = []
    jobs = find_jobs([tree], tmp_path / "out", lambda source: ".png")
    run_jobs(jobs, tmp_path / "out", lambda job: _Upper(job, {}), events.append)
    shares = [(e["index"], e["share"], e["eta_seconds"]) for e in events if e["event"] == "progress"]
    assert [s[:2] for s in shares] == [(1, 0.5), (2, 0.5)]
    assert all(0 <= s[2] < 60 for s in shares)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_jobs_lose_nothing():
    root = Path(__file__).parents[1]
    source = str(Path(cadyq.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, root / "scripts" / "kill_folder.py", "--kills", "5", "--pictures", "6"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills" in done.stdout
