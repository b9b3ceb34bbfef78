"""Which processes train a sweep, from the options of the command."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import Namespace

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.runs.sweep_workers import Engine

__all__ = ["choose_engine"]


def choose_engine(
    engine: Literal["local", "ray", "replicas"],
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
    if engine != "ray":
        for name, value in (("address", address), ("num_cpus", num_cpus), ("num_gpus", num_gpus)):
            if value is not None:
                raise UnsupportedSetup(
                    f"{name} is {value}, an option of engine ray. Add --engine ray, or leave it out."
                )
    if engine == "local":
        return None
    if jobs != 1:
        many = "as many train at a time as the cluster has room for" if engine == "ray" else "each rank trains one"
        said = "; num_cpus and num_gpus say what each of them takes" if engine == "ray" else ""
        raise UnsupportedSetup(f"jobs is {jobs} with engine {engine}, where {many}. Leave it out{said}.")
    for config in configs:
        if isinstance(config.trainer.devices, list):
            whose = "the one that Ray gives it" if engine == "ray" else "its rank's own"
            raise UnsupportedSetup(
                f"trainer.devices is {config.trainer.devices}, which names a device, but with engine {engine} each "
                f"training sees only {whose}. Set devices: 1."
            )
    if engine == "replicas":
        return None
    from lightning_soup.runs.sweep_ray import RayCluster

    if num_gpus is None and all(config.trainer.accelerator == "cpu" for config in configs):
        num_gpus = 0
    cluster = RayCluster(address, 1 if num_cpus is None else num_cpus, num_gpus, same)
    import_extra("ray", "ray")  # now, not after the first folder is made
    return cluster
