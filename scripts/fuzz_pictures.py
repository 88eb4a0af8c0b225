"""Corrupted pictures: no crash, no hang, no half file, and a clear message each.

    python scripts/fuzz_pictures.py              # 2,400 files, some minutes
    python scripts/fuzz_pictures.py --files 150

Files of every format and layout are made, and spoiled: flipped bits, cut ends, overwritten runs, doubled parts, wrong
suffixes, sizes that a few bytes claim (decompression bombs). Each is upscaled by the real code in a worker process, in
memory and streamed; where a spoiled header makes a valid picture much larger, it is only decoded. A worker that dies or
says nothing for a while is counted against the file it was working on.
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import random
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HANG_SECONDS = 60
MEMORY_BYTES = 6 << 30
LARGEST_UPSCALED = 10_000  # pixels; the files have 320 or 1280
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".avif": "AVIF"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(Path(options.worker))
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        (room / "in").mkdir()
        (room / "out").mkdir()
        paths = make_files(room / "in", options.files, random.Random(options.seed))
        results = []
        for result in run_all(paths, room / "out"):
            results.append(result)
            if len(results) % 100 == 0:
                print(f"{len(results)} of {len(paths)}", file=sys.stderr, flush=True)
    return report(results)


def make_files(folder: Path, number: int, rng: random.Random) -> list[Path]:
    """Spoiled files; the kind of damage is the first part of the name."""
    originals = [(suffix, content) for suffix in FORMATS for content in valid_files(suffix)]
    paths = []
    for i in range(number):
        suffix, content = originals[i % len(originals)]
        damage = list(DAMAGES)[i // len(originals) % len(DAMAGES)]
        spoiled = DAMAGES[damage](bytearray(content), rng)
        if damage == "suffix":
            suffix = rng.choice([s for s in FORMATS if s != suffix])
        path = folder / f"{damage}-{i}{suffix}"
        path.write_bytes(spoiled)
        paths.append(path)
    return paths


def valid_files(suffix: str) -> list[bytes]:
    noise = np.random.default_rng(0)
    rgb = np.kron(noise.integers(0, 256, (8, 10, 3)), np.ones((2, 2, 1))).astype(np.uint8)
    color = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    images = {"rgb": color, "gray": color.convert("L")}
    if suffix != ".jpg":
        images["rgba"] = Image.fromarray(np.dstack([rgb, rgb[..., 0]]))
    if suffix in (".png", ".tif"):
        images |= {"palette": color.quantize(9), "deep": Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)}
    if suffix in (".jpg", ".tif"):
        images["cmyk"] = color.convert("CMYK")
    contents = []
    for image in images.values():
        buffer = io.BytesIO()
        image.save(buffer, FORMATS[suffix], exif=exif.tobytes())
        contents.append(buffer.getvalue())
    if suffix == ".png":
        contents.append(deep_png(rgb.astype(">u2") * 257))
    return contents


def deep_png(levels: np.ndarray[Any, Any]) -> bytes:
    """A PNG file of 16 bits per channel, for which the fuzzed code needs libvips."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, *zip(*parts, strict=True)))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def flip(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def flip_header(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 2, 4))):
        content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
    return bytes(content)


def cut(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.randrange(len(content))])


def overwrite(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    content[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
    return bytes(content)


def double(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return bytes(content[: start + rng.randrange(200)] + content[start:])


def bomb(content: bytearray, rng: random.Random) -> bytes:
    """Claim a huge size, wherever the format keeps it (40 x 32 or 20 x 16 pixels before)."""
    huge = rng.choice((30_000, 65_535, 60_000))
    if content[:4] == b"\x89PNG":
        body = struct.pack(">II", huge * rng.choice((1, 1000)), huge) + bytes(content[24:29])
        return bytes(content[:8]) + chunk(b"IHDR", body) + bytes(content[33:])
    for order in (">H", "<H", ">I", "<I"):
        old = [struct.pack(order, n) for n in (20, 16)]
        for value in old:
            content = bytearray(bytes(content).replace(value, struct.pack(order, huge)))
    return bytes(content)


DAMAGES = {
    "flip": flip,
    "header": flip_header,
    "cut": cut,
    "overwrite": overwrite,
    "double": double,
    "bomb": bomb,
    "suffix": lambda content, rng: bytes(content),
}


def run_all(paths: list[Path], output: Path) -> Any:
    """Yield (path, what happened) for every file, whatever the workers do."""
    left = list(paths)
    while left:
        command = [sys.executable, __file__, "--worker", str(output)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin is not None and worker.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=lambda w=worker, q=lines: [q.put(s) for s in [*w.stdout, ""]], daemon=True
        ).start()
        threading.Thread(target=feed, args=(worker.stdin, list(left)), daemon=True).start()
        while left:
            try:
                line = lines.get(timeout=HANG_SECONDS)
            except queue.Empty:
                line = ""
                worker.kill()
                yield left.pop(0), {"end": "hang"}
                break
            if not line:
                yield left.pop(0), {"end": f"crash (code {worker.wait()})"}
                break
            yield left.pop(0), json.loads(line)
        worker.kill()
        worker.wait()


def feed(stdin: Any, paths: list[Path]) -> None:
    try:
        with stdin:
            stdin.write("".join(f"{path}\n" for path in paths))
    except OSError:
        pass  # the worker died, which its reader notices


def work(output: Path) -> int:
    """Upscale every file named on standard input; print one JSON object each."""
    from cadyq import pictures

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    wanted = pictures.Wanted(model="srresnet-x4-pams8", threads=1)
    for i, name in enumerate(line.rstrip("\n") for line in sys.stdin):
        pictures.STREAM_PIXELS = 0 if i % 2 else 1 << 30
        print(json.dumps(one(Path(name), output, wanted)), flush=True)
    return 0


def one(path: Path, output: Path, wanted: Any) -> dict[str, Any]:
    from cadyq.errors import CadyqError
    from cadyq.pictures import prepare

    target = output / "result.png"
    try:
        task = prepare(path, target, wanted)
        if task.header.width * task.header.height > LARGEST_UPSCALED:
            task.read()
        else:
            task.run()
        said = {"end": "ok"}
    except CadyqError as error:
        said = {"end": "refused", "message": str(error), "names_file": path.name in str(error)}
        if target.exists():
            said["end"] = "wrote a file in spite of an error"
    except BaseException as error:
        said = {"end": "traceback", "message": repr(error)}
    target.unlink(missing_ok=True)
    if list(output.iterdir()):
        said["end"] = f"left {[p.name for p in output.iterdir()]}"
    return said


def report(results: list[tuple[Path, dict[str, Any]]]) -> int:
    ends = Counter(said["end"] for _, said in results)
    bad = [(p, s) for p, s in results if s["end"] not in ("ok", "refused")]
    unclear = [(p, s) for p, s in results if s["end"] == "refused" and not s["names_file"]]
    for path, said in [*bad, *unclear][:20]:
        print(f"{path.name}: {said}")
    for damage in DAMAGES:
        of_kind = Counter(s["end"] for p, s in results if p.name.split("-")[0] == damage)
        print(f"{damage:>10}: {dict(of_kind)}")
    print(
        f"{len(results)} files: {dict(ends)}; {len(bad)} bad, {len(unclear)} messages that do not name the file"
    )
    return 1 if bad or unclear else 0


if __name__ == "__main__":
    sys.exit(main())
