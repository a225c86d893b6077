"""Randomness that belongs to the sample.

A generator is a pure function of (seed, epoch, position, view, purpose), so a clip's position, crop and masks are the
same whichever rank or worker makes it, before and after a resume.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from pretrain.runtime.untrusted import name_bytes


def key_of(*parts: int | str) -> int:
    """Hash any numbers and words to a 128-bit integer, stable over machines and Python versions."""
    # The type's name keeps 1 and "1" apart. Python's own hash of a word is another in every process.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(name_bytes(text), digest_size=16).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """Build a counter-based (Philox) generator keyed by `parts`, for example (seed, epoch, position, view, "crop")."""
    # numpy's stubs know SeedSequence only; its documentation allows any ISeedSequence.
    return np.random.Generator(np.random.Philox(_Key(key_of(*parts))))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """Philox key that is used as it is: Philox(key=...) does the same after it has drawn, in vain, from the system."""

    def __init__(self, key: int) -> None:
        self._words = np.array([key & (1 << 64) - 1, key >> 64], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        """Return the key's two words, low one first: all that Philox asks for."""
        assert n_words == 2 and dtype is np.uint64, "Philox asks for its key"
        return self._words
