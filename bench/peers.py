"""Times the integer engine beside other runtimes on the same network, and says what each makes of the pictures.

    python bench/peers.py [--network edsr srresnet idn carn] [--collapsed] [--threads 2] [--rounds 5]

One command: makes an environment for the peers (``--env``, once), exports our float network to them, quantizes it
with their own tools on training crops, checks that each runs as meant, and times everybody in turns: onnxruntime
float32 and 8-bit QDQ, OpenVINO float32 and NNCF 8-bit, ncnn float32 and 8-bit, torch float32 channels_last, and
cadyq's static 8-bit network. In every round each contestant has one turn, in a process of its own with the machine
to itself: a run to warm up, then timed ones. Peers get the stock graph; with ``--collapsed`` they get the network
whose linear tail is one convolution (EDSR), as our engine makes it itself.

The run fails (exit code 1) where a float peer differs from torch by more than half a grey level, or where an 8-bit
peer takes more than 0.75 of its own float32 time: then it is set up wrongly, and beating it would prove nothing.
A peer that cannot be installed or cannot run the network is listed as missing. Networks without trained weights
(NAME-x4-float in models/, or --weights NAME=FILE) get random ones and no PSNR.

CADYQ_ISA holds our engine to one instruction set; ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY do so for peers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import commit, cpu
from peer_worker import TRACED
from torch import Tensor, nn

from cadyq.backbones import Backbone, build_backbone
from cadyq.backbones.edsr import EDSR
from cadyq.backbones.srresnet import SRResNet
from cadyq.config import Quantization
from cadyq.data.crops import load_crops
from cadyq.data.sets import load_pairs
from cadyq.engine.run import available_isas
from cadyq.engine.synthetic import random_picture
from cadyq.errors import CadyqError, DataError, UnsupportedError
from cadyq.functional.fidelity import psnr_y
from cadyq.functional.image import to_levels
from cadyq.io.files import write_atomic
from cadyq.io.importers import import_float
from cadyq.io.models import load_model
from cadyq.io.plans import LoadedPlan, save_plan
from cadyq.io.shipped import MODEL_SUFFIXES, model_files
from cadyq.lowering import lower
from cadyq.quant.context import Context
from cadyq.quant.convert import calibrate, convert, observe, scale_clips

HERE = Path(__file__).resolve().parent
WORKER = HERE / "peer_worker.py"
PACKAGES = ["onnxruntime", "onnx", "openvino", "nncf", "ncnn", "pnnx"]
TORCH = "torch==2.13.0"  # what pnnx's TorchScript and the float reference are read with
# IDN adds its residual to a bicubic picture; MATLAB's is no operator of any runtime, torch's is one of all.
NETWORKS: dict[str, dict[str, Any]] = {
    "edsr": {},
    "srresnet": {"keras": True, "norm": False},
    "idn": {"bicubic": "torch"},
    "carn": {},
}
STATIC8 = Quantization(bits=(8,), channel_power=0.8, edges="integer", stream_bits=16)
MAX_ERROR = 0.5 / 255  # of a float peer, against torch
MAX_SHARE = 0.75  # of its own float32 time, of an 8-bit peer
# (AVX2 floor, goal), (AVX-512 VNNI floor, goal): how many times faster than the fastest peer.
BARS = {
    ("edsr", "fp32"): ((5, 6), (5, 8)),
    ("edsr", "int8"): ((3.4, 4), (2.3, 3)),
    ("edsr-collapsed", "int8"): ((2, 2.5), (1.35, 1.75)),
    ("srresnet", "int8"): ((2, 2.5), (1.4, 1.7)),
    ("idn", "int8"): ((2, 2.5), (1.4, 1.7)),
    ("carn", "int8"): ((2, 2.5), (1.4, 1.7)),
}


@dataclass
class Contestant:
    """Who runs, and what is known of the run; ``missing`` says why it does not take part."""

    kind: str
    precision: str
    model: Path
    python: str
    prepare: str = ""  # kind of preparation, "" if the export is used as it is
    source: Path | None = None
    missing: str = ""
    version: str = ""
    note: str = ""
    times_ms: list[float] = field(default_factory=list)
    max_error: float | None = None
    psnr_to_float_db: float | None = None
    psnr_db: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.precision}"

    @property
    def median(self) -> float:
        return statistics.median(self.times_ms)

    def ask(self, *request: Any) -> Any:
        """One request to the process, and its answer."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        if request:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.stop()
            raise RuntimeError("it died; its messages are above")
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def record(self) -> dict[str, Any]:
        kept = ("missing", "version", "note", "max_error", "psnr_to_float_db", "psnr_db", "times_ms")
        result = {"name": self.name, **{key: getattr(self, key) for key in kept}, "peak_mb": self.peak_mb}
        if self.times_ms:
            result |= {"min_ms": min(self.times_ms), "median_ms": self.median}
        return result


# --- The network ---------------------------------------------------------------------------------------------


def float_network(name: str, weights: str | None) -> tuple[Backbone, bool]:
    """Our float network, and whether it is trained."""
    path = Path(weights) if weights else model_files(HERE.parent / "models").get(f"{name}-x4-float")
    if path is None:
        torch.manual_seed(0)
        return build_backbone(name, scale=4, **NETWORKS[name]).eval(), False
    is_ours = path.name.endswith(MODEL_SUFFIXES)
    network = load_model(path).network if is_ours else import_float(path, 4)
    return (network.folded() if isinstance(network, SRResNet) else network), True


class Plain(nn.Module):
    """The network alone: what decides about bits is not part of a float export."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, lr: Tensor) -> Tensor:
        result: Tensor = self.network(lr, Context(torch.zeros(1, 2), torch.zeros(1)))
        return result


class Collapsed(nn.Module):
    """EDSR whose tail (conv, shuffle, conv, shuffle, conv: all linear) is one 5x5 convolution and one shuffle.

    Equal to the network except for the outermost pixels, where the stock graph pads between the layers.
    """

    def __init__(self, network: EDSR) -> None:
        super().__init__()
        self.network, self.scale = network, network.scale
        channels, reach, size = network.tail.in_channels, 2, 9

        def response(x: Tensor) -> Tensor:
            y = network.double()._tail(x, Context(torch.zeros(len(x), 2).double(), torch.zeros(len(x))))
            return nn.functional.pixel_unshuffle(y, self.scale)

        with torch.no_grad():
            middle = size // 2
            impulses = torch.zeros(channels, channels, size, size, dtype=torch.float64)
            impulses[torch.arange(channels), torch.arange(channels), middle, middle] = 1
            zero = response(torch.zeros(1, channels, size, size, dtype=torch.float64))
            found = (response(impulses) - zero)[:, :, middle - reach : middle + reach + 1]
            found = found[..., middle - reach : middle + reach + 1].flip(2, 3).transpose(0, 1)
            network.float()
        self.tail = nn.Conv2d(channels, found.shape[0], 2 * reach + 1, padding=reach)
        self.tail.weight.data.copy_(found)
        assert self.tail.bias is not None
        self.tail.bias.data.copy_(zero[0, :, middle, middle])

    def forward(self, lr: Tensor, ctx: Context) -> Tensor:
        def tail(x: Tensor, _: Context) -> Tensor:
            return nn.functional.pixel_shuffle(self.tail(x), self.scale)

        original = self.network._tail
        self.network._tail = tail  # type: ignore[method-assign]
        try:
            return self.network(lr, ctx)
        finally:
            self.network._tail = original  # type: ignore[method-assign]


def export(network: nn.Module, folder: Path) -> None:
    """TorchScript and ONNX (opset 17, dynamic sizes) of a float network, both from the same trace."""
    plain, example = Plain(network).eval(), torch.rand(TRACED)
    axes = {0: "batch", 2: "height", 3: "width"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(plain, example, check_trace=False), str(folder / "network.pt"))
        torch.onnx.export(
            plain,
            (example,),
            str(folder / "network.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["lr"],
            output_names=["sr"],
            dynamic_axes={"lr": axes, "sr": axes},
        )


def save_static(name: str, network: Backbone, crops: Any, path: Path) -> None:
    """Write the plan of our static 8-bit network, calibrated on the crops and not fine-tuned.

    Raises:
        UnsupportedError: the engine has no integer form of the network.
    """
    batches = [torch.from_numpy(planar(part)) for part in np.array_split(crops, max(1, len(crops) // 8))]
    converted = convert(network, STATIC8).eval()
    calibrate(converted, observe(network, batches), STATIC8)
    scale_clips(converted, network, batches[0])
    plan = lower(converted, STATIC8)
    save_plan(path, LoadedPlan(plan, 0, network.radius, None, {"backbone": name, "scale": 4}))


def planar(pictures: Any) -> Any:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w)."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32) / 255


# --- The contestants -----------------------------------------------------------------------------------------


def ensure_environment(folder: Path) -> str:
    """Python of the peers' environment, made if it is not there; what cannot be installed is left out."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making {folder}: about 2 GB, a few minutes")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for package in (TORCH, *PACKAGES):
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package.split('=')[0]!r}) is None)"
        if subprocess.run([python, "-c", probe], check=False).returncode:
            done = subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=False)
            if done.returncode:
                print(f"{package} cannot be installed; what needs it is missing below")
    return str(python)


def contestants(folder: Path, python: str) -> list[Contestant]:
    onnx, script, param = folder / "network.onnx", folder / "network.pt", folder / "network.param"
    return [
        Contestant("torch", "fp32", script, python),
        Contestant("onnxruntime", "fp32", onnx, python),
        Contestant("onnxruntime", "int8", folder / "ort-int8.onnx", python, "onnxruntime", onnx),
        Contestant("openvino", "fp32", onnx, python),
        Contestant("openvino", "int8", folder / "nncf-int8.xml", python, "openvino", onnx),
        Contestant("ncnn", "fp32", param, python, "ncnn-convert", script),
        Contestant("ncnn", "int8", folder / "ncnn-int8.param", python, "ncnn", param),
        Contestant("cadyq", "int8", folder / "network.plan.safetensors", sys.executable),
    ]


def prepare(one: Contestant, crops: Path) -> None:
    if not one.prepare or one.model.exists():
        return
    command = [one.python, WORKER, "prepare", one.source, one.model, "--kind", one.prepare, "--crops", crops]
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        one.model.with_suffix(".log").write_text(done.stdout + done.stderr)
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        one.missing = f"preparation failed: {lines[-1]} (see {one.model.with_suffix('.log')})"
    print(f"  {one.name}: prepared in {time.perf_counter() - start:.0f} s {one.missing}", flush=True)


@contextmanager
def running(one: Contestant, size: str, threads: int, log: Any) -> Iterator[None]:
    """Run its process; one that does not come up, or dies, is missing from then on."""
    command = [one.python, WORKER, "serve", one.model, "--kind", one.kind, "--size", size]
    command += ["--threads", threads, *(["--variant", one.note] if one.kind == "ncnn" and one.note else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if one.kind == "cadyq":
        paths = [str(HERE.parent / "src"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    pipe = subprocess.PIPE
    one.process = subprocess.Popen(
        list(map(str, command)), stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment
    )
    try:
        ready = one.ask()
        one.version = ready["version"]
        if ready["note"] not in one.note:
            one.note = ", ".join(filter(None, (one.note, ready["note"])))
        yield
    except (RuntimeError, OSError) as error:
        one.missing = f"{error} (see {log.name})"
        print(f"  {one.name}: {one.missing}", flush=True)
    finally:
        one.stop()


def take_turn(one: Contestant, repeats: int, reference: Any, scratch: Path) -> None:
    """One warm-up run, whose output is looked at, and ``repeats`` runs on the clock."""
    one.ask("output", str(scratch))
    if one.max_error is None:
        found = np.load(scratch)
        found = found.astype(np.float64) / 255 if found.dtype == np.uint8 else found.clip(0, 1)
        error = np.abs(found - reference)
        one.max_error = float(error.max())
        one.psnr_to_float_db = float(-10 * np.log10(max(np.square(error).mean(), 1e-12)))
    one.times_ms += [one.ask("time") for _ in range(repeats)]
    one.peak_mb = max(one.peak_mb, one.ask("memory"))


def measure_quality(one: Contestant, data: str, limit: int | None, scratch: Path) -> None:
    """Mean Y-PSNR over a data set's pictures."""
    source = scratch.with_name("lr.npy")
    found = []
    for pair in islice(load_pairs(data, 4), limit):
        np.save(source, pair.lr)
        one.ask("picture", str(source), str(scratch))
        output = np.load(scratch)
        pixels = output if output.dtype == np.uint8 else to_levels(output)
        found.append(psnr_y(pixels, pair.hr, 4))
    one.psnr_db[data if limit is None else f"{data}, first {limit}"] = float(np.mean(found))


def float_output(network: nn.Module, picture: Any) -> Any:
    """What torch makes of a picture: (h, w, 3), clipped to [0, 1]."""
    with torch.no_grad():
        result = Plain(network)(torch.from_numpy(planar(picture[None])))
    return result[0].permute(1, 2, 0).clamp(0, 1).numpy()


# --- The report ----------------------------------------------------------------------------------------------


def faults(everybody: list[Contestant]) -> list[str]:
    """What is wrong with this run, if anything."""
    result = []
    timed = {one.name: one for one in everybody if one.times_ms}
    for one in timed.values():
        if one.precision == "fp32" and one.max_error is not None and one.max_error > MAX_ERROR:
            result.append(f"{one.name} differs from torch by up to {one.max_error * 255:.2f} grey levels")
        own = timed.get(f"{one.kind} fp32")
        if one.precision == "int8" and own is not None and one.median > MAX_SHARE * own.median:
            share = one.median / own.median
            result.append(f"{one.name} takes {share:.2f} of its own float32 time (at most {MAX_SHARE})")
    return result


def ratios(everybody: list[Contestant], case: str, isa: str) -> dict[str, Any]:
    """How many times faster than the fastest peer of each precision, with the bar."""
    timed = [one for one in everybody if one.times_ms]
    ours = next((one for one in timed if one.kind == "cadyq"), None)
    result: dict[str, Any] = {}
    for precision in ("fp32", "int8"):
        peers = [one for one in timed if one.kind != "cadyq" and one.precision == precision]
        if ours is None or not peers:
            continue
        best = min(peers, key=lambda one: one.median)
        entry: dict[str, Any] = {"peer": best.name, "ratio": best.median / ours.median}
        if (case, precision) in BARS:
            entry["floor"], entry["goal"] = BARS[case, precision][isa in ("avx512vnni", "amx")]
        result[precision] = entry
    return result


def report(record: dict[str, Any]) -> None:
    print(f"\n{record['case']}, {record['size']}, {record['threads']} threads, {record['weights']} weights")
    quality = sorted({key for one in record["contestants"] for key in one["psnr_db"]})
    heads = ["min ms", "median ms", "peak MB", "vs float dB", *(f"{key} dB" for key in quality)]
    print(f"{'':<18}" + "".join(f"{head:>20}" for head in heads))
    for one in record["contestants"]:
        if one["missing"]:
            print(f"{one['name']:<18}  missing: {one['missing']}")
            continue
        values = [one["min_ms"], one["median_ms"], one["peak_mb"], one["psnr_to_float_db"]]
        cells = "".join(f"{v:>20.1f}" for v in values) + "".join(
            f"{one['psnr_db'].get(key, float('nan')):>20.3f}" for key in quality
        )
        print(f"{one['name']:<18}{cells}  {one['version']} {one['note']}")
    for precision, entry in record["ratios"].items():
        bar = f", floor {entry['floor']}, goal {entry['goal']}" if "floor" in entry else ""
        print(f"cadyq is {entry['ratio']:.2f}x as fast as the fastest {precision} peer, {entry['peer']}{bar}")
    for fault in record["faults"]:
        print(f"WRONG SET-UP: {fault}")


# --- One network ---------------------------------------------------------------------------------------------


def calibration_crops(folder: Path, number: int) -> tuple[Any, str]:
    """LR crops of the training set; drawn ones where it is missing, and then the record says so."""
    try:
        return np.array(load_crops("train", 4, folder / "crops", limit=number).lr), f"{number} training crops"
    except DataError as error:
        print(f"no training crops ({error}); calibrated on drawn pictures, so 8-bit quality means nothing")
        return np.stack([random_picture(96, 96, seed=i) for i in range(number)]), "drawn pictures"


def mosaic(crops: Any, height: int, width: int) -> Any:
    """A picture of crops side by side: content as 8-bit networks were calibrated for."""
    rows, cols = -(-height // crops.shape[1]), -(-width // crops.shape[2])
    index = np.arange(rows * cols).reshape(rows, cols) % len(crops)
    whole = crops[index].transpose(0, 2, 1, 3, 4).reshape(rows * crops.shape[1], cols * crops.shape[2], 3)
    return np.ascontiguousarray(whole[:height, :width])


def run_case(name: str, args: argparse.Namespace, python: str) -> list[str]:
    case = f"{name}-collapsed" if args.collapsed else name
    network, is_trained = float_network(name, dict(w.split("=", 1) for w in args.weights).get(name))
    crops, calibrated_on = calibration_crops(args.work, args.crops)
    state = b"".join(v.numpy().tobytes() for v in network.state_dict().values())
    digest = hashlib.sha256(state + crops.tobytes() + WORKER.read_bytes() + Path(__file__).read_bytes())
    folder = args.work / f"{case}-{digest.hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "output.npy"
    width, height = map(int, args.size.split("x"))
    picture = mosaic(crops, height, width)
    np.save(folder / f"picture-{args.size}.npy", picture)
    np.save(folder / "picture-96x96.npy", crops[0])
    np.save(folder / "crops.npy", crops)
    print(f"{case}: in {folder}")
    everybody = [one for one in contestants(folder, python) if not args.only or one.name in args.only]
    try:
        for one in everybody:
            if one.kind == "cadyq":
                save_static(name, network, crops, one.model)
                one.note = "calibrated, not fine-tuned"
    except UnsupportedError as error:
        one.missing = str(error)
    exported: nn.Module = network
    if args.collapsed:
        assert isinstance(network, EDSR)
        exported = Collapsed(network).eval()
    if not (folder / "network.onnx").exists():
        export(exported, folder)
    for one in everybody:
        prepare(one, folder / "crops.npy")
    reference = float_output(exported, picture)
    with (folder / "messages.txt").open("w") as log:
        for i in range(args.rounds):
            for one in everybody:
                if not one.missing:
                    with running(one, args.size, args.threads, log):
                        take_turn(one, args.repeats, reference, scratch)
            print(f"  round {i + 1} of {args.rounds}", flush=True)
        for one in everybody:
            if is_trained and args.data and not one.missing:
                with running(one, "96x96", args.threads, log):
                    measure_quality(one, args.data, args.limit, scratch)
    isa = os.environ.get("CADYQ_ISA") or (available_isas() or ["reference"])[0]
    record = {
        "case": case,
        "size": args.size,
        "threads": args.threads,
        "rounds": args.rounds,
        "weights": "trained" if is_trained else "random",
        "calibrated_on": calibrated_on,
        "cpu": cpu(),
        "isa": isa,
        "python": platform.python_version(),
        "commit": commit(),
        "ratios": ratios(everybody, case, isa),
        "faults": faults(everybody),
        "contestants": [one.record() for one in everybody],
    }
    report(record)
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"peers-{case}-{isa}.json"
    write_atomic(target, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written: {target}")
    return [f"{case}: {fault}" for fault in record["faults"]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument(
        "--collapsed", action="store_true", help="peers get EDSR's tail as one layer, too (only edsr)"
    )
    parser.add_argument("--size", default="480x270", help="of the LR picture (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="everybody's turns (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs a turn (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=32, help="crops to calibrate on (default: %(default)s)")
    parser.add_argument("--data", default="Set14", help="data set for the PSNR; '' leaves it out")
    parser.add_argument("--limit", type=int, help="only the first so many of its pictures")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE", help="trained float weights")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these contestants, say 'openvino int8'")
    parser.add_argument("--env", type=Path, default=HERE.parent / "build" / "peers-env")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "peers")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.collapsed:
        args.network = ["edsr"]
    python = ensure_environment(args.env.resolve())
    args.work.mkdir(parents=True, exist_ok=True)
    args.work, args.out = args.work.resolve(), args.out.resolve()
    print(cpu())
    wrong = []
    for name in args.network:
        wrong += run_case(name, args, python)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CadyqError as problem:
        sys.exit(f"peers: {problem}")
