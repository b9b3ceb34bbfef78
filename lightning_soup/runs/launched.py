"""The processes that torchrun or SLURM started with this one, and what they tell each other in a store."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.runs.sweep_processes import cores

__all__ = ["World", "launched", "unlaunched"]

# What makes Lightning, torch and others take a process for one of many.
_OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


@dataclass(frozen=True)
class World:
    """This process among those that were started together.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number on its machine.
        cores: How many cores it may use.
        store: Where all find what one has set: a ``torch.distributed.Store``.
    """

    rank: int
    size: int
    local_rank: int
    cores: int
    store: Any


def launched(timeout: float = 600.0) -> World:
    """Meet the other processes.

    Args:
        timeout: Seconds to wait for all of them.

    Raises:
        UnsupportedSetup: No launcher started this process.
        LightningSoupError: They do not come.
    """
    global _meetings
    import torch.distributed as dist  # here, since most sweeps need none of it
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        found, local = TorchElasticEnvironment(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        share = max(1, cores() // local)
    elif "SLURM_PROCID" in os.environ and SLURMEnvironment.detect():
        found = SLURMEnvironment(auto_requeue=False)
        local = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
        share = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or max(1, cores() // local)
    else:
        raise UnsupportedSetup(
            "engine is replicas, which trains on the processes that torchrun or srun has started, but none did. Start "
            "the command with one of them, such as torchrun --nproc-per-node 4 --no-python lightning-soup sweep …, or "
            "train on this machine with --jobs 4."
        )
    rank, size = found.global_rank(), found.world_size()
    # Both are asked because Lightning writes what SLURM means by them into the environment, where torch looks.
    place = f"{found.main_address}:{found.main_port}"
    try:
        if dist.is_initialized():
            shared = dist.distributed_c10d._get_default_store()
        else:
            if (place, rank, size) not in _stores:
                met = dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout))
                _stores[place, rank, size] = next(met)[0]
            shared = _stores[place, rank, size]
        _meetings += 1
        store = dist.PrefixStore(f"lightning_soup/sweep/{_meetings}", shared)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise LightningSoupError(
            f"rank {rank} of {size} does not meet the others at {place} ({str(error).splitlines()[0]}). Were all of "
            "them started, and does each machine see that address?"
        ) from error
    return World(rank, size, found.local_rank(), share, store)


_meetings = 0  # of this process: all have as many, and no sweep reads the keys of an earlier one
# Kept to the end of the process: rank 0 may hold the store, and another rank be in the next sweep before rank 0 is.
_stores: dict[tuple[str, int, int], Any] = {}


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """Let this process and its children pass for ones that nobody launched: each training is one by itself."""
    names = [name for name in os.environ if name in _OF_LAUNCHERS or name.startswith("TORCHELASTIC_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
