"""Random permutations of any size without an array: place by place."""

import hashlib
import math

ROUNDS = 6  # of the Feistel network: fewer favour some orders of a few numbers


def shuffled(index: int, count: int, *key: int | str) -> int:
    """Returns where a random permutation of 0, ..., count - 1 takes `index`; each key has a permutation of its own.

    A Feistel network permutes the pairs of numbers below `side`; where it leaves 0, ..., count - 1 it is applied again
    until it is back (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). `side` is the root of `count`
    rounded up, so that is rare.
    """
    side = math.isqrt(count - 1) + 1
    while True:
        left, right = divmod(index, side)
        for turn in range(ROUNDS):
            digest = hashlib.blake2b(repr((turn, right, key)).encode(), digest_size=8).digest()
            left, right = right, (left + int.from_bytes(digest, "little")) % side
        index = left * side + right
        if index < count:
            return index
