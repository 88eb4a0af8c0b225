"""Which model a name is, and which is taken where none is named."""

import pytest

from cadyq.errors import ArgumentError
from cadyq.io import shipped


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_folder", lambda: tmp_path)
    return tmp_path


def offer(folder, *names, size=1):
    for name in names:
        (folder / f"{name}.safetensors").write_bytes(bytes(size))


@pytest.fixture
def several(folder):
    offer(folder, "srresnet-x2", "srresnet_x4_8bit", "srresnet_x4_cadyq", "srresnet_x4_cadyq_photo", "zzz-x4")


@pytest.mark.usefixtures("several")
def test_the_default_model_is_content_aware():
    assert shipped.default_model() == "srresnet_x4_cadyq"
    assert shipped.default_model(2) == "srresnet-x2"
    with pytest.raises(ArgumentError, match="scale is 3"):
        shipped.default_model(3)


def test_a_model_whose_cells_can_exit_comes_first(folder):
    offer(folder, "srresnet_x4_cadyq", "srresnet_x4_exit", "srresnet_x4_photo")
    assert shipped.default_model() == "srresnet_x4_exit"
    assert shipped.default_model(photo=True) == "srresnet_x4_photo"


def test_of_several_of_a_kind_the_largest_is_taken(folder):
    offer(folder, "idn-x4-exit", size=10)
    offer(folder, "srresnet-x4-exit", size=20)
    assert shipped.default_model() == "srresnet-x4-exit"


@pytest.mark.usefixtures("several")
def test_a_compressed_photo_gets_the_photo_network_where_there_is_one():
    assert shipped.default_model(photo=True) == "srresnet_x4_cadyq_photo"
    assert shipped.default_model(2, photo=True) == "srresnet-x2"


@pytest.mark.usefixtures("several")
def test_scales():
    assert shipped.shipped_scales() == [2, 4]


def test_names_of_files(tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    for name in ("b.safetensors.xz", "b.safetensors", "a.safetensors.xz", "c.plan.safetensors", "README.md"):
        (other / name).touch()
    (other / "b.plan.safetensors").touch()
    assert {name: path.name for name, path in shipped.model_files(other).items()} == {
        "a": "a.safetensors.xz",
        "b": "b.safetensors",
        "c": "c.plan.safetensors",
    }
    assert [
        shipped.model_name(other / f"v1.2{s}") for s in (*shipped.MODEL_SUFFIXES, ".plan.safetensors")
    ] == ["v1.2"] * 3
    monkeypatch.setenv("CADYQ_MODELS", str(other))
    assert shipped.model_path("a") == other / "a.safetensors.xz"
    assert shipped.plan_path("b") == shipped.plan_path(other / "b.safetensors.xz")
    assert shipped.plan_path("b") == other / "b.plan.safetensors" and shipped.plan_path("a") is None
    with pytest.raises(ArgumentError, match="model is 'd'"):
        shipped.model_path("d")
