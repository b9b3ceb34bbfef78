"""lightning_soup: weight averaging for PyTorch Lightning, during training and after it.

Importing the package is light: each name below is imported when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "lightning_soup.callbacks": (
        "CheckpointTrail",
        "DiLoCo",
        "EqualAverage",
        "ExpertsWeightAveraging",
        "ExponentialAverage",
        "GossipAveraging",
        "LandscapeMonitor",
        "LatestAverage",
        "LearnableEnsembleWeights",
        "LiveAverage",
        "MetricsWeightedAveraging",
        "ModelSoup",
        "NoLoCo",
        "SparseModelSoup",
        "SparsityMask",
        "WeightEnsemble",
    ),
    "lightning_soup.cli": ("SoupTrainer",),
    "lightning_soup.data": (
        "CrowdDataModule",
        "DigitStyleReference",
        "DigitStylesDataModule",
        "HandwritingDataModule",
        "ImageFolderDataModule",
        "PromptDataModule",
        "ReferenceFiles",
        "SimulatedCrowd",
        "TextDataModule",
        "TorchvisionDataModule",
        "Votes",
        "read_votes",
        "soft_labels",
    ),
    "lightning_soup.distributed": (
        "FedAU",
        "FederatedSimulation",
        "ParticipationWeights",
        "ReplicaStrategy",
        "SimulatedReplicas",
    ),
    "lightning_soup.evaluation": (
        "Evaluator",
        "ModuleEvaluator",
        "Outcome",
        "Resolution",
        "ResolutionSearch",
        "Robustness",
        "cross_evaluate",
        "label_quality",
        "measure_calibration",
        "paired_bootstrap",
        "smart_resize",
    ),
    "lightning_soup.landscape": (
        "Objective",
        "bezier_connectivity",
        "cka",
        "hessian_top_eigenvalues",
        "hessian_trace",
        "loss_barrier",
        "weight_statistics",
    ),
    "lightning_soup.layers": ("convert_to_dense", "use_experts"),
    "lightning_soup.modules": (
        "AwareNet",
        "CLIPClassifier",
        "CausalLM",
        "Family",
        "ImageClassifier",
        "L2SP",
        "LoRA",
        "ReferenceKL",
        "RewardModel",
        "SalsaPPO",
        "SoupReference",
        "ZSCL",
        "kl_to_reference",
    ),
    "lightning_soup.recipes": (
        "AdaptiveSoup",
        "EvolutionarySoup",
        "GreedySoup",
        "Ingredient",
        "InterpolatedSoup",
        "LearnedSoup",
        "LengthAverage",
        "MetricsWeightedSoup",
        "Recipe",
        "Soup",
        "UniformSoup",
        "VarianceCorrectedSoup",
        "gather_ingredients",
        "recook",
    ),
    "lightning_soup.weights": ("WeightsFile", "check_compatible", "combine", "open_checkpoint", "save_weights"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
