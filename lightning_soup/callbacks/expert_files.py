"""Checkpoints of models with experts: the plain model beside them, or alone in files of weights only."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

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


class PlainOnly(_WrappingCheckpointIO):
    """Writes the plain model into files that Lightning fills without asking callbacks (``save_weights_only=True``)."""

    def __init__(self, inner: Any, module: LightningModule) -> None:
        super().__init__(inner)
        self.inner, self.module = inner, module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Convert files without callbacks."""
        layers = experts_of(self.module)
        if "callbacks" not in checkpoint and layers:
            checkpoint = dict(checkpoint)
            note(checkpoint, list(layers), len(next(iter(layers.values())).experts))
            add_dense(checkpoint)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def teardown(self) -> None:
        """Let the inner one finish what it is writing."""
        self.inner.teardown()


def follow(trainer: Trainer, module: LightningModule) -> None:
    """From now on files of weights only hold the plain model."""
    trainer.strategy.checkpoint_io = PlainOnly(trainer.strategy.checkpoint_io, module)


def unfollow(trainer: Trainer) -> None:
    """Give the Trainer its own way of writing back."""
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, PlainOnly):
        trainer.strategy.checkpoint_io = writer.inner
