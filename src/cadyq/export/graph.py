"""A thin layer over ``onnx.helper``: nodes named by what they compute, constants stored once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import MissingExtraError

__all__ = ["DOUBLE", "FLOAT", "INT64", "IR_VERSION", "OPSET", "SPACE", "Graph", "need_onnx"]

FLOAT, INT64, DOUBLE = 1, 7, 11  # onnx.TensorProto's numbers, which are part of the format
SPACE = [2, 3]  # axes of height and width
OPSET = 17
IR_VERSION = 8


def need_onnx(*names: str) -> list[Any]:
    """Import packages of the extra ``onnx``.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    import importlib

    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, and ONNX files need it; install it with: pip install 'cadyq[onnx]'"
        ) from error


class Graph:
    """Collects the nodes and constants of an ONNX graph; values are known by their names."""

    def __init__(self) -> None:
        self.helper, self.numpy_helper, self.proto = need_onnx("onnx.helper", "onnx.numpy_helper", "onnx")
        self.nodes: list[Any] = []
        self.constants: dict[Any, Any] = {}
        self.outputs: list[Any] = []

    def constant(self, value: NDArray[Any] | float | list[int], dtype: Any = np.float32) -> str:
        """Name of a constant; equal ones are stored once."""
        array = np.ascontiguousarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self.numpy_helper.from_array(array, f"c{len(self.constants)}")
        name: str = self.constants[key].name
        return name

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node of one output and return that output's name."""
        output = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def output(self, value: str, dtype: Any, shape: list[str | int]) -> None:
        """Make a value an output of the model."""
        kind = self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.outputs.append(self.helper.make_tensor_value_info(value, kind, shape))

    def model(self, inputs: list[tuple[str, list[str | int]]], metadata: dict[str, str]) -> Any:
        """The checked model; inputs are float32."""
        values = [
            self.helper.make_tensor_value_info(name, self.proto.TensorProto.FLOAT, shape)
            for name, shape in inputs
        ]
        graph = self.helper.make_graph(
            self.nodes, "cadyq", values, self.outputs, list(self.constants.values())
        )
        opset = [self.helper.make_opsetid("", OPSET)]
        model = self.helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="cadyq"
        )
        self.helper.set_model_props(model, metadata)
        self.proto.checker.check_model(model, full_check=True)
        return model
