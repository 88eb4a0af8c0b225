"""One training loop for all stages: float, static and dynamic networks. It reads from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays, PairedCrops
from cadyq.data.degrade import degrade
from cadyq.errors import CadyqError
from cadyq.quant.quantizer import ActQuantizer
from cadyq.quant.selector import BitSelector
from cadyq.quant.site import sites_of
from cadyq.training.device import Device, ResidentCrops
from cadyq.training.loss import StepLoss, native_convolutions
from cadyq.training.memory import keep_freed_memory
from cadyq.training.parallel import Workers
from cadyq.training.recipe import Recipe
from cadyq.training.state import Position, load_state, save_state
from cadyq.training.target import BitController
from cadyq.training.validate import Validation, picture_of, validate

if TYPE_CHECKING:
    from cadyq.training.board import Board

Generator = torch.Generator

__all__ = ["DivergenceError", "Outcome", "Recipe", "native_convolutions", "to_tensor", "train"]

_REPORT_EVERY = 50
# Selectors move on purpose, towards a target; a long average would hold the bits of times long past.
_SELECTOR_EMA = 0.98


class DivergenceError(CadyqError):
    """The loss is not a number or exploded."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        network: the network that was trained, with the best or the averaged weights.
        steps: updates done so far.
        finished: whether these are all.
        seconds: time spent on steps, over all sessions.
        validation: of the weights in ``network``, where there were validation crops and the run has finished.
    """

    network: Backbone
    steps: int
    finished: bool
    seconds: float
    validation: Validation | None


def to_tensor(pictures: Any) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1], channels last in memory."""
    return Device().tensor(pictures)


def train(
    network: Backbone,
    crops: CropArrays,
    recipe: Recipe,
    run: Path,
    *,
    teacher: Backbone | None = None,
    validation: CropArrays | None = None,
    tile: int = 48,
    device: Device | None = None,
    workers: Workers | None = None,
    stop: Callable[[], bool] = lambda: False,
    elapsed: Callable[[], float] | None = None,
    log: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    board: Board | None = None,
    save_every: int = 100,
    keep: int = 2,
) -> Outcome:
    """Train ``network`` in place and leave the averaged weights in it, or the best ones on ``validation``.

    ``run`` is a folder that holds the checkpoints, the last ``keep`` of them; if one is there, training goes on
    from it exactly. ``stop`` is asked after every step; when it says yes the state is saved and the unfinished
    average is left in the network. ``tile`` is the side of the tiles in which validation decides bits. ``elapsed``
    says which share of the time is used up, 0 to 1; the learning rate then follows it instead of the number of steps,
    of which as many are done as the time allows (at most ``recipe.steps``; such a run cannot be repeated exactly).

    Raises:
        DivergenceError: the loss is not finite or 20 times its running mean.
        CheckpointError: the folder holds a run with another recipe.
    """
    keep_freed_memory()
    device, workers = device or Device(), workers or Workers()
    run.mkdir(parents=True, exist_ok=True)
    for one in (network, teacher):
        if one is not None:
            device.place(one)
    optimizer = torch.optim.Adam(list(_groups(network, recipe)), lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8)
    sampler = _Sampler(crops, recipe, device)
    controller = BitController(recipe.target_fqr) if recipe.target_fqr else None
    at = Position(0, math.nan, 0.0, {name: p.detach().clone() for name, p in network.named_parameters()})

    def save() -> None:
        if workers.rank == 0:
            state = {**vars(at), "network": network.state_dict(), "optimizer": optimizer.state_dict()}
            state |= sampler.state() | {"controller": None if controller is None else controller.state()}
            save_state(run, recipe, state, keep)

    state = load_state(run, recipe, device.name)
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.restore(state)
        if controller is not None:
            controller.restore(state["controller"])
        at = Position(**{key: state.get(key, value) for key, value in vars(at).items()})
    network.train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train(not recipe.freeze_norms)  # frozen: the quantised network runs with them folded
    compute_loss = workers.wrap(StepLoss(network, teacher, recipe, device))
    n_decisions = recipe.batch * sum(s.selector is not None for s in sites_of(network))
    selectors = {name for name, _ in network.named_parameters() if ".selector." in name}
    share = workers.share(recipe.batch)
    progress(at.step, recipe.steps)
    while at.step < recipe.steps and not workers.agree(stop()):
        began = time.monotonic()
        lr, hr = sampler.batch(at.step, share)
        rate = recipe.rate(at.step if elapsed is None else int(elapsed() * recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        weight = recipe.bit_weight(at.step) if controller is None else controller.weight() / n_decisions
        force, soft = _bits(network, recipe, at.step, sampler.random, share)
        loss, report = compute_loss(lr, hr, force, soft, weight * workers.size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        values = workers.mean({key: float(value) for key, value in report.items()})
        _check(values["l1"], at, run)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], recipe.clip_norm
            )
        optimizer.step()
        at.step += 1
        decay = min(recipe.ema, (1 + at.step) / (10 + at.step))
        with torch.no_grad():
            for name, p in network.named_parameters():
                at.average[name].lerp_(p, 1 - (min(decay, _SELECTOR_EMA) if name in selectors else decay))
        if controller is not None and "fqr" in values:
            controller.observe(values["fqr"])
        l1 = values["l1"]
        at.running = l1 if math.isnan(at.running) else 0.98 * at.running + 0.02 * l1
        at.seconds += time.monotonic() - began
        if at.step % _REPORT_EVERY == 0 and workers.rank == 0:
            left = at.seconds / at.step * (recipe.steps - at.step)
            extra = " ".join(f"{key} {number:.4g}" for key, number in values.items())
            log(f"step {at.step}/{recipe.steps} running {at.running:.4f} {extra} eta {left:.0f} s")
            if board is not None:
                more = {"running": at.running, "rate": rate, "bit_weight": weight}
                board.scalars(at.step, {**values, **more})
        done = at.step == recipe.steps
        due = recipe.validate_every and (done or at.step % recipe.validate_every == 0)
        if validation is not None and due and workers.rank == 0:
            _validate(network, validation, recipe, at, tile, log, board)
        if at.step % save_every == 0 or done:
            save()
        progress(at.step, recipe.steps)
    if at.step < recipe.steps:
        save()
    best = at.best if at.step == recipe.steps else None
    _copy(network, best or at.average)
    found = None
    if best is not None:
        assert validation is not None
        n = min(recipe.validation_crops, len(validation.lr))
        found = Validation(at.best_psnr, at.best_fqr, n)
    return Outcome(network.eval(), at.step, at.step == recipe.steps, at.seconds, found)


class _Sampler:
    """Everything that is drawn at random: patches of two sizes, damage, bits."""

    def __init__(self, crops: CropArrays, recipe: Recipe, device: Device) -> None:
        self.recipe, self.device = recipe, device
        self.data = PairedCrops(crops, recipe.patch, recipe.seed)
        self.small = PairedCrops(crops, recipe.small_patch, recipe.seed + 1)
        self.random = torch.Generator().manual_seed(recipe.seed)
        # Damage is done by Pillow, on the CPU.
        self.resident = None if device.is_cpu or recipe.degrade else ResidentCrops(crops, device)

    def batch(self, step: int, share: slice) -> tuple[Tensor, Tensor]:
        """One process's patches of a step, (N, 3, h, w) and (N, 3, H, W) in [0, 1]."""
        recipe = self.recipe
        source = self.small if step < recipe.small_share * recipe.steps else self.data
        places = source.places(recipe.batch)
        if self.resident is not None:
            return self.resident.cut(places[share], source.patch)
        lr, hr = source.cut(places if recipe.degrade else places[share])
        if recipe.degrade:
            # Drawn from seed and step alone: nothing to save, and a resumed run goes on exactly. The whole batch,
            # so that the number of processes changes nothing.
            lr, hr = degrade(lr, np.random.default_rng((recipe.seed, step)))[share], hr[share]
        return self.device.tensor(lr), self.device.tensor(hr)

    def state(self) -> dict[str, Any]:
        return {
            "data": json.dumps(self.data.state()),
            "small": json.dumps(self.small.state()),
            "random": self.random.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.data.restore(json.loads(state["data"]))
        self.small.restore(json.loads(state["small"]))
        self.random.set_state(state["random"].cpu())


def _groups(network: Backbone, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Parameter groups by the type of the module that owns them, with a base learning rate each."""
    owned: set[int] = set()
    for module in network.modules():
        if isinstance(module, ActQuantizer):
            for p in module.parameters(recurse=False):
                owned.add(id(p))
                unit = float(p.detach().abs().mean()) if recipe.clip_unit == "relative" else 1 / 255
                yield {"params": [p], "base": recipe.lr_clip * unit}
        elif isinstance(module, BitSelector):
            parameters = list(module.parameters())
            owned.update(id(p) for p in parameters)
            yield {"params": parameters, "base": recipe.lr_selector}
    for p in network.parameters():
        if id(p) not in owned:
            rms = float(p.detach().square().mean().sqrt())
            scale = min(3.0, max(0.04, rms / 0.024)) if recipe.lr_by_rms and p.dim() > 1 else 1.0
            yield {"params": [p], "base": recipe.lr * scale}


def _bits(
    network: Backbone, recipe: Recipe, step: int, random: Generator, share: slice
) -> tuple[dict[str, int | Tensor] | None, bool]:
    """Bits that are forced in this step (or ``None``), and whether selectors learn in it."""
    if recipe.bits == "chosen":
        return None, False
    choose = recipe.bits == "selector" or (recipe.bits == "mixed" and step % 2 == 0)
    if choose:
        return None, any(s.selector is not None for s in sites_of(network))
    if recipe.bits == "largest":
        quantized = [(s.name, s.quantizer) for s in sites_of(network, "body")]
        return {name: int(q.bits[-1]) for name, q in quantized if q is not None}, False
    return {k: v[share] for k, v in _random_bits(network, recipe.batch, random).items()}, False


def _random_bits(network: Backbone, n: int, random: Generator) -> dict[str, Tensor]:
    """Bits per site and patch around a level drawn per patch, so that all means occur, and mixtures too."""
    result: dict[str, Tensor] = {}
    level = torch.rand(n, generator=random)
    for site in sites_of(network, "body"):
        assert site.quantizer is not None
        bits = site.quantizer.bits
        position = level * len(bits) - 0.5 + 0.5 * torch.randn(n, generator=random)
        result[site.name] = bits[position.round().clamp(0, len(bits) - 1).long().to(bits.device)]
    return result


def _check(l1: float, at: Position, run: Path) -> None:
    if not math.isfinite(l1) or l1 > 20 * at.running:
        raise DivergenceError(
            f"loss is {l1:.4g} at step {at.step} (running mean {at.running:.4g}); lower lr or start again from "
            f"the last checkpoint in {run}"
        )


def _validate(
    network: Backbone,
    crops: CropArrays,
    recipe: Recipe,
    at: Position,
    tile: int,
    log: Callable[[str], None],
    board: Board | None,
) -> None:
    """Measure the averaged weights, and keep them if they are the best within the share that counts."""
    with _weights(network, at.average):
        found = validate(network, crops, recipe.validation_crops, tile=tile)
        if board is not None:
            x = Device(str(next(network.parameters()).device)).tensor(crops.lr[:1])
            with torch.no_grad():
                board.picture(at.step, "validation", picture_of(network(x)))
            board.scalars(at.step, {"validation/psnr_db": found.psnr_db, "validation/fqr": found.fqr})
    log(f"step {at.step}/{recipe.steps} validation {found.psnr_db:.3f} dB, FQR {found.fqr:.2f}")
    if at.step < (1 - recipe.best_share) * recipe.steps:
        return
    if at.best is None or _better(found, Validation(at.best_psnr, at.best_fqr, 0), recipe.target_fqr):
        at.best = {name: value.clone() for name, value in at.average.items()}
        at.best_psnr, at.best_fqr = found.psnr_db, found.fqr


def _better(new: Validation, old: Validation, target: float) -> bool:
    """More PSNR; with a target first of all nearer to it, where one of the two is more than 0.1 bits away."""
    if target:
        distances = [max(0.1, abs(v.fqr - target)) for v in (new, old)]
        if distances[0] != distances[1]:
            return distances[0] < distances[1]
    return new.psnr_db > old.psnr_db


@contextmanager
def _weights(network: Backbone, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the network, in evaluation mode, has other weights."""
    own = {name: p.detach().clone() for name, p in network.named_parameters()}
    modes = [(module, module.training) for module in network.modules()]
    try:
        _copy(network, weights)
        network.eval()
        yield
    finally:
        _copy(network, own)
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _copy(network: Backbone, weights: Mapping[str, Tensor]) -> None:
    for name, p in network.named_parameters():
        p.copy_(weights[name])
