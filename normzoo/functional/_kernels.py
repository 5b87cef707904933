"""The loops of ``_one_pass``, which Numba compiles; importing this file imports Numba.

A loop takes the values of pieces of tensors, and the same memory as unsigned integers. It tells zeros, subnormal and
special values apart by their bits, so that the counts are right also where the processor takes subnormal numbers for 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Values whose moments are merged with those before, in the processor's nearest cache.
BLOCK = 2**12
# Values that are counted, and then summed: memory brings the next ones in the time of both.
PART = 2**7
# Values between those that are counted and those that are prefetched; a processor by itself stops at the end of a page.
AHEAD = 2**9
# Values to each prefetch: one line of the cache, of float32 values.
LINE = 16
# Magnitudes of float64 values whose fourth powers, summed over a piece, are within float64's range.
SMALL, BIG = 1e-60, 1e60

EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Sums may be taken in another order, as many at a time as the processor can add; what is not finite keeps its meaning.
OPTIONS: dict[str, Any] = {**EXACT, "fastmath": {"reassoc", "contract", "nsz"}}


def of_float32() -> Callable[..., None]:
    """The compiled :func:`_of_float32`."""
    return compiled(_of_float32, _signature(types.float32, types.uint32))


def of_float64() -> Callable[..., None]:
    """The compiled :func:`_of_float64`."""
    return compiled(_of_float64, _signature(types.float64, types.uint64))


def merging() -> Callable[..., None]:
    """The compiled :func:`_merge`."""
    return compiled(_merge, types.void(types.float64[:, ::1], types.int64[::1], types.float64[:, ::1]))


def _signature(values: Any, bits: Any) -> Any:
    """Of a loop over pieces of these values."""
    pieces = types.int64[::1], types.int64[::1]
    found = types.int64[:, ::1], types.float64[:, ::1], types.boolean[::1]
    return types.void(values[::1], bits[::1], *pieces, *[types.int64] * 4, *found)


def compiled(function: Callable[..., Any], signature: Any, options: Mapping[str, Any] = OPTIONS) -> Callable[..., Any]:
    """The function for arguments of these types; from Numba's cache on disk, if there is one or one can be written."""
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except (RuntimeError, OSError):  # no folder for the cache, or no room in it
        return numba.njit(signature, **options)(function)


@intrinsic
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask memory for the line of the cache that holds ``array[index]``, which may lie beyond the array's end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(context.make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, near, data = number(0), number(3), number(1)
        builder.call(function, [builder.bitcast(address, byte), read, near, data])
        return context.get_dummy_value()

    return types.void(array, index), generate


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
def _add(k, mean, m2, m3, m4, row):  # type: ignore[no-untyped-def]
    """Merge the moments of k values into those of a row, as ``merge_central_moments`` does."""
    n, whole = row[0] + k, row[3] + (mean - row[3]) * k / (row[0] + k)
    before, d = row[3] - whole, mean - whole
    row[6] += m4 + 4 * (d * m3 + before * row[5]) + 6 * (d**2 * m2 + before**2 * row[4])
    row[6] += k * d**4 + row[0] * before**4
    row[5] += m3 + 3 * (d * m2 + before * row[4]) + k * d**3 + row[0] * before**3
    row[4] += m2 + k * d**2 + row[0] * before**2
    row[0], row[3] = n, whole


@numba.njit(**OPTIONS)
def _add_block(x, s1, s2, s3, s4, row):  # type: ignore[no-untyped-def]
    """Merge the moments of a block, of whose powers these are the sums, into those of the piece."""
    k = float(len(x))
    shift = 0.0
    if 2 * s1 * s1 > k * s2:  # what is summed should not be far larger than what is asked for
        shift = s1 / k
        s1, s2, s3, s4 = _sums(x, shift)
    e = s1 / k
    m2 = s2 - s1 * e
    m3 = s3 - 3 * e * s2 + 2 * s1 * e**2
    m4 = s4 - 4 * e * s3 + 6 * e**2 * s2 - 3 * s1 * e**3
    _add(k, shift + e, m2, m3, m4, row)


@numba.njit(**OPTIONS)
def _close(low, high, row):  # type: ignore[no-untyped-def]
    """Fill in extremes and squares; the moments of a piece of equal values are those of one value."""
    row[1], row[2] = low, high
    if low == high:
        row[3] = low
        row[4:7] = 0.0
    row[7] = row[4] + row[0] * row[3] ** 2


def _merge(pieces, layers, merged):  # type: ignore[no-untyped-def]
    """Merge the moments of pieces, of which each is of the layer of this number, into those of the layers."""
    merged[:] = 0.0
    merged[:, 1], merged[:, 2] = np.inf, -np.inf
    for i in range(len(pieces)):
        piece, row = pieces[i], merged[layers[i]]
        _add(piece[0], piece[3], piece[4], piece[5], piece[6], row)
        row[1], row[2] = min(row[1], piece[1]), max(row[2], piece[2])
        row[7] += piece[7]


def _of_float32(  # type: ignore[no-untyped-def]
    x, bits, ends, places, mantissa_bits, infinity, nan, overflow, counts, rows, regular
):
    """Count the values of pieces, and sum them.

    Args:
        x: the pieces, one after the other.
        bits: the same memory.
        ends: where each piece ends.
        places: the row of ``counts`` for each piece.
        mantissa_bits: of the :class:`Layout`.
        infinity: of the layout.
        nan: of the layout.
        overflow: of the layout.
        counts: (..., buckets), whose rows are overwritten.
        rows: (pieces, 8), which gets the moments.
        regular: (pieces,), which gets whether all values are finite, and their fourth powers in range.
    """
    start = 0
    for i in range(len(ends)):
        table, end = counts[places[i]], ends[i]
        regular[i] = _piece_of_float32(
            x[start:end], bits[start:end], mantissa_bits, infinity, nan, overflow, table, rows[i]
        )
        start = end


def _of_float64(  # type: ignore[no-untyped-def]
    x, bits, ends, places, mantissa_bits, infinity, nan, overflow, counts, rows, regular
):
    """As :func:`_of_float32`."""
    start = 0
    for i in range(len(ends)):
        table, end = counts[places[i]], ends[i]
        regular[i] = _piece_of_float64(
            x[start:end], bits[start:end], mantissa_bits, infinity, nan, overflow, table, rows[i]
        )
        start = end


@numba.njit(**OPTIONS)
def _count(bits, begin, end, shift, second, third, fourth, tables):  # type: ignore[no-untyped-def]
    """Count values in four tables in turn, which begin at 0 and these places; by unsigned indices, for speed."""
    step, one, two, three = np.uint64(LINE), np.uint64(1), np.uint64(2), np.uint64(3)
    begin, end = np.uint64(begin), np.uint64(end)
    whole = end - (end - begin) % step
    for line in range(begin, whole, step):
        _prefetch(bits, line + np.uint64(AHEAD))
        for i in range(line, line + step, np.uint64(4)):
            tables[np.uint64(bits[i] >> shift)] += 1
            tables[second + np.uint64(bits[i + one] >> shift)] += 1
            tables[third + np.uint64(bits[i + two] >> shift)] += 1
            tables[fourth + np.uint64(bits[i + three] >> shift)] += 1
    for i in range(whole, end):
        tables[np.uint64(bits[i] >> shift)] += 1


@numba.njit(**OPTIONS)
def _separate_special(bits, half, infinity, nan, table):  # type: ignore[no-untyped-def]
    """Count infinite values apart from NaN, which have the same leading bits; True if all values are finite."""
    if not (table[infinity:half].any() or table[half + infinity : 2 * half].any()):
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


@numba.njit(**OPTIONS)
def _piece_of_float32(x, bits, mantissa_bits, infinity, nan, overflow, table, row):  # type: ignore[no-untyped-def]
    """Count the values in ``table``, as :class:`Layout` says, and their moments in ``row``; whether all are finite."""
    shift, half = np.uint32(23 - mantissa_bits), 1 << (8 + mantissa_bits)
    # Four tables, as a count waits for the one before it if both are of one bucket, each at other places of the cache
    copies, size = 4 if len(x) >= 8 * half else 1, 2 * half + LINE
    second, third, fourth = np.uint64(1 % copies * size), np.uint64(2 % copies * size), np.uint64(3 % copies * size)
    tables = np.zeros(copies * size, np.int32)
    zeros = tiny = np.int64(0)  # values that are zero; values whose leading bits, but for the sign, are zero
    most, least = np.int32(-(2**31)), np.uint32(0)  # as integers, the bits of floats of one sign are in their order
    row[:] = 0.0
    for start in range(0, len(x), BLOCK):
        stop = min(start + BLOCK, len(x))
        s1 = s2 = s3 = s4 = 0.0
        for begin in range(start, stop, PART):
            end = min(begin + PART, stop)
            _count(bits, begin, end, shift, second, third, fourth, tables)
            part = bits[begin:end]
            for i in range(len(part)):
                most, least = max(most, np.int32(part[i])), max(least, part[i])
            p1, p2, p3, p4 = _sums(x[begin:end], 0.0)
            s1, s2, s3, s4 = s1 + p1, s2 + p2, s3 + p3, s4 + p4
        _add_block(x[start:stop], s1, s2, s3, s4, row)
        tiny_before, tiny = tiny, np.int64(0)
        for first in range(0, len(tables), size):
            tiny += tables[first] + tables[first + half]
        if tiny > tiny_before:
            block = bits[start:stop]
            for i in range(len(block)):
                zeros += (block[i] & np.uint32(0x7FFFFFFF)) == 0
    table[:] = 0
    for first in range(0, len(tables), size):
        for i in range(2 * half):
            table[i] += tables[first + i]
    table[0], table[half] = zeros, tiny - zeros
    # Where all values are of one sign, the smallest bits are those of the value of the smallest magnitude
    greatest = np.uint32(most) if most >= 0 else bits.min()
    least = least if least >> np.uint32(31) else bits.min()
    ends = np.array([least, greatest], np.uint32).view(np.float32)
    _close(np.float64(ends[0]), np.float64(ends[1]), row)
    return _separate_special(bits, half, infinity, nan, table)


@numba.njit(**OPTIONS)
def _piece_of_float64(x, bits, mantissa_bits, infinity, nan, overflow, table, row):  # type: ignore[no-untyped-def]
    """As :func:`_piece_of_float32`; whether all are finite, with fourth powers in range."""
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
        _add_block(x[start : start + BLOCK], *_sums(x[start : start + BLOCK], 0.0), row)
    for i in range(2):
        ends[i] ^= (ends[i] >> np.int64(63)) & np.int64(2**63 - 1)
    floats = ends.view(np.float64)
    _close(floats[0], floats[1], row)
    largest = max(-floats[0], floats[1])
    return regular and (largest == 0 or SMALL < largest < BIG)
