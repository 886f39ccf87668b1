"""The layer stays right without any one of the names of torch that are private, or not in every release."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.oracle import torch_before

import masked_rnn
from masked_rnn import _torch

SOURCE = Path(masked_rnn.__file__).parent
NAMES = (
    "_C._AutoDispatchBelowAutograd",
    "_C._ExcludeDispatchKeyGuard",
    "_C.DispatchKeySet",
    "_C.DispatchKey",
    "_C.DispatchKey.AutocastMPS",
    *(() if torch_before("2.7") else ("_C._are_functorch_transforms_active",)),  # 2.6 can't compile its replacement
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.is_batchedtensor",
    "_C._len_torch_dispatch_stack",
    "_subclasses.FakeTensor",
    "autograd.forward_ad._current_level",
    "ops.aten._unsafe_view",
    "backends.mkldnn.enabled",
    "_VF",
    "gru",
    "_assert_async",
    "get_proxy_mode",
    "jit.is_tracing",
    "_C._is_tracing",
    "_C._ForceDispatchKeyGuard",
    "_C._dispatch_tls_local_include_set",
    "_C.DispatchKey.Undefined",
    "_is_onnx_exporting",
    "_C._dynamo.eval_frame.get_eval_frame_callback",
    "ops.higher_order.scan",
    "_flat_weights",
    "_parameters",
    "_ragged_idx",
    "_maybe_min_seqlen",
    "_maybe_max_seqlen",
)

# A process that has imported torch, but not the package, forks once for each name. In the fork, `_torch` sees torch
# without the name, while torch itself is whole.
SCRIPT = """
import json, os, sys, traceback, types
from pathlib import Path

import numpy, torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

torch.set_num_threads(1)


class Without:
    def __init__(self, real, path):
        self.real, self.first, self.rest = real, *path.partition(".")[::2]

    def __getattr__(self, name):
        if name != self.first:
            return getattr(self.real, name)
        if not self.rest:
            raise AttributeError(name)
        return Without(getattr(self.real, name), self.rest)


def without(path, folder):
    package = types.ModuleType("masked_rnn")
    package.__path__ = [folder]
    sys.modules["masked_rnn"] = package
    module = types.ModuleType("masked_rnn._torch")
    module.torch = Without(torch, path)
    elsewhere = not hasattr(torch, path)  # an attribute of a tensor or of a module that need not be loaded
    module.getattr = lambda o, n, *more: more[0] if more and elsewhere and n == path else getattr(o, n, *more)
    source = Path(folder, "_torch.py").read_text()
    assert source.count("\\nimport torch\\n") == 1
    sys.modules["masked_rnn._torch"] = module
    exec(compile(source.replace("\\nimport torch\\n", "\\n"), "_torch.py", "exec"), vars(module))


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def check():
    from masked_rnn import _layers, _torch

    x = torch.randn(3, 6, 4, requires_grad=True)
    lengths = torch.tensor([4, 6, 1])
    rows = [x[0, :4], x[1], x[2, :1]]
    for name in ("GRU", "LSTM", "RNN"):
        layer = getattr(_layers, "Masked" + name)(4, 3, 2, batch_first=True, bidirectional=True)
        theirs = getattr(torch.nn, name)(4, 3, 2, batch_first=True, bidirectional=True)
        theirs.load_state_dict(layer.state_dict())
        expected = torch.nn.utils.rnn.pad_packed_sequence(
            theirs(torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False))[0], True
        )[0]
        wanted = torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()])
        for layer.backend in ("auto", "packed", "padded", "bptt", "scan"):
            output = layer(x, lengths=lengths)[0]
            found = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()], retain_graph=True)
            close([output, *found], [expected, *wanted])
            if layer.backend == "bptt":
                with torch.autocast("cpu", torch.bfloat16):
                    close(torch.autograd.grad(output.square().sum(), [x, *layer.parameters()]), wanted)
                (2 * layer(x)[0]).mul_(2)
                layer(x)[0].mul_(2).sum().backward()
                assert layer.double()(x.double(), lengths=lengths)[0].dtype == torch.float64
                layer.float()
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    close([layer(nested)[0].values()], [torch.cat([expected[0, :4], expected[1], expected[2, :1]])])

    layer = _layers.MaskedGRU(4, 3, batch_first=True)
    expected = layer(x, lengths=lengths)[0]
    close([torch.func.vmap(lambda x, n: layer(x, lengths=n)[0])(x, lengths)], [expected])
    one = [layer(x[:, :1])[0], layer(x[:, :1], lengths=torch.tensor([1, 0, 1]))[0]]
    layer.backend = "scan"
    close(one, [layer(x[:, :1])[0], layer(x[:, :1], lengths=torch.tensor([1, 0, 1]))[0]])
    layer.backend = "auto"
    output = layer(x, lengths=lengths)[0]
    many = torch.randn(2, *output.shape)
    together = torch.autograd.grad(output, x, many, is_grads_batched=True, retain_graph=True)[0]
    close(together, [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in many])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual, lengths=lengths)[0]).tangent is not None
    with FakeTensorMode():
        _layers.MaskedGRU(4, 3)(torch.randn(5, 3, 4), lengths=torch.tensor([1, 2, 3]))[0].sum().backward()
    recorded = make_fx(lambda x, n: layer(x, lengths=n)[0])(x.detach(), torch.tensor([6, 6, 6]))
    close([recorded(x.detach(), lengths)], [expected])
    weights, initial = list(layer.parameters()), [torch.zeros(1, 3, 3)]
    results = torch.ops.masked_rnn.layer(x, lengths, None, initial, weights, "GRU", True, "auto", True)
    close([results[0].mul_(1)], [expected])
    lstm = _layers.MaskedLSTM(4, 3, batch_first=True, backend="scan")
    weights = list(lstm.parameters())
    wanted = torch.autograd.grad(lstm(x, lengths=lengths)[0].square().sum(), weights)
    results = torch.ops.masked_rnn.layer(x, lengths, None, [*initial, *initial], weights, "LSTM", True, "auto", True)
    close(torch.autograd.grad(results[0].square().sum(), weights), wanted)
    if _torch.graph_scan is None:
        program = torch.export.export(lstm, (x.detach(), None, lengths))
        assert not any("scan" in str(node.target) for node in program.graph.nodes)
        close([program.module()(x.detach(), None, lengths)[0]], [lstm(x, lengths=lengths)[0]])
    try:
        assert not _torch.assert_async(torch.tensor(False), "no")  # the caller reads
    except RuntimeError:
        return
    assert _torch._assert_async is None


# Loads, once for all forks, what torch loads at its first use.
gru, one = torch.nn.GRU(1, 1), torch.zeros(1, 1, 1)
make_fx(lambda x: gru(x)[0])(one)
with FakeTensorMode():
    torch.nn.GRU(1, 1)(torch.zeros(1, 1, 1))
with torch.autograd.forward_ad.dual_level():
    torch.autograd.forward_ad.make_dual(one, one).sin()
torch.nested.as_nested_tensor([torch.zeros(1, 1)], layout=torch.jagged)
torch.func.vmap(torch.sin)(torch.zeros(1))
found = {}
for name in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if os.fork() == 0:
        result = ""
        try:
            without(name, sys.argv[2])
            check()
        except BaseException:
            result = traceback.format_exc()[-3000:]
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found[name] = pipe.read()
    os.wait()
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(NAMES), str(SOURCE)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "FOUND " in done.stdout, done.stderr[-4000:]
    results: dict[str, str] = json.loads(done.stdout.rpartition("FOUND ")[2])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layer_is_right_without_private_name(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]


def test_private_names_are_found_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At import, not in every call or backward."""
    found: list[str] = []
    monkeypatch.setattr(_torch, "_find", found.append)
    layer, x = masked_rnn.MaskedLSTM(4, 3, backend=backend), torch.randn(5, 2, 4)
    layer(x, lengths=torch.tensor([5, 2]))[0].sum().backward()
    assert _torch.with_autograd(torch.is_grad_enabled)
    assert not found


def test_private_names_stand_in_one_file() -> None:
    """No other file reads a private name of torch."""
    private = re.compile(r"\btorch(?:\.\w+)*\._\w+|\bops\.(?:aten|mkldnn)\b")
    for path in SOURCE.rglob("*.py"):
        if path.name != "_torch.py":
            text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
            assert not private.findall(text), f"{path.name}: {private.findall(text)}"
