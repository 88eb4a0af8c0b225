"""A quantized model file -> the integer engine's plan beside it, which needs no torch to be run."""

from __future__ import annotations

import os

from cadyq.backbones import build_backbone
from cadyq.errors import CadyqError
from cadyq.io.models import load_model
from cadyq.io.plans import save_plan
from cadyq.io.shipped import plan_beside
from cadyq.lowering import lower

__all__ = ["remove_plan", "write_plan"]


def remove_plan(model: str | os.PathLike[str]) -> None:
    """Remove the plan beside a model file, if there is one: before another network takes the file's name."""
    plan_beside(model).unlink(missing_ok=True)


def write_plan(model: str | os.PathLike[str]) -> str:
    """Write ``NAME.plan.safetensors`` beside the model file ``NAME.safetensors``, in place of an earlier one.

    Returns:
        Why there is no plan (the model then runs on torch), or an empty string.

    Raises:
        CheckpointError: the model file cannot be read, or the plan not be written.
    """
    remove_plan(model)
    loaded = load_model(model)
    network = loaded.network
    if loaded.quantization is None:
        return "a float network has no integer form"
    try:
        plan = lower(network, loaded.quantization)
    except CadyqError as error:
        return str(error)
    parameters = build_backbone(network.name, **network.config).n_parameters()
    save_plan(
        plan_beside(model),
        plan,
        loaded.metadata,
        parameters=parameters,
        radius=network.radius,
        exit_rule=loaded.exit_rule,
    )
    return ""
