"""Whether two networks lie in one basin: what is measured on the straight line between them, and on a curve.

φ(t) is a path from θ_a (t = 0) to θ_b (t = 1), and Q(t) what is measured there, smaller is better: a loss, or an error.
Where BatchNorm's statistics were trained they are to be estimated anew at each t.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError, UnsupportedSetup
from lightning_soup.evaluation.evaluator import Evaluator, Weights
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Curve", "barrier", "bezier_connectivity", "loss_barrier", "mode_connectivity"]

Measure = Callable[[Weights], float]


@dataclass(frozen=True)
class Curve:
    """What was measured on a path.

    Attributes:
        t: Where.
        q: Q(t), smaller is better.
        metric: What Q is.
        bend: c of a Bézier curve, the control point between the ends; empty for the straight line.
    """

    t: tuple[float, ...]
    q: tuple[float, ...]
    metric: str = "loss"
    bend: Mapping[str, Tensor] | None = None

    @property
    def barrier(self) -> float:
        """How far Q rises over the chord between the ends; see :func:`barrier`."""
        return barrier(self.t, self.q)

    @property
    def connectivity(self) -> float:
        """The mode connectivity; see :func:`mode_connectivity`."""
        return mode_connectivity(self.t, self.q)[0]


def barrier(t: Sequence[float], q: Sequence[float]) -> float:
    """max_t [Q(t) − (1−t)·Q(0) − t·Q(1)]: 0 where the way between two networks is no worse than they are.

    Args:
        t: From 0 to 1.
        q: Q(t).

    Raises:
        UnsupportedSetup: Fewer than two points, or they do not go from 0 to 1.
    """
    _check_path(t, q)
    return max(value - (1 - at) * q[0] - at * q[-1] for at, value in zip(t, q, strict=True))


def mode_connectivity(t: Sequence[float], q: Sequence[float]) -> tuple[float, float]:
    """The mode connectivity mc = Q̄ − Q(t*), with Q̄ = (Q(0)+Q(1))/2, t* where Q is farthest from Q̄.

    Below 0: a barrier. Above: better networks lie between, training stopped short. About 0: connected. Unequal ends
    alone give −|Q(0)−Q(1)|/2; look at t* and at the barrier.

    Args:
        t: From 0 to 1.
        q: Q(t), the training error in percent for :func:`.assign`.

    Returns:
        mc and t*.

    Raises:
        UnsupportedSetup: As of :func:`barrier`.

    Source: Yang et al., NeurIPS 2021 (arXiv 2107.11228).
    """
    _check_path(t, q)
    mean = (q[0] + q[-1]) / 2
    at = max(range(len(q)), key=lambda i: abs(q[i] - mean))
    return mean - q[at], t[at]


def _check_path(t: Sequence[float], q: Sequence[float]) -> None:
    if len(t) != len(q) or len(t) < 2 or t[0] != 0 or t[-1] != 1 or list(t) != sorted(t):
        raise UnsupportedSetup(
            f"a path is measured at {list(t)} with {len(q)} values; expected as many of both, two or more, from t = 0 "
            "to t = 1."
        )


def loss_barrier(
    a: Source | WeightsFile,
    b: Source | WeightsFile,
    evaluator: Evaluator,
    points: int = 11,
    *,
    recalibrate: bool = False,
    progress: Progress = silent,
) -> Curve:
    """Measure the straight line between two networks.

    Args:
        a: θ_a, a checkpoint.
        b: θ_b.
        evaluator: Judges weights by a metric that is minimised, ``val_loss``; one that is maximised, such as
            ``val_acc``, is taken as 1 minus it.
        points: t, evenly spread, the ends among them.
        recalibrate: Estimate BatchNorm's statistics anew at each t, ends included: where training estimated them.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: Fewer than three points.
        IncompatibleIngredients: The checkpoints differ in their tensors.
        NonFiniteScore: Q is not finite somewhere.
    """
    if points < 3:
        raise UnsupportedSetup(f"loss_barrier(points={points}): expected 3 or more, the ends and one between.")
    ends = [open_checkpoint(item).without(evaluator.ignored()) for item in (a, b)]
    return _measured(evaluator, lambda t: (ends, [1 - t, t]), points, recalibrate, progress, None)


def bezier_connectivity(
    a: Source | WeightsFile,
    b: Source | WeightsFile,
    evaluator: Evaluator,
    points: int = 5,
    *,
    epochs: int = 10,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    clip: float | None = 5.0,
    batch_size: int = 128,
    batches: Callable[[int], Iterable[Any]] | None = None,
    seed: int = 0,
    recalibrate: bool = False,
    progress: Progress = silent,
) -> Curve:
    """Bend the line between two networks until the loss on it is low, and measure it.

    φ(t) = (1−t)²·θ_a + 2t(1−t)·c + t²·θ_b. c starts in the middle, a little off it, since the straight line can be a
    saddle, and learns by SGD on the loss at φ(t), t drawn anew for each batch, at a rate that falls to a tenth. Any
    module will do: no copy of the architecture is needed, c gets 2t(1−t) times the gradient at φ(t).

    Args:
        a: θ_a, a checkpoint.
        b: θ_b.
        evaluator: Judges weights and gives gradients.
        points: Where the curve is measured, evenly spread.
        epochs: Passes over the batches.
        lr: Highest rate.
        momentum: Of SGD.
        weight_decay: Of c.
        clip: Norm of the gradient of c at most.
        batch_size: Of the evaluator's own batches.
        batches: Gives the batches of an epoch, those of training; None: the evaluator's, which are validation data.
        seed: Of t, and of the small step off the middle.
        recalibrate: As of :func:`loss_barrier`.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: A value is out of range.
        RecipeError: The evaluator gives no gradients.
        NonFiniteScore: Q is not finite somewhere.

    Source: Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018 (arXiv
    1802.10026).
    """
    if points < 3 or epochs < 0 or lr <= 0:
        raise UnsupportedSetup(
            f"bezier_connectivity(points={points}, epochs={epochs}, lr={lr}): expected 3 points or more, epochs of 0 "
            "or more, and a rate above 0."
        )
    ends = [open_checkpoint(item).without(evaluator.ignored()) for item in (a, b)]
    bend = {name: value.clone() for name, value in combine(ends, [0.5, 0.5]).items()}
    floating = [name for name, value in bend.items() if value.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    for name in floating:
        half = (ends[1][name].float() - ends[0][name].float()).norm() / 2
        noise = torch.randn(bend[name].shape, generator=generator)
        bend[name] += (0.01 * half / max(bend[name].numel(), 1) ** 0.5 * noise).to(bend[name])

    def at(t: float) -> tuple[list[Any], list[float]]:
        return [*ends, bend], [(1 - t) ** 2, t**2, 2 * t * (1 - t)]

    velocity = {name: torch.zeros_like(bend[name]) for name in floating}
    slot = evaluator.slot()
    for epoch in progress(range(epochs), "bending", epochs):
        rate = lr * (1 - 0.9 * epoch / max(epochs - 1, 1))
        for batch in batches(epoch) if batches is not None else evaluator.batches(epoch, batch_size):
            t = float(torch.rand((), generator=generator))
            sources, row = at(t)
            weights = combine(sources, row, slot)
            _, gradient = evaluator.loss_and_grad(slot or weights, batch)
            learned = {name: 2 * t * (1 - t) * gradient[name] for name in floating if name in gradient}
            if not learned:
                raise RecipeError("bezier_connectivity: the evaluator gave no gradient for any floating tensor.")
            norm = torch.stack([value.norm() for value in learned.values()]).norm()
            scale = 1.0 if clip is None else min(1.0, clip / max(float(norm), 1e-12))
            for name, value in learned.items():
                velocity[name].mul_(momentum).add_(scale * value.to(bend[name]) + weight_decay * bend[name])
                bend[name] -= rate * velocity[name]
    return _measured(evaluator, at, points, recalibrate, silent, bend)


def _measured(
    evaluator: Evaluator,
    at: Callable[[float], tuple[Sequence[Any], Sequence[float]]],
    points: int,
    recalibrate: bool,
    progress: Progress,
    bend: Mapping[str, Tensor] | None,
) -> Curve:
    slot = evaluator.slot()
    places = [i / (points - 1) for i in range(points)]
    found = []
    for t in progress(places, "path", points):
        sources, row = at(t)
        weights = combine(sources, row, slot)
        held = slot or weights
        if recalibrate:
            statistics = evaluator.recalibrate(held)
            held = slot or {**held, **statistics}
        value = evaluator.natural(evaluator.score(held))
        found.append(value if evaluator.mode == "min" else 1 - value)
    metric = evaluator.metric if evaluator.mode == "min" else f"1 − {evaluator.metric}"
    return Curve(tuple(places), tuple(found), metric, bend)
