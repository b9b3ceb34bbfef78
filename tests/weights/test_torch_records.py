import pickle

import numpy as np
import pytest

from lightning_soup.weights.inert_pickle import Placeholder, load_inert
from lightning_soup.weights.torch_records import BUILDERS


def read(stream):
    return load_inert(stream, BUILDERS, lambda pid: pid)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(2.5), np.int16(-3), np.uint8(200), np.bool_(False)])
def test_numpy_numbers(value, protocol):
    found = read(pickle.dumps(value, protocol))
    assert found == value.item()
    assert type(found) is type(value.item())


def test_numpy_numbers_of_the_other_byte_order():
    stream = pickle.dumps(np.float64(0.1), 2)
    raw = np.float64(0.1).tobytes()
    swapped = raw[::-1].decode("latin1").encode("utf-8")
    turned = stream.replace(raw.decode("latin1").encode("utf-8"), swapped).replace(b"X\x01\0\0\0<", b"X\x01\0\0\0>")
    assert pickle.loads(turned) == 0.1
    assert read(turned) == 0.1


@pytest.mark.parametrize(
    "value", [np.str_("a"), np.complex64(1), np.datetime64("2020-01-01"), np.ones(2), np.void(b"x")]
)
def test_other_numpy_values_are_placeholders(value):
    assert isinstance(read(pickle.dumps(value, 2)), Placeholder)
