"""`cadyq train`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import progress
from cadyq.errors import ArgumentError, MissingExtraError
from cadyq.io.shipped import plan_path

if TYPE_CHECKING:
    from cadyq.training.stages import Session, Stage, Training

__all__ = ["add"]


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a network: float, 8 bit, content-aware",
        description="Run the stages of a recipe; each writes a model file, and what is there is not done again. "
        "Interrupted or killed, it goes on from its last checkpoint.",
        epilog="Several processes: torchrun --nproc-per-node N -m cadyq train ... (there, --run is called --folder).",
    )
    train.add_argument(
        "config", metavar="CONFIG", help="a TOML file, or a recipe: edsr-x4, paper/edsr-x4, ..."
    )
    train.add_argument("--stage", metavar="S", help="only this stage (default: all)")
    train.add_argument("--steps", type=int, metavar="N", help="squeeze each stage's schedule into N steps")
    train.add_argument(
        "--run", "--folder", dest="folder", metavar="FOLDER", help="results (default: runs/CONFIG)"
    )
    train.add_argument("--minutes", type=float, help="stop after so long; the next call goes on")
    train.add_argument("--init", metavar="FILE", help="model the first stage starts from, of any scale")
    train.add_argument("--target-fqr", type=float, help="mean bits to reach in dynamic stages")
    train.add_argument(
        "--data", metavar="SOURCE", help="crops, DIV2K or a folder of pictures (default: CONFIG's)"
    )
    train.add_argument("--root", help="folder of the data sets (default: the variable CADYQ_DATA)")
    train.add_argument(
        "--cache", default="runs/cache", help="folder for decoded crops (default: %(default)s)"
    )
    train.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    train.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32")
    train.add_argument("--compile", action="store_true", help="torch.compile the network")
    train.add_argument("--threads", type=int, help="CPU threads (default: all)")
    train.add_argument("--tensorboard", action="store_true", help="write curves and pictures to RUN/board")
    train.add_argument("--json", action="store_true", help="print JSON instead of text")
    train.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        import torch

        from cadyq.deploy import write_plan
        from cadyq.training.stages import run_stage
    except ImportError as error:
        raise MissingExtraError(f'training needs torch ({error}); pip install "cadyq[train]"') from error
    if options.threads is not None:
        if options.threads < 1:
            raise ArgumentError("threads", options.threads, "at least 1")
        torch.set_num_threads(options.threads)
    training = _training(options)
    stages = [training.stage(options.stage)] if options.stage else list(training.stages)
    no_plan: dict[str, str] = {}
    with _session(options, training) as session:
        for stage in stages:
            with _watched(session, stage.name, stage.recipe.steps):
                result = run_stage(training, stage, session)
            if result is None:
                break
            if session.workers.rank == 0 and stage.quantization is not None:
                no_plan[stage.name] = "" if plan_path(result) else write_plan(result)
        if session.workers.rank == 0:
            _print([_summary(session, stage, no_plan.get(stage.name)) for stage in stages], options)
    return 0


def _training(options: argparse.Namespace) -> Training:
    """The recipe with the command line's changes."""
    import dataclasses

    from cadyq.training.stages import read_training, replaced

    training = read_training(options.config)
    stages = []
    for number, stage in enumerate(training.stages):
        if options.steps is not None:
            if options.steps < 1:
                raise ArgumentError("steps", options.steps, "at least 1")
            stage = dataclasses.replace(stage, recipe=stage.recipe.shortened(options.steps))
        if options.target_fqr is not None and stage.is_dynamic:
            stage = replaced(stage, recipe={"target_fqr": options.target_fqr})
        if options.init and (stage.name == options.stage or (number == 0 and not options.stage)):
            stage = dataclasses.replace(stage, init=options.init)
        stages.append(stage)
    return dataclasses.replace(training, stages=tuple(stages), data=options.data or training.data)


@contextmanager
def _session(options: argparse.Namespace, training: Training) -> Iterator[Session]:
    from cadyq.data.folders import load_training
    from cadyq.deploy import runner
    from cadyq.training.board import Board
    from cadyq.training.device import Device
    from cadyq.training.parallel import Workers
    from cadyq.training.stages import Session

    folder = Path(options.folder or Path("runs") / Path(options.config).with_suffix(""))
    device = Device(options.device, options.precision, options.compile)
    crops, validation = (
        load_training(training.data, split, training.scale, options.cache, options.root)
        for split in ("train", "validation")
    )
    folder.mkdir(parents=True, exist_ok=True)
    workers = Workers.join(options.device)
    board = Board(folder / "board") if options.tensorboard and workers.rank == 0 else None
    try:
        yield Session(
            folder, crops, validation, device, workers, _deadline(options.minutes), board=board, runner=runner
        )
    finally:
        workers.leave()
        if board is not None:
            board.close()


def _deadline(minutes: float | None) -> Callable[[], bool]:
    if minutes is None:
        return lambda: False
    if minutes <= 0:
        raise ArgumentError("minutes", minutes, "a positive number")
    end = time.monotonic() + 60 * minutes
    return lambda: time.monotonic() >= end


@contextmanager
def _watched(session: Session, stage: str, steps: int) -> Iterator[None]:
    """A bar with the time left on a terminal; the log in the run's folder, and on stderr where there is no bar."""
    if session.workers.rank:
        session.log = lambda text: None
        yield
        return
    with (session.folder / f"{stage}.log").open("a", encoding="utf-8") as file, progress(stage, steps) as bar:

        def log(text: str) -> None:
            print(text, file=file, flush=True)
            if not sys.stderr.isatty():
                print(text, file=sys.stderr, flush=True)

        session.log, session.progress = log, bar
        yield


def _summary(session: Session, stage: Stage, no_plan: str | None) -> dict[str, Any]:
    """What a stage has come to, from its model file; ``no_plan`` is why the integer engine does not run it."""
    from cadyq.io.models import load_model

    path = session.folder / f"{stage.name}.safetensors"
    if not path.is_file():
        return {"stage": stage.name, "finished": False, "model": None}
    record = load_model(path).metadata["training"]
    return {
        "stage": stage.name,
        "finished": True,
        "model": str(path),
        "steps": record["steps"],
        "seconds": record["seconds"],
        **record["validation"],
        "runtime": "engine" if no_plan == "" else "torch",
        "no_plan_because": no_plan or "",
    }


def _print(summaries: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"stages": summaries}, indent=2))
        return
    for one in summaries:
        if one["finished"]:
            figures = f"{one['psnr_db']:.3f} dB, FQR {one['fqr']:.2f} on {one['n_images']} validation crops"
            print(
                f"{one['stage']:<8} {one['steps']:>7} steps {one['seconds']:>7} s  {figures}  {one['model']}"
            )
            if one["no_plan_because"]:
                print(f"{'':<8} it runs on torch: {one['no_plan_because']}")
        else:
            print(f"{one['stage']:<8} not finished; the same command goes on")
