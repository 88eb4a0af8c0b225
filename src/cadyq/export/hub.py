"""Models to and from the Hugging Face hub, through ``huggingface_hub`` (extra ``hub``).

A repository holds ``model.safetensors``, ``model.plan.safetensors`` where the engine can run the network, and a
model card, ``README.md``. Nothing else is ever fetched, and nothing that is fetched can run code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.errors import ArgumentError, CadyqError, MissingExtraError
from cadyq.io.files import replacing
from cadyq.io.plans import save_plan
from cadyq.io.shipped import model_name, model_path

if TYPE_CHECKING:
    from cadyq.upscale import Model

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

MODEL, PLAN, CARD = "model.safetensors", "model.plan.safetensors", "README.md"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "huggingface_hub is not installed, and the hub needs it; install it with: pip install 'cadyq[hub]'"
        ) from error
    return huggingface_hub


def save_pretrained(model: Model, folder: str | os.PathLike[str]) -> Path:
    """Write a model as a folder in the hub's layout; existing files are replaced one by one.

    Raises:
        OSError: as the file system does.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / PLAN).unlink(missing_ok=True)  # of the model that was there before
    with replacing(target / MODEL) as temporary:
        shutil.copyfile(model_path(model.name), temporary)
    if model.plan is not None:
        save_plan(target / PLAN, model.plan)
    with replacing(target / CARD) as temporary:
        temporary.write_text(_card(model), encoding="utf-8")
    return target


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Model:
    """Load a model from a folder in the hub's layout, or from the hub.

    Args:
        source: a folder, or a repository, ``OWNER/NAME``.
        revision: branch, tag or commit of the repository.
        cache_dir: where fetched files are kept; None is the hub's own cache.
        token: access token; None is the one that the hub's own tools have stored.

    Raises:
        ArgumentError: there is no such folder or repository, or it holds no model.
        CheckpointError: the model file is damaged or foreign. MissingExtraError: huggingface_hub is missing.
    """
    from cadyq.upscale import load

    folder = Path(source)
    if not folder.is_dir():
        folder = _fetched(os.fspath(source), revision, cache_dir, token)
    if not (folder / MODEL).is_file():
        raise ArgumentError("source", os.fspath(source), f"a folder or repository with a {MODEL}")
    return load(folder / MODEL)


def _fetched(
    source: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, token: str | bool | None
) -> Path:
    hub = _hub()
    try:
        return Path(
            hub.snapshot_download(
                source,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=[MODEL, PLAN, CARD],
            )
        )
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            "source", source, "an existing folder or a repository OWNER/NAME that can be reached", reason
        ) from error


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str = "Upload a cadyq model",
    token: str | None = None,
) -> str:
    """Upload a model, its plan and a model card; the repository is made if it does not exist.

    Args:
        model: what `cadyq.load` gave.
        repo_id: ``OWNER/NAME``.
        private: whether a new repository is private.
        commit_message: of the upload.
        token: access token with the right to write; None is the one that the hub's own tools have stored.

    Returns:
        The commit's address.

    Raises:
        CadyqError: the hub refuses. MissingExtraError: huggingface_hub is missing.
    """
    hub = _hub()
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CadyqError(f"{repo_id!r} cannot be written on the hub: {reason}") from error
    return str(done.commit_url)


def _card(model: Model) -> str:
    """Model card: what the hub's search reads, then how to use it, then the file's own record."""
    metadata = model.metadata
    figures = json.dumps(metadata.get("figures", {}), indent=2)
    training = json.dumps(metadata.get("training", {}), indent=2)
    return f"""---
license: {str(metadata.get("license", "unknown")).lower()}
library_name: cadyq
pipeline_tag: image-to-image
tags:
- super-resolution
- quantization
---

# {model_name(model.name)}

{metadata.get("backbone", "network")} for x{model.scale} image super-resolution, quantized by
cadyq.

```python
from cadyq.export.hub import from_pretrained

from_pretrained("OWNER/NAME").upscale("photo.png").save("photo_x{model.scale}.png")
```

## Figures

```json
{figures}
```

## Training

```json
{training}
```
"""
