"""An exported file against the engine: pixels and decisions, run by onnxruntime."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import MAX_TILE, Plan
from cadyq.engine.run import Engine
from cadyq.errors import ArgumentError, DataError
from cadyq.export.graph import need_onnx

__all__ = ["Agreement", "compare", "open_session", "run_session"]


@dataclass(frozen=True)
class Agreement:
    """How far a file agrees with the engine, over all pictures.

    Attributes:
        n_images: pictures compared, each as a whole (at most 256x256 LR pixels of it).
        max_difference: largest difference of a pixel, in grey levels of 8 bits.
        share_different: share of pixels that differ, in [0, 1].
        psnr_db: PSNR of all pixels, the engine's taken for true; infinite if equal.
        decisions_equal: share of equal bit decisions, in [0, 1]; 1 where nothing is chosen.
    """

    n_images: int
    max_difference: int
    share_different: float
    psnr_db: float
    decisions_equal: float


def open_session(path: str | os.PathLike[str], threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        MissingExtraError: onnxruntime is missing. DataError: the file cannot be run.
    """
    (runtime,) = need_onnx("onnxruntime")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base
        raise DataError(f"{path} cannot be run by onnxruntime: {error}") from error


def run_session(session: Any, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Upscale uint8 ``(n, h, w, 3)``; also the chosen bits ``(n, sites)``, if the file chooses any."""
    lr = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    sr, *bits = session.run(None, {"lr": lr})
    pixels = np.floor(sr.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels, bits[0] if bits else None


def compare(
    path: str | os.PathLike[str],
    plan: Plan,
    pictures: Iterable[NDArray[np.uint8]],
    threads: int | None = None,
) -> Agreement:
    """Compare a file with the engine on LR pictures, uint8 ``(h, w, 3)``, one decision per site and picture.

    Raises:
        ArgumentError: no pictures. DataError, MissingExtraError: as `open_session` does.
    """
    session = open_session(path, threads)
    engine = Engine(dataclasses.replace(plan, tile=MAX_TILE), threads)
    n, largest, different, squares, values = 0, 0, 0, 0.0, 0
    equal: list[float] = []
    for whole in pictures:
        picture = np.ascontiguousarray(whole[:MAX_TILE, :MAX_TILE])
        pixels, bits = run_session(session, picture[None])
        ours = engine.upscale(picture)
        error = np.abs(pixels[0].astype(np.int64) - ours.image)
        n, largest = n + 1, max(largest, int(error.max()))
        different, values = different + int((error > 0).sum()), values + error.size
        squares += float(np.square(error).sum())
        equal.append(1.0 if bits is None else float((bits[0] == ours.bits[0, 0]).mean()))
    if not n:
        raise ArgumentError("pictures", "empty", "at least one LR picture")
    psnr = 10 * np.log10(255**2 * values / squares) if squares else np.inf
    return Agreement(n, largest, different / values, float(psnr), float(np.mean(equal)))
