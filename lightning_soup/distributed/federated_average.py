"""What a server makes of the updates of a round: the interface of federated averages.

Every one of them is x_{t+1} = x_t + Σ_n a_n·Δ_n + Σ_m b_m·Y_m over the participants n and, where a method remembers the
last update Y_m of each client, over all clients m. A method is its choice of a and b.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightning_soup.distributed.federated_sum import Weights, checked_reply, federated_sum, update
from lightning_soup.distributed.participation_clients import Client, client_name
from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Coefficients", "FederatedAverage", "FederatedStep"]


@dataclass(frozen=True)
class Coefficients:
    """What a server adds to x.

    Attributes:
        updates: a_n of the updates of this round.
        remembered: b_m of what is remembered of clients, before this round's updates are.
    """

    updates: dict[Client, float]
    remembered: dict[Client, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FederatedStep:
    """What a round did.

    Attributes:
        weights: x_{t+1}.
        participants: Whose valid reply arrived.
        refused: Why a reply was refused, by client; they count as absent.
        total: Σ a_n of the participants' updates: how many times a whole update the server's step is.
    """

    weights: dict[str, Tensor]
    participants: tuple[Client, ...]
    refused: dict[Client, str]
    total: float


class FederatedAverage(ABC):
    """A server's rule. Subclasses choose coefficients.

    Args:
        lr: η, the server's learning rate.

    Raises:
        UnsupportedSetup: η is not a positive number.
    """

    def __init__(self, lr: float = 1.0) -> None:
        if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
            raise UnsupportedSetup(f"lr={lr!r}: expected a positive number, the server's learning rate η.")
        self.lr = float(lr)

    @property
    @abstractmethod
    def population(self) -> int:
        """N, the number of clients."""

    @abstractmethod
    def coefficients(self, participants: Sequence[Client]) -> Coefficients:
        """What to add in a round with these participants; changes nothing.

        Raises:
            UnsupportedSetup: A client does not belong to the population.
        """

    def observe(self, participants: Sequence[Client]) -> None:  # noqa: B027 (most rules learn nothing)
        """Learn who took part, after the coefficients of the round were used."""

    def remember(self, updates: Mapping[Client, Weights]) -> None:  # noqa: B027
        """Keep updates of the round, where the rule does."""

    def step(
        self,
        weights: Source | WeightsFile,
        replies: Mapping[Client, Source | WeightsFile],
        buffers: Collection[str] | None = None,
    ) -> FederatedStep:
        """One round: check the replies, add them up, then learn who took part.

        A reply with NaN, missing or unknown tensors or other shapes is left out, with a warning that names client and
        tensor, and its client counts as absent. With no valid reply, the round still counts. The order in which replies
        come makes no difference, to the last bit.

        Args:
            weights: x_t.
            replies: y_n, the weights after a client's local steps, by client.
            buffers: Floating buffers, as in :func:`.federated_sum`.

        Raises:
            NonFiniteWeights: x_t holds NaN, or the sum overflows. Nothing is learned of the round then.
            UnsupportedSetup: A client does not belong to the population, or a buffer to the weights.
        """
        x = open_checkpoint(weights)
        valid: dict[Client, WeightsFile] = {}
        refused: dict[Client, str] = {}
        named = {client_name(client): reply for client, reply in replies.items()}
        # In an order of their own: sums round by their order, and replies arrive in any.
        for name in sorted(named, key=lambda name: (isinstance(name, str), name)):
            try:
                valid[name] = checked_reply(name, named[name], x)
            except (IncompatibleIngredients, NonFiniteWeights, UnreadableCheckpoint) as error:
                refused[name] = str(error)
                warnings.warn(f"{error} It counts as absent in this round.", stacklevel=2)
        names = tuple(valid)
        chosen = self.coefficients(names)
        memory = [(b, self.memory[client]) for client, b in chosen.remembered.items() if client in self.memory]
        new = federated_sum(x, valid, chosen.updates, remembered=memory, buffers=buffers)
        if self.remembers:
            self.remember({client: update(x, reply, buffers) for client, reply in valid.items()})
        self.observe(names)
        return FederatedStep(new, names, refused, math.fsum(chosen.updates.values()))

    remembers: ClassVar[bool] = False

    @property
    def memory(self) -> Mapping[Client, Weights]:
        """The updates that are remembered, by client: as large as the model, each."""
        return {}

    def load_memory(self, memory: Mapping[Client, Weights]) -> None:
        """Take up remembered updates.

        Raises:
            UnsupportedSetup: This rule remembers none.
        """
        if memory:
            raise UnsupportedSetup(f"{type(self).__name__} remembers no updates, but {len(memory)} were given.")

    def metrics(self) -> dict[str, float]:
        """Numbers to be logged each round."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result must know."""
        return ()

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share, in plain values."""
        return {"rule": type(self).__name__, "lr": self.lr}

    def state_dict(self) -> dict[str, Any]:
        """What was learned, in plain values; updates are in :attr:`memory`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what was learned."""
