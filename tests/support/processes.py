"""Checks in new processes, which fork from one that has imported torch: importing it takes seconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

FORKS = hasattr(os, "fork")
FRESH: Any = get_context("forkserver" if FORKS else "spawn")
SECONDS = 240
"""The time that one check may take"""


@cache
def start_server() -> None:
    """Starts the process that the others fork from. It has run nothing, so it has no threads."""
    if FORKS:
        from multiprocessing.forkserver import ensure_running

        FRESH.set_forkserver_preload(["torch", "masked_rnn", "pytest"])
        before = dict(os.environ)
        # On a busy machine threads must not spin.
        os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), OMP_WAIT_POLICY="passive")
        try:
            ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


def run_each(check: Callable[[Any], object], cases: Sequence[Any], deaths: int = 5) -> dict[int, str]:
    """Checks the cases in one new process after the other. Returns the faults by the case's number.

    A case that ends its process is one fault, and a new process checks the rest. After so many deaths the rest counts
    as failed.
    """
    faults: dict[int, str] = {}
    reached = 0
    while reached < len(cases):
        if not deaths:
            return faults | dict.fromkeys(range(reached, len(cases)), "not run: too many processes have ended")
        start_server()
        receiver, sender = FRESH.Pipe(duplex=False)
        process = FRESH.Process(target=_check_each, args=(check, cases[reached:], sender))
        process.start()
        sender.close()
        try:
            while reached < len(cases):
                if not receiver.poll(SECONDS):
                    process.kill()
                fault = receiver.recv()
                faults |= {reached: fault} if fault else {}
                reached += 1
            process.join(SECONDS)
        except EOFError:
            process.join()
            faults[reached] = f"the process ended with {process.exitcode}"
            reached, deaths = reached + 1, deaths - 1
        finally:
            process.kill()
    return faults


def _check_each(check: Callable[[Any], object], cases: Sequence[Any], sender: Connection) -> None:
    for case in cases:
        try:
            check(case)
        except BaseException:
            sender.send(traceback.format_exc())
        else:
            sender.send("")


def run_code(code: str, folder: Path | None = None) -> None:
    """Runs code in a new process, as `python block.py` does. It may read and write in `folder`."""
    faults = run_each(partial(_run_as_main, folder=folder), [code])
    assert not faults, faults[0]


def _run_as_main(code: str, folder: Path | None) -> None:
    main, path = ModuleType("__main__"), Path("block.py")
    if folder is not None:
        os.chdir(folder)
        path = folder / "block.py"
        path.write_text(code)
        main.__file__ = str(path)  # a DataLoader's workers may import it
    sys.modules["__main__"] = main
    exec(compile(code, path, "exec"), vars(main))
