"""Does every convolution that is counted as b bits really see at most 2^b levels?

The inputs are looked at where they enter a convolution, not where a site says it has quantized them: a
network that quantizes a feature and then convolves another one is found out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cadyq.errors import ArgumentError
from cadyq.upscale import ImageLike, Mode, Model, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cadyq.quant.site import Site

__all__ = ["Audit", "AuditRow", "audit"]

_FLOAT_BITS = 32


@dataclass
class AuditRow:
    """What one convolution saw.

    Attributes:
        conv: path of the convolution in the network.
        site: path of the site before it; empty if it has none.
        kind: the site's kind, ``body``, ``edge`` or ``fixed``; ``none`` without a site.
        group: what shares one grid: the ``layer``, or each ``channel`` where channels have own scales.
        n_cells: patches or tiles that were looked at; outside the body a whole plane is one.
        bits: bit-widths that were counted, ascending; [32] is float, which is not checked.
        levels: most distinct values that any group of any cell saw; 0 where it is float.
        allowed: 2^bits of that cell.
        violations: cells with more levels than 2^bits.
    """

    conv: str
    site: str
    kind: str
    group: Literal["layer", "channel"]
    n_cells: int = 0
    bits: list[int] = dataclasses.field(default_factory=list)
    levels: int = 0
    allowed: int = 0
    violations: int = 0

    @property
    def status(self) -> Literal["ok", "float", "fail", "not run"]:
        """``ok``, ``fail``, ``float`` (nothing is claimed), or ``not run`` (all its cells got 0 bits)."""
        if self.violations:
            return "fail"
        if not self.n_cells:
            return "not run"
        return "float" if self.bits == [_FLOAT_BITS] else "ok"


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        rows: one per convolution, in order of definition.
        mode: how the network ran.
        fqr: feature quantization rate of this run, in bits.
    """

    rows: tuple[AuditRow, ...]
    mode: Mode
    fqr: float

    @property
    def is_clean(self) -> bool:
        """Whether convolutions ran, and none saw more levels than it was counted with."""
        return any(row.n_cells for row in self.rows) and not any(row.violations for row in self.rows)

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON."""
        rows = [{**dataclasses.asdict(row), "status": row.status} for row in self.rows]
        return {"clean": self.is_clean, "mode": self.mode, "fqr": self.fqr, "convolutions": rows}


def audit(
    model: Model,
    image: ImageLike,
    *,
    mode: Mode = "tiles",
    tile: int | None = None,
    budget: float = 0.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Upscale a picture and count the distinct input values of every convolution, per cell and scale group.

    A cell is a tile (its halo included), a patch or the whole picture. Arguments and errors are those of
    `Model.upscale`; 0-bit cells are skipped, since what is computed there is thrown away.
    """
    if not isinstance(model, Model):
        raise ArgumentError("model", type(model).__name__, "a Model", "load it with cadyq.load")
    with _watched(model.loaded.network) as rows:
        result = model.upscale(
            image, mode=mode, tile=tile, budget=budget, threads=threads, progress=progress, runtime="torch"
        )
    return Audit(tuple(rows), mode, result.fqr)


@contextmanager
def _watched(network: nn.Module) -> Iterator[list[AuditRow]]:
    """Hook every convolution and every site of a network for a while."""
    from torch import nn

    from cadyq.quant.daq import DAQ
    from cadyq.quant.site import sites_of

    before = {id(site.conv): site for site in sites_of(network) if site.conv is not None}
    rows: list[AuditRow] = []
    # Per site, the bits that it reported last: the next call of its convolution belongs to them.
    said: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in before.values():
            stack.callback(site.register_forward_hook(partial(_listen, said)).remove)
        for name, conv in network.named_modules():
            if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                continue
            found = before.get(id(conv))
            scaled = getattr(conv, "in_scale", None) is not None
            by_channel = scaled or (found is not None and isinstance(found.quantizer, DAQ))
            kind, path = (found.kind, found.name) if found is not None else ("none", "")
            row = AuditRow(name, path, kind, "channel" if by_channel else "layer")
            rows.append(row)
            claims = found is not None and found.quantizer is not None
            stack.callback(conv.register_forward_pre_hook(partial(_look, said, row, claims)).remove)
        yield rows
    for row in rows:
        row.bits.sort()


def _listen(said: dict[str, Tensor], site: Site, args: tuple[Any, ...], output: Tensor) -> None:
    records = args[1].records
    if records and records[-1].name == site.name:
        said[site.name] = records[-1].bits


def _look(
    said: dict[str, Tensor], row: AuditRow, claims: bool, conv: nn.Module, args: tuple[Tensor, ...]
) -> None:
    x = args[0]
    bits = said.pop(row.site, None)
    if claims and bits is None:
        # The site was passed by: nobody knows how many bits this call counts as.
        row.n_cells += x.shape[0]
        row.violations += x.shape[0]
        return
    widths = [_FLOAT_BITS] * x.shape[0] if bits is None else [int(b) for b in bits.tolist()]
    if len(widths) != x.shape[0]:
        # A layer outside the body sees the plane of all tiles at once; tiles that exited count as 0.
        widths = [max(widths)] * x.shape[0]
    checked = [i for i, b in enumerate(widths) if 0 < b < _FLOAT_BITS]
    row.n_cells += sum(b > 0 for b in widths)
    row.bits = list({*row.bits, *(b for b in widths if b > 0)})
    if not checked:
        return
    for index, levels in zip(checked, _count_levels(x[checked], row.group == "channel"), strict=True):
        allowed = 2 ** widths[index]
        row.violations += levels > allowed
        # Keep the cell that comes closest to its limit, or is furthest beyond it.
        if not row.allowed or levels * row.allowed > row.levels * allowed:
            row.levels, row.allowed = levels, allowed


def _count_levels(x: Tensor, by_channel: bool) -> list[int]:
    """Most distinct values of any group, per element of ``x`` (n, C, H, W)."""
    values = x.flatten(2) if by_channel else x.flatten(1)[:, None]
    # NaN differs from everything, itself included, so that it is never taken for a level.
    ordered = values.sort(-1).values
    distinct = (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1
    return [int(n) for n in distinct.amax(1).tolist()]
