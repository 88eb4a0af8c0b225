"""Variants of one network: forced bits, look-ups, other selectors."""

import numpy as np
import pytest
from networks import scene

from cadyq.errors import CheckpointError
from cadyq.io.checkpoints import save_checkpoint
from cadyq.report.networks import find, read_network, scan
from cadyq.report.variants import SCORES, Subject, fitted_for, score_tiles


@pytest.fixture
def network(folder_of_networks):
    return find(scan([folder_of_networks], shipped=False), "srresnet", 4, "CADyQ")


@pytest.fixture
def fitted(network, tmp_path):
    """Variants whose outcome is known: by edges 4 or 8 bits; a selector that loves gradients; {4, 8} only."""
    sites = len(Subject(network).load().sites)
    arrays = {
        "by edges/limits": np.array([0.02]),
        "by edges/table": np.array([[4] * sites, [8] * sites], np.uint8),
        # As in a network where another site has more inputs: what is behind this one's does not count.
        "gradient/slope": np.hstack([np.ones((sites, 2)), np.full((sites, 3), 99.0)]).astype(np.float32),
        "gradient/offset": np.tile([12.0, 9.0], (sites, 1)),
        "4;8/slope": np.ones((sites, 2), np.float32),
        "4;8/offset": np.full((sites, 1), 9.0),
    }
    variants = {
        "by edges": {"kind": "lookup", "score": "edges", "per_picture": False},
        "gradient": {"kind": "selector", "inputs": "gradient", "bits": [4, 6, 8]},
        "4;8": {"kind": "selector", "inputs": "gradient", "bits": [4, 8]},
    }
    (tmp_path / "selectors").mkdir()

    def write(base):
        record = {"base": base, "variants": variants}
        path = tmp_path / "selectors" / f"{network.name}.safetensors"
        save_checkpoint(path, arrays, {"backbone": "srresnet", "scale": 4, "quantization": record})

    write(network.weights_digest())
    return tmp_path, write


def half(side=32):
    """Left flat, right busy."""
    picture = np.full((side, 2 * side, 3), 100, np.uint8)
    picture[:, side:] = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    return picture


def test_shipped_variants_belong_to_the_shipped_network():
    assert "gradient" in fitted_for(read_network("srresnet-x4-cadyq")).variants


def test_forced(network):
    result = Subject(network, bits=6).load().upscale(scene(24, 40), threads=1)
    assert result.fqr == 6


def test_lookup_sees_content(network, fitted):
    result = Subject(network, variant="by edges", models=(fitted[0],)).load().upscale(half(), threads=1)
    assert result.runtime == "engine"
    for bits in result.bits.values():
        assert (bits[:, :2] == 4).all()
        assert (bits[:, 2:] == 8).all()


def test_selectors_are_equal_on_both_runtimes(network, fitted):
    for name, offered in (("gradient", {4, 6, 8}), ("4;8", {4, 8})):
        model = Subject(network, variant=name, models=(fitted[0],)).load()
        picture = np.concatenate([half(), scene(32, 64)])
        engine, torch = (model.upscale(picture, threads=1, runtime=r) for r in ("engine", "torch"))
        seen = set()
        for site, bits in engine.bits.items():
            np.testing.assert_array_equal(bits, torch.bits[site])
            seen |= set(np.unique(bits).tolist())
        assert seen == offered


def test_other_weights_are_refused(network, fitted, raises_clearly):
    folder, write = fitted
    write("of something else")
    subject = Subject(network, variant="gradient", models=(folder,))
    raises_clearly(CheckpointError, subject.load, "other weights", "fit_variants")
    raises_clearly(CheckpointError, Subject(network, variant="gradient").load, "no variants", network.name)


def test_scores():
    flat, busy = half()[:, :32], half()[:, 32:]
    for name in SCORES:
        (low,), (high,) = (score_tiles(p, 32, name).ravel() for p in (flat, busy))
        assert low < high, name
    assert score_tiles(flat, 32, "entropy")[0, 0] == 0
    assert score_tiles(np.concatenate([flat, busy]), 16, "edges").shape == (4, 2)
