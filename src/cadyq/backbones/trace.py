"""A float ``torch.nn.Module`` -> a flat list of operations, by torch.fx; what it cannot express is refused by name.

The module is run once on an example while it is traced, so that code which looks at shapes finds numbers. Constants are
folded: batch norms, scales and mean shifts go into the convolutions wherever that changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cadyq.errors import UnsupportedError

__all__ = ["RANGES", "SUPPORTED", "InRange", "Step", "simplify", "trace"]

SUPPORTED = (
    "Conv2d (stride 1, odd square kernel, zero padding k // 2, groups), ConvTranspose2d (no groups), "
    "BatchNorm2d (in evaluation), ReLU, ReLU6, LeakyReLU, PReLU, tanh, sigmoid, hardtanh, clamp, +, -, "
    "multiplication by and addition of constants (also per channel), cat, chunk, split and slices along channels, "
    "pixel_shuffle, interpolate and Upsample (nearest, bilinear, bicubic by a whole factor), dropout, identity"
)

RANGES: dict[str, tuple[float, float, float, float]] = {
    "0:1": (0, 1, 0, 1),
    "0:255": (0, 255, 0, 255),
    "-1:1": (-1, 1, -1, 1),
    "0:1,-1:1": (0, 1, -1, 1),
}
"""Ranges that networks take and return: black and white of the input, black and white of the output."""


class InRange(nn.Module):
    """A user's module as a function from [0, 1] to [0, 1].

    Args:
        module: in evaluation mode.
        value_range: a key of `RANGES`.
        arguments: further arguments of its forward, by name.
    """

    def __init__(self, module: nn.Module, value_range: str, arguments: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self.black, self.white, self.out_black, self.out_white = RANGES[value_range]
        self.arguments = arguments or {}

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, scale H, scale W)."""
        y = self.module(x * (self.white - self.black) + self.black, **self.arguments)
        result: Tensor = (y - self.out_black) / (self.out_white - self.out_black)
        return result


@dataclass
class Step:
    """One operation: its ``kind`` and ``data`` are those of :mod:`cadyq.backbones.graph`.

    Attributes:
        layer: where it stands in the user's module.
        tensors: ``weight`` and ``bias``, ``scale`` and ``offset`` (per channel or one), float64.
    """

    kind: str
    inputs: list[str]
    out: str
    layer: str
    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Ref(str):
    """Name of a value that depends on the picture."""


class _Value(fx.Proxy):
    """A proxy that knows the example's value, so that shapes are numbers."""

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)

    def size(self, *dim: int) -> Any:
        return self.value.size(*dim)

    def dim(self) -> int:
        return int(self.value.dim())

    def __len__(self) -> int:
        return len(self.value)


class _Tracer(fx.Tracer):
    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.is_running = False  # modules then do what they do, untraced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = next((kind for kind in _MODULES if isinstance(m, kind)), None)
        if known is not None and type(m).forward is not known.forward:
            return False  # a subclass that does something else
        return known is not None or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(len(obj.node.meta["value"]))])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.is_running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, *rest, **more)
        if kind == "get_attr":  # constants come without a proxy
            node.meta["value"] = operator.attrgetter(str(node.target))(self.root)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        proxy.node.meta["layer"] = str(target) if kind == "call_module" else self.scope.module_path
        self.is_running = True
        try:
            proxy.node.meta["value"] = self._evaluate(proxy.node)
        finally:
            self.is_running = False
        return proxy

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.example
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        with torch.no_grad():
            if node.op == "get_attr":
                return node.meta["value"]
            if node.op == "call_module":
                module = self.root.get_submodule(str(node.target))
                if not isinstance(module, tuple(_MODULES)):
                    raise _refusal(str(node.target), type(module).__name__)
                return module(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs) if callable(node.target) else None


def trace(module: nn.Module, example: Tensor) -> list[Step]:
    """Operations of a module in evaluation mode; the last one's result is the network's.

    Args:
        module: takes (N, 3, H, W) and returns (N, 3, scale H, scale W).
        example: a picture to run it on.

    Raises:
        UnsupportedError: it cannot be traced, or holds an operator that is not in `SUPPORTED`.
    """
    tracer = _Tracer(example)
    try:
        with torch.no_grad():
            module(example)  # weights behind hooks (weight norm) exist only after a run
        graph = tracer.trace(module)
    except UnsupportedError:
        raise
    except Exception as error:
        what = type(getattr(module, "module", module)).__name__
        raise UnsupportedError(
            f"{what} cannot be traced by torch.fx ({type(error).__name__}: {error}); expected "
            "a forward that takes one picture (N, 3, H, W) and whose course does not depend on pixels"
        ) from error
    converter = _Converter(module)
    result: Any = None
    for node in graph.nodes:
        if node.op == "output":
            result = converter.value(node.args[0])
        else:
            converter.take(node)
    if not isinstance(result, Ref):
        raise UnsupportedError(
            f"{type(module).__name__} returns {type(result).__name__}, expected one picture"
        )
    return _needed(converter.steps, result)


class _Converter:
    """Turns nodes into steps. Methods ``op_*`` have the parameters of torch's functions of that name."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps: list[Step] = []
        self.known: dict[fx.Node, Any] = {}
        self.uncut: dict[
            str, int
        ] = {}  # transposed convolutions' results that must be cut, and to what factor
        self.shapes: dict[str, torch.Size] = {}
        self.node: fx.Node

    def take(self, node: fx.Node) -> None:
        self.node = node
        if node.op == "placeholder":
            self.known[node] = Ref("x") if not self.known else None
        else:
            self.known[node] = self._take(node)
        values, found = node.meta["value"], self.known[node]
        if isinstance(found, Ref):
            self.shapes[found] = values.shape
        elif isinstance(found, list) and _depends(found):
            self.shapes.update((ref, part.shape) for ref, part in zip(found, values, strict=True))

    def _take(self, node: fx.Node) -> Any:
        slicing = node.op == "call_function" and node.target is operator.getitem
        args = [self.value(a, uncut=slicing) for a in node.args]
        kwargs = {key: self.value(a) for key, a in node.kwargs.items()}
        if not any(_depends(a) for a in (*args, *kwargs.values())):
            return node.meta["value"]
        if node.op == "call_module":
            return self._module(self.module.get_submodule(str(node.target)), *args)
        return self._call(node.target, args, kwargs)

    def value(self, argument: Any, *, uncut: bool = False) -> Any:
        if isinstance(argument, fx.Node):
            found = self.known[argument]
            if isinstance(found, Ref) and found in self.uncut and not uncut:
                raise self.refused(
                    "a transposed convolution whose result is not a multiple of its input's size"
                )
            return found
        if isinstance(argument, list | tuple):
            return type(argument)(self.value(a) for a in argument)
        return argument

    def refused(self, what: str) -> UnsupportedError:
        return _refusal(self.node.meta.get("layer") or self.node.name, what)

    def emit(
        self, kind: str, *inputs: str, data: dict[str, Any] | None = None, **tensors: Tensor | None
    ) -> Ref:
        out = Ref(f"v{len(self.steps)}")
        found = {key: t.detach().double().cpu().clone() for key, t in tensors.items() if t is not None}
        layer = _users_name(self.node.meta["layer"] or self.node.name)
        self.steps.append(Step(kind, list(inputs), out, layer, data or {}, found))
        self.shapes[out] = self.shapes[inputs[0]]  # until the node's own is known
        return out

    def _module(self, module: nn.Module, *args: Any) -> Any:
        for kind, read in _MODULES.items():
            if isinstance(module, kind):
                name, arguments = read(module)
                return getattr(self, f"op_{name}")(*args, **arguments)
        raise self.refused(type(module).__name__)

    def _call(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        home = "torch" if isinstance(target, str) else (getattr(target, "__module__", None) or "torch")
        handler = getattr(self, f"op_{_ALIASES.get(name, name)}", None)
        if handler is None or home.split(".")[0] not in ("torch", "_operator", "math"):
            raise self.refused(name)
        try:
            return handler(*args, **kwargs)
        except TypeError as error:
            raise self.refused(f"{name} with these arguments ({error})") from error

    # Layers with weights.

    def op_conv2d(
        self,
        input: Ref,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> Ref:
        self._constants(weight, bias)
        kernel = weight.shape[2]
        if _pair(stride) != (1, 1) or _pair(dilation) != (1, 1) or padding_mode != "zeros":
            raise self.refused(
                f"a convolution of stride {stride}, dilation {dilation}, padding {padding_mode!r}"
            )
        if weight.shape[3] != kernel or kernel % 2 == 0:
            raise self.refused(f"a convolution of kernel {tuple(weight.shape[2:])}")
        if padding != "same" and _pair(padding) != (kernel // 2, kernel // 2):
            raise self.refused(f"a convolution of kernel {kernel} with padding {padding}")
        channels = [weight.shape[1] * groups, weight.shape[0]]
        if kernel == 1 and groups == 1 and channels[0] == channels[1] <= 4 and _is_diagonal(weight):
            return self.emit(
                "affine", input, scale=weight.flatten(1).diagonal(), offset=_or_zeros(bias, weight)
            )
        data = {"channels": channels, "kernel": kernel, "groups": groups}
        return self.emit("conv", input, data=data, weight=weight, bias=bias)

    def op_conv_transpose2d(
        self,
        input: Ref,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Ref:
        self._constants(weight, bias)
        (factor, other), (pad, pad2), (extra, extra2) = map(_pair, (stride, padding, output_padding))
        kernel = weight.shape[2]
        square = factor == other and pad == pad2 and extra == extra2 and weight.shape[3] == kernel
        if not square or groups != 1 or _pair(dilation) != (1, 1) or factor < 2:
            raise self.refused("a transposed convolution with groups or dilation, not square, or of stride 1")
        if extra:  # rows that output_padding adds at the end are those of a kernel with zeros there
            weight = F.pad(weight, (0, extra, 0, extra))
            kernel += extra
        surplus = kernel - factor - 2 * pad
        if surplus < 0:
            raise self.refused("a transposed convolution whose result is smaller than stride times its input")
        data = {
            "channels": list(weight.shape[:2]),
            "kernel": kernel,
            "groups": 1,
            "stride": factor,
            "padding": pad,
        }
        out = self.emit("deconv", input, data=data, weight=weight, bias=bias)
        if surplus:
            self.uncut[out] = factor
        return out

    def op_batch_norm(
        self,
        input: Ref,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Ref:
        if running_mean is None or training:
            raise self.refused("batch norm without running statistics")
        gain = torch.rsqrt(running_var.double() + eps) * (1 if weight is None else weight.double())
        return self.emit(
            "affine", input, scale=gain, offset=_or_zeros(bias, gain).double() - running_mean.double() * gain
        )

    # Activations.

    def op_relu(self, input: Ref, inplace: bool = False) -> Ref:
        return self.emit("relu", input)

    def op_leaky_relu(self, input: Ref, negative_slope: float = 0.01, inplace: bool = False) -> Ref:
        return self.emit("leaky", input, data={"slope": float(negative_slope)})

    def op_prelu(self, input: Ref, weight: Any) -> Ref:
        self._constants(weight)
        return self.emit("prelu", input, data={"slopes": weight.numel()}, weight=weight.flatten())

    def op_tanh(self, input: Ref) -> Ref:
        return self.emit("tanh", input)

    def op_sigmoid(self, input: Ref) -> Ref:
        return self.emit("sigmoid", input)

    def op_clamp(self, input: Ref, min: Any = None, max: Any = None) -> Ref:
        # Not infinities: JSON has none.
        low, high = (limit if other is None else float(other) for other, limit in ((min, -1e30), (max, 1e30)))
        return self.emit("clamp", input, data={"low": low, "high": high})

    def op_hardtanh(
        self, input: Ref, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
    ) -> Ref:
        return self.op_clamp(input, min_val, max_val)

    def op_identity(self, input: Ref, *_: Any, **__: Any) -> Ref:
        return input

    # Arithmetic.

    def op_add(self, input: Any, other: Any, *, alpha: float = 1) -> Ref:
        if alpha != 1:
            other = self.op_mul(other, alpha) if isinstance(other, Ref) else other * alpha
        if isinstance(input, Ref) and isinstance(other, Ref):
            if self.shapes[input] != self.shapes[other]:
                raise self.refused("a sum of features of different shapes")
            return self.emit("add", input, other)
        ref, constant = (input, other) if isinstance(input, Ref) else (other, input)
        return self._affine(ref, 1.0, constant)

    def op_sub(self, input: Any, other: Any, *, alpha: float = 1) -> Ref:
        return self.op_add(input, other, alpha=-alpha)

    def op_neg(self, input: Ref) -> Ref:
        return self._affine(input, -1.0, 0.0)

    def op_mul(self, input: Any, other: Any) -> Ref:
        if isinstance(input, Ref) and isinstance(other, Ref):
            raise self.refused("a product of two features (attention)")
        ref, constant = (input, other) if isinstance(input, Ref) else (other, input)
        return self._affine(ref, constant, 0.0)

    def op_truediv(self, input: Any, other: Any, *, rounding_mode: Any = None) -> Ref:
        if isinstance(other, Ref) or rounding_mode is not None:
            raise self.refused("a division by a feature, or one that rounds")
        return self._affine(input, 1 / other, 0.0)

    # Shapes.

    def op_cat(self, tensors: Sequence[Any], dim: int = 0) -> Ref:
        if dim not in (1, -3) or not all(isinstance(t, Ref) for t in tensors):
            raise self.refused(f"cat along dimension {dim}, or of constants")
        return self.emit("cat", *tensors)

    def op_chunk(self, input: Ref, chunks: int, dim: int = 0) -> list[Ref]:
        return self._parts(input, dim)

    def op_split(self, input: Ref, split_size: Any, dim: int = 0) -> list[Ref]:
        return self._parts(input, dim)

    def op_narrow(self, input: Ref, dim: int, start: int, length: int) -> Ref:
        return self._slice(input, start, start + length) if dim in (1, -3) else self._whole(input)

    def op_getitem(self, input: Any, index: Any) -> Any:
        if not isinstance(input, Ref):
            return input[index]
        before, after = self.shapes[input], self.node.meta["value"].shape
        if len(after) != 4 or after[0] != before[0]:
            raise self.refused(f"indexing by {index}")
        if input in self.uncut:
            return self._cut(input, index, after)
        if after[2:] != before[2:]:
            raise self.refused("cutting a feature's height or width")
        if after == before:
            return input
        if isinstance(index, tuple) and Ellipsis in index:
            i = index.index(Ellipsis)
            index = (*index[:i], *[slice(None)] * (5 - len(index)), *index[i + 1 :])
        channel = index[1] if isinstance(index, tuple) and len(index) > 1 else None
        if not isinstance(channel, slice) or channel.step not in (None, 1):
            raise self.refused(f"indexing by {index}")
        start, stop, _ = channel.indices(before[1])
        return self._slice(input, start, stop)

    def op_pixel_shuffle(self, input: Ref, upscale_factor: int) -> Ref:
        return self.emit("shuffle", input, data={"factor": int(upscale_factor)})

    def op_interpolate(
        self,
        input: Ref,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: Any = None,
        antialias: bool = False,
    ) -> Ref:
        before, after = self.shapes[input], self.node.meta["value"].shape
        factor = after[2] // before[2]
        if (after[2], after[3]) != (factor * before[2], factor * before[3]) or factor < 1:
            raise self.refused(f"interpolate from {tuple(before[2:])} to {tuple(after[2:])}")
        mode = "nearest" if mode == "nearest-exact" else mode
        if mode not in ("nearest", "bilinear", "bicubic") or align_corners or antialias:
            raise self.refused(
                f"interpolate with mode {mode!r}, align_corners {align_corners}, antialias {antialias}"
            )
        return input if factor == 1 else self.emit("resize", input, data={"factor": factor, "mode": mode})

    # Helpers.

    def _constants(self, *values: Any) -> None:
        if any(isinstance(v, Ref) for v in values):
            raise self.refused("a layer whose weights depend on the picture")

    def _affine(self, ref: Ref, scale: Any, offset: Any) -> Ref:
        channels = self.node.meta["value"].shape[1]
        return self.emit(
            "affine",
            ref,
            scale=self._per_channel(scale, channels),
            offset=self._per_channel(offset, channels),
        )

    def _per_channel(self, constant: Any, channels: int) -> Tensor:
        value = torch.as_tensor(constant, dtype=torch.float64)
        if value.numel() == 1:
            return value.reshape(1)
        if value.dim() in (3, 4) and value.numel() == channels == value.shape[-3]:
            return value.flatten()
        raise self.refused(
            f"a constant of shape {tuple(value.shape)} (expected one value, or one per channel)"
        )

    def _parts(self, input: Ref, dim: int) -> list[Ref]:
        if dim not in (1, -3):
            raise self.refused(f"a split along dimension {dim}")
        result, start = [], 0
        for part in self.node.meta["value"]:
            result.append(self._slice(input, start, start + part.shape[1]))
            start += part.shape[1]
        return result

    def _slice(self, input: Ref, start: int, stop: int) -> Ref:
        return self.emit("slice", input, data={"start": int(start), "stop": int(stop)})

    def _whole(self, input: Ref) -> Ref:
        if self.shapes[input] != self.node.meta["value"].shape:
            raise self.refused("cutting a feature's height or width")
        return input

    def _cut(self, input: Ref, index: Any, after: torch.Size) -> Ref:
        """The step itself cuts to a multiple of its input's size; the slice must ask for just that."""
        step = next(s for s in self.steps if s.out in (input, f"{input}c"))
        base = self.shapes[step.inputs[0]]
        wanted = (self.uncut[input] * base[2], self.uncut[input] * base[3])
        spatial = index[-2:] if isinstance(index, tuple) else ()
        starts_at_0 = len(spatial) == 2 and all(isinstance(s, slice) and not s.start for s in spatial)
        if (after[2], after[3]) != wanted or not starts_at_0:
            raise self.refused("cutting a feature's height or width")
        step.out = f"{input}c"
        return Ref(step.out)


def _users_name(layer: str) -> str:
    """A layer's path without that of `InRange`."""
    return layer.removeprefix("module.")


def _refusal(layer: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {_users_name(layer)!r}: {what} is not supported; supported are {SUPPORTED}"
    )


def _depends(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(map(_depends, argument))
    return isinstance(argument, Ref)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return int(first), int(second)


def _or_zeros(bias: Any, like: Tensor) -> Tensor:
    return torch.zeros(like.shape[0]) if bias is None else torch.as_tensor(bias)


def _is_diagonal(weight: Tensor) -> bool:
    square = weight.flatten(1)
    return bool((square == torch.diag(square.diagonal())).all())


def _weights(m: Any) -> dict[str, Any]:
    return {key: getattr(m, key) for key in ("weight", "bias", "stride", "padding", "dilation", "groups")}


_MODULES: dict[type[nn.Module], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    nn.Conv2d: lambda m: ("conv2d", {**_weights(m), "padding_mode": m.padding_mode}),
    nn.ConvTranspose2d: lambda m: (
        "conv_transpose2d", {**_weights(m), "output_padding": m.output_padding}
    ),
    nn.BatchNorm2d: lambda m: (
        "batch_norm",
        {key: getattr(m, key) for key in ("running_mean", "running_var", "weight", "bias", "eps")},
    ),
    nn.ReLU6: lambda m: ("hardtanh", {"min_val": 0.0, "max_val": 6.0}),
    nn.Hardtanh: lambda m: ("hardtanh", {"min_val": m.min_val, "max_val": m.max_val}),
    nn.ReLU: lambda m: ("relu", {}),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"negative_slope": m.negative_slope}),
    nn.PReLU: lambda m: ("prelu", {"weight": m.weight}),
    nn.Tanh: lambda m: ("tanh", {}),
    nn.Sigmoid: lambda m: ("sigmoid", {}),
    nn.PixelShuffle: lambda m: ("pixel_shuffle", {"upscale_factor": m.upscale_factor}),
    nn.Upsample: lambda m: ("interpolate", {"mode": m.mode, "align_corners": m.align_corners}),
    nn.Identity: lambda m: ("identity", {}),
    nn.Dropout: lambda m: ("identity", {}),
    nn.Dropout2d: lambda m: ("identity", {}),
}  # fmt: skip
_ALIASES = {
    **{
        f"{name}_": name
        for name in ("relu", "leaky_relu", "add", "sub", "mul", "clamp", "tanh", "sigmoid", "neg")
    },
    **{f"i{name}": name for name in ("add", "sub", "mul", "truediv")},
    **dict.fromkeys(
        ("contiguous", "to", "float", "type_as", "clone", "detach", "dropout", "dropout2d"), "identity"
    ),
    "div": "truediv",
    "div_": "truediv",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "multiply": "mul",
    "subtract": "sub",
    "hardtanh_": "hardtanh",
}


def _needed(steps: list[Step], result: str) -> list[Step]:
    """Steps that ``result`` depends on; it is the last one's."""
    alive, kept = {result}, []
    for step in reversed(steps):
        if step.out in alive:
            alive.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def simplify(steps: list[Step]) -> list[Step]:
    """Fold constants: affine steps into each other and into convolutions; drop a last clamp to [0, 1].

    The result is the same function (a picture is clamped to [0, 1] at the end in any case).
    """
    steps = [replace(s, inputs=list(s.inputs), tensors=dict(s.tensors)) for s in steps]
    while _fold_one(steps):
        pass
    return steps


def _fold_one(steps: list[Step]) -> bool:
    """Apply the first rule that fits anywhere, in place."""
    made = {step.out: step for step in steps}
    users: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.inputs:
            users.setdefault(name, []).append(step)
    if _drop_last_clamp(steps, made):
        return True
    for step in steps:
        if step.kind != "affine":
            continue
        if (
            bool((step.tensors["scale"] == 1).all() and (step.tensors["offset"] == 0).all())
            and step is not steps[-1]
        ):
            _bypass(steps, step)
            return True
        if _into_producer(step, made, users) or _into_consumers(step, users.get(step.out, [])):
            if step.kind == "affine" and step.data.get("folded"):
                _bypass(steps, step)
            return True
    return False


def _bypass(steps: list[Step], step: Step) -> None:
    """Remove a step whose result is its input."""
    source = step.inputs[0]
    if step is steps[-1]:  # the result keeps being the last step's
        producer = next(s for s in steps if s.out == source)
        steps.remove(step)
        steps.remove(producer)
        steps.append(producer)
        return
    for other in steps:
        other.inputs = [source if name == step.out else name for name in other.inputs]
    steps.remove(step)


def _drop_last_clamp(steps: list[Step], made: dict[str, Step]) -> bool:
    last, scale, offset = steps[-1], 1.0, 0.0
    if last.kind == "affine" and last.tensors["scale"].numel() == last.tensors["offset"].numel() == 1:
        scale, offset = float(last.tensors["scale"]), float(last.tensors["offset"])
        last = made.get(last.inputs[0], last)
    if last.kind != "clamp" or scale <= 0 or last.inputs[0] not in made:
        return False
    if any(last.out in s.inputs for s in steps if s is not steps[-1]):
        return False
    low, high = (scale * last.data[key] + offset for key in ("low", "high"))
    if low > 1e-6 or high < 1 - 1e-6:
        return False
    _bypass(steps, last)
    return True


def _into_producer(step: Step, made: dict[str, Step], users: dict[str, list[Step]]) -> bool:
    """affine(affine(x)), affine(conv(x)) and affine(shuffle(conv(x))), where nothing else looks in between."""
    scale, offset = step.tensors["scale"], step.tensors["offset"]
    producer = made.get(step.inputs[0])
    repeat = 1
    if producer is not None and producer.kind == "shuffle" and len(users[producer.out]) == 1:
        repeat = producer.data["factor"] ** 2
        producer = made.get(producer.inputs[0])
    if producer is None or len(users[producer.out]) != 1:
        return False
    if producer.kind == "affine" and repeat == 1:
        inner = producer.tensors
        producer.tensors = {"scale": scale * inner["scale"], "offset": scale * inner["offset"] + offset}
    elif producer.kind in ("conv", "deconv"):
        weight = producer.tensors["weight"]
        n_out = producer.data["channels"][1]
        scale, offset = (
            t.repeat_interleave(repeat).expand(n_out) if t.numel() > 1 else t for t in (scale, offset)
        )
        shape = (-1, 1, 1, 1) if producer.kind == "conv" else (1, -1, 1, 1)
        bias = producer.tensors.get("bias", torch.zeros(n_out, dtype=torch.float64))
        producer.tensors = {"weight": weight * scale.view(shape), "bias": bias * scale + offset}
    else:
        return False
    step.data["folded"] = True
    return True


def _into_consumers(step: Step, users: list[Step]) -> bool:
    """conv(s x + o) = (s conv)(x + o / s): the scale always, the offset where there is no padding."""
    scale, offset = step.tensors["scale"], step.tensors["offset"]
    if not users or any(u.kind != "conv" for u in users) or bool((scale == 0).any()):
        return False
    pointwise = all(u.data["kernel"] == 1 for u in users)
    if bool((scale == 1).all()) and not pointwise:
        return False
    for user in users:
        weight, (n_in, n_out) = user.tensors["weight"], user.data["channels"]
        groups = user.data["groups"]
        gain, shift = (t.expand(n_in).view(groups, -1) for t in (scale, offset))
        gain, shift = (t.repeat_interleave(n_out // groups, 0)[:, :, None, None] for t in (gain, shift))
        if pointwise:
            bias = user.tensors.get("bias", torch.zeros(n_out, dtype=torch.float64))
            user.tensors["bias"] = bias + (weight * shift).sum((1, 2, 3))
        user.tensors["weight"] = weight * gain
    if pointwise:
        step.data["folded"] = True
    step.tensors = {"scale": torch.ones(1, dtype=torch.float64), "offset": offset / scale}
    return True
