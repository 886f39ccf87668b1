"""Two processes with batches of different length learn the weights that one process learns from the joined batch."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.oracle import CELLS, INPUT, ONE_STATE_AND_TWO, masked, needs_torch
from support.processes import FRESH, start_server
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"backend": "packed", "flatten_hidden": False},
    {"backend": "scan"},
)
LENGTHS = [([5, 2, 0], [9, 1, 4]), ([3, 3, 1], [0, 0, 0]), ([0, 0, 0], [7, 7, 2])]
"""The lengths in each process at each training step."""


@pytest.mark.slow_but("ddp")
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp", marks=needs_torch("2.9", "fully_shard on a CPU"))])
def test_two_processes_learn_same_weights_as_one(wrapper: str, tmp_path: Path) -> None:
    start_server()
    torch.multiprocessing.start_processes(
        work, (wrapper, str(tmp_path / "meet")), nprocs=WORLD, start_method=FRESH.get_start_method()
    )


def work(rank: int, wrapper: str, meet: str) -> None:
    """Runs one of the processes. It covers all cells, because starting a process takes seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(meet).as_uri(), rank=rank, world_size=WORLD)
    for cell in CELLS:
        for options in OPTIONS if cell in ONE_STATE_AND_TWO else OPTIONS[1:2]:
            torch.manual_seed(5)
            layer = masked(cell, batch_first=True, **options).double()
            alone = copy.deepcopy(layer)
            shared = wrap(layer, wrapper)
            train(shared, [(x, lengths[rank]) for x, lengths in batches(rank)])
            train(alone, [(x, [*lengths[0], *lengths[1]]) for x, lengths in batches(None)])
            for (name, found), expected in zip(layer.named_parameters(), alone.parameters(), strict=True):
                whole = found.full_tensor() if wrapper == "fsdp" else found
                torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12, msg=f"{cell} {options} {name}")
    del (
        layer,
        shared,
        found,
    )  # or the group may hang, or end the process; see examples/train_ddp.py
    gc.collect()
    dist.destroy_process_group()


def wrap(layer: nn.Module, wrapper: str) -> nn.Module:
    return (
        DistributedDataParallel(layer) if wrapper == "ddp" else fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    )


def batches(rank: int | None) -> Iterator[tuple[Tensor, Any]]:
    """Yields a process's own rows, padded with NaN to their longest, or the rows of all processes if `rank` is None."""
    for step, lengths in enumerate(LENGTHS):
        x = torch.randn(2, 3, 9, INPUT, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for row, own in enumerate(lengths):
            for n, length in enumerate(own):
                x[row, n, length:] = torch.nan
        yield (x.flatten(0, 1) if rank is None else x[rank, :, : max(1, *lengths[rank])]), lengths


def train(model: nn.Module, data: list[tuple[Tensor, list[int]]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for x, lengths in data:
        output, _ = model(x, lengths=lengths)
        loss = (output**3).sum() / 6
        optimizer.zero_grad()
        (loss * (WORLD if len(lengths) == 3 else 1)).backward()
        optimizer.step()
