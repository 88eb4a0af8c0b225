"""Models inside the package, by name; a model may come with a plan of the integer engine beside it."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from cadyq.errors import ArgumentError

__all__ = [
    "MODEL_SUFFIX",
    "PLAN_SUFFIX",
    "default_model",
    "model_path",
    "plan_beside",
    "plan_path",
    "shipped_models",
    "shipped_scales",
]

MODEL_SUFFIX = ".safetensors"
PLAN_SUFFIX = ".plan.safetensors"
MODELS_VARIABLE = "CADYQ_MODELS"


def _folder() -> Path:
    return Path(str(files("cadyq").joinpath("models")))


def shipped_models() -> list[str]:
    """Names of the models inside the package, sorted."""
    names = {
        p.name.removesuffix(PLAN_SUFFIX).removesuffix(MODEL_SUFFIX)
        for p in _folder().glob(f"*{MODEL_SUFFIX}")
    }
    return sorted(names)


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
    fitting = [name for name in shipped_models() if f"x{scale}" in _parts(name)]
    if not fitting:
        shipped = ", ".join(shipped_models()) or "none"
        raise ArgumentError(
            "scale", scale, f"the scale of a shipped model ({shipped})", "or pass a model file"
        )

    sizes = {p.name: p.stat().st_size for p in _folder().glob(f"*{MODEL_SUFFIX}")}

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        parts, size = _parts(name), sizes.get(f"{name}{MODEL_SUFFIX}", 0)
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
    if name in shipped_models():
        return _folder() / f"{name}{MODEL_SUFFIX}"
    more = os.environ.get(MODELS_VARIABLE)
    if more and os.sep not in name and (path := Path(more) / f"{name}{MODEL_SUFFIX}").is_file():
        return path
    known = ", ".join(shipped_models()) or "none"
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
    if not path.name.endswith(PLAN_SUFFIX):
        path = plan_beside(path)
    return path if path.is_file() else None


def plan_beside(model: str | os.PathLike[str]) -> Path:
    """Where the plan of a model file lies, whether there is one or not."""
    path = Path(model)
    return path.with_name(path.name.removesuffix(MODEL_SUFFIX) + PLAN_SUFFIX)
