from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from oracle import BACKENDS, CELLS, which_ran

# The tensors here are tiny: a second thread only gets in the way.
torch.set_num_threads(1)

# Numba's cache looks at the time of one file alone, and the compiled loops are made of several.
package = find_spec("masked_rnn")
assert package is not None
assert package.origin is not None
sources = sorted(Path(package.origin).parent.glob("_backends/bptt/compiled/*.py"))
digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"masked_rnn-{digest}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    return which_ran(monkeypatch)
