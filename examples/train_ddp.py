"""Trains on several processes with batches of different length, and gets the weights that one process would learn.

A tagger says at each step of a sequence whether the sum of the inputs so far is positive. Each process takes its own
rows of every batch and pads them to its own longest, so T differs between processes. At one step the last process has
only empty sequences. Afterwards the whole training is repeated in one process on the joined batches, and the weights
are compared.

DistributedDataParallel *averages* gradients over processes, but the processes have different numbers of real steps. So
that the weights are the same, each process takes the sum of its losses, times the number of processes, divided by the
number of real steps in all processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp

This needs only torch (--fsdp on a CPU: 2.9 or later). It uses NCCL if there is a GPU for each process, else gloo.
`--short` is a few steps.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from masked_rnn import MaskedGRU

BATCH, LONGEST = 32, 40
Batch = tuple[Tensor, Tensor, Tensor]
"""input and tags (N, T, 1), lengths (N,)"""


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = MaskedGRU(1, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.gru(x, lengths=lengths)
        return self.head(output)  # (N, T, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tagger on several processes and compare with one.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fsdp", action="store_true", help="fully_shard in place of DistributedDataParallel")
    parser.add_argument("--short", action="store_true", help="10 steps, and no accuracy demanded")
    args = parser.parse_args()
    steps = 10 if args.short else args.steps
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_ddp.py")

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that the order in which processes add up does not show in 9 digits
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    tagger = Tagger().to(device)
    if args.fsdp:
        shared = fully_shard(tagger, mesh=init_device_mesh(device.type, (world,)))
    else:
        shared = DistributedDataParallel(tagger)
    accuracy = train(shared, (shard(batch, rank, world) for batch in batches(steps, device)), rank == 0, shared=True)
    learned = {
        name: p.full_tensor() if args.fsdp else p  # type: ignore[operator]
        for name, p in tagger.named_parameters()
    }

    if rank == 0:
        torch.manual_seed(0)
        alone = Tagger().to(device)
        train(alone, batches(steps, device), say=False, shared=False)
        for name, expected in alone.named_parameters():
            difference = (learned[name] - expected).abs().max().item()
            print(f"{name:<18} largest difference from one process on the joined batches: {difference:.1e}")
            assert difference < 1e-9, f"{name} differs by {difference}"
        if not args.short:
            assert accuracy > 0.9, f"{accuracy:.1%} of the real steps are tagged right, expected more than 90 %"
    # The wrapper must be deleted before the group. Otherwise its destructor ends the group while it holds Python's
    # lock, and waits for a thread that needs the lock; or, when Python has ended, the group's threads end the process.
    del shared, tagger, learned
    gc.collect()  # the wrapper of fully_shard refers to itself
    dist.destroy_process_group()


def train(model: nn.Module, data: Iterator[Batch], say: bool, shared: bool) -> float:
    """Trains a model. Returns the share of real steps of the last batches that were tagged right, in all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    right = 0.0
    for step, (x, tags, lengths) in enumerate(data):
        logits = model(x, lengths)
        real = torch.arange(x.size(1), device=x.device).view(-1, 1) < lengths.view(-1, 1, 1)  # (N, T, 1)
        losses = binary_cross_entropy_with_logits(logits, tags, reduction="none")
        # For an empty batch the loss is 0, and its gradients are zeros. The other processes wait for them.
        loss = losses.where(real, 0).sum()
        totals = torch.stack([real.sum(), ((logits > 0) == tags.bool()).logical_and(real).sum()])
        if shared:
            dist.all_reduce(totals)
            loss = loss * dist.get_world_size()
        count = totals[0].clamp(min=1)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        right = 0.9 * right + 0.1 * (totals[1] / count).item()
        if say and step % 20 == 19:
            print(
                f"step {step + 1:>4}: {right / (1 - 0.9 ** (step + 1)):.1%} of the real steps tagged right", flush=True
            )
    return right / (1 - 0.9 ** (step + 1))


def batches(steps: int, device: torch.device) -> Iterator[Batch]:
    """Draws batches, the same in every process. At the second step the second half of the rows is empty."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        lengths = torch.randint(0, LONGEST + 1, (BATCH,), generator=draw)
        if step == 1:
            lengths[BATCH // 2 :] = 0
        x = torch.randn(BATCH, LONGEST, 1, generator=draw)
        yield x.to(device), (x.cumsum(1) > 0).to(device, torch.get_default_dtype()), lengths.to(device)


def shard(batch: Batch, rank: int, world: int) -> Batch:
    """Returns this process's rows, padded to the longest of them, or to one step if all are empty."""
    x, tags, lengths = (t.chunk(world)[rank] for t in batch)
    longest = max(1, int(lengths.max()))
    return x[:, :longest], tags[:, :longest], lengths


if __name__ == "__main__":
    main()
