"""Federated averaging in one process: clients that come and go, each training by a Lightning Trainer of its own."""

import copy
import os
import statistics
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_soup.distributed.federated_average import FederatedAverage, FederatedStep
from lightning_soup.distributed.federated_client import LocalTraining, check_trainer_options, train_locally
from lightning_soup.distributed.federated_files import FILE_NAME, FederatedState, read_state, write_state
from lightning_soup.distributed.federated_sum import float_buffers
from lightning_soup.distributed.participation_clients import Client, client_name, client_names, whole_number
from lightning_soup.distributed.participation_patterns import ParticipationPattern
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.atomic import check_writable

__all__ = ["FederatedSimulation"]

Row = dict[str, float]


class FederatedSimulation:
    """Runs rounds: available clients take I local steps from x_t, the server's rule makes x_{t+1} of their replies.

    Each client trains a copy of the module with a Trainer and optimizers of its own, about 30 ms of overhead on a CPU.
    All random numbers of a client's training come from (seed, round, client), so a run that goes on from its folder
    gives the same bits as one that was never ended. What a data module keeps to itself between fits, such as its own
    generator, is not known here and not restored, nor is what ``on_round`` changes in the module. Global weights have
    the types of the module's: in bfloat16 a small step of the server rounds to none, so let the module be float32 and
    train with ``trainer={"precision": "bf16-mixed"}``.

    Args:
        module: The model. It is a template while rounds run, and holds the global weights after :meth:`run`.
        clients: Training data of each client: a LightningDataModule, or what ``Trainer.fit`` takes. A sequence (clients
            0 to N − 1) or a mapping by name.
        rule: The server's, such as :class:`.FedAU`.
        pattern: Who is available, in the order of the clients.
        local_steps: I, optimizer steps of a client in a round.
        seed: Of local trainings.
        folder: Where the state goes (``federated.safetensors``), and is gone on from; ``None``: nowhere.
        save_every: Rounds between two writings; the end of :meth:`run` is always written.
        trainer: Options of the clients' Trainers, such as ``accelerator`` or ``gradient_clip_val``.
        buffers: Floating buffers, averaged over participants; ``None``: all that the module has.
        logger: Gets the numbers of each round.

    Attributes:
        weights: x, the global weights.
        round: Rounds done.
        history: The numbers of each round: ``available``, ``participants``, ``refused``, ``total`` (Σ of the updates'
            coefficients), those of the rule, and the participants' mean of what the module logs.

    Raises:
        UnsupportedSetup: Clients, pattern and rule have different numbers of clients or names, an option is out of
            range, the module's state dict is empty or holds more than tensors, or the folder holds another run.
        UnreadableCheckpoint: The folder holds a damaged file.
        UnwritableOutput: The folder cannot be written.

    Example:
        >>> rates = dirichlet_participation(clients=20, classes=10).rates  # doctest: +SKIP
        >>> simulation = FederatedSimulation(module, data_of_clients, FedAU(20), Bernoulli(rates))  # doctest: +SKIP
        >>> simulation.run(500)  # doctest: +SKIP
    """

    def __init__(
        self,
        module: LightningModule,
        clients: Sequence[Any] | Mapping[Client, Any],
        rule: FederatedAverage,
        pattern: ParticipationPattern,
        *,
        local_steps: int = 5,
        seed: int = 0,
        folder: str | os.PathLike | None = None,
        save_every: int = 10,
        trainer: Mapping[str, Any] | None = None,
        buffers: Collection[str] | None = None,
        logger: Logger | None = None,
    ) -> None:
        names = clients if isinstance(clients, Mapping) else range(len(clients))
        self.clients = dict(zip(client_names(names, "clients"), (clients[name] for name in names), strict=True))
        counts = {"clients": len(self.clients), "pattern": pattern.rates.size, "rule": rule.population}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{what} {count}" for what, count in counts.items())
            raise UnsupportedSetup(f"numbers of clients differ: {told}. Give data, a rate and a place to each client.")
        rule.coefficients(list(self.clients))  # refuses clients of other names, now and not after a round
        self.module, self.rule, self.pattern, self.logger, self.folder = module, rule, pattern, logger, folder
        self.local_steps = whole_number(local_steps, "local_steps", 1)
        self.save_every = whole_number(save_every, "save_every", 1)
        self.seed = whole_number(seed, "seed", 0)
        self.trainer = check_trainer_options(trainer)
        self.buffers = float_buffers(module) if buffers is None else frozenset(buffers)
        self.weights: dict[str, Tensor] = _weights(module)
        self.round = 0
        self.history: list[Row] = []
        self._saved: int | None = None
        self._resume()

    def run(
        self,
        rounds: int,
        on_round: Callable[["FederatedSimulation"], None] | None = None,
        progress: Progress = silent,
    ) -> dict[str, Tensor]:
        """Go on until so many rounds are done in all, then load the global weights into the module.

        Args:
            rounds: Of the whole run, those before it was ended included.
            on_round: Called after each round: to evaluate ``weights``, or to change the learning rate in ``module``.
            progress: Shows how far it is.

        Returns:
            The global weights.

        Raises:
            UnsupportedSetup: A client could not train.
            NonFiniteWeights: The server's sum overflows.
            UnwritableOutput: The state cannot be written.
        """
        whole_number(rounds, "rounds", 0)
        if rounds < self.round:
            raise UnsupportedSetup(
                f"rounds={rounds}, but {self.round} are done already. Give that many or more, or another folder."
            )
        for _ in progress(range(self.round, rounds), "Rounds", total=rounds - self.round):
            self._one_round()
            if self.round % self.save_every == 0:
                self._save()
            if on_round is not None:
                on_round(self)
        self._save()
        self.module.load_state_dict(self.weights)
        for note in self.rule.notes():
            warnings.warn(note, stacklevel=2)
        return self.weights

    def _one_round(self) -> None:
        before = self.pattern.state_dict()
        try:
            available = [name for name, here in zip(self.clients, self.pattern.draw(), strict=True) if here]
            trained = {client: self._train(client) for client in available}
            step = self.rule.step(self.weights, {c: found.weights for c, found in trained.items()}, self.buffers)
        except BaseException:  # Ctrl-C, too: run() can be called again
            self.pattern.load_state_dict(before)
            raise
        self.weights = step.weights
        self.round += 1
        self.history.append(self._row(trained, step))
        if self.logger is not None:
            self.logger.log_metrics(self.history[-1], step=self.round)

    def _train(self, client: Client) -> LocalTraining:
        number = list(self.clients).index(client)
        seed = int(np.random.SeedSequence([self.seed, self.round, number]).generate_state(1)[0])
        with isolate_rng():
            return train_locally(
                copy.deepcopy(self.module),
                self.clients[client],
                self.weights,
                self.local_steps,
                trainer=self.trainer,
                seed=seed,
                client=client,
            )

    def _row(self, trained: Mapping[Client, LocalTraining], step: FederatedStep) -> Row:
        logged: dict[str, list[float]] = {}
        for client in step.participants:
            for name, value in trained[client].metrics.items():
                logged.setdefault(name, []).append(value)
        return {
            "round": float(self.round),
            "available": float(len(trained)),
            "participants": float(len(step.participants)),
            "refused": float(len(step.refused)),
            "total": step.total,
            **self.rule.metrics(),
            **{name: statistics.fmean(values) for name, values in logged.items()},
        }

    def _settings(self) -> dict[str, Any]:
        return {
            **self.rule.settings(),
            **self.pattern.settings(),
            "local_steps": self.local_steps,
            "local_seed": self.seed,
            "clients": [client_name(client) for client in self.clients],
            "buffers": sorted(self.buffers),
            "tensors": {name: [str(value.dtype), list(value.shape)] for name, value in self.weights.items()},
        }

    def _save(self) -> None:
        if self.folder is None or self._saved == self.round:
            return
        extra = {"pattern": self.pattern.state_dict(), "history": self.history}
        write_state(self.folder, FederatedState(self.round, self.weights, extra), self.rule, self._settings())
        self._saved = self.round

    def _resume(self) -> None:
        state = None if self.folder is None else read_state(self.folder, self.rule, self._settings())
        if self.folder is not None:
            check_writable(Path(self.folder) / FILE_NAME)
        if state is None:
            return
        try:
            # Under the module's names, in their order; tensors that are tied there come as equal ones.
            weights = {name: state.weights[name] for name in self.weights}
            history, pattern = [dict(row) for row in state.extra["history"]], state.extra["pattern"]
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableCheckpoint(
                f"{Path(self.folder) / FILE_NAME}: is damaged, or of another kind of training ({type(error).__name__}: "
                f"{error}). Give another folder, or remove the file to start anew."
            ) from error
        self.pattern.load_state_dict(pattern)
        self.weights, self.history = weights, history
        self.round = self._saved = state.round


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """A copy of the module's, on the CPU."""
    state = module.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor) or is_lazy(value)]
    if other or not state:
        what = f"{other[0]!r} in its state dict is no tensor that has a shape" if other else "its state dict is empty"
        raise UnsupportedSetup(
            f"{type(module).__name__}: {what}. Give a module that has all its weights, and keeps tensors only: layers "
            "of configure_model come too late, lazy ones need a first batch."
        )
    return {name: value.detach().cpu().clone() for name, value in state.items()}
