"""Stages of a training, from a TOML file: float -> 8 bit -> CADyQ, each a model file that the next starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cadyq.backbones import BACKBONES, Backbone, build_backbone
from cadyq.cells import Run
from cadyq.config import Quantization, from_mapping, load_toml, to_mapping
from cadyq.data.crops import CropArrays
from cadyq.data.degrade import degrade
from cadyq.errors import ArgumentError, CheckpointError
from cadyq.io.models import load_model, save_model
from cadyq.quant.convert import calibrate, convert, observe, scale_clips
from cadyq.training.budget import budget_table, place_budget
from cadyq.training.device import Device
from cadyq.training.loop import Outcome, to_tensor, train
from cadyq.training.parallel import Workers
from cadyq.training.recipe import Recipe
from cadyq.training.supervise import fit_selectors, measure, reach
from cadyq.training.validate import Validation, validate
from cadyq.training.warmstart import copy_clips, float_copy, load_source, warm_start

if TYPE_CHECKING:
    from cadyq.training.board import Board

__all__ = ["Session", "Stage", "Training", "read_training", "recipe_names", "run_stage"]

_CALIBRATION_CROPS = 24
_PLACING_CROPS, _TABLE_CROPS = 64, 32
_FITTED_FQR = 5.0  # where fitted selectors are placed without a target
_BUDGET_TARGETS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0)


@dataclass(frozen=True)
class Stage:
    """One network to be trained.

    Attributes:
        name: of the stage and of its model file.
        recipe: schedule and losses.
        quantization: form of the network; ``None`` is float.
        init: stage of the same training, model file or foreign weights to start from; empty is random.
        teacher: stage or model file that teaches; empty is none.
        clips: how clips are first set: ``mse``, or ``max``, PAMS' mean of max|x|.
        fit_crops: crops on which selectors are fitted to measured errors after training; 0 leaves them as trained.
    """

    name: str
    recipe: Recipe
    quantization: Quantization | None = None
    init: str = ""
    teacher: str = ""
    clips: Literal["mse", "max"] = "mse"
    fit_crops: int = 0

    @property
    def is_dynamic(self) -> bool:
        return self.quantization is not None and self.quantization.dynamic


@dataclass(frozen=True)
class Training:
    """All stages of one network.

    Attributes:
        backbone: key in `cadyq.backbones.BACKBONES`; ``options`` are its arguments, ``scale`` among them.
        data: ``crops``, ``DIV2K`` or a folder of pictures.
        stages: in order.
    """

    backbone: str
    options: Mapping[str, Any]
    data: str
    stages: tuple[Stage, ...]

    @property
    def scale(self) -> int:
        return int(self.options["scale"])

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises `ArgumentError` if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ArgumentError("stage", name, f"one of {', '.join(s.name for s in self.stages)}")


def recipe_names() -> list[str]:
    """Recipes inside the package: ``edsr-x4`` (ours), ``paper/edsr-x4``, ..."""
    root = Path(str(files("cadyq").joinpath("recipes")))
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.toml"))


def read_training(config: str | Path) -> Training:
    """Read a TOML file, or a recipe of the package by name.

    Raises:
        ArgumentError: no such file or recipe, an unknown key, or an impossible value.
    """
    path = Path(config)
    if not path.is_file() and str(config) in recipe_names():
        path = Path(str(files("cadyq").joinpath("recipes", f"{config}.toml")))
    elif not path.is_file():
        raise ArgumentError("config", str(config), f"a TOML file or one of {', '.join(recipe_names())}")
    tables = load_toml(path)
    unknown = set(tables) - {"network", "data", "stages"}
    if unknown:
        raise ArgumentError("key", sorted(unknown)[0], "network, data or stages", f"remove it from {path}")
    network = dict(tables.get("network", {}))
    backbone = network.pop("backbone", None)
    if backbone not in BACKBONES or "scale" not in network:
        raise ArgumentError(
            "network", tables.get("network"), f"a backbone of {', '.join(BACKBONES)} and a scale"
        )
    stages = tuple(_stage(name, table) for name, table in tables.get("stages", {}).items())
    if not stages:
        raise ArgumentError("stages", {}, "at least one table [stages.NAME]")
    return Training(backbone, network, str(tables.get("data", {}).get("source", "crops")), stages)


def _stage(name: str, table: Mapping[str, Any]) -> Stage:
    values = dict(table)
    own = {key: values.pop(key) for key in ("init", "teacher", "clips", "fit_crops") if key in values}
    quantization = values.pop("quantization", None)
    if "epochs" in values:
        values["steps"] = int(values.pop("epochs")) * int(values.get("epoch", 100))
    if "steps" not in values:
        raise ArgumentError(f"stages.{name}", dict(table), "steps or epochs")
    if own.get("clips", "mse") not in ("mse", "max"):
        raise ArgumentError("clips", own["clips"], "mse or max")
    return Stage(
        name,
        from_mapping(Recipe, values),
        None if quantization is None else from_mapping(Quantization, quantization),
        **own,
    )


@dataclass
class Session:
    """What a run of stages has in common: folder, data, device, and how it is watched and stopped.

    Attributes:
        folder: model files ``STAGE.safetensors`` and, beneath ``STAGE/``, checkpoints.
        crops: training crops; ``validation``: those that choose the best checkpoint.
        runner: makes what runs a quantized network where selectors are fitted; None is torch.
    """

    folder: Path
    crops: CropArrays
    validation: CropArrays
    device: Device = field(default_factory=Device)
    workers: Workers = field(default_factory=Workers)
    stop: Callable[[], bool] = lambda: False
    log: Callable[[str], None] = print
    progress: Callable[[int, int], None] = lambda done, total: None
    board: Board | None = None
    save_every: int = 100
    runner: Callable[[Backbone, Quantization], Run] | None = None

    def model(self, name: str) -> Path:
        """Model file of a stage, or the file of that name."""
        path = self.folder / f"{name}.safetensors"
        return path if path.is_file() or not Path(name).is_file() else Path(name)


def run_stage(training: Training, stage: Stage, session: Session) -> Path | None:
    """Run a stage, from its last checkpoint if there is one, and write its model file.

    Returns:
        The model file, or ``None`` if the session was stopped before the stage was finished.

    Raises:
        ArgumentError: the stage that it starts from has not been run.
        CheckpointError: the folder holds results of another recipe.
    """
    result = session.folder / f"{stage.name}.safetensors"
    if result.is_file():
        _check_done(result, stage)
        return result
    network, teacher = _networks(training, stage, session)
    outcome = train(
        network,
        session.crops,
        stage.recipe,
        session.folder / stage.name,
        teacher=teacher,
        validation=_validation(session, stage.recipe),
        tile=_tile(stage),
        device=session.device,
        workers=session.workers,
        stop=session.stop,
        log=session.log,
        progress=session.progress,
        board=session.board,
        save_every=session.save_every,
    )
    if not outcome.finished:
        return None
    if session.workers.rank == 0:
        _finish(training, stage, session, outcome, result)
    session.workers.agree(True)  # the other processes wait for the file
    return result


def _finish(training: Training, stage: Stage, session: Session, outcome: Outcome, result: Path) -> None:
    """Place selectors and budgets of a trained network, measure it, and write its model file."""
    network, crops, recipe = outcome.network.cpu(), session.crops, stage.recipe
    tile = _tile(stage)
    record = _record(training, stage, crops) | {"steps": outcome.steps, "seconds": round(outcome.seconds)}
    budgets: list[tuple[float, float]] = []
    found = outcome.validation
    if stage.is_dynamic:
        target = recipe.target_fqr or (_FITTED_FQR if stage.fit_crops else 0.0)
        if stage.fit_crops:
            assert stage.quantization is not None
            run = session.runner and session.runner(network, stage.quantization)
            seen = measure(network, crops, n_crops=stage.fit_crops, tile=tile, run=run, log=session.log)
            fit_selectors(network, seen)
            reach(network, seen, target)
        if target:
            # Validation's crops choose, as they choose the checkpoint: training's may be of busier photos.
            record["shift"] = place_budget(
                network, session.validation, target, n_crops=_PLACING_CROPS, tile=tile
            )
            found = None
        budgets = budget_table(network, crops, _BUDGET_TARGETS, n_crops=_TABLE_CROPS, tile=tile)
    if found is None:
        found = validate(network, _validation(session, recipe), recipe.validation_crops, tile=tile)
    record["validation"] = dict(zip(Validation._fields, found, strict=True))
    save_model(result, network, stage.quantization, training=record, budgets=budgets)
    session.log(f"{stage.name}: {found.psnr_db:.3f} dB, FQR {found.fqr:.2f} on validation; {result}")


def _tile(stage: Stage) -> int:
    return 48 if stage.quantization is None else stage.quantization.tile


def _validation(session: Session, recipe: Recipe) -> CropArrays:
    """What chooses the best checkpoint: as damaged as what is trained on, always alike."""
    lr, hr = (a[: recipe.validation_crops] for a in session.validation)
    return CropArrays(degrade(lr, np.random.default_rng(recipe.seed)) if recipe.degrade else lr, hr)


def _networks(training: Training, stage: Stage, session: Session) -> tuple[Backbone, Backbone | None]:
    """The network to be trained, at its start, and its teacher."""
    import torch

    torch.manual_seed(stage.recipe.seed)
    network = build_backbone(training.backbone, **training.options).eval()
    source = _load(stage.init, training, session) if stage.init else None
    if source is not None:
        fresh = warm_start(network, float_copy(source))
        session.log(f"{stage.name}: starts from {stage.init}; fresh: {', '.join(fresh) or 'nothing'}")
    if stage.quantization is not None:
        floating = network
        network = convert(floating, stage.quantization)
        step = max(1, len(session.crops.lr) // _CALIBRATION_CROPS)
        batches = [to_tensor(session.crops.lr[i : i + 1]) for i in range(0, len(session.crops.lr), step)]
        calibrate(network, observe(floating, batches), stage.quantization, clips=stage.clips)
        if stage.clips == "mse":
            scale_clips(network, floating, torch.cat(batches[:: max(1, len(batches) // 6)]))
        if source is not None:
            copy_clips(network, source)
    teacher = _load(stage.teacher, training, session) if stage.teacher else None
    return network, teacher


def _load(name: str, training: Training, session: Session) -> Backbone:
    path = session.model(name)
    if not path.is_file() and any(name == s.name for s in training.stages):
        raise ArgumentError(
            "stage", name, f"finished in {session.folder}", f"run --stage {name} first, or pass --init FILE"
        )
    return load_source(path if path.is_file() else name, training.scale).eval()


def _record(training: Training, stage: Stage, crops: CropArrays) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "recipe": to_mapping(stage.recipe),
        "init": stage.init,
        "teacher": stage.teacher,
        "clips": stage.clips,
        "fit_crops": stage.fit_crops,
        "data": {"source": training.data, "n_crops": len(crops.lr), "hr_side": int(np.shape(crops.hr)[1])},
    }


def _check_done(result: Path, stage: Stage) -> None:
    recorded = load_model(result).metadata["training"].get("recipe")
    if recorded != to_mapping(stage.recipe):
        raise CheckpointError(
            f"{result} is the result of another recipe; name another folder (--run) or remove the file"
        )


def replaced(stage: Stage, **changes: Any) -> Stage:
    """A stage with other fields; those of ``quantization`` and ``recipe`` are given as dictionaries."""
    quantization = changes.pop("quantization", None)
    recipe = changes.pop("recipe", None)
    if quantization is not None:
        assert stage.quantization is not None
        changes["quantization"] = dataclasses.replace(stage.quantization, **quantization)
    if recipe is not None:
        changes["recipe"] = dataclasses.replace(stage.recipe, **recipe)
    return dataclasses.replace(stage, **changes)
