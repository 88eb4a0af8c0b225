"""What is done already: one small file per finished picture, in ``.cadyq/`` of the output folder itself.

A journal of one file would need a lock, and there is none that holds across machines and object stores. So every
picture has a record of its own, which is written before the picture gets its name. Whatever lies under a final name
is therefore either described by its record or not this program's, whoever was killed at whatever moment. While a
new version replaces an old one, the record describes both.

Two jobs at once do the same work twice and put the same bytes. With different settings each file is whole and made
by one of the two; if its record tells of the other one, the next run does not know the file and leaves it alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cadyq.io.stores import Entry, Store

__all__ = ["Known", "Made", "described", "is_same", "read_records", "record_name", "write_records"]

_FOLDER = ".cadyq"


class Known(NamedTuple):
    """The content of a file: `Entry`, and its hash."""

    size: int
    stamp: str
    sha256: str


class Made(NamedTuple):
    """A result: from what it was made, with which settings, and what came out."""

    source: Known
    settings: str
    target: Known


def record_name(target: str) -> str:
    """Name of the record of a picture, in the same store."""
    return f"{_FOLDER}/{hashlib.blake2b(target.encode(), digest_size=16).hexdigest()}.json"


def read_records(store: Store, target: str) -> list[Made]:
    """What is recorded of a picture, the newest last; what cannot be understood counts as nothing."""
    try:
        found = json.loads(store.read(record_name(target)) or b"{}")
        entries = found["made"] if found.get("name") == target else ()
        return [_parsed(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def write_records(store: Store, target: str, made: Iterable[Made]) -> None:
    """Replace what is recorded of a picture."""
    entries = [
        {"source": m.source._asdict(), "settings": m.settings, "target": m.target._asdict()} for m in made
    ]
    store.write(record_name(target), json.dumps({"name": target, "made": entries}).encode())


def described(store: Store, target: str, found: Entry, made: Sequence[Made]) -> Made | None:
    """The newest record that describes the file that lies there; None where it is not this program's."""
    return next((m for m in reversed(made) if is_same(store, target, found, m.target)), None)


def is_same(store: Store, name: str, found: Entry, known: Known) -> bool:
    """Whether a file has a known content: by size and stamp at once, else by its hash (it may be a copy)."""
    if -1 not in (found.size, known.size) and found.size != known.size:
        return False
    return bool(found.stamp and found.stamp == known.stamp) or store.sha256(name) == known.sha256


def _parsed(entry: Any) -> Made:
    source, target = (
        Known(int(side["size"]), str(side["stamp"]), str(side["sha256"]))
        for side in (entry["source"], entry["target"])
    )
    return Made(source, str(entry["settings"]), target)
