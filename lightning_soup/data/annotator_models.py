"""Models of annotators: Dawid and Skene's, GLAD and MACE. Each gives a distribution over classes for every item.

Symbols: y_iw the label of worker w for item i, z_i its true class, C classes.
"""

from collections.abc import Callable

import numpy as np
import torch

from lightning_soup.data.votes import Votes

__all__ = ["dawid_skene", "glad", "mace"]

_TINY = 1e-10  # below it probabilities are taken as this: one zero would forbid a class for ever


def dawid_skene(votes: Votes, iterations: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """EM over a prior π_c and a confusion matrix E_w(k given c) of each worker, from the shares of votes.

    p_i(c) ∝ π_c·Π_w E_w(y_iw given c).

    Args:
        votes: The votes.
        iterations: At most.
        tolerance: Ends when no probability changes by more.

    Returns:
        ``[I, C]``.

    Source: Dawid, Skene, Maximum likelihood estimation of observer error-rates (1979).
    """
    counts = votes.counts
    p = counts / counts.sum(1, keepdims=True)
    workers, classes = len(votes.workers), len(votes.classes)
    for _ in range(iterations):
        prior = p.mean(0)
        confusion = np.zeros((workers, classes, classes))  # of worker, true class, label
        np.add.at(confusion.transpose(0, 2, 1), (votes.worker, votes.label), p[votes.item])
        sums = confusion.sum(2, keepdims=True)
        confusion = np.divide(confusion, sums, out=np.zeros_like(confusion), where=sums > 0)
        logs = np.tile(np.log(np.maximum(prior, _TINY)), (len(p), 1))
        np.add.at(logs, votes.item, np.log(np.maximum(confusion[votes.worker, :, votes.label], _TINY)))
        before, p = p, _normalised(logs)
        if np.abs(p - before).max() <= tolerance:
            break
    return p


def glad(votes: Votes, iterations: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """EM over abilities a_w and difficulties b_i: P(y_iw = z_i) = σ(a_w·exp(b_i)), errors alike over other classes.

    Normal priors with mean 1 and variance 1 on a and b, classes alike beforehand; the M step is by L-BFGS.

    Args:
        votes: The votes.
        iterations: At most.
        tolerance: Ends when no probability changes by more.

    Returns:
        ``[I, C]``.

    Source: Whitehill et al., Whose Vote Should Count More, NeurIPS 2009.
    """
    classes = len(votes.classes)
    item, worker = torch.from_numpy(votes.item), torch.from_numpy(votes.worker)
    theta = torch.ones(len(votes.workers) + len(votes.items), dtype=torch.float64)

    def log_odds(parameters: torch.Tensor) -> torch.Tensor:
        a, b = parameters[: len(votes.workers)], parameters[len(votes.workers) :]
        return a[worker] * b[item].clamp(max=30).exp()

    def posterior() -> np.ndarray:
        s = log_odds(theta)
        right = torch.nn.functional.logsigmoid(s).numpy()
        wrong = torch.nn.functional.logsigmoid(-s).numpy() - np.log(classes - 1)
        logs = np.zeros((len(votes.items), classes))
        np.add.at(logs, votes.item, np.repeat(wrong[:, None], classes, 1))
        np.add.at(logs, (votes.item, votes.label), right - wrong)
        return _normalised(logs)

    p = posterior()
    for _ in range(iterations):
        correct = torch.from_numpy(p[votes.item, votes.label])
        theta = _minimised(lambda parameters, c=correct: _glad_loss(parameters, log_odds(parameters), c), theta)
        before, p = p, posterior()
        if np.abs(p - before).max() <= tolerance:
            break
    return p


def _glad_loss(parameters: torch.Tensor, s: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    likelihood = correct * torch.nn.functional.logsigmoid(s) + (1 - correct) * torch.nn.functional.logsigmoid(-s)
    return -likelihood.sum() + (parameters - 1).square().sum() / 2


def _minimised(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        parameters = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([parameters], max_iter=25, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(parameters)
            value.backward()
            return value

        optimizer.step(closure)
    return parameters.detach()


def mace(votes: Votes, iterations: int = 50) -> np.ndarray:
    """Variational EM: worker w knows the answer with probability θ_w, and else draws one from ξ_w.

    Priors Beta(½, ½) on θ and Dirichlet(10) on ξ. It starts where every worker knows half of the answers, instead of
    from random restarts, so it needs no seed and the order of the rows does not matter.

    Args:
        votes: The votes.
        iterations: So many.

    Returns:
        ``[I, C]``.

    Source: Hovy et al., Learning Whom to Trust with MACE, NAACL 2013.
    """
    workers, classes = len(votes.workers), len(votes.classes)
    knows, guesses = np.full(workers, 0.5), np.full((workers, classes), 0.5 / classes)  # θ, and (1 − θ)·ξ
    p = np.zeros((len(votes.items), classes))
    for step in range(iterations + 1):
        guess = guesses[votes.worker, votes.label]
        right = knows[votes.worker] + guess
        logs = np.zeros_like(p)
        wrong = np.log(np.maximum(guess, 1e-300))
        np.add.at(logs, votes.item, np.repeat(wrong[:, None], classes, 1))
        np.add.at(logs, (votes.item, votes.label), np.log(right) - wrong)
        p = _normalised(logs)
        if step == iterations:
            break
        known = p[votes.item, votes.label] * knows[votes.worker] / right
        count_known, count_guessed = np.zeros(workers), np.zeros((workers, classes))
        np.add.at(count_known, votes.worker, known)
        np.add.at(count_guessed, (votes.worker, votes.label), 1 - known)
        alone = count_guessed.sum(1)
        total = _digamma(count_known + alone + 1)
        knows = np.exp(_digamma(count_known + 0.5) - total)
        drawn = np.exp(_digamma(count_guessed + 10) - _digamma(alone + 10 * classes)[:, None])
        guesses = np.exp(_digamma(alone + 0.5) - total)[:, None] * drawn
    return p


def _digamma(values: np.ndarray) -> np.ndarray:
    return torch.digamma(torch.from_numpy(values)).numpy()


def _normalised(logs: np.ndarray) -> np.ndarray:
    p = np.exp(logs - logs.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)
