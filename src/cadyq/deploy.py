"""A quantized network -> the integer engine's plan, in memory or beside the model file, where it needs no torch."""

from __future__ import annotations

import os

from cadyq.backbones import build_backbone
from cadyq.errors import CadyqError, UnsupportedError
from cadyq.io.models import LoadedModel, load_model
from cadyq.io.plans import LoadedPlan, save_plan
from cadyq.io.shipped import plan_beside
from cadyq.lowering import lower

__all__ = ["lowered", "write_plan"]


def lowered(loaded: LoadedModel) -> LoadedPlan:
    """The integer form of a loaded network.

    Raises:
        CadyqError: there is none; the message says why.
    """
    network = loaded.network
    if loaded.quantization is None:
        raise UnsupportedError("a float network has no integer form; quantize it first")
    plan = lower(network, loaded.quantization)
    parameters = build_backbone(network.name, **network.config).n_parameters()
    return LoadedPlan(plan, parameters, network.radius, loaded.exit_rule, loaded.metadata)


def write_plan(model: str | os.PathLike[str]) -> str:
    """Write ``NAME.plan.safetensors`` beside the model file ``NAME.safetensors``, in place of an earlier one.

    Returns:
        Why there is no plan (the model then runs on torch), or an empty string.

    Raises:
        CheckpointError: the model file cannot be read, or the plan not be written.
    """
    path = plan_beside(model)
    path.unlink(missing_ok=True)
    loaded = load_model(model)
    try:
        plan = lowered(loaded)
    except CadyqError as error:
        return str(error)
    save_plan(path, plan)
    return ""
