"""Replicas of a model on several processes, and the arithmetic of averaging between them."""

from lightning_soup.distributed.replicas import ReplicaStrategy as ReplicaStrategy
from lightning_soup.distributed.simulation import SimulatedReplicas as SimulatedReplicas
