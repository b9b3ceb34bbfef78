"""CKA: how alike two networks' outputs for the same inputs are, up to rotation, scale and shift.

X ``[n, p]`` and Y ``[n, q]``, outputs for the same n inputs. Report which outputs were compared: values for logits and
for probabilities, clean and blended inputs, biased and debiased, are not comparable.

Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019 (arXiv 1905.00414); the
estimator without bias: Song et al., JMLR 2012, and Nguyen et al., ICLR 2021 (arXiv 2010.15327) for minibatches.
"""

import torch
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = ["MinibatchCKA", "cka"]


def cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear CKA, ‖XᵀY‖²/(‖XᵀX‖·‖YᵀY‖) of centred columns, in [0, 1].

    Args:
        x: X.
        y: Y.
        debiased: By HSIC₁, which has no bias for small n and may be below 0.

    Returns:
        The similarity; NaN where one of them is constant, which is like nothing.

    Raises:
        UnsupportedSetup: Not two matrices with as many rows, fewer than two rows (four, debiased), or a NaN.
    """
    x, y = _checked(x, y, 4 if debiased else 2)
    if debiased:
        return _ratio(_hsic_1(x, y), _hsic_1(x, x), _hsic_1(y, y))
    x, y = x - x.mean(0), y - y.mean(0)
    # In the space of features, or of samples, whichever is smaller.
    if max(x.shape[1], y.shape[1]) <= len(x):
        return _ratio(_square(x.T @ y), _square(x.T @ x), _square(y.T @ y))
    k, m = x @ x.T, y @ y.T
    return _ratio(float((k * m).sum()), _square(k), _square(m))


class MinibatchCKA:
    """Debiased CKA over minibatches: the terms HSIC₁ are averaged, not their ratios.

    Example:
        >>> similarity = MinibatchCKA()
        >>> x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        >>> similarity.update(x, 3 * x + 1)
        >>> round(similarity.compute(), 6)
        1.0
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._batches = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Raises:
            UnsupportedSetup: As :func:`cka` debiased.
        """
        x, y = _checked(x, y, 4)
        self._sums += torch.tensor([_hsic_1(x, y), _hsic_1(x, x), _hsic_1(y, y)], dtype=torch.float64)
        self._batches += 1

    def compute(self) -> float:
        """The similarity over all batches; NaN where one of the networks is constant.

        Raises:
            UnsupportedSetup: There were none.
        """
        if not self._batches:
            raise UnsupportedSetup("MinibatchCKA.compute: no batch was given; call update first.")
        return _ratio(*self._sums.tolist())


def _checked(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < least:
        raise UnsupportedSetup(
            f"cka: got {list(x.shape)} and {list(y.shape)}; expected two matrices [n, features] for the same n inputs, "
            f"n of {least} or more."
        )
    x, y = x.detach().double(), y.detach().double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UnsupportedSetup("cka: the outputs hold NaN or an infinity. Leave such networks out.")
    return x, y


def _hsic_1(x: Tensor, y: Tensor) -> float:
    """[tr K̃L̃ + (1ᵀK̃1)(1ᵀL̃1)/((n−1)(n−2)) − 2·1ᵀK̃L̃1/(n−2)] / (n(n−3)), K̃ = XXᵀ with zeros on its diagonal."""
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)  # changes nothing but the rounding
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    rows_k, rows_m = k.sum(1), m.sum(1)
    total = (k * m).sum() + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 * rows_k @ rows_m / (n - 2)
    return float(total) / (n * (n - 3))


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _ratio(both: float, one: float, other: float) -> float:
    scale = one * other
    return both / scale**0.5 if scale > 0 else float("nan")
