"""Checkpoints of models with experts: every loader finds the plain model, and training resumes from the experts.

The layout is that of averages (:mod:`.average_files`): ``state_dict`` holds what validation scored, which is the plain
model, and ``current_model_state`` what is trained, which has the experts.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_soup.callbacks.weights_only import WeightsOnlyFiles
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.conversion import convert_to_dense, dense_state, experts_of
from lightning_soup.weights.formats import EXPERTS_KEY, LIVE_KEY


def note(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Write down where a checkpoint has experts."""
    layers = experts_of(module)
    if layers:
        count = len(next(iter(layers.values())).experts)
        checkpoint[EXPERTS_KEY] = {"layers": list(layers), "num_experts": count}


def add_dense(checkpoint: dict[str, Any]) -> None:
    """Write the plain model into a file of weights only.

    Called again after the weights were exchanged for an average, whichever callback comes first. Other files are put in
    order when all callbacks have added to them (:func:`plain_first`).
    """
    record = checkpoint.get(EXPERTS_KEY)
    if record is not None and "callbacks" not in checkpoint:
        checkpoint["state_dict"] = dense_state(checkpoint["state_dict"], record["layers"])


def plain_first(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with the plain model under ``state_dict``, and what is trained under ``current_model_state``.

    The averages that live averages hold for :func:`.open_checkpoint` become those of the plain model, too; what they
    resume from stays.
    """
    layers = checkpoint[EXPERTS_KEY]["layers"]
    return {
        **checkpoint,
        "state_dict": dense_state(checkpoint["state_dict"], layers),
        LIVE_KEY: checkpoint.get(LIVE_KEY, checkpoint["state_dict"]),
        "callbacks": {
            key: {**state, "average": dense_state(state["average"], layers)} if _holds_average(state) else state
            for key, state in checkpoint["callbacks"].items()
        },
    }


def plain_averages(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The averages of a checkpoint as if the plain model had been trained: what they resume from is of it, too."""
    layers = checkpoint[EXPERTS_KEY]["layers"]
    return {
        "state_dict": dense_state(checkpoint["state_dict"], layers),
        "callbacks": {
            key: {**state, "groups": [_plain_group(group, layers) for group in state["groups"]]}
            for key, state in checkpoint["callbacks"].items()
        },
    }


def _holds_average(state: Any) -> bool:
    return isinstance(state, dict) and "average" in state and "groups" in state


def _plain_group(group: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """The samples of an average: those of the plain model are the means over experts, for averaging is linear."""
    found = dict(group)
    if "mean" in group:
        found["mean"] = dense_state(group["mean"], layers)
    if "samples" in group:
        found["samples"] = [dense_state(sample, layers) for sample in group["samples"]]
    return found


def restore_experts(module: LightningModule, checkpoint: Mapping[str, Any], layers: object) -> None:
    """Resume: give a module, whose experts were given the plain weights, those that were being trained.

    Args:
        module: The module, with experts.
        checkpoint: What was loaded.
        layers: The option of the callback, for the message.

    Raises:
        UnsupportedSetup: The checkpoint has experts elsewhere, or another number.
    """
    record = checkpoint.get(EXPERTS_KEY)
    if record is None:
        return
    found = experts_of(module)
    if list(found) != record["layers"]:
        raise UnsupportedSetup(
            f"the checkpoint has experts at {', '.join(record['layers'])}, but layers={layers!r} puts them at "
            f"{', '.join(found) or 'no place'}. Resume with the layers of the first time."
        )
    for name, part in found.items():
        if len(part.experts) != record["num_experts"]:
            raise UnsupportedSetup(
                f"{name} has {len(part.experts)} experts, but those of the checkpoint are {record['num_experts']}. "
                f"Resume with num_experts={record['num_experts']}; or begin a training from its plain model: load "
                "the weights into the module, and give no ckpt_path."
            )
    missing = module.load_state_dict(checkpoint[LIVE_KEY], strict=False).missing_keys
    if lost := [name for name in missing if ".experts." in name]:
        raise UnsupportedSetup(f"the checkpoint lacks {lost[0]}, which training would go on from. It is damaged.")


class PlainFirst(WeightsOnlyFiles):
    """Puts files in order: the plain model where every loader looks for weights.

    Args:
        inner: The way of writing.
        owner: The callback that it belongs to.
        trainer: The Trainer.
        module: The module.
    """

    def __init__(self, inner: Any, owner: object, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(inner, owner)
        self.trainer, self.module = trainer, module

    def changed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The plain model alone."""
        checkpoint = dict(checkpoint)
        note(checkpoint, self.module)
        add_dense(checkpoint)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write; here every callback, and the module, has added what it has."""
        if "callbacks" in checkpoint and EXPERTS_KEY in checkpoint:
            checkpoint = plain_first(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)

    def teardown(self) -> None:
        """Make the module plain after a failure, too: nothing else is called after the files that are written of it."""
        super().teardown()
        if self.trainer.state.status == TrainerStatus.INTERRUPTED:
            convert_to_dense(self.module)


def follow(trainer: Trainer, owner: object, module: LightningModule) -> None:
    """From now on files hold the plain model where loaders look, and a fit that fails leaves it."""
    trainer.strategy.checkpoint_io = PlainFirst(trainer.strategy.checkpoint_io, owner, trainer, module)
