"""A run's checkpoints: everything that decides how it goes on, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadyq.errors import CadyqError, CheckpointError
from cadyq.io.files import replacing
from cadyq.training.recipe import Recipe

__all__ = ["Position", "load_state", "save_state"]


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: updates done.
        running: running mean of L1, gray levels; NaN before the first step.
        seconds: time spent on steps, over all sessions.
        average: moving average of the weights by name.
        best: weights with the best validation so far, and ``best_psnr``, ``best_fqr`` what it said.
    """

    step: int
    running: float
    seconds: float
    average: dict[str, Tensor]
    best: dict[str, Tensor] | None = None
    best_psnr: float = float("nan")
    best_fqr: float = float("nan")


def _path(run: Path, age: int) -> Path:
    return run / (f"state.{age}.pt" if age else "state.pt")


def save_state(run: Path, recipe: Recipe, state: dict[str, Any], keep: int = 2) -> None:
    """Write ``run/state.pt``; the ``keep - 1`` before it stay as ``state.1.pt`` and so on."""
    record = {"recipe": json.dumps(dataclasses.asdict(recipe)), **state}
    newest = _path(run, 0)
    with replacing(newest) as temporary:
        torch.save(record, temporary)
        # Renamed only when the new one lies complete beside them: at every moment a readable one is there.
        for age in range(keep - 1, 0, -1):
            younger = _path(run, age - 1)
            if younger.exists():
                os.replace(younger, _path(run, age))


def load_state(run: Path, recipe: Recipe, device: str = "cpu") -> dict[str, Any] | None:
    """The newest readable checkpoint of a run, or ``None`` if it has none yet.

    Raises:
        CheckpointError: the run has another recipe, or checkpoints of which none can be read.
    """
    found = [path for path in (_path(run, age) for age in range(10)) if path.exists()]
    failure: Exception | None = None
    for path in found:
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            recorded = _recipe(state)
        except Exception as error:
            failure = error
            continue
        if recorded != recipe:
            raise CheckpointError(
                f"{run} holds a run with another recipe ({_difference(recorded, recipe)}); name another folder "
                "or delete this one"
            )
        return state
    if failure is not None:
        raise CheckpointError(
            f"{found[0]} cannot be read ({failure}); delete the folder to start again"
        ) from failure
    return None


def _recipe(state: dict[str, Any]) -> Recipe:
    """The recipe of a checkpoint; an older one lacks newer fields, which have their defaults."""
    values = json.loads(state["recipe"])
    values["decay_epochs"] = tuple(values.get("decay_epochs", ()))
    try:
        return Recipe(**values)
    except (TypeError, CadyqError) as error:
        raise CheckpointError(f"its recipe is not one of this version: {error}") from error


def _difference(a: Recipe, b: Recipe) -> str:
    fields = [f.name for f in dataclasses.fields(Recipe)]
    return ", ".join(
        f"{n}: {getattr(a, n)}, not {getattr(b, n)}" for n in fields if getattr(a, n) != getattr(b, n)
    )
