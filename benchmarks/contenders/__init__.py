"""The list of contenders, with the packages and the abilities of each. Importing this module imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any, Protocol

from ..problem import CELLS, Problem, Result


class Runner(Protocol):
    """Runs a contender on one problem. Building it may be slow. `infer` and `train` are timed, and must block."""

    def __init__(self, problem: Problem, threads: int, **options: Any) -> None: ...

    def infer(self) -> Any:
        """Computes the output and last states, without gradients."""

    def train(self) -> Any:
        """Runs forward, and backward of output and last states under the problem's cotangents, to every parameter."""

    def result(self, training: bool) -> Result: ...


@dataclass(frozen=True)
class Contender:
    name: str
    module: str
    """A module of this package. Contenders of one module share a process."""
    runner: str
    """The class in that module."""
    needs: tuple[str, ...]
    """The packages, by the names under which they are imported."""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    trains: bool = True
    takes_lengths: bool = True
    """False: it runs over padding, so it is right only if every length is T, and is checked only then."""
    has_hidden_bias: bool = True
    """False: its GRU has no b_hn, so it runs with weights in which this bias is zero."""
    cells: tuple[str, ...] = CELLS
    is_layer: bool = True
    """False: it has no result to check."""
    checkout: str = ""
    """The folder of the checkout whose masked_rnn it runs. Empty: this one."""
    devices: tuple[str, ...] = ("cpu",)
    """Devices on which it can run. If there are several, the option `device` selects one."""

    def missing(self) -> list[str]:
        return [package for package in self.needs if find_spec(package) is None]

    def on(self, device: str) -> Contender:
        return self if self.devices == ("cpu",) else replace(self, options={**self.options, "device": device})

    def of(self, checkout: str) -> Contender:
        """Returns the contender of another checkout, which runs in a process of its own."""
        return replace(self, name=f"{self.name}{BEFORE}", checkout=checkout)

    def fit(self, problem: Problem) -> Problem:
        """Returns the problem with weights that the contender can have."""
        return problem if self.has_hidden_bias or problem.cell != "gru" else replace(problem, hidden_bias=False)

    def version(self) -> str:
        return " ".join(f"{package} {version_of(package)}" for package in self.needs)

    def label(self, cell: str) -> str:
        layer = f"nn.{cell.upper()}"
        labels = {
            "masked_rnn-ops": "in PyTorch's ops",
            "recipe": f"sort, pack, {layer}, unpack, unsort",
            "padded": f"{layer} on the padded batch" + (" (oneDNN)" if cell == "lstm" else ""),
            "keras": "Keras 3 on TensorFlow",
            "keras-xla": "Keras 3 on TensorFlow, XLA",
            "flax": "Flax nnx.RNN",
            "paddle": "Paddle",
            "onnxruntime": "ONNX Runtime",
            "products": "matrix products alone",
        }
        return labels.get(self.name, self.name)


@cache
def version_of(package: str) -> str:
    try:
        return version(packages_distributions().get(package, [package])[0])
    except PackageNotFoundError:
        return "?"


BEFORE = ", before"
ANYWHERE = ("cpu", "cuda")
OURS = Contender("masked_rnn", "torch_layers", "Masked", ("masked_rnn", "torch"), devices=ANYWHERE)
IN_OPS = Contender("masked_rnn-ops", "torch_layers", "InOps", OURS.needs)
RECIPE = Contender("recipe", "torch_layers", "Recipe", ("torch",), devices=ANYWHERE)
PACKING = Contender("packing by hand", "torch_layers", "Packing", ("torch",))
PADDED = Contender("padded", "torch_layers", "Padded", ("torch",), takes_lengths=False, devices=ANYWHERE)
OTHERS = (
    Contender("keras", "keras_layers", "Keras", ("keras", "tensorflow")),
    Contender("keras-xla", "keras_layers", "Keras", ("keras", "tensorflow"), {"jit_compile": True}),
    Contender("flax", "flax_layers", "Flax", ("flax", "jax"), has_hidden_bias=False, devices=ANYWHERE),
    Contender("paddle", "paddle_layers", "Paddle", ("paddle",)),
    Contender("onnxruntime", "onnxruntime_layers", "OnnxRuntime", ("onnxruntime", "onnx"), trains=False),
)
FLAX, ONNXRUNTIME = OTHERS[2], OTHERS[4]
PRODUCTS = Contender("products", "bare_products", "Products", ("torch",), is_layer=False)
COMPILED = Contender("masked_rnn-compiled", "compiled_layers", "Compiled", OURS.needs)
CAPTURED = (
    COMPILED,
    Contender(
        "masked_rnn-onnx", "onnxruntime_layers", "Exported", (*OURS.needs, "onnxruntime", "onnxscript"), trains=False
    ),
)
BACKENDS = tuple(
    Contender(
        f"masked_rnn-{backend}",
        "torch_layers",
        "Masked",
        ("masked_rnn", "torch"),
        {"backend": backend},
        devices=ANYWHERE,
    )
    for backend in ("packed", "padded", "bptt", "scan")
)
LENGTHS_ON_DEVICE = tuple(
    replace(c, name=f"{c.name}-lengths-there", options={**c.options, "lengths_there": True}, devices=("cuda",))
    for c in (OURS, RECIPE)
)
"""Run on an accelerator, with lengths on it, too."""
GRAPH = Contender(
    "masked_rnn-graph", "torch_layers", "Graph", ("masked_rnn", "torch"), {"lengths_there": True}, devices=("cuda",)
)
CONTENDERS = (OURS, IN_OPS, RECIPE, PADDED, *OTHERS, PRODUCTS, *LENGTHS_ON_DEVICE, GRAPH)
