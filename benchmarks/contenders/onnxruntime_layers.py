"""ONNX Runtime's GRU, LSTM and RNN nodes with sequence_lens, in a graph built by hand or exported by masked_rnn.

Both graphs are time-major, which is its own layout.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..problem import Array, Data, Problem, Result

# The order of torch's gates in ONNX: the GRU's r, z, n are z, r, n; the LSTM's i, f, g, o are i, o, f, g.
ORDER = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2), "rnn": (0,)}


class OnnxRuntime:
    def __init__(self, problem: Problem, threads: int) -> None:
        data = problem.data()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(
            self.model(problem, data).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kinds = {given.name: given.type for given in self.session.get_inputs()}
        self.feeds = {
            "x": np.ascontiguousarray(data.input.transpose(1, 0, 2)),
            "lengths": data.lengths.astype(np.int32 if kinds["lengths"] == "tensor(int32)" else np.int64),
        }

    def model(self, problem: Problem, data: Data) -> ModelProto:
        return by_hand(problem, data.weights)

    def infer(self) -> Any:
        return self.session.run(None, self.feeds)

    def train(self) -> Any:
        raise NotImplementedError("ONNX Runtime's recurrent nodes have no gradient")

    def result(self, training: bool) -> Result:
        output, *states = self.infer()
        return Result(output.transpose(1, 0, 2), tuple(states), None)


class Exported(OnnxRuntime):
    def model(self, problem: Problem, data: Data) -> ModelProto:
        import torch

        from .torch_layers import MASKED

        _, _, I, H, L, bidirectional = problem.shape  # noqa: E741
        layer = MASKED[problem.cell](I, H, L, bidirectional=bidirectional, flatten_hidden=False).eval()
        layer.load_state_dict({name: torch.from_numpy(w) for name, w in data.weights.items()})
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's operators, not needed here
        program = torch.onnx.export(
            layer,
            (torch.zeros(3, 2, I), None, torch.tensor([3, 1])),
            dynamo=True,
            dynamic_shapes=(
                {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
                None,
                {0: torch.export.Dim.DYNAMIC},
            ),
            input_names=["x", "lengths"],
            verbose=False,
        )
        assert program is not None
        return program.model_proto


def by_hand(problem: Problem, weights: dict[str, Array]) -> ModelProto:
    """Builds a graph: x (T, N, I), lengths (N,) → output (T, N, D·H), h_n (L·D, N, H), and the LSTM's c_n."""
    shape, D, op = problem.shape, problem.shape.D, problem.cell.upper()
    parts = ("h", "c") if op == "LSTM" else ("h",)
    initializers = {"flat": np.array([0, 0, -1], dtype=np.int64)}
    nodes = []
    x = "x"
    for layer in range(shape.L):
        ways = [f"l{layer}{suffix}" for suffix in ("", "_reverse")[:D]]
        w, r, b = (f"{part}_l{layer}" for part in "wrb")
        initializers[w] = np.stack([reorder(op, weights[f"weight_ih_{way}"]) for way in ways])
        initializers[r] = np.stack([reorder(op, weights[f"weight_hh_{way}"]) for way in ways])
        initializers[b] = np.stack(
            [np.concatenate([reorder(op, weights[f"bias_{part}_{way}"]) for part in ("ih", "hh")]) for way in ways]
        )
        outputs = [f"y_l{layer}", *(f"{part}_l{layer}" for part in parts)]
        more = {"linear_before_reset": 1} if op == "GRU" else {}
        direction = "bidirectional" if D == 2 else "forward"
        nodes.append(
            helper.make_node(op, [x, w, r, b, "lengths"], outputs, hidden_size=shape.H, direction=direction, **more)
        )
        # (T, D, N, H) → (T, N, D·H)
        nodes.append(helper.make_node("Transpose", [outputs[0]], [f"t_l{layer}"], perm=[0, 2, 1, 3]))
        x = "output" if layer == shape.L - 1 else f"x_l{layer + 1}"
        nodes.append(helper.make_node("Reshape", [f"t_l{layer}", "flat"], [x]))
    for part in parts:
        nodes.append(helper.make_node("Concat", [f"{part}_l{k}" for k in range(shape.L)], [f"{part}_n"], axis=0))
    results = ("output", *(f"{part}_n" for part in parts))
    graph = helper.make_graph(
        nodes,
        "stack",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.T, shape.N, shape.I]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [shape.N]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def reorder(op: str, rows: Array) -> Array:
    blocks = np.split(rows, len(ORDER[op.lower()]))
    return np.concatenate([blocks[gate] for gate in ORDER[op.lower()]])
