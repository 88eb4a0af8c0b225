"""Training kernels; arrays are float32 CPU tensors, images (N, C, H, W) with adjacent channels."""

from torch import Tensor

def isas() -> list[str]: ...
def empty(n: int, c: int, h: int, w: int) -> Tensor: ...
def release() -> None: ...
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    pre: Tensor | None,
    act: int,
    slope: float,
    slopes: Tensor | None,
    groups: int,
    shuffle: int,
    n_threads: int,
    isa: str = "",
) -> None: ...
def conv_input_grad(
    dy: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    dx: Tensor,
    act: int,
    slope: float,
    slopes: Tensor | None,
    groups: int,
    shuffle: int,
    n_threads: int,
    isa: str = "",
) -> None: ...
def conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    dweight: Tensor,
    dbias: Tensor | None,
    dslopes: Tensor | None,
    act: int,
    slope: float,
    slopes: Tensor | None,
    groups: int,
    shuffle: int,
    n_threads: int,
    isa: str = "",
) -> None: ...
def mixture_forward(
    x: Tensor,
    scale: Tensor,
    clip: Tensor,
    levels: Tensor,
    chosen: Tensor,
    is_signed: bool,
    y: Tensor,
    n_threads: int,
    isa: str = "",
) -> None: ...
def mixture_backward(
    x: Tensor,
    scale: Tensor,
    clip: Tensor,
    levels: Tensor,
    prob: Tensor,
    is_signed: bool,
    dy: Tensor,
    dx: Tensor,
    dprob: Tensor,
    dclip: Tensor,
    n_threads: int,
    isa: str = "",
) -> None: ...
def deviation(x: Tensor, result: Tensor, n_threads: int, isa: str = "") -> None: ...
