"""What is to be done: which pictures, where to, with what settings. It travels to every worker."""

from __future__ import annotations

import glob
import hashlib
import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cadyq import __version__
from cadyq.errors import ArgumentError
from cadyq.folders import Job, check_targets, is_picture, pictures_in
from cadyq.io.stores import LocalStore, Store, UrlStore, is_url, open_store, url_parts
from cadyq.pictures import Wanted, job_settings

__all__ = ["Item", "Order", "digest_of", "find_items", "make_order"]


class Item(NamedTuple):
    """A picture and what it becomes, by their names in the folders of an `Order`."""

    source: str
    target: str


@dataclass(frozen=True)
class Order:
    """What all workers need to know besides the name of a picture.

    Attributes:
        source, output: folders, as paths or URLs that mean the same on every machine.
        wanted: what is asked for.
        settings: digest of all that decides about results, as of the machine that gives the order.
        overwrite: make everything anew, and replace whatever lies there.
        retries: how often an access to a file is tried again, and a picture whose worker died.
        version: of the package that gives the order.
    """

    source: str
    output: str
    wanted: Wanted
    settings: str
    overwrite: bool = False
    retries: int = 3
    version: str = __version__


def make_order(
    source: str, output: str, wanted: Wanted, *, overwrite: bool = False, retries: int = 3
) -> Order:
    """Check what can be checked before work begins, and put it into an `Order`.

    Args:
        source: the folder of `find_items`.
        output: path or URL of a folder; it is made if it is missing.
        wanted, overwrite, retries: as of `Order`.

    Raises:
        ArgumentError: a value cannot be right. CheckpointError: the model cannot be read.
        MissingExtraError: a URL needs what is not installed.
    """
    if not 0 <= retries <= 100:
        raise ArgumentError("retries", retries, "0 to 100")
    target = open_store(output)
    if isinstance(target, UrlStore):
        target.check_writable()
    elif isinstance(target, LocalStore):
        if target.folder.is_file():
            raise ArgumentError("output", output, "a folder, since there may be several pictures")
        # A worker on this machine may run in another folder.
        output = str(target.folder.absolute())
    return Order(source, output, wanted, digest_of(wanted), overwrite, retries)


def digest_of(wanted: Wanted) -> str:
    """Digest of all that decides about results on this machine."""
    return hashlib.sha256(json.dumps(job_settings(wanted), sort_keys=True).encode()).hexdigest()


def find_items(
    given: str, output: str, suffix: Callable[[Path], str], recursive: bool = False
) -> tuple[str, list[Item]]:
    """Pair every picture with the file it becomes; return the folder that sources are named in, and the pairs.

    Args:
        given: file, folder or pattern (``**`` is any depth), as a path or URL. Hidden files are left out.
        output: the folder to write to, as a path or URL; what lies in it is no input.
        suffix: the suffix of a source's output, such as ".png".
        recursive: also take folders inside folders; their tree is kept.

    Raises:
        ArgumentError: there is no picture, two would become one file, or one would replace an input.
        MissingExtraError: a URL needs what is not installed.
    """
    base, names = (_at_url if is_url(given) else _on_disk)(given, output, recursive)
    items = [
        Item(name, str(PurePosixPath(name).parent / f"{PurePosixPath(name).stem}{suffix(Path(name))}"))
        for name in names
    ]
    _check(open_store(base), open_store(output), items)
    return base, items


def _on_disk(given: str, output: str, recursive: bool) -> tuple[str, list[str]]:
    store, target = open_store(given), open_store(output)
    assert isinstance(store, LocalStore)
    folder = target.folder if isinstance(target, LocalStore) else None
    found = pictures_in(str(store.folder), folder, recursive)
    base = found[0][1]
    return str(base.absolute()), [path.relative_to(base).as_posix() for path, _ in found]


def _at_url(given: str, output: str, recursive: bool) -> tuple[str, list[str]]:
    before, folder, behind = url_parts(given)
    pattern = ""
    # In the address of a web page a question mark means something else.
    if glob.has_magic(folder.replace("?", "") if folder.startswith("http") else folder):
        start = folder.rindex("/", 0, min(folder.find(sign) for sign in "*?[" if sign in folder))
        folder, pattern = folder[:start], folder[start + 1 :]
    store = UrlStore(f"{before}{folder}{behind}")
    try:
        names = store.find(pattern, recursive)
        if names == [""]:
            folder, names = posixpath.split(folder)[0], [posixpath.basename(folder)]
    except Exception as error:  # libraries behind URLs raise what they like
        why = f"{type(error).__name__}: {error}"
        raise ArgumentError("input", given, "a folder that can be listed", why) from error
    # What lies in the output is no input.
    other = url_parts(output)
    is_inside = (other[0], other[2]) == (before, behind) and other[1].startswith(f"{folder}/")
    inside = other[1].removeprefix(f"{folder}/") + "/" if is_inside else None
    pictures = [
        name
        for name in names
        if is_picture(posixpath.basename(name))
        and not any(part.startswith(".") for part in name.split("/"))
        and not (inside is not None and name.startswith(inside))
    ]
    if not pictures:
        remedy = "" if recursive or pattern else "pass --recursive if they lie in folders inside it"
        raise ArgumentError("input", given, "a folder or pattern that holds pictures", remedy)
    return f"{before}{folder}{behind}", pictures


def _check(source: Store, target: Store, items: Sequence[Item]) -> None:
    """Refuse two pictures that become one file, and one that would replace another: `ArgumentError`."""
    if isinstance(source, LocalStore) and isinstance(target, LocalStore):
        check_targets(Job(source.folder / item.source, target.folder / item.target) for item in items)
        return
    taken: dict[str, str] = {}
    sources = {source.shown(item.source) for item in items}
    for item in items:
        shown = target.shown(item.target)
        if item.target in taken:
            both = f"{source.shown(taken[item.target])} and {source.shown(item.source)}"
            raise ArgumentError("output", shown, f"one picture, not both {both}")
        if shown in sources:
            raise ArgumentError("output", shown, "not one of the inputs", "choose another output")
        taken[item.target] = item.source
