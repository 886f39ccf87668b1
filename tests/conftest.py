from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.oracle import BACKENDS, CELLS, which_ran

# The tensors here are tiny, so a second thread only costs time.
torch.set_num_threads(1)
# A slow run on a busy machine is not a failure.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow the cases of a test marked `slow_but(word)`, except those whose names contain the word."""
    for item in items:
        mark = item.get_closest_marker("slow_but")
        if mark and mark.args[0] not in item.name:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from walking through all of torch again and again."""
    gc.freeze()


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


@pytest.fixture
def allow_rnn() -> Iterator[None]:
    """Lets Dynamo make a layer one operator."""
    import torch._dynamo

    with torch._dynamo.config.patch(allow_rnn=True):
        yield
