"""Randomness that belongs to the sample.

A generator is a pure function of (seed, epoch, position, view, purpose), so a clip's position, crop and masks are the
same whichever rank or worker makes it, before and after a resume.
"""

import hashlib

import numpy as np


def key_of(*parts: int | str) -> int:
    """A 128-bit integer from any numbers and words, stable over machines and Python versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A counter-based (Philox) generator keyed by `parts`, for example (seed, epoch, position, view, "crop")."""
    return np.random.Generator(np.random.Philox(key=key_of(*parts)))
