"""What waiting for each other costs: a model of message times, without a network."""

import math
from dataclasses import dataclass

import numpy as np

from lightning_soup.distributed.noloco import random_groups

__all__ = ["Blocking", "expected_maximum", "ring_bytes", "simulate_blocking", "tree_to_pair"]


def expected_maximum(mu: float, sigma: float) -> float:
    """E[max(t₁, t₂)] = (1 + erf(σ/2))·exp(μ + σ²/2) of two log-normal times: how long a pair takes."""
    return (1 + math.erf(sigma / 2)) * math.exp(mu + sigma**2 / 2)


def tree_to_pair(world_size: int) -> float:
    """How many times as long a tree all-reduce (2·t·log₂ W) takes as an exchange in a pair (2·t)."""
    return math.log2(world_size)


def ring_bytes(parameters: int, world_size: int, itemsize: int = 4) -> float:
    """What each rank sends in a ring all-reduce: 2·(W − 1)/W of the tensor."""
    return 2 * (world_size - 1) / world_size * parameters * itemsize


@dataclass(frozen=True)
class Blocking:
    """How long a training takes, in units of what a replica's own steps take on average.

    Attributes:
        alone: Without any exchange: the mean of the replicas' own times is 1.
        everyone: With all waiting for the slowest at each outer step.
        pairs: With each waiting for its random peer alone.
    """

    alone: float
    everyone: float
    pairs: float


def simulate_blocking(
    world_size: int, every: int, outer_steps: int, sigma: float, transfer: float = 0.0, seed: int = 0
) -> Blocking:
    """Run the clocks of replicas whose inner steps take log-normal times with mean 1.

    Args:
        world_size: How many replicas.
        every: Inner steps between outer steps.
        outer_steps: How many of these.
        sigma: σ of the logarithm of an inner step's time.
        transfer: Time of a message, in inner steps; an all-reduce takes 2·log₂ W of them, a pair 2.
        seed: Of the times.

    Source: after Kolehmainen et al., NoLoCo, 2025 (arXiv 2506.10911), who simulate that blocking alone costs DiLoCo
    about 20 % at W = 1024, m = 100; that is σ = 0.5 here.
    """
    generator = np.random.default_rng(seed)
    own, everyone, pairs = np.zeros(world_size), 0.0, np.zeros(world_size)
    for round_ in range(outer_steps):
        times = generator.lognormal(-(sigma**2) / 2, sigma, (world_size, every)).sum(1)
        own += times
        everyone += times.max() + 2 * tree_to_pair(world_size) * transfer
        pairs += times
        for group in random_groups(round_, world_size, 2):
            members = list(group)
            pairs[members] = pairs[members].max() + 2 * transfer
    whole = own.mean()
    return Blocking(1.0, float(everyone / whole), float(pairs.max() / whole))
