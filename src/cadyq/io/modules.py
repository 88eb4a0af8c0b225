"""Float networks as users have them: our model file, weights of a known layout, code, or a file for spandrel."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadyq.errors import ArgumentError, CheckpointError, MissingExtraError
from cadyq.io.importers import import_float
from cadyq.io.models import load_model
from cadyq.io.shipped import MODEL_SUFFIXES

__all__ = ["load_module"]

_NESTED = ("params_ema", "params", "state_dict", "model", "net")


def load_module(
    source: str | os.PathLike[str], *, weights: str | os.PathLike[str] | None = None, scale: int | None = None
) -> nn.Module:
    """Float network from one of four kinds of source, in evaluation mode.

    Args:
        source: ``FILE.py:NAME``, where NAME is a module, or a class or function without arguments that makes one (this
            runs the file); a float model file of ours; weights whose layout `import_float` knows; or any file that
            spandrel recognizes, if it is installed.
        weights: state dict for ``FILE.py:NAME``, read without running code.
        scale: for weights that do not tell it.

    Raises:
        ArgumentError: the source is none of these, or ``weights`` is given where it has no meaning.
        CheckpointError: the weights cannot be read, or do not fit.
        MissingExtraError: only spandrel might know the file, and it is not installed.
    """
    text = os.fspath(source)
    file, separator, name = text.rpartition(":")
    if separator and file.endswith(".py"):
        return _from_code(Path(file), name, weights)
    if weights is not None:
        raise ArgumentError("weights", os.fspath(weights), "no weights beside a file that holds them")
    path = Path(text)
    if not path.is_file():
        raise ArgumentError("float", text, "an existing file, or FILE.py:NAME")
    if path.name.endswith(MODEL_SUFFIXES):
        try:
            loaded = load_model(path)
        except CheckpointError as error:
            return _by_spandrel(path, error)
        if loaded.quantization is not None:
            raise ArgumentError("float", text, "a float network", "this one is quantized already")
        return loaded.network
    try:
        return import_float(path, scale)
    except CheckpointError as error:
        return _by_spandrel(path, error)


def _from_code(file: Path, name: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    if not file.is_file():
        raise ArgumentError("float", f"{file}:{name}", "an existing Python file before the colon")
    spec = importlib.util.spec_from_file_location(f"_user_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))  # so that it finds its neighbors
    try:
        spec.loader.exec_module(code)
        made = getattr(code, name, None)
        if made is None:
            raise ArgumentError("float", f"{file}:{name}", f"a name that {file} defines after the colon")
        module = made if isinstance(made, nn.Module) else made()
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            "float", f"{file}:{name}", "code that runs without arguments", f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(file.parent.resolve()))
    if not isinstance(module, nn.Module):
        raise ArgumentError("float", f"{file}:{name}", f"a torch.nn.Module, not {type(module).__name__}")
    if weights is not None:
        _fill(module, Path(weights))
    return module.eval()


def _fill(module: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"weights {str(path)!r} cannot be read without running code ({type(error).__name__}); expected a state dict"
        ) from error
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    found = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    try:
        module.load_state_dict(found, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"weights {str(path)!r} do not fit {type(module).__name__}: {error}") from error


def _by_spandrel(path: Path, first: CheckpointError) -> nn.Module:
    try:
        spandrel: Any = importlib.import_module("spandrel")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{first}. spandrel knows more layouts: pip install spandrel; or give FILE.py:NAME and --weights"
        ) from error
    try:
        found = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:
        raise CheckpointError(f"{first}. spandrel says: {error}") from error
    module = getattr(found, "model", None)
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{path}: spandrel found {type(found).__name__}, expected one network")
    return module.eval()
