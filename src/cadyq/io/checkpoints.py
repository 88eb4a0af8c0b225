"""Model files: safetensors with one JSON record, checked by a SHA-256 over everything; compressed by xz if wanted.

Layout: an ordinary safetensors file whose header has a single metadata entry, ``cadyq``. It is a JSON object
with ``metadata`` (the caller's, see `save_checkpoint`, plus ``format_version``) and ``sha256``, a digest of
the metadata and of every tensor's name, type, shape and bytes. Equal content gives equal bytes. Nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cadyq.errors import ArgumentError, CheckpointError
from cadyq.io.files import write_atomic

__all__ = ["FORMAT_VERSION", "METADATA_KEYS", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1
"""Version of the layout that this package writes, and the newest that it reads."""

METADATA_KEYS = {
    "backbone": "name of the network, str; required",
    "scale": "upscaling factor, int; required",
    "quantization": "quantizer, candidate bits, edges, grids: whatever rebuilds the network",
    "training": "record of the training: recipe, data, seed, steps, commit",
    "figures": "what was measured with it, and on what",
    "license": "SPDX identifier of the weights' license",
}
"""Keys that the metadata may have, and what they mean."""

_ENTRY = "cadyq"
_INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_DTYPES = (*_INTEGERS, "float16", "float32", "float64")
_XZ_START = b"\xfd7zXZ\0"
_XZ_MEMORY = 128 << 20
_LARGEST_BYTES = 1 << 30  # decompressed
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
) -> None:
    """Write a model file; an existing one is replaced as a whole.

    Args:
        path: where to, customarily ``*.safetensors``; compressed, if it ends with ``.xz``.
        tensors: arrays of any shape, integer, bool or float of 16 to 64 bits.
        metadata: `METADATA_KEYS`, values of any JSON type; "backbone" and "scale" are required.
            ``format_version`` is added.

    Raises:
        ArgumentError: for another dtype, or metadata that JSON cannot hold or `METADATA_KEYS` does not list.
        CheckpointError: if the file cannot be written.
    """
    arrays = {name: _checked(name, tensors[name]) for name in sorted(tensors)}
    record = _record(metadata)
    entry = {"metadata": record, "sha256": _digest(arrays, record)}
    # The library keeps its own entries in no fixed order: with a single one the bytes are reproducible.
    content = save_safetensors(arrays, metadata={_ENTRY: _canonical(entry)})
    if Path(path).suffix == ".xz":
        content = lzma.compress(content)
    try:
        write_atomic(Path(path), content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a model file written by `save_checkpoint`.

    Returns:
        The tensors by name, and the metadata including ``format_version``.

    Raises:
        CheckpointError: if the file is missing, foreign (a pickle, say), damaged, or of a newer format.
    """
    content = _read_bytes(Path(path))
    # A safetensors file begins with the length of its header, which may look like a pickle's first bytes.
    if content.startswith(_PICKLE_STARTS) and content[8:9] != b"{":
        raise CheckpointError(
            f"{path} is a pickle (.pth, .pt, .pkl), which can run code when it is read; expected "
            "safetensors; use the importer of foreign checkpoints"
        )
    try:
        entry = _header_entry(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path} is not a checkpoint of this package, or its header is damaged; "
            f'expected safetensors with a "{_ENTRY}" record'
        ) from None
    metadata = entry["metadata"]
    version = metadata.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this package reads up to {FORMAT_VERSION}; upgrade cadyq"
        )
    try:
        tensors: dict[str, NDArray[Any]] = load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from None
    if _digest(tensors, metadata) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256; fetch it again")
    return tensors, metadata


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, expected a checkpoint file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise CheckpointError(f"{path} is empty, expected a checkpoint file")
    return _decompressed(path, content) if content.startswith(_XZ_START) else content


def _decompressed(path: Path, content: bytes) -> bytes:
    try:
        xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        plain = xz.decompress(content, max_length=_LARGEST_BYTES)
    except lzma.LZMAError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if xz.unused_data:
        raise CheckpointError(
            f"{path} is damaged: {len(xz.unused_data)} bytes behind its end; fetch it again"
        )
    if not xz.eof:
        what = "is cut off" if xz.needs_input else f"holds more than {_LARGEST_BYTES:,} bytes"
        raise CheckpointError(f"{path} {what}; fetch it again")
    return plain


def _header_entry(content: bytes) -> dict[str, Any]:
    """Read our record without touching the tensors, so that a newer format is recognized as such."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError("header is cut off")
    entry = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_ENTRY])
    if not isinstance(entry["metadata"], dict) or not isinstance(entry["sha256"], str):
        raise TypeError("not our record")
    return dict(entry)


def _checked(name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    array = np.asarray(tensor)
    if array.dtype.name not in _DTYPES:
        raise ArgumentError(f"tensors[{name!r}].dtype", array.dtype.name, f"one of {_DTYPES}")
    # The library writes the buffer as it lies in memory: strides and foreign byte order would be lost.
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    record = {**metadata, "format_version": FORMAT_VERSION}
    unknown = sorted(set(record) - set(METADATA_KEYS) - {"format_version"})
    if unknown:
        raise ArgumentError("metadata", unknown, f"keys out of {sorted(METADATA_KEYS)}")
    for key, kind in (("backbone", str), ("scale", int)):
        if not isinstance(record.get(key), kind):
            raise ArgumentError(f"metadata[{key!r}]", record.get(key), METADATA_KEYS[key])
    try:
        result: dict[str, Any] = json.loads(_canonical(record))
    except (TypeError, ValueError) as error:
        raise ArgumentError("metadata", record, "what JSON can hold", str(error)) from None
    return result


def _canonical(value: Any) -> str:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> str:
    # Names and types are hashed as JSON, in which lengths are unambiguous, before the bytes they describe.
    layout = [[name, tensor.dtype.name, list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    digest = hashlib.sha256(_canonical([layout, metadata]).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.tobytes())
    return digest.hexdigest()
