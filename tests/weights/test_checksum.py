import random
import zlib

import pytest

from lightning_soup.weights.checksum import Checksum


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 70_001])
def test_pieces_in_any_order_give_the_checksum_of_the_whole(size):
    data = random.Random(size).randbytes(size)
    for step in (1, 13, 4096, 100_000):
        starts = list(range(0, size, step)) if size < 2000 * step else []
        if not starts:
            continue
        random.Random(step).shuffle(starts)
        checksum = Checksum()
        for start in starts:
            checksum.add(start, memoryview(data)[start : start + step])
        assert checksum.value() == zlib.crc32(data)
    assert Checksum().value() == zlib.crc32(b"")
