"""soft_labels: one distribution over the classes for each item, from one method or from several.

p_i^m(c) is the soft label of method m, M methods, N items, C classes. "Methods" are the seven that the paper averages;
what is made of several of their labels is an *aggregate*: the mean (the paper's result), or one of the older ones of
its first versions.

Source: Wright and Augenstein, Aggregating Soft Labels from Crowd Annotations Improves Uncertainty Estimation Under
Distribution Shift, PLOS ONE 20(6), 2025 (arXiv 2212.09409v3: mean; versions 1 and 2: centroid and temperature).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_soup.data.annotator_models import dawid_skene, glad, mace
from lightning_soup.data.vote_counts import majority, normalised, softmax, standard, wawa, zero_based_skill
from lightning_soup.data.votes import Votes, read_votes
from lightning_soup.errors import UnsupportedSetup

__all__ = ["AGGREGATES", "METHODS", "Aggregate", "Method", "aggregated", "method_labels", "soft_labels"]

Method = Literal["standard", "softmax", "wawa", "zero_based_skill", "dawid_skene", "glad", "mace"]
Aggregate = Literal["mean", "centroid", "temperature", "hybrid", "conflation"]

METHODS: dict[str, Callable[[Votes], np.ndarray]] = {
    "standard": standard,
    "softmax": softmax,
    "wawa": wawa,
    "zero_based_skill": zero_based_skill,
    "dawid_skene": dawid_skene,
    "glad": glad,
    "mace": mace,
}
"""The seven methods, in the order in which they are averaged."""

Source = Votes | str | Path | Mapping[str, Sequence[Any]]


def soft_labels(
    votes: Source,
    method: Method | Aggregate | Literal["majority"] = "mean",
    methods: Sequence[Method] | None = None,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Soft labels of the items that have votes.

    Args:
        votes: Votes, or what :func:`.read_votes` makes them of: a file, or a table in memory.
        method: A key of :data:`METHODS`, ``majority`` (one-hot), or a key of :data:`AGGREGATES`, which is made of the
            labels of several methods.
        methods: Which ones an aggregate is made of; by default all seven.
        weights: w_m, how much each of them counts, in the order of ``methods``; by default all alike. From labels that
            experts gave, :func:`.nll_weights` finds some: the values of what it returns.

    Returns:
        Rows that sum to 1, float64 [N, C], in the order of ``votes.items`` and ``votes.classes``.

    Raises:
        UnsupportedSetup: An unknown method, ``methods`` or ``weights`` that do not fit, or votes that cannot be read.
    """
    check_method(method, methods, weights)
    votes = votes if isinstance(votes, Votes) else read_votes(votes)
    if method == "majority":
        return majority(votes)
    if method in METHODS:
        return METHODS[method](votes)
    return aggregated(list(method_labels(votes, methods).values()), method, weights)


def method_labels(votes: Source, methods: Sequence[Method] | None = None) -> dict[str, np.ndarray]:
    """The soft labels of each method, by its name: [N, C] each.

    Args:
        votes: As for :func:`soft_labels`.
        methods: Which ones; by default all seven.

    Raises:
        UnsupportedSetup: An unknown method, or votes that cannot be read.
    """
    check_method("mean", methods, None)
    votes = votes if isinstance(votes, Votes) else read_votes(votes)
    return {name: METHODS[name](votes) for name in (METHODS if methods is None else methods)}


def aggregated(
    labels: Sequence[np.ndarray], how: Aggregate = "mean", weights: Sequence[float] | None = None
) -> np.ndarray:
    """One label of several for each item.

    Args:
        labels: p^m, [N, C] each.
        how: A key of :data:`AGGREGATES`.
        weights: w_m, 0 or more, whose sum is brought to 1; by default all alike.

    Raises:
        UnsupportedSetup: No labels, unequal shapes, rows that are no distributions, or weights that do not fit.
    """
    if not labels or len({np.shape(p) for p in labels}) > 1 or np.ndim(labels[0]) != 2:
        raise UnsupportedSetup(
            f"Labels of the shapes {[np.shape(p) for p in labels]} cannot be aggregated: expected one or more of the "
            "same shape [items, classes], on the full list of classes."
        )
    p_MNC = np.stack([np.asarray(p, float) for p in labels])
    if not (np.isfinite(p_MNC).all() and (p_MNC >= 0).all() and np.allclose(p_MNC.sum(2), 1, atol=1e-6)):
        raise UnsupportedSetup("Labels to aggregate are not all distributions: expected rows of 0 or more with sum 1.")
    if how not in AGGREGATES:
        raise UnsupportedSetup(f"Aggregate {how!r}: expected one of {', '.join(AGGREGATES)}.")
    return AGGREGATES[how](p_MNC, _shares(weights, len(labels)))


def check_method(method: str, methods: Sequence[str] | None, weights: Sequence[float] | None) -> None:
    """Refuse a choice of methods that :func:`soft_labels` could not make labels with.

    Raises:
        UnsupportedSetup: It could not.
    """
    if not isinstance(method, str) or method not in {*METHODS, *AGGREGATES, "majority"}:
        known = ", ".join([*METHODS, "majority", *AGGREGATES])
        raise UnsupportedSetup(f"method={method!r}: expected one of {known}.")
    if method not in AGGREGATES and (methods is not None or weights is not None):
        raise UnsupportedSetup(
            f"methods and weights are for aggregates ({', '.join(AGGREGATES)}), not for method={method!r}: leave them "
            "out."
        )
    if methods is not None and (not methods or set(methods) - set(METHODS) or len(set(methods)) < len(methods)):
        raise UnsupportedSetup(f"methods={list(methods)}: expected some of {', '.join(METHODS)}, each once.")
    _shares(weights, len(METHODS if methods is None else methods))


def _shares(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """w_m, with sum 1, [M]."""
    try:
        shares = np.ones(count) if weights is None else np.asarray(weights, float)
    except (TypeError, ValueError):
        shares = np.empty(0)
    if shares.shape != (count,) or not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum() > 0:
        raise UnsupportedSetup(f"weights={weights}: expected {count} numbers of 0 or more, one per method, not all 0.")
    return shares / shares.sum()


# ------------------------------------------------------------------------------------------------------- aggregates


def mean(p_MNC: np.ndarray, w_M: np.ndarray) -> np.ndarray:
    """Σ_m w_m p^m."""
    return normalised(np.tensordot(w_M, p_MNC, 1))


def centroid(p_MNC: np.ndarray, w_M: np.ndarray, steps: int = 1000, tolerance: float = 1e-12) -> np.ndarray:
    """The distribution with the least Σ_m w_m JS(p, p^m), where JS is the Jensen-Shannon divergence.

    A fixed point of p ∝ exp(Σ_m w_m log((p + p^m)/2)), started at the mean: where the gradient of the sum over the
    simplex is zero. It needs no clipping; a class that all methods give no weight keeps none.
    """
    p, p_MNC, w_M = mean(p_MNC, w_M), p_MNC[w_M > 0], w_M[w_M > 0]
    rows = np.arange(len(p))  # those that still move
    for _ in range(steps):
        with np.errstate(divide="ignore"):
            logs = np.log((p[rows] + p_MNC[:, rows]) / 2)
        moved = normalised(np.exp(np.tensordot(w_M, logs, 1)))
        far = np.abs(moved - p[rows]).max(1) >= tolerance
        p[rows] = moved
        if not len(rows := rows[far]):
            break
    return p


def temperature(p_MNC: np.ndarray, w_M: np.ndarray) -> np.ndarray:
    """The mean of the labels at temperatures that bring them close to each other: see :func:`agreed_temperatures`."""
    return mean(tempered(p_MNC, agreed_temperatures(p_MNC)), w_M)


def hybrid(p_MNC: np.ndarray, w_M: np.ndarray) -> np.ndarray:
    """The centroid of the labels at temperatures that bring them close to each other."""
    return centroid(tempered(p_MNC, agreed_temperatures(p_MNC)), w_M)


def conflation(p_MNC: np.ndarray, w_M: np.ndarray) -> np.ndarray:
    """The product Π_m (p^m)^{M w_m}, normalised: a class that one method rules out is ruled out.

    An item for which that rules out every class gets the mean.
    """
    with np.errstate(divide="ignore"):
        logs = np.tensordot(w_M[w_M > 0] * len(w_M), np.log(p_MNC[w_M > 0]), 1)
    top = logs.max(1, keepdims=True)
    possible = np.isfinite(top)
    product = np.exp(logs - np.where(possible, top, 0))
    return normalised(np.where(possible, product, mean(p_MNC, w_M)))


AGGREGATES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": mean,
    "centroid": centroid,
    "temperature": temperature,
    "hybrid": hybrid,
    "conflation": conflation,
}
"""What can be made of the labels of several methods: functions of p [M, N, C] and w [M]."""


def tempered(p_MNC: np.ndarray, T_M: np.ndarray) -> np.ndarray:
    """(p^m)^{1/T_m}, normalised: flatter above T = 1, sharper below; what is zero stays zero."""
    return _powers(torch.from_numpy(p_MNC), torch.from_numpy(T_M)).numpy()


def agreed_temperatures(p_MNC: np.ndarray, penalty: float = 1e-3, start: float = 1.5) -> np.ndarray:
    """One temperature per method, [M], that minimise mean_i mean_{m<n} JS(p_i^m, p_i^n) + penalty · Σ_m T_m².

    The penalty keeps all labels from becoming uniform, which would agree best. There are other minima where all become
    one-hot, so what is found depends on the start. By L-BFGS over log T_m, so that no temperature crosses zero; of many
    items every k-th is looked at, at most 5,000.
    """
    p = torch.from_numpy(p_MNC[:, :: -(-p_MNC.shape[1] // 5000)])
    log_T = torch.full((len(p),), start, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([log_T], max_iter=50, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = disagreement(_powers(p, T := log_T.exp())) + penalty * T.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return log_T.detach().exp().numpy()


def disagreement(q_MNC: Tensor) -> Tensor:
    """Mean over items and pairs of methods of their Jensen-Shannon divergence, in nats."""
    pairs = list(combinations(range(len(q_MNC)), 2))
    if not pairs:
        return q_MNC.new_zeros(())
    # JS(q, r) = H((q + r)/2) − (H(q) + H(r))/2
    middles = [_entropy((q_MNC[m] + q_MNC[n]) / 2) for m, n in pairs]
    return torch.stack(middles).mean() - _entropy(q_MNC)


def _entropy(q: Tensor) -> Tensor:
    return -torch.xlogy(q, q.clamp_min(1e-300)).sum(-1).mean()  # the gradient of 0·log 0 would be NaN


def _powers(p_MNC: Tensor, T_M: Tensor) -> Tensor:
    zero = p_MNC == 0
    logs = p_MNC.masked_fill(zero, 1).log().masked_fill(zero, -torch.inf)
    logs = (logs - logs.amax(2, keepdim=True)).masked_fill(zero, 0) / T_M[:, None, None]
    powers = logs.exp().masked_fill(zero, 0)
    return powers / powers.sum(2, keepdim=True)
