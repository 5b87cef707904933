"""The loops of ``_one_pass``, which Numba compiles; importing this file imports Numba.

A loop takes the values of a piece of a tensor, and the same memory as unsigned integers. It tells zeros, subnormal and
special values apart by their bits, so that the counts are right also where the processor takes subnormal numbers for 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

# Values that are counted, and then summed, while they are in the processor's nearest cache.
BLOCK = 2**12
# Magnitudes of float64 values whose fourth powers, summed over a piece, are within float64's range.
SMALL, BIG = 1e-60, 1e60

# Sums may be taken in another order, as many at a time as the processor can add; what is not finite keeps its meaning.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


def of_float32() -> Callable[..., bool]:
    """The compiled :func:`_of_float32`."""
    return _compiled(_of_float32, types.float32, types.uint32)


def of_float64() -> Callable[..., bool]:
    """The compiled :func:`_of_float64`."""
    return _compiled(_of_float64, types.float64, types.uint64)


def _compiled(function: Callable[..., bool], values: Any, bits: Any) -> Callable[..., bool]:
    """For contiguous arrays of these types; from Numba's cache on disk, if there is one or one can be written."""
    signature = types.boolean(values[::1], bits[::1], *[types.int64] * 4, types.int64[::1], types.float64[::1])
    try:
        return numba.njit(signature, cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # no folder for the cache, or no room in it
        return numba.njit(signature, **OPTIONS)(function)


@numba.njit(**OPTIONS)
def _sums(x, shift):  # type: ignore[no-untyped-def]
    """Sums of the powers 1 to 4 of x - shift."""
    s1 = s2 = s3 = s4 = 0.0
    for i in range(len(x)):
        d = np.float64(x[i]) - shift
        square = d * d
        s1 += d
        s2 += square
        s3 += square * d
        s4 += square * square
    return s1, s2, s3, s4


@numba.njit(**OPTIONS)
def _add_block(x, row):  # type: ignore[no-untyped-def]
    """Merge the moments of a block into those of the piece, as ``merge_central_moments`` does."""
    k = float(len(x))
    shift = 0.0
    s1, s2, s3, s4 = _sums(x, shift)
    if 2 * s1 * s1 > k * s2:  # what is summed should not be far larger than what is asked for
        shift = s1 / k
        s1, s2, s3, s4 = _sums(x, shift)
    e = s1 / k
    m2 = s2 - s1 * e
    m3 = s3 - 3 * e * s2 + 2 * s1 * e**2
    m4 = s4 - 4 * e * s3 + 6 * e**2 * s2 - 3 * s1 * e**3
    n, mean = row[0] + k, row[3] + (shift + e - row[3]) * k / (row[0] + k)
    before, block = row[3] - mean, shift + e - mean
    row[6] += m4 + 4 * (block * m3 + before * row[5]) + 6 * (block**2 * m2 + before**2 * row[4])
    row[6] += k * block**4 + row[0] * before**4
    row[5] += m3 + 3 * (block * m2 + before * row[4]) + k * block**3 + row[0] * before**3
    row[4] += m2 + k * block**2 + row[0] * before**2
    row[0], row[3] = n, mean


@numba.njit(**OPTIONS)
def _close(low, high, row):  # type: ignore[no-untyped-def]
    """Fill in extremes and squares; the moments of a piece of equal values are those of one value."""
    row[1], row[2] = low, high
    if low == high:
        row[3] = low
        row[4:7] = 0.0
    row[7] = row[4] + row[0] * row[3] ** 2


def _of_float32(x, bits, mantissa_bits, infinity, nan, overflow, table, row):  # type: ignore[no-untyped-def]
    """Count the values in ``table``, as :class:`Layout` says, and their moments in ``row``; whether all are finite."""
    shift, half = np.uint32(23 - mantissa_bits), 1 << (8 + mantissa_bits)
    # Two tables, as a count waits for the one before it if both are of one bucket; unsigned indices are not checked
    even, odd = np.zeros(2 * half, np.int32), np.zeros(2 * half, np.int32)
    ends = np.array([2**31 - 1, -(2**31)], np.int32)
    row[:] = 0.0
    for start in range(0, len(x), BLOCK):
        block = bits[start : start + BLOCK]
        for i in range(len(block) // 2):
            even[np.uint64(block[2 * i] >> shift)] += 1
            odd[np.uint64(block[2 * i + 1] >> shift)] += 1
        if len(block) % 2:
            even[np.uint64(block[-1] >> shift)] += 1
        low, high = ends[0], ends[1]
        for i in range(len(block)):  # by integers, which are in the order of the floats: NaN compares with nothing
            signed = np.int32(block[i])
            ordered = np.int32(signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            low, high = min(low, ordered), max(high, ordered)
        ends[0], ends[1] = low, high
        _add_block(x[start : start + BLOCK], row)
    table[2 * half :] = 0
    for i in range(2 * half):
        table[i] = even[i] + odd[i]
    for i in range(2):
        ends[i] ^= (ends[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)
    floats = ends.view(np.float32)
    _close(np.float64(floats[0]), np.float64(floats[1]), row)
    tiny = table[0] + table[half]
    if tiny:  # zeros of both signs, and what shares their leading bits
        zeros = 0
        for i in range(len(bits)):
            zeros += (bits[i] & np.uint32(0x7FFFFFFF)) == 0
        table[0], table[half] = zeros, tiny - zeros
    special = table[infinity:half].sum() + table[half + infinity : 2 * half].sum()
    if not special:
        return True
    table[infinity:half] = 0
    table[half + infinity : 2 * half] = 0
    for i in range(len(bits)):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude > np.uint32(0x7F800000):
            table[nan] += 1
        elif magnitude == np.uint32(0x7F800000):
            table[infinity + half * np.int64(bits[i] >> np.uint32(31))] += 1
    return False


def _of_float64(x, bits, mantissa_bits, infinity, nan, overflow, table, row):  # type: ignore[no-untyped-def]
    """As :func:`_of_float32`; whether all are finite, with fourth powers in range."""
    half, leading = 1 << (8 + mantissa_bits), np.uint64(52 - mantissa_bits)
    one, sign = np.uint64(1 << mantissa_bits), np.uint64(63)
    everything, least = (np.uint64(1) << sign) - np.uint64(1), np.uint64(897 << mantissa_bits)  # of 2^-126
    beyond = np.uint64((1023 + 128) << mantissa_bits)
    infinite = np.uint64(2047) << np.uint64(52)
    ends = np.array([2**63 - 1, -(2**63)], np.int64)
    table[:] = 0
    row[:] = 0.0
    regular = True
    for start in range(0, len(x), BLOCK):
        block = bits[start : start + BLOCK]
        low, high = ends[0], ends[1]
        for i in range(len(block)):
            signed = np.int64(block[i])
            ordered = signed ^ ((signed >> np.int64(63)) & np.int64(2**63 - 1))
            low, high = min(low, ordered), max(high, ordered)
            magnitude, negative = block[i] & everything, np.int64(block[i] >> sign)
            top = magnitude >> leading
            if least <= top < beyond:
                table[np.int64(top - least + one) + half * negative] += 1
            elif magnitude == 0:
                table[0] += 1
            elif top < least:  # as a subnormal float32, cut off to whole multiples of 2^-(126+m)
                exponent = top >> np.uint64(mantissa_bits)
                mantissa = (top & (one - np.uint64(1))) | one
                whole = np.int64(mantissa >> min(np.uint64(897) - exponent, sign))
                table[whole + half * negative if whole else half] += 1
            elif magnitude < infinite:
                table[overflow + negative] += 1
            elif magnitude == infinite:
                table[infinity + half * negative] += 1
                regular = False
            else:
                table[nan] += 1
                regular = False
        ends[0], ends[1] = low, high
        _add_block(x[start : start + BLOCK], row)
    for i in range(2):
        ends[i] ^= (ends[i] >> np.int64(63)) & np.int64(2**63 - 1)
    floats = ends.view(np.float64)
    _close(floats[0], floats[1], row)
    largest = max(-floats[0], floats[1])
    return regular and (largest == 0 or SMALL < largest < BIG)
