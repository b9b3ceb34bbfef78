"""Products of thin matrices: B·A of LoRA, added, cut to a rank, and read a run of elements at a time.

Shapes: left L [out, R] and right R [R, in], R far smaller than both; the dense [out, in] matrix is never formed.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.stored_tensor import Scratch, StoredTensor, TensorSpec


class Truncated(NamedTuple):
    """The best approximation of a product by one of lower rank.

    Attributes:
        left: ``[out, rank]``, U·√S.
        right: ``[rank, in]``, √S·Vᵀ.
        lost: Squared Frobenius norm of what was left out.
        total: Squared Frobenius norm of the product.
    """

    left: Tensor
    right: Tensor
    lost: float
    total: float


def stack(factors: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Write Σᵢ cᵢ·Bᵢ·Aᵢ as one product: the rows cᵢ·Aᵢ under, the columns Bᵢ beside one another.

    Args:
        factors: cᵢ, Aᵢ ``[rᵢ, in]`` and Bᵢ ``[out, rᵢ]``, in any floating type.

    Returns:
        Left ``[out, Σ rᵢ]`` and right ``[Σ rᵢ, in]``, in float32 (float64 where a factor is).
    """
    wide = any(torch.float64 in (a.dtype, b.dtype) for _, a, b in factors)
    dtype = torch.float64 if wide else torch.float32
    left = torch.cat([b.to("cpu", dtype) for _, _, b in factors], 1)
    return left, torch.cat([a.to("cpu", dtype) * c for c, a, _ in factors])


def truncate(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """Cut a product to a rank: the best approximation of it in the Frobenius norm (Eckart, Young 1936).

    With L = Q₁·R₁ and rightᵀ = Q₂·R₂ the product is Q₁·(R₁·R₂ᵀ)·Q₂ᵀ, so the singular values are those of the small
    core, ``[R, R]`` at most.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.
        rank: The rank; a product of less is filled up with zeros.
    """
    with single_threaded_torch():
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        kept = s[:rank].sqrt()
        found = left.new_zeros(len(left), rank), left.new_zeros(rank, right.shape[1])
        found[0][:, : len(kept)] = q_left @ (u[:, :rank] * kept)
        found[1][: len(kept)] = (kept[:, None] * vt[:rank]) @ q_right.T
        energy = s.double().square()
    return Truncated(*found, float(energy[rank:].sum()), float(energy.sum()))


class ProductTensor:
    """L·R as a tensor for the kernel, which reads a chunk of it at a time; a few rows are all that is ever formed.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.
        shape: The shape of the tensor, whose elements are those of the product in row-major order.
        rows: With DoRA, ``(W, d)``: the stored base weight and what each of its rows is multiplied by, less 1; the
            tensor is then L·R + d·W.
    """

    __slots__ = ("left", "right", "rows", "spec")

    def __init__(
        self, left: Tensor, right: Tensor, shape: tuple[int, ...], rows: tuple[StoredTensor, Tensor] | None = None
    ) -> None:
        self.left, self.right, self.rows = left, right, rows
        self.spec = TensorSpec(left.dtype, shape)

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files that are open while it is read."""
        return self.rows[0].files if self.rows else ()

    @property
    def identity(self) -> Hashable:
        """As in :class:`.FileTensor`: it shares nothing with any other."""
        return id(self)

    def tensor(self) -> Tensor:
        """The whole, dense."""
        return self._rows(0, len(self.left)).view(self.spec.shape)

    def read(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, memoryview]:
        """Elements ``start`` to ``stop`` in row-major order, as in :class:`.FileTensor`."""
        width = self.right.shape[1]
        first, last = start // width, -(-stop // width)
        values, data = scratch.view(self.spec.dtype, stop - start)
        values.copy_(self._rows(first, last).view(-1)[start - first * width : stop - first * width])
        return values, data

    def _rows(self, first: int, last: int) -> Tensor:
        found = self.left[first:last] @ self.right
        if self.rows is not None:
            weight, factors = self.rows
            found += factors[first:last, None] * read_rows(weight, first, last).to(found.dtype)
        return found


def read_rows(weight: StoredTensor, first: int, last: int) -> Tensor:
    """Some rows of a stored tensor, what is behind the first dimension taken as one: ``[last − first, in]``."""
    width = weight.spec.numel // weight.spec.shape[0]
    scratch = Scratch((last - first) * width * weight.spec.dtype.itemsize)
    return weight.read(first * width, last * width, scratch)[0].view(last - first, width)


def row_norms(weight: StoredTensor, left: Tensor, right: Tensor, rows: int = 64) -> Tensor:
    """Euclidean norms of the rows of W + L·R, ``[out]``, some rows at a time.

    Args:
        weight: W, as it is stored.
        left: ``[out, R]``.
        right: ``[R, in]``.
        rows: How many at a time.
    """
    with single_threaded_torch():
        parts = [
            (left[i : i + rows] @ right + read_rows(weight, i, min(i + rows, len(left))).to(left.dtype)).norm(dim=1)
            for i in range(0, len(left), rows)
        ]
    return torch.cat(parts)
