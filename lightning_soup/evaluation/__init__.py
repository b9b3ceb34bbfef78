"""Judging weights: evaluators, per-sample outcomes, and whether a difference is more than noise.

``ModuleEvaluator`` and ``cross_evaluate`` are imported when first asked for, since they need Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_soup.evaluation.evaluator import Evaluator as Evaluator
from lightning_soup.evaluation.outcomes import Outcome as Outcome
from lightning_soup.evaluation.robustness import Robustness as Robustness
from lightning_soup.evaluation.significance import Interval as Interval
from lightning_soup.evaluation.significance import paired_bootstrap as paired_bootstrap

if TYPE_CHECKING:
    from lightning_soup.evaluation.cross_evaluation import CrossEvaluation as CrossEvaluation
    from lightning_soup.evaluation.cross_evaluation import cross_evaluate as cross_evaluate
    from lightning_soup.evaluation.module_evaluator import ModuleEvaluator as ModuleEvaluator

_HOME = {
    "CrossEvaluation": "cross_evaluation",
    "ModuleEvaluator": "module_evaluator",
    "cross_evaluate": "cross_evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
