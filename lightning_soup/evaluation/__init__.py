"""Judging weights: evaluators, per-sample outcomes, and whether a difference is more than noise.

Some names are imported when they are first used, since they need Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_soup.evaluation.evaluator import Evaluator as Evaluator
from lightning_soup.evaluation.outcomes import Outcome as Outcome
from lightning_soup.evaluation.robustness import Robustness as Robustness
from lightning_soup.evaluation.significance import Interval as Interval
from lightning_soup.evaluation.significance import paired_bootstrap as paired_bootstrap

if TYPE_CHECKING:
    from lightning_soup.evaluation.calibration import Calibration as Calibration
    from lightning_soup.evaluation.calibration import LabelQuality as LabelQuality
    from lightning_soup.evaluation.calibration import label_quality as label_quality
    from lightning_soup.evaluation.calibration import measure_calibration as measure_calibration
    from lightning_soup.evaluation.calibration import nll_weights as nll_weights
    from lightning_soup.evaluation.cross_evaluation import CrossEvaluation as CrossEvaluation
    from lightning_soup.evaluation.cross_evaluation import cross_evaluate as cross_evaluate
    from lightning_soup.evaluation.image_sizes import smart_resize as smart_resize
    from lightning_soup.evaluation.module_evaluator import ModuleEvaluator as ModuleEvaluator
    from lightning_soup.evaluation.resolution import ResolutionSearch as ResolutionSearch
    from lightning_soup.evaluation.resolution_table import Resolution as Resolution

_HOME = {
    "Calibration": "calibration",
    "CrossEvaluation": "cross_evaluation",
    "LabelQuality": "calibration",
    "ModuleEvaluator": "module_evaluator",
    "Resolution": "resolution_table",
    "ResolutionSearch": "resolution",
    "cross_evaluate": "cross_evaluation",
    "label_quality": "calibration",
    "measure_calibration": "calibration",
    "nll_weights": "calibration",
    "smart_resize": "image_sizes",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
