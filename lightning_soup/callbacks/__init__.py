"""Callbacks: averaging during fit, one file per method."""

from lightning_soup.callbacks.averages import EqualAverage as EqualAverage
from lightning_soup.callbacks.averages import ExponentialAverage as ExponentialAverage
from lightning_soup.callbacks.averages import LatestAverage as LatestAverage
from lightning_soup.callbacks.averages import WeightEnsemble as WeightEnsemble
from lightning_soup.callbacks.checkpoint_trail import CheckpointTrail as CheckpointTrail
from lightning_soup.callbacks.ensemble_weights import LearnableEnsembleWeights as LearnableEnsembleWeights
from lightning_soup.callbacks.experts_averaging import ExpertsWeightAveraging as ExpertsWeightAveraging
from lightning_soup.callbacks.gossip_averaging import GossipAveraging as GossipAveraging
from lightning_soup.callbacks.landscape_monitor import LandscapeMonitor as LandscapeMonitor
from lightning_soup.callbacks.live_average import LiveAverage as LiveAverage
from lightning_soup.callbacks.metrics_weighted_averaging import MetricsWeightedAveraging as MetricsWeightedAveraging
from lightning_soup.callbacks.model_soup import ModelSoup as ModelSoup
from lightning_soup.callbacks.noloco import DiLoCo as DiLoCo
from lightning_soup.callbacks.noloco import NoLoCo as NoLoCo
from lightning_soup.callbacks.sparse_soup import SparseModelSoup as SparseModelSoup
from lightning_soup.callbacks.sparsity_mask import SparsityMask as SparsityMask
