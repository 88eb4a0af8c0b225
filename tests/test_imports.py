"""Imports go one way. This test is the architecture; docs/layout.md says why."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cadyq

SOURCE = Path(cadyq.__file__).parent

# What each room may import of the package. The most specific entry counts for a file.
ALLOWED = {
    "errors": (),
    "config": ("errors",),
    "functional": ("errors", "functional"),
    "native": ("errors", "functional", "native"),
    "cells": (),
    "engine": ("errors", "cells", "config", "functional", "native", "engine"),
    "quant": ("errors", "cells", "config", "functional", "quant"),
    "backbones": (
        "errors",
        "config",
        "functional",
        "quant.context",
        "quant.layers",
        "quant.site",
        "backbones",
    ),
    "io": (
        "errors",
        "cells",
        "functional",
        "io.checkpoints",
        "io.files",
        "io.images",
        "io.journal",
        "io.metadata",
        "io.stores",
        "io.stream",
    ),
    "io.plans": ("errors", "functional", "engine.plan", "engine.plan_arrays", "io"),
    "io.models": ("errors", "config", "functional", "quant", "backbones", "io"),
    "io.modules": ("errors", "backbones", "io"),
    "io.importers": ("errors", "config", "functional", "quant", "backbones", "io"),
    "data": ("errors", "functional", "io.files", "io.images", "data"),
    "training": (
        "errors",
        "cells",
        "config",
        "functional",
        "quant",
        "backbones",
        "native",
        "io",
        "data",
        "training",
    ),
    "deploy": ("errors", "cells", "config", "quant.infer", "backbones", "io", "lowering", "engine"),
    "calibrate": ("errors", "cells", "config", "quant", "backbones", "io", "data", "training", "deploy"),
    "lowering": ("errors", "config", "functional", "quant", "backbones", "engine", "lowering"),
    "bands": ("cells", "engine.exits", "functional"),
    "folders": ("errors", "io.files", "io.images", "io.journal"),
    "upscale": ("errors", "bands", "cells", "config", "functional", "io", "engine", "quant.infer", "deploy"),
    "pictures": ("errors", "cells", "functional", "io", "upscale"),
    "estimate": ("bands", "io.images", "io.stream", "pictures", "upscale"),
    "bulk": ("", "errors", "folders", "io.files", "io.journal", "io.stores", "pictures", "bulk"),
    "evaluate": ("errors", "functional", "io", "data", "upscale"),
    "audit": ("errors", "functional", "quant", "upscale"),
    "video": ("", "errors", "io", "upscale", "engine.reuse", "video"),
    "service": ("", "errors", "functional", "io", "pictures", "upscale", "service"),
    "export": ("errors", "engine", "io", "upscale", "export"),
    "report": (
        "",
        "errors",
        "config",
        "functional",
        "quant",
        "backbones",
        "engine",
        "lowering",
        "io",
        "data",
        "upscale",
        "evaluate",
        "report",
    ),
    "cli": (
        "",
        "errors",
        "config",
        "engine.plan",
        "io",
        "data",
        "estimate",
        "folders",
        "bulk",
        "pictures",
        "upscale",
        "evaluate",
        "audit",
        "calibrate",
        "training",
        "deploy",
        "lowering",
        "export",
        "report",
        "engine.synthetic",
        "service",
        "video",
        "cli",
    ),
    "__main__": ("cli",),
    "__init__": ("errors", "config", "functional", "io.images", "upscale"),
}
# Part of functional works on torch; everything else there is NumPy, as engine, native and the rest of io are.
TORCH_FREE = (
    "errors",
    "bands",
    "cells",
    "config",
    "functional",
    "native",
    "engine",
    "io",
    "data",
    "upscale",
    "folders",
    "bulk",
    "pictures",
    "estimate",
    "evaluate",
    "export",
    "report",
    "service",
    "video",
    "cli",
)
ON_TORCH = (
    "functional.quantize",
    "functional.losses",
    "io.models",
    "io.modules",
    "io.importers",
    "data.loader",
    "report.spy",
)

FILES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}


def _inside(name, room):
    return name == room or name.startswith(room + ".")


def _imports(path, *, top_level=False):
    """Names of imported modules; with ``top_level`` only those that importing the file imports."""
    tree = ast.parse(path.read_text())
    lazy = set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_typing or (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if top_level and node in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield from _resolved(node)


def _resolved(node):
    """Modules that ``from a import b`` names: a.b where that is a file of ours, else a."""
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        is_ours = inner.removeprefix("cadyq.") in FILES
        yield inner if inner.startswith("cadyq.") and is_ours else str(node.module)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    rooms = [room for room in ALLOWED if _inside(name, room)]
    if name.endswith(".__init__") and not rooms:
        rooms = [name.removesuffix(".__init__")]
    assert rooms, f"{name} lies in no known room; add it to ALLOWED and to docs/layout.md"
    allowed = ALLOWED[max(rooms, key=len)]
    for module in _imports(FILES[name]):
        if module != "cadyq" and not module.startswith("cadyq."):
            continue
        target = module.removeprefix("cadyq").removeprefix(".")
        assert any(_inside(target, room) for room in allowed), f"{name} must not import {module}"


@pytest.mark.parametrize("name", [n for n in FILES if any(_inside(n, room) for room in TORCH_FREE)])
def test_torch_stays_where_it_belongs(name):
    if any(_inside(name, room) for room in ON_TORCH):
        return
    imported = {module.split(".")[0] for module in _imports(FILES[name], top_level=True)}
    assert "torch" not in imported
    for module in _imports(FILES[name], top_level=True):
        target = module.removeprefix("cadyq.")
        on_torch = (*ON_TORCH, "quant", "backbones", "training", "calibrate", "deploy", "lowering")
        assert not any(_inside(target, room) for room in on_torch), f"{name} imports {module}, and so torch"


def test_engine_and_native_name_no_backbone():
    from cadyq.backbones import BACKBONES

    for room in ("engine", "native"):
        for path in (SOURCE / room).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".hpp"):
                words = path.read_text().lower()
                assert not [name for name in BACKBONES if name in words], f"{path} names a backbone"


def test_public_names():
    assert sorted(cadyq.__all__) == cadyq.__all__
    assert len(cadyq.__all__) <= 20
    for name in cadyq.__all__:
        assert getattr(cadyq, name) is not None
        assert name in dir(cadyq)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cadyq.no_such_name


def test_version_is_the_projects():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{cadyq.__version__}"' in project.read_text()


@pytest.mark.parametrize(
    "code",
    [
        "import cadyq; cadyq.Quantization, cadyq.load, cadyq.Model, cadyq.imresize, cadyq.read_image",
        "import cadyq.cli, cadyq.pictures, cadyq.folders, cadyq.bulk, cadyq.evaluate, cadyq.audit, cadyq.data.sets",
        "import cadyq.cli; cadyq.cli._parser().format_help()",
    ],
)
def test_importing_needs_no_torch(code):
    check = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {code}; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
