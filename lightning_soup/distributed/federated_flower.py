"""Federated averages on Flower: the server's strategy, and a client of any LightningModule and data module.

An app for ``flwr run`` names two objects::

    client = flower_client(lambda context: Network(), lambda context: Data(context.node_config["partition-id"]))

    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = FlowerStrategy(FedAU(population=100, cutoff=50), folder="federated", fraction_evaluate=0.0)
        result = strategy.start(grid, to_arrays(Network().state_dict()), num_rounds=500)
        save_weights(from_arrays(result.arrays), "weights.safetensors")

Flower is an extra, in an environment of its own, since it pins older versions of shared packages. Importing this file
needs it.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_soup.distributed.fedau import FedAU
from lightning_soup.distributed.federated_average import FederatedAverage
from lightning_soup.distributed.federated_client import (
    LocalTraining,
    check_trainer_options,
    evaluate_locally,
    train_locally,
)
from lightning_soup.distributed.federated_files import FederatedState, read_state, write_state
from lightning_soup.distributed.participation_clients import whole_number
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra

flower = import_extra("flwr.app", "federated")
_strategies = import_extra("flwr.serverapp.strategy", "federated")
_clientapp = import_extra("flwr.clientapp", "federated")
_log = logging.getLogger("flwr")

__all__ = ["FlowerStrategy", "flower_client", "from_arrays", "to_arrays"]

_EXAMPLES = "num-examples"
_UNUSED = ("weighted_by_key", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")


def to_arrays(weights: Mapping[str, Tensor]) -> "flower.ArrayRecord":
    """Weights as Flower sends them; types that numpy lacks, such as bfloat16, go as float32."""
    numpy_has = (torch.float16, torch.float32, torch.float64)
    wide = {
        name: value.float() if value.is_floating_point() and value.dtype not in numpy_has else value
        for name, value in weights.items()
    }
    return flower.ArrayRecord.from_torch_state_dict(wide)


def from_arrays(arrays: "flower.ArrayRecord") -> dict[str, Tensor]:
    """Weights of what Flower sent."""
    return dict(arrays.to_torch_state_dict())


class FlowerStrategy(_strategies.FedAvg):
    """A server's rule as a strategy for Flower: ``FlowerStrategy(FedAU(population=100)).start(grid, arrays, 500)``.

    A client takes part in a round where its valid reply arrives, not where it was sampled: errors, replies that never
    come, NaN, missing tensors and other shapes count as absence, the latter with a warning. A round without any reply
    counts, too. Metrics are plain means over clients, never weighted by numbers of examples, beside the numbers of the
    rule (``weight_max``, ``few_gaps``, ``total``).

    Args:
        rule: The rule, whose clients are node ids. Its population is that of all clients, whoever is online.
        grow: Let nodes that are online for the first time join the population of FedAU; begin with ``FedAU([])``.
        buffers: Names of floating buffers, averaged over participants; ``None``: BatchNorm's statistics, by name.
        folder: Where the state goes after each round (``federated.safetensors``), and is gone on from: :meth:`start`
            then begins with the weights in it, and does what is left of the rounds. ``None``: nowhere.
        options: Of Flower's ``FedAvg``: fractions, least numbers of nodes (1 here, as Flower waits for so many), keys.

    Attributes:
        round: Rounds done, those before it was ended included.

    Raises:
        MissingExtra: Flower is not installed.
        UnsupportedSetup: ``grow`` with a rule that is not FedAU, an option that would change nothing, or a folder with
            the state of another rule.
        UnreadableCheckpoint: The folder holds a damaged file.
    """

    def __init__(
        self,
        rule: FederatedAverage,
        *,
        grow: bool = False,
        buffers: Collection[str] | None = None,
        folder: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        least = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
        unused = [name for name in _UNUSED if name in options]
        if unused:
            raise UnsupportedSetup(f"{unused[0]}: the rule decides, metrics are plain means. Leave this option out.")
        super().__init__(**{**least, **options})
        if grow and not isinstance(rule, FedAU):
            raise UnsupportedSetup(f"grow=True: {type(rule).__name__} has a fixed population. Leave it, or take FedAU.")
        self.rule, self.grow, self.buffers = rule, grow, None if buffers is None else frozenset(buffers)
        self.folder = None if folder is None else Path(folder)
        state = None if folder is None else read_state(folder, rule, self._settings())
        self.round, self._weights = (0, {}) if state is None else (state.round, state.weights)
        self._offset = 0  # Flower numbers the rounds of each start from 1

    def start(self, grid: Any, initial_arrays: Any, num_rounds: int = 3, *args: Any, **kwargs: Any) -> Any:
        """Run rounds; see Flower's ``Strategy.start``.

        Args:
            grid: Flower's grid.
            initial_arrays: x_0. Where the strategy goes on, those of its state are taken.
            num_rounds: In all, those that are done included. In the result, they are numbered from the first of this
                start.
            args: Flower's further arguments.
            kwargs: Flower's further arguments.

        Raises:
            UnsupportedSetup: The weights of rounds that are done have other tensors than the initial arrays.
        """
        if self.round:
            given = from_arrays(initial_arrays)
            if {n: v.shape for n, v in given.items()} != {n: v.shape for n, v in self._weights.items()}:
                raise UnsupportedSetup(
                    f"{self.round} rounds are done with the weights of another model than initial_arrays. Give that "
                    "model, or begin anew with another folder."
                )
            initial_arrays = to_arrays(self._weights)
        self._offset = self.round
        left = max(0, num_rounds - self.round)
        result = super().start(grid, initial_arrays, left, *args, **kwargs)
        if not left:
            result.arrays = initial_arrays
        return result

    def summary(self) -> None:
        """Log Flower's settings, and the rule that stands for its weighting."""
        super().summary()
        _log.info("\t\tNothing is weighed by '%s', but by %s", self.weighted_by_key, self._settings())

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Keep x, send it to the nodes that are sampled, and let new nodes join."""
        self._weights = from_arrays(arrays)
        messages = list(super().configure_train(self._offset + server_round, arrays, config, grid))
        if self.grow:
            # Afterwards: Flower waits for nodes there, and may sample one that has just come.
            here = [*grid.get_node_ids(), *(message.metadata.dst_node_id for message in messages)]
            for node in sorted(set(here).difference(self.rule.participation.clients)):
                self.rule.participation.join(node)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """Make the new x of the replies, and feed the round to the rule."""
        weights: dict[int, dict[str, Tensor]] = {}
        metrics: dict[int, dict[str, Any]] = {}
        for node, content in _contents(replies):
            try:
                [arrays] = content.array_records.values()
                weights[node] = from_arrays(arrays)
            except (ValueError, TypeError, EOFError) as error:
                warnings.warn(
                    f"client {node!r}: its reply holds no arrays that can be read ({error}). It counts as absent in "
                    "this round.",
                    stacklevel=2,
                )
                continue
            metrics[node] = _numbers(content)
        step = self.rule.step(self._weights, weights, self.buffers)
        self._weights = step.weights
        self.round = self._offset + server_round
        if self.folder is not None:
            write_state(self.folder, FederatedState(self.round, step.weights), self.rule, self._settings())
        counts = {"participants": len(step.participants), "refused": len(step.refused), "total": step.total}
        told = {**_mean([metrics[node] for node in step.participants]), **counts, **self.rule.metrics()}
        return to_arrays(step.weights), flower.MetricRecord(told)

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Send x to the nodes that are sampled."""
        return super().configure_evaluate(self._offset + server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """The plain mean of what clients measured; ``None`` where none did."""
        found = _mean([_numbers(content) for _, content in _contents(replies)])
        return flower.MetricRecord(found) if found else None

    def _settings(self) -> dict[str, Any]:
        return {**self.rule.settings(), "buffers": None if self.buffers is None else sorted(self.buffers)}


def _contents(replies: Iterable[Any]) -> list[tuple[int, Any]]:
    """Nodes and what they replied, without errors, which are logged."""
    found: dict[int, Any] = {}
    for message in replies:
        node = message.metadata.src_node_id
        if message.has_error():
            told = (message.error.reason or "").strip() or "no reason given"
            last = told.splitlines()[-1]  # after a traceback
            _log.warning("client %s replied with an error and is left out of this round: %s", node, last)
        elif node not in found:
            found[node] = message.content
    return list(found.items())


def _numbers(content: Any) -> dict[str, float]:
    """The finite numbers in the metrics of a reply."""
    found = {name: value for record in content.metric_records.values() for name, value in record.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if name != _EXAMPLES and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The plain mean of each number, over those that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def flower_client(
    module: Callable[[Any], LightningModule],
    data: Callable[[Any], Any],
    *,
    local_steps: int = 5,
    trainer: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Any:
    """Make a Flower ``ClientApp`` that trains, and validates, any LightningModule on any LightningDataModule.

    Args:
        module: Builds the module, given Flower's context (``context.node_config``, ``context.run_config``).
        data: Builds the client's data, a LightningDataModule or what ``Trainer.fit`` takes, given Flower's context.
        local_steps: I, optimizer steps in a round; the server's train config may hold another, ``local-steps``.
        trainer: Options of the Trainer; see :func:`.check_trainer_options`.
        seed: Of local trainings, with the round and the node; ``None``: not seeded.

    Returns:
        The app; its replies are what :class:`FlowerStrategy` and Flower's own strategies take.

    Raises:
        MissingExtra: Flower is not installed.
        UnsupportedSetup: An option is out of range.
    """
    whole_number(local_steps, "local_steps", 1)
    check_trainer_options(trainer)
    if seed is not None:
        whole_number(seed, "seed", 0)
    app = _clientapp.ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        config = next(iter(message.content.config_records.values()), {})
        drawn = None
        if seed is not None:
            entropy = [seed, int(config.get("server-round", 0)), context.node_id]
            drawn = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        found = train_locally(
            module(context),
            data(context),
            _received(message),
            int(config.get("local-steps", local_steps)),
            trainer=trainer,
            seed=drawn,
            client=context.node_id,
        )
        return _reply(message, found, arrays=True)

    @app.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        weights = _received(message)
        found = evaluate_locally(module(context), data(context), weights, trainer=trainer, client=context.node_id)
        return _reply(message, found, arrays=False)

    return app


def _received(message: Any) -> dict[str, Tensor]:
    [arrays] = message.content.array_records.values()
    return from_arrays(arrays)


def _reply(message: Any, found: LocalTraining, *, arrays: bool) -> Any:
    records = {"metrics": flower.MetricRecord({**found.metrics, _EXAMPLES: found.examples})}
    if arrays:
        records["arrays"] = to_arrays(found.weights)
    return flower.Message(flower.RecordDict(records), reply_to=message)
