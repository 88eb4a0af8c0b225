"""Loaded models for all tests of what sits on networks."""

import os
from pathlib import Path

import pytest
from networks import save_network

from cadyq.backbones import BACKBONES
from cadyq.errors import CadyqError

# Models that only tables and tests need lie outside the package.
os.environ.setdefault("CADYQ_MODELS", str(Path(__file__).parents[1] / "models"))


@pytest.fixture(scope="session")
def model_files(tmp_path_factory):
    """Model files by name of the backbone."""
    folder = tmp_path_factory.mktemp("models")
    return {name: save_network(folder / f"{name}.safetensors", name) for name in BACKBONES}


@pytest.fixture(scope="session")
def models(model_files):
    """Loaded models by name of the backbone."""
    import torch

    from cadyq.upscale import load

    torch.set_num_threads(1)
    return {name: load(path) for name, path in model_files.items()}


@pytest.fixture
def raises_clearly():
    """Check that a call raises one of our errors whose message holds all the given words."""

    def check(kind, call, *words):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, CadyqError)
        for word in words:
            assert str(word) in str(caught.value)

    return check
