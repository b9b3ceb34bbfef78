import numpy as np
import pytest
import torch

from lightning_soup.errors import RecipeError
from lightning_soup.weights.coefficients import coefficient_rows

NAMES = ["blocks.0.w", "blocks.1.w", "head.w", "odd[0]"]


def test_one_row_for_all():
    for row in ([0.25, 0.75], (0.25, 0.75), torch.tensor([0.25, 0.75]), np.array([0.25, 0.75])):
        assert coefficient_rows(NAMES, row, 2) == dict.fromkeys(NAMES, (0.25, 0.75))


def test_exact_names_come_first_then_the_first_pattern():
    rows = coefficient_rows(NAMES, {"*": [0, 1], "blocks.*": [1, 0], "blocks.1.w": [3, 3], "odd[0]": [5, 5]}, 2)
    assert rows == {"blocks.0.w": (0, 1), "blocks.1.w": (3, 3), "head.w": (0, 1), "odd[0]": (5, 5)}
    rows = coefficient_rows(NAMES[:3], {"blocks.?.w": [1, 0], "h*": [2, 0], "*": [0, 1]}, 2)
    assert rows == {"blocks.0.w": (1, 0), "blocks.1.w": (1, 0), "head.w": (2, 0)}


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"blocks.*": [1, 0]}, "no coefficients for tensor 'head.w'"),
        ({"block.*": [1, 0], "*": [1, 0]}, r"for 'block\.\*', but no tensor has that name. Tensors: blocks\.0\.w"),
        ({"Head.w": [1, 0], "*": [1, 0]}, "for 'Head.w'"),
        ({"*": [1, 0, 0]}, "the coefficients of '[*]': got 3 numbers for 2"),
        ({"*": "ab"}, "expected 2 numbers, got 'ab'"),
        ([1, None], "expected 2 numbers"),
        ([0, 0], "all zero"),
        ([1, float("-inf")], "not finite"),
        ([], "got 0 numbers"),
    ],
)
def test_wrong_coefficients(coefficients, message):
    with pytest.raises(RecipeError, match=message):
        coefficient_rows(NAMES, coefficients, 2)
