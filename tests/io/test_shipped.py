"""Which model is taken where none is named."""

import pytest

from cadyq.errors import ArgumentError
from cadyq.io import shipped


@pytest.fixture(autouse=True)
def names(monkeypatch):
    names = ["srresnet-x2", "srresnet_x4_8bit", "srresnet_x4_cadyq", "srresnet_x4_cadyq_photo", "zzz-x4"]
    monkeypatch.setattr(shipped, "shipped_models", lambda: names)
    return names


def test_the_default_model_is_content_aware():
    assert shipped.default_model() == "srresnet_x4_cadyq"
    assert shipped.default_model(2) == "srresnet-x2"
    with pytest.raises(ArgumentError, match="scale is 3"):
        shipped.default_model(3)


def test_a_model_whose_cells_can_exit_comes_first(monkeypatch):
    names = ["srresnet_x4_cadyq", "srresnet_x4_exit", "srresnet_x4_photo"]
    monkeypatch.setattr(shipped, "shipped_models", lambda: names)
    assert shipped.default_model() == "srresnet_x4_exit"
    assert shipped.default_model(photo=True) == "srresnet_x4_photo"


def test_of_several_of_a_kind_the_largest_is_taken(monkeypatch, tmp_path):
    for name, size in (("idn-x4-exit", 10), ("srresnet-x4-exit", 20)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    monkeypatch.setattr(shipped, "_folder", lambda: tmp_path)
    monkeypatch.setattr(shipped, "shipped_models", lambda: ["idn-x4-exit", "srresnet-x4-exit"])
    assert shipped.default_model() == "srresnet-x4-exit"


def test_a_compressed_photo_gets_the_photo_network_where_there_is_one():
    assert shipped.default_model(photo=True) == "srresnet_x4_cadyq_photo"
    assert shipped.default_model(2, photo=True) == "srresnet-x2"


def test_scales():
    assert shipped.shipped_scales() == [2, 4]
