"""Cheap 64-bit hashing, the same in every process: whatever the scripted engine says follows from it."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Sequence

_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, index: int) -> float:
    """In [0, 1), from a seed and a place."""
    return (mix(mix(seed) ^ index) >> 11) / (1 << 53)


def digest(ids: Sequence[int], extra: Iterable[bytes] = ()) -> int:
    """64 bits of a prompt, and of what else belongs to it."""
    state = hashlib.blake2b(array.array("q", ids).tobytes(), digest_size=8)
    for part in extra:
        state.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(state.digest(), "big")
