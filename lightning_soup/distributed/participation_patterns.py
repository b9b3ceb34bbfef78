"""Who is available in a round of a simulation: three processes of known long-run rates, and rates that follow the data.

Symbols: client n is available with long-run rate p_n; q_n is its mix of labels, C the number of classes, κ a preference
of the environment for classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_soup.distributed.participation_clients import whole_number
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup

__all__ = ["Bernoulli", "Cyclic", "DirichletParticipation", "Markov", "ParticipationPattern", "dirichlet_participation"]


class ParticipationPattern(ABC):
    """Draws who is available, round after round: the same for the same seed, whatever else draws random numbers.

    Args:
        rates: p_n of each client, from 0 to 1.
        seed: Of the draws.

    Attributes:
        rates: p, ``[N]``.
        round: How many rounds were drawn.

    Raises:
        UnsupportedSetup: No clients, a rate out of range, or a negative seed.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0) -> None:
        self.rates = np.array(rates, dtype=np.float64)
        if self.rates.ndim != 1 or not self.rates.size or not ((self.rates >= 0) & (self.rates <= 1)).all():
            raise UnsupportedSetup(
                f"rates={self.rates.tolist()}: expected a rate from 0 to 1 for each client. Clip what was computed."
            )
        self.seed = whole_number(seed, "seed", 0)
        self.round = 0

    def draw(self) -> np.ndarray:
        """Who is available in the next round: bools, ``[N]``."""
        available = self._available(np.random.default_rng([self.seed, 1 + self.round]))
        self.round += 1
        return available

    @abstractmethod
    def _available(self, draw: np.random.Generator) -> np.ndarray:
        """Of one round, whose own random numbers are given."""

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share, in plain values."""
        rates = self.rates.tolist()
        return {"pattern": type(self).__name__, "pattern_rates": rates, "pattern_seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in plain values."""
        return {"round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another object of the same settings was.

        Raises:
            UnreadableCheckpoint: It is no such state.
        """
        try:
            self.round = whole_number(state["round"], "round", 0)
        except (KeyError, TypeError, UnsupportedSetup) as error:
            raise _unreadable(self, error) from error


class Bernoulli(ParticipationPattern):
    """Each client is available with probability p_n in each round, whatever was before."""

    def _available(self, draw: np.random.Generator) -> np.ndarray:
        return draw.random(self.rates.size) < self.rates


class Markov(ParticipationPattern):
    """Clients come and go: on with probability a where they were off, off with b = a·(1/p − 1) where they were on.

    Where b would be above 1, b is 1 and a is p/(1 − p), so that the long-run rate a/(a + b) is p in any case. The first
    round is drawn from the long-run rate.

    Args:
        rates: p_n.
        seed: Of the draws.
        arrival: a. The smaller, the longer clients stay on and off.

    Raises:
        UnsupportedSetup: Also where ``arrival`` is not above 0 and at most 1.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0, arrival: float = 0.05) -> None:
        super().__init__(rates, seed)
        if not 0 < arrival <= 1:
            raise UnsupportedSetup(f"arrival={arrival}: expected a probability above 0, of an absent client to come.")
        self.arrival = float(arrival)
        p = self.rates.clip(1e-300, 1)
        b = self.arrival * (1 / p - 1)
        self._come = np.where(self.rates == 0, 0.0, np.where(b > 1, self.arrival / b.clip(1), self.arrival))
        self._go = b.clip(max=1.0)
        self._on = np.random.default_rng([self.seed, 0]).random(self.rates.size) < self.rates

    def _available(self, draw: np.random.Generator) -> np.ndarray:
        chance = draw.random(self.rates.size)
        self._on = np.where(self._on, chance >= self._go, chance < self._come)
        return self._on.copy()

    def settings(self) -> dict[str, Any]:
        """Also a."""
        return {**super().settings(), "arrival": self.arrival}

    def state_dict(self) -> dict[str, Any]:
        """Also who is on."""
        return {**super().state_dict(), "on": self._on.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            UnreadableCheckpoint: It is no such state.
        """
        on = state.get("on") if isinstance(state, Mapping) else None
        if not isinstance(on, list) or len(on) != self.rates.size or not all(isinstance(one, bool) for one in on):
            raise _unreadable(self, ValueError(f"{self.rates.size} clients, and not as many that are on or off"))
        super().load_state_dict(state)
        self._on = np.array(on, dtype=bool)


class Cyclic(ParticipationPattern):
    """Each client is on for A = max(1, round(period·p)) rounds of every period, from a phase of its own.

    The phase is drawn over the whole period, so that clients are on and off at the start as later. A client with p = 1
    is always on; the rate is a multiple of 1/period, and at least that where p is above 0.

    Args:
        rates: p_n.
        seed: Of the phases.
        period: Rounds.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0, period: int = 100) -> None:
        super().__init__(rates, seed)
        self.period = whole_number(period, "period", 1)
        on = np.floor(self.period * self.rates + 0.5).clip(1)
        self._on = np.where(self.rates == 0, 0, on)
        self._phase = np.random.default_rng([self.seed, 0]).integers(self.period, size=self.rates.size)

    def _available(self, draw: np.random.Generator) -> np.ndarray:
        return (self.round + self._phase) % self.period < self._on

    def settings(self) -> dict[str, Any]:
        """Also the period."""
        return {**super().settings(), "period": self.period}


def _unreadable(pattern: ParticipationPattern, error: Exception) -> UnreadableCheckpoint:
    name = type(pattern).__name__
    return UnreadableCheckpoint(f"this is no state of {name} ({error}). Give what state_dict() of one returned.")


@dataclass(frozen=True)
class DirichletParticipation:
    """Label mixes of clients, and rates that depend on them.

    Attributes:
        mixes: q, ``[N, C]``; rows add up to 1.
        preference: κ, ``[C]``; adds up to 1.
        rates: p, ``[N]``.
    """

    mixes: np.ndarray
    preference: np.ndarray
    rates: np.ndarray


def dirichlet_participation(
    clients: int,
    classes: int,
    *,
    concentration: float = 0.1,
    preference: float = 0.1,
    mean_rate: float = 0.1,
    least: float = 0.02,
    seed: int = 0,
) -> DirichletParticipation:
    """Draw label mixes and the availability that goes with them, p_n = mean_rate·C·Σ_c q_nc·κ_c from ``least`` to 1.

    Args:
        clients: N.
        classes: C.
        concentration: Of q_n ~ Dir: the smaller, the fewer labels a client has.
        preference: Concentration of κ ~ Dir: the smaller, the more some labels are over-represented.
        mean_rate: The mean of p before it is clipped, for uniform κ.
        least: The least p.
        seed: Of the draws.

    Raises:
        UnsupportedSetup: An option is out of range.

    Source: Wang, Ji, ICLR 2024 (arXiv 2306.03401), their experiments; clipped at 1 as well, which many
    classes exceed.
    """
    N, C = whole_number(clients, "clients", 1), whole_number(classes, "classes", 2)
    for name, value, most in (
        ("concentration", concentration, 1e100),  # the sums of larger ones overflow
        ("preference", preference, 1e100),
        ("mean_rate", mean_rate, 1),
        ("least", least, 1),
    ):
        if not 0 < value <= most:
            raise UnsupportedSetup(f"{name}={value!r}: expected a number above 0 and at most {most}.")
    draw = np.random.default_rng(whole_number(seed, "seed", 0))
    q, kappa = draw.dirichlet([concentration] * C, size=N), draw.dirichlet([preference] * C)
    return DirichletParticipation(q, kappa, (mean_rate * C * q @ kappa).clip(least, 1.0))
