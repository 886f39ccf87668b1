"""A package by AOTInductor runs without Python, and in Python without masked_rnn, for any sizes and lengths."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.oracle import INPUT, as_tuple, masked, torch_before
from support.processes import run_each
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils import cpp_extension

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch_before("2.13"), reason="needs torch 2.13: docs/versions.md")]
PROGRAM = r"""
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>

std::vector<at::Tensor> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<at::Tensor> tensors;
  const auto list = torch::pickle_load(bytes);
  for (const auto& item : list.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

int main(int, char** given) {
  const std::string folder = given[1];
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  for (int k = 0; k < std::stoi(given[2]); k++) {
    auto expected = read(folder + "/expected" + std::to_string(k) + ".pt");
    auto found = model.run(read(folder + "/inputs" + std::to_string(k) + ".pt"));
    if (found.size() != expected.size()) return 2;
    for (size_t i = 0; i < found.size(); i++)
      if (found[i].sizes() != expected[i].sizes() || !at::allclose(found[i], expected[i], 1e-4, 1e-5)) return 3;
  }
  auto wrong = read(folder + "/inputs0.pt");
  wrong[1].fill_(wrong[0].size(1) + 1);
  try {
    model.run(wrong);
  } catch (const std::exception&) {
    return 0;
  }
  return 4;
}
"""
SCRIPT = """
import sys, torch
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(folder + '/model.pt2')
for k in range(int(sys.argv[2])):
    inputs, expected = (torch.load(f'{folder}/{name}{k}.pt') for name in ('inputs', 'expected'))
    for a, b in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
inputs = torch.load(f'{folder}/inputs0.pt')
for wrong in (inputs[0].size(1) + 1, -1):
    try:
        model(inputs[0], inputs[1].clone().fill_(wrong), inputs[2])
    except RuntimeError:
        continue
    raise SystemExit(f'a length of {wrong} was accepted')
assert 'masked_rnn' not in sys.modules
"""
SIZES = [(1, [1]), (7, [0]), (1, [1, 0, 1, 1]), (9, [9, 0, 3, 1, 5]), (300, [300, 17]), (0, [0, 0]), (5, [])]


class Tagger(nn.Module):
    """Two cells, both directions, and a time axis whose size is computed from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = masked("gru", bidirectional=True, batch_first=True, backend="scan")
        self.lstm = masked("lstm-proj", 6, 3, batch_first=True, backend="scan")

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor) -> list[Tensor]:
        output, last = self.gru(x, lengths=lengths, resets=resets)
        short, state = self.lstm(output[:, ::2], lengths=(lengths + 1) // 2)
        return [output, last, short, *as_tuple(state)]


def inputs(steps: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    x, own = torch.randn(len(lengths), steps, INPUT), torch.tensor(lengths, dtype=torch.int64)
    x[torch.arange(steps) >= own.unsqueeze(1)] = torch.nan
    return x, own, torch.rand(len(lengths), steps) < 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the package, and for each of `SIZES` the inputs and the expected results."""
    folder = tmp_path_factory.mktemp("package")
    assert not run_each(make_package, [folder])  # elsewhere, because torch 2.15 would ask the tests' simulated device
    return folder


def make_package(folder: Path) -> None:
    model = Tagger().eval()
    both = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    sizes = (both, {0: Dim.DYNAMIC}, both)
    program = export(model, inputs(6, [6, 0, 2]), dynamic_shapes=sizes)
    assert not any("masked_rnn" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        for k, (steps, lengths) in enumerate(SIZES):
            given = inputs(steps, lengths)
            expected = model(*given)
            assert not any(t.isnan().any() for t in expected)
            torch.save(list(given), folder / f"inputs{k}.pt")
            torch.save([t.contiguous() for t in expected], folder / f"expected{k}.pt")


def test_aot_inductor_runs_without_package(folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(len(SIZES))]
    subprocess.run(command, check=True, cwd=folder)


def test_aot_inductor_runs_in_cpp_program(folder: Path) -> None:
    """The program links libtorch, and no Python."""
    (folder / "program.cpp").write_text(PROGRAM)
    (libraries,) = cpp_extension.library_paths()
    command = ["g++", "-std=c++20", "-O0", "program.cpp", "-o", "program"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, cwd=folder)
    linked = subprocess.run(["ldd", "program"], check=True, cwd=folder, capture_output=True, text=True).stdout
    names = {line.split()[0] for line in linked.splitlines()}
    assert "libtorch_cpu.so" in names
    assert not any("python" in name for name in names)
    subprocess.run(["./program", str(folder), str(len(SIZES))], check=True, cwd=folder)
