"""The end of a training with experts: the module becomes plain, and so do the averages of it."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_soup.callbacks.expert_files import note, plain_averages
from lightning_soup.callbacks.live_average import LiveAverage
from lightning_soup.layers.conversion import convert_to_dense


def convert_with_averages(trainer: Trainer, module: LightningModule) -> None:
    """Give a module its plain networks, and let its live averages go on as averages of the plain module.

    An average of experts is one of the plain model: both are linear. It goes through what a checkpoint would hold of
    it, so that tests, files and ``leave`` are as after a training without experts.
    """
    averages = [callback for callback in trainer.callbacks if isinstance(callback, LiveAverage) and callback.samples]
    for average in averages:
        average._average.put_back()  # before any is read: each would take another's average for the live weights
    states = [_state_of(average, trainer, module) for average in averages]
    convert_to_dense(module)
    for average, state in zip(averages, states, strict=True):
        average.setup(trainer, module, "fit")
        average.on_load_checkpoint(trainer, module, state)
        average.on_fit_start(trainer, module)
    for average in averages:
        average.on_train_end(trainer, module)


def _state_of(average: LiveAverage, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What a checkpoint would hold of an average, had the plain model been trained.

    Of the weights beside it only buffers are kept, which may have statistics of its own: an average does not exchange
    storage that somebody else refers to.
    """
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "callbacks": {}}
    average.on_save_checkpoint(trainer, module, checkpoint)
    note(checkpoint, module)
    plain = plain_averages(checkpoint)
    buffers = {name for name, _ in module.named_buffers()}
    plain["state_dict"] = {name: value.clone() for name, value in plain["state_dict"].items() if name in buffers}
    return plain
