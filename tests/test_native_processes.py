"""The native loops' threads survive interrupts, forks and workers."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from support.native_loops import found, needs_native
from support.processes import FRESH, run_code, start_server
from torch import Tensor

import masked_rnn

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def test_expected_loops_run() -> None:
    """`.ci/run` sets the variable to the loops that it installed."""
    expected = os.environ.get("MASKED_RNN_EXPECT_LOOPS", "")
    assert expected in ("", "ops" if isinstance(found, str) else "native"), found


@needs_native
@forks
def test_layer_runs_after_fork() -> None:
    run_code("""
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
""")


@needs_native
@forks
def test_layer_first_used_after_fork_runs() -> None:
    """The child has none of the parent's OpenMP threads, and the library was not loaded before."""
    run_code("""
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
""")


@pytest.mark.slow_but("False")
@needs_native
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
@pytest.mark.parametrize("own", [False, True])
def test_interrupts_leave_process_healthy(own: bool) -> None:
    """Interrupts come at any time: before a call, within it, after it."""
    run_code(f"""
import random, signal, torch
import pytest
from support.native_loops import make, train, use_own_threads
from support.oracle import random_states

torch.set_num_threads(2)
if {own}:
    use_own_threads(pytest.MonkeyPatch())
layer, x = make("gru", 16, 32), torch.randn(24, 60, 16, requires_grad=True)
states = random_states(layer, 24, torch.float32)
expected = train(layer, x, states)
caught = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(100):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 1e-2))
        while True:
            train(layer, x, states)
    except KeyboardInterrupt:
        caught += 1
    # PyTorch's own no_grad, which `train` uses, leaves gradients off if it is interrupted as it begins.
    torch.set_grad_enabled(True)
assert caught == 100
for a, b in zip(train(layer, x, states), expected, strict=True):
    assert torch.equal(a, b)
""")


@needs_native
@pytest.mark.parametrize("start", [FRESH, pytest.param("fork", marks=forks)])
def test_layer_runs_in_data_loader_worker(start: Any) -> None:
    """Features are computed there, while the layer trains here."""
    layer = masked_rnn.MaskedGRU(4, 8, backend="bptt", batch_first=True)
    features = Features(layer)
    expected = [features[k] for k in range(4)]
    layer(torch.randn(9, 40, 4))[0].sum().backward()
    start_server()
    loader = torch.utils.data.DataLoader(features, 2, num_workers=1, multiprocessing_context=start, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(expected))


class Features(torch.utils.data.Dataset[Tensor]):
    def __init__(self, layer: masked_rnn.MaskedGRU) -> None:
        self.layer, self.x = layer, torch.randn(4, 3, 40, 4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> Tensor:
        return self.layer(self.x[k], lengths=[40, 7, 0])[1].detach()
