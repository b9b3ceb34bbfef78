import json
import math

import pytest
import torch

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.continual import continual_metrics

# Golden case (d)6 of the ZSCL notes.
A = [[80, 50, 30, 40], [70, 90, 20, 44], [60, 85, 95, 36], [50, 80, 90, 88]]
NAMES = ["aircraft", "birds", "cars", "dogs"]


def test_golden_matrix():
    found = continual_metrics(A, NAMES)
    assert list(found.transfer_by_task.values()) == pytest.approx([50, 25, 40], abs=1e-10)
    assert found.transfer == pytest.approx(115 / 3, abs=1e-10)  # the pooled upper triangle would be 36.67
    assert found.average == pytest.approx(63, abs=1e-10)
    assert found.last == pytest.approx(77, abs=1e-10)
    assert found.forget == pytest.approx(-15, abs=1e-10)
    assert found.average_by_task == pytest.approx({"aircraft": 65, "birds": 76.25, "cars": 58.75, "dogs": 52})
    assert found.last_by_task == {"aircraft": 50, "birds": 80, "cars": 90, "dogs": 88}


def test_rows_and_columns_that_were_used():
    used = continual_metrics(A, NAMES).used
    assert used["transfer"] == {
        "birds": ("aircraft",),
        "cars": ("aircraft", "birds"),
        "dogs": ("aircraft", "birds", "cars"),
    }
    assert used["average"] == {name: tuple(NAMES) for name in NAMES}
    assert used["last"] == dict.fromkeys(NAMES, ("dogs",))
    assert used["forget"] == {name: (name, "dogs") for name in NAMES[:-1]}
    json.dumps(continual_metrics(A, NAMES).plain())


def test_an_alphabetical_matrix_with_another_column_is_brought_into_the_order_of_training():
    order = ["dogs", "aircraft", "cars", "birds"]
    place = [NAMES.index(name) for name in order]
    permuted = continual_metrics([[A[i][j] for j in place] for i in place], order)
    with_more = [[*row[:2], 99.0, *row[2:]] for row in A]
    columns = ["aircraft", "birds", "cifar10", "cars", "dogs"]
    assert continual_metrics(with_more, order, rows=NAMES, columns=columns) == permuted
    by_name = {row: dict(zip(columns, cells, strict=True)) for row, cells in zip(NAMES, with_more, strict=True)}
    assert continual_metrics(by_name, order) == permuted
    assert permuted.transfer != continual_metrics(A, NAMES).transfer


def test_a_tensor_will_do():
    assert continual_metrics(torch.tensor(A), NAMES) == continual_metrics(A, NAMES)


def test_published_self_check():
    """ZSCL in order I: the Transfer of its tasks and their mean, from the matrix that the authors ship."""
    columns = [86.0, 67.4, 45.4, 50.4, 69.1, 87.6, 61.8, 86.8, 60.1, 66.8]
    names = [f"task {number}" for number in range(11)]
    found = continual_metrics([[0.0, *columns]] * 11, names)
    assert found.transfer == pytest.approx(68.14, abs=0.005)


def test_one_task_has_no_transfer():
    found = continual_metrics([[70.0]], ["only"])
    assert (found.average, found.last) == (70.0, 70.0)
    assert math.isnan(found.transfer)
    assert math.isnan(found.forget)


@pytest.mark.parametrize(
    ("matrix", "names", "options", "message"),
    [
        ([], [], {}, "one task or more"),
        (A, ["a", "b", "a", "c"], {}, "names has a twice"),
        (A[:3], NAMES, {}, r"3 rows with \[4\] cells; expected 4 rows"),
        ([*A[:3], [1.0]], NAMES, {}, r"4 rows with \[1, 4\] cells"),
        (A, [*NAMES[:3], "cats"], {"rows": NAMES, "columns": NAMES}, "after training 'aircraft': of cats"),
        (A, NAMES, {"rows": ["a", "a", "b", "c"]}, "rows has a twice"),
        ([[math.nan]], ["a"], {}, "on 'a' after training 'a' is nan"),
        ({"a": {"a": 1.0}}, ["a", "b"], {}, "after training 'a': of b"),
        ({"a": {"a": 1.0}}, ["a"], {"rows": ["a"]}, "names of its own"),
    ],
)
def test_what_is_no_matrix(matrix, names, options, message):
    with pytest.raises(LightningSoupError, match=message):
        continual_metrics(matrix, names, **options)
