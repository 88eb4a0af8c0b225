"""The commands: JSON with plain keys, clear mistakes, missing extras."""

import builtins
import json

import pytest
from networks import scene
from PIL import Image

from cadyq.cli import main


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(scene(40, 56)).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_reproduce(capsys, folder_of_networks, data_root, tmp_path):
    options = ("--quick", "--models", folder_of_networks, "--data", data_root, "--threads", 1, "--json")
    code, out, err = run(capsys, "reproduce", "S3", "S6", *options, "-o", tmp_path)
    assert code == 0
    record = json.loads(out)
    assert [t["table"] for t in record["tables"]] == ["S3", "S6"]
    assert record["quick"] is True
    assert record["tables"][0]["rows"][0]["published_bitops_g"] == 317.5
    assert "S3: " in err
    code, _, err = run(capsys, "reproduce", "S77", "-o", tmp_path)
    assert code == 2
    assert "S77" in err


def test_compare_mistakes(capsys, folder_of_networks, data_root, tmp_path):
    options = ("--models", folder_of_networks, "--data", data_root, "-o", tmp_path)
    code, _, err = run(capsys, "compare", "--backbone", "vdsr", *options)
    assert code == 2
    assert "srresnet x4" in err
    code, _, err = run(capsys, "compare", "Set14", *options)
    assert code == 5
    assert "Set14" in err


def test_profile(capsys, folder_of_networks, picture):
    model = folder_of_networks / "srresnet-cadyq.safetensors"
    code, out, _ = run(capsys, "profile", model, picture, "--repeats", 1, "--threads", 1, "--json")
    assert code == 0
    record = json.loads(out)
    assert {"parameters", "storage_bytes", "macs_g", "bitops_g", "energy_mj", "stages", "convs"} <= set(
        record
    )
    code, out, _ = run(capsys, "profile", model, picture, "--repeats", 1, "--threads", 1)
    assert "shared out by MACs" in out
    assert run(capsys, "profile", model, picture, "--repeats", 0)[0] == 2


def test_explain(capsys, folder_of_networks, picture, tmp_path, monkeypatch):
    model = folder_of_networks / "srresnet-cadyq.safetensors"
    words = ("explain", picture, "--model", model, "--threads", 1, "-o", tmp_path / "page")
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert len(json.loads(out)["files"]) == 6
    assert run(capsys, "explain", tmp_path / "none.png", "--model", model)[0] == 3
    original = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = run(capsys, *words[:-1], tmp_path / "other")
    assert code == 7
    assert "cadyq[report]" in err
    assert not (tmp_path / "other").exists()
