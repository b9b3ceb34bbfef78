"""The k-th smallest score, against sorting."""

from itertools import combinations_with_replacement

import pytest
import torch

from lightning_soup.layers import thresholds
from lightning_soup.layers.thresholds import above, kth_smallest

DATA = {
    "normal": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
    "ties": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).mul(3).round(),
    "sorted": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).sort().values,
    "equal": lambda n, g: torch.full((n,), -0.25, dtype=torch.float64),
    "zeros": lambda n, g: torch.zeros(n, dtype=torch.float64),
    "tiny and huge": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).mul(20).exp(),
    # what a sample of every 257th element sees is not what the others are
    "misleading": lambda n, g: torch.where(torch.arange(n) % 257 == 0, 100.0, torch.rand(n, generator=g)).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("sizes", [(1,), (1000,), (0, 3, 5000, 41)], ids=str)
def test_it_is_what_sorting_gives(data: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(len(data))
    scores = [DATA[data](n, draw).clamp(-6e4, 6e4).to(dtype) for n in sizes]
    ordered = torch.cat(scores).abs().double().sort().values
    for k in sorted({1, 2, len(ordered) // 2, len(ordered) * 9 // 10, len(ordered)} - {0}):
        if k <= len(ordered):
            value, below, equal = kth_smallest(scores, k, absolute=True)
            assert float(value) == float(ordered[k - 1])
            assert below == int((ordered < ordered[k - 1]).sum()) < k
            assert equal == int((ordered == ordered[k - 1]).sum())


@pytest.mark.parametrize("data", ["normal", "ties", "misleading", "equal"])
def test_too_many_candidates_are_halved(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(thresholds, "_FEW", 3)
    scores = [DATA[data](3000, torch.Generator().manual_seed(0))]
    ordered = scores[0].abs().sort().values
    for k in (1, 7, 1500, 2999, 3000):
        value, below, equal = kth_smallest(scores, k, absolute=True)
        assert float(value) == float(ordered[k - 1])
        assert below == int((ordered < value).sum())
        assert equal == int((ordered == value).sum())


@pytest.mark.parametrize("few", [1, 100])
def test_any_guess_leads_to_the_value(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(thresholds, "_FEW", few)
    scores = torch.tensor([3.0, 0, 1, 8, 1, 0, 1, 2])
    ordered = scores.sort().values
    for low, high in combinations_with_replacement([0.0, 0.5, 1, 2, 9, torch.finfo(torch.float32).max], 2):
        for k in range(1, len(scores) + 1):
            value, below, equal = thresholds._search(lambda: iter(scores.clone().split(3)), k, low, high)
            assert value == ordered[k - 1]
            assert (below, equal) == (int((scores < value).sum()), int((scores == value).sum()))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.float64, 1e300), (torch.bfloat16, 1.0)], ids=str
)
def test_one_pass_is_enough_where_the_sample_is_fair(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float
) -> None:
    scores = [
        (torch.randn(100_000, generator=torch.Generator().manual_seed(n)).double() * scale).to(dtype) for n in (0, 1)
    ]
    collect, found = thresholds._collect, []

    def counting(*arguments: object) -> tuple[int, int, torch.Tensor | None]:
        result = collect(*arguments)
        found.append(result[1])
        return result

    monkeypatch.setattr(thresholds, "_collect", counting)
    for k in (1, 5, 1000, 100_000, 180_000, 199_999, 200_000):
        found.clear()
        kth_smallest(scores, k, absolute=True)
        assert len(found) == 1
        assert found[0] < 50_000  # a fourth, of a sample of 780


def test_many_candidates_are_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_FEW", 3)
    chunks = torch.tensor([0.0, 1, 1, 2, 2, 9]).split(4)
    assert thresholds._collect(iter(chunks), 1.0, 2.0) == (1, 4, None)
    below, inside, found = thresholds._collect(iter(chunks), 2.0, 9.0)
    assert (below, inside, found.tolist()) == (3, 3, [2, 2, 9])


def test_chunks_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_CHUNK", 16)
    scores = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (100, 16, 33)]
    for k in range(1, 150, 7):
        assert kth_smallest(scores, k)[0] == torch.cat(scores).sort().values[k - 1]


@pytest.mark.parametrize("absolute", [False, True])
def test_the_first_equals_are_left_out(monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    monkeypatch.setattr(thresholds, "_CHUNK", 16)
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randint(-2 if absolute else 0, 3, (n,), generator=draw).float() for n in (100, 0, 16, 33)]
    whole = torch.cat(scores).abs()
    equals = (whole == 1).nonzero().squeeze(1)
    for skipped in (0, 1, 7, 30, len(equals)):
        expected = whole >= 1
        expected[equals[:skipped]] = False
        assert torch.equal(torch.cat(above(scores, torch.tensor(1.0), skipped, absolute)), expected)


def test_mixed_types_are_compared_in_the_widest() -> None:
    value, below, equal = kth_smallest(
        [torch.tensor([0.1]), torch.tensor([0.1], dtype=torch.float64)], 2, absolute=True
    )
    assert value.dtype == torch.float64
    assert float(value) == float(torch.tensor(0.1))  # float32's 0.1 is the larger one
    assert (below, equal) == (1, 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 … 3"):
        kth_smallest([torch.rand(3)], k)
