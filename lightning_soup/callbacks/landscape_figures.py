"""What a running fit is told of its loss landscape: measured on copies, so that training does not notice."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_soup.callbacks.fit_batches import Data, batches_of_fit
from lightning_soup.callbacks.recalibration import metrics_untouched
from lightning_soup.callbacks.selected_tensors import saved_buffers, trainable
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.landscape.curvature import hessian_top_eigenvalues, hessian_trace
from lightning_soup.landscape.objective import Objective
from lightning_soup.landscape.wide_copy import on_wide_copies

_MIN_PROBES = 10  # for a standard error that means something


@dataclass(frozen=True)
class LossFigures:
    """How the loss and its Hessian are measured; the arguments are those of :class:`.LandscapeMonitor`.

    Args:
        owner: Name for messages.
        figures: Those of ``lambda_max``, ``trace`` that are wanted; the loss is measured in any case.
        max_steps: For ``lambda_max``.
        tolerance: For ``lambda_max``.
        max_probes: For ``trace``.
        trace_tolerance: For ``trace``.
        keep_graph: See :class:`.Objective`.
        seed: Of the vectors.
    """

    owner: str
    figures: tuple[str, ...]
    max_steps: int
    tolerance: float
    max_probes: int
    trace_tolerance: float
    keep_graph: bool
    seed: int

    def draw(self, trainer: Trainer, data: Data, count: int) -> list[Any]:
        """The first batches of a loader, the same whenever they are drawn.

        Raises:
            UnsupportedSetup: There are none.
        """
        with isolate_rng(), closing(batches_of_fit(trainer, data, self.seed)) as given:
            found = list(islice(given, count))
        if not found:
            raise UnsupportedSetup(
                f"{self.owner}(data={data!r}): the {data}_dataloader gave no batch. Give it data, or measure on the "
                "other one."
            )
        return found

    def check(self, trainer: Trainer, module: LightningModule, batches: Sequence[Any]) -> None:
        """Try the loss of a batch.

        Raises:
            UnsupportedSetup: ``validation_step`` returns none, or gathers from other ranks.
        """
        with self._undisturbed(trainer, module):
            self._objective(trainer, module, batches[:1]).value()

    def measure(
        self, trainer: Trainer, module: LightningModule, batches: Sequence[Any], before: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Measure at the weights that the module holds, on one rank.

        Args:
            trainer: The Trainer, in ``fit``.
            module: Its module.
            batches: To measure on.
            before: Other weights, as :func:`movable` names them; none: no ``middle`` is measured.

        Returns:
            ``loss``, the figures and their errors, and the loss in the ``middle`` to other weights. NaN where the loss
            is not finite.
        """
        with self._undisturbed(trainer, module) as copies:
            objective = self._objective(trainer, module, batches)
            found = {"loss": objective.value()}
            if "lambda_max" in self.figures:
                found["lambda_max"], found["lambda_max_error"] = self._finite(lambda: self._top(objective))
            if "trace" in self.figures:
                found["trace"], found["trace_error"] = self._finite(lambda: self._trace(objective))
            if before:
                objective.moved()
                with torch.no_grad():
                    for name, value in before.items():
                        if name in copies:
                            copies[name].lerp_(value.to(copies[name]), 0.5)
                found["middle"] = objective.value()
        return found

    def _objective(self, trainer: Trainer, module: LightningModule, batches: Sequence[Any]) -> Objective:
        double = isinstance(trainer.precision_plugin, DoublePrecision)
        return Objective.of_module(
            module,
            batches,
            trainer.datamodule,
            device=trainer.strategy.root_device,
            precision=trainer.precision_plugin if double else None,
            keep_graph=self.keep_graph,
        )

    def _top(self, objective: Objective) -> tuple[float, float]:
        found = hessian_top_eigenvalues(objective, max_steps=self.max_steps, tolerance=self.tolerance, seed=self.seed)
        return found.values[0], found.errors[0]

    def _trace(self, objective: Objective) -> tuple[float, float]:
        found = hessian_trace(
            objective,
            max_probes=self.max_probes,
            min_probes=min(_MIN_PROBES, self.max_probes),
            tolerance=self.trace_tolerance,
            seed=self.seed,
        )
        return found.value, found.error

    def _finite(self, work: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        try:
            return work()
        except NonFiniteWeights as error:
            rank_zero_warn(f"{self.owner}: logs NaN, as nothing else can be told. {error}")
            return math.nan, math.nan

    @contextmanager
    def _undisturbed(self, trainer: Trainer, module: LightningModule) -> Iterator[dict[str, Tensor]]:
        """The module on copies, as in validation, without autocast; all else is as it was afterwards."""
        stage, device = trainer.state.stage, trainer.strategy.root_device.type
        gather = module.__dict__.get("all_gather")
        try:
            trainer.validating = True  # transfer hooks may augment batches of training
            if trainer.world_size > 1:
                module.__dict__["all_gather"] = self._alone
            with (
                isolate_rng(),
                metrics_untouched(module),
                torch.autocast(device, enabled=False),
                on_wide_copies(module) as copies,
            ):
                yield copies
        finally:
            trainer.state.stage = stage
            module.__dict__.pop("all_gather", None)
            if gather is not None:
                module.__dict__["all_gather"] = gather

    def _alone(self, *_: Any, **__: Any) -> None:
        raise UnsupportedSetup(
            f"{self.owner} measures on rank 0 alone, but validation_step gathers from all ranks (self.all_gather), who "
            "would never answer. Measure after training, on one device: hessian_top_eigenvalues of a checkpoint."
        )


def movable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, and the floating buffers of the weights, by name."""
    found = {slot.name: slot.tensor.detach() for slot in trainable(module)}
    buffers = {name.replace("_orig_mod.", ""): value for name, value in saved_buffers(module).items()}
    return found | {name: value for name, value in buffers.items() if value.is_floating_point()}


def norm(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> float:
    """‖θ‖₂; or ‖θ − θ_0‖₂ over the tensors that the start has too, NaN where there are none. Summed up in float64."""
    total, known = 0.0, tensors if start is None else start
    names = [name for name, value in tensors.items() if name in known and known[name].shape == value.shape]
    for name in names:
        value = tensors[name].cpu().double()
        total += float((value if start is None else value - start[name].double()).square().sum())
    return math.sqrt(total) if names else math.nan
