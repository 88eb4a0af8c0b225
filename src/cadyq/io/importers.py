"""Float weights of other origin, into our backbones. The only place that knows foreign layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.backbones.carn import CARN
from cadyq.backbones.edsr import EDSR
from cadyq.backbones.idn import IDN
from cadyq.backbones.srresnet import ResidualBlock, SRResNet
from cadyq.errors import CheckpointError

__all__ = ["IMPORTERS", "import_float"]

Arrays = Mapping[str, NDArray[Any]]


def _keras_conv(conv: nn.Module, arrays: Arrays, index: int, shuffle: int = 1) -> None:
    """HWIO kernel -> OIHW; depth-to-space counts (row, column, channel), torch (channel, row, column)."""
    name = "conv2d" if index == 0 else f"conv2d_{index}"
    weight = torch.from_numpy(arrays[f"{name}/kernel"].transpose(3, 2, 0, 1).copy())
    bias = torch.from_numpy(arrays[f"{name}/bias"].copy())
    if shuffle > 1:
        order = torch.arange(len(bias)).view(shuffle, shuffle, -1).permute(2, 0, 1).flatten()
        weight, bias = weight[order], bias[order]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)


def _keras_norm(norm: nn.Module, arrays: Arrays, index: int) -> None:
    name = "batch_normalization_v1" if index == 0 else f"batch_normalization_v1_{index}"
    assert isinstance(norm, nn.BatchNorm2d)
    targets = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for target, key in zip(targets, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True):
        assert target is not None
        target.copy_(torch.from_numpy(arrays[f"{name}/{key}"]))


def _keras_prelu(act: nn.Module, arrays: Arrays, index: int) -> None:
    assert isinstance(act, nn.PReLU)
    name = "p_re_lu" if index == 0 else f"p_re_lu_{index}"
    act.weight.copy_(torch.from_numpy(arrays[f"{name}/alpha"].reshape(-1)))


@torch.no_grad()
def _srresnet_keras(arrays: Arrays, scale: int | None) -> Backbone:
    _only(scale, 4)
    network = SRResNet(scale=4, keras=True)
    _keras_conv(network.head, arrays, 0)
    _keras_prelu(network.head_act, arrays, 0)
    for i, block in enumerate(network.body):
        assert isinstance(block, ResidualBlock)
        _keras_conv(block.conv1, arrays, 1 + 2 * i)
        _keras_norm(block.norm1, arrays, 2 * i)
        _keras_prelu(block.act, arrays, 1 + i)
        _keras_conv(block.conv2, arrays, 2 + 2 * i)
        _keras_norm(block.norm2, arrays, 2 * i + 1)
    _keras_conv(network.body_end, arrays, 33)
    _keras_norm(network.body_end_norm, arrays, 32)
    for i, (conv, act) in enumerate(zip(network.up.convs, network.up.acts, strict=True)):
        _keras_conv(conv, arrays, 34 + i, shuffle=2)
        _keras_prelu(act, arrays, 17 + i)
    _keras_conv(network.tail, arrays, 36)
    return network


def _edsr(arrays: Arrays, scale: int | None) -> Backbone:
    _only(scale, 4)
    network = EDSR(scale=4)
    state = {key.replace("up.", "up.convs.", 1): torch.from_numpy(value) for key, value in arrays.items()}
    network.load_state_dict(state, strict=True)
    return network


def _idn_name(key: str) -> str:
    """``conv3_1.0`` is the weight and ``conv3_1.1`` the bias of the first block's first convolution."""
    layer, kind = key.rsplit(".", 1)
    if layer == "upsample":
        name = "up"
    elif match := re.fullmatch(r"down(\d)", layer):
        name = f"body.{int(match[1]) - 1}.compress"
    elif match := re.fullmatch(r"conv(\d)_(\d)", layer):
        name = f"body.{int(match[1]) - 3}.convs.{int(match[2]) - 1}"
    else:
        name = layer.replace("conv", "head")
    return f"{name}.{'weight' if kind == '0' else 'bias'}"


def _idn_luma(arrays: Arrays, scale: int | None) -> Backbone:
    if scale is None:
        raise ValueError("all scales have the same shapes; give scale")
    network = IDN(scale, luma=True, bicubic="matlab")
    state = {_idn_name(key): torch.from_numpy(value) for key, value in arrays.items()}
    network.load_state_dict(state, strict=True)
    return network


def _carn_m_name(key: str) -> str:
    """``b1.b1.body.2`` is the second convolution of the first cascade, ``b1.c3.body.0`` its last fusion."""
    rules: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
        (r"b(\d)\.b1\.body\.(\d)\.", lambda m: f"body.{int(m[1]) - 1}.blocks.0.{_BODY[m[2]]}."),
        (r"b(\d)\.c(\d)\.body\.0\.", lambda m: f"body.{int(m[1]) - 1}.fusions.convs.{int(m[2]) - 1}."),
        (r"c(\d)\.body\.0\.", lambda m: f"fusions.convs.{int(m[1]) - 1}."),
        (r"upsample\.up(\d)\.body\.(\d)\.", lambda m: f"ups.{m[1]}.convs.{int(m[2]) // 3}."),
    )
    for pattern, name in rules:
        if match := re.match(pattern, key):
            return name(match) + key[match.end() :]
    return key


# Positions in the Sequential of a grouped residual block; ReLUs stand between them.
_BODY = {"0": "conv1", "2": "conv2", "4": "pointwise"}


def _carn_m(arrays: Arrays, scale: int | None) -> Backbone:
    network = CARN(scale or 4, groups=4, shared=True, multi=True)
    # The mean shifts hold DIV2K's mean, which the backbone has as a constant.
    own = {key: value for key, value in arrays.items() if ".shifter." not in key}
    network.load_state_dict({_carn_m_name(k): torch.from_numpy(v) for k, v in own.items()}, strict=True)
    return network


def _only(scale: int | None, own: int) -> None:
    if scale not in (None, own):
        raise ValueError(f"they are for scale {own}, not {scale}")


def _is(arrays: Arrays, *keys: str) -> bool:
    return all(key in arrays for key in keys)


# Recognised by the keys they hold: (what it is, test, importer).
IMPORTERS: list[tuple[str, Callable[[Arrays], bool], Callable[[Arrays, int | None], Backbone]]] = [
    ("SRResNet x4, Keras", lambda a: _is(a, "conv2d_36/kernel", "p_re_lu_18/alpha"), _srresnet_keras),
    ("EDSR-baseline x4", lambda a: _is(a, "head.weight", "body.15.conv2.weight", "up.1.weight"), _edsr),
    ("IDN for Y, Caffe names", lambda a: _is(a, "conv3_1.0", "down4.1", "upsample.0"), _idn_luma),
    ("CARN-M, all scales", lambda a: _is(a, "b1.b1.body.4.weight", "upsample.up3.body.0.weight"), _carn_m),
]


def import_float(path: str | Path, scale: int | None = None) -> Backbone:
    """Float network from a foreign weight file (``.npz``, or ``.pth`` read with ``weights_only=True``).

    Args:
        path: the file.
        scale: needed where the weights do not tell it (IDN); chooses the scale of a multi-scale network
            (CARN-M, 4 if not given); otherwise checked.

    Raises:
        CheckpointError: missing, unreadable, would run code, of no known layout, or not of this scale.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights {str(path)!r} do not exist; give the path of a .npz or .pth file")
    try:
        arrays = _read(path)
    except Exception as error:
        raise CheckpointError(
            f"weights {str(path)!r} cannot be read as plain arrays ({type(error).__name__}); expected an "
            ".npz of arrays or a .pth state dict without code"
        ) from error
    for what, matches, build in IMPORTERS:
        if matches(arrays):
            try:
                return build(arrays, scale).eval()
            except (KeyError, ValueError, RuntimeError, AssertionError) as error:
                raise CheckpointError(
                    f"weights {str(path)!r} look like {what} but do not fit: {error}"
                ) from error
    known = ", ".join(what for what, _, _ in IMPORTERS)
    raise CheckpointError(f"weights {str(path)!r} are of no known layout; known: {known}")


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npz":
        # np.load leaves a damaged file open if it opened it itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.numpy() for key, value in state.items() if isinstance(value, Tensor)}
