"""Fake-quantised torch network -> plan of the integer engine: the only room that knows both worlds.

**What can be lowered.** The network is run once and its operations are recorded (`cadyq.lowering.trace`), so it is
no matter which class it is or how its forward is written. It must take one RGB picture in [0, 1] and be made of

* `cadyq.quant.layers.Conv2d` (stride 1, odd kernel, padding k // 2, groups) and `ConvTranspose2d` (no groups; its
  result cut to stride times the size), each behind a `Site`; `cadyq.backbones.blocks.Bicubic`;
* relu, leaky_relu, prelu (also as modules); ``+`` of two values; cat, slices, narrow, split and chunk along channels;
  pixel_shuffle;
* on the picture: ``+ - * /`` with constants, one or per channel;
* behind the last convolution: the same, tanh, sigmoid, clamp, and ``+`` an enlargement of the picture (`Bicubic` or
  interpolate: nearest, bilinear, bicubic);
* sites of all kinds with PAMS, LSQ or (at body sites) LinQ, `Site(kind="stream")` for every value that is stored,
  `Context.run` for blocks of 3x3 or other convolutions at the picture's size, `Context.finish`.

It is converted with ``edges="integer"`` and ``stream_bits=16``. Batch norm is folded before. Everything else is refused
by name. Equation numbers are those of ``docs/numerics.md``.
"""

from __future__ import annotations

from torch import nn

from cadyq.config import Quantization
from cadyq.engine.plan import Plan
from cadyq.errors import UnsupportedError
from cadyq.lowering.collapse import collapse
from cadyq.lowering.emit import emit
from cadyq.lowering.trace import trace

__all__ = ["lower"]


def lower(network: nn.Module, config: Quantization, *, collapsed: bool = True) -> Plan:
    """Plan of a converted, calibrated network.

    Args:
        network: takes (N, 3, H, W) in [0, 1] and a context, as backbones do; in evaluation mode.
        config: what it was converted with.
        collapsed: replace a last stretch without nonlinearity by one convolution, where that saves work.

    Raises:
        UnsupportedError: a network or configuration without integer form; the message says what would have one.
    """
    if config.quantizer == "daq":
        raise UnsupportedError(
            "quantizer 'daq' (DAQ) has no integer form: every channel of every patch has its own grid, so no integer "
            "convolution can add them up; run it on torch, or convert with 'pams', 'linq' or 'lsq'"
        )
    if config.edges != "integer" or config.stream_bits != 16:
        raise UnsupportedError(
            f"edges {config.edges!r}, stream_bits {config.stream_bits}: the engine needs 'integer' and 16; "
            "convert again"
        )
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            raise UnsupportedError(
                f"{name} is a batch norm (batch_norm): fold it into the convolution before, then convert again"
            )
    was_training = network.training
    network.eval()
    try:
        graph = trace(network)
    finally:
        network.train(was_training)
    return emit(collapse(graph) if collapsed else graph, config.tile)
