from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations

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
    """Marks as slow the cases that `slow_but` and `slow_but_each` name."""
    cases: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        word, each = item.get_closest_marker("slow_but"), item.get_closest_marker("slow_but_each")
        if word and word.args[0] not in item.name:
            item.add_marker("slow")
        elif each:
            cases[item.nodeid.partition("[")[0], each.args[0]].append(item)
    for (_, n), own in cases.items():
        for item in set(own).difference(covering(own, n)):
            item.add_marker("slow")


def covering(items: list[pytest.Item], n: int) -> Iterable[pytest.Item]:
    """Yields cases, few and always the same, in which each combination of n parameters' values occurs."""
    values = {item: [(name, id(value)) for name, value in item.callspec.params.items()] for item in items}
    left = {item: set(combinations(own, n)) for item, own in values.items()}
    while left:
        best = max(left, key=lambda item: len(left[item]))
        yield best
        met = left.pop(best)
        left = {item: new for item, all_of in left.items() if (new := all_of - met)}


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
