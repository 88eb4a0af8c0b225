"""The networks, each written once, float, with visible quantisation sites.

Adding one is a file and a line here; tests, command line and benchmarks read the same dictionary. Traced networks of
users (:class:`cadyq.backbones.graph.Graph`) stand beside it: their name alone does not say what they are.
"""

from __future__ import annotations

from typing import Any

from cadyq.backbones.blocks import Backbone
from cadyq.backbones.carn import CARN
from cadyq.backbones.edsr import EDSR
from cadyq.backbones.graph import Graph
from cadyq.backbones.idn import IDN
from cadyq.backbones.srresnet import SRResNet
from cadyq.errors import ArgumentError

__all__ = ["BACKBONES", "Backbone", "build_backbone"]

BACKBONES: dict[str, type[Backbone]] = {
    "edsr": EDSR,
    "srresnet": SRResNet,
    "idn": IDN,
    "carn": CARN,
}


def build_backbone(name: str, **config: Any) -> Backbone:
    """A fresh float network, for instance ``build_backbone("edsr", scale=4)``.

    Raises:
        ArgumentError: unknown name or configuration key.
    """
    kind = Graph if name == Graph.name else BACKBONES.get(name)
    if kind is None:
        raise ArgumentError("backbone", name, f"one of {', '.join(BACKBONES)}, or {Graph.name} with its ops")
    try:
        return kind(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            "config", config if kind is not Graph else list(config), f"the arguments of {name}", str(error)
        ) from error
