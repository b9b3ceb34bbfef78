"""Judging weights: evaluators, per-sample outcomes, and whether a difference is more than noise.

``ModuleEvaluator`` is imported when first asked for, since it needs Lightning.
"""

from typing import TYPE_CHECKING, Any

from lightning_soup.evaluation.evaluator import Evaluator as Evaluator
from lightning_soup.evaluation.outcomes import Outcome as Outcome
from lightning_soup.evaluation.robustness import Robustness as Robustness
from lightning_soup.evaluation.significance import Interval as Interval
from lightning_soup.evaluation.significance import paired_bootstrap as paired_bootstrap

if TYPE_CHECKING:
    from lightning_soup.evaluation.module_evaluator import ModuleEvaluator as ModuleEvaluator


def __getattr__(name: str) -> Any:
    if name == "ModuleEvaluator":
        from lightning_soup.evaluation.module_evaluator import ModuleEvaluator

        return ModuleEvaluator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
