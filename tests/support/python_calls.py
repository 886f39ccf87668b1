"""Counts the calls of the package's own Python functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import masked_rnn

PACKAGE = str(Path(masked_rnn.__file__).parent)


class Counts(NamedTuple):
    """Counts of the package's own functions."""

    calls: int
    functions: int
    files: int
    changes_of_file: int


def count(function: Callable[[], object]) -> Counts:
    seen: list[Any] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(frame.f_code)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    files = [code.co_filename for code in seen]
    changes = sum(a != b for a, b in pairwise(files))
    return Counts(len(seen), len(set(seen)), len(set(files)), changes)
