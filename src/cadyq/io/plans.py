"""Plans of the integer engine to and from files: the format of model files, with the plan in their record.

Reading one needs NumPy and safetensors only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cadyq.engine.plan import Plan
from cadyq.engine.plan_arrays import from_arrays, to_arrays
from cadyq.errors import CheckpointError
from cadyq.functional.exit import ExitRule
from cadyq.io.checkpoints import load_checkpoint, save_checkpoint

__all__ = ["LoadedPlan", "load_plan", "save_plan"]


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and what its file says about it.

    Attributes:
        plan: the packed network.
        parameters: of the network that it was lowered from, without what quantisation added.
        radius: receptive radius in LR pixels.
        exit_rule: which cells leave before the body, or ``None``.
        metadata: the model file's record (training, figures, license, conversion).
    """

    plan: Plan
    parameters: int
    radius: int
    exit_rule: ExitRule | None
    metadata: dict[str, Any]


def save_plan(path: str | os.PathLike[str], loaded: LoadedPlan) -> None:
    """Write a plan, an existing one is replaced as a whole. Raises `CheckpointError` if it cannot be written."""
    arrays, meta = to_arrays(loaded.plan)
    record = dict(loaded.metadata.get("quantization", {}))
    record.pop("exit", None)
    record["plan"] = {"data": meta, "parameters": loaded.parameters, "radius": loaded.radius}
    if loaded.exit_rule is not None:
        record["exit"] = loaded.exit_rule.to_mapping()
    kept = {k: v for k, v in loaded.metadata.items() if k != "format_version"}
    save_checkpoint(path, arrays, {**kept, "quantization": record})


def load_plan(path: str | os.PathLike[str]) -> LoadedPlan:
    """Read a plan file.

    Raises:
        CheckpointError: missing, damaged, of another format, or not a plan.
    """
    arrays, metadata = load_checkpoint(path)
    try:
        record = metadata["quantization"]
        found = record["plan"]
        plan = from_arrays(arrays, found["data"])
        rule = ExitRule.from_mapping(record["exit"]) if "exit" in record else None
        return LoadedPlan(plan, int(found["parameters"]), int(found["radius"]), rule, metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a plan of the integer engine ({error!r}); lower the model again"
        ) from error
