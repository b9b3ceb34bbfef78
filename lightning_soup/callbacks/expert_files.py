"""Checkpoints of models with experts: the plain model beside them, or alone in files of weights only."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_soup.callbacks.weights_only import WeightsOnlyFiles
from lightning_soup.layers.conversion import dense_state, experts_of
from lightning_soup.weights.formats import DENSE_KEY

EXPERTS_KEY = "experts"


def note(checkpoint: dict[str, Any], layers: list[str], num_experts: int) -> None:
    """Write down where a checkpoint has experts."""
    if layers:
        checkpoint[EXPERTS_KEY] = {"layers": layers, "num_experts": num_experts}


def add_dense(checkpoint: dict[str, Any]) -> None:
    """Write the plain model of a checkpoint with experts: beside its weights, or instead where nothing else is there.

    Called again after the weights were exchanged for an average, whichever callback comes first.
    """
    record = checkpoint.get(EXPERTS_KEY)
    if record is None:
        return
    key = DENSE_KEY if "callbacks" in checkpoint else "state_dict"
    checkpoint[key] = dense_state(checkpoint["state_dict"], record["layers"])


class PlainOnly(WeightsOnlyFiles):
    """Writes the plain model instead of experts."""

    def __init__(self, inner: Any, owner: object, module: LightningModule) -> None:
        super().__init__(inner, owner)
        self.module = module

    def changed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The same without experts."""
        layers = experts_of(self.module)
        if not layers:
            return checkpoint
        checkpoint = dict(checkpoint)
        note(checkpoint, list(layers), len(next(iter(layers.values())).experts))
        add_dense(checkpoint)
        return checkpoint


def follow(trainer: Trainer, owner: object, module: LightningModule) -> None:
    """From now on files of weights only hold the plain model."""
    trainer.strategy.checkpoint_io = PlainOnly(trainer.strategy.checkpoint_io, owner, module)
