"""Loss landscapes: connectivity, curvature, similarity of outputs, and the phases that they tell.

Names that need Lightning are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_soup.landscape.phases import Cell as Cell
from lightning_soup.landscape.phases import Thresholds as Thresholds
from lightning_soup.landscape.phases import assign as assign
from lightning_soup.landscape.phases import calibrate as calibrate
from lightning_soup.landscape.similarity import MinibatchCKA as MinibatchCKA
from lightning_soup.landscape.similarity import cka as cka
from lightning_soup.landscape.weight_statistics import weight_statistics as weight_statistics

if TYPE_CHECKING:
    from lightning_soup.landscape.connectivity import Curve as Curve
    from lightning_soup.landscape.connectivity import barrier as barrier
    from lightning_soup.landscape.connectivity import bezier_connectivity as bezier_connectivity
    from lightning_soup.landscape.connectivity import loss_barrier as loss_barrier
    from lightning_soup.landscape.connectivity import mode_connectivity as mode_connectivity
    from lightning_soup.landscape.curvature import hessian_top_eigenvalues as hessian_top_eigenvalues
    from lightning_soup.landscape.curvature import hessian_trace as hessian_trace
    from lightning_soup.landscape.objective import Objective as Objective

_HOME = {
    "Curve": "connectivity",
    "Objective": "objective",
    "barrier": "connectivity",
    "bezier_connectivity": "connectivity",
    "hessian_top_eigenvalues": "curvature",
    "hessian_trace": "curvature",
    "loss_barrier": "connectivity",
    "mode_connectivity": "connectivity",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
