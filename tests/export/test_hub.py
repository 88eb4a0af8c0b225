"""Models to and from the hub: a folder in its layout, and the hub itself replaced by one."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from networks import save_network, scene

from cadyq.config import Quantization
from cadyq.errors import ArgumentError, CadyqError, CheckpointError, MissingExtraError
from cadyq.export.hub import from_pretrained, push_to_hub, save_pretrained
from cadyq.upscale import load

hub = pytest.importorskip("huggingface_hub")
SHIPPED = "srresnet-x4-pams8"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub that is a folder: what is uploaded can be fetched, and nothing else is."""
    home, calls = tmp_path / "remote", []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            (home / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, home / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, revision, cache_dir, token, allow_patterns):
        calls.append(("fetch", repo_id, revision))
        if not (home / repo_id).is_dir():
            raise OSError(f"no {repo_id}")
        target = tmp_path / "cache" / repo_id
        ignored = shutil.ignore_patterns("*.bin")
        assert all("*" not in pattern for pattern in allow_patterns)
        shutil.copytree(home / repo_id, target, dirs_exist_ok=True, ignore=ignored)
        return str(target)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return home, calls


def test_folder_and_back(tmp_path):
    model, picture = load(SHIPPED), scene(20, 24)
    folder = save_pretrained(model, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "model.plan.safetensors",
        "model.safetensors",
    ]
    back = from_pretrained(folder)
    assert back.engine is not None
    np.testing.assert_array_equal(back.upscale(picture).pixels, model.upscale(picture).pixels)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: cadyq\n")
    assert "Urban100" in card
    assert hub.ModelCard(card).data.license == "apache-2.0"


def test_model_without_a_plan(tmp_path):
    """It does not keep the plan of the model whose place it takes."""
    save_pretrained(load("srresnet-x4-exit"), tmp_path / "out")
    model = load(save_network(tmp_path / "m.safetensors", "idn", Quantization()))
    folder = save_pretrained(model, tmp_path / "out")
    assert not (folder / "model.plan.safetensors").exists()
    picture = scene(16, 16)
    found = from_pretrained(folder).upscale(picture, threads=1).pixels
    np.testing.assert_array_equal(found, model.upscale(picture, threads=1).pixels)


def test_up_and_down(remote):
    home, calls = remote
    model = load(SHIPPED)
    assert push_to_hub(model, "me/net", private=True, token="t") == "https://hub/me/net/commit/1"
    assert calls[:2] == [("token", "t"), ("create", "me/net", True, True)]
    (home / "me/net/pytorch_model.bin").write_bytes(b"\x80\x02")
    back = from_pretrained("me/net", revision="main")
    assert calls[-1] == ("fetch", "me/net", "main")
    assert back.metadata["figures"] == model.metadata["figures"]


def test_mistakes(remote, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="OWNER/NAME"):
        from_pretrained("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\x80\x02junk")
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path / "empty")

    def refuse(self, *_, **__):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(CadyqError, match="403"):
        push_to_hub(load(SHIPPED), "me/net")


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"cadyq\[hub\]"):
        from_pretrained("me/net")
