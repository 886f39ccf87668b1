"""A batch of four rows of five steps, with lengths, with a mask that has holes, and with resets."""

from __future__ import annotations

import torch

BATCH, STEPS = 4, 5
LENGTHS = [3, 4, 0, 1]
HOLES = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
RESETS = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
