"""The frame of NoLoCo, DiLoCo and gossip: when an outer step is due, who takes part, and what is kept of it."""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_soup.callbacks.selected_tensors import saved_buffers, trainable
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.distributed.outer_step import Layout, OuterStep, Replica
from lightning_soup.distributed.replicas import ReplicaStrategy
from lightning_soup.errors import UnreadableCheckpoint, UnsupportedSetup

__all__ = ["ReplicaAveraging"]


class ReplicaAveraging(Callback):
    """Replicas take an outer step together every few optimizer steps; needs :class:`.ReplicaStrategy`.

    Steps are counted as batches in which the optimizers were stepped, also where a gradient scaler passed over one: the
    count must be the same on all ranks. In automatic optimization the outer step belongs to the optimizer's, before
    averages such as EMA look at the weights; in manual optimization it comes at the end of the batch.

    BatchNorm's statistics and other floating-point buffers become the mean of the group's. Optimizer states stay as
    they are.

    Args:
        step: What is sent and what is made of it.
        every: Optimizer steps between outer steps.

    Attributes:
        round: How many outer steps have been taken.
    """

    _fits: ClassVar[Any] = itertools.count()

    def __init__(self, step: OuterStep, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UnsupportedSetup(f"{type(self).__name__}(every={every!r}): expected a number of optimizer steps.")
        self.step, self.every = step, every
        self._forget()

    def _forget(self) -> None:
        self.round = 0
        self._steps_taken = 0  # batches in which the optimizers were stepped
        self._taken_in_batch = False
        self._replica: Replica | None = None
        self._resumed: dict[str, Any] | None = None
        self._tensors: list[Tensor] = []
        self._steps: OptimizerSteps | None = None
        self._layout: Layout | None = None
        self._told: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the Trainer before it runs: what belongs to a run stays here."""
        return {**self.__dict__, "_replica": None, "_steps": None, "_tensors": [], "_told": {}}

    @property
    def state_key(self) -> str:
        """``lightning_soup/`` and the name of the class."""
        return f"lightning_soup/{type(self).__name__}"

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        name = type(self).__name__
        self._forget()
        if not isinstance(trainer.strategy, ReplicaStrategy):
            raise UnsupportedSetup(
                f"{name} averages replicas that train apart, but the strategy is {type(trainer.strategy).__name__}. "
                "Use strategy='replicas' (ReplicaStrategy) with two devices or more."
            )
        for callback in trainer.callbacks:
            if callback is not self and isinstance(callback, ReplicaAveraging):
                raise UnsupportedSetup(f"{name} stands beside {type(callback).__name__}, and both average. Keep one.")
        if trainer.world_size < 2:
            raise UnsupportedSetup(f"{name}: there is one replica, and nobody to average with. Give devices=2 or more.")
        self.step.check(trainer.world_size)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizers."""
        self._steps = OptimizerSteps.of(trainer)
        if pl_module.automatic_optimization:
            self._steps.listen(self, lambda index: self._after_step(trainer, pl_module), "mutate")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as all other callbacks have left them, or go on from a checkpoint."""
        self._find_tensors(pl_module)
        self._fit = next(self._fits)
        self._replica = Replica(self.step, self._layout, self._layout.flatten(self._tensors))
        if self._resumed is not None:
            self._restore(self._resumed)
        parameters = self._layout.weights
        rank_zero_info(
            f"{type(self).__name__}: {trainer.world_size} replicas average {parameters:,} parameters every "
            f"{self.every} steps; {self.traffic(trainer.world_size)}."
        )

    def _find_tensors(self, module: LightningModule) -> None:
        weights = {slot.name: slot.tensor for slot in trainable(module)}
        if not weights:
            raise UnsupportedSetup(f"{type(self).__name__}: {type(module).__name__} has no trainable parameter.")
        buffers = {name: buffer for name, buffer in saved_buffers(module).items() if buffer.is_floating_point()}
        known = (self._resumed or {}).get("names")  # an observer's least value is infinite only in the beginning
        buffers = {
            name: buffer
            for name, buffer in buffers.items()
            if (name in known if known else buffer.isfinite().all())  # without masks of −inf
        }
        self._trainable = sum(parameter.requires_grad for parameter in module.parameters())
        self._layout = Layout.of(weights, buffers)
        self._tensors = [*weights.values(), *buffers.values()]

    def traffic(self, world_size: int) -> str:
        """What a replica sends in an outer step, in words."""
        size = sum(shape.numel() for shape in self._layout.shapes) * self._layout.dtype.itemsize / 1e6
        if self.step.collective:
            return f"an all-reduce of {size:,.1f} MB each time"
        peers = max(len(self.step.group(0, rank, world_size)) for rank in range(world_size)) - 1
        return f"each sends {peers} message{'s' * (peers > 1)} of {size:,.1f} MB each time"

    # ------------------------------------------------------------------------------------------------ during training

    def _after_step(self, trainer: Trainer, module: LightningModule) -> None:
        """In automatic optimization, within the optimizer's step."""
        if not self._taken_in_batch and (self._steps_taken + 1) % self.every == 0:
            self._take(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and take the outer step where the optimizer's was passed over or is taken by hand."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._steps_taken += 1
        if self._steps_taken % self.every == 0 and not self._taken_in_batch:
            self._take(trainer, pl_module)
        self._taken_in_batch = False
        if self._told:
            self.log_dict(self._told, on_step=True, on_epoch=False)
            self._told = {}

    @torch.no_grad()
    def _take(self, trainer: Trainer, module: LightningModule) -> None:
        name, ranks = type(self).__name__, trainer.strategy.ranks
        self._taken_in_batch = True
        if sum(parameter.requires_grad for parameter in module.parameters()) != self._trainable:
            raise UnsupportedSetup(
                f"{name}: parameters were frozen or unfrozen since training began, but what the replicas exchange was "
                "settled then. Set requires_grad before fit."
            )
        vector = self._layout.flatten(self._tensors)
        self._layout.check(vector, f"{name} (rank {ranks.rank})")
        message = self._replica.message(vector)
        if self.step.collective:
            ranks.assemble()
            received = {ranks.rank: ranks.sum_(message).div_(len(ranks.members))}
        else:
            group = self.step.group(self.round, ranks.rank, trainer.world_size)
            peers = [rank for rank in group if rank != ranks.rank]
            received = {ranks.rank: message, **ranks.exchange(message, peers, f"{name}/{self._fit}/{self.round}")}
        averaged = self._replica.average(vector, received, ranks.rank)
        self._layout.write(averaged, self._tensors)
        self.round += 1
        self._told = {
            f"{name}/moved": float((averaged - vector)[: self._layout.weights].square().mean().sqrt()),
            f"{name}/peers": float(len(received) - 1),
            f"{name}/sent_MB": ranks.bytes_sent / 1e6,
            **self._figures(),
        }

    def _figures(self) -> dict[str, float]:
        """More to log of an outer step."""
        return {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go."""
        if self._steps is not None:
            self._steps.stop(self)
            self._steps = None

    # ---------------------------------------------------------------------------------------------------------- files

    def _options(self) -> dict[str, Any]:
        """Options that a resumed fit must have again."""
        return {"every": self.every}

    def state_dict(self) -> dict[str, Any]:
        """Counters and this replica's own state; each replica's is in its own file."""
        state = {} if self._replica is None else dict(self._replica.state)
        names = list(self._layout.names) if self._layout else []
        counted = {"round": self.round, "steps": self._steps_taken}
        return {"options": self._options(), **counted, "names": names, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, in ``on_train_start``."""
        self._resumed = dict(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if state["options"] != self._options():
            raise UnsupportedSetup(
                f"{name}: the checkpoint is of a fit with {state['options']}, but it is resumed with "
                f"{self._options()}. Give the same options."
            )
        sizes = {key: tensor.numel() for key, tensor in state["state"].items()}
        expected = {key: tensor.numel() for key, tensor in self._replica.state.items()}
        if state["names"] and (list(state["names"]) != list(self._layout.names) or sizes != expected):
            apart = sorted(set(state["names"]) ^ set(self._layout.names))
            raise UnreadableCheckpoint(
                f"{name}: the checkpoint holds the state of other tensors ({', '.join(apart[:4]) or 'other shapes'}). "
                "Resume with the model, and the trainable parameters, that it was saved with."
            )
        self.round, self._steps_taken = state["round"], state["steps"]
        for key, tensor in state["state"].items():
            self._replica.state[key].copy_(tensor)
