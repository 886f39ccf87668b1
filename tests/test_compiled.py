"""The compiled loops: that they run, and where they cannot, that all works without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import as_tuple, masked
from torch import Tensor

import masked_rnn
from masked_rnn._backends.bptt import choice, loops

found = choice.compiled_loops()
needs_numba = pytest.mark.skipif(isinstance(found, str), reason=f"without the extra fast: {found}")
ROOT = Path(__file__).parent.parent


def test_what_is_expected_here_runs() -> None:
    """`.ci/run` says what it installed."""
    expected = os.environ.get("MASKED_RNN_EXPECT_LOOPS")
    assert expected in (None, "ops" if isinstance(found, str) else "compiled"), found


def train(layer: Any, x: Tensor, lengths: list[int]) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output, last = layer(x, lengths=lengths)
    (sum((h**2).sum() for h in as_tuple(last)) + (output**3).sum()).backward()
    with torch.no_grad():
        alone, _ = layer(x, lengths=lengths)
    assert x.grad is not None
    gradients = [p.grad for p in layer.parameters()]
    return [t.detach().clone() for t in (output, *as_tuple(last), alone, x.grad, *gradients)]


SHAPES = {
    "one row": (1, 50, 5, 16),
    "no whole register": (5, 9, 3, 7),
    "many rows": (70, 12, 9, 33),
    "several tiles": (9, 40, 40, 70),
    "more rows than a gradient's product takes at once": (3, 400, 3, 17),
}


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_against_the_loops_of_ops(
    cell: str, bidirectional: bool, bias: bool, shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, T, inputs, hidden = SHAPES[shape]
    layer = masked(cell, inputs, hidden, batch_first=True, backend="bptt", bidirectional=bidirectional, bias=bias)
    x = torch.randn(N, T, inputs)
    lengths = [*torch.randint(0, T + 1, (N - 1,)).tolist(), T]
    compiled = train(layer.to(dtype), x.to(dtype), lengths)
    monkeypatch.setattr(choice, "compiled_loops", lambda: "left out here")
    for ours, theirs in zip(compiled, train(layer, x.to(dtype), lengths), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=30 * torch.finfo(dtype).eps * theirs.abs().max().item())


@needs_numba
def test_the_compiled_loops_run(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the loops of ops ran")

    for name in ("forward", "backward"):
        monkeypatch.setattr(loops, name, fail)
    train(masked(cell, 4, 6, batch_first=True, backend="bptt"), torch.randn(3, 5, 4), [5, 0, 2])


@needs_numba
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_threads(cell: str, bidirectional: bool, pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pool:
        monkeypatch.setattr(found.threads, "gnu_openmp_parallel", lambda: None)
    layer = masked(cell, 20, 40, batch_first=True, backend="bptt", bidirectional=bidirectional)
    x, lengths = torch.randn(21, 30, 20), torch.randint(1, 31, (21,)).tolist()
    one = train(layer, x, lengths)
    try:
        torch.set_num_threads(3)
        first, again = train(layer, x, lengths), train(layer, x, lengths)
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(one, first, again, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())


@needs_numba
@pytest.mark.parametrize("pool", [False, True])
def test_several_threads_of_python_at_once(pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pool:
        monkeypatch.setattr(found.threads, "gnu_openmp_parallel", lambda: None)
    work = [(masked("gru", 8, 16, batch_first=True, backend="bptt"), torch.randn(9, 20, 8)) for _ in range(4)]
    lengths = [20, 3, 0, 7, 20, 1, 9, 12, 5]
    expected = [train(*each, lengths) for each in work]
    results: list[Any] = [None] * len(work)

    def run(k: int) -> None:
        torch.set_num_threads(2)
        results[k] = [train(*work[k], lengths) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    for once, many in zip(expected, results, strict=True):
        for each in many:
            for a, b in zip(once, each, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_comes_out_as_from_torch(cell: str, value: float) -> None:
    layer = masked(cell, 5, 18, batch_first=True, backend="bptt", flatten_hidden=False)
    own = masked(cell, 5, 18, batch_first=True, backend="packed", flatten_hidden=False)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 5)
    x[1, 3, 2] = value
    for ours, theirs in zip(train(layer, x, [6, 5]), train(own, x, [6, 5]), strict=True):
        torch.testing.assert_close(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours.nan_to_num(), theirs.nan_to_num(), rtol=1e-4, atol=1e-4)


def test_what_does_not_lie_in_memory_as_it_is(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negated and expanded views, of the input and of the gradient."""
    layer = masked(cell, 5, 6, backend="bptt")
    base = torch.randn(7, 3, 5, dtype=torch.complex64)
    inputs = [base.conj().imag, base.real, torch.randn(1, 1, 5).expand(7, 3, 5)]
    ones: list[list[Tensor]] = []
    one = masked(cell, 1, 3 if cell == "lstm-proj" else 1, backend="bptt")
    # Contiguous, though its number lies there with the other sign.
    negated = base[:1, :1, :1].conj().imag
    width = one(negated)[0].size(-1)
    assert negated.is_neg()
    assert negated.is_contiguous()
    pulled_one = negated if width == 1 else negated.expand(1, 1, width)
    x_one, pull = negated.resolve_neg(), pulled_one.resolve_neg()
    for x, d_output in ((x_one, pull), (negated, pull), (x_one, pulled_one)):
        one.zero_grad()
        output, _ = one(x)
        output.backward(d_output)
        ones.append([output.detach(), *(p.grad.clone() for p in one.parameters())])
    for expected, in_x, in_gradient in zip(*ones, strict=True):
        torch.testing.assert_close(in_x, expected)
        torch.testing.assert_close(in_gradient, expected)

    def results() -> list[Tensor]:
        found = []
        for x in inputs:
            layer.zero_grad()
            output, last = layer(x, lengths=[7, 2, 4])
            pulled = torch.view_as_complex(torch.ones(7, 3, output.size(-1), 2)).conj().imag
            assert pulled.is_neg()
            state = as_tuple(last)[0]
            torch.autograd.backward((output, state), (pulled, torch.ones(1).expand_as(state)))
            found += [output.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        return found

    compiled = results()
    monkeypatch.setattr(choice, "compiled_loops", lambda: "left out here")
    for ours, theirs in zip(compiled, results(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_saved_tensors_that_come_back_in_another_layout(cell: str) -> None:
    layer, x = masked(cell, 5, 6, batch_first=True, backend="bptt", bidirectional=True), torch.randn(3, 7, 5)
    expected = train(layer, x, [7, 2, 4])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        found = train(layer, x, [7, 2, 4])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_where_denormals_are_zero(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons of numbers next to 0 mean something else then."""
    layer, x = masked(cell, 5, 20, batch_first=True, backend="bptt"), torch.randn(3, 7, 5)
    expected = train(layer, x, [7, 2, 4])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU computes with denormals only")
    try:
        found = train(layer, x, [7, 2, 4])
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_numba
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_are_right_to_two_units_in_the_last_place(name: str) -> None:
    """By the LSTM's o gate, or its g gate, alone: c = σ(i) g with i = ∞."""
    layer = masked("lstm", 1, 1, backend="bptt")
    scales = 10.0 ** torch.arange(-30, 2.0)
    a = torch.cat([sign * scales * (1 + torch.rand(500, 1)) for sign in (1, -1)]).flatten()
    # o's argument is a, or g's is; the other gates are 1, or g is 1.
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[3 if name == "sigmoid" else 2] = 1
        layer.bias_ih_l0.copy_(torch.tensor([200.0, 0, 200, 0] if name == "sigmoid" else [200.0, 0, 0, 200]))
        output, (_, c) = layer(a.view(1, -1, 1))
        found = output.flatten() / torch.tanh(torch.ones(())) if name == "sigmoid" else c.flatten()
    truth = getattr(torch, name)(a.double())
    normal = truth.abs() > torch.finfo(torch.float32).tiny
    error = ((found.double() - truth).abs() / truth.abs())[normal] / torch.finfo(torch.float32).eps
    assert error.max() <= (4 if name == "sigmoid" else 2)  # σ is multiplied and divided by tanh(1) here


@needs_numba
def test_an_interrupt_waits_for_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read would be freed."""
    done = []

    def call(data: int) -> None:
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.05)
            raise KeyboardInterrupt
        time.sleep(0.3)
        done.append(data)

    with pytest.raises(KeyboardInterrupt):
        found.threads._run_on_pool(call, 7, 1)
    assert done == [7]


@needs_numba
def test_the_pool_is_kept_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found.threads, "_pool", None)
    monkeypatch.setattr(found.threads, "_pool_size", 0)
    pools, done = [], []
    for helpers in (1, 2, 1):
        found.threads._run_on_pool(done.append, helpers, helpers)
        pools.append(found.threads._pool)
    assert pools[0] is not pools[1]
    assert pools[1] is pools[2]
    assert pools[1]._max_workers == 2


@needs_numba
def test_as_many_helpers_as_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(found.threads, "gnu_openmp_parallel", lambda: None)
    monkeypatch.setattr(found.threads, "entry", lambda _name: (0, lambda _data: asked.append(0)))
    monkeypatch.setattr(found.threads, "_run_on_pool", lambda _call, _data, helpers: asked.append(helpers))
    for threads, tasks in ((4, 9), (9, 4), (1, 5), (5, 1)):
        found.threads.run("forward32", 0, threads, tasks)
    assert asked == [3, 3, 0, 0]


def run_python(code: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, masked_rnn
from masked_rnn._backends.bptt import choice
layer = masked_rnn.MaskedGRU(4, 8, backend="bptt")
output, _ = layer(torch.randn(5, 3, 4), lengths=[5, 2, 0])
output.sum().backward()
print(isinstance(choice.compiled_loops(), str), choice.compiled_loops())
"""


def test_the_import_loads_no_numba() -> None:
    run_python("import sys, masked_rnn; assert not {'numba', 'llvmlite'} & set(sys.modules)")


def test_a_numba_that_is_not_there() -> None:
    assert "not installed: pip install numba" in run_python("import sys; sys.modules['numba'] = None" + USE)


def test_a_numba_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise SystemError('made for another numpy')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + USE
    assert "made for another numpy" in run_python(code)


@needs_numba
def test_a_part_of_numba_that_is_not_there() -> None:
    code = "import sys; sys.modules['llvmlite'] = None" + USE
    assert "Numba can't be imported: No module named 'llvmlite" in run_python(code)


@needs_numba
def test_what_is_compiled_follows_every_file_of_it(tmp_path: Path) -> None:
    """Numba's cache looks at one file's time."""
    shutil.copytree(Path(masked_rnn.__file__).parent, tmp_path / "masked_rnn")
    code = "import torch, masked_rnn\nlayer = masked_rnn.MaskedRNN(2, 3, backend='bptt')\n"
    code += "print(layer(torch.ones(5, 2, 2), lengths=[5, 2])[0].abs().max().item())"
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert float(run_python(code, **environment)) < 1
    equations = tmp_path / "masked_rnn/_backends/bptt/compiled/equations.py"
    text = equations.read_text()
    assert "return (tanh(a),)" in text
    equations.write_text(text.replace("return (tanh(a),)", "return (tanh(a) + 7.0,)"))
    assert float(run_python(code, **environment)) > 5


@needs_numba
def test_an_old_numba() -> None:
    code = "import numba; numba.version_info = (0, 67, 9); numba.__version__ = '0.67.9'" + USE
    assert "Numba 0.67.9 is older than 0.68" in run_python(code)


@needs_numba
def test_a_numba_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise NotImplementedError("no such instruction")

    choice._why_not_compiled.cache_clear()
    monkeypatch.setattr(found.threads, "entry", fail)
    layer = masked("gru", 4, 6, backend="bptt")
    try:
        with pytest.warns(RuntimeWarning, match="Numba can't compile them: no such instruction"):
            layer(torch.randn(5, 3, 4), lengths=[5, 2, 0])[0].sum().backward()
        with pytest.raises(RuntimeError, match=r"can't run\. Numba can't compile them: no such instruction"):
            masked_rnn.compile_loops()
    finally:
        choice._why_not_compiled.cache_clear()


@needs_numba
def test_jit_switched_off() -> None:
    assert "NUMBA_DISABLE_JIT" in run_python(USE, NUMBA_DISABLE_JIT="1")


@needs_numba
def test_no_folder_for_the_cache() -> None:
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
"""
    assert run_python(code + USE).startswith("False")


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork() -> None:
    code = """
import os, signal, torch
torch.set_num_threads(2)
import masked_rnn
layer = masked_rnn.MaskedGRU(4, 8, backend="bptt")
x = torch.randn(9, 40, 4)
expected, _ = layer(x)
child = os.fork()
if not child:
    signal.alarm(60)
    output, _ = layer(x)
    os._exit(0 if torch.allclose(output, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run_python(code)


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_first_used_after_a_fork() -> None:
    """The parent's threads of OpenMP are not there in the child, and nothing had been compiled before."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
import masked_rnn
x = torch.randn(800, 800)
x @ x + x.exp()
child = os.fork()
if not child:
    signal.alarm(60)
    masked_rnn.MaskedGRU(4, 8, backend="bptt")(torch.randn(9, 40, 4))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    run_python(code)


@needs_numba
@pytest.mark.parametrize("start", torch.multiprocessing.get_all_start_methods())
def test_in_a_worker_of_a_data_loader(start: str) -> None:
    """Features are computed there, while the layer trains here."""
    layer = masked_rnn.MaskedGRU(4, 8, backend="bptt", batch_first=True)
    features = Features(layer)
    expected = [features[k] for k in range(4)]
    layer(torch.randn(9, 40, 4))[0].sum().backward()
    loader = torch.utils.data.DataLoader(features, 2, num_workers=2, multiprocessing_context=start, timeout=600)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(expected))


class Features(torch.utils.data.Dataset[Tensor]):
    def __init__(self, layer: masked_rnn.MaskedGRU) -> None:
        self.layer, self.x = layer, torch.randn(4, 3, 40, 4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> Tensor:
        return self.layer(self.x[k], lengths=[40, 7, 0])[1].detach()


@needs_numba
def test_ahead_of_time() -> None:
    masked_rnn.compile_loops()
    masked_rnn.compile_loops(torch.float64)


def test_ahead_of_time_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64, got torch\.float16"):
        masked_rnn.compile_loops(torch.float16)
    monkeypatch.setattr(choice, "compiled_loops", lambda: "Numba is not installed")
    with pytest.raises(RuntimeError, match=r"can't run\. Numba is not installed"):
        masked_rnn.compile_loops()
