"""Replacements that docs/versions.md names for unsupported features, unless another file runs them."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from support.oracle import CELLS, HIDDEN, INPUT, as_tuple, masked, needs_torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import masked_rnn

ROOT = Path(__file__).parent.parent
HEAD = "| not supported | instead | test of the alternative |\n"
TABLE = (ROOT / "docs/versions.md").read_text().partition(HEAD)[2].partition("\n\n")[0]


class Model(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        output, last = self.layer(x, lengths=lengths)
        return output, *as_tuple(last)


def test_citation_is_of_this_version() -> None:
    """The changelog has the version's date. The release workflow compares the version with the tag."""
    citation = dict(line.split(": ", 1) for line in (ROOT / "CITATION.cff").read_text().splitlines() if ": " in line)
    version, date = citation["version"], citation["date-released"].strip('"')
    assert version == masked_rnn.__version__
    assert f"\n## [{version}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_oldest_versions_are_those_that_pip_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    oldest = next(name for name in project["dependencies"] if name.startswith("torch>=")).removeprefix("torch>=")
    assert f"Python from {python}, PyTorch from {oldest}," in (ROOT / "docs/versions.md").read_text()
    assert f" {oldest}.0@{python} " in (ROOT / ".ci/versions").read_text()
    assert f'python: "{python}", torch: "{oldest}.0"' in (ROOT / ".github/workflows/ci.yml").read_text()


def test_table_row_names_its_tests() -> None:
    rows = [row.strip("| ").split(" | ") for row in TABLE.splitlines()[1:]]
    assert len(rows) > 9
    for what, instead, run_by in rows:
        assert instead, what
        assert "::test_" in run_by, what


@pytest.mark.slow_but("lstm-{}")
@needs_torch("2.13", "torch.onnx.export(dynamo=True)")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn-tanh"])
def test_int8_quantization_shrinks_only_lstm(cell: str, options: dict[str, Any], tmp_path: Path) -> None:
    """An LSTM becomes smaller, after `quant_pre_process`. A GRU or RNN stays unchanged."""
    whole, ready, small = (str(tmp_path / name) for name in ("model.onnx", "ready.onnx", "int8.onnx"))
    model = Model(masked(cell, 32, 64, batch_first=True, **options)).eval()
    x, lengths = torch.randn(4, 7, 32), torch.tensor([7, 3, 0, 5])
    torch.onnx.export(model, (x, lengths), whole, dynamo=True, external_data=False, verbose=False)

    quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
    assert Path(small).stat().st_size >= Path(whole).stat().st_size
    quant_pre_process(whole, ready)
    quantize_dynamic(ready, small, weight_type=QuantType.QInt8, reduce_range=True)
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    smaller = Path(small).stat().st_size / Path(ready).stat().st_size
    if cell != "lstm":
        assert CELLS[cell][0] in kinds
        assert smaller > 0.99
        return
    assert "DynamicQuantizeLSTM" in kinds
    assert "LSTM" not in kinds
    assert smaller < 0.5
    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy(), lengths.numpy()), strict=True)))
    for a, b in zip(found, model(x, lengths), strict=True):
        assert (torch.from_numpy(a) - b).norm() < 0.05 * b.norm()


def test_flop_counter_counts_all_products(cell: str) -> None:
    layer = masked(cell, batch_first=True, backend="scan")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 5, INPUT), lengths=[5, 2, 1])
    gates = layer.weight_ih_l0.size(0)
    weights = gates * (INPUT + (layer.proj_size or HIDDEN)) + layer.proj_size * HIDDEN
    assert counter.get_total_flops() == 2 * 3 * 5 * weights


PYTHON_THAT_PRETENDS = """#!/usr/bin/env bash
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    pip) echo "$4" >"${0%python}torch" ;;
    "import torch;"*) sed "s/^torch$/99.0/; s/^torch==//" "${0%python}torch" ;;
    pytest)
        torch=$(cat "${0%python}torch")
        printf '%s\\n' "a test of $torch" "12 passed on $torch"
        [[ "$torch" != torch==2.9.1 ]]
        ;;
esac
"""


@pytest.mark.skipif(os.name != "posix", reason="a script of bash")
@pytest.mark.parametrize("given", [(), ("2.9.1@3.12", "2.13.0@3.11")])
def test_versions_log_keeps_every_release(given: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "log"
    for version in (11, 12, 13):
        python = tmp_path / f"python3.{version}"
        python.write_text(PYTHON_THAT_PRETENDS)
        python.chmod(0o755)
    (tmp_path / "python3.14").symlink_to("/bin/false")
    with log.open("w") as out:
        done = subprocess.run(
            ["bash", str(ROOT / ".ci/versions"), *given],
            env={**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 1  # of the one in the middle
    expected = []
    for pair in given or ("2.6.0@3.11", "2.9.1@3.12", "latest@3.13", "latest@3.14"):
        release, _, version = pair.partition("@")
        name = "torch" if release == "latest" else f"torch=={release}"
        if version != "3.14":
            expected += [f"a test of {name}", f"12 passed on {name}"]
        last = "failed before the tests" if version == "3.14" else f"12 passed on {name}"
        installed = "99.0" if name == "torch" and version != "3.14" else release
        expected.append(f"torch {installed}, python{version}: {last}")
    assert log.read_text().splitlines() == expected
