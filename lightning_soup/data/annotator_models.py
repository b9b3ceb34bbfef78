"""Soft labels from models of the workers, each fitted by expectation maximisation: Dawid-Skene, GLAD and MACE.

N items, W workers, C classes, V votes; y_iw is the label that worker w gave item i. Each function gives the posterior
p_i(c) of the true class, float64 [N, C], the same for every order of the rows of the table.

In GLAD and MACE all wrong answers are alike, so a vote speaks for its own class alone: what it adds there to the
log-likelihood, against every other class, is one number per vote. That makes an E-step one sum over the votes, whatever
the number of classes.

Ours in numpy, GLAD too, although crowd-kit has it: the mean of all methods is the default, and it must not need an
extra that brings pandas and transformers. crowd-kit is what the tests compare with.
"""

from collections.abc import Callable

import numpy as np
import torch

from lightning_soup.data.vote_counts import normalised, standard
from lightning_soup.data.votes import Votes

__all__ = ["dawid_skene", "glad", "mace"]

FLOOR = 1e-10  # of expected counts of a worker's labels: zero would forbid a class for ever


def dawid_skene(votes: Votes, steps: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """Each worker has a confusion matrix E_w(k given c), and classes have prior probabilities π_c.

    E-step: p_i(c) ∝ π_c Π_w E_w(y_iw given c). M-step: π_c = mean_i p_i(c), and E_w(k given c) is the expected share of
    k among the votes of w on items of class c, over the labels that w has used. Starts at the shares of votes.

    Source: Dawid and Skene, Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm, JRSS C 28(1),
    1979; clipping and end as in crowd-kit.

    Args:
        votes: The votes.
        steps: Most E-steps.
        tolerance: Ends when the evidence lower bound rises by less than this per vote.
    """
    count = len(votes.classes)
    used, choice = np.unique(votes.worker * count + votes.label, return_inverse=True)  # pairs of worker and label
    worker_of = used // count
    starts = np.flatnonzero(np.diff(votes.item, prepend=-1))
    rows = np.flatnonzero(np.diff(worker_of, prepend=-1))

    def log_joint(p: np.ndarray) -> np.ndarray:
        """M-step, and log π_c + Σ_w log E_w(y_iw given c) of what it gives."""
        prior = _log(p.mean(0))  # −∞ where a class has died out
        expected = np.stack([np.bincount(choice, of_class[votes.item], len(used)) for of_class in p.T], axis=1)
        expected = np.maximum(expected, FLOOR)
        log_confusion = np.log(expected / np.add.reduceat(expected, rows)[worker_of])
        return prior + np.add.reduceat(log_confusion[choice], starts)

    p, bound = standard(votes), -np.inf
    joint = log_joint(p)
    for _ in range(steps):
        p = _posterior(joint)
        joint = log_joint(p)
        before, bound = bound, (_expected(p, joint) - _expected(p, _log(p))) / len(votes)
        if bound - before < tolerance:
            break
    return p


def glad(votes: Votes, steps: int = 200, tolerance: float = 1e-6) -> np.ndarray:
    """Workers have an ability a_w, items an ease e^{b_i}: P(y_iw = z_i) = σ(a_w e^{b_i}), errors uniform over C − 1.

    a_w and b_i have normal priors with mean and variance 1, the classes a uniform one. Instead of the paper's conjugate
    gradients, an M-step is one Newton step of all a_w with the b_i held, which are then problems in one variable apart
    from each other, and one of all b_i; a step that would lower the expected log-likelihood is halved. That is a
    generalised EM, whose likelihood rises with every step.

    Source: Whitehill et al., Whose Vote Should Count More: Optimal Integration of Labels from Labelers of Unknown
    Expertise, NeurIPS 2009.

    Args:
        votes: The votes.
        steps: Most EM steps, from a_w = b_i = 1.
        tolerance: Ends when the expected log-likelihood of an M-step is within this of the last one's, per vote.
    """
    ability, log_ease = np.ones(len(votes.workers)), np.ones(len(votes.items))
    wrong = np.log(len(votes.classes) - 1)
    before = -np.inf
    for _ in range(steps):
        s = ability[votes.worker] * np.exp(log_ease)[votes.item]
        p = _posterior(votes.sum_by_choice(s + wrong))  # log σ(s) − log((1 − σ(s))/(C − 1)) for what was voted
        right = p[votes.item, votes.label]
        ability, log_ease = _glad_m_step(votes, right, ability, log_ease)
        s = ability[votes.worker] * np.exp(log_ease)[votes.item]
        prior = -(((ability - 1) ** 2).sum() + ((log_ease - 1) ** 2).sum()) / 2
        now = ((right * s - _softplus(s)).sum() + prior) / len(votes)
        if abs(now - before) < tolerance:
            break
        before = now
    return p


def _glad_m_step(
    votes: Votes, right: np.ndarray, ability: np.ndarray, log_ease: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Better a_w and b_i for the probabilities that votes are right, [V]."""
    ease = np.exp(log_ease)[votes.item]
    ability = _uphill(ability, lambda a: (a[votes.worker] * ease, ease, 0), right, votes.sum_by_worker)
    of_worker = ability[votes.worker]

    def score(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = of_worker * np.exp(b)[votes.item]
        return s, s, s

    return ability, _uphill(log_ease, score, right, votes.sum_by_item)


def _uphill(x: np.ndarray, score: Callable, right: np.ndarray, gather: Callable) -> np.ndarray:
    """One Newton step, never down, of E[log P] = Σ_v right_v·s_v − log(1 + e^{s_v}) − (x − 1)²/2, for each x by itself.

    Args:
        x: Where they stand, [G].
        score: s and its first and second derivative by x, at an x [G]: [V] each.
        right: The probabilities that votes are right, [V].
        gather: Sums a number per vote over the votes that depend on one x: [V] -> [G].
    """

    def value(x: np.ndarray) -> np.ndarray:
        s, _, _ = score(x)
        return gather(right * s - _softplus(s)) - (x - 1) ** 2 / 2

    s, slope, bend = score(x)
    gradient = gather((right - _sigmoid(s)) * slope) - (x - 1)
    # Where the bend of s makes the problem convex, it is left out of the curvature.
    curvature = gather(_sigmoid(s) * _sigmoid(-s) * slope**2) + np.maximum(-gather((right - _sigmoid(s)) * bend), 0) + 1
    step = np.clip(gradient / curvature, -1, 1)
    start = value(x)
    for _ in range(5):
        worse = value(x + step) < start
        if not worse.any():
            return x + step
        step = np.where(worse, step / 2, step)
    return np.where(value(x + step) < start, x, x + step)


def mace(votes: Votes, steps: int = 50) -> np.ndarray:
    """Worker w knows the answer with probability θ_w, else spams: answers from ξ_w whatever the item.

    Variational EM with the priors Beta(½, ½) on θ_w and Dirichlet(10) on ξ_w: weights in the M-step are
    exp ψ(count + prior) / exp ψ(sum of these). It starts from θ_w = ½ and uniform ξ_w, without the random noise of the
    paper's restarts: the votes break the symmetry, and no result depends on the order of the workers.

    Source: Hovy et al., Learning Whom to Trust with MACE, NAACL 2013.

    Args:
        votes: The votes.
        steps: M-steps.
    """
    workers, count = len(votes.workers), len(votes.classes)
    choice = votes.worker * count + votes.label
    knows, spams, strategy = np.full(workers, 0.5), np.full(workers, 0.5), np.full((workers, count), 1 / count)
    for step in range(steps + 1):
        # A vote for y: spams·ξ(y) if the true class is another one, and that plus knows if it is y.
        known, spam = knows[votes.worker], spams[votes.worker] * strategy.ravel()[choice]
        p = _posterior(votes.sum_by_choice(np.log1p(known / spam)))
        if step == steps:
            break
        knew = p[votes.item, votes.label] * known / (known + spam)
        spammed = np.bincount(choice, 1 - knew, workers * count).reshape(workers, count)
        told = np.stack([spammed.sum(1), votes.sum_by_worker(knew)], axis=1)
        spams, knows = _variational(told, 0.5).T
        strategy = _variational(spammed, 10.0)
    return p


def _variational(counts: np.ndarray, prior: float) -> np.ndarray:
    """Exp ψ(n + prior) / exp ψ(Σ n + prior) by row: the expected logarithm of a Dirichlet's weights, exponentiated."""
    counts = torch.from_numpy(counts + prior)
    return (counts.digamma() - counts.sum(1, keepdim=True).digamma()).exp().numpy()


def _posterior(joint: np.ndarray) -> np.ndarray:
    """p_i(c) ∝ exp(joint_ic), without overflow, [N, C]."""
    return normalised(np.exp(joint - joint.max(1, keepdims=True)))


def _expected(p: np.ndarray, values: np.ndarray) -> float:
    """Σ p·values, where p = 0 counts as 0 even of an infinite value."""
    return float(np.where(p > 0, p * np.where(p > 0, values, 0), 0).sum())


def _log(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(p)


def _sigmoid(s: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(s / 2)) / 2


def _softplus(s: np.ndarray) -> np.ndarray:
    return np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s)))
