"""Schedule and losses of one stage of training, as a frozen dataclass that TOML files and checkpoints hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from cadyq.errors import ArgumentError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Schedule of one stage.

    Attributes:
        steps: updates of the weights.
        epoch: steps per epoch, in which ``decay_epochs`` and ``w_reg_step`` are counted.
        batch: patches per step, over all processes together.
        patch: side of the LR patches; ``small_patch`` is used for the first ``small_share`` of the steps.
        lr: learning rate of the network's weights, scaled per tensor by its initial root mean square if
            ``lr_by_rms`` (folded batch norms leave tensors that differ 200 times in size).
        lr_clip: learning rate of clips and steps: ``relative`` to their initial value, or in ``gray`` levels
            (the paper's 0.01 is for pictures of 0..255; ours are in [0, 1]), see ``clip_unit``.
        lr_selector: learning rate of the bit selectors.
        schedule: ``cosine`` down to 1 %, or ``step``: times ``decay`` at each of ``decay_epochs``.
        warmup: steps of linear warm-up, with either schedule.
        clip_norm: largest norm of all gradients together; 0 is none.
        ema: decay of the exponential moving average of the weights, which is what a stage yields; 0 is none.
        w_reg: weight of the bit loss at the start, raised by ``w_reg_step`` every epoch.
        target_fqr: mean bits to be reached: a controller moves the bit loss's weight (`cadyq.training.target`)
            where selectors are trained, and their biases are placed in the end; 0 is no target.
        w_teacher: weight of L1 to the teacher's picture. ``w_attention_end`` and ``w_attention``: weights of
            attention transfer at the body's last and at every block's output (1e3 and 1e2 in the paper).
        bits: ``selector``: as the selectors choose, which learn from it; ``chosen``: as they choose, and they stay as
            they are; ``random``: at random per patch and site, so that the network works for every choice; ``mixed``:
            ``selector`` and ``random`` in turn; ``largest``: the largest candidate.
        freeze_norms: batch norms keep their statistics, as quantized networks need it.
        degrade: whether the low-resolution patches are damaged (`cadyq.data.degrade`), for the ``photo`` networks.
        validate_every: steps between two measurements on validation crops (and one at the end); 0 is never.
        validation_crops: how many; they are the first of the split.
        best_share: the checkpoint with the best validation within this last share of the steps is what the stage
            yields; where bits are being learned, early ones are better only because they are dearer.
        seed: of patches, damage and random bits.
    """

    steps: int
    epoch: int = 100
    batch: int = 16
    patch: int = 48
    small_patch: int = 32
    small_share: float = 0.0
    lr: float = 1e-4
    lr_by_rms: bool = True
    lr_clip: float = 2e-3
    clip_unit: Literal["relative", "gray"] = "relative"
    lr_selector: float = 1e-4
    schedule: Literal["cosine", "step"] = "cosine"
    decay: float = 0.5
    decay_epochs: tuple[int, ...] = ()
    warmup: int = 50
    clip_norm: float = 50.0
    ema: float = 0.998
    w_reg: float = 0.0
    w_reg_step: float = 0.0
    target_fqr: float = 0.0
    w_teacher: float = 0.0
    w_attention_end: float = 0.0
    w_attention: float = 0.0
    bits: Literal["selector", "chosen", "random", "mixed", "largest"] = "largest"
    freeze_norms: bool = True
    degrade: bool = False
    validate_every: int = 0
    validation_crops: int = 24
    best_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "epoch", "batch", "patch", "small_patch", "validation_crops"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "at least 1")
        choices = {
            "clip_unit": ("relative", "gray"),
            "schedule": ("cosine", "step"),
            "bits": ("selector", "chosen", "random", "mixed", "largest"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError(name, getattr(self, name), f"one of {', '.join(allowed)}")
        for name in ("small_share", "best_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(name, getattr(self, name), "0 to 1")
        if not 0 <= self.ema < 1:
            raise ArgumentError("ema", self.ema, "at least 0 and below 1")
        if self.schedule == "step" and not self.decay_epochs:
            raise ArgumentError("decay_epochs", self.decay_epochs, "at least one epoch with schedule = step")
        if self.target_fqr and self.bits == "largest":
            raise ArgumentError("target_fqr", self.target_fqr, "0 with bits = largest")

    @property
    def epochs(self) -> float:
        """Length in epochs."""
        return self.steps / self.epoch

    def rate(self, step: int) -> float:
        """Learning rate of a step relative to the base."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "step":
            return warm * self.decay ** sum(step >= e * self.epoch for e in self.decay_epochs)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def bit_weight(self, step: int) -> float:
        """Weight of the bit loss at a step: w_reg(e) = w_reg + w_reg_step * e."""
        return self.w_reg + self.w_reg_step * (step // self.epoch)

    def shortened(self, steps: int) -> Recipe:
        """The same schedule squeezed into fewer steps: epochs, warm-up and validation shrink with it.

        Raises `ArgumentError` unless ``steps`` is positive; more steps than there are stretch it.
        """
        factor = steps / self.steps

        def scaled(n: int) -> int:
            return max(1, round(n * factor)) if n else 0

        return dataclasses.replace(
            self,
            steps=steps,
            epoch=scaled(self.epoch),
            warmup=min(self.warmup, scaled(self.warmup)),
            validate_every=scaled(self.validate_every),
        )
