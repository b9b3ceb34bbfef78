"""The CRC-32 of data that is written in pieces and in any order, as zip archives need it."""

import zlib
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its lowest power in the highest bit, as are all polynomials here
_ONE, _X8 = 1 << 31, 1 << 23


class Checksum:
    """Takes the pieces of one run of bytes, from several threads if need be."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int, int]] = {}

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Take the bytes that begin at byte ``start``."""
        self._pieces[start] = zlib.crc32(data), len(data)

    def value(self) -> int:
        """The checksum of all pieces in the order of their places."""
        total = 0
        for start in sorted(self._pieces):
            checksum, length = self._pieces[start]
            total = _product(_power(length), total) ^ checksum
        return total


@lru_cache(maxsize=256)  # nearly all pieces have one length
def _power(length: int) -> int:
    """What ``length`` more bytes multiply a checksum by: x to the power of their bits."""
    result, square = _ONE, _X8
    while length:
        if length & 1:
            result = _product(square, result)
        square = _product(square, square)
        length >>= 1
    return result


def _product(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo CRC-32's."""
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
