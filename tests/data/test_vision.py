import pytest
import torch
from PIL import Image

from lightning_soup.data.vision import ImageView, map_classes, random_parts
from lightning_soup.errors import UnsupportedSetup


class Greys(torch.utils.data.Dataset):
    """Image i has the grey value i and the class i mod 3."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return Image.new("L", (2, 2), index), torch.tensor(index % 3)


def pixel(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))[2]


def test_view_selects_transforms_and_renumbers():
    plain = ImageView(Greys(), pixel)
    assert [plain[i] for i in range(len(plain))] == [(i, i % 3) for i in range(9)]
    view = ImageView(Greys(), pixel, indices=[4, 8, 0], class_map={0: 5, 1: 7, 2: 6})
    assert [view[i] for i in range(len(view))] == [(4, 7), (8, 6), (0, 5)]


def test_random_parts_share_nothing_and_follow_the_seed():
    rest, held_out = random_parts(50, 0.2, seed=1)
    assert (len(rest), len(held_out)) == (40, 10)
    assert sorted(rest + held_out) == list(range(50))
    assert rest == sorted(rest)
    assert held_out == sorted(held_out)
    assert random_parts(50, 0.2, seed=1) == (rest, held_out)
    assert random_parts(50, 0.2, seed=2) != (rest, held_out)


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.1), (3, 0.9), (0, 0.5)])
def test_random_parts_leave_none_empty(count, fraction):
    with pytest.raises(UnsupportedSetup, match=f"A split of {count} samples at fraction {fraction}"):
        random_parts(count, fraction, seed=0)


def test_classes_are_matched_by_name():
    expected = ["bird", "cat", "dog"]
    assert map_classes(expected, expected, "x", subset=False) is None
    assert map_classes(["dog", "bird", "cat"], expected, "x", subset=False) == {0: 2, 1: 0, 2: 1}
    assert map_classes(["cat", "dog"], expected, "x", subset=True) == {0: 1, 1: 2}
    assert map_classes(["bird", "cat"], expected, "x", subset=True) is None


@pytest.mark.parametrize(
    ("found", "subset", "message"),
    [
        (["bird", "cat", "dog", "eel"], True, "unknown: eel. "),
        (["cat", "dog"], False, "missing: bird. "),
        (["cat", "dogs", "bird"], False, "unknown: dogs; missing: dog. "),
        (
            [f"c{i:02}" for i in range(12)],
            True,
            "unknown: c00, c01, c02, c03, c04, c05, c06, c07, c08, c09 and 2 more. ",
        ),
    ],
)
def test_other_classes_are_named(found, subset, message):
    with pytest.raises(UnsupportedSetup) as raised:
        map_classes(found, ["bird", "cat", "dog"], "sketches/", subset=subset)
    assert str(raised.value).startswith(
        "The classes of sketches/ are not those of the training set (bird, cat, dog); " + message
    )
