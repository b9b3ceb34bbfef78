"""Checkpoints of models with experts: the plain model beside them, or alone in files of weights only."""

import re
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

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


def to_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a plain model load the weights of one with experts (``test(ckpt_path="best")``); a hook of its loading."""
    own = {name.replace("_orig_mod.", "") for name in module.state_dict()}
    found = dict.fromkeys(
        match[1]
        for match in map(re.compile(r"(.+?)\.experts\.\d+\.(.+)").fullmatch, state)
        if match and match[0] not in own and f"{match[1]}.{match[2]}" in own
    )
    if found:
        plain = dense_state(state, list(found))
        state.clear()
        state.update(plain)


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
