"""The federated averages that FedAU is measured against."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_soup.distributed.federated_average import Coefficients, FederatedAverage
from lightning_soup.distributed.federated_sum import Weights
from lightning_soup.distributed.participation_clients import Client, client_name, client_names, whole_number
from lightning_soup.errors import UnsupportedSetup

__all__ = ["MIFA", "AverageAll", "AverageParticipating", "FedVARP", "KnownParticipation"]


class _OfNumber(FederatedAverage):
    """A rule that knows N and nothing else of its clients."""

    def __init__(self, population: int, lr: float = 1.0) -> None:
        super().__init__(lr)
        self._population = whole_number(population, "population", 1)

    @property
    def population(self) -> int:
        """N."""
        return self._population

    def settings(self) -> dict[str, Any]:
        """Also N."""
        return {**super().settings(), "population": self._population}


class AverageParticipating(_OfNumber):
    """x + η·mean of the participants' Δ: FedAvg as it is commonly run, whose aim Σ p_n·F_n favours frequent clients.

    Args:
        population: N; unused but for messages.
        lr: η.
    """

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """η/|P| for each; no move where nobody came."""
        return Coefficients({n: self.lr / len(participants) for n in participants})


class AverageAll(_OfNumber):
    """x + (η/N)·Σ Δ, absent clients counted as Δ = 0: as biased as the mean of participants, and slower.

    Args:
        population: N.
        lr: η; FedAU's authors take 10.
    """

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """η/N for each."""
        return Coefficients(dict.fromkeys(participants, self.lr / self.population))


class KnownParticipation(FederatedAverage):
    """x + (η/N)·Σ Δ_n/p_n, what FedAU estimates, for rates that are known.

    Args:
        rates: p_n of every client, above 0 and at most 1.
        lr: η.

    Raises:
        UnsupportedSetup: No clients, or a rate out of range.
    """

    def __init__(self, rates: Mapping[Client, float], lr: float = 1.0) -> None:
        super().__init__(lr)
        self.rates = {client_name(client): float(rate) for client, rate in rates.items()}
        wrong = {client: rate for client, rate in self.rates.items() if not 0 < rate <= 1}
        if wrong or not self.rates:
            given = next((f"{rate} for client {client!r}" for client, rate in wrong.items()), "no clients")
            raise UnsupportedSetup(f"rates: got {given}; expected a rate above 0 and at most 1 for every client.")

    @property
    def population(self) -> int:
        """N."""
        return len(self.rates)

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """η/(N·p_n) for each."""
        for client in participants:
            if client not in self.rates:
                raise UnsupportedSetup(f"client {client!r} has no rate. Give the rates of all clients.")
        return Coefficients({n: self.lr / (self.population * self.rates[n]) for n in participants})

    def settings(self) -> dict[str, Any]:
        """Also the rates."""
        return {**super().settings(), "rates": [[client, rate] for client, rate in self.rates.items()]}


class _Remembering(_OfNumber):
    """A rule that keeps the last update of each client: N times the memory of the model, on the server.

    Nothing is remembered at first, which counts as Y = 0.
    """

    remembers = True

    def __init__(self, population: int, lr: float = 1.0) -> None:
        super().__init__(population, lr)
        self._memory: dict[Client, Weights] = {}

    @property
    def memory(self) -> Mapping[Client, Weights]:
        """Y by client."""
        return self._memory

    def remember(self, updates: Mapping[Client, Weights]) -> None:
        """Y_n ← Δ_n."""
        self._memory.update(updates)

    def load_memory(self, memory: Mapping[Client, Weights]) -> None:
        """Take up Y."""
        self._memory = dict(memory)

    def observe(self, participants: Sequence[Client]) -> None:
        """Check names only."""
        client_names(participants, "participants")

    def _check(self, participants: Sequence[Client]) -> None:
        known = {*self._memory, *participants}
        if len(known) > self.population:
            raise UnsupportedSetup(
                f"{len(known)} clients have come, more than the population of {self.population}. Give their number."
            )


class MIFA(_Remembering):
    """x + η·mean of the last Δ of all clients, this round's included.

    Args:
        population: N.
        lr: η.

    Source: Gu, Huang, Zhang, Huang, Fast Federated Learning in the Presence of Arbitrary Device Unavailability, 2021
    (arXiv 2106.04159), where every client answers once at first; here the memory starts at zero.
    """

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """η/N for each update, and for what is remembered of those who did not come."""
        self._check(participants)
        share, came = self.lr / self.population, set(participants)
        return Coefficients(dict.fromkeys(participants, share), {m: share for m in self._memory if m not in came})


class FedVARP(_Remembering):
    """x + η·(mean of Δ_n − Y_n over participants + mean of Y over all), with Y as it was before the round.

    Args:
        population: N.
        lr: η.
        move_without_replies: Whether a round in which nobody came still moves by the mean of Y, as published; the code
            that FedAU was measured with stays.

    Source: Jhunjhunwala, Sharma, Nagarkatti, Joshi, FedVARP: Tackling the Variance Due to Partial Client Participation
    in Federated Learning, 2022 (arXiv 2207.14130).
    """

    def __init__(self, population: int, lr: float = 1.0, move_without_replies: bool = True) -> None:
        super().__init__(population, lr)
        self.move_without_replies = move_without_replies

    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """η/|P| for each update; η/N for what is remembered, less η/|P| of participants'."""
        self._check(participants)
        if not participants and not self.move_without_replies:
            return Coefficients({})
        share, came = self.lr / self.population, set(participants)
        each = self.lr / len(participants) if participants else 0.0
        remembered = {m: share - each if m in came else share for m in self._memory}
        return Coefficients(dict.fromkeys(participants, each), remembered)

    def settings(self) -> dict[str, Any]:
        """Also what an empty round does."""
        return {**super().settings(), "move_without_replies": self.move_without_replies}
