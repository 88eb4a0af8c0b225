"""The training queue: complete, ordered, buildable, resumable; data travels as shards."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from cadyq.backbones import BACKBONES
from cadyq.io.images import Picture, write_image
from cadyq.io.models import load_model, save_model
from cadyq.training.warmstart import load_source

SCRIPT = Path(__file__).parents[2] / "scripts" / "training_queue.py"


@pytest.fixture(scope="module")
def queue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_queue", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_queue"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A training folder with crops of 192x192, of two photos that train and of two that validate."""
    from cadyq.data.crops import split_of

    rng = np.random.default_rng(0)
    (tmp_path / "data" / "train").mkdir(parents=True)
    lines, seen, i = ["file,source,photo"], {"train": 0, "validation": 0}, 0
    while min(seen["train"] - 2, seen["validation"] - 1) < 0:
        split = split_of("here", str(i))
        if seen[split] < 2:
            seen[split] += 1
            noise = rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)
            write_image(tmp_path / "data" / "train" / f"{i}.png", Picture(noise))
            lines.append(f"{i}.png,here,{i}")
        i += 1
    (tmp_path / "data" / "train" / "manifest.csv").write_text("\n".join(lines))
    return tmp_path / "data"


def test_every_table_is_served_and_parents_come_first(queue: ModuleType) -> None:
    rows = queue.rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) == 59
    for row in rows:
        assert row.backbone in BACKBONES
        assert not row.parent or names.index(row.parent) < names.index(row.name)
    served = {table for row in rows for table in row.serves}
    assert served == {"main", "S1", "S2", "S3", "S4", "S5", "S7", "S8", "figure S2", "B.1", "comparison"}
    for table, count in {"S1": 12, "S2": 16, "S3": 2, "S4": 4, "figure S2": 4, "B.1": 3}.items():
        assert sum(table in row.serves for row in rows) == count, table


@pytest.mark.parametrize("full", [False, True])
def test_every_row_has_a_schedule(queue: ModuleType, full: bool) -> None:
    for row in queue.rows():
        init = "parent.safetensors" if row.parent else ""
        training = queue.training_of(row, full, init)
        (stage,) = training.stages
        carn = row.backbone == "carn"
        assert stage.recipe.steps == ((60_000 if carn else 30_000) if full else 3_000)
        assert stage.recipe.schedule == ("step" if full else "cosine")
        assert (stage.quantization is None) == (row.base == "float")
        if row.base == "cadyq":
            assert stage.teacher == stage.init == init and stage.recipe.w_attention_end == 1e3
            assert stage.recipe.bits == "selector"
            # The same way for the selectors in fewer steps.
            way = stage.recipe.lr_selector * stage.recipe.steps
            assert way == pytest.approx(60 if carn else 3)


def test_rows_are_trained_in_order_and_leave_small_results(
    queue: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    common = ["--home", str(tmp_path), "--root", str(data), "--steps", "1"]
    queue.main([*common, "--only", "idn-x4-pams8"])
    assert "waits for idn-x4-float" in capsys.readouterr().out
    superseded = tmp_path / "models" / "idn-x4-pams8.safetensors"
    superseded.parent.mkdir()
    superseded.touch()
    queue.main([*common, "--only", "idn-x4-[fp]*[!1-7]"])
    assert not superseded.exists()
    results = {p.name: json.loads(p.read_text()) for p in (tmp_path / "models" / "results").iterdir()}
    assert set(results) == {"idn-x4-float-short.json", "idn-x4-pams8-short.json"}
    result = results["idn-x4-pams8-short.json"]
    assert result["steps"] == 1 and result["init"] == "idn-x4-float.safetensors" and result["fqr"] == 8
    model = load_model(tmp_path / "models" / "idn-x4-pams8.safetensors.xz")
    assert model.quantization is not None and str(tmp_path) not in json.dumps(model.metadata)
    assert (tmp_path / "models" / "idn-x4-float.safetensors.xz").stat().st_size < 1_200_000  # float16
    capsys.readouterr()
    queue.main([*common, "--list", "--only", "idn-x4-*"])
    assert "2 of 17 done" in capsys.readouterr().out


def test_data_travels_in_shards(
    queue: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "SHARD_BYTES", 300_000)
    shards = queue.pack(data, None, tmp_path / "shards")
    assert len(shards) >= 2 and all(p.stat().st_size <= 300_000 for p in shards)
    for _ in range(2):
        queue.unpack(tmp_path / "shards", tmp_path / "there")
    for path in (data / "train").iterdir():
        assert (tmp_path / "there" / "data" / "train" / path.name).read_bytes() == path.read_bytes()


def test_half_precision_is_for_weights_only(tmp_path: Path) -> None:
    network = load_source("srresnet-x4-pams8")
    from cadyq.config import Quantization, from_mapping

    loaded = load_model("srresnet-x4-pams8")
    config = from_mapping(Quantization, loaded.metadata["quantization"]["conversion"])
    save_model(tmp_path / "half.safetensors", network, config, half=True)
    again = load_model(tmp_path / "half.safetensors").network
    for (name, a), (_, b) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=0 if a.dim() < 2 else 1e-3, atol=0 if a.dim() < 2 else 1e-7)
