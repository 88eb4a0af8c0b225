"""Training crops: which photos train, which validate, and random pairs of patches from them.

Layout: ``ROOT/train/manifest.csv`` with the columns ``file``, ``source`` and ``photo``, and the crops, all of
one size, where ``file`` says. Crops of one photo never part: the photo is assigned, not the crop.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from cadyq.data.sets import data_root
from cadyq.errors import ArgumentError, DataError
from cadyq.functional.resize import Border, downscale
from cadyq.io.files import replacing
from cadyq.io.images import read_image

__all__ = [
    "Crop",
    "CropArrays",
    "PairedCrops",
    "Place",
    "Split",
    "cache_key",
    "cached_arrays",
    "load_crops",
    "read_manifest",
    "read_split",
    "split_of",
]

Split: TypeAlias = Literal["train", "validation"]

_VALIDATION_SHARE = 0.08


class Crop(NamedTuple):
    """One line of the manifest: the file, relative to ``ROOT/train``, and the photo it was cut from."""

    file: str
    source: str
    photo: str


class Place(NamedTuple):
    """Where a patch lies: number of the crop, its top and left in low-resolution pixels, pose (0 to 7)."""

    crop: int
    top: int
    left: int
    pose: int


class CropArrays(NamedTuple):
    """Crops and their low-resolution versions, memory-mapped and read-only.

    Attributes:
        lr: uint8 RGB ``(N, h, w, 3)``.
        hr: uint8 RGB ``(N, H, W, 3)``, where ``H // scale == h``.
    """

    lr: NDArray[np.uint8]
    hr: NDArray[np.uint8]


def split_of(source: str, photo: str) -> Split:
    """Assign a photo by the SHA-256 of ``source/photo``: about 8 % validate, whatever others there are."""
    digest = hashlib.sha256(f"{source}/{photo}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < _VALIDATION_SHARE else "train"


def read_split() -> dict[tuple[str, str], Split]:
    """Return the committed assignment, ``split.csv``: (source, photo) to split, by the rule of `split_of`."""
    text = files("cadyq.data").joinpath("split.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {
        (row["source"], row["photo"]): "validation" if row["split"] == "validation" else "train"
        for row in rows
    }


def read_manifest(root: str | os.PathLike[str] | None = None) -> list[Crop]:
    """Return all training crops in the manifest's order.

    ``root`` is the folder of all data sets (`cadyq.data.sets.data_root`). Raises `DataError` if there is no
    manifest, or it lacks a column or has no lines.
    """
    path = data_root(root) / "train" / "manifest.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            crops = [Crop(row["file"], row["source"], row["photo"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected the list of training crops") from None
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a manifest, expected a CSV with {Crop._fields}: {error}") from None
    if not crops:
        raise DataError(f"{path} lists no crops")
    return crops


def load_crops(
    split: Split,
    scale: int,
    cache: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    border: Border = "symmetric",
    limit: int | None = None,
) -> CropArrays:
    """Return the crops of one split, decoded once into ``.npy`` files that are memory-mapped from then on.

    Args:
        split: "train" or "validation".
        scale: the factor between the pictures, 2 or more.
        cache: folder for the decoded crops (about 0.7 GB for 1,611 crops of 384x384); made if missing.
        root: the folder of all data sets, see `cadyq.data.sets.data_root`.
        border: how a crop is continued when it is made smaller.
        limit: take only the first so many crops.

    Raises:
        ArgumentError: for a wrong split, scale, border or limit.
        DataError: if crops are missing or differ in size, or the cache cannot be written.
        ImageError: if a crop cannot be read.
    """
    if split not in get_args(Split):
        raise ArgumentError("split", split, f"one of {get_args(Split)}")
    if scale < 2:
        raise ArgumentError("scale", scale, "an integer of at least 2")
    if border not in get_args(Border):
        raise ArgumentError("border", border, f"one of {get_args(Border)}")
    if limit is not None and limit < 1:
        raise ArgumentError("limit", limit, "a positive number of crops, or None")
    folder = data_root(root) / "train"
    assigned = read_split()
    crops = [
        crop
        for crop in read_manifest(root)
        if assigned.get((crop.source, crop.photo), split_of(crop.source, crop.photo)) == split
    ][:limit]
    if not crops:
        raise DataError(f"{folder} has no photos for {split}")
    paths = [folder / crop.file for crop in crops]
    key = cache_key(folder, paths)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        hr = cached_arrays(Path(cache) / f"hr-{key}.npy", len(paths), lambda i: read_image(paths[i]).pixels)
        lr_path = Path(cache) / f"lr-x{scale}-{border}-{key}.npy"
        lr = cached_arrays(lr_path, len(paths), lambda i: downscale(hr[i], scale, border))
    except OSError as error:
        raise DataError(f"the crops cannot be cached in {os.fspath(cache)}: {error}") from error
    return CropArrays(lr, hr)


class PairedCrops:
    """Draws batches of random patches, mirrored and rotated, from pairs of crops.

    The sequence depends on the seed alone and can be continued from a saved state.

    Args:
        crops: what to draw from; every crop is equally likely.
        patch: side of a patch, in low-resolution pixels.
        seed: of the drawing.
        augment: whether to mirror and rotate by multiples of 90 degrees (8 poses, equally likely).

    Raises:
        ArgumentError: if a patch does not fit a crop, or the crops' sizes are no multiple of each other.
    """

    def __init__(self, crops: CropArrays, patch: int, seed: int, augment: bool = True) -> None:
        (n_lr, height, width), (n_hr, full_height, full_width) = crops.lr.shape[:3], crops.hr.shape[:3]
        self.scale = full_height // height
        if n_lr != n_hr or (full_height // self.scale, full_width // self.scale) != (height, width):
            raise ArgumentError("crops", (crops.lr.shape, crops.hr.shape), "pairs that differ by one factor")
        if not 1 <= patch <= min(height, width):
            raise ArgumentError("patch", patch, f"1 to {min(height, width)} low-resolution pixels")
        self.crops, self.patch, self.augment = crops, patch, augment
        self._rng = np.random.default_rng(seed)

    def batch(self, n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw ``n`` pairs: uint8 RGB ``(n, patch, patch, 3)`` and ``(n, scale * patch, scale * patch, 3)``.

        Raises `ArgumentError` if ``n`` is not positive.
        """
        return self.cut(self.places(n))

    def places(self, n: int) -> list[Place]:
        """Draw where ``n`` patches lie. Raises `ArgumentError` if ``n`` is not positive."""
        if n < 1:
            raise ArgumentError("n", n, "a positive number of patches")
        n_crops, height, width, _ = self.crops.lr.shape
        which = self._rng.integers(n_crops, size=n)
        top = self._rng.integers(height - self.patch + 1, size=n)
        left = self._rng.integers(width - self.patch + 1, size=n)
        pose = self._rng.integers(8, size=n) if self.augment else np.zeros(n, np.int64)
        columns = (which.tolist(), top.tolist(), left.tolist(), pose.tolist())
        return [Place(*place) for place in zip(*columns, strict=True)]

    def cut(self, places: Iterable[Place]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Cut the pairs that lie at ``places``; shapes as `batch`."""
        places = list(places)
        return self._cut(self.crops.lr, places, 1), self._cut(self.crops.hr, places, self.scale)

    def state(self) -> dict[str, Any]:
        """Return the drawing's state, as JSON can hold it."""
        return dict(self._rng.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises `ArgumentError` if it is none."""
        try:
            self._rng.bit_generator.state = state
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError("state", state, "what state() returned", str(error)) from None

    def _cut(self, images: NDArray[np.uint8], places: Iterable[Place], factor: int) -> NDArray[np.uint8]:
        side = self.patch * factor
        return np.stack(
            [
                posed(images[i, factor * y : factor * y + side, factor * x : factor * x + side], pose)
                for i, y, x, pose in places
            ]
        )


def posed(image: NDArray[np.uint8], pose: int) -> NDArray[np.uint8]:
    """Return one of the eight poses of an ``(H, W, C)`` picture: ``pose % 4`` turns, mirrored from 4 on."""
    return np.rot90(image[:, ::-1] if pose >= 4 else image, pose % 4)


def cache_key(folder: Path, paths: list[Path], *more: object) -> str:
    """Name a cache by what it holds: other crops, or files of another size or date, get another name."""
    try:
        facts = [
            (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
            for path in paths
        ]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is in the manifest, but does not exist") from None
    return hashlib.sha256(json.dumps([*facts, *more]).encode()).hexdigest()[:16]


def cached_arrays(path: Path, n: int, make: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Map ``path``, an array of ``n`` pictures of one size; fill it from ``make`` first if it is missing."""
    if not path.exists():
        first = make(0)
        with replacing(path) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, *first.shape))
            for i in range(n):
                picture = make(i)
                if picture.shape != first.shape:
                    raise DataError(f"crop {i} measures {picture.shape}, expected {first.shape} as the first")
                array[i] = picture
            array.flush()
            del array
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return mapped
