"""The command line: does what it says, and a mistake ends in one line, the right code and no files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import save_network, scene
from PIL import Image

import cadyq
from cadyq import cli
from cadyq.cli import common
from cadyq.evaluate import evaluate
from cadyq.io.checkpoints import load_checkpoint, save_checkpoint
from cadyq.io.images import SUFFIXES, read_image
from cadyq.io.journal import JOURNAL_NAME
from cadyq.upscale import MODES, load


@pytest.fixture
def photo(tmp_path):
    """A picture file of its own folder."""
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    Image.fromarray(scene(24, 30)).save(path)
    return path


@pytest.fixture
def run(capsys, model_files):
    """Run the command line in process: (code, stdout, stderr)."""

    def call(*arguments):
        names = [str(model_files[a]) if a in model_files else str(a) for a in arguments]
        try:
            code = cli.main(names)
        except SystemExit as stop:
            code = stop.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def _files(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != JOURNAL_NAME)
    return sorted(str(p.relative_to(folder)) for p in files)


def test_one_picture(run, photo, tmp_path, models):
    code, out, err = run("upscale", photo, "-o", tmp_path / "out.png", "--model", "srresnet", "--threads", 1)
    assert (code, err) == (0, "")
    for word in ("out.png", "120x96", "srresnet", " s,", "bits", "exited"):
        assert word in out
    expected = models["srresnet"].upscale(photo).pixels
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, expected)


@pytest.mark.parametrize(
    "options", [("--mode", "image"), ("--mode", "patches"), ("--tile", 8, "--budget", -9)]
)
def test_options(run, photo, tmp_path, options):
    code, _, err = run("upscale", photo, "-o", tmp_path / "o.webp", "--model", "edsr", "--scale", 4, *options)
    assert (code, err) == (0, "")
    assert read_image(tmp_path / "o.webp").pixels.shape == (96, 120, 3)


def test_folder_keeps_names_and_survives_a_bad_file(run, photo, tmp_path):
    folder, output = photo.parent, tmp_path / "deep" / "out"
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "notes.txt").write_text("not a picture")
    Image.fromarray(scene(9, 9)[..., 0]).save(folder / "gray.tif")
    code, out, err = run("upscale", folder, "-o", output, "--model", "edsr")
    assert code == 3
    assert "broken.jpg" in err
    assert "1 of 3" in err
    assert "Traceback" not in err
    assert _files(output) == ["gray.png", "photo.png"]
    assert len(out.splitlines()) == 2
    assert read_image(output / "gray.png").is_gray
    code, _, err = run(
        "upscale", photo, folder / "gray.tif", "-o", output, "--model", "edsr", "--format", "webp"
    )
    assert (code, err) == (0, "")
    assert _files(output) == ["gray.png", "gray.webp", "photo.png", "photo.webp"]


def test_events_and_skipping(run, photo, tmp_path):
    (photo.parent / "deep").mkdir()
    Image.fromarray(scene(9, 9)).save(photo.parent / "deep" / "other.JPG")
    arguments = ("upscale", photo.parent, "-o", tmp_path / "out", "--model", "edsr", "-r", "--format", "same")
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [e["event"] for e in events if e["event"] != "progress"]
    assert kinds == ["start", "done", "done", "end"]
    assert events[-1]["n_done"] == 2
    assert {"width", "height", "seconds", "fqr", "model", "why"} <= set(events[-2])
    assert _files(tmp_path / "out") == ["deep/other.jpg", "photo.png"]
    code, out, _ = run(*arguments)
    assert (code, out) == (0, "2 of 2 pictures were there already\n")
    code, out, _ = run(*arguments, "--budget", -1)
    assert code == 0
    assert len(out.splitlines()) == 2


def test_dry_run(run, photo, tmp_path):
    (photo.parent / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    code, out, err = run(
        "upscale", photo.parent, "-o", tmp_path / "out", "--model", "edsr", "--dry-run", "--json"
    )
    assert (code, err) == (3, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["failed", "estimate", "total"]
    assert events[1]["seconds"] >= 0
    assert events[1]["memory_bytes"] > 10e6
    code, out, err = run("upscale", photo, "-o", tmp_path / "out.png", "--model", "edsr", "--dry-run")
    assert (code, err) == (0, "")
    assert "120x96" in out
    assert "MB of memory" in out
    assert _files(tmp_path) == ["in/broken.jpg", "in/photo.png"]


def test_nothing_is_created_where_all_fails(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    code, out, err = run("upscale", tmp_path / "in", "-o", tmp_path / "out", "--model", "edsr")
    assert code == 3
    assert out == ""
    assert "a.png is empty" in err
    assert not (tmp_path / "out").exists()


def _make_bad(path, kind):
    good = path.parent / "good.png"
    Image.fromarray(scene(24, 30)).save(good)
    content = good.read_bytes()
    good.unlink()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "zero":
        path.touch()
    elif kind == "text":
        path.write_text("these are words")


@pytest.mark.parametrize("kind", ["missing", "truncated", "zero", "text", "bomb"])
def test_bad_pictures(run, tmp_path, kind):
    path = tmp_path / "bad.png"
    if kind == "bomb":
        # 20000 x 20000 pixels of one color, a small file.
        Image.new("1", (20000, 20000)).save(path)
    else:
        _make_bad(path, kind)
    before = _files(tmp_path)
    code, out, err = run("upscale", path, "-o", tmp_path / "out.png", "--model", "edsr")
    assert code == 3
    assert out == ""
    assert err.startswith("cadyq: ")
    assert "bad.png" in err
    assert len(err.splitlines()) == 1
    assert _files(tmp_path) == before
    assert run("audit", "edsr", path)[0] == 3


@pytest.mark.parametrize("kind", ["1x1", "cmyk", "palette", "la", "16 bit", "bilevel"])
def test_unusual_pictures_work(run, tmp_path, kind):
    rgb = Image.fromarray(scene(12, 10))
    path = tmp_path / "odd.tif"
    image = {
        "1x1": lambda: rgb.crop((0, 0, 1, 1)),
        "cmyk": lambda: rgb.convert("CMYK"),
        "palette": lambda: rgb.quantize(7),
        "la": lambda: rgb.convert("LA"),
        "16 bit": lambda: Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500),
        "bilevel": lambda: rgb.convert("1"),
    }[kind]()
    image.save(path)
    code, out, err = run("upscale", path, "-o", tmp_path / "out.png", "--model", "edsr")
    assert code == 0, err
    width, height = image.size
    assert f"{4 * width}x{4 * height}" in out
    assert read_image(tmp_path / "out.png").pixels.shape == (4 * height, 4 * width, 3)


def _bad_model(path, kind, good):
    content = bytearray(good.read_bytes())
    tensors, metadata = load_checkpoint(good)
    metadata.pop("format_version")
    if kind == "flipped":
        content[-5] ^= 1
    elif kind == "cut":
        content = content[:-100]
    elif kind == "zero":
        content = b""
    elif kind == "text":
        content = b"weights, honestly"
    elif kind == "pickle":
        import torch

        torch.save({"weight": torch.zeros(3)}, path)
        return
    elif kind == "other backbone":
        save_checkpoint(path, tensors, {**metadata, "backbone": "edsr"})
        return
    elif kind == "unknown backbone":
        save_checkpoint(path, tensors, {**metadata, "backbone": "vdsr"})
        return
    elif kind == "newer":
        from unittest import mock

        with mock.patch("cadyq.io.checkpoints.FORMAT_VERSION", 99):
            save_checkpoint(path, tensors, metadata)
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("flipped", "damaged"),
        ("cut", "damaged"),
        ("zero", "empty"),
        ("text", "not a checkpoint"),
        ("pickle", "pickle"),
        ("other backbone", "does not fit"),
        ("unknown backbone", "vdsr"),
        ("newer", "99"),
    ],
)
def test_bad_models(run, photo, tmp_path, model_files, kind, word):
    model = tmp_path / "bad.safetensors"
    _bad_model(model, kind, model_files["srresnet"])
    before = _files(tmp_path)
    for arguments in (
        ("upscale", photo, "-o", tmp_path / "out.png", "--model", model),
        ("info", model),
        ("audit", model, photo),
        ("evaluate", model, photo.parent),
    ):
        code, out, err = run(*arguments)
        assert code == 4, err
        assert out == ""
        assert word in err
        assert "Traceback" not in err
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--model", "no-such"], 2, "no-such"),
        (["--model", "edsr", "--scale", "2"], 2, "scale"),
        (["--model", "edsr", "--tile", "3"], 2, "tile"),
        (["--model", "edsr", "--threads", "0"], 2, "threads"),
        (["--model", "edsr", "--mode", "strips"], 2, "strips"),
        (["--model", "edsr", "--budget", "nan"], 2, "budget"),
        (["--model", "edsr", "--format", "webp"], 2, "format"),
        (["--scale", "7"], 2, "scale"),
    ],
)
def test_wrong_options(run, photo, tmp_path, arguments, code, word):
    found = run("upscale", photo, "-o", tmp_path / "out.png", *arguments)
    assert found[0] == code
    assert word in found[2]
    assert not (tmp_path / "out.png").exists()


def test_wrong_outputs(run, photo, tmp_path):
    def refused(*arguments):
        code, _, err = run("upscale", *arguments, "--model", "edsr")
        return code == 2 and "output" in err

    (tmp_path / "file.png").touch()
    assert refused(photo, "-o", tmp_path / "out.bmp")
    assert refused(photo, "-o", tmp_path / "no" / "out.png")
    assert refused(photo, "-o", photo)
    assert refused(photo.parent, "-o", photo.parent)
    assert refused(photo.parent, "-o", tmp_path / "file.png")
    Image.fromarray(scene(9, 9)).save(photo.with_suffix(".jpg"))
    assert refused(photo.parent, "-o", tmp_path / "out")
    Image.fromarray(np.zeros((5, 5, 4), np.uint8)).save(tmp_path / "alpha.png")
    assert refused(tmp_path / "alpha.png", "-o", tmp_path / "out.jpg")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert run("upscale", tmp_path / "empty", "-o", tmp_path / "out", "--model", "edsr")[0] == 2


def test_evaluate(run, photo, tmp_path):
    Image.fromarray(scene(64, 70)).save(photo)
    Image.fromarray(scene(72, 64, seed=3)).save(photo.with_name("second.png"))
    table = tmp_path / "rows.csv"
    code, out, err = run("evaluate", "edsr", photo.parent, "--csv", table, "--against", "srresnet")
    assert (code, err) == (0, "")
    assert "PSNR" in out
    assert "95 % interval" in out
    assert len(table.read_text().splitlines()) == 4
    code, out, _ = run("evaluate", "edsr", photo.parent, "--json", "--limit", 1)
    found = json.loads(out)
    assert found["n_images"] == 1 and found["psnr_db"] == found["pictures"][0]["psnr_db"]
    arguments = ("evaluate", "edsr", photo.parent, "--json", "--against", "srresnet")
    both = json.loads(run(*arguments)[1])
    named = [(Path(e["model"]).name, e["n_images"]) for e in both["evaluations"]]
    assert named == [("edsr.safetensors", 2), ("srresnet.safetensors", 2)]
    first, second = (e["psnr_db"] for e in both["evaluations"])
    assert both["differences"][0]["mean"] == pytest.approx(first - second)
    assert run("evaluate", "edsr", "Set5", "--root", tmp_path)[0] == 5
    assert run("evaluate", "edsr", tmp_path / "none")[0] == 5
    assert run("evaluate", "edsr", photo.parent, photo.parent, "--csv", table)[0] == 2


def test_a_float_network_is_evaluated_by_the_kernels_of_training(run, photo, tmp_path, monkeypatch):
    """Another rounding: not the same to the last bit, but to every digit that is printed."""
    from cadyq.training import fastconv

    Image.fromarray(scene(64, 70)).save(photo)
    path = save_network(tmp_path / "float.safetensors", "edsr", None)
    plain = evaluate(load(path), photo.parent).summary.psnr_db
    calls, real = [], fastconv.conv2d

    def counted(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(fastconv, "conv2d", counted)
    code, out, _ = run("evaluate", path, photo.parent, "--json")
    assert code == 0
    assert bool(calls) == fastconv.available()
    assert json.loads(out)["psnr_db"] == pytest.approx(plain, abs=5e-4)


def test_audit(run, photo, monkeypatch):
    code, out, err = run("audit", "edsr", photo)
    assert (code, err) == (0, "")
    assert "clean" in out
    assert "body.0.conv1" in out
    monkeypatch.setattr("cadyq.audit._count_levels", lambda x, by_channel: [10**6] * len(x))
    code, out, _ = run("audit", "edsr", photo, "--json")
    assert code == 1
    assert json.loads(out)["clean"] is False
    assert "FAILED: head" in run("audit", "edsr", photo)[1]


def test_info(run, model_files):
    code, out, _ = run("info", "srresnet", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["backbone"] == "srresnet"
    assert record["candidate_bits"] == [4, 6, 8]
    assert record["weight_bits"] == [8]
    assert record["storage_bytes"] == model_files["srresnet"].stat().st_size
    assert record["license"] == "Apache-2.0"
    assert "Set5" in record["figures"]
    code, out, _ = run("info", "edsr")
    assert code == 0
    assert "candidate bits: [4, 6, 8]" in out
    code, out, _ = run("info", "--json")
    assert code == 0
    assert {"srresnet-x4-exit", "idn-x4-exit"} <= {m["name"] for m in json.loads(out)["models"]}


def test_float_info(run, tmp_path):
    path = save_network(tmp_path / "float.safetensors", "edsr", None)
    record = json.loads(run("info", path, "--json")[1])
    assert record["conversion"] is None
    assert record["candidate_bits"] == [32]


def test_version_and_help(run):
    assert run("--version") == (0, f"cadyq {cadyq.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("upscale", "evaluate", "audit", "info"):
        assert command in out
        assert run(command, "--help")[0] == 0
    assert run()[0] == 2


def test_interruption_and_system_errors(run, photo, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cadyq.upscale.Model.upscale", stop)
    code, _, err = run("upscale", photo, "-o", tmp_path / "out.png", "--model", "edsr")
    assert code == 130
    assert "interrupted" in err

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("cadyq.upscale.Model.upscale", fail)
    code, _, err = run("upscale", photo, "-o", tmp_path / "out.png", "--model", "edsr")
    assert code == 3
    assert "somewhere" in err
    assert not (tmp_path / "out.png").exists()


def test_copies_agree_with_their_origins():
    assert common.MODES == MODES
    assert {f".{name}" for name in common.FORMATS} <= set(SUFFIXES)


def _python(*arguments, **environment):
    source = str(Path(cadyq.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_as_a_process(photo, tmp_path, model_files):
    options = ["--model", str(model_files["edsr"]), "--threads", "1"]
    done = _python("-m", "cadyq", "upscale", str(photo), "-o", str(tmp_path / "out.png"), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.png").exists()


def test_without_torch(photo, tmp_path, model_files):
    (tmp_path / "hide" / "torch").mkdir(parents=True)
    hidden = tmp_path / "hide" / "torch" / "__init__.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    source = Path(cadyq.__file__).parents[1]
    done = _python(
        *("-m", "cadyq", "upscale", str(photo), "-o", str(tmp_path / "out.png")),
        *("--model", str(model_files["edsr"])),
        PYTHONPATH=os.pathsep.join([str(hidden.parents[1]), str(source)]),
    )
    assert done.returncode == 7
    assert "pip install 'cadyq[torch]'" in done.stderr
    assert "Traceback" not in done.stderr
