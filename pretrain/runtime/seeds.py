"""Seeds of everything that is random outside of the data.

Weights come from the run's seed. Stochastic depth, dropout and mixing are drawn by position (models/dropout.py). What
else a forward pass draws from torch is seeded anew before it from (seed, step, micro-batch, rank), so a resumed run
draws what the uninterrupted one would have drawn and no generator state has to be saved.
"""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), the same on every rank: all ranks build the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_forward(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch for one forward pass of one rank."""
    # Hashed, not added up: seed + step + rank would give rank 1 what rank 0 draws a step later.
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0] >> 1))
