"""Counter-based random numbers and text: every value is a function of a number, so any of them can be made again.

The mixer is SplitMix64 (Steele, Lea, Flood 2014). All functions work on whole numpy or Arrow arrays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_GAMMA: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1
_ALPHABET: Final = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


def mix(numbers: UInt64Array, salt: int) -> UInt64Array:
    """64 random bits for each number; other bits for another ``salt``."""
    bits = numbers * np.uint64(_GAMMA)
    bits += np.uint64((salt + 1) * 0xD1342543DE82EF95 & _MASK)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def below(bits: UInt64Array, bound: int | Int64Array) -> Int64Array:
    """The upper 32 bits scaled to [0, bound), without a division; ``bound`` up to 2**31."""
    scaled = (bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def unit(bits: UInt64Array) -> npt.NDArray[np.float64]:
    """53 bits scaled to [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def words(count: int, shortest: int, longest: int, *, salt: int, special: bytes = b"") -> pa.Array:
    """``count`` strings of random letters and lengths from ``shortest`` to ``longest``.

    With ``special`` about one letter in thirteen is that one.
    """
    rows = np.arange(count, dtype=np.uint64)
    lengths = shortest + below(mix(rows, salt), longest - shortest + 1)
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    bits = mix(np.arange(offsets[-1], dtype=np.uint64), salt + 1)
    letters = _ALPHABET[below(bits, 26)]
    if special:
        letters = np.where((bits & np.uint64(0xFFFF)) < 65_536 // 13, special[0], letters).astype(np.uint8)
    return pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(letters)])
