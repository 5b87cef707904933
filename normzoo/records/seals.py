"""Checksums that stand inside of what they check: ``crc32:`` and eight digits, which are zeros while it is computed."""

from __future__ import annotations

import re
import zlib

UNSEALED = "crc32:00000000"
SEAL = re.compile(rb"crc32:[0-9a-f]{8}")


def sealed(message: bytes) -> bytes:
    """The message with its checksum in the place of the first ``UNSEALED``."""
    return message.replace(UNSEALED.encode(), b"crc32:%08x" % zlib.crc32(message), 1)


def seal_of(message: memoryview) -> bytes | None:
    """The checksum of a message that is what was written; None for any other.

    Example:
        >>> seal_of(memoryview(sealed(b"crc32:00000000, text")))
        b'crc32:69d72a3f'
        >>> seal_of(memoryview(sealed(b"crc32:00000000, text")[:-1])) is None
        True
    """
    match = SEAL.search(message)
    if match is None:
        return None
    start, end = match.span()
    crc = zlib.crc32(message[end:], zlib.crc32(UNSEALED.encode(), zlib.crc32(message[:start])))
    return match[0] if b"crc32:%08x" % crc == match[0] else None
