"""Runs each framework in its own process, so that their threads do not disturb each other. Only one works at a time.

The time is measured inside the process. A worker whose turn is over is stopped by a signal, so that threads that spin
while they wait for work (OpenMP's do) cost the next worker nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from .contenders import Contender, Runner
from .problem import Problem, Result

CAN_STOP = hasattr(signal, "SIGSTOP")
ENVIRONMENT = {
    "GLOG_minloglevel": "3",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class ContenderError(Exception):
    """A contender raised an error, or its process died."""


class Worker:
    """The main process's handle of a worker. Every method of `Bench` can be called on it."""

    def __init__(self, threads: int, device: str = "cpu", checkout: str = "") -> None:
        self.log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        here, there = get_context("spawn").Pipe()
        self.pipe = here
        self.process = get_context("spawn").Process(
            target=serve, args=(there, threads, device, checkout, self.log.name), daemon=True
        )
        self.process.start()
        there.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: self.call(name, *args)

    def call(self, name: str, *args: Any) -> Any:
        self.wake()
        try:
            self.pipe.send((name, args))
            fine, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise ContenderError(f"its process died ({self.process.exitcode}): {self.last_words()}") from error
        if CAN_STOP and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGSTOP)
        if not fine:
            raise ContenderError(answer)
        return answer

    def wake(self) -> None:
        if CAN_STOP and self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)

    def last_words(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()[-300:]

    def close(self) -> None:
        self.pipe.close()
        self.wake()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
        self.log.close()


class Bench:
    """Runs the contenders of one framework inside a worker process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.runners: dict[tuple[Contender, Problem], Runner] = {}

    def runner(self, contender: Contender, problem: Problem) -> Runner:
        if (contender, problem) not in self.runners:
            module = import_module(f".contenders.{contender.module}", __package__)
            make = getattr(module, contender.runner)
            self.runners[contender, problem] = make(problem, self.threads, **contender.options)
        return self.runners[contender, problem]

    def result(self, contender: Contender, problem: Problem, training: bool) -> Result:
        return self.runner(contender, problem).result(training)

    def turn(self, contender: Contender, problem: Problem, step: str, seconds: float) -> list[float]:
        """Runs steps for so many seconds, at least one step. Returns how long each took."""
        run = getattr(self.runner(contender, problem), step)
        took: list[float] = []
        while not took or sum(took) < seconds:
            start = time.perf_counter()
            result = run()
            took.append(time.perf_counter() - start)
            del result
        return took

    def memory(self, contender: Contender, problem: Problem, small: Problem) -> float:
        """Returns by how many MiB one training step raises the peak, after a small step has loaded modules."""
        self.runner(contender, small).train()
        runner = self.runner(contender, problem)
        before = reset_peak()
        runner.train()
        return (read_peak() - before) / 2**20

    def drop(self) -> None:
        self.runners.clear()


def serve(pipe: Connection, threads: int, device: str, checkout: str, log_path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # a stopped process can't notice that its parent was killed
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if hasattr(os, "sched_setaffinity"):  # some frameworks use every core that they may
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if checkout:
        sys.path.insert(0, checkout)
        import_module("masked_rnn")
        del sys.path[0]  # the benchmarks are those of this checkout
    bench = Bench(threads)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(bench, name)(*args)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))


def reset_peak() -> int:
    """Returns the bytes in use now. On Linux the peak starts again from here."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _status("VmRSS") or read_peak()


def read_peak() -> int:
    if peak := _status("VmHWM"):
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def _status(field: str) -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    except OSError:
        return 0
