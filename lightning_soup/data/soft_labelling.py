"""Soft labels: a distribution over classes for each item, from what annotators said of it, and means of such labels.

Source: Wright, Augenstein, Aggregating soft labels from crowd annotations improves uncertainty estimation under
distribution shift, PLOS ONE 2025 (arXiv 2212.09409): seven methods, and their plain mean. The other ways to join them
are those of its first version and of the authors' code.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from lightning_soup.data.annotator_models import dawid_skene, glad, mace
from lightning_soup.data.votes import Votes
from lightning_soup.errors import UnsupportedSetup

__all__ = ["AGGREGATES", "METHODS", "aggregate", "centroid", "jensen_shannon", "majority", "soft_labels", "tempered"]


def majority(votes: Votes) -> np.ndarray:
    """One-hot rows of the most frequent label, ``[I, C]``; of equals the first class."""
    counts = votes.counts
    return np.eye(counts.shape[1])[counts.argmax(1)]


def standard(votes: Votes) -> np.ndarray:
    """n_ic / n_i."""
    counts = votes.counts
    return counts / counts.sum(1, keepdims=True)


def softmax(votes: Votes) -> np.ndarray:
    """exp(n_ic) / Σ_c' exp(n_ic'), of the numbers of votes: the more annotators, the sharper."""
    counts = votes.counts
    p = np.exp(counts - counts.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def wawa(votes: Votes) -> np.ndarray:
    """Votes weighted by a_w, the share of a worker's labels that the majority gives too (Wawa)."""
    return _weighted(votes, _agreement(votes, votes.counts.argmax(1)))


def zero_based_skill(votes: Votes, steps: int = 100) -> np.ndarray:
    """Votes weighted by skills a_w that follow the agreement with the weighted vote (ZBS).

    a_w starts at 1/C + 1e-5; then a_w += η·(agreement_w − a_w), with η = 1, halved at every 20th step.
    """
    skill = np.full(len(votes.workers), 1 / len(votes.classes) + 1e-5)
    rate = 1.0
    for step in range(steps):
        if step and step % 20 == 0:
            rate /= 2
        weighted = np.zeros((len(votes.items), len(votes.classes)))
        np.add.at(weighted, (votes.item, votes.label), skill[votes.worker])
        skill = skill + rate * (_agreement(votes, weighted.argmax(1)) - skill)
    return _weighted(votes, skill)


def _agreement(votes: Votes, chosen: np.ndarray) -> np.ndarray:
    same, total = np.zeros(len(votes.workers)), np.zeros(len(votes.workers))
    np.add.at(same, votes.worker, (votes.label == chosen[votes.item]).astype(float))
    np.add.at(total, votes.worker, 1.0)
    return same / total


def _weighted(votes: Votes, skill: np.ndarray) -> np.ndarray:
    weighted = np.zeros((len(votes.items), len(votes.classes)))
    np.add.at(weighted, (votes.item, votes.label), skill[votes.worker])
    sums = weighted.sum(1, keepdims=True)
    # Where nobody has any skill, votes count alike.
    return np.where(sums > 0, weighted / np.where(sums > 0, sums, 1), standard(votes))


METHODS: dict[str, Callable[[Votes], np.ndarray]] = {
    "standard": standard,
    "softmax": softmax,
    "wawa": wawa,
    "zbs": zero_based_skill,
    "dawid_skene": dawid_skene,
    "glad": glad,
    "mace": mace,
}
"""The seven methods of the paper, by name."""

AGGREGATES = ("mean", "centroid", "temperature", "hybrid", "conflation")
"""Ways to join them; the paper's is the mean."""


def soft_labels(votes: Votes, method: str = "mean", weights: Mapping[str, float] | None = None) -> np.ndarray:
    """Soft labels of all items.

    Args:
        votes: The votes.
        method: One of :data:`METHODS`, ``majority``, or one of :data:`AGGREGATES`, over all seven methods.
        weights: Of the methods in the mean, by name; those that are not named have none. None: all alike.

    Returns:
        p_i(c), ``[I, C]``, in the order of ``votes.items`` and ``votes.classes``.

    Raises:
        UnsupportedSetup: No such method, or weights that are negative or all 0.
    """
    if method == "majority":
        return majority(votes)
    if method in METHODS:
        return METHODS[method](votes)
    if method not in AGGREGATES:
        raise UnsupportedSetup(
            f"method={method!r}: expected one of majority, {', '.join(METHODS)}, {', '.join(AGGREGATES)}."
        )
    names = list(METHODS)
    if weights is not None:
        unknown = sorted(set(weights) - set(names))
        if method != "mean" or unknown or min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
            raise UnsupportedSetup(
                f"weights={dict(weights)} with method={method!r}: expected, for the mean, numbers of 0 or more, not "
                f"all 0, for some of {', '.join(names)}."
            )
        names = [name for name in names if weights.get(name, 0) > 0]
    rows = [METHODS[name](votes) for name in names]
    return aggregate(rows, method, None if weights is None else [weights[name] for name in names])


def aggregate(rows: Sequence[np.ndarray], method: str = "mean", weights: Sequence[float] | None = None) -> np.ndarray:
    """Join M soft labels of the same items.

    - ``mean``: Σ_m w_m·p^m / Σ_m w_m.
    - ``centroid``: the p with the least Σ_m JS(p, p^m).
    - ``temperature``: the mean after one temperature for each of them has brought them as near as they get.
    - ``hybrid``: the centroid after the temperatures.
    - ``conflation``: the normalised product, in which one zero vetoes a class.

    Args:
        rows: M arrays ``[I, C]``.
        method: As above.
        weights: Of the mean, M numbers.

    Returns:
        ``[I, C]``.

    Raises:
        UnsupportedSetup: No such method, or arrays of different shapes.
    """
    if method not in AGGREGATES or not rows or len({row.shape for row in rows}) > 1:
        raise UnsupportedSetup(
            f"aggregate(method={method!r}) of shapes {[row.shape for row in rows]}: expected one of "
            f"{', '.join(AGGREGATES)}, and arrays of one shape."
        )
    stack = np.stack(rows).astype(np.float64)
    if method == "conflation":
        with np.errstate(divide="ignore"):
            logs = np.log(stack).sum(0)
        p = np.exp(logs - np.where(np.isfinite(logs.max(1)), logs.max(1), 0)[:, None])
        sums = p.sum(1, keepdims=True)
        return np.where(sums > 0, p / np.where(sums > 0, sums, 1), 1 / p.shape[1])
    if method in ("temperature", "hybrid"):
        stack = tempered(stack)
    if method in ("centroid", "hybrid"):
        return centroid(stack)
    return np.average(stack, axis=0, weights=weights)


def centroid(stack: np.ndarray, iterations: int = 1000, tolerance: float = 1e-12) -> np.ndarray:
    """Minimise Σ_m JS(p, p^m) by p ← normalise(exp(mean_m log((p + p^m)/2))), from the mean on.

    Args:
        stack: ``[M, I, C]``.
        iterations: At most.
        tolerance: Ends when no probability changes by more.
    """
    p = stack.mean(0)
    for _ in range(iterations):
        with np.errstate(divide="ignore"):
            after = np.exp(np.log((p + stack) / 2).mean(0))
        after /= after.sum(1, keepdims=True)
        before, p = p, after
        if np.abs(p - before).max() <= tolerance:
            break
    return p


def tempered(stack: np.ndarray, penalty: float = 1e-3) -> np.ndarray:
    """p^m to the power 1/T_m, with the temperatures that bring the mean Jensen–Shannon divergence of pairs lowest.

    Args:
        stack: ``[M, I, C]``.
        penalty: Of Σ_m T_m², without which all would become uniform.
    """
    logs = torch.from_numpy(np.log(np.maximum(stack, 1e-12)))
    pairs = [(a, b) for a in range(len(stack)) for b in range(a)]

    def cooled(log_t: torch.Tensor) -> torch.Tensor:  # T in logs: no search step makes it negative
        return (logs / log_t.exp()[:, None, None]).softmax(2)

    with torch.inference_mode(False), torch.enable_grad():
        log_t = torch.full((len(stack),), 1.5, dtype=torch.float64).log().requires_grad_()
        optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            p = cooled(log_t).clamp(min=1e-12)  # below which the logarithm has no gradient
            loss = torch.stack([_js(p[a], p[b]).mean() for a, b in pairs]).mean() if pairs else p.sum() * 0
            loss = loss + penalty * (2 * log_t).exp().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return cooled(log_t.detach()).numpy()


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """JS(p, q) of rows, in nats, ``[I]``."""
    return _js(torch.from_numpy(np.atleast_2d(p)), torch.from_numpy(np.atleast_2d(q))).numpy()


def _js(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    middle = (p + q) / 2
    parts = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(middle, middle)
    return parts.sum(1) / 2
