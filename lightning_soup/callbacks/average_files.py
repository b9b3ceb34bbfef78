"""Averages in checkpoints: what is written, how training resumes from it, and files with weights only.

The layout is that of Lightning's averaging callbacks, so that each opens the other's files: ``state_dict`` holds what
validation scored and ``current_model_state`` the live weights. Everything is tensors and plain values, which the safe
loader admits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_soup.callbacks.averaged_tensors import Group, Slot
from lightning_soup.callbacks.expert_files import add_dense
from lightning_soup.callbacks.shadow import new_shadow
from lightning_soup.callbacks.weights_only import WeightsOnlyFiles
from lightning_soup.errors import IncompatibleIngredients, UnsupportedSetup
from lightning_soup.weights.formats import LIVE_KEY
from lightning_soup.weights.weights_file import clean_names

if TYPE_CHECKING:
    from lightning_soup.callbacks.average_of_module import AverageOfModule
    from lightning_soup.callbacks.live_average import LiveAverage

_LIGHTNING_KEY = "averaging_state"  # of Lightning's averaging callbacks


# --------------------------------------------------------------------------------------------------------------- saving


def save(average: "AverageOfModule", trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Write the halves of a checkpoint and the state of the average. All ranks take part.

    Args:
        average: The average; the module may hold it or the live weights.
        trainer: The Trainer.
        checkpoint: What Lightning is about to write.
    """
    rule = average.rule
    if average.outdated:
        return  # the module was given other weights after its fit: the file is about those
    if average.samples > 0:
        average.share_buffers(trainer)
        if rule.evaluated or average.left:
            held, other = checkpoint["state_dict"], _other_half(average, trainer)
            scored, live = (held, other) if average.placed else (other, held)
            checkpoint["state_dict"] = scored
            checkpoint[LIVE_KEY] = _whole_state(live, trainer)
            checkpoint[_LIGHTNING_KEY] = {"n_averaged": torch.tensor(average.samples)}
    checkpoint["callbacks"][rule.state_key] = {
        "format": 1,
        "rule": type(rule).__name__,
        "name": rule.name,
        "samples": average.samples,
        "groups": [_group_state(group) for group in average.groups],
        "average": {slot.name: _whole(mean, slot) for group in average.ready for slot, _, mean in group.pairs()},
    }


def _other_half(average: "AverageOfModule", trainer: Trainer) -> dict[str, Any]:
    """The module's state with the average in it, or without it: what it does not hold now."""
    was_left, copied = average.left, _copied_memory(average)  # which putting back forgets
    if average.placed:
        average.put_back()
    else:
        average.place(trainer, briefly=True)
    try:
        state = trainer.strategy.lightning_module_state_dict()
        copied |= _copied_memory(average)
        if copied or isinstance(trainer.strategy, ModelParallelStrategy):
            # Their memory is about to hold the other half again. Exchanged tensors keep theirs.
            state = {name: _clone(value, copied) for name, value in state.items()}
    finally:
        if average.placed:
            average.put_back()
        else:
            average.place(trainer, briefly=True, again=True)
            if was_left:
                average.leave()
    return state


def _copied_memory(average: "AverageOfModule") -> set[int]:
    """The addresses into which both halves are copied in turn, as far as the average stands in the module."""
    slots = (slot for group in average.groups for slot in group.copied_slots)
    return {slot.local.data_ptr() for slot in slots} | average.statistics_memory()


def _clone(value: Any, memory: set[int]) -> Any:
    if isinstance(value, DTensor):
        return value.clone()
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() in memory else value


def _group_state(group: Group) -> dict[str, Any]:
    state: dict[str, Any] = {name: getattr(group, name) for name in Group.COUNTERS}
    state["optimizer"] = group.optimizer
    samples = group.shadow.state() if group.absorbed else []
    if len(samples) > 1 or (samples and samples[0] is not group.shadow.tensors):
        state["samples"] = [
            {slot.name: _whole(value, slot) for slot, value in zip(group.slots, sample, strict=True)}
            for sample in samples
        ]
    elif samples:
        state["mean"] = {slot.name: _whole(mean, slot) for slot, _, mean in group.pairs()}
    return state


def _whole(value: Tensor, slot: Slot) -> Tensor:
    """A full tensor out of the shards that its slot says; on ranks that do not write, something empty."""
    like = slot.tensor
    if not isinstance(like, DTensor):
        return value.detach()
    # Shape and stride have to be given: guessed from shards of different sizes they are wrong, and ranks hang.
    sharded = DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return _gathered(sharded)


def _gathered(sharded: DTensor) -> Tensor:
    whole = sharded.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)


def _whole_state(state: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Live weights as full tensors: beside sharded weights, Lightning writes everything else from rank 0."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return dict(state)
    return {name: _gathered(value) if isinstance(value, DTensor) else value for name, value in state.items()}


# -------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """What a checkpoint holds for an average, kept until the module is on its device and in its type.

    Attributes:
        live: The live weights, or None where ``state_dict`` holds them.
        groups: Counters and tensors of each group.
        average: The state dict of the average: for its BatchNorm statistics.
        theirs: Whether it is of Lightning's averaging callbacks, which average frozen parameters, too.
    """

    live: Mapping[str, Tensor] | None
    groups: list[dict[str, Any]]
    average: Mapping[str, Tensor]
    theirs: bool = False

    def restore_live(self, module: LightningModule) -> None:
        """Give the module the live weights; ``state_dict``, which it was given, may hold the average."""
        if self.live is None:
            return
        own = module.state_dict()
        if not any(isinstance(value, DTensor) for value in own.values()):
            module.load_state_dict(self.live, strict=module.strict_loading)
            return
        with torch.no_grad():
            for name, value in own.items():
                if name in self.live:
                    shard_like(self.live[name], value, copy=True)
                elif module.strict_loading:
                    raise IncompatibleIngredients(f"the checkpoint's live weights lack {name!r}.")

    def restore(self, average: "AverageOfModule") -> None:
        """Continue with the saved means and counters, tensor by tensor, by name.

        Raises:
            IncompatibleIngredients: A tensor has another shape than in the file.
        """
        means = {name: value for group in self.groups for name, value in group.get("mean", {}).items()}
        rings = [group for group in self.groups if group.get("samples")]
        saved = set(means) | {name for group in rings for name in group["samples"][0]}
        counters = {group["optimizer"]: group for group in self.groups}
        missing: list[str] = []
        if not self.theirs:
            average.adopt(
                {name: g["optimizer"] for g in self.groups for name in (g.get("samples") or [g.get("mean", {})])[0]}
            )
        known = {slot.name for group in average.groups for slot in group.slots}
        for group in average.groups:
            if not self.groups:
                continue
            source = counters.get(group.optimizer) or self.groups[0]
            for name in Group.COUNTERS:
                setattr(group, name, source[name])
            samples = source.get("samples") or ([means] if means else [])
            if group.absorbed and samples:
                missing += [slot.name for slot in group.slots if slot.name not in samples[0]]
                group.shadow.restore([[self._tensor(s, slot, group) for slot in group.slots] for s in samples])
        average.report("not in the checkpoint's average, which begins for them now", missing)
        average.report("in the checkpoint's average, but not averaged now", sorted(saved - known))
        average.restored = True
        average.restore_statistics(self.average)

    @staticmethod
    def _tensor(sample: Mapping[str, Tensor], slot: Slot, group: Group) -> Tensor:
        live = slot.local
        device = group.shadow.device_of(live)
        if slot.name not in sample:
            return new_shadow(live, device)
        value = sample[slot.name]
        if value.shape != slot.shape:
            raise IncompatibleIngredients(
                f"{slot.name} has the shape {list(slot.shape)}, but {list(value.shape)} in the average of the "
                "checkpoint. Resume with the model that wrote it, or start anew without ckpt_path."
            )
        target = new_shadow(live, device)
        target.copy_(shard_like(value, slot.tensor))
        return target


def load(rule: "LiveAverage", checkpoint: Mapping[str, Any]) -> Loaded | None:
    """Find the state of an average in a checkpoint; that of Lightning's own averaging callbacks will do, too."""
    average = checkpoint.get("state_dict", {})
    live = checkpoint.get(LIVE_KEY)
    state = checkpoint.get("callbacks", {}).get(rule.state_key)
    if state is not None and state["rule"] != type(rule).__name__:
        rank_zero_warn(
            f"the checkpoint's average {rule.name!r} is of {state['rule']}, which {type(rule).__name__} cannot go on "
            "with: it begins anew from the live weights. Another name keeps both apart."
        )
    elif state is not None:
        return Loaded(live, state["groups"], average)
    if live is None:
        return None
    if rule.evaluated and _LIGHTNING_KEY in checkpoint and not _ours(checkpoint):
        samples = int(checkpoint[_LIGHTNING_KEY].get("n_averaged", 0))
        names = clean_names(average, "checkpoint")
        mean = {names[name]: value for name, value in average.items()}
        steps = int(checkpoint.get("global_step", samples))
        counters = {"steps": steps, "since": steps, "ticks": 0, "fresh": False, "optimizer": 0}
        counters |= {"absorbed": samples + rule.needs_start, "concentration": 1 / max(samples, 1)}
        return Loaded(live, [{**counters, "mean": mean}] if samples else [], average, theirs=True)
    return Loaded(live, [], average)


def _ours(checkpoint: Mapping[str, Any]) -> bool:
    return any(str(key).startswith("LiveAverage ") for key in checkpoint.get("callbacks", {}))


def shard_like(whole: Tensor, like: Tensor, copy: bool = False) -> Tensor:
    """The part of a full tensor that this rank holds; with ``copy``, written there. No communication."""
    if isinstance(like, DTensor):
        whole = whole.to(like.to_local().device)
        part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
        like = like.to_local()
    else:
        part = whole
    return like.copy_(part) if copy else part


# ------------------------------------------------------------------------------------------------ files of weights only


class AverageOnly(WeightsOnlyFiles):
    """Writes the average instead of the live weights."""

    def __init__(self, inner: Any, rule: "LiveAverage", trainer: Trainer) -> None:
        super().__init__(inner, rule)
        self.rule, self.trainer = rule, trainer

    def changed(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The same with the average in it, if there is one."""
        average, module = self.rule._average, self.trainer.lightning_module
        known = average is not None and average.is_of(module) and not average.outdated
        if not known or average.samples <= 0 or average.placed:
            return checkpoint
        checkpoint = {**checkpoint, "state_dict": _other_half(average, self.trainer)}
        add_dense(checkpoint)
        return checkpoint


def check_weights_only(trainer: Trainer, rule: "LiveAverage") -> None:
    """Refuse weights-only files where the average cannot be brought into them.

    Raises:
        UnsupportedSetup: A ``ModelCheckpoint`` writes them under a strategy that shards.
    """
    if not rule.evaluated or not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
        raise UnsupportedSetup(
            f"ModelCheckpoint(save_weights_only=True) under {type(trainer.strategy).__name__} would write the live "
            "weights and not the average. Use save_weights_only=False."
        )


def follow_weights_only(trainer: Trainer, rule: "LiveAverage") -> None:
    """From now on files of weights only hold the average, also those written after the fit."""
    if rule.evaluated and not isinstance(trainer.strategy, ModelParallelStrategy):
        trainer.strategy.checkpoint_io = AverageOnly(trainer.strategy.checkpoint_io, rule, trainer)
