"""Which processes train a sweep, from the options of the command."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import Namespace

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.runs.sweep_workers import Engine

__all__ = ["choose_engine"]


def choose_engine(
    engine: Literal["local", "ray"],
    *,
    jobs: int,
    address: str | None,
    num_cpus: float | None,
    num_gpus: float | None,
    configs: Sequence[Namespace],
    same: Callable[[], Any],
) -> Engine | None:
    """Make the engine that the options ask for; None for that of this machine.

    Args:
        engine: Which.
        jobs: Of the local engine.
        address: Of the Ray cluster.
        num_cpus: Of each Ray task.
        num_gpus: Of each Ray task.
        configs: The parsed config of each setting.
        same: Gives what must be equal on all machines that train.

    Raises:
        MissingExtra: Ray is not installed.
        UnsupportedSetup: An option belongs to the other engine, or has a value that cannot be.
    """
    if engine == "local":
        for name, value in (("address", address), ("num_cpus", num_cpus), ("num_gpus", num_gpus)):
            if value is not None:
                raise UnsupportedSetup(
                    f"{name} is {value}, an option of engine ray. Add --engine ray, or leave it out."
                )
        return None
    if jobs != 1:
        raise UnsupportedSetup(
            f"jobs is {jobs} with engine ray, where as many train at a time as the cluster has room for. Leave it "
            "out; num_cpus and num_gpus say what each of them takes."
        )
    for config in configs:
        if isinstance(config.trainer.devices, list):
            raise UnsupportedSetup(
                f"trainer.devices is {config.trainer.devices}, which names a device, but with engine ray each training "
                "sees only the one that Ray gives it. Set devices: 1."
            )
    from lightning_soup.runs.sweep_ray import RayCluster

    if num_gpus is None and all(config.trainer.accelerator == "cpu" for config in configs):
        num_gpus = 0
    cluster = RayCluster(address, 1 if num_cpus is None else num_cpus, num_gpus, same)
    import_extra("ray", "ray")  # now, not after the first folder is made
    return cluster
