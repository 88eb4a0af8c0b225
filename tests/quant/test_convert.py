"""Conversion and calibration: where clips are placed, what deconvolutions and pictures are quantized with."""

import dataclasses

import numpy as np
import pytest
import torch
from networks import QUANTIZATION, build_network, save_network, scene

from cadyq.io.checkpoints import load_checkpoint, save_checkpoint
from cadyq.io.models import load_model
from cadyq.quant.context import Context
from cadyq.quant.convert import CLIP_STEP, best_clip, calibrate, convert, fitted_clip, observe, scale_clips
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.lsq import LSQ
from cadyq.quant.site import sites_of


def site(network, name):
    return next(s for s in sites_of(network) if s.name == name)


def test_a_folded_scale_in_a_deconvolution_is_exact():
    torch.manual_seed(0)
    scaled, plain = ConvTranspose2d(4, 3, 5, 2, padding=1), ConvTranspose2d(4, 3, 5, 2, padding=1)
    scale = torch.tensor([0.25, 1.0, 2.0, 0.5])
    scaled.weight_bits = plain.weight_bits = 8
    scaled.in_scale = scale
    plain.load_state_dict({"weight": scaled.weight * scale.view(-1, 1, 1, 1), "bias": scaled.bias})
    x = torch.randn(2, 4, 6, 7)
    torch.testing.assert_close(scaled(x), plain(x / scale.view(1, -1, 1, 1)))
    assert scaled.macs == 4 * 3 * 25


def test_a_picture_of_eight_bits_passes_unchanged_through_eight_bits():
    first = site(build_network("idn"), "head1_site")
    levels = torch.arange(256.0).div(255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(first(levels, Context.of(levels)).mul(255).round(), levels.mul(255).round())
    torch.testing.assert_close(first(levels, Context.of(levels)), levels, rtol=0, atol=1e-6)
    assert not first.quantizer.clip.requires_grad  # training must not move it


def test_a_picture_is_calibrated_where_its_quantizer_has_no_clip():
    first = site(build_network("idn", dataclasses.replace(QUANTIZATION, quantizer="lsq")), "head1_site")
    assert isinstance(first.quantizer, LSQ) and not first.quantizer.signed
    assert 0.5 / 255 < first.quantizer.step.item() < 1.5 / 255
    assert first.quantizer.step.requires_grad


def test_edges_cut_nothing_off_and_the_body_does():
    network = build_network("idn", None)
    lr = torch.from_numpy(np.stack([scene(48, 48), scene(48, 48, 1)])).permute(0, 3, 1, 2).float() / 255
    seen = observe(network, [lr])
    converted = convert(network, QUANTIZATION).eval()
    calibrate(converted, seen, QUANTIZATION)
    for edge in (site(converted, "up_site"), site(converted, "body.0.compress_site")):
        clips = edge.quantizer.clip * edge.quantizer.channel_scale
        assert (clips >= seen[edge.name].channel_max * (1 - 1e-6)).all()
        assert torch.isclose(clips, seen[edge.name].channel_max).any()
    body = site(converted, "body.0.sites.1").quantizer
    assert body.clip[0] < body.clip[-1]  # 4 bits cut off more than 8


def test_deconvolutions_are_stored_with_eight_bits(tmp_path):
    path = save_network(tmp_path / "n.safetensors", "idn")
    tensors, _ = load_checkpoint(path)
    assert tensors["up.weight"].dtype == np.int8
    network = load_model(path).network
    lr = torch.from_numpy(scene(20, 30)[None]).permute(0, 3, 1, 2).float() / 255
    expected = build_network("idn")(lr, Context.of(lr))
    torch.testing.assert_close(network(lr, Context.of(lr)), expected, rtol=0, atol=1e-3)


def test_a_file_from_before_deconvolutions_had_scales(tmp_path):
    path = save_network(tmp_path / "n.safetensors", "idn")
    tensors, metadata = load_checkpoint(path)
    for name in ("up_site.quantizer.channel_scale", "up.in_scale"):
        del tensors[name]
    metadata.pop("format_version", None)
    save_checkpoint(path, tensors, metadata)
    network = load_model(path).network
    assert network.up.in_scale is None and network.up_site.quantizer.channel_scale is None


def clip_error(windows, conv, clip, levels, scale):
    codes = (windows / scale.view(-1, 1, 1) / clip * levels).round().clamp(-levels, levels)
    rounded = codes * clip / levels * scale.view(-1, 1, 1)
    return (conv(rounded - windows) - conv.bias.view(-1, 1, 1)).norm(dim=1).mean()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_fitted_clip_is_the_best_for_the_results(groups):
    torch.manual_seed(0)
    conv = Conv2d(6, 4, 3, groups=groups)
    conv.padding = (0, 0)
    scale = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5, 4.0])
    # Two channels carry opposite signs of the same large values, and cancel in the result: cutting them off is free.
    windows = torch.randn(200, 6, 3, 3) * scale.view(-1, 1, 1)
    windows[:, 0] = 5 * torch.randn(200, 3, 3).sign()
    windows[:, 1] = -windows[:, 0] / 0.5
    with torch.no_grad():
        conv.weight[:, 1] = 0.5 * conv.weight[:, 0]
        clip = fitted_clip(windows, conv, 7, True, scale)
        error = clip_error(windows, conv, clip, 7, scale)
        for other in (clip * CLIP_STEP, clip / CLIP_STEP):
            assert error <= clip_error(windows, conv, other, 7, scale)
        by_values = best_clip((windows / scale.view(-1, 1, 1)).transpose(0, 1).flatten(1), 7, True)
        assert error < 0.8 * clip_error(windows, conv, by_values, 7, scale)


def test_windows_are_what_the_convolution_sees():
    network = build_network("srresnet", None)
    lr = torch.from_numpy(np.stack([scene(24, 32), scene(24, 32, 1)])).permute(0, 3, 1, 2).float() / 255
    seen = observe(network, [lr], n_windows=50)
    body = next(s for s in sites_of(network, "body"))
    inputs = []
    body.conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    network(lr, Context.of(lr))
    everything = torch.nn.functional.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    windows = torch.cat(seen[body.name].windows)
    assert windows.shape == (100, body.channels, 3, 3)
    exact = "donot_use_mm_for_euclid_dist"
    assert torch.cdist(windows.flatten(1), everything, compute_mode=exact).amin(1).max() < 1e-4


def test_clips_are_scaled_together_until_the_result_is_best():
    floating = build_network("srresnet", None)
    lr = torch.from_numpy(np.stack([scene(24, 32), scene(24, 32, 1)])).permute(0, 3, 1, 2).float() / 255
    network = convert(floating, QUANTIZATION).eval()
    calibrate(network, observe(floating, [lr]), QUANTIZATION)
    quantizers = [s.quantizer for s in sites_of(network, "body")]

    def error():
        ctx = Context.of(lr)
        ctx.force_bits = 4
        return float((network(lr, ctx) - floating(lr)).square().mean())

    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.clip[0] *= 0.4
        before, clips = error(), [q.clip.clone() for q in quantizers]
        scale_clips(network, floating, lr)
        assert error() < 0.8 * before
    factors = [(q.clip / c).tolist() for q, c in zip(quantizers, clips, strict=True)]
    assert factors[0][0] > 1 and all(f == pytest.approx(factors[0]) for f in factors)
