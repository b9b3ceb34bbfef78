"""Inner products of all pairs against plain ones, and what is broken, shared or tied."""

import math

import pytest
import torch

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.weights.gram import gram
from lightning_soup.weights.save import save_weights


def networks(count=4, dtype=torch.float32, near=1e-3):
    generator = torch.Generator().manual_seed(0)
    start = {
        "a": torch.randn(300, 701, generator=generator, dtype=torch.float64),
        "b": torch.randn(9, generator=generator, dtype=torch.float64),
    }
    moved = [
        {
            name: (v + near * torch.randn(v.shape, generator=generator, dtype=torch.float64)).to(dtype)
            for name, v in start.items()
        }
        for _ in range(count)
    ]
    return {name: value.to(dtype) for name, value in start.items()}, moved


def expected(rows, origin):
    flat = [torch.cat([(row[n].double() - origin[n].double()).flatten() for n in origin]) for row in rows]
    return torch.stack([torch.stack([x @ y for y in flat]) for x in flat])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_start", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_plain_products(tmp_path, dtype, with_start, threads):
    start, rows = networks(dtype=dtype, near=0.1 if dtype == torch.bfloat16 else 1e-3)
    files = [save_weights(row, tmp_path / f"{i}.safetensors") for i, row in enumerate(rows)]
    found = gram(files, start if with_start else None, threads=threads)
    wanted = expected(rows, start if with_start else rows[0])
    torch.testing.assert_close(found.total, wanted, rtol=1e-4, atol=1e-9)
    assert found.from_start == with_start
    for name in start:
        squares = torch.stack([row[name].double().square().sum() for row in rows])
        torch.testing.assert_close(found.squares[name], squares, rtol=1e-5, atol=0)
    assert found.broken == ()


def test_distances_of_near_networks_are_not_rounding():
    _, rows = networks(near=1e-6, dtype=torch.float64)
    rows = [{name: value.float() for name, value in row.items()} for row in rows]
    found = gram(rows).total
    exact = expected(rows, rows[0])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_broken_ones_are_named_and_the_others_compared():
    start, rows = networks()
    rows[1]["a"][3, 5] = math.nan
    rows[3]["b"][0] = math.inf
    found = gram(rows, start)
    assert found.broken == ((1, "a"), (3, "b"))
    assert found.total.isfinite().all()
    torch.testing.assert_close(found.products["a"][0, 0], expected(rows[:1], start)[0, 0], rtol=1e-3, atol=0)


def test_a_first_one_that_is_broken_leaves_the_others_comparable():
    _, rows = networks()
    whole = expected(rows[1:], rows[1])
    rows[0]["a"][3, 5] = math.nan
    found = gram(rows)
    assert found.broken == ((0, "a"),)
    distances = [float(found.total[i, i] + found.total[j, j] - 2 * found.total[i, j]) for i, j in ((1, 2), (1, 3))]
    assert distances == pytest.approx(
        [float(whole[1, 1]), float(whole[2, 2])], rel=0.01
    )  # of one chunk, not of near ones


@pytest.mark.parametrize("count", [2, 5, 9])
def test_more_rows_than_a_block_of_products_has(count):
    start, rows = networks(count)
    torch.testing.assert_close(gram(rows, start).total, expected(rows, start), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        gram([*rows, rows[0]]).total[:count, :count], expected(rows, rows[0]), rtol=1e-4, atol=1e-9
    )


def test_infinities_that_all_share_are_no_difference():
    start, rows = networks()
    for row in (start, *rows):
        row["mask"] = torch.full((4, 4), -math.inf).triu(1)
    found = gram(rows, start)
    assert found.broken == ()
    assert not found.products["mask"].any()
    rows[2]["mask"][0, 1] = 0.0
    assert gram(rows, start).broken == ((2, "mask"),)


def test_tied_tensors_count_once_and_integers_not():
    _, rows = networks(2)
    for row in rows:
        row["tied"] = row["a"]
        row["count"] = torch.tensor(3)
    assert set(gram(rows).products) == {"a", "b"}


def test_other_tensors_are_refused():
    _, rows = networks(2)
    del rows[1]["b"]
    with pytest.raises(IncompatibleIngredients):
        gram(rows)
