"""One model per process, none of them kept equal: what NoLoCo, DiLoCo, gossip and parallel copies train on."""

import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_soup.distributed.ranks import Ranks
from lightning_soup.distributed.replica_checkpoints import REPLICA_KEY, load_replica, save_replica
from lightning_soup.distributed.replica_ends import take_best, take_mean
from lightning_soup.distributed.replica_starts import begin, leave_signals_local, override_options
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.evaluator import direction
from lightning_soup.runs.settings import set_hyperparameters

__all__ = ["ReplicaStrategy"]

_PRIMES = 1_000_003, 10_007  # that keep the seeds of ranks and epochs apart


class ReplicaStrategy(DDPStrategy):
    """One model per process; gradients are never synchronised.

    Lightning's own launchers and process groups (gloo on CPU, NCCL on CUDA) run underneath, under torchrun and SLURM as
    ``ddp`` does. Each rank has its own weights, optimizer, random numbers and, where asked for, hyperparameters.
    Averaging between them is a callback's: :class:`.NoLoCo`, :class:`.DiLoCo`, :class:`.GossipAveraging`. Without one,
    this trains as many independent models side by side, the ingredients of a soup.

    A checkpoint is a folder with a Lightning checkpoint of every replica and a manifest, which is written last; a fit
    resumed from it goes on with all. ``open_checkpoint(folder, which=rank)`` opens one, ``which="mean"`` the mean, and
    as ingredients of a recipe they are all taken. A checkpoint that is a file begins all replicas alike.

    What ``self.log(…, sync_dist=True)`` logs, and metrics of torchmetrics, are over all replicas. Other metrics are
    rank 0's in logs and files; after each validation their mean and range over replicas are logged beside them, and
    ``replicas/spread``, √(mean of (mean − θ)²).

    By name: ``strategy="replicas"``, ``"replicas_fork"`` (also notebooks), ``"replicas_spawn"``.

    Args:
        data: ``"shard"``: each replica trains on its own part of the data, as in ``ddp``. ``"full"``: each on all of
            it, in an order of its own.
        eval_data: Likewise for validation and test data: ``"shard"`` judges each sample by one of the replicas (as in
            ``ddp``, some twice where their number is no multiple of the replicas').
        seed: Random numbers of rank r begin with ``seed + r``; None: that of ``seed_everything``, or 0.
        common_start: All begin with rank 0's weights. False: each with its own: those made in ``configure_model``,
            which is called with the rank's own random numbers, or those of the module made anew from its
            hyperparameters.
        overrides: Hyperparameters of the module, or options of its optimizer, that differ: for each a list with a value
            per rank.
        final: What the module holds when ``fit`` ends: the ``"mean"`` of the replicas, the ``"best"`` by ``monitor``,
            or ``"all"``, each rank its own.
        monitor: The metric of validation that tells the best.
        mode: ``"max"`` or ``"min"``; by default ``"min"`` for losses and errors.
        timeout: Seconds until a rank that does not answer is an error, which names those that are behind.
        patience: Seconds that peers wait for each other in an exchange. One that comes later is passed over this time,
            and one that died from then on: the others go on without it, if what started the processes lets them
            (torchrun and Lightning's own launchers end all when one dies; SLURM does unless ``--no-kill`` and
            ``--kill-on-bad-exit=0`` are given). Rank 0 holds the store at which all meet and must live. Needs gloo.
            None: a rank that is late or gone is an error.
        start_method: How Lightning starts the processes: ``"popen"`` runs the script again, ``"fork"``, ``"spawn"``.
        process_group_backend: ``"gloo"``, ``"nccl"``; None: what the device needs.
        cluster_environment: Where ranks and addresses come from; None: found by Lightning.
        checkpoint_io: How each file is written; None: Lightning's.

    Raises:
        UnsupportedSetup: Before training: ``sync_batchnorm``, unequal numbers of batches, an override without a value
            for each rank, that nothing reads or that a schedule would set back, replicas that do not differ where
            ``common_start=False``, ``final="best"`` without validation.
        ReplicaLost: A process died, or did not answer within ``timeout``.
    """

    strategy_name = "replicas"

    def __init__(
        self,
        data: Literal["shard", "full"] = "shard",
        eval_data: Literal["shard", "full"] = "shard",
        seed: int | None = None,
        common_start: bool = True,
        overrides: dict[str, list[Any]] | None = None,
        final: Literal["mean", "best", "all"] = "mean",
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        timeout: float = 1800.0,
        patience: float | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
    ) -> None:
        _check_choice("data", data, ("shard", "full"))
        _check_choice("eval_data", eval_data, ("shard", "full"))
        _check_choice("final", final, ("mean", "best", "all"))
        if (final == "best") != (monitor is not None):
            raise UnsupportedSetup(
                f"ReplicaStrategy(final={final!r}, monitor={monitor!r}): the best replica is chosen by a metric that "
                "validation logs, and nothing else is. Give monitor with final='best' only."
            )
        for option, seconds in (("timeout", timeout), ("patience", patience)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise UnsupportedSetup(f"ReplicaStrategy({option}={seconds}): expected seconds, more than 0.")
        super().__init__(
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
            start_method=start_method,
        )
        self.data, self.eval_data, self.seed, self.common_start = data, eval_data, seed, common_start
        self.overrides = {name: list(values) for name, values in (overrides or {}).items()}
        self.final, self.monitor, self.mode = final, monitor, mode or direction(monitor or "")
        self.patience = patience
        self.seeds = True  # whether ranks get random numbers of their own from here, not from a callback
        self.ranks: Ranks | None = None
        self._resumed = False

    # ------------------------------------------------------------------------------------------------ before training

    def setup_environment(self) -> None:
        """Join the process group, and refuse what replicas cannot have."""
        if self._layer_sync is not None:
            raise UnsupportedSetup(
                "sync_batchnorm=True computes one statistic for all ranks in each forward pass, but replicas are "
                "different models that need not run in step. Leave it out; NoLoCo and gossip average the statistics."
            )
        if isinstance(self.checkpoint_io, AsyncCheckpointIO):
            raise UnsupportedSetup(
                "AsyncCheckpointIO returns before its file is there, but the manifest of a checkpoint of replicas may "
                "be written only when all files are. Leave it out."
            )
        count = self.num_nodes * self.num_processes
        for name, values in self.overrides.items():
            if len(values) != count:
                raise UnsupportedSetup(
                    f"ReplicaStrategy(overrides={{{name!r}: …}}): {len(values)} values for {count} replicas. "
                    "Give one for each rank."
                )
        with isolate_rng():  # Lightning seeds anew here; a rank goes on as one device would, until it is told otherwise
            super().setup_environment()
        if self.patience is not None and self._process_group_backend != "gloo":
            raise UnsupportedSetup(
                f"ReplicaStrategy(patience={self.patience}): with {self._process_group_backend} a process ends when its"
                " peer is lost. Give process_group_backend='gloo', or leave patience out."
            )
        self.ranks = Ranks(
            self.global_rank, self.world_size, self._timeout.total_seconds(), self.patience, self.root_device
        )
        self.ranks.listeners.append(self._leave_metrics_to_survivors)
        if self.ranks.group is not None:  # ranks were lost in an earlier run
            self._leave_metrics_to_survivors()

    @property
    def base_seed(self) -> int:
        """The seed of rank 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """A part of the data for each rank, or all of it in an order of its own."""
        module = self.lightning_module
        training = module is not None and module._trainer is not None and module.trainer.training
        if (self.data if training else self.eval_data) == "shard":
            return {**super().distributed_sampler_kwargs, "seed": self.base_seed}
        return {"num_replicas": 1, "rank": 0, "seed": self.base_seed + self.global_rank}

    @contextmanager
    def model_sharded_context(self) -> Any:
        """Build weights in ``configure_model`` from random numbers of this rank, if replicas may begin apart."""
        if self.common_start:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.base_seed + self.global_rank)
            yield

    def setup(self, trainer: Trainer) -> None:
        """Place the module; give it its start and its settings."""
        fitting = trainer.state.fn == "fit"
        if fitting:
            leave_signals_local(trainer)
            mine = {name: values[self.global_rank] for name, values in self.overrides.items()}
            left = set_hyperparameters(self.lightning_module, mine)
        Strategy.setup(self, trainer)  # DDPStrategy's would wrap the module, or make all ranks equal
        if fitting:
            schedulers = [config.scheduler for config in self.lr_scheduler_configs]
            override_options(self.lightning_module, self.optimizers, schedulers, left)
            self._resumed = bool(trainer._checkpoint_connector._loaded_checkpoint)
            if not self._resumed:
                begin(self.lightning_module, self.ranks, self.common_start, self.base_seed + self.global_rank)
            self._seed(0)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model

    def configure_ddp(self) -> None:
        """Nothing: a wrapped module would synchronise gradients."""

    # ------------------------------------------------------------------------------------------------ during training

    def on_train_start(self) -> None:
        """Refuse numbers of batches that differ, as a rank that has more would wait for those that have ended."""
        trainer = self.lightning_module.trainer
        if self.final == "best" and trainer.fit_loop.epoch_loop.val_loop.skip:
            raise UnsupportedSetup(
                f"ReplicaStrategy(final='best', monitor={self.monitor!r}): there is no validation data in this fit "
                "(limit_val_batches=0, or no val_dataloader) to choose by. Add it, or take final='mean' or 'all'."
            )
        counts = self.ranks.gather(float(trainer.num_training_batches))
        if any(count != counts[0] for count in counts):
            told = ", ".join(f"rank {rank}: {count:g}" for rank, count in zip(self.ranks.members, counts, strict=True))
            raise UnsupportedSetup(
                f"the ranks have different numbers of training batches ({told}), so some would wait for others that "
                "have ended their epoch. Let Lightning divide the data (use_distributed_sampler), give all the same "
                "number, or set limit_train_batches to the smallest."
            )
        if counts[0] == math.inf:
            rank_zero_warn(
                "ReplicaStrategy: the length of the training data is not known. All ranks must yield the same number "
                "of batches, or end by max_steps; else one waits until the timeout."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Say how far this rank is; begin each epoch with random numbers that a resumed fit draws again alike."""
        trainer = self.lightning_module.trainer
        self.ranks.post(trainer.global_step)
        if batch_idx == 0 or self._resumed:
            self._seed(trainer.current_epoch, batch_idx)
        self._resumed = False

    def _seed(self, epoch: int, batch: int = 0) -> None:
        if not self.seeds:
            return
        seed = self.base_seed + self.global_rank + _PRIMES[0] * epoch + _PRIMES[1] * batch
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def on_validation_start(self) -> None:
        """Find out who still takes part, before metrics are gathered."""
        self.ranks.assemble()

    def on_test_start(self) -> None:
        """Likewise."""
        self.ranks.assemble()

    def on_validation_end(self) -> None:
        """Log mean and range over replicas of what they have logged each for itself, and how far they lie apart."""
        trainer = self.lightning_module.trainer
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.final == "best" and self.monitor not in trainer.callback_metrics:  # not only when all is trained
            raise UnsupportedSetup(
                f"ReplicaStrategy(monitor={self.monitor!r}): validation does not log it. "
                f"Logged: {', '.join(sorted(trainer.callback_metrics)) or 'nothing'}."
            )
        if self.world_size == 1:
            return
        everyone = self.ranks.gather({name: float(value) for name, value in trainer.callback_metrics.items()})
        logged = {}
        for name in everyone[0]:
            values = [metrics[name] for metrics in everyone if name in metrics]
            if len(values) == len(everyone) and any(value != values[0] for value in values):
                logged |= {
                    f"{name}/replicas_mean": sum(values) / len(values),
                    f"{name}/replicas_min": min(values),
                    f"{name}/replicas_max": max(values),
                }
        logged["replicas/spread"] = self.ranks.spread(p for p in self.lightning_module.parameters() if p.requires_grad)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self) -> None:
        """End with what was asked for."""
        module = self.lightning_module
        self.ranks.wait("the end of training")  # rank 0 has the store, and must not leave before the others
        if self.ranks.alone or self.final == "all":
            return
        if self.final == "mean":
            take_mean(module, self.ranks)
            rank_zero_info(f"ReplicaStrategy: the module holds the mean of {len(self.ranks.members)} replicas.")
        else:
            take_best(module.trainer, module, self.ranks, self.monitor, self.mode)

    # ---------------------------------------------------------------------------------------------------------- files

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write this replica's file into the folder ``filepath``; rank 0 completes it with the manifest."""
        folder = Path(self.broadcast(str(filepath)))  # names may hold metrics, which differ
        checkpoint[REPLICA_KEY] = {"rank": self.global_rank, "world_size": self.world_size}

        def write(content: Mapping[str, Any], path: Path) -> None:
            self.checkpoint_io.save_checkpoint(content, path, storage_options=storage_options)

        save_replica(checkpoint, folder, self.ranks, write)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """This rank's file of a folder of replicas; or a file of one model, with which all replicas begin."""
        given = Path(self.broadcast(str(checkpoint_path)))  # the best has a name of its own on each rank, too
        path = load_replica(given, self.ranks)
        return self.ranks.agree(lambda: super(ReplicaStrategy, self).load_checkpoint(path, weights_only))

    # ---------------------------------------------------------------------------------------------------- collectives

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all that take part."""
        if self.ranks is not None:
            self.ranks.wait(str(args[0]) if args else "barrier")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """A plain object of one rank."""
        return obj if self.ranks is None else self.ranks.object_from(src, obj)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """A tensor reduced over the replicas that take part."""
        if self.ranks is None or not isinstance(tensor, Tensor):
            return tensor
        self.ranks.assemble()
        if self.ranks.alone:
            return tensor
        with self.ranks.named("reducing a value over all ranks"):
            return super().reduce(tensor, group or self.ranks.group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all replicas that take part say so, or one of them does; Lightning's counts those that are gone."""
        said = self.ranks.gather(bool(decision))
        return sum(said) == len(said) if all else any(said)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """A tensor of each replica that takes part."""
        self.ranks.assemble()
        with self.ranks.named("gathering a value from all ranks"):
            return super().all_gather(tensor, group or self.ranks.group, sync_grads)

    def _leave_metrics_to_survivors(self) -> None:
        """Metrics of torchmetrics gather by themselves, over all processes unless told otherwise."""
        for part in self.lightning_module.modules():
            if isinstance(part, Metric):
                part.process_group = self.ranks.group

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the strategy known by name."""
        for name, method in (("replicas", "popen"), ("replicas_fork", "fork"), ("replicas_spawn", "spawn")):
            told = f"one model per process, no gradient synchronisation, started by {method}"
            strategy_registry.register(name, cls, description=told, start_method=method, override=True)


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnsupportedSetup(f"ReplicaStrategy({option}={value!r}): expected one of {', '.join(map(repr, known))}.")


ReplicaStrategy.register_strategies(StrategyRegistry)
