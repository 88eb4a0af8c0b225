"""Videos: every frame, its time, the sound and the subtitles stay; a crash costs nothing; nothing is guessed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cadyq
from cadyq import cli
from cadyq.cli import video as command
from cadyq.upscale import load
from cadyq.video import Options, upscale_video
from cadyq.video.segment import CODECS
from cadyq.video.source import frames, probe

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
WIDTH, HEIGHT = 64, 48
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,600\nHello\n\n2\n00:00:00,700 --> 00:00:01,000\nagain\n"


def ffmpeg(*arguments):
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL
    )


def ask(path, *arguments):
    found = subprocess.run(
        ["ffprobe", "-v", "error", "-of", "json", *arguments, str(path)], check=True, capture_output=True
    )
    return json.loads(found.stdout)


def times(path, stream="v:0"):
    """Seconds at which frames or samples are shown, as ffprobe reads them."""
    found = ask(path, "-select_streams", stream, "-show_entries", "packet=pts_time")["packets"]
    return sorted(float(one["pts_time"]) for one in found)


def texts(path):
    """Seconds at which subtitles appear; MP4 holds empty ones between."""
    shown = ("-select_streams", "s:0", "-show_entries", "packet=pts_time,size")
    return [float(one["pts_time"]) for one in ask(path, *shown)["packets"] if int(one["size"]) > 2]


def digest(path, stream):
    """Checksum of a stream's packets."""
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", str(path), "-map", f"0:{stream}", "-c", "copy", "-f", "hash", "-"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def model():
    return load("srresnet-x4-cadyq")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Short clips with sound and subtitles: constant rate in MP4, B-frames; variable rate in Matroska."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    folder = tmp_path_factory.mktemp("clips")
    (folder / "s.srt").write_text(SUBTITLES)
    base = (
        "-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate=12:duration=1",
        "-f", "lavfi", "-i", "sine=frequency=440:duration=1.05", "-i", folder / "s.srt",
        "-map", "0", "-map", "1", "-map", "2", "-c:v", "libx264", "-bf", "2", "-c:a", "aac",
        "-metadata", "title=Clip", "-metadata:s:a:0", "language=deu",
    )  # fmt: skip
    ffmpeg(*base, "-c:s", "mov_text", folder / "constant.mp4")
    uneven = (
        "-vf",
        "select='not(mod(n,3)*mod(n,4))',setpts='PTS+0.013/TB*mod(N,2)'",
        "-fps_mode",
        "passthrough",
    )
    ffmpeg(*base, "-c:s", "srt", *uneven, folder / "variable.mkv")
    ffmpeg(*base, "-c:s", "mov_text", *uneven, "-video_track_timescale", "90000", folder / "variable.mp4")
    return folder


@needs_ffmpeg
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("constant.mp4", "out.mp4"),
        ("variable.mkv", "out.mkv"),
        ("variable.mp4", "out.mov"),
        ("variable.mkv", "out.mp4"),
    ],
)
def test_frames_times_sound_and_subtitles_stay(clips, model, tmp_path, source, target):
    seen = []
    report = upscale_video(
        model, clips / source, tmp_path / target, Options(segment=5, threads=1), lambda *at: seen.append(at)
    )
    expected = times(clips / source)
    found = times(tmp_path / target)
    assert len(found) == report.n_frames == len(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if "variable" in source:
        assert len(set(np.diff(expected).round(4))) > 2
    streams = ask(tmp_path / target, "-show_streams", "-show_format")
    kinds = [one["codec_type"] for one in streams["streams"]]
    assert kinds == ["video", "audio", "subtitle"]
    video, audio, text = streams["streams"]
    assert (video["width"], video["height"], video["codec_name"]) == (4 * WIDTH, 4 * HEIGHT, "h264")
    assert text["codec_name"] == ("subrip" if target.endswith("mkv") else "mov_text")
    if not target.endswith("mov"):  # which keeps other codes of languages
        assert audio["tags"]["language"] == "deu"
    assert streams["format"]["tags"]["title"] == "Clip"
    assert digest(tmp_path / target, "a:0") == digest(clips / source, "a:0")
    np.testing.assert_allclose(times(tmp_path / target, "a:0"), times(clips / source, "a:0"), atol=1e-3)
    assert len(texts(clips / source)) == 2
    assert texts(tmp_path / target) == pytest.approx(texts(clips / source), abs=1e-3)
    assert seen[-1] == (report.n_frames, report.n_frames)
    assert sorted(p.name for p in tmp_path.iterdir()) == [target]


@needs_ffmpeg
def test_frames_are_what_upscaling_each_gives(clips, model, tmp_path):
    output = tmp_path / "out.mkv"
    upscale_video(model, clips / "constant.mp4", output, Options(codec="ffv1", segment=7, threads=1))
    source, result = probe(clips / "constant.mp4"), probe(output)
    with frames(source) as before, frames(result) as after:
        n = 0
        for small, large in zip(before, after, strict=True):
            np.testing.assert_array_equal(large, model.upscale(small, threads=1).pixels)
            n += 1
    assert n == 12


@needs_ffmpeg
def test_what_stands_still_is_computed_once(clips, model, tmp_path):
    still = tmp_path / "still.mkv"
    ffmpeg(
        "-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate=12:duration=1",
        "-vf", "trim=end_frame=1,loop=5:1:0,setpts=N/12/TB", "-c:v", "ffv1", still,
    )  # fmt: skip
    report = upscale_video(model, still, tmp_path / "out.mkv", Options(threads=1))
    assert report.n_frames == 6
    assert report.computed == pytest.approx(1 / 6)


def start(source, output):
    arguments = [
        sys.executable,
        "-m",
        "cadyq",
        "video",
        source,
        "-o",
        output,
        "--segment",
        "2",
        "--threads",
        "1",
        "--model",
        "srresnet-x4-cadyq",
    ]
    return subprocess.Popen(
        list(map(str, arguments)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(cadyq.__file__).parents[1])},
    )  # fmt: skip


@needs_ffmpeg
def test_killed_and_resumed_it_is_identical(clips, model, tmp_path):
    source = clips / "constant.mp4"
    whole, output = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    options = Options(segment=2, threads=1)
    upscale_video(model, source, whole, options)
    parts = tmp_path / f".{output.name}.parts"
    for n_parts in (1, 3):
        process = start(source, output)
        end = time.monotonic() + 60
        while len(list(parts.glob("*.nut"))) < n_parts:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not output.exists()
    report = upscale_video(model, source, output, options)
    assert report.n_resumed >= 6
    assert output.read_bytes() == whole.read_bytes()
    assert not parts.exists()


@needs_ffmpeg
def test_other_options_do_not_resume(clips, model, tmp_path, monkeypatch):
    source, output = clips / "constant.mp4", tmp_path / "out.mp4"

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cadyq.video.convert.join", broken)
    with pytest.raises(KeyboardInterrupt):
        upscale_video(model, source, output, Options(threads=1))
    monkeypatch.undo()
    report = upscale_video(model, source, output, Options(threads=1, crf=40))
    assert report.n_resumed == 0


@needs_ffmpeg
def test_mistakes_are_told(clips, tmp_path, capsys):
    (tmp_path / "no.mp4").write_bytes(b"this is no video")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "sound.mka")
    good = clips / "constant.mp4"
    for source, target, code, word in (
        (tmp_path / "missing.mp4", "o.mp4", 3, "missing.mp4"),
        (tmp_path / "no.mp4", "o.mp4", 3, "not a video"),
        (tmp_path / "sound.mka", "o.mp4", 3, "no video"),
        (good, "o.gif", 2, ".mkv"),
        (good, "deep/o.mp4", 2, "folder"),
    ):
        assert cli.main(["video", str(source), "-o", str(tmp_path / target)]) == code
        told = capsys.readouterr().err
        assert word in told
        assert "Traceback" not in told
    assert cli.main(["video", str(good), "-o", str(tmp_path / "o.mp4"), "--codec", "ffv1"]) == 2
    assert cli.main(["video", str(good), "-o", str(tmp_path / "o.mp4"), "--crf", "99"]) == 2


def test_missing_ffmpeg_is_explained(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["video", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.mp4")]) == 7
    assert "install ffmpeg" in capsys.readouterr().err


@needs_ffmpeg
def test_command_line(clips, tmp_path, capsys):
    output = tmp_path / "o.mkv"
    code = cli.main(["video", str(clips / "variable.mkv"), "-o", str(output), "--threads", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (found["width"], found["n_frames"]) == (4 * WIDTH, len(times(output)))


def test_choices_are_those_of_the_library():
    assert tuple(CODECS) == command.CODECS
