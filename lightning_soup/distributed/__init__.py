"""Averages between workers: replicas, nodes that gossip, and federated clients.

What is federated is imported when it is first used, since Flower is an extra. The strategy is known to Lightning by its
name (``strategy="replicas"``) once this is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_soup.distributed.replicas import ReplicaStrategy as ReplicaStrategy
from lightning_soup.distributed.simulation import SimulatedReplicas as SimulatedReplicas

if TYPE_CHECKING:
    from lightning_soup.distributed.fedau import FedAU as FedAU
    from lightning_soup.distributed.fedau import ParticipationWeights as ParticipationWeights
    from lightning_soup.distributed.federated_average import FederatedAverage as FederatedAverage
    from lightning_soup.distributed.federated_baselines import MIFA as MIFA
    from lightning_soup.distributed.federated_baselines import AverageAll as AverageAll
    from lightning_soup.distributed.federated_baselines import AverageParticipating as AverageParticipating
    from lightning_soup.distributed.federated_baselines import FedVARP as FedVARP
    from lightning_soup.distributed.federated_baselines import KnownParticipation as KnownParticipation
    from lightning_soup.distributed.federated_flower import FlowerStrategy as FlowerStrategy
    from lightning_soup.distributed.federated_flower import flower_client as flower_client
    from lightning_soup.distributed.federated_simulation import FederatedSimulation as FederatedSimulation
    from lightning_soup.distributed.participation_patterns import Bernoulli as Bernoulli
    from lightning_soup.distributed.participation_patterns import Cyclic as Cyclic
    from lightning_soup.distributed.participation_patterns import Markov as Markov
    from lightning_soup.distributed.participation_patterns import dirichlet_participation as dirichlet_participation

_HOME = {
    "AverageAll": "federated_baselines",
    "AverageParticipating": "federated_baselines",
    "Bernoulli": "participation_patterns",
    "Cyclic": "participation_patterns",
    "FedAU": "fedau",
    "FedVARP": "federated_baselines",
    "FederatedAverage": "federated_average",
    "FederatedSimulation": "federated_simulation",
    "FlowerStrategy": "federated_flower",
    "KnownParticipation": "federated_baselines",
    "MIFA": "federated_baselines",
    "Markov": "participation_patterns",
    "ParticipationWeights": "fedau",
    "dirichlet_participation": "participation_patterns",
    "flower_client": "federated_flower",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
