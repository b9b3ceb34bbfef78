"""Phases of training: from loss, curvature, connectivity and similarity of the seeds of one setting.

I: underfitted and too small. II: underfitted. III: too small. IV-A: overfitted. IV-B: generalising.

Source: Yang et al., Taxonomizing local versus global structure in neural network loss landscapes, NeurIPS 2021 (arXiv
2107.11228); Schürholt et al., A Model Zoo on Phase Transitions in Neural Networks (arXiv 2504.18072). Both draw the
borders by eye; here they are numbers that are given, and travel with the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_soup.errors import UnsupportedSetup

__all__ = ["Cell", "Phase", "Thresholds", "assign", "calibrate"]

Phase = Literal["I", "II", "III", "IV-A", "IV-B", "undetermined"]


@dataclass(frozen=True)
class Cell:
    """What was measured of the networks of one setting, means over its seeds.

    Attributes:
        train_loss: Mean loss on training data.
        trace: tr H of the training loss.
        mc: Mode connectivity: Q̄ − Q(t*) of the training error in percent; see :func:`.mode_connectivity`.
        cka: Similarity of the seeds' outputs; needed in the last branch only.
        seeds: How many there are.
        train_accuracy: In percent; None: not known.
        majority: Share of the most common class in the training data, in percent.
    """

    train_loss: float
    trace: float
    mc: float
    cka: float = math.nan
    seeds: int = 2
    train_accuracy: float | None = None
    majority: float | None = None


@dataclass(frozen=True)
class Thresholds:
    """Where the borders are. The defaults give back the published figure of Yang et al.'s grid, and fit nothing else.

    Args:
        mc: Points of training error within which two networks count as connected.
        trace: A larger trace is sharp.
        loss: A larger training loss is sharp, with ``sharp_by="loss"``.
        similar: A CKA from which the networks count as alike. This border is soft: show the CKA beside the phase.
        sharp_by: What decides.

    Raises:
        UnsupportedSetup: A value is no finite number, or ``mc`` is below 0.
    """

    mc: float = 2.0
    trace: float = 400.0
    loss: float = 0.05
    similar: float = 0.7
    sharp_by: Literal["trace", "loss"] = "trace"

    def __post_init__(self) -> None:
        numbers = (self.mc, self.trace, self.loss, self.similar)
        known = all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
        if not known or self.mc < 0 or self.sharp_by not in ("trace", "loss"):
            raise UnsupportedSetup(f"{self}: expected finite numbers, mc of 0 or more, and sharp_by 'trace' or 'loss'.")


def assign(cell: Cell, thresholds: Thresholds | None = None) -> Phase:
    """The phase of a setting.

    ``undetermined`` where a figure that is needed is not finite, there is one seed only, or the networks predict a
    single class: they look flat and connected, though nothing was learned.

    Args:
        cell: What was measured.
        thresholds: Where the borders are.
    """
    at = thresholds or Thresholds()
    sharpness = cell.trace if at.sharp_by == "trace" else cell.train_loss
    if not all(map(math.isfinite, (cell.train_loss, sharpness, cell.mc))) or cell.seeds < 2:
        return "undetermined"
    known = cell.train_accuracy is not None and cell.majority is not None
    if known and abs(cell.train_accuracy - cell.majority) <= 1:
        return "undetermined"
    sharp = sharpness > (at.trace if at.sharp_by == "trace" else at.loss)
    if cell.mc < -at.mc:
        return "I" if sharp else "III"
    if cell.mc > at.mc or sharp:
        return "II"
    if not math.isfinite(cell.cka):
        return "undetermined"
    return "IV-B" if cell.cka >= at.similar else "IV-A"


def calibrate(cells: Sequence[Cell], mc: float = 2.0) -> Thresholds:
    """Propose thresholds for a grid of one's own: Otsu's border on log tr H, and the median CKA of connected settings.

    Show them beside the phases: they are a choice.

    Args:
        cells: The settings of one architecture.
        mc: Points of training error within which two networks count as connected.

    Raises:
        UnsupportedSetup: Fewer than four settings with a positive trace, which have no border to find.
    """
    logs = sorted(math.log(cell.trace) for cell in cells if math.isfinite(cell.trace) and cell.trace > 0)
    if len(logs) < 4:
        raise UnsupportedSetup(
            f"calibrate: {len(logs)} of {len(cells)} settings have a positive trace; expected four or more."
        )
    values = torch.tensor(logs, dtype=torch.float64)

    def between(cut: int) -> float:
        low, high = values[:cut], values[cut:]
        return len(low) * len(high) * float((low.mean() - high.mean()) ** 2)

    best = max(range(1, len(logs)), key=between)
    trace = math.exp((logs[best - 1] + logs[best]) / 2)
    smooth = [cell for cell in cells if abs(cell.mc) <= mc and cell.trace <= trace and math.isfinite(cell.cka)]
    similar = float(torch.tensor([cell.cka for cell in smooth], dtype=torch.float64).median()) if smooth else 0.7
    return Thresholds(mc=mc, trace=trace, similar=similar)
