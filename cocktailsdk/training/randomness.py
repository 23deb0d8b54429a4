"""Randomness of a run: seeded at every step, and none of it left behind.

A run draws all its randomness from seeds that are made of what is being done: the user's seed, the round, the epoch
and the step. Nothing of a generator's state needs to be saved to resume exactly, and whether a callback or a metric
draws numbers of its own changes nothing.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

__all__ = ["seed_everything"]


def seed_everything(*key: int | str) -> None:
    """Seed torch (CPU and CUDA), numpy and ``random`` from a key.

    Args:
        *key: What the seed stands for, say ``(seed, "step", round, epoch, step)``.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1  # 63 bits: positive as a signed integer, too
    # not torch.manual_seed, which formats a stack trace whenever CUDA was not used yet: 80 us a call
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # NumPy takes 32 bits
    random.seed(seed)
