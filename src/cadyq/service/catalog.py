"""The models that a service offers, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cadyq.errors import ArgumentError
from cadyq.io.shipped import default_model, model_name, model_path, shipped_models
from cadyq.pictures import model
from cadyq.upscale import Model

__all__ = ["Catalog"]


class Catalog:
    """Models by the names that clients use; the first is the default.

    Args:
        models: names of shipped models or paths of model files, the service owner's; empty for all shipped.

    Raises:
        ArgumentError: one is unknown, or two have the same name.
    """

    def __init__(self, models: Sequence[str] = ()) -> None:
        self._sources: dict[str, str] = {}
        self._is_shipped = not models
        for source in models or self._shipped():
            model_path(source)
            name = model_name(source)
            if name in self._sources:
                raise ArgumentError("model", source, f"a name that is not taken ({name})", "rename the file")
            self._sources[name] = source

    @staticmethod
    def _shipped() -> list[str]:
        first = default_model()
        return [first, *(name for name in shipped_models() if name != first)]

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    @property
    def default(self) -> str:
        return self.names[0]

    def get(self, name: str) -> Model:
        """Return a model of the catalog; loading takes a moment the first time.

        Raises:
            ArgumentError: it is not offered.
        """
        if name not in self._sources:
            raise ArgumentError("model", name, f"one of {', '.join(self.names)}")
        return model(self._sources[name])

    def source(self, name: str | None) -> str | None:
        """What `cadyq.pictures.Wanted.model` is for a client's choice; None leaves it to the kind of picture.

        If the service's owner chose the models, the default one stands for None.
        """
        if name is None:
            return None if self._is_shipped else self._sources[self.default]
        self.get(name)
        return self._sources[name]

    def describe(self) -> list[dict[str, Any]]:
        """Say what is offered, fit for JSON."""
        return [self._describe(name, self.get(name)) for name in self.names]

    def _describe(self, name: str, model: Model) -> dict[str, Any]:
        body = [site for site in model.sites if site.kind == "body"]
        return {
            "name": name,
            "is_default": name == self.default,
            "scale": model.scale,
            "tile": model.tile,
            "candidate_bits": model.candidate_bits,
            "n_sites": len(body),
            "runtime": "engine" if model.engine is not None else "torch",
            "license": str(model.metadata.get("license", "not stated")),
        }
