"""Files that Lightning fills without asking callbacks (``save_weights_only=True``): what callbacks do about them."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO


class WeightsOnlyFiles(_WrappingCheckpointIO):
    """Stands between a Trainer and its way of writing, and changes what goes into files of weights only.

    Several stand one in another: whatever their order, the file must come out right.

    Args:
        inner: The way of writing.
        owner: The callback that it belongs to.
    """

    def __init__(self, inner: Any, owner: object) -> None:
        super().__init__(inner)
        self.inner, self.owner = inner, owner

    @abstractmethod
    def changed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What to write instead of a checkpoint without callbacks; it is the caller's, and is not changed itself."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, changed if callbacks were not asked."""
        if "callbacks" not in checkpoint:
            checkpoint = self.changed(checkpoint)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def teardown(self) -> None:
        """Let the inner one finish what it is writing."""
        self.inner.teardown()


def take_off(trainer: Trainer, owner: object) -> None:
    """Take what a callback put around the Trainer's way of writing off again, wherever it stands."""
    outer, writer = None, trainer.strategy.checkpoint_io
    while isinstance(writer, WeightsOnlyFiles):
        if writer.owner is not owner:
            outer, writer = writer, writer.inner
            continue
        if outer is None:
            trainer.strategy.checkpoint_io = writer.inner
        else:
            outer.inner = outer._checkpoint_io = writer.inner
        writer = writer.inner
