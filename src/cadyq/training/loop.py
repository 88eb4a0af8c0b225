"""One training loop for all stages: float, static and dynamic networks. It reads from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays, PairedCrops
from cadyq.data.degrade import degrade
from cadyq.errors import ArgumentError, CadyqError, CheckpointError
from cadyq.functional.losses import attention_transfer, bit_loss, l1_gray_levels
from cadyq.io.files import replacing
from cadyq.quant.context import Context
from cadyq.quant.layers import conv2d_implementation
from cadyq.quant.pams import mixture_implementation
from cadyq.quant.quantizer import ActQuantizer
from cadyq.quant.selector import BitSelector
from cadyq.quant.site import sites_of
from cadyq.training import fastconv, fastquant

Generator = torch.Generator

__all__ = ["DivergenceError", "Recipe", "native_convolutions", "to_tensor", "train"]


class DivergenceError(CadyqError):
    """The loss is not a number or exploded."""


@dataclass(frozen=True)
class Recipe:
    """Schedule of one stage.

    Attributes:
        steps: updates of the weights.
        batch: patches per step.
        patch: side of the LR patches; ``small_patch`` is used for the first ``small_share`` of the steps.
        lr: learning rate of the network's weights, scaled per tensor by its initial root mean square if
            ``lr_by_rms`` (folded batch norms leave tensors that differ 200 times in size).
        lr_clip: learning rate of clips and steps, relative to their initial value.
        lr_selector: learning rate of the bit selectors.
        warmup: steps of linear warm-up; afterwards the rate follows a cosine down to 1 %.
        ema: decay of the exponential moving average of the weights, which is what a stage yields.
        w_reg: weight of the bit loss at the start, raised by ``w_reg_step`` every ``epoch`` steps.
        w_teacher: weight of L1 to the teacher's picture. ``w_attention_end`` and ``w_attention``: weights of
            attention transfer at the body's last and at every block's output (1e3 and 1e2 in the paper).
        bits: ``selector``: as the selectors choose; ``random``: at random per patch and site, so that the network
            works for every choice; ``mixed``: both in turn; ``largest``: the largest candidate.
        degrade: whether the low-resolution patches are damaged (`cadyq.data.degrade`), for the ``photo`` networks.
        seed: of patches, damage and random bits.
    """

    steps: int
    batch: int = 16
    patch: int = 48
    small_patch: int = 32
    small_share: float = 0.0
    lr: float = 1e-4
    lr_by_rms: bool = True
    lr_clip: float = 2e-3
    lr_selector: float = 1e-4
    warmup: int = 50
    ema: float = 0.998
    w_reg: float = 0.0
    w_reg_step: float = 0.0
    epoch: int = 100
    w_teacher: float = 0.0
    w_attention_end: float = 0.0
    w_attention: float = 0.0
    bits: Literal["selector", "random", "mixed", "largest"] = "largest"
    degrade: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patch", "small_patch"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "at least 1")

    def rate(self, step: int) -> float:
        """Learning rate of a step relative to the base: warm-up, then cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def to_tensor(pictures: Any) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def train(
    network: Backbone,
    crops: CropArrays,
    recipe: Recipe,
    run: Path,
    *,
    teacher: Backbone | None = None,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = print,
    save_every: int = 100,
) -> Backbone:
    """Train ``network`` in place and return it with the averaged weights.

    ``run`` is a folder that holds the checkpoint; if one is there, training goes on from it exactly. ``stop`` is
    asked after every step; when it says yes the state is saved and the unfinished average is returned.

    Raises:
        DivergenceError: the loss is not finite or 20 times its running mean.
        CheckpointError: the folder holds a run with another recipe.
    """
    run.mkdir(parents=True, exist_ok=True)
    groups = list(_groups(network, recipe))
    optimizer = torch.optim.Adam(groups, lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8)
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    data = PairedCrops(crops, recipe.patch, recipe.seed)
    small = PairedCrops(crops, recipe.small_patch, recipe.seed + 1)
    random = torch.Generator().manual_seed(recipe.seed)
    step, running = 0, float("nan")
    if (run / "state.pt").exists():
        state = _load(run, recipe)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        data.restore(json.loads(state["data"]))
        small.restore(json.loads(state["small"]))
        random.set_state(state["random"])
        step, running = state["step"], state["running"]
    network.train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # statistics frozen: the quantised network runs with them folded
    began, first = time.monotonic(), step
    while step < recipe.steps and not stop():
        source = small if step < recipe.small_share * recipe.steps else data
        lr, hr = _batch(source, recipe, step)
        factor = recipe.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        loss, report = _loss(network, teacher, lr, hr, recipe, step, random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = float(report["l1"])
        if not math.isfinite(value) or value > 20 * running:
            raise DivergenceError(
                f"loss is {value:.4g} at step {step} (running mean {running:.4g}); lower lr or start again from "
                f"the last checkpoint in {run}"
            )
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 50.0)
        optimizer.step()
        step += 1
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in network.named_parameters():
                average[name].lerp_(p, 1 - decay)
        running = value if running != running else 0.98 * running + 0.02 * value
        if step % 50 == 0:
            left = (time.monotonic() - began) / (step - first) * (recipe.steps - step)
            extra = " ".join(f"{key} {number:.4g}" for key, number in report.items())
            log(f"step {step}/{recipe.steps} running {running:.4f} {extra} eta {left:.0f} s")
        if step % save_every == 0 or step == recipe.steps:
            _save(run, recipe, network, optimizer, average, data, small, random, step, running)
    if step < recipe.steps:
        _save(run, recipe, network, optimizer, average, data, small, random, step, running)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(average[name])
    return network.eval()


def _batch(source: PairedCrops, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """One step's patches, (N, 3, h, w) and (N, 3, H, W) in [0, 1]."""
    lr, hr = source.batch(recipe.batch)
    if recipe.degrade:
        # Drawn from seed and step alone: nothing to save, and a resumed run goes on exactly.
        lr = degrade(lr, np.random.default_rng((recipe.seed, step)))
    return to_tensor(lr), to_tensor(hr)


def _groups(network: Backbone, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Parameter groups by the type of the module that owns them, with a base learning rate each."""
    owned: set[int] = set()
    for module in network.modules():
        if isinstance(module, ActQuantizer):
            for p in module.parameters(recurse=False):
                owned.add(id(p))
                yield {"params": [p], "base": recipe.lr_clip * float(p.detach().abs().mean())}
        elif isinstance(module, BitSelector):
            parameters = list(module.parameters())
            owned.update(id(p) for p in parameters)
            yield {"params": parameters, "base": recipe.lr_selector}
    for p in network.parameters():
        if id(p) not in owned:
            rms = float(p.detach().square().mean().sqrt())
            scale = min(3.0, max(0.04, rms / 0.024)) if recipe.lr_by_rms and p.dim() > 1 else 1.0
            yield {"params": [p], "base": recipe.lr * scale}


def _random_bits(network: Backbone, n: int, random: Generator) -> dict[str, int | Tensor]:
    """Bits per site and patch around a level drawn per patch, so that all means occur, and mixtures too."""
    result: dict[str, int | Tensor] = {}
    level = torch.rand(n, generator=random)
    for site in sites_of(network, "body"):
        assert site.quantizer is not None
        bits = site.quantizer.bits
        position = level * len(bits) - 0.5 + 0.5 * torch.randn(n, generator=random)
        result[site.name] = bits[position.round().clamp(0, len(bits) - 1).long()]
    return result


def _loss(
    network: Backbone,
    teacher: Backbone | None,
    lr: Tensor,
    hr: Tensor,
    recipe: Recipe,
    step: int,
    random: Generator,
) -> tuple[Tensor, dict[str, float]]:
    choose = recipe.bits == "selector" or (recipe.bits == "mixed" and step % 2 == 0)
    ctx = Context.of(lr, soft=choose and any(s.selector is not None for s in sites_of(network)))
    if recipe.bits in ("random", "mixed") and not choose:
        ctx.force_bits = _random_bits(network, len(lr), random)
    elif recipe.bits == "largest":
        sizes = {
            s.name: int(s.quantizer.bits[-1]) for s in sites_of(network, "body") if s.quantizer is not None
        }
        ctx.force_bits = dict(sizes)
    attention = teacher is not None and (recipe.w_attention_end or recipe.w_attention)
    if attention:
        ctx.block_outputs = []
    with native_convolutions():
        sr = network(lr, ctx)
        loss = l1_gray_levels(sr, hr)
        report = {"l1": float(loss.detach())}
        if teacher is not None:
            with torch.no_grad():
                other = Context.of(lr)
                other.block_outputs = [] if attention else None
                target = teacher(lr, other)
            if recipe.w_teacher:
                distance = l1_gray_levels(sr, target)
                loss = loss + recipe.w_teacher * distance
                report["teacher"] = float(distance.detach())
            if attention:
                assert ctx.block_outputs is not None and other.block_outputs is not None
                maps = [
                    attention_transfer(a, b)
                    for a, b in zip(ctx.block_outputs, other.block_outputs, strict=True)
                ]
                loss = loss + recipe.w_attention_end * maps[-1] + recipe.w_attention * torch.stack(maps).sum()
    soft = [r for r in ctx.records if r.expected_bits is not None]
    if soft:
        weight = recipe.w_reg + recipe.w_reg_step * (step // recipe.epoch)
        expected = [r.expected_bits for r in soft if r.expected_bits is not None]
        if weight:
            loss = loss + weight * bit_loss([r.bits for r in soft], expected)
        report["fqr"] = float(torch.stack([r.bits for r in soft]).mean())
    return loss, report


@contextmanager
def native_convolutions() -> Iterator[None]:
    """Within the block, convolutions and PAMS use the native training kernels where they are built."""
    with (
        fastconv.use(),
        conv2d_implementation(fastconv.conv2d_like),
        mixture_implementation(fastquant.mixture),
    ):
        yield


def _save(
    run: Path,
    recipe: Recipe,
    network: Backbone,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    data: PairedCrops,
    small: PairedCrops,
    random: Generator,
    step: int,
    running: float,
) -> None:
    state = {
        "recipe": json.dumps(asdict(recipe)),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "data": json.dumps(data.state()),
        "small": json.dumps(small.state()),
        "random": random.get_state(),
        "step": step,
        "running": running,
    }
    with replacing(run / "state.pt") as temporary:
        torch.save(state, temporary)


def _load(run: Path, recipe: Recipe) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{run / 'state.pt'} cannot be read ({error}); delete the folder to start again"
        ) from error
    if Recipe(**json.loads(state["recipe"])) != recipe:  # an older run lacks newer fields: their defaults
        raise CheckpointError(
            f"{run} holds a run with another recipe; name another folder or delete this one"
        )
    return state
