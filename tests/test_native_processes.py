"""The native loops' threads live through interrupts, forks and workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native_loops import found, make, needs_native, run_python, train, use_pool
from oracle import random_states
from torch import Tensor

import masked_rnn
from masked_rnn._backends.bptt import threads

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def test_what_is_expected_here_runs() -> None:
    """`.ci/run` says what it installed."""
    expected = os.environ.get("MASKED_RNN_EXPECT_LOOPS")
    assert expected in (None, "ops" if isinstance(found, str) else "native"), found


@needs_native
def test_an_interrupt_comes_up_in_the_caller(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes would only print it."""
    use_pool(monkeypatch)
    layer, x = make(cell, 4, 6, bidirectional=True), torch.randn(9, 7, 4, requires_grad=True)
    states = random_states(layer, 9, torch.float32)
    run_on_pool = threads.run_on_pool
    interrupted = []

    def interrupt(*given: Any) -> None:
        run_on_pool(*given)
        interrupted.append(given)
        raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        expected = train(layer, x, states)
        with monkeypatch.context() as patch:
            patch.setattr(threads, "run_on_pool", interrupt)
            for k in range(3):
                with pytest.raises(KeyboardInterrupt):
                    train(layer, x, states)
                assert len(interrupted) == 2 * (k + 1)  # one call: packing, and the steps
        again = train(layer, x, states)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(again, expected, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_an_interrupt_waits_for_the_helpers() -> None:
    """What they read would be freed."""
    begun, done = threading.Event(), []

    def work() -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.3)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        threads.run_on_pool(work, 1)
    assert done


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signal to a thread")
def test_an_interrupt_while_it_waits_for_the_helpers() -> None:
    begun, done = threading.Event(), []

    def work() -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(60)
            return
        begun.set()
        for _ in range(2):
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        threads.run_on_pool(work, 1)
    assert done


def test_a_pool_that_cannot_start_a_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has started end first."""
    begun, done = threading.Event(), []

    class Full:
        def submit(self, work: Any) -> Any:
            if begun.is_set():
                raise RuntimeError("can't start new thread")
            future = ThreadPoolExecutor(1).submit(work)
            assert begun.wait(60)
            return future

    def work() -> None:
        begun.set()
        time.sleep(0.3)
        done.append(True)

    monkeypatch.setattr(threads, "_pool", Full())
    monkeypatch.setattr(threads, "_pool_size", 2)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads.run_on_pool(work, 2)
    assert done


def test_the_pool_is_kept_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_pool_size", 0)
    pools = []
    for helpers in (1, 2, 1):
        threads.run_on_pool(lambda: None, helpers)
        pools.append(threads._pool)
    assert pools[0] is not pools[1]
    assert pools[1] is pools[2]
    assert pools[1]._max_workers == 2


@needs_native
@forks
def test_after_a_fork() -> None:
    run_python("""
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
def test_first_used_after_a_fork() -> None:
    """The parent's threads of OpenMP are not there in the child, and nothing had been loaded before."""
    run_python("""
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


@needs_native
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
@pytest.mark.parametrize("pool", [False, True])
def test_many_interrupts_leave_the_process_healthy(pool: bool) -> None:
    """They come at any time: before a call, within it, after it."""
    run_python(f"""
import random, signal, torch
import pytest
from native_loops import make, train, use_pool
from oracle import random_states

torch.set_num_threads(2)
if {pool}:
    use_pool(pytest.MonkeyPatch())
layer, x = make("gru", 16, 32), torch.randn(24, 60, 16, requires_grad=True)
states = random_states(layer, 24, torch.float32)
expected = train(layer, x, states)
caught = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-2))
        while True:
            train(layer, x, states)
    except KeyboardInterrupt:
        caught += 1
assert caught == 300
for a, b in zip(train(layer, x, states), expected, strict=True):
    assert torch.equal(a, b)
""")


@needs_native
@pytest.mark.parametrize("start", torch.multiprocessing.get_all_start_methods())
def test_in_a_worker_of_a_data_loader(start: str) -> None:
    """Features are computed there, while the layer trains here."""
    layer = masked_rnn.MaskedGRU(4, 8, backend="bptt", batch_first=True)
    features = Features(layer)
    expected = [features[k] for k in range(4)]
    layer(torch.randn(9, 40, 4))[0].sum().backward()
    loader = torch.utils.data.DataLoader(features, 2, num_workers=2, multiprocessing_context=start, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(expected))


class Features(torch.utils.data.Dataset[Tensor]):
    def __init__(self, layer: masked_rnn.MaskedGRU) -> None:
        self.layer, self.x = layer, torch.randn(4, 3, 40, 4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, k: int) -> Tensor:
        return self.layer(self.x[k], lengths=[40, 7, 0])[1].detach()
