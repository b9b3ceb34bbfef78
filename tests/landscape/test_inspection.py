"""What weights say: starts, outliers, broken and incompatible files, duplicates, and the verdict in words."""

import math

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape.inspection import components, inspect_weights, outliers


def network(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": size * torch.randn(40, 30, generator=generator),
        "b.weight": size * torch.randn(20, 40, generator=generator),
        "b.bias": size * torch.randn(20, generator=generator),
    }


def tuned(start, seed, size=0.02):
    return {
        name: value + change for (name, value), change in zip(start.items(), network(seed, size).values(), strict=True)
    }


def twelve():
    """Nine fine-tunes of one start, two of another, one with far too large steps."""
    start, other = network(0), network(1)
    rows = [tuned(start, 10 + i) for i in range(9)]
    return start, [*rows[:3], tuned(other, 30), *rows[3:6], tuned(start, 40, 0.3), *rows[6:], tuned(other, 31)]


def test_other_starts_and_far_ones_are_named_exactly():
    start, rows = twelve()
    labels = [f"run {i}" for i in range(12)]
    for given in (None, start):
        found = inspect_weights(rows, given, labels=labels)
        assert found.hopeless == (3, 7, 11)
        assert found.groups == ((0, 1, 2, 4, 5, 6, 7, 8, 9, 10), (3, 11))
        assert list(found.far) == [7]
        assert found.far[7] == pytest.approx(0.3 / 0.02 / 2**0.5, rel=0.1)
    told = found.verdict()
    assert told[0].startswith("run 3 and run 11 come from another start than the other 10")
    assert told[1].startswith("run 7 lies 10.")
    assert told[-1].startswith("run 0, run 1, run 2, run 4, run 5, run 6, run 8, run 9 and run 10 can be averaged")
    assert found.statistics.cosines is not None


def test_good_ones_alone():
    start = network(0)
    found = inspect_weights([tuned(start, i) for i in range(1, 6)], labels=list("abcde"))
    assert found.hopeless == ()
    assert found.verdict() == ["All can be averaged, as far as weights can tell."]


def test_incompatible_and_broken_ones():
    start = network(0)
    rows = [tuned(start, i) for i in range(1, 5)]
    rows[1] = {**rows[1], "b.weight": torch.zeros(21, 40), "b.bias": torch.zeros(21)}
    rows[2]["a.weight"][0, 0] = math.nan
    found = inspect_weights(rows, labels=list("abcd"))
    assert set(found.incompatible) == {1}
    assert set(found.broken) == {2}
    assert found.groups == ((0, 3),)
    told = " ".join(found.verdict())
    assert "b cannot be averaged with the others: another" in told
    assert "c is broken: a.weight holds NaN or an infinity" in told
    assert "a and d can be averaged" in told


def test_nothing_is_left():
    a, b = network(0), {"x": torch.ones(2)}
    found = inspect_weights([a, b], labels=["a", "b"])
    assert found.verdict()[-1] == "There are not two that could be averaged."
    apart = inspect_weights([network(0), network(1)], labels=["a", "b"])
    assert apart.verdict()[-1] == "No two of them should be averaged." or len(apart.groups) == 2
    with pytest.raises(UnsupportedSetup, match="got 1"):
        inspect_weights([a])


def test_duplicates():
    start = network(0)
    row = tuned(start, 1)
    found = inspect_weights([row, tuned(start, 2), dict(row)], labels=list("abc"))
    assert found.duplicates == ((0, 2),)
    assert "c and a hold the same weights: one is enough." in found.verdict()


def test_labels_that_are_alike(tmp_path):
    from lightning_soup.weights import save_weights

    start = network(0)
    files = [save_weights(tuned(start, i), tmp_path / f"{i}" / "last.safetensors") for i in (1, 2)]
    found = inspect_weights(files)
    assert len(set(found.labels)) == 2


def test_components():
    links = {(0, 2), (2, 5), (1, 4)}
    linked = lambda i, j: (min(i, j), max(i, j)) in links  # noqa: E731
    assert components([0, 1, 2, 3, 4, 5], linked) == [[0, 2, 5], [1, 4], [3]]


def test_few_have_no_usual_distance():
    assert outliers(torch.tensor([[0.0, 1, 9], [1, 0, 9], [9, 9, 0]]), [0, 1, 2]) == {}
    assert outliers(torch.zeros(5, 5), range(5)) == {}
