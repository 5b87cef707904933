"""What may happen to the bytes of a file."""

from __future__ import annotations

import random


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) * 8)
    return data[: at // 8] + bytes([data[at // 8] ^ (1 << at % 8)]) + data[at // 8 + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def swap(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    i, j = rng.randrange(len(data)), rng.randrange(len(data))
    changed[i], changed[j] = changed[j], changed[i]
    return bytes(changed)


def drop(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 40) :]


def double(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = rng.randrange(start, len(data)) + 1
    return data[:end] + data[start:end] + data[end:]


def noise(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randrange(1, 40)) + data[start:]


DAMAGES = (flip, cut, swap, drop, double, noise)
