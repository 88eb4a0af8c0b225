"""What every table and figure is made from: the networks, the lab, and a folder for pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadyq.errors import CadyqError
from cadyq.evaluate import Evaluation
from cadyq.report.lab import Lab, Request
from cadyq.report.networks import Network, find
from cadyq.report.table import Table
from cadyq.report.variants import Subject

__all__ = ["Bench", "Builder", "short_of"]


@dataclass(frozen=True)
class Bench:
    """Networks, lab and output of one run.

    Attributes:
        networks: what `scan` found.
        lab: measures and remembers.
        folder: where figures go.
        models: folders that networks were looked for in.
    """

    networks: Sequence[Network]
    lab: Lab
    folder: Path
    models: tuple[Path, ...] = ()

    def find(self, backbone: str, scale: int, method: str) -> Network | None:
        """The best network of a kind, see `find`."""
        return find(self.networks, backbone, scale, method)

    def subject(self, network: Network, *, bits: int | None = None, variant: str = "") -> Subject:
        """A network, or a variant of it."""
        return Subject(network, bits, variant, self.models)

    def dynamic(self, scale: int = 4) -> list[Network]:
        """The CADyQ networks of a scale, one per backbone, the paper's four first."""
        found = (self.find(name, scale, "CADyQ") for name in ("edsr", "srresnet", "carn", "idn"))
        return [network for network in found if network is not None]

    def measure(self, request: Request) -> tuple[Evaluation | None, str]:
        """An evaluation and ``measured``, or None and why not (which is a table's cell, not a crash)."""
        scale = request.subject.network.scale
        if not self.lab.has(request.data, scale):
            left_out = self.lab.limit(request.data, scale) == 0
            return None, "left out by --quick" if left_out else f"no data: {request.data} was not found"
        try:
            found = self.lab.evaluate(request)
        except CadyqError as error:
            return None, short_of(error)
        return found, "measured" if found is not None else "planned"


Builder = Callable[[Bench], Table]


def short_of(error: Exception) -> str:
    """The first clause of an error, for a cell."""
    return str(error).split(";")[0]


def figures_of(found: Evaluation | None) -> dict[str, Any]:
    """The columns of a quality table."""
    if found is None:
        return {}
    s = found.summary
    return {
        "fqr": s.fqr,
        "fqr_area": s.fqr_area,
        "psnr_db": s.psnr_db,
        "ssim": s.ssim,
        "bitops_g": s.bitops_g,
        "exited": s.exited,
        "zeros": s.zeros,
        "n_images": s.n_images,
    }
