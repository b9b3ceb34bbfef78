import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_soup.weights.low_rank import ProductTensor, row_norms, stack, truncate
from lightning_soup.weights.stored_tensor import MemoryTensor, Scratch


def factors(count=3, rank=2, out=7, width=9, dtype=torch.float64):
    torch.manual_seed(0)
    return [(0.5 - i, torch.randn(rank, width).to(dtype), torch.randn(out, rank).to(dtype)) for i in range(count)]


def dense(parts):
    return sum(c * b.double() @ a.double() for c, a, b in parts)


def test_stacking_is_adding():
    left, right = stack(factors())
    assert (left.shape, right.shape) == ((7, 6), (6, 9))
    torch.testing.assert_close(left @ right, dense(factors()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 9])
def test_truncation_is_the_best_of_its_rank(rank):
    whole = dense(factors())
    u, s, vt = torch.linalg.svd(whole)
    found = truncate(*stack(factors()), rank)
    assert (found.left.shape, found.right.shape) == ((7, rank), (rank, 9))
    kept = min(rank, len(s))
    torch.testing.assert_close(found.left @ found.right, (u[:, :kept] * s[:kept]) @ vt[:kept], rtol=0, atol=1e-12)
    assert found.lost == pytest.approx(float(s[rank:].square().sum()), abs=1e-12)
    assert found.total == pytest.approx(float(whole.square().sum()))
    gram = found.left.T @ found.left, found.right @ found.right.T
    torch.testing.assert_close(*gram, rtol=0, atol=1e-12)  # both factors carry √S


def test_half_precision_is_multiplied_in_float32():
    parts = factors(dtype=torch.bfloat16)
    left, right = stack(parts)
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close((left @ right).double(), dense(parts), rtol=1e-5, atol=1e-5)


def test_no_matrix_of_full_size_is_formed():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for one in found if isinstance(found, (tuple, list)) else (found,):
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return found

    left, right = torch.randn(3000, 20), torch.randn(20, 3000)
    with Watch():
        truncate(left, right, 8)
    assert 0 < largest <= 3000 * 20


@pytest.mark.parametrize("shape", [(7, 9), (7, 3, 3)])
def test_a_product_is_read_in_any_runs(shape):
    left, right = stack(factors())
    tensor = ProductTensor(left, right, shape)
    whole = dense(factors()).view(shape)
    torch.testing.assert_close(tensor.tensor(), whole, rtol=0, atol=1e-12)
    for start, stop in ((0, 63), (0, 1), (8, 10), (5, 40), (62, 63)):
        values, data = tensor.read(start, stop, Scratch(1 << 12))
        torch.testing.assert_close(values, whole.flatten()[start:stop], rtol=0, atol=1e-12)
        assert len(data) == 8 * (stop - start)


def test_rows_of_the_base_are_scaled_and_measured():
    left, right = stack(factors())
    weight, scale = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    stored = MemoryTensor(weight)
    expected = dense(factors()) + scale[:, None] * weight
    found = ProductTensor(left, right, (7, 9), (stored, scale))
    torch.testing.assert_close(found.tensor(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.read(11, 31, Scratch(4096))[0], expected.flatten()[11:31], rtol=0, atol=1e-12)
    norms = (weight + dense(factors())).norm(dim=1)
    for rows in (1, 2, 64):
        torch.testing.assert_close(row_norms(stored, left, right, rows), norms, rtol=0, atol=1e-12)
