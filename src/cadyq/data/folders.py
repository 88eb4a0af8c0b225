"""Any folder of pictures as training data: crops of one size, and their low-resolution versions.

The low-resolution picture is made from the whole picture by our exact bicubic, and cut where the crop is cut, so that
a crop's border is no border of the picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadyq.data.crops import CropArrays, Split, cache_key, cached_arrays, load_crops, split_of
from cadyq.data.sets import data_root, list_pictures
from cadyq.errors import ArgumentError, DataError
from cadyq.functional.resize import downscale, mod_crop
from cadyq.io.files import replacing
from cadyq.io.images import read_image

__all__ = ["load_folder", "load_training"]

DIV2K_FOLDERS: dict[Split, str] = {"train": "DIV2K_train_HR", "validation": "DIV2K_valid_HR"}


def load_training(
    source: str,
    split: Split,
    scale: int,
    cache: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
) -> CropArrays:
    """Training or validation crops of a source.

    Args:
        source: ``crops`` (`load_crops`), ``DIV2K`` (its folders ``DIV2K_train_HR`` and ``DIV2K_valid_HR`` beneath
            ``root``), or a folder of pictures, which is split by picture.
        split: "train" or "validation".
        scale: 2 or more.
        cache: folder for decoded crops.
        root: folder of all data sets, see `cadyq.data.sets.data_root`; not needed for a folder of pictures.

    Raises:
        ArgumentError, DataError, ImageError: as `load_crops` and `load_folder`.
    """
    if source == "crops":
        return load_crops(split, scale, cache, root)
    if source == "DIV2K":
        folder = data_root(root) / DIV2K_FOLDERS[split]
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist; fetch it with: cadyq download DIV2K {data_root(root)}")
        return load_folder(folder, scale, cache)
    return load_folder(source, scale, cache, split)


def load_folder(
    folder: str | os.PathLike[str],
    scale: int,
    cache: str | os.PathLike[str],
    split: Split | None = None,
    side: int = 384,
) -> CropArrays:
    """Crops of all pictures of a folder, decoded once into ``.npy`` files that are memory-mapped from then on.

    Args:
        folder: pictures in any format that `read_image` takes; alpha is ignored.
        scale: 2 or more; the low-resolution crops measure ``side // scale``.
        cache: folder for the decoded crops (0.44 MB each).
        split: take only the pictures of this split (about 8 % validate, at least one); all if ``None``.
        side: of the crops, rounded down to a multiple of ``scale``. They cover a picture; the last ones overlap
            their neighbours. Smaller pictures are left out.

    Raises:
        ArgumentError: for an impossible scale or side.
        DataError: no folder, no picture that is large enough, or an unwritable cache.
        ImageError: a picture cannot be read.
    """
    if scale < 2:
        raise ArgumentError("scale", scale, "an integer of at least 2")
    side = side // scale * scale
    if side < scale:
        raise ArgumentError("side", side, f"at least the scale, {scale}")
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path} does not exist, expected a folder of pictures")
    pictures = list_pictures(path)
    if split is not None:
        pictures = [p for p, s in zip(pictures, _assigned(path.name, pictures), strict=True) if s == split]
    if not pictures:
        raise DataError(f"{path} holds no pictures for {split or 'training'}; two are the least")
    name = cache_key(path, pictures, side)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        index = _index(Path(cache) / f"index-{name}.npy", pictures, side)
        hr = _filled(Path(cache) / f"hr-{name}.npy", pictures, index, side, 1)
        lr = _filled(Path(cache) / f"lr-x{scale}-symmetric-{name}.npy", pictures, index, side, scale)
    except OSError as error:
        raise DataError(f"the crops cannot be cached in {os.fspath(cache)}: {error}") from error
    return CropArrays(lr, hr)


def _assigned(source: str, pictures: list[Path]) -> list[Split]:
    """Split of every picture, by name. Few pictures may all hash to training: then the first one validates."""
    splits = [split_of(source, p.stem) for p in pictures]
    if len(splits) > 1 and "validation" not in splits:
        splits[0] = "validation"
    return splits


def _index(path: Path, pictures: list[Path], side: int) -> NDArray[np.int64]:
    """(N, 3): number of the picture, top and left of each crop; kept, because finding it reads every picture."""

    def rows() -> Iterator[tuple[int, int, int]]:
        for i, picture in enumerate(pictures):
            height, width = read_image(picture).pixels.shape[:2]
            for top in _starts(height, side):
                yield from ((i, top, left) for left in _starts(width, side))

    if not path.exists():
        found = np.array(list(rows()), np.int64).reshape(-1, 3)
        if not len(found):
            raise DataError(f"{pictures[0].parent} is of no use: every picture is smaller than {side}x{side}")
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, found)
    result: NDArray[np.int64] = np.load(path)
    return result


def _starts(length: int, side: int) -> list[int]:
    """Where crops begin along an axis so that they cover it, on multiples of 12 (every scale up to 4)."""
    if length < side:
        return []
    last = (length - side) // 12 * 12
    return sorted({*range(0, last + 1, side // 12 * 12 or 12), last})


def _filled(
    path: Path, pictures: list[Path], index: NDArray[np.int64], side: int, scale: int
) -> NDArray[np.uint8]:
    held: tuple[int, NDArray[np.uint8]] | None = None

    def make(n: int) -> NDArray[np.uint8]:
        nonlocal held
        i, top, left = index[n].tolist()
        if held is None or held[0] != i:
            pixels = read_image(pictures[i]).pixels
            held = (i, pixels if scale == 1 else downscale(mod_crop(pixels, scale), scale))
        part = slice(top // scale, (top + side) // scale), slice(left // scale, (left + side) // scale)
        return held[1][part]

    return cached_arrays(path, len(index), make)
