from typing import Any

from numpy.typing import NDArray

class Site: ...
class Conv: ...

def site(
    bits: list[int],
    step: float,
    multiplier: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    weight: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    log_offset: float,
) -> Site: ...
def conv(
    weight: NDArray[Any],
    factor: NDArray[Any],
    bias: NDArray[Any],
    slope: NDArray[Any] | None,
    site: Site | None,
) -> Conv: ...
def available() -> list[str]: ...

class Runner:
    def __init__(self, isa: str, scale: int, tile: int, threads: int) -> None: ...
    def add_plane(self, channels: int, level: int) -> None: ...
    def add_image_in(
        self, dst: int, multiplier8: NDArray[Any], multiplier16: NDArray[Any], offset: NDArray[Any]
    ) -> None: ...
    def add_layer(self, src: int, dst: int, residual: int, shuffle: int, conv: Conv) -> None: ...
    def add_block(self, src: int, dst: int, residual: bool, convs: list[Conv]) -> None: ...
    def add_image_out(self, src: int, table8: NDArray[Any], table16: NDArray[Any]) -> None: ...
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
