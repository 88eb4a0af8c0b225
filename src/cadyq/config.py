"""Settings as frozen dataclasses, to and from plain dictionaries and TOML. An unknown key is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cadyq.errors import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

__all__ = ["Quantization", "from_mapping", "load_toml", "to_mapping"]

Config = TypeVar("Config")

QuantizerName = Literal["pams", "linq", "daq", "lsq"]


@dataclass(frozen=True)
class Quantization:
    """How a float network is quantised.

    Attributes:
        quantizer: activation quantiser of the body: ``pams``, ``linq``, ``daq`` or ``lsq``.
        bits: candidate bit-widths of the body, ascending; 2 to 8, and 0 for skipping a block.
        dynamic: choose among the candidates per patch or tile (CADyQ); otherwise the largest is used.
        weight_bits: bit-width of the weights.
        per_channel_weights: one weight range per output channel, instead of one per tensor.
        unsigned: unsigned codes where a feature cannot be negative.
        channel_power: p of the per-channel scales range^p folded into the weights; 0 is one range per layer.
        edges: ``float`` or ``integer`` (8-bit head, last body convolution, upsampler and tail).
        skips: quantise shortcuts as well (FQSR).
        stream_bits: 16 stores the residual stream and hidden features on 16-bit grids, 0 keeps them float.
        selector_inputs: what selectors see: ``both``, ``gradient``, ``channel``, ``layer``, ``gradient+layer``.
        log_features: selectors take standardised logarithms of their inputs.
        gradient_gain: factor on the gradient where ``log_features`` is off.
        tile: side of the decision tiles at inference, in LR pixels.
    """

    quantizer: QuantizerName = "pams"
    bits: tuple[int, ...] = (8,)
    dynamic: bool = False
    weight_bits: int = 8
    per_channel_weights: bool = True
    unsigned: bool = True
    channel_power: float = 0.0
    edges: Literal["float", "integer"] = "float"
    skips: bool = False
    stream_bits: int = 0
    selector_inputs: Literal["both", "gradient", "channel", "layer", "gradient+layer"] = "both"
    log_features: bool = True
    gradient_gain: float = 1.0
    tile: int = 48

    def __post_init__(self) -> None:
        bits = tuple(self.bits)
        object.__setattr__(self, "bits", bits)
        if not bits or list(bits) != sorted(set(bits)) or bits[-1] == 0:
            raise ArgumentError("bits", bits, "ascending distinct bit-widths, at least one above 0")
        if any(b != 0 and not 2 <= b <= 8 for b in bits):
            raise ArgumentError("bits", bits, "bit-widths of 2 to 8, or 0 to skip a block")
        if 0 in bits and not self.dynamic:
            raise ArgumentError(
                "bits", bits, "no 0 in a static network", "set dynamic = true or remove the 0"
            )
        if not 2 <= self.weight_bits <= 8:
            raise ArgumentError("weight_bits", self.weight_bits, "2 to 8")
        if self.stream_bits not in (0, 16):
            raise ArgumentError("stream_bits", self.stream_bits, "0 (float) or 16")
        if not 0 <= self.channel_power <= 1:
            raise ArgumentError("channel_power", self.channel_power, "0 to 1")
        if self.channel_power and self.quantizer == "daq":
            raise ArgumentError(
                "channel_power", self.channel_power, "0 with daq", "daq scales every channel itself"
            )
        if self.tile < 8:
            raise ArgumentError("tile", self.tile, "at least 8 LR pixels")


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain dictionary of a configuration, fit for JSON and TOML."""
    result = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in result.items()}


def from_mapping(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Configuration of ``kind`` from a mapping.

    Raises:
        ArgumentError: an unknown key, or a value the configuration refuses.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ArgumentError(
                "key", key, f"one of {', '.join(known)}", f"remove it from the {kind.__name__} table"
            )
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**arguments)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Tables of a TOML file.

    Raises:
        ArgumentError: missing or malformed file.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ArgumentError("config", str(path), "an existing TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError("config", str(path), "a valid TOML file", str(error)) from error
