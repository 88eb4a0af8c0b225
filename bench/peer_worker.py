"""One contestant of `peers.py` in a process of its own: prepares a network for a runtime, and runs it on request.

`peers.py` starts this file in the peers' environment (or its own, for cadyq); it needs NumPy and the runtime.

    peer_worker.py prepare SOURCE TARGET --kind KIND --crops CROPS.npy  converts or quantizes a network
    peer_worker.py serve MODEL --kind KIND --size WxH --threads N       answers lines of JSON on stdin

Requests of ``serve``: ``["time"]`` runs once on the picture of the fixed size and answers the milliseconds;
``["output", TARGET]`` writes that run's output, ``["picture", SOURCE, TARGET]`` upscales any picture; both as
.npy. Pictures are uint8 ``(h, w, 3)``, outputs float32 or uint8 of the same layout; peers get and give float
tensors of their own layout within the measured time, so that no conversion is charged to them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from machine import peak_mb


def planar(picture: Any) -> Any:
    """uint8 (h, w, 3) -> float32 (1, 3, h, w) in [0, 1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None].astype(np.float32) / 255)


def interleaved(output: Any) -> Any:
    """(1, 3, h, w) or (3, h, w) -> (h, w, 3)."""
    return np.asarray(output).reshape(-1, *output.shape[-2:]).transpose(1, 2, 0)


class Peer:
    """A network made ready: ``fixed`` runs the picture of the fixed size, ``any`` one of any size."""

    version = ""
    note = ""

    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        raise NotImplementedError

    def fixed(self) -> Any:
        raise NotImplementedError

    def any(self, picture: Any) -> Any:
        raise NotImplementedError

    def interleaved(self, output: Any) -> Any:
        return interleaved(output)


class Torch(Peer):
    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.version = torch, torch.__version__
        self.note = torch.backends.cpu.get_cpu_capability()
        self.network = torch.jit.load(str(model)).to(memory_format=torch.channels_last)
        self.input = self._tensor(picture)

    def _tensor(self, picture: Any) -> Any:
        return self.torch.from_numpy(planar(picture)).to(memory_format=self.torch.channels_last)

    def fixed(self) -> Any:
        return self.network(self.input)

    def any(self, picture: Any) -> Any:
        return self.network(self._tensor(picture))

    def interleaved(self, output: Any) -> Any:
        return interleaved(output.numpy())


class OnnxRuntime(Peer):
    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.runtime, self.model, self.threads = onnxruntime, model, threads
        self.input = planar(picture)
        self.session = self._session(self.input.shape)
        self.dynamic: Any = None

    def _session(self, shape: tuple[int, ...] | None) -> Any:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        if shape is not None:
            for axis, name in enumerate(("batch", "height", "width")):
                options.add_free_dimension_override_by_name(name, (shape[0], *shape[2:])[axis])
        return self.runtime.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])

    def fixed(self) -> Any:
        return self.session.run(None, {"lr": self.input})[0]

    def any(self, picture: Any) -> Any:
        if self.dynamic is None:
            self.dynamic = self._session(None)
        return self.dynamic.run(None, {"lr": planar(picture)})[0]


class OpenVINO(Peer):
    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        import openvino

        self.version = openvino.__version__
        self.core, self.model = openvino.Core(), model
        self.config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        if (
            model.suffix == ".onnx"
        ):  # what is not quantized may be bfloat16 where that is the runtime's choice
            self.config["INFERENCE_PRECISION_HINT"] = "f32"
        self.input = planar(picture)
        network = self.core.read_model(model)
        network.reshape(list(self.input.shape))
        self.request = self._compiled(network)
        precision = self.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
        self.note = f"remainder in {precision.to_string()}"
        self.dynamic: Any = None

    def _compiled(self, network: Any) -> Any:
        return self.core.compile_model(network, "CPU", self.config).create_infer_request()

    def fixed(self) -> Any:
        return self.request.infer([self.input])[0]

    def any(self, picture: Any) -> Any:
        if self.dynamic is None:
            self.dynamic = self._compiled(self.core.read_model(self.model))
        return self.dynamic.infer([planar(picture)])[0]


NCNN_VARIANTS: dict[str, dict[str, bool]] = {
    "Winograd": {},
    "GEMM": {"winograd": False},
    "direct": {"gemm": False},
}


class Ncnn(Peer):
    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        import ncnn

        self.version, self.input = ncnn.__version__, ncnn_mat(picture)
        # Which algorithm is fastest depends on the machine, and im2col of wide kernels on large planes does not fit
        # into memory; ncnn does not try. What was found in the first turn is kept for the others.
        names = [variant] if variant else list(NCNN_VARIANTS)
        found: dict[str, tuple[float, Any]] = {}
        for name in names:
            net = load_ncnn(model, threads, **NCNN_VARIANTS[name])
            with contextlib.suppress(RuntimeError):
                self._run(self.input, net)
                start = time.perf_counter()
                self._run(self.input, net)
                found[name] = time.perf_counter() - start, net
        if not found:
            raise RuntimeError(f"ncnn fails with {', '.join(names)}, most likely for want of memory")
        self.note = min(found, key=lambda name: found[name][0])
        self.net = found[self.note][1]

    def _run(self, mat: Any, net: Any = None) -> Any:
        extractor = (net or self.net).create_extractor()
        extractor.input("in0", mat)
        code, out = extractor.extract("out0")
        if code:
            raise RuntimeError(f"ncnn failed with {code}")
        return out

    def fixed(self) -> Any:
        return self._run(self.input)

    def any(self, picture: Any) -> Any:
        return self._run(ncnn_mat(picture))

    def interleaved(self, output: Any) -> Any:
        return interleaved(np.array(output))


class Cadyq(Peer):
    def __init__(self, model: Path, picture: Any, threads: int, variant: str) -> None:
        import cadyq
        from cadyq.engine.run import Engine
        from cadyq.io.plans import load_plan

        self.version = cadyq.__version__
        self.engine = Engine(load_plan(model).plan, threads)
        self.note, self.input = self.engine.isa, picture

    def fixed(self) -> Any:
        return self.engine.upscale(self.input)

    def any(self, picture: Any) -> Any:
        return self.engine.upscale(np.ascontiguousarray(picture))

    def interleaved(self, output: Any) -> Any:
        return output.image


KINDS: dict[str, type[Peer]] = {
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
    "ncnn": Ncnn,
    "cadyq": Cadyq,
}


def has_vnni() -> bool:
    """Whether u8 x s8 products are summed without saturation."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "vnni" in cpuinfo.read_text()


def quantize_onnxruntime(source: Path, target: Path, crops: Any) -> None:
    """Static QDQ by onnxruntime's own tool: u8 activations, s8 weights per channel (7 bits where sums saturate).

    Its default calibration (smallest and largest value) suits networks without outliers only, so ranges that leave
    out 0.01 % are tried as well; what comes closer to the float network on the last crops is kept.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, pictures: Any) -> None:
            self.rest = iter(pictures)

        def get_next(self) -> dict[str, Any] | None:
            crop = next(self.rest, None)
            return None if crop is None else {"lr": planar(crop)}

    def outputs(path: Path) -> Any:
        network = OnnxRuntime(path, crops[0], os.cpu_count() or 1, "")
        return np.stack([network.any(crop) for crop in crops[-4:]]).clip(0, 1)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    wanted, best = outputs(source), np.inf
    # Histograms keep every value of every crop they see.
    for method, used in ((CalibrationMethod.MinMax, crops), (CalibrationMethod.Percentile, crops[:8])):
        tried = target.with_suffix(f".{method.name}.onnx")
        quantize_static(
            str(prepared),
            str(tried),
            Reader(used),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not has_vnni(),
            calibrate_method=method,
            extra_options={"CalibPercentile": 99.99} if method is CalibrationMethod.Percentile else {},
        )
        error = float(np.square(outputs(tried) - wanted).mean())
        print(f"{method.name}: {-10 * np.log10(error):.2f} dB to the float network")
        if error < best:
            best = error
            tried.replace(target)
    prepared.unlink()


def quantize_openvino(source: Path, target: Path, crops: Any) -> None:
    """8-bit post-training quantization by NNCF with its defaults."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    data = nncf.Dataset([planar(crop) for crop in crops])
    openvino.save_model(
        nncf.quantize(model, data, subset_size=len(crops)), str(target), compress_to_fp16=False
    )


# pnnx wants the shape that was traced, and another one to see which sizes are not constants.
TRACED, OTHER = (1, 3, 48, 64), (1, 3, 64, 80)


def convert_ncnn(source: Path, target: Path) -> None:
    """TorchScript -> ncnn by pnnx, weights kept as float32."""
    tool = Path(sys.executable).with_name("pnnx")
    scratch = target.with_name("pnnx")
    scratch.mkdir(exist_ok=True)
    copy = scratch / "network.pt"
    copy.write_bytes(source.read_bytes())
    subprocess.run(
        [tool, copy, f"inputshape={list(TRACED)}", f"inputshape2={list(OTHER)}", "fp16=0"],
        check=True,
        cwd=scratch,
    )
    (scratch / "network.ncnn.bin").replace(target.with_suffix(".bin"))
    (scratch / "network.ncnn.param").replace(target)


def ncnn_mat(picture: Any) -> Any:
    """uint8 (h, w, 3) as ncnn's tensor, which owns its memory."""
    import ncnn

    values = planar(picture)[0]  # alive until it is copied: ncnn keeps a pointer, not a reference
    return ncnn.Mat(values).clone()


def load_ncnn(
    param: Path, threads: int, *, packing: bool = True, winograd: bool = True, gemm: bool = True
) -> Any:
    """A network of ncnn; its parameters stand beside the weights, .param and .bin."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.use_packing_layout = packing
    net.opt.use_winograd_convolution, net.opt.use_sgemm_convolution = winograd, gemm
    if net.load_param(str(param)) or net.load_model(str(param.with_suffix(".bin"))):
        raise RuntimeError(f"ncnn cannot load {param}")
    return net


# ncnn layers with weights: how many floats each kind of array has, by the layer's parameters. Weights of
# convolutions are preceded by four bytes that say how they are stored (0: float32).
TAGGED = ("Convolution", "ConvolutionDepthWise", "Deconvolution")


def quantize_ncnn(source: Path, target: Path, crops: Any) -> None:
    """What ncnn's own tools do (they are not in its Python package): scales of weights and inputs beside the weights.

    Weights per output channel (6 bits for 3x3 layers, as ncnn's integer Winograd needs), inputs by their largest
    magnitude on the calibration crops. ncnn rounds the weights when it loads them. Grouped layers stay float: ncnn's
    integer kernels for them are the generic ones.
    """
    lines = source.read_text().splitlines()
    layers = [line.split() for line in lines[2:]]
    convs = {layer[1]: layer[4] for layer in layers if layer[0] == "Convolution"}  # name -> input blob
    readers: dict[str, list[list[str]]] = defaultdict(list)
    for layer in layers:
        for blob in layer[4 : 4 + int(layer[2])]:
            readers[blob].append(layer)
    largest = dict.fromkeys(convs.values(), 1e-9)
    net = load_ncnn(source, os.cpu_count() or 1, packing=False)
    for crop in crops:
        extractor = net.create_extractor()
        extractor.set_light_mode(False)
        extractor.input("in0", ncnn_mat(crop))
        for blob in largest:
            _, value = extractor.extract(blob)
            largest[blob] = max(largest[blob], float(np.abs(np.array(value)).max()))
    weights, written = source.with_suffix(".bin").read_bytes(), bytearray()
    position = 0

    def take(n: int) -> Any:
        nonlocal position
        part = weights[position : position + 4 * n]
        position += 4 * n
        written.extend(part)
        return np.frombuffer(part, np.float32)

    for i, layer in enumerate(layers):
        kind, name, n_in, n_out = layer[0], layer[1], int(layer[2]), int(layer[3])
        values = dict(p.split("=") for p in layer[4 + n_in + n_out :])
        if kind in TAGGED:
            if take(1).view(np.uint32)[0]:
                raise RuntimeError(f"{name}: weights are not float32")
            kernel, n_outputs = take(int(values["6"])), int(values["0"])
            if values.get("5") == "1":
                take(n_outputs)
            if name not in convs:
                continue
            rows = kernel.reshape(n_outputs, -1)
            levels = 31 if values["1"] == "3" else 127
            written.extend((levels / np.abs(rows).max(1).clip(1e-9)).astype(np.float32).tobytes())
            written.extend(np.float32(127 / largest[convs[name]]).tobytes())
            following = readers[layer[4 + n_in]]
            if len(following) == 1 and following[0][0] == "Convolution":
                # Its result goes to one convolution only: it is rounded at once to what that one reads.
                written.extend(np.float32(127 / largest[layer[4 + n_in]]).tobytes())
                lines[2 + i] += " 8=102"
            else:
                lines[2 + i] += " 8=2"
        elif kind == "PReLU":
            take(int(values["0"]))
        elif kind == "MemoryData":
            shape = [int(values[k]) for k in ("0", "1", "11", "2") if int(values.get(k, 0))]
            take(int(np.prod(shape)))
    if position != len(weights):
        raise RuntimeError(f"{source}: {len(weights) - position} bytes of weights are of unknown layers")
    target.with_suffix(".bin").write_bytes(bytes(written))
    target.write_text("\n".join(lines) + "\n")


def prepare(kind: str, source: Path, target: Path, crops: Path) -> None:
    if kind == "ncnn-convert":
        return convert_ncnn(source, target)
    quantizer = {
        "onnxruntime": quantize_onnxruntime,
        "openvino": quantize_openvino,
        "ncnn": quantize_ncnn,
    }[kind]
    return quantizer(source, target, np.load(crops))


def limit_memory(share: float = 0.8) -> None:
    """Fail instead of driving the machine into its out-of-memory killer (Linux only)."""
    try:
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        Path("/proc/self/oom_score_adj").write_text("1000")
        limit = int(int(available) * 1024 * share)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (OSError, IndexError, ValueError) as error:
        print(f"memory is not limited: {error}", file=sys.stderr)


def serve(kind: str, model: Path, size: str, threads: int, variant: str) -> None:
    # Libraries print what they like; only answers may go to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    width, height = map(int, size.split("x"))
    picture = np.load(model.with_name(f"picture-{width}x{height}.npy"))
    peer = KINDS[kind](model, picture, threads, variant)
    answer({"version": peer.version, "note": peer.note})
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "time":
            start = time.perf_counter()
            peer.fixed()
            answer((time.perf_counter() - start) * 1e3)
        elif what == "output":
            np.save(rest[0], peer.interleaved(peer.fixed()))
            answer(None)
        elif what == "picture":
            np.save(rest[1], peer.interleaved(peer.any(np.load(rest[0]))))
            answer(None)
        elif what == "memory":
            answer(peak_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ready = commands.add_parser("prepare")
    for name in ("source", "target"):
        ready.add_argument(name, type=Path)
    ready.add_argument("--crops", type=Path)
    ready.add_argument("--kind", required=True)
    run = commands.add_parser("serve")
    run.add_argument("model", type=Path)
    run.add_argument("--kind", choices=KINDS, required=True)
    run.add_argument("--size", required=True)
    run.add_argument("--threads", type=int, required=True)
    run.add_argument("--variant", default="", help="how it runs, as found before")
    args = parser.parse_args()
    limit_memory()
    if args.command == "prepare":
        prepare(args.kind, args.source, args.target, args.crops)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            serve(args.kind, args.model, args.size, args.threads, args.variant)


if __name__ == "__main__":
    main()
