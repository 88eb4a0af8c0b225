"""A quantized network -> the integer engine: a plan in memory or beside the model file, or what runs it in tiles."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

import torch

from cadyq.backbones import Backbone, build_backbone
from cadyq.cells import Run
from cadyq.config import Quantization
from cadyq.engine.runtime import EngineRuntime
from cadyq.errors import CadyqError, UnsupportedError
from cadyq.io.models import LoadedModel, load_model
from cadyq.io.plans import LoadedPlan, save_plan
from cadyq.io.shipped import plan_beside
from cadyq.lowering import lower
from cadyq.quant.infer import run_tiles

__all__ = ["lowered", "runner", "write_plan"]


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


def runner(network: Backbone, quantization: Quantization) -> Run:
    """What runs a network as it is now: the engine, many times as fast as torch, where it can; on torch's threads."""
    with suppress(CadyqError):
        runtime = EngineRuntime(lower(network, quantization))
        if runtime.isa() != "reference":
            return partial(runtime.run_tiles, threads=torch.get_num_threads())
    return partial(run_tiles, network)


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
