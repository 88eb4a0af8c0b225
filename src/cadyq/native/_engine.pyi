from typing import Any

from numpy.typing import NDArray

class Site: ...
class Conv: ...
class Skip: ...
class Layer: ...

def site(
    bits: list[int],
    step: float,
    counted: bool,
    multiplier: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    weight: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    log_offset: float,
    inverse_scale: NDArray[Any] | None,
) -> Site: ...
def conv(
    weight: NDArray[Any],
    factor: NDArray[Any],
    bias: NDArray[Any],
    slope: NDArray[Any] | None,
    site: Site | None,
    groups: int,
    levels: int,
    gain: NDArray[Any] | None,
) -> Conv: ...
def skip(
    parts: list[tuple[int, int, int]], ratio: NDArray[Any] | None, site: Site | None, shared: bool
) -> Skip: ...
def layer(
    src: list[tuple[int, int, int]],
    dst: int,
    conv: Conv,
    skip: Skip | None,
    shuffle: int,
    rectify: bool,
    borders: list[Conv],
) -> Layer: ...
def available() -> list[str]: ...

class Runner:
    def __init__(self, isa: str, scale: int, tile: int, threads: int) -> None: ...
    def add_plane(self, channels: int, level: int) -> None: ...
    def add_image_in(
        self, dst: int, multiplier8: NDArray[Any], multiplier16: NDArray[Any], offset: NDArray[Any]
    ) -> None: ...
    def add_layer(self, layer: Layer) -> None: ...
    def add_block(self, src: int, dst: int, residual: bool, layers: list[Layer]) -> None: ...
    def add_image_out(
        self,
        src: int,
        table8: NDArray[Any],
        table16: NDArray[Any],
        weight: NDArray[Any] | None,
        symmetric: bool,
        gain8: float,
        gain16: float,
    ) -> None: ...
    def finish(self) -> None: ...
    def run8(
        self,
        image: NDArray[Any],
        out: NDArray[Any],
        forced: NDArray[Any],
        exited: NDArray[Any],
        bits: NDArray[Any],
        choice: NDArray[Any],
    ) -> None: ...
    def run16(
        self,
        image: NDArray[Any],
        out: NDArray[Any],
        forced: NDArray[Any],
        exited: NDArray[Any],
        bits: NDArray[Any],
        choice: NDArray[Any],
    ) -> None: ...
    def profile(self) -> list[tuple[str, float]]: ...
