"""Data sets to measure on: what they are, where they are found, and their picture pairs.

Only high-resolution pictures are stored; the low-resolution ones are made by MATLAB's bicubic
(`cadyq.functional.resize`), which reproduces the released files bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError, DataError
from cadyq.functional.resize import Border, downscale, mod_crop
from cadyq.io.images import SUFFIXES, read_image

__all__ = [
    "DATA_SETS",
    "ROOT_VARIABLE",
    "DataSet",
    "Pair",
    "data_root",
    "find_pictures",
    "list_pictures",
    "load_pairs",
]

ROOT_VARIABLE = "CADYQ_DATA"
"""Environment variable that names the folder of all data sets."""


@dataclass(frozen=True)
class DataSet:
    """A named set of high-resolution pictures.

    Attributes:
        n_pictures: how many there are; a mean over fewer is not the set's figure.
        description: what it is, in one sentence.
        folders: other names under which its folder is known.
        is_benchmark: False for a stand-in of ours, which published figures must not be compared with.
    """

    n_pictures: int
    description: str
    folders: tuple[str, ...] = ()
    is_benchmark: bool = True


DATA_SETS = {
    "Set5": DataSet(5, "Five small classics (Bevilacqua et al., BMVC 2012)."),
    "Set14": DataSet(14, "Fourteen small classics (Zeyde et al., 2010)."),
    "Urban100": DataSet(100, "Facades and other man-made patterns (Huang et al., CVPR 2015)."),
    "Large2K": DataSet(6, "Photos of about 1920x1200; stands in for Test2K.", is_benchmark=False),
    "Large4K": DataSet(4, "Photos of 3840x2160; stands in for Test4K.", is_benchmark=False),
    "DIV2K": DataSet(100, "DIV2K's validation photos 0801-0900 (CVPRW 2017).", ("DIV2K_valid_HR",)),
    "Test2K": DataSet(100, "DIV8K 1201-1300 shrunk to 2K (ClassSR, CVPR 2021).", ("test2K", "test2k")),
    "Test4K": DataSet(100, "DIV8K 1301-1400 shrunk to 4K (ClassSR, CVPR 2021).", ("test4K", "test4k")),
}
"""The data sets known by name."""


class Pair(NamedTuple):
    """A picture to measure on.

    Attributes:
        name: the file's name without its suffix.
        hr: the original, cropped to a multiple of the scale, uint8 RGB ``(scale * h, scale * w, 3)``.
        lr: the network's input, uint8 RGB ``(h, w, 3)``.
    """

    name: str
    hr: NDArray[np.uint8]
    lr: NDArray[np.uint8]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of all data sets: ``root``, else the environment variable CADYQ_DATA.

    Raises `DataError` if neither is given or the folder does not exist.
    """
    given = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not given:
        raise DataError(
            f"no data folder is given; pass root=, or set the environment variable {ROOT_VARIABLE}"
        )
    if not Path(given).is_dir():
        origin = "root" if root is not None else ROOT_VARIABLE
        raise DataError(f"{origin} is {os.fspath(given)!r}, expected an existing folder")
    return Path(given)


def list_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the picture files (by suffix, not hidden) directly in a folder, sorted by name."""
    return sorted(
        path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."
    )


def find_pictures(source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the picture files of a data set, sorted by name.

    Args:
        source: a name out of `DATA_SETS`, or any folder of pictures. A named set is looked for in
            ``ROOT/eval/NAME``, ``ROOT/benchmark/NAME`` and ``ROOT/NAME``, and in a folder ``HR``, ``HR/X4`` or
            ``HR/x4`` therein (ClassSR's layout of Test2K and Test4K).
        root: the folder of all data sets, see `data_root`; not needed for a folder of pictures.

    Raises:
        DataError: if the set is unknown, not found, empty, or has not the number of pictures it should have.
    """
    name = os.fspath(source)
    known = DATA_SETS.get(name)
    if known is None:
        if not Path(name).is_dir():
            raise DataError(f"source is {name!r}, expected a folder of pictures or one of {list(DATA_SETS)}")
        pictures = list_pictures(name)
        if not pictures:
            raise DataError(f"{name} holds no pictures, expected files with one of {list(SUFFIXES)}")
        return pictures
    base = data_root(root)
    names = (name, *known.folders)
    homes = [base / room / folder for room in ("eval", "benchmark", ".") for folder in names]
    candidates = [home / room for room in ("HR", "HR/X4", "HR/x4") for home in homes] + homes
    found = (list_pictures(folder) for folder in candidates if folder.is_dir())
    pictures = next(filter(None, found), [])
    if not pictures:
        raise DataError(f"{name} was not found in {base}, expected pictures in eval/{name} or {name}")
    if len(pictures) != known.n_pictures:
        raise DataError(
            f"{pictures[0].parent} holds {len(pictures)} pictures, expected {known.n_pictures} for {name}; "
            "to measure on a part of it, pass that folder itself under another name"
        )
    return pictures


def load_pairs(
    source: str | os.PathLike[str],
    scale: int,
    border: Border = "symmetric",
    root: str | os.PathLike[str] | None = None,
) -> Iterator[Pair]:
    """Iterate over the pairs of a data set, one picture in memory at a time.

    Args:
        source: a name out of `DATA_SETS`, or any folder of pictures; see `find_pictures`.
        scale: the factor between the two pictures, 2 or more; alpha is ignored.
        border: how the picture is continued when it is made smaller; see `imresize`.
        root: the folder of all data sets; see `data_root`.

    Raises:
        ArgumentError: for an impossible scale or border (at once).
        DataError: as `find_pictures` does (at once).
        ImageError: if a picture cannot be read (when it is reached).
    """
    if scale < 2:
        raise ArgumentError("scale", scale, "an integer of at least 2")
    if border not in get_args(Border):
        raise ArgumentError("border", border, f"one of {get_args(Border)}")
    pictures = find_pictures(source, root)
    return (_pair(path, scale, border) for path in pictures)


def _pair(path: Path, scale: int, border: Border) -> Pair:
    hr = mod_crop(read_image(path).pixels, scale)
    return Pair(path.stem, hr, downscale(hr, scale, border))
