"""Models inside the package, by name; a model may come with a plan of the integer engine beside it."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from cadyq.errors import ArgumentError

__all__ = [
    "MODEL_SUFFIXES",
    "default_model",
    "model_files",
    "model_name",
    "model_path",
    "plan_beside",
    "plan_path",
    "shipped_models",
    "shipped_scales",
]

MODEL_SUFFIXES = (".safetensors", ".safetensors.xz")
"""Of a model file, plain and compressed."""

_PLAN_SUFFIX = ".plan.safetensors"
MODELS_VARIABLE = "CADYQ_MODELS"


def _folder() -> Path:
    return Path(str(files("cadyq").joinpath("models")))


def model_name(path: str | os.PathLike[str]) -> str:
    """Name of a model file, or of its plan: that of the file without the suffix."""
    name = Path(path).name
    for suffix in (_PLAN_SUFFIX, *MODEL_SUFFIXES):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def model_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Model files directly in a folder, by name, sorted; plain before compressed, a plan where there is no other."""
    found: dict[str, Path] = {}
    for suffix in (*MODEL_SUFFIXES, _PLAN_SUFFIX):
        for path in Path(folder).glob(f"*{suffix}"):
            if suffix == _PLAN_SUFFIX or not path.name.endswith(_PLAN_SUFFIX):
                found.setdefault(model_name(path), path)
    return dict(sorted(found.items()))


def shipped_models() -> list[str]:
    """Names of the models inside the package, sorted."""
    return list(model_files(_folder()))


def shipped_scales() -> list[int]:
    """Enlargement factors that shipped models have, ascending."""
    found = (re.fullmatch(r"x(\d+)", part) for name in shipped_models() for part in _parts(name))
    return sorted({int(match.group(1)) for match in found if match is not None})


def default_model(scale: int = 4, photo: bool = False) -> str:
    """Return the name of the shipped model for a scale: one whose cells exit first, then a content-aware one.

    Of several of a kind it is the largest: smaller ones are for those who ask for them by name.

    Args:
        scale: enlargement factor.
        photo: whether a model trained for compressed photos ("photo" in its name) is preferred; without it
            none of these is taken.

    Raises:
        ArgumentError: none is shipped for this scale.
    """
    shipped = model_files(_folder())
    fitting = [name for name in shipped if f"x{scale}" in _parts(name)]
    if not fitting:
        known = ", ".join(shipped) or "none"
        raise ArgumentError("scale", scale, f"the scale of a shipped model ({known})", "or pass a model file")

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        parts, size = _parts(name), shipped[name].stat().st_size
        return ("photo" in parts) != photo, "exit" not in parts, "cadyq" not in parts, -size, name

    return min(fitting, key=rank)


def _parts(name: str) -> list[str]:
    return re.split("[-_.]", name)


def model_path(model: str | os.PathLike[str]) -> Path:
    """Path of a file, of a shipped model's name, or of a name in the folder that ``CADYQ_MODELS`` names.

    Raises:
        ArgumentError: none of them.
    """
    path = Path(model)
    if path.is_file():
        return path
    name = os.fspath(model)
    shipped = model_files(_folder())
    if name in shipped:
        return shipped[name]
    more = os.environ.get(MODELS_VARIABLE)
    if more and (found := model_files(more).get(name)):
        return found
    known = ", ".join(shipped) or "none"
    raise ArgumentError(
        "model",
        name,
        f"a model file or one of the shipped models ({known})",
        f"for others by name set {MODELS_VARIABLE} to their folder",
    )


def plan_path(model: str | os.PathLike[str]) -> Path | None:
    """Path of the plan that belongs to a shipped model or to a model file; ``None`` if there is none."""
    path = Path(model)
    if not path.is_file():
        path = model_path(model)
    if not path.name.endswith(_PLAN_SUFFIX):
        path = plan_beside(path)
    return path if path.is_file() else None


def plan_beside(model: str | os.PathLike[str]) -> Path:
    """Where the plan of a model file lies, whether there is one or not."""
    return Path(model).with_name(model_name(model) + _PLAN_SUFFIX)
