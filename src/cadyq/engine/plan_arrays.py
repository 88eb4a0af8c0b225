"""Plans to and from arrays and JSON. What is read is not trusted: `Plan.validate` has the last word."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from cadyq.engine import plan as p
from cadyq.errors import CheckpointError

__all__ = ["FORMAT_VERSION", "from_arrays", "to_arrays"]

FORMAT_VERSION = 3
STEPS: dict[str, type] = {
    "image_in": p.ImageIn,
    "layer": p.Layer,
    "block": p.Block,
    "image_out": p.ImageOut,
}
# Weights and tables are stored as zlib streams: six sevenths and a sixtieth of their size.
DEFLATED = ("int8", "uint8", "uint16")
LARGEST_BYTES = 1 << 26


def to_arrays(plan: p.Plan) -> tuple[dict[str, p.Array], dict[str, Any]]:
    """Arrays by name, and metadata that JSON can hold; `from_arrays` is the inverse."""
    arrays: dict[str, p.Array] = {}
    kinds = {kind: name for name, kind in STEPS.items()}
    steps = [{"kind": kinds[type(step)], **_dump(step, str(i), arrays)} for i, step in enumerate(plan.steps)]
    planes = [_dump(plane, "", arrays) for plane in plan.planes]
    meta = {"version": FORMAT_VERSION, "scale": plan.scale, "tile": plan.tile, "planes": planes}
    return arrays, {**meta, "steps": steps}


def from_arrays(arrays: Mapping[str, p.Array], meta: Mapping[str, Any]) -> p.Plan:
    """Build and validate a plan; raises `CheckpointError` for anything missing, foreign or malformed."""
    version = meta.get("version") if isinstance(meta, Mapping) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"plan: format version is {version!r}, this release reads {FORMAT_VERSION}; lower the model again"
        )
    try:
        planes = tuple(_load(p.Plane, found, "", arrays) for found in meta["planes"])
        steps = tuple(
            _load(STEPS[found["kind"]], found, str(i), arrays) for i, found in enumerate(meta["steps"])
        )
        plan = p.Plan(int(meta["scale"]), int(meta["tile"]), planes, steps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"plan: damaged ({type(error).__name__}: {error}); convert again") from error
    return plan.validate()


def _deflated(value: p.Array) -> p.Array:
    """Entries (little endian) as bytes of a zlib stream; of a table, which rises slowly, their differences."""
    stored = value.astype(value.dtype.newbyteorder("<"))
    if value.ndim == 1:
        stored[1:] = np.diff(stored)  # modulo the range
    return np.frombuffer(zlib.compress(stored.tobytes(), 9), np.uint8)


def _inflated(stream: p.Array, dtype: str, shape: list[int]) -> p.Array:
    """Inverse of `_deflated`; of a stream that holds more it reads no more than was announced."""
    if dtype not in DEFLATED:
        raise ValueError(f"stored type {dtype!r} is none of {DEFLATED}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not all(type(n) is int and n > 0 for n in shape) or size > LARGEST_BYTES:
        raise ValueError(
            f"stored shape is {shape}, expected positive numbers and at most {LARGEST_BYTES} bytes"
        )
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(stream.tobytes(), size + 1)
    except zlib.error as error:
        raise ValueError(f"an array is no zlib stream: {error}") from error
    if len(found) != size or not reader.eof or stream.dtype != np.uint8:
        raise ValueError(f"an array has {len(found)} bytes or no end, expected {size} bytes, deflated")
    value: p.Array = np.frombuffer(found, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
    return np.cumsum(value, dtype=dtype) if value.ndim == 1 else value


def _dump(value: Any, key: str, arrays: dict[str, p.Array]) -> Any:
    """JSON of a value; arrays go to ``arrays`` under their path, and leave True, or what a deflated one was."""
    if isinstance(value, np.ndarray):
        if value.dtype.name not in DEFLATED:
            arrays[key] = value
            return True
        arrays[key] = _deflated(value)
        return {"dtype": value.dtype.name, "shape": list(value.shape)}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _dump(getattr(value, f.name), f"{key}.{f.name}", arrays) for f in fields}
    if isinstance(value, tuple):
        return [_dump(item, f"{key}.{i}", arrays) for i, item in enumerate(value)]
    return value


def _load(kind: Any, found: Any, key: str, arrays: Mapping[str, p.Array]) -> Any:
    """Inverse of `_dump` for the annotated type ``kind``."""
    if typing.get_origin(kind) is np.ndarray:
        return arrays[key] if found is True else _inflated(arrays[key], found["dtype"], found["shape"])
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: _load(hints[name], found[name], f"{key}.{name}", arrays) for name in names})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if found is None else _load(inner[0], found, key, arrays)
    if origin is tuple:
        if not isinstance(found, list):
            raise TypeError(f"{key} is no list")
        return tuple(_load(inner[0], item, f"{key}.{i}", arrays) for i, item in enumerate(found))
    if origin is Literal:
        if found not in inner:
            raise ValueError(f"{key} is none of {inner}")
        return found
    if kind is float and isinstance(found, int) and not isinstance(found, bool):
        return float(found)
    if type(found) is not kind:
        raise TypeError(f"{key} is no {kind.__name__}")
    return found
