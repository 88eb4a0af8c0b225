"""Plans of the integer engine to and from files: the format of model files, with the plan in their record.

Reading one needs NumPy and safetensors only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
        metadata: the file's record (training, figures, license, conversion).
    """

    plan: Plan
    parameters: int
    radius: int
    exit_rule: ExitRule | None
    metadata: dict[str, Any]


def save_plan(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, Any],
    *,
    parameters: int,
    radius: int,
    exit_rule: ExitRule | None = None,
) -> None:
    """Write a plan; ``metadata`` is that of the model file it was lowered from."""
    arrays, meta = to_arrays(plan)
    record = dict(metadata.get("quantization", {}))
    record.pop("exit", None)
    record["plan"] = {"data": meta, "parameters": parameters, "radius": radius}
    if exit_rule is not None:
        record["exit"] = exit_rule.to_mapping()
    kept = {k: v for k, v in metadata.items() if k != "format_version"}
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
