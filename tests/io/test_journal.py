"""A journal tells its own outputs from all other files, whenever the process was killed."""

import os

import pytest

from cadyq.errors import ImageError
from cadyq.io.files import remove_leftovers, replacing
from cadyq.io.journal import JOURNAL_NAME, Journal


@pytest.fixture
def files(tmp_path):
    """A source, and a target in a folder of its own."""
    source, target = tmp_path / "a.jpg", tmp_path / "out" / "a.png"
    source.write_bytes(b"source")
    target.parent.mkdir()
    return source, target


def _make(source, target, settings="s", content=b"result"):
    with Journal(target.parent) as journal:
        ready = journal.recorder(source, target, settings)
        with replacing(target, ready) as temporary:
            temporary.write_bytes(content)


def _state(source, target, settings="s"):
    with Journal(target.parent) as journal:
        return journal.state(source, target, settings)


def test_states(files):
    source, target = files
    assert _state(*files) == "missing"
    assert not (target.parent / JOURNAL_NAME).exists()
    target.write_bytes(b"result")
    assert _state(*files) == "foreign"
    _make(*files)
    assert _state(*files) == "done"
    assert _state(*files, settings="other") == "stale"
    source.write_bytes(b"SOURCE")
    assert _state(*files) == "stale"
    target.write_bytes(b"edited")
    assert _state(*files) == "foreign"


def test_a_touched_or_copied_file_is_known_by_its_content(files):
    source, _target = files
    _make(*files)
    for path in files:
        os.utime(path, ns=(1, 1))
    assert _state(*files) == "done"
    source.write_bytes(b"sourcf")
    os.utime(source, ns=(1, 1))
    assert _state(*files) == "stale"


def test_the_line_is_written_before_the_name(files, monkeypatch):
    _source, target = files
    _make(*files, content=b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _make(*files, content=b"new")
    # The old file is there, and the newest line describes one that never got its name.
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert _state(*files) == "done"
    assert _state(*files, settings="other") == "stale"


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_line_costs_one_picture_only(files, cut):
    source, target = files
    second = target.with_name("b.png")
    _make(*files)
    _make(source, second)
    path = target.parent / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert _state(*files) == "done"
    if cut > 1:  # the first cut takes only the line's end
        assert _state(source, second) == "foreign"
    third = target.with_name("c.png")
    _make(source, third)
    assert _state(source, third) == "done"
    assert _state(*files) == "done"


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xff\xfe\x00", b"[1]\n{}\n7\n", b'{"name":1,"target":2}\n']
)
def test_any_other_content_is_no_entry(files, content):
    (files[1].parent / JOURNAL_NAME).write_bytes(content)
    files[1].write_bytes(b"result")
    assert _state(*files) == "foreign"
    _make(*files)
    assert _state(*files) == "done"


def test_a_full_disk_leaves_no_half_line(files, monkeypatch):
    source, target = files
    _make(*files)
    path = target.parent / JOURNAL_NAME
    before, write = path.read_bytes(), os.write

    def half(descriptor, line):
        if len(line) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, line[: len(line) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(ImageError, match="No space left"):
        _make(source, target.with_name("b.png"))
    assert path.read_bytes() == before
    assert not target.with_name("b.png").exists()


def test_one_process_at_a_time(files):
    pytest.importorskip("fcntl")
    _make(*files)
    with Journal(files[1].parent), pytest.raises(ImageError, match="another process"):
        _state(*files)


def test_leftovers_of_these_targets_are_removed(files):
    _, target = files
    other = target.with_name("other.png")
    contexts = [replacing(path) for path in (target, other)]
    names = [context.__enter__() for context in contexts]  # never left, as by a killed process
    for name in names:
        name.touch()
    assert remove_leftovers([target, target.parent / "none" / "x.png"]) == 1
    assert not names[0].exists()
    assert names[1].exists()
