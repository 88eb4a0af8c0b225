"""Foreign weights: what they measure where data lies at hand, and what is refused."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cadyq.backbones.carn import CARN
from cadyq.backbones.idn import IDN
from cadyq.errors import CheckpointError
from cadyq.io.importers import import_float

# CADYQ_DATA is the folder of the data sets; the weights lie in it or beside it.
DATA = Path(os.environ.get("CADYQ_DATA") or Path(__file__).parents[2].parent / "shared" / "data")

Array = NDArray[np.float64]


def _weights(name: str) -> Path:
    for folder in (DATA / "weights", DATA.parent / "weights"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"no weights/{name} in or beside {DATA}; set CADYQ_DATA")


def _pictures() -> list[NDArray[np.uint8]]:
    paths = sorted((DATA / "eval" / "Set5").glob("*.*"))
    if not paths:
        pytest.skip(f"no Set5 in {DATA}; set CADYQ_DATA")
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def _round(x: Array) -> Array:
    return np.clip(np.floor(x + 0.5), 0, 255)


def _shrink_rows(x: Array, scale: int) -> Array:
    """MATLAB's antialiased bicubic along the first axis, symmetric border."""
    n = x.shape[0]
    rows = []
    for i in range(n // scale):
        center = (i + 0.5) * scale - 0.5
        taps = np.arange(math.floor(center - 2 * scale), math.ceil(center + 2 * scale) + 1)
        t = np.abs(center - taps) / scale
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
        folded = np.mod(taps, 2 * n)
        source = x[np.minimum(folded, 2 * n - 1 - folded)]
        rows.append(np.tensordot(weights / weights.sum(), source, 1))
    return _round(np.stack(rows))


def _luma(rgb: Array) -> Array:
    return rgb @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def _set5_psnr(network: Any, scale: int) -> float:
    """Mean PSNR in dB of Y, from the RGB output rounded to 8 bit, without ``scale`` border pixels."""
    values = []
    for picture in _pictures():
        height, width = (side // scale * scale for side in picture.shape[:2])
        hr = picture[:height, :width].astype(np.float64)
        lr = _shrink_rows(_shrink_rows(hr, scale).transpose(1, 0, 2), scale).transpose(1, 0, 2)
        with torch.no_grad():
            x = torch.from_numpy(lr.transpose(2, 0, 1).copy())[None].float() / 255
            sr = _round(network(x)[0].permute(1, 2, 0).double().numpy() * 255)
        error = (_luma(sr) - _luma(hr))[scale:-scale, scale:-scale]
        values.append(10 * math.log10(255**2 / float((error**2).mean())))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "scale", "expected_db"),
    [
        ("srresnet_x4_float.npz", 4, 32.01),
        ("edsr_x4_float.npz", 4, 31.70),
        ("idn_x2_float_y.npz", 2, 37.84),
        ("idn_x3_float_y.npz", 3, 34.12),
        ("idn_x4_float_y.npz", 4, 31.81),
        ("carn_m_float.pth", 2, 37.68),
        ("carn_m_float.pth", 3, 34.06),
        ("carn_m_float.pth", 4, 31.88),
    ],
)
def test_imported_networks_measure_what_they_should(name: str, scale: int, expected_db: float) -> None:
    network = import_float(_weights(name), scale)
    assert network.scale == scale and not network.training
    assert _set5_psnr(network, scale) == pytest.approx(expected_db, abs=0.03)


def test_carn_m_is_multi_scale_and_starts_at_4() -> None:
    network = import_float(_weights("carn_m_float.pth"))
    assert isinstance(network, CARN)
    assert network.scale == 4
    network.use_scale(3)
    assert network(torch.rand(1, 3, 6, 6)).shape == (1, 3, 18, 18)


def _idn_arrays() -> dict[str, Any]:
    """The authors' layout of an IDN with random weights."""
    arrays: dict[str, Any] = {}
    for key, value in IDN(2, luma=True).state_dict().items():
        parts = key.split(".")
        kind = "0" if parts[-1] == "weight" else "1"
        layer = parts[0].replace("head", "conv") if parts[0] != "up" else "upsample"
        if parts[0] == "body":
            block = int(parts[1])
            compress = parts[2] == "compress"
            layer = f"down{block + 1}" if compress else f"conv{block + 3}_{int(parts[3]) + 1}"
        arrays[f"{layer}.{kind}"] = value.numpy()
    return arrays


def test_idn_needs_its_scale(tmp_path: Path) -> None:
    path = tmp_path / "idn.npz"
    np.savez(path, **_idn_arrays())
    assert import_float(path, 3).scale == 3
    with pytest.raises(CheckpointError, match="give scale"):
        import_float(path)
    with pytest.raises(CheckpointError, match="scale is 5"):
        import_float(path, 5)


def test_known_layout_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "idn.npz"
    arrays = _idn_arrays()
    arrays["conv3_1.0"] = arrays["conv3_1.0"][:, :8]
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match=r"look like IDN.*do not fit"):
        import_float(path, 2)


def test_scale_of_a_single_scale_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "edsr.npz"
    marks = ("head.weight", "body.15.conv2.weight", "up.1.weight")
    np.savez(path, **{key: np.zeros(1, np.float32) for key in marks})
    with pytest.raises(CheckpointError, match="for scale 4, not 2"):
        import_float(path, 2)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "boom"
    torch.save({"entry.weight": _Bomb(target)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Bomb(target)))
    np.savez(tmp_path / "object.npz", **{"head.weight": np.array([_Bomb(target)], dtype=object)})  # type: ignore[arg-type]
    for name in ("zip.pth", "plain.pth", "object.npz"):
        with pytest.raises(CheckpointError, match="cannot be read as plain arrays"):
            import_float(tmp_path / name, 4)
    assert not target.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.pth"])
def test_damaged_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_float(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(CheckpointError, match="do not exist"):
            import_float(path)


@pytest.mark.parametrize("name", ["a.npz", "a.pth"])
def test_unknown_layout(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, **{"layer/kernel": np.zeros(3)})
    else:
        torch.save({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"no known layout; known: .*IDN.*CARN-M"):
        import_float(path)


def test_a_pth_that_is_not_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"

    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError):
        import_float(path)
