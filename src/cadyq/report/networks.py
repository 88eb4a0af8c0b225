"""Which networks there are, read from their own records: tables fill themselves from what lies in the folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cadyq.errors import ArgumentError
from cadyq.io.checkpoints import load_checkpoint
from cadyq.io.shipped import model_files, model_name, model_path, plan_path, shipped_models
from cadyq.upscale import load

__all__ = ["PAPER_STEPS", "Network", "find", "read_network", "scan"]

PAPER_STEPS = {"idn": 30_000, "edsr": 30_000, "srresnet": 30_000, "carn": 60_000}
"""Updates of the paper's schedule: 300 (CARN 600) epochs of 100, supplement C."""

# What the method of a network says whose cells can leave before the body; the paper has none such.
_EXITS = " + exit"

_STATIC = {"pams": "PAMS", "linq": "LinQ", "daq": "DAQ", "lsq": "LSQ"}
_USUAL_BITS = {"PAMS": (8,), "LinQ": (8,), "DAQ": (4,), "LSQ": (8,), "FQSR": (8,)}
_USUAL_CANDIDATES = (4, 6, 8)


@dataclass(frozen=True)
class Network:
    """A network file and what its record says.

    Attributes:
        name: the file's name without its suffix.
        path: the model file (the plan where there is nothing else).
        backbone: our name of the backbone.
        scale: enlargement factor.
        method: as the paper would call it: ``FP32``, ``PAMS``, ``DAQ``, ``FQSR``, ``CADyQ``, ``LinQ-CADyQ``,
            ``CADyQ{2;4;6;8}``, ...; with `` + exit`` behind it, if its cells can exit.
        bits: candidate bit-widths; (32,) in a float network.
        conversion: how it was quantized, empty for a float network.
        training: the record of its training.
    """

    name: str
    path: Path
    backbone: str
    scale: int
    method: str
    bits: tuple[int, ...]
    conversion: Mapping[str, Any] = field(repr=False)
    training: Mapping[str, Any] = field(repr=False)

    @cached_property
    def runtime(self) -> str:
        """``engine`` or ``torch``: what runs it in tiles."""
        model = load(self.path)
        return model.runtime("tiles", model.tile)

    @property
    def steps(self) -> int | None:
        """Updates of the weights in the last stage; None if not recorded."""
        steps = self.training.get("steps")
        return int(steps) if isinstance(steps, int | float) else None

    @property
    def schedule(self) -> str:
        """``full`` (at least the paper's updates), ``short (n updates)``, ``none``, or ``not recorded``."""
        stated = self.training.get("schedule")
        if stated in ("full", "short", "none"):
            return str(stated)
        if self.steps is None:
            return str(self.training.get("status", "not recorded")).split(":")[0]
        if self.steps == 0:
            return "none"
        return "full" if self.steps >= PAPER_STEPS[self.backbone] else f"short ({self.steps} updates)"

    @property
    def seed(self) -> int | None:
        """Seed of its training; None if not recorded."""
        seed = self.recipe.get("seed", self.training.get("seed"))
        return int(seed) if isinstance(seed, int) else None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe of its last stage, empty if not recorded."""
        recipe = self.training.get("recipe")
        return recipe if isinstance(recipe, Mapping) else {}

    @property
    def w_reg(self) -> float | None:
        """Weight of the bit loss at the start of its training; None if not recorded."""
        weight = self.recipe.get("w_reg", self.training.get("w_reg"))
        return float(weight) if isinstance(weight, int | float) and weight else None

    @property
    def degradation(self) -> str:
        """What its training pictures went through: ``bicubic`` unless the record or the name says otherwise."""
        is_photo = bool(self.recipe.get("degrade")) or "photo" in self.name
        return str(self.training.get("degradation", "photo" if is_photo else "bicubic"))

    def digest(self) -> str:
        """SHA-256 over its files: equal digests, equal results."""
        plan = plan_path(self.path)
        total = hashlib.sha256(self.path.read_bytes())
        if plan is not None and plan != self.path:
            total.update(plan.read_bytes())
        return total.hexdigest()

    def weights_digest(self) -> str:
        """SHA-256 over its arrays: what selectors were fitted for, however it is recorded or lowered."""
        arrays, _ = load_checkpoint(self.path)
        total = hashlib.sha256()
        for name in sorted(arrays):
            total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
            total.update(arrays[name].tobytes())
        return total.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a table says about it."""
        return {
            "network": self.name,
            "schedule": self.schedule,
            "runtime": self.runtime,
        }


def scan(folders: Iterable[str | os.PathLike[str]] = (), *, shipped: bool = True) -> list[Network]:
    """Networks that ship with the package, and those directly in the folders, sorted by name.

    Raises:
        ArgumentError: a folder does not exist. CheckpointError: a file is damaged.
    """
    paths = {name: model_path(name) for name in shipped_models()} if shipped else {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ArgumentError("models", os.fspath(folder), "a folder of model files")
        paths = {**model_files(folder), **paths}
    return [_read(name, paths[name]) for name in sorted(paths)]


def read_network(model: str | os.PathLike[str]) -> Network:
    """A shipped model by name, or a model file. Raises `ArgumentError` or `CheckpointError`."""
    path = model_path(model)
    return _read(model_name(path), path)


def find(
    networks: Iterable[Network], backbone: str, scale: int, method: str, *, executed: bool = False
) -> Network | None:
    """The best trained network of this kind, or None: most updates first, then by name.

    Networks that were trained for anything but bicubic LR pictures are no answer. With ``executed`` one that the
    integer engine runs goes before the others.
    """
    fitting = [
        n
        for n in networks
        if (n.backbone, n.scale, n.method) == (backbone, scale, method) and n.degradation == "bicubic"
    ]

    def rank(n: Network) -> tuple[bool, int, str]:
        return executed and n.runtime != "engine", -(n.steps or 0), n.name

    return min(fitting, key=rank, default=None)


def _read(name: str, path: Path) -> Network:
    _, metadata = load_checkpoint(path)
    quantization = metadata.get("quantization", {})
    conversion = quantization.get("conversion", {})
    bits = tuple(conversion.get("bits", (32,)))
    return Network(
        name,
        path,
        metadata["backbone"],
        int(metadata["scale"]),
        _method(conversion) + (_EXITS if "exit" in quantization else ""),
        bits if conversion.get("dynamic") else bits[-1:],
        conversion,
        metadata.get("training", {}),
    )


def _method(conversion: Mapping[str, Any]) -> str:
    if not conversion:
        return "FP32"
    family = "FQSR" if conversion.get("skips") else _STATIC[conversion["quantizer"]]
    bits = tuple(conversion["bits"])
    if not conversion.get("dynamic"):
        return family if bits[-1:] == _USUAL_BITS[family] else f"{family} {bits[-1]}"
    name = "CADyQ" if family == "PAMS" else f"{family}-CADyQ"
    if bits != _USUAL_CANDIDATES:
        name += "{" + ";".join(map(str, bits)) + "}"
    inputs = conversion.get("selector_inputs", "both")
    return name if inputs == "both" else f"{name} [{inputs}]"
