"""The networks that the paper's tables need, trained one after the other, in time slices.

    python scripts/training_queue.py --list                      what there is, what it serves, what is done
    python scripts/training_queue.py --minutes 9                 go on for nine minutes, with the short schedule
    python scripts/training_queue.py --full --only 'carn-x4-*'   the paper's schedule, some networks
    python scripts/training_queue.py --pack                      data and given weights as shards in runs/shards

A slice ends where it is told to (or killed); the next one goes on. Checkpoints and model files lie in runs/queue. A
finished network leaves a small result in models/results, and its weights in models/ as long as they fit. Its form and
losses are the paper's (`paper/` recipes), with two exceptions: SRResNet is the form of the weights given for it (batch
norms folded), and IDN adds MATLAB's bicubic. The full schedule is the paper's; the short one, 3,000 steps, is ours
(cosine, small patches first, averaged weights), with a selector's learning rate raised so that it can go as far.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cadyq.io.shipped import model_files

ROOT = Path(__file__).resolve().parents[1]
SHORT_STEPS = 3000
LIMIT_BYTES = 40_000_000  # of everything in models/
SHARD_BYTES = 28_000_000
# Files of --weights that a first network may start from where models/ has none of its name.
GIVEN = {
    "srresnet-x4-float": "srresnet_x4_float.npz",
    "edsr-x4-float": "edsr_x4_float.npz",
    "carn-x4-float": "carn_m_float.pth",
}
# How the short schedule differs from the paper's: as our recipes do.
OURS = (
    "small_patch",
    "small_share",
    "schedule",
    "decay_epochs",
    "warmup",
    "clip_norm",
    "ema",
    "lr_clip",
    "clip_unit",
)


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        name: of its files; begins with backbone and scale.
        base: stage of the paper's recipe that it is, or varies.
        serves: tables and figures that need it.
        parent: row that it starts from; "" starts from given weights, or from nothing.
        taught: whether the parent is also its teacher.
        form: what differs in the quantization; ``recipe``: what differs in schedule or losses.
    """

    name: str
    base: str
    serves: tuple[str, ...]
    parent: str = ""
    taught: bool = False
    form: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        return self.name.split("-")[0]

    @property
    def network(self) -> str:
        return "-".join(self.name.split("-")[:2])


def _float(network: str) -> Row:
    backbone, scale = network.split("-")
    parent = f"{backbone}-x4-float" if scale == "x2" else ""
    return Row(f"{network}-float", "float", ("main", "S1" if scale == "x4" else "S2"), parent)


def _static(network: str, name: str, serves: tuple[str, ...], **form: Any) -> Row:
    return Row(f"{network}-{name}", "static", serves, f"{network}-float", form=form)


def _dynamic(
    network: str, name: str, serves: tuple[str, ...], parent: str = "pams8", recipe: Any = (), **form: Any
) -> Row:
    return Row(
        f"{network}-{name}",
        "cadyq",
        serves,
        f"{network}-{parent}",
        taught=True,
        form=form,
        recipe=dict(recipe),
    )


def _x4(network: str, serves: tuple[str, ...]) -> Iterator[Row]:
    yield _float(network)
    yield _static(network, "pams8", ("main", "S7", *serves))
    yield _dynamic(network, "cadyq", ("main", "S7", *serves))


def _linq(network: str) -> Iterator[Row]:
    yield _static(network, "linq8", ("S1",), quantizer="linq")
    yield _dynamic(network, "linq-cadyq", ("S1",), "linq8", quantizer="linq")


def _x2(network: str) -> Iterator[Row]:
    yield _float(network)
    yield _static(network, "pams8", ("S2",))
    yield _static(network, "daq4", ("S2",), quantizer="daq", bits=(4,))
    yield _dynamic(network, "cadyq", ("S2",))


def _reseeded(row: Row, seed: int) -> Row:
    parent = f"{row.parent}-seed{seed}" if row.taught else row.parent
    recipe = {**row.recipe, "seed": seed}
    return dataclasses.replace(
        row, name=f"{row.name}-seed{seed}", serves=("comparison",), parent=parent, recipe=recipe
    )


def rows() -> list[Row]:
    """All networks, in the order in which they are worth having; a parent comes before its children."""
    fully = {"quantizer": "lsq", "skips": True, "edges": "integer"}
    result = [*_x4("srresnet-x4", ()), *_x4("edsr-x4", ()), *_x4("carn-x4", ("S4", "S5", "S8"))]
    result += [_dynamic("carn-x4", "cadyq-48", ("S4",), bits=(4, 8))]
    result += [_dynamic("carn-x4", "cadyq-2468", ("S4",), bits=(2, 4, 6, 8))]
    result += [
        _dynamic("carn-x4", f"cadyq-w{w:g}", ("figure S2",), recipe={"w_reg": w})
        for w in (1e-5, 5e-5, 5e-4, 1e-3)
    ]
    result += [*_x4("idn-x4", ()), *_x2("idn-x2")]
    result += [_static("edsr-x4", "fqsr8", ("S3",), **fully)]
    result += [_dynamic("edsr-x4", "fqsr-cadyq", ("S3",), "fqsr8", **fully)]
    for network in ("idn-x4", "carn-x4", "edsr-x4", "srresnet-x4"):
        result += _linq(network)
    for inputs in ("gradient", "gradient+layer", "channel"):
        result += [_dynamic("idn-x4", f"cadyq-{inputs.replace('+', '-')}", ("B.1",), selector_inputs=inputs)]
    # One backbone is cheap enough for all methods and for seeds, the other has selectors of all kinds.
    for network in ("idn-x4", "srresnet-x4"):
        for bits in (4, 6):
            result += [_static(network, f"pams{bits}", ("comparison",), bits=(bits,))]
        result += [_static(network, "daq4", ("comparison",), quantizer="daq", bits=(4,))]
    seeded = [row for row in result if row.name in {"idn-x4-pams8", "idn-x4-pams4", "idn-x4-cadyq"}]
    result += [_reseeded(row, seed) for seed in (1, 2) for row in seeded]
    for network in ("carn-x2", "edsr-x2", "srresnet-x2"):
        result += _x2(network)
    return result


def training_of(row: Row, full: bool, init: str, steps: int | None = None) -> Any:
    """The `cadyq.training.stages.Training` of one row, whose only stage has the row's name.

    ``steps`` is another length; in the short schedule a selector's learning rate makes up for it.
    """
    from cadyq.training.stages import read_training, replaced

    ours, paper = read_training(row.network), read_training(f"paper/{row.network}")
    stage = paper.stage(row.base)
    recipe = stage.recipe
    changes: dict[str, Any] = {"freeze_norms": True, "validation_crops": 24, **row.recipe}
    if not full:
        like = ours.stage(row.base).recipe
        changes |= {name: getattr(like, name) for name in OURS}
        short = steps or SHORT_STEPS
        changes["lr_selector"] = recipe.lr_selector * recipe.steps / short
        recipe = recipe.shortened(short)
        changes["lr"] = 1e-4 if init else like.lr
    elif steps:
        recipe = recipe.shortened(steps)
    changes["lr_by_rms"] = bool(init)
    recipe = dataclasses.replace(recipe, **changes)
    stage = dataclasses.replace(
        stage,
        name=row.name,
        recipe=recipe,
        init=init,
        teacher=init if row.taught else "",
        clips=stage.clips if full else "mse",
    )
    if row.form:
        stage = replaced(stage, quantization=dict(row.form))
    return dataclasses.replace(ours, stages=(stage,))


@dataclass(frozen=True)
class Places:
    """Where things lie, for one of the two schedules."""

    full: bool
    root: Path = ROOT
    weights: Path | None = None

    @property
    def schedule(self) -> str:
        return "full" if self.full else "short"

    @property
    def work(self) -> Path:
        return self.root / "runs" / "queue" / self.schedule

    def result(self, row: Row) -> Path:
        return self.models / "results" / f"{row.name}-{self.schedule}.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def model(self, row: Row) -> Path | None:
        """Weights of a finished row, wherever they are."""
        own = self.work / f"{row.name}.safetensors"
        return own if own.is_file() else model_files(self.models).get(row.name)

    def given(self, row: Row) -> Path | None:
        """Weights that a row without a parent may start from."""
        if row.name not in GIVEN:
            return None
        candidates = [model_files(self.models).get(row.name)]
        if self.weights is not None:
            candidates.append(self.weights / GIVEN[row.name])
        return next((path for path in candidates if path is not None and path.is_file()), None)

    def is_done(self, row: Row) -> bool:
        return self.result(row).is_file()

    def steps(self, row: Row) -> str:
        """Progress of an unfinished row, from its log."""
        log = self.work / f"{row.name}.log"
        lines = [t for t in log.read_text().splitlines() if t.startswith("step ")] if log.is_file() else []
        return lines[-1].split()[1] if lines else ""


def print_list(places: Places, chosen: Iterable[Row]) -> None:
    done = 0
    chosen = list(chosen)
    for row in chosen:
        both = []
        for one in (dataclasses.replace(places, full=False), dataclasses.replace(places, full=True)):
            if one.is_done(row):
                result = json.loads(one.result(row).read_text())
                both.append(f"{result['psnr_db']:.2f} dB, FQR {result['fqr']:.2f}")
                done += not one.full
            else:
                both.append(one.steps(row) or "-")
        print(f"{row.name:<28} {', '.join(row.serves):<24} short: {both[0]:<22} full: {both[1]}")
    size = sum(path.stat().st_size for path in model_files(places.models).values())
    print(f"{done} of {len(chosen)} done with the short schedule; models/ holds {size / 1e6:.1f} of 40 MB")


def run(options: argparse.Namespace, places: Places, chosen: list[Row]) -> None:
    """Train what is not done yet, in order, until the time is up."""
    import torch

    from cadyq.data.folders import load_training
    from cadyq.training.device import Device
    from cadyq.training.stages import Session, run_stage

    if options.threads:
        torch.set_num_threads(options.threads)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    device = Device(options.device, options.precision)
    by_name = {row.name: row for row in rows()}
    for row in chosen:
        if places.is_done(row) or time.monotonic() >= end:
            continue
        parent = places.model(by_name[row.parent]) if row.parent else places.given(row)
        if row.parent and parent is None:
            print(f"{row.name}: waits for {row.parent}")
            continue
        training = training_of(row, places.full, str(parent or ""), options.steps)
        splits = [
            load_training(training.data, split, training.scale, places.root / "runs" / "cache", options.root)
            for split in ("train", "validation")
        ]
        places.work.mkdir(parents=True, exist_ok=True)
        with (places.work / f"{row.name}.log").open("a", encoding="utf-8") as log:

            def tell(text: str, file: Any = log) -> None:
                print(text, file=file, flush=True)

            print(f"{row.name}: {places.steps(row) or 'begins'}", flush=True)
            session = Session(
                places.work, splits[0], splits[1], device, stop=lambda: time.monotonic() >= end, log=tell
            )
            finished = run_stage(training, training.stages[0], session)
        if finished is not None:
            record(row, places, finished, options)


def record(row: Row, places: Places, model: Path, options: argparse.Namespace) -> None:
    """Write the small result, and the weights where they still fit."""
    from cadyq.io.files import write_atomic
    from cadyq.io.models import load_model, save_model

    loaded = load_model(model)
    training = loaded.metadata["training"]
    result = {
        "name": row.name,
        "serves": row.serves,
        "schedule": places.schedule,
        "device": options.device,
        "precision": options.precision,
        "init": Path(training["init"]).name,
        **{key: training[key] for key in ("steps", "seconds", "data")},
        **training["validation"],
        "data_validation": "validation split of the training crops",
    }
    print(f"{row.name}: {result['psnr_db']:.3f} dB, FQR {result['fqr']:.2f} on validation crops", flush=True)
    places.result(row).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(places.result(row), (json.dumps(result, indent=2) + "\n").encode())
    if not places.full and dataclasses.replace(places, full=True).is_done(row):
        return  # the better one is there
    temporary = places.work / f".{row.name}.xz"
    save_model(
        temporary,
        loaded.network,
        loaded.quantization,
        budgets=loaded.budgets,
        training={**training, "init": Path(training["init"]).name, "teacher": Path(training["teacher"]).name},
        half=True,
    )
    others, target = model_files(places.models), places.models / f"{row.name}.safetensors.xz"
    earlier = others.pop(row.name, target)
    if sum(path.stat().st_size for path in others.values()) + temporary.stat().st_size <= LIMIT_BYTES:
        os.replace(temporary, target)
        if earlier != target:  # one that is not compressed would be taken first
            earlier.unlink()
    else:
        temporary.unlink()
        print(f"{row.name}: models/ is full, its weights stay in {model}")


def pack(source: Path, weights: Path | None, target: Path) -> list[Path]:
    """Write training crops and given weights as tar files of at most 28 MB; return them."""
    files = [(path, f"data/train/{path.relative_to(source / 'train')}") for path in _sorted(source / "train")]
    if weights is not None:
        files += [(path, f"weights/{path.name}") for path in _sorted(weights)]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("shard-*.tar"):
        old.unlink()
    groups: list[list[tuple[Path, str]]] = []
    size = SHARD_BYTES
    for path, name in files:
        entry = -(-path.stat().st_size // 512) * 512 + 1024  # as it lies in a tar file
        if size + entry > SHARD_BYTES - 20_480:  # less what ends the file
            groups.append([])
            size = 0
        groups[-1].append((path, name))
        size += entry
    shards = [target / f"shard-{number:02}.tar" for number in range(len(groups))]
    for shard, group in zip(shards, groups, strict=True):
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
            for path, name in group:
                archive.add(path, name, recursive=False)
    return shards


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def unpack(shards: Path, target: Path) -> None:
    """Unpack all shards once; a half unpacked folder is begun anew."""
    mark = target / "complete"
    if mark.exists():
        return
    for shard in sorted(shards.glob("shard-*.tar")):
        with tarfile.open(shard) as archive:
            if sys.version_info >= (3, 12):
                archive.extractall(target, filter="data")
            else:
                archive.extractall(target)
    mark.touch()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what is done, and end")
    parser.add_argument("--pack", action="store_true", help="write the shards, and end")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="networks by name, with * and ?")
    parser.add_argument("--full", action="store_true", help="the paper's schedule instead of 3,000 steps")
    parser.add_argument("--steps", type=int, help="another length, for a trial")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--root", help="folder of the data sets (default: CADYQ_DATA, or the unpacked shards)"
    )
    parser.add_argument("--weights", type=Path, help="folder of given float weights")
    parser.add_argument("--home", type=Path, default=ROOT, help="folder of runs/ and models/")
    options = parser.parse_args(arguments)
    shards = options.home / "runs" / "shards"
    if options.root is None and "CADYQ_DATA" not in os.environ and any(shards.glob("shard-*.tar")):
        unpack(shards, options.home / "runs" / "unpacked")
        options.root = str(options.home / "runs" / "unpacked" / "data")
        given = options.home / "runs" / "unpacked" / "weights"
        options.weights = options.weights or (given if given.is_dir() else None)
    places = Places(options.full, options.home, options.weights)
    chosen = [row for row in rows() if fnmatch.fnmatch(row.name, options.only)]
    if not chosen:
        sys.exit(f"no network is called {options.only}; see --list")
    if options.list:
        print_list(places, chosen)
    elif options.pack:
        from cadyq.data.sets import data_root

        for shard in pack(data_root(options.root), options.weights, shards):
            print(f"{shard} {shard.stat().st_size / 1e6:.1f} MB")
    else:
        run(options, places, chosen)


if __name__ == "__main__":
    main()
