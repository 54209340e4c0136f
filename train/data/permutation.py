"""Permutations that are computed, not stored: keyed bijections of 0 … size − 1.

A Feistel network over the smallest square that holds the range, with cycle-walking: a value that
leaves the range is permuted again until it is back. Source: Black and Rogaway (2002), "Ciphers with
arbitrary finite domains".
"""

import hashlib

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

NUM_ROUNDS = 8
"""Fewer leave tiny ranges visibly uneven: a test measures it."""


def derive_keys(num_keys: int, *parts: int | str) -> UInt64:
    """(num_keys,) uint64 that depend on every part, through SHA-256."""
    label = "/".join(map(str, ("mlsae", *parts))).encode()
    blocks = (hashlib.sha256(label + b"/%d" % i).digest() for i in range(-(-num_keys // 4)))
    return np.frombuffer(b"".join(blocks), "<u8")[:num_keys].astype(np.uint64)


def mix(values: UInt64) -> UInt64:
    """A bijection of uint64 that scatters neighbours (splitmix64's finaliser, variant 13)."""
    shifted = values >> np.uint64(30)
    mixed = values ^ shifted
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed


def permute(index: npt.NDArray[np.int64], size: int, keys: UInt64) -> npt.NDArray[np.int64]:
    """Where each index goes under the permutation of 0 … size − 1 that the keys name.

    Args:
        index: (n,) of 0 … size − 1.
        size: at least 1.
        keys: (NUM_ROUNDS,), or (n, NUM_ROUNDS) to apply a permutation of its own to each index.

    Returns:
        (n,) int64; for one key, distinct for distinct indices.
    """
    side = np.uint64(int(np.ceil(np.sqrt(size))))
    while int(side) ** 2 < size:
        side += np.uint64(1)
    keys = np.broadcast_to(keys, (len(index), NUM_ROUNDS))
    out = _feistel(index.astype(np.uint64), side, keys)
    while len(astray := np.flatnonzero(out >= np.uint64(size))):
        out[astray] = _feistel(out[astray], side, keys[astray])
    if size > 1:
        # A network of odd side is always an even permutation: exchanging 0 and 1 by one bit of the
        # key lets tiny ranges have the odd ones too.
        low = out < 2
        out[low] ^= keys[low, 0] & np.uint64(1)
    return out.astype(np.int64)


def _feistel(values: UInt64, side: np.uint64, keys: UInt64) -> UInt64:
    left, right = np.divmod(values, side)
    for number in range(NUM_ROUNDS):
        left, right = right, (left + mix(right + keys[:, number]) % side) % side
    return left * side + right
