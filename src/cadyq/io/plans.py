"""Plans of the integer engine to and from files: the format of model files, with the plan in their record.

Reading one needs NumPy and safetensors only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cadyq.engine.plan import Plan
from cadyq.errors import CheckpointError
from cadyq.functional.exit import ExitRule
from cadyq.io.checkpoints import load_checkpoint, save_checkpoint

__all__ = ["LoadedPlan", "load_plan", "save_plan"]


@dataclass(frozen=True)
class LoadedPlan:
    """A plan and what its file says about it.

    Attributes:
        plan: the packed network.
        macs: multiply-accumulates per LR pixel of every site inside a block, in the plan's order.
        parameters: of the network that it was lowered from, without what quantisation added.
        radius: receptive radius in LR pixels.
        exit_rule: which cells leave before the body, or ``None``.
        metadata: the file's record (training, figures, license, conversion).
    """

    plan: Plan
    macs: tuple[float, ...]
    parameters: int
    radius: int
    exit_rule: ExitRule | None
    metadata: dict[str, Any]


def save_plan(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, Any],
    *,
    macs: tuple[float, ...],
    parameters: int,
    radius: int,
    exit_rule: ExitRule | None = None,
) -> None:
    """Write a plan; ``metadata`` is that of the model file it was lowered from."""
    arrays, meta = plan.to_arrays()
    record = dict(metadata.get("quantization", {}))
    record.pop("exit", None)
    record["plan"] = {"data": meta, "macs": list(macs), "parameters": parameters, "radius": radius}
    if exit_rule is not None:
        record["exit"] = exit_rule.to_mapping()
    kept = {k: v for k, v in metadata.items() if k != "format_version"}
    save_checkpoint(path, arrays, {**kept, "quantization": record})


def load_plan(path: str | os.PathLike[str]) -> LoadedPlan:
    """Read a plan file.

    Raises:
        CheckpointError: missing, damaged, of a newer format, or not a plan.
    """
    arrays, metadata = load_checkpoint(path)
    try:
        record = metadata["quantization"]
        found = record["plan"]
        plan = Plan.from_arrays(arrays, found["data"])
        macs = tuple(float(m) for m in found["macs"])
        rule = ExitRule.from_mapping(record["exit"]) if "exit" in record else None
        loaded = LoadedPlan(plan, macs, int(found["parameters"]), int(found["radius"]), rule, metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a plan of the integer engine ({error!r}); lower the model again"
        ) from error
    if len(macs) != len(plan.sites):
        raise CheckpointError(f"{path}: {len(macs)} costs for {len(plan.sites)} sites; lower the model again")
    return loaded
