"""FedAU: federated averaging whose clients come at rates that nobody knows.

Symbols: N clients; K the cutoff; t the round; η the server's learning rate; of client n: S_n rounds since its last gap
was closed, M_n closed gaps, w_n the mean length of those, Δ_n = y_n − x_t what its local steps changed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_soup.distributed.federated_average import Coefficients, FederatedAverage
from lightning_soup.distributed.participation_clients import Client, client_name, client_names, whole_number
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup

__all__ = ["FedAU", "ParticipationSummary", "ParticipationWeights"]

FEW_GAPS = 10  # the mean of fewer gaps than this is off by a third or more: the deviation of a gap is about its mean


@dataclass(slots=True)
class _Gaps:
    """What is known of one client: two integers and a number."""

    S: int = 0
    M: int = 0
    w: float = 1.0

    def pass_round(self, came: bool, cutoff: int | None) -> None:
        self.S += 1
        if came or cutoff == self.S:
            self.w = (self.M * self.w + self.S) / (self.M + 1)
            self.M, self.S = self.M + 1, 0


@dataclass(frozen=True)
class ParticipationSummary:
    """How the weights of all N clients lie.

    Attributes:
        mean: Their mean.
        min: The smallest.
        max: The largest: one client's update may be multiplied by so much.
        few_gaps: Clients with fewer than 10 closed gaps, whose weights are rough estimates.
        population: N.
        rounds: Rounds observed.
    """

    mean: float
    min: float
    max: float
    few_gaps: int
    population: int
    rounds: int


class ParticipationWeights:
    """w_n, an estimate of 1/p_n from the gaps between a client's participations, where its rate p_n is unknown.

    After each round t, for every client, absent ones too: S ← S + 1; if it took part, or S = K, the gap is closed:
    w ← (M·w + S)/(M + 1), M ← M + 1, S ← 0. Before the first closed gap w is 1. So w(t) knows the rounds before t only.

    With a Bernoulli rate p the mean gap is (1 − (1 − p)^K)/p: a cutoff K bounds the weights by K, and underestimates
    those of clients that are rarer than about 1/K. K = 1 gives w = 1, no weighting at all.

    Knows nothing of tensors, Lightning or Flower. The mean never forgets, so rates that change are not followed.

    Args:
        population: N, where names are learned as clients come (one that never came counts as absent from the first
            round); or the names of all clients, which may be none yet where they :meth:`join`.
        cutoff: K, a gap is closed after so many rounds at the latest; ``None``: never (∞).

    Raises:
        UnsupportedSetup: N is no positive integer, a client is there twice, or the cutoff is below 1.

    Source: Wang, Ji, A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging, ICLR
    2024 (arXiv 2306.03401), the estimate of aggregation weights.

    Example:
        >>> estimate = ParticipationWeights(["a", "b"])
        >>> for came in (["a"], ["a", "b"], ["a"]):
        ...     estimate.observe(came)
        >>> estimate.weights()
        {'a': 1.0, 'b': 2.0}
    """

    def __init__(self, population: int | Iterable[Client], cutoff: int | None = None) -> None:
        named = isinstance(population, Iterable)
        self._clients = {name: _Gaps() for name in client_names(population, "population")} if named else {}
        self._unnamed = 0 if named else whole_number(population, "population", 1)
        self._unseen = _Gaps()  # what is true of every client that has not come yet, whatever its name
        self.cutoff = None if cutoff is None else whole_number(cutoff, "cutoff", 1)
        self.rounds = 0

    @property
    def population(self) -> int:
        """N."""
        return len(self._clients) + self._unnamed

    @property
    def clients(self) -> tuple[Client, ...]:
        """The clients whose names are known."""
        return tuple(self._clients)

    def weight(self, client: Client) -> float:
        """The weight w of one client, in the round that comes.

        Raises:
            UnsupportedSetup: It does not belong to the population.
        """
        return self._of(client_name(client)).w

    def weights(self) -> dict[Client, float]:
        """The weight w of every client whose name is known, in the round that comes."""
        return {name: gaps.w for name, gaps in self._clients.items()}

    def closed_gaps(self) -> dict[Client, int]:
        """The number M for every client whose name is known: of how many gaps its weight is the mean."""
        return {name: gaps.M for name, gaps in self._clients.items()}

    def observe(self, participants: Iterable[Client]) -> None:
        """Note who took part in a round; call it once a round, after the weights of that round were used.

        Args:
            participants: Who took part: whose valid reply arrived, not who was asked. May be empty.

        Raises:
            UnsupportedSetup: One of them does not belong to the population, or is there twice; nothing is noted then.
        """
        names = client_names(participants, "participants")
        new = [name for name in names if name not in self._clients]
        if len(new) > self._unnamed:
            raise self._stranger(new[self._unnamed])
        for name in new:
            self._clients[name] = _Gaps(self._unseen.S, self._unseen.M, self._unseen.w)
        self._unnamed -= len(new)
        came = set(names)
        for name, gaps in self._clients.items():
            gaps.pass_round(name in came, self.cutoff)
        self._unseen.pass_round(False, self.cutoff)
        self.rounds += 1

    def join(self, client: Client) -> None:
        """Let a client join now: N grows by one, and the rounds before are no absence of this one.

        Raises:
            UnsupportedSetup: It is there already.
        """
        name = client_name(client)
        if name in self._clients:
            raise UnsupportedSetup(f"client {name!r} belongs to the population already; it cannot join again.")
        self._clients[name] = _Gaps()

    def leave(self, client: Client) -> None:
        """Let a client leave for good: N shrinks by one, as what never comes again would shrink every update.

        Raises:
            UnsupportedSetup: It does not belong to the population.
        """
        name = client_name(client)
        self._of(name)
        if self._clients.pop(name, None) is None:
            self._unnamed -= 1

    def summary(self) -> ParticipationSummary:
        """Mean, least and largest weight of all N clients, and how many weights are of fewer than 10 gaps."""
        every = [*self._clients.values(), *([self._unseen] * self._unnamed)]
        values = [gaps.w for gaps in every] or [1.0]
        few = sum(gaps.M < FEW_GAPS for gaps in every)
        return ParticipationSummary(
            math.fsum(values) / len(values), min(values), max(values), few, len(every), self.rounds
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is known, in plain values that JSON takes."""
        return {
            "cutoff": self.cutoff,
            "rounds": self.rounds,
            "unnamed": self._unnamed,
            "unseen": [self._unseen.S, self._unseen.M, self._unseen.w],
            "clients": [[name, gaps.S, gaps.M, gaps.w] for name, gaps in self._clients.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, clients that joined and left included.

        Raises:
            UnreadableCheckpoint: It is no such state.
            UnsupportedSetup: It was made with another cutoff.
        """
        try:
            rounds, unnamed = (whole_number(state[key], key, 0) for key in ("rounds", "unnamed"))
            unseen = _read_gaps(state["unseen"])
            names = client_names([row[0] for row in state["clients"]], "clients")
            clients = {name: _read_gaps(row[1:]) for name, row in zip(names, state["clients"], strict=True)}
            cutoff = state["cutoff"]
        except (KeyError, TypeError, ValueError, IndexError, UnsupportedSetup) as error:
            raise UnreadableCheckpoint(
                f"this is no state of ParticipationWeights ({type(error).__name__}: {error}). "
                "Give what state_dict() returned."
            ) from error
        if cutoff != self.cutoff:
            raise UnsupportedSetup(
                f"cutoff={self.cutoff}, but the state was made with cutoff={cutoff}: its gaps were closed otherwise. "
                f"Go on with cutoff={cutoff}, or start anew."
            )
        self.rounds, self._unnamed, self._unseen, self._clients = rounds, unnamed, unseen, clients

    def _of(self, name: Client) -> _Gaps:
        found = self._clients.get(name)
        if found is None and not self._unnamed:
            raise self._stranger(name)
        return self._unseen if found is None else found

    def _stranger(self, name: Client) -> UnsupportedSetup:
        return UnsupportedSetup(
            f"client {name!r} does not belong to the population of {self.population}. Let it join() first, or count it "
            "in when the population is given."
        )


def _read_gaps(row: Sequence[Any]) -> _Gaps:
    S, M, w = row
    if not isinstance(w, (int, float)) or not 1 <= w < math.inf:
        raise ValueError(f"a weight of {w!r}")
    return _Gaps(whole_number(S, "S", 0), whole_number(M, "M", 0), float(w))


class FedAU(FederatedAverage):
    """x_{t+1} = x_t + (η/N)·Σ_n w_n·Δ_n: an update weighs as much as its client is rare.

    The aim is the plain mean of all clients' losses, whoever comes how often; the weights are those of
    :class:`ParticipationWeights`. The sum is divided by N, never by the number that came nor by Σ w, and numbers of
    examples play no part. Σ w/N may be far above 1 in a round with rare clients, and the server's step is as large: a
    cutoff bounds it, a smaller η damps it, and ``total`` of each step tells.

    Args:
        population: N, or the names of all clients; see :class:`ParticipationWeights`.
        cutoff: K; ``None``: ∞. The authors also take 50, which trades some bias for less variance.
        lr: η.

    Attributes:
        participation: The estimator; clients join and leave there.

    Raises:
        UnsupportedSetup: An option is out of range.

    Source: Wang, Ji, ICLR 2024 (arXiv 2306.03401), the server's loop.
    """

    def __init__(self, population: int | Iterable[Client], cutoff: int | None = None, lr: float = 1.0) -> None:
        self.participation = ParticipationWeights(population, cutoff)
        self._given = self.population
        super().__init__(lr)

    @property
    def population(self) -> int:
        """N, as it is now."""
        return self.participation.population

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """(η/N)·w_n for each; nothing is remembered."""
        return Coefficients({n: self.lr * self.participation.weight(n) / self.population for n in participants})

    def observe(self, participants: Sequence[Client]) -> None:
        """Feed the round to the estimator."""
        self.participation.observe(participants)

    def metrics(self) -> dict[str, float]:
        """The weights' mean, least and largest, and how many are of fewer than 10 gaps: to be logged."""
        found = self.participation.summary()
        weights = {f"weight_{name}": getattr(found, name) for name in ("mean", "min", "max")}
        return {**weights, "few_gaps": float(found.few_gaps)}

    def notes(self) -> tuple[str, ...]:
        """Says so while weights are rough."""
        found = self.participation.summary()
        if not found.few_gaps:
            return ()
        return (
            f"FedAU: {found.few_gaps} of {found.population} clients have fewer than {FEW_GAPS} closed gaps after "
            f"{found.rounds} rounds: their weights (the largest of all is {found.max:.3g}) are rough estimates of 1/p. "
            "More rounds help.",
        )

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share."""
        # N as it was given: how it changed since is part of the state.
        return {**super().settings(), "cutoff": self.participation.cutoff, "population": self._given}

    def state_dict(self) -> dict[str, Any]:
        """The estimator's."""
        return self.participation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the estimator's."""
        self.participation.load_state_dict(state)
