"""Soft labels from counts of votes: standard, softmax, Wawa and zero-based skill.

n_ic votes of item i for class c; y_iw is the label that worker w gave item i, a_w the skill of w. Each function gives
p_i(c), float64 [N, C], rows that sum to 1 and are the same for every order of the rows of the table.

Source: the methods that are averaged in Wright and Augenstein, Aggregating Soft Labels from Crowd Annotations Improves
Uncertainty Estimation Under Distribution Shift, PLOS ONE 20(6), 2025 (arXiv 2212.09409); Wawa and zero-based skill as
crowd-kit has them (Ustalov et al. 2024).
"""

import numpy as np

from lightning_soup.data.votes import Votes

__all__ = ["agreement", "majority", "normalised", "softmax", "standard", "wawa", "weighted_votes", "zero_based_skill"]


def standard(votes: Votes) -> np.ndarray:
    """p_i(c) = n_ic / n_i: the share of the votes, zero for what nobody chose."""
    return normalised(votes.counts)


def softmax(votes: Votes) -> np.ndarray:
    """p_i(c) ∝ exp(n_ic), of raw counts: no class is zero, and the more votes an item has, the sharper its label."""
    return normalised(np.exp(votes.counts - votes.counts.max(1, keepdims=True)))


def wawa(votes: Votes) -> np.ndarray:
    """Worker agreement with aggregate: votes weighed by the share of a worker's votes that are the majority's."""
    return weighted_votes(votes, agreement(votes, standard(votes)))


def zero_based_skill(votes: Votes, steps: int = 100, lr: float = 1.0, halved_every: int = 20) -> np.ndarray:
    """Votes weighed by skills that follow the weighted majority: a_w += η·(agreement_w − a_w).

    Args:
        votes: The votes.
        steps: How often the skills are updated, from 1/C + 1e-5 for all.
        lr: η, halved at every step whose number ``halved_every`` divides.
        halved_every: See there.
    """
    skills = np.full(len(votes.workers), 1 / len(votes.classes) + 1e-5)
    for step in range(1, steps + 1):
        lr = lr / 2 if step % halved_every == 0 else lr
        skills = skills + lr * (agreement(votes, weighted_votes(votes, skills)) - skills)
    return weighted_votes(votes, skills)


def majority(votes: Votes) -> np.ndarray:
    """One-hot rows of the class with the most votes, of equal ones the first of the list: the paper's baseline."""
    return np.eye(len(votes.classes))[winners(votes.counts)]


def weighted_votes(votes: Votes, skills: np.ndarray) -> np.ndarray:
    """p_i(c) = Σ_{w: y_iw = c} a_w / Σ_w a_w over the workers of an item.

    Where all of an item's workers have no skill at all the formula is 0/0, and their votes count alike.

    Args:
        votes: The votes.
        skills: a_w, 0 or more, [W].
    """
    weights = votes.sum_by_choice(skills[votes.worker])
    weights = np.where(weights.sum(1, keepdims=True) > 0, weights, votes.counts)
    return normalised(weights)


def agreement(votes: Votes, labels: np.ndarray) -> np.ndarray:
    """The share of each worker's votes that are for the likeliest class of ``labels`` [N, C]: [W]."""
    agrees = winners(labels)[votes.item] == votes.label
    return votes.sum_by_worker(agrees) / votes.sum_by_worker(np.ones(len(votes)))


def winners(labels: np.ndarray) -> np.ndarray:
    """The likeliest class of each row, of equal ones the first, [N].

    Sums of skills that are equal in exact arithmetic differ in their last bits: a difference that small is none, so
    that the order of workers decides nothing.
    """
    return (labels >= labels.max(1, keepdims=True) * (1 - 1e-12)).argmax(1)


def normalised(weights: np.ndarray) -> np.ndarray:
    """Rows divided by their sums."""
    return weights / weights.sum(1, keepdims=True)
