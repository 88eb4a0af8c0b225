"""Compiled kernels. Each module is optional: what needs one falls back to NumPy or torch, and says so."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

__all__ = ["load_native"]


def load_native(name: str) -> ModuleType | None:
    """Import ``cadyq.native.NAME``; ``None`` if it was not built, or the environment says ``CADYQ_NATIVE=0``."""
    if os.environ.get("CADYQ_NATIVE") == "0":
        return None
    try:
        return importlib.import_module(f"cadyq.native.{name}")
    except ImportError:
        return None
