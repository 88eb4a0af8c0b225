"""Modes agree where they must, cutting leaves no trace, and any kind of picture comes back as what it was."""

import numpy as np
import pytest
import torch
from networks import build_network, save_network, scene
from PIL import Image

from cadyq import bands
from cadyq.backbones import BACKBONES
from cadyq.config import Quantization
from cadyq.errors import ArgumentError, CheckpointError, ImageError
from cadyq.functional.alpha import fill_transparent
from cadyq.functional.exit import ExitRule
from cadyq.functional.resize import imresize
from cadyq.io.images import Picture, read_image
from cadyq.quant.context import TileContext
from cadyq.upscale import MODES, load

# Leaves wherever the mean |dx| is below about 0.02.
RULE = ExitRule((1.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.0, float(np.log(0.02)), fade=2)


def _difference(a, b):
    gap = np.abs(a.astype(int) - b.astype(int))
    return (gap > 0).mean(), gap.max()


@pytest.fixture(scope="module")
def exiting(tmp_path_factory):
    """A model with an exit rule."""
    path = tmp_path_factory.mktemp("exit") / "exiting.safetensors"
    return load(save_network(path, "srresnet", exit_rule=RULE))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("tile", "size"), [(8, (37, 51)), (32, (65, 70)), (48, (50, 49)), (128, (61, 40))])
def test_tiles_forced_alike_equal_image_wise(models, backbone, tile, size):
    image = scene(*size)
    for bits in (4, 6, 8):
        whole = models[backbone].upscale(image, mode="image", force_bits=bits)
        tiled = models[backbone].upscale(image, tile=tile, force_bits=bits, runtime="torch")
        share, largest = _difference(whole.pixels, tiled.pixels)
        # torch adds in another order on pictures of another size; the engine's results are compared exactly elsewhere.
        assert share <= 0.002
        assert largest <= 1
        assert whole.fqr == tiled.fqr == tiled.fqr_area == bits


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tile", [32, 57, 128])
def test_tiles_equal_image_wise_in_float64(backbone, tile):
    from cadyq.quant.context import Context

    network = build_network(backbone).double()
    lr = torch.from_numpy(scene(75, 101)).permute(2, 0, 1)[None].double() / 255
    with torch.no_grad():
        ctx = Context.of(lr)
        ctx.force_bits, ctx.area = 6, ctx.area.double()
        whole = network(lr, ctx)
        tiled = network(lr, TileContext(lr, tile, force_bits=6, max_batch_pixels=5000, band_pixels=2000))
    assert float((whole - tiled).abs().max()) < 1e-9


@pytest.mark.parametrize("backbone", BACKBONES)
def test_blocks_and_bands_equal_the_whole(models, backbone, monkeypatch):
    image = scene(150, 170)
    whole = models[backbone].upscale(image, force_bits=6)
    monkeypatch.setattr(bands, "_BLOCK_WIDTH", 64)
    monkeypatch.setattr(bands, "_BLOCK_PIXELS", 64 * 32)
    monkeypatch.setattr("cadyq.quant.infer._BAND_PIXELS", 1000)
    steps = []
    cut = models[backbone].upscale(image, force_bits=6, progress=lambda *step: steps.append(step))
    assert steps[-1] == (len(steps), len(steps))
    assert len(steps) > 6
    share, largest = _difference(whole.pixels, cut.pixels)
    assert share <= 0.001
    assert largest <= 1
    assert cut.fqr == whole.fqr
    assert cut.grid == whole.grid


def test_blocks_do_not_cut_what_fits():
    assert [len(cuts) for cuts in bands.cut_into_blocks(540, 960, 48, 44)] == [1, 1]
    down, across = bands.cut_into_blocks(3000, 4000, 48, 44)
    for cuts, length in ((down, 3000), (across, 4000)):
        assert all(cut.keep[0] % 48 == cut.read[0] % 48 == 0 for cut in cuts)
        assert sum(cut.keep[1] - cut.keep[0] for cut in cuts) == length
    assert max(d.read[1] - d.read[0] for d in down) * max(a.read[1] - a.read[0] for a in across) < 1_200_000


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ramps_show_no_seams_with_random_bits(models, backbone):
    """Mean second difference across tile borders is at most 1.2 times that inside (method: tiles)."""
    model, tile, rng = models[backbone], 16, np.random.default_rng(0)
    across, inside = [], []
    for slope_y, slope_x in ((1, 0), (0, 1), (1, 1), (0.5, 1.5)):
        y, x = np.mgrid[0:96, 0:96]
        ramp = np.clip(40 + slope_y * y + slope_x * x, 0, 255).astype(np.uint8)
        bits = {s.name: rng.choice((4, 6, 8), (6, 6)) for s in model.sites if s.kind == "body"}
        result = model.upscale(ramp, tile=tile, force_bits=bits)
        assert all((result.bits[name] == bits[name]).all() for name in bits)
        pixels = result.pixels[..., 0].astype(float)
        for plane in (pixels, pixels.T):
            second = np.abs(np.diff(plane, 2, axis=0))[15:-15, 16:-16]
            # Entry i lies at row i + 16 (its center); a border touches the rows before and behind it.
            is_border = np.isin((np.arange(len(second)) + 16) % (4 * tile), (4 * tile - 1, 0))
            across.append(second[is_border].mean())
            inside.append(second[~is_border].mean())
    assert np.mean(across) <= 1.2 * np.mean(inside)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_smallest_picture(models, backbone, mode):
    result = models[backbone].upscale(np.full((1, 1, 3), 99, np.uint8), mode=mode)
    assert result.pixels.shape == (4, 4, 3)
    assert result.grid == (1, 1)


def test_patches_as_published(models):
    image = scene(200, 100)
    result = models["edsr"].upscale(image, mode="patches")
    # Patches start at 0 and 90; the last takes the rest.
    assert result.grid == (2, 1)
    np.testing.assert_array_equal(result.areas, [[96 * 100], [110 * 100]])
    alone = models["edsr"].upscale(image[:96], mode="image")
    np.testing.assert_array_equal(result.pixels[: 90 * 4], alone.pixels[: 90 * 4])
    assert [int(b[0, 0]) for b in result.bits.values()] == [int(b[0, 0]) for b in alone.bits.values()]


def test_figures_of_a_result(models):
    model, image = models["srresnet"], scene(40, 50)
    bits = {s.name: np.array([[4, 6, 8, 4], [4, 4, 4, 4], [8, 8, 8, 6]]) for s in model.sites}
    result = model.upscale(image, force_bits=bits)
    table = bits[model.sites[0].name]
    areas = np.array([[256, 256, 256, 32], [256, 256, 256, 32], [128, 128, 128, 16]])
    np.testing.assert_array_equal(result.areas, areas)
    assert result.fqr == pytest.approx(table.mean())
    assert result.fqr_area == pytest.approx((table * areas).sum() / 2000)
    # Two blocks of two 3x3 convolutions of 16 channels, 8-bit weights.
    macs = 4 * 16 * 16 * 9
    assert result.bitops == pytest.approx(2 * macs * 8 / 32 * (table * areas).sum() / 32)
    assert result.zeros == (0, 0, 0)
    assert result.exited == 0


def test_budget_moves_bits(models):
    image = scene(60, 60)
    few, plain, many = (models["edsr"].upscale(image, budget=b).fqr for b in (-100.0, 0.0, 100.0))
    assert few == 4 < plain < 8 == many


def test_float_network(tmp_path):
    model = load(save_network(tmp_path / "float.safetensors", "edsr", None))
    result = model.upscale(scene(20, 20))
    assert result.fqr == 32
    assert result.tile == 48


def test_skipped_blocks_count_as_zero(tmp_path):
    quantization = Quantization(bits=(0, 4, 8), dynamic=True, tile=16)
    model = load(save_network(tmp_path / "skip.safetensors", "edsr", quantization))
    first = {name: 0 for name in (s.name for s in model.sites) if name.endswith("site1")}
    result = model.upscale(scene(32, 32), force_bits=first)
    assert result.fqr == 0
    assert result.bitops == 0
    assert result.zeros.cells_with_all == 1
    assert result.exited == 0


def test_exited_cells_are_bicubic_and_fade_into_computed_ones(exiting, models):
    image = scene(64, 80)
    image[:, :32] = 120
    result, plain = exiting.upscale(image), imresize(image, (256, 320))
    flat = np.zeros((4, 5), bool)
    flat[:, :2] = True
    exits = np.stack([b == 0 for b in result.bits.values()]).all(0)
    assert exits[:, 0].all()
    assert not exits[:, 3:].any()
    assert result.exited == exits.mean()
    assert result.zeros.cells_with_all == exits.mean()
    cells = np.kron(exits, np.ones((64, 64), bool))
    np.testing.assert_array_equal(result.pixels[cells], plain[cells])
    # Beyond the fade the network's own pixels stand.
    far = exiting.upscale(image, budget=1e6)
    assert far.exited == 0
    assert _difference(result.pixels[:, 4 * 64 :], far.pixels[:, 4 * 64 :])[0] < 0.6


def test_picture_that_exits_as_a_whole(exiting):
    result = exiting.upscale(np.full((40, 40, 3), 77, np.uint8))
    assert result.exited == 1
    assert result.fqr == result.bitops == 0
    assert (result.pixels == 77).all()
    assert exiting.upscale(scene(20, 20), budget=-1e6).exited == 1
    assert exiting.upscale(scene(20, 20), mode="image").exited == 0


def test_exit_is_judged_alike_in_bands(exiting, monkeypatch):
    image = scene(100, 60)
    image[30:70] //= 16
    whole = exiting.upscale(image)
    monkeypatch.setattr(bands, "_BLOCK_PIXELS", 1)
    cut = exiting.upscale(image)
    assert 0 < whole.exited < 1
    assert cut.exited == whole.exited


def test_gray_stays_gray(models):
    gray = scene(20, 24)[..., 0]
    result = models["srresnet"].upscale(gray)
    assert result.pixels.shape == (80, 96, 1)
    again = models["srresnet"].upscale(Image.fromarray(gray))
    np.testing.assert_array_equal(result.pixels, again.pixels)
    with_alpha = models["srresnet"].upscale(np.dstack([gray, np.full_like(gray, 255)]))
    np.testing.assert_array_equal(with_alpha.pixels[..., :1], result.pixels)
    assert (with_alpha.pixels[..., 1] == 255).all()


def test_opacity_is_upscaled_and_hidden_colors_do_not_bleed(models):
    image = scene(32, 32)
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 8:24] = 255
    clean, dirty = image.copy(), image.copy()
    clean[alpha == 0], dirty[alpha == 0] = 0, (255, 0, 255)
    results = [models["edsr"].upscale(np.dstack([rgb, alpha])) for rgb in (clean, dirty)]
    np.testing.assert_array_equal(results[0].pixels, results[1].pixels)
    np.testing.assert_array_equal(results[0].pixels[..., 3], imresize(alpha, (128, 128)))
    opaque = models["edsr"].upscale(np.dstack([image, np.full_like(alpha, 255)]))
    np.testing.assert_array_equal(opaque.pixels[..., :3], models["edsr"].upscale(image).pixels)


def test_fill_transparent_takes_the_surroundings():
    rgb = np.zeros((9, 13, 3), np.uint8)
    rgb[:, :6] = (200, 100, 50)
    alpha = np.zeros((9, 13), np.uint8)
    alpha[:, :6] = 255
    alpha[0, 0] = 3
    filled = fill_transparent(rgb, alpha)
    np.testing.assert_array_equal(filled, np.broadcast_to(np.uint8([200, 100, 50]), rgb.shape))
    assert not fill_transparent(rgb, np.zeros_like(alpha)).any()


def test_every_way_to_pass_a_picture(models, tmp_path):
    image = scene(15, 17)
    Image.fromarray(image).save(tmp_path / "picture.png")
    path = tmp_path / "picture.png"
    results = [
        models["edsr"].upscale(source)
        for source in (image, Image.fromarray(image), Picture(image), path, str(path))
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.pixels, results[0].pixels)
    cmyk = models["edsr"].upscale(Image.fromarray(image).convert("CMYK"))
    assert cmyk.pixels.shape == (60, 68, 3)
    palette = Image.fromarray(image).quantize(16)
    assert models["edsr"].upscale(palette).pixels.shape == (60, 68, 3)


def test_result_is_saved_as_it_is(models, tmp_path):
    rgba = np.dstack([scene(8, 8), np.arange(64, dtype=np.uint8).reshape(8, 8)])
    for image in (rgba, rgba[..., :3], rgba[..., 0]):
        result = models["edsr"].upscale(np.ascontiguousarray(image))
        result.save(tmp_path / "out.png")
        back = read_image(tmp_path / "out.png")
        assert back.is_gray == (image.ndim == 2)
        layers = back.pixels[..., :1] if back.is_gray else back.pixels
        if back.alpha is not None:
            layers = np.dstack([layers, back.alpha])
        np.testing.assert_array_equal(layers, result.pixels)


def test_equal_calls_give_equal_results(models):
    image = scene(50, 60)
    a, b = (models["srresnet"].upscale(image, threads=1) for _ in range(2))
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "strips"}, ("mode", "strips", "tiles, image, patches")),
        ({"tile": 7}, ("tile", "7", "8 to 1024")),
        ({"tile": 2000}, ("tile", "2000")),
        ({"budget": float("nan")}, ("budget", "nan")),
        ({"threads": 0}, ("threads", "0")),
        ({"force_bits": 5}, ("force_bits", "5", "(4, 6, 8)")),
        ({"force_bits": {"nowhere": 4}}, ("nowhere", "body.0.site1")),
        ({"force_bits": {"body.0.site1": np.full((9, 9), 4)}}, ("shape", "(9, 9)")),
    ],
)
def test_wrong_arguments(models, raises_clearly, arguments, words):
    raises_clearly(ArgumentError, lambda: models["srresnet"].upscale(scene(20, 20), **arguments), *words)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), [[1, 2]], None],
)
def test_wrong_pictures(models, raises_clearly, image):
    raises_clearly(ArgumentError, lambda: models["srresnet"].upscale(image), "image", "expected")


def test_wrong_pil_pictures(models, raises_clearly):
    raises_clearly(ImageError, lambda: models["edsr"].upscale(Image.new("F", (3, 3))), '"F"')
    raises_clearly(ImageError, lambda: models["edsr"].upscale(Image.new("RGB", (0, 3))), "0x3")


def test_loading(model_files, raises_clearly, tmp_path):
    raises_clearly(ArgumentError, lambda: load("no-such-model"), "no-such-model", "model file")
    raises_clearly(ArgumentError, lambda: load(model_files["edsr"], scale=2), "scale", "2", "4")
    raises_clearly(ArgumentError, lambda: load(scale=7), "scale", "7")
    (tmp_path / "empty.safetensors").touch()
    raises_clearly(CheckpointError, lambda: load(tmp_path / "empty.safetensors"), "empty")
    assert load(model_files["edsr"], scale=4).scale == 4
    assert "edsr" in repr(load(model_files["edsr"]))
