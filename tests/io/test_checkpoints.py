"""What is saved must come back bit for bit, and nothing damaged, foreign or newer may be believed."""

import json
import lzma
import os
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from cadyq.errors import ArgumentError, CheckpointError
from cadyq.io import checkpoints
from cadyq.io.checkpoints import load_checkpoint, save_checkpoint

RNG = np.random.default_rng(0)
METADATA = {
    "backbone": "edsr-baseline",
    "scale": 4,
    "quantization": {"candidates": [0, 4, 6, 8], "edges": "integer"},
    "figures": {"Set5": {"psnr_db": 31.7}},
    "license": "Apache-2.0",
}
TENSORS = {
    "head.weight": RNG.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8),
    "body.0.clip": RNG.normal(size=(4,)).astype(np.float32),
    "step": np.float64(0.25).reshape(()),
    "empty": np.zeros((0, 3), np.float16),
    "transposed": RNG.integers(0, 9, (3, 5)).T,
    "flags": np.array([True, False]),
}


@pytest.fixture(params=["", ".xz"])
def path(tmp_path, request):
    result = tmp_path / f"model.safetensors{request.param}"
    save_checkpoint(result, TENSORS, METADATA)
    return result


def test_round_trip(path):
    tensors, metadata = load_checkpoint(path)
    assert metadata == {**METADATA, "format_version": 1}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].shape == tensor.shape
    assert os.listdir(path.parent) == [path.name]


def test_bytes_are_reproducible_and_independent_of_order(path):
    content = path.read_bytes()
    save_checkpoint(path, dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    assert path.read_bytes() == content
    save_checkpoint(path, *load_checkpoint(path))
    assert path.read_bytes() == content


def test_big_endian_arrays_keep_their_values(path):
    save_checkpoint(path, {"a": np.array([1, 2], ">i4")}, METADATA)
    np.testing.assert_array_equal(load_checkpoint(path)[0]["a"], [1, 2])


def test_every_flipped_byte_is_noticed(path):
    content = path.read_bytes()
    for position in range(len(content)):
        spoiled = bytearray(content)
        spoiled[position] ^= 0x55
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_every_truncation_is_noticed(path):
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_a_newer_format_is_told_apart_from_damage(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 2)
    save_checkpoint(path, TENSORS, METADATA)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format version 2.*upgrade"):
        load_checkpoint(path)


def test_a_header_length_that_looks_like_a_pickle(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in range(0, 400, 8):
        save_checkpoint(path, {}, {**METADATA, "license": "x" * length})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    else:
        pytest.fail("no header of 640 bytes was made")
    assert load_checkpoint(path)[0] == {}


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Bomb()), "is a pickle"),
        (b"PK\x03\x04archive/data.pkl", "is a pickle"),
        (b"\x89PNG\r\n\x1a\n", "not a checkpoint"),
        (b"", "is empty"),
        (b"{}", "not a checkpoint"),
        (struct.pack("<Q", 2) + b"[]", "not a checkpoint"),
        (save_safetensors({"a": np.zeros(2)}), "not a checkpoint"),
        (save_safetensors({"a": np.zeros(2)}, metadata={"cadyq": "[1]"}), "not a checkpoint"),
        (save_safetensors({}, metadata={"cadyq": json.dumps({"metadata": {}, "sha256": ""})}), "SHA-256"),
    ],
)
def test_foreign_files(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "none" / "a.safetensors", TENSORS, METADATA)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.array(["text"])}, METADATA, "dtype"),
        ({"a": np.array([1j])}, METADATA, "complex128"),
        ({}, {"backbone": "idn"}, r"metadata\['scale'\] is None"),
        ({}, {**METADATA, "licence": "MIT"}, "licence"),
        ({}, {**METADATA, "figures": {1, 2}}, "JSON"),
        ({}, {**METADATA, "figures": float("nan")}, "JSON"),
    ],
)
def test_wrong_arguments(tmp_path, tensors, metadata, message):
    with pytest.raises(ArgumentError, match=message):
        save_checkpoint(tmp_path / "a.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_compressed_file_is_smaller_and_says_what_is_wrong_with_it(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors.xz"
    save_checkpoint(path, {"zeros": np.zeros(1 << 20)}, METADATA)
    content = path.read_bytes()
    assert len(content) < 1 << 16
    for spoiled, message in (
        (content[:-9], "cut off"),
        (content + b"more", "4 bytes behind its end"),
        (content[:100] + b"....." + content[105:], "damaged"),
        (lzma.compress(b"text"), "not a checkpoint"),
    ):
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    path.write_bytes(content)
    monkeypatch.setattr(checkpoints, "_LARGEST_BYTES", 1 << 22)
    with pytest.raises(CheckpointError, match="holds more than 4,194,304 bytes"):
        load_checkpoint(path)
