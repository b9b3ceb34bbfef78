"""CheckpointTrail: the weights of the last steps of a training, as files to be combined afterwards."""

import os
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_soup.callbacks.model_soup_checks import check_writable_on_rank_zero
from lightning_soup.callbacks.rank_zero_files import folder_of_fit, on_rank_zero, refuse_nan, weights_of_fit
from lightning_soup.callbacks.schedule import Schedule, When, planned_time
from lightning_soup.callbacks.selected_tensors import trainable
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.stored_tensor import MemoryTensor
from lightning_soup.weights.weights_file import clean_names


class CheckpointTrail(Callback):
    """Keep the weights of every n-th optimizer step, the newest ``keep`` of them, for :class:`.EvolutionarySoup`.

    The weights are the raw ones, not those of an average, after a real optimizer step: with gradient accumulation, in
    manual optimization and where a gradient scaler skips a step. With several optimizers, steps are those of the last.
    Weights of 16 bits are written in float32, since coefficients of both signs amplify rounding; but what training in
    ``bf16-true`` or ``16-true`` has rounded already stays rounded, and a warning says so.

    Each file, ``step=120.ckpt``, is a Lightning checkpoint of weights only: ``load_from_checkpoint`` and
    ``lightning-soup soup`` open it. It appears whole or not at all. ``ModelSoup(trail=True)`` cooks them when the fit
    ends; or later ``lightning-soup soup --ingredients '…/trail/*.ckpt'``. Nothing in training changes.

    Let the trail begin where training is near its end: checkpoints of early steps are no use, and cost a search much of
    its budget. A resumed training goes on with the files that its checkpoint knows of.

    Works on one device and under DDP, where rank 0 writes. Sharded strategies are refused.

    Args:
        every: n, in optimizer steps.
        keep: K, the most files that are kept; the oldest is deleted when there are more. 20 to 50 are usual.
        start: Nothing is kept before this much training: steps (``400``), a fraction (``0.5``), text (``"2 epochs"``).
        frozen: Also write what is not trained (frozen parameters; buffers are always written), without which a file is
            no ingredient for a whole module. False: the files hold only what training changes, for small adapters of
            large models, and no parameters that begin to be trained on the way.
        dirpath: Folder of the files; ``trail`` in the run's folder by default.

    Attributes:
        files: The files, the oldest first.

    Raises:
        UnsupportedSetup: Before training: an option out of range, nothing to train, a strategy that shards, or a trail
            that would have fewer than two files.
        UnwritableOutput: Before training: the folder cannot be written. In training: the disk is full.
        NonFiniteWeights: In training: the weights became NaN. The files before that are kept.
    """

    def __init__(
        self,
        every: int = 20,
        keep: int = 24,
        start: When = 0,
        frozen: bool = True,
        dirpath: str | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UnsupportedSetup(f"CheckpointTrail(every={every!r}): expected a whole number of steps, 1 or more.")
        if keep < 2:
            raise UnsupportedSetup(f"CheckpointTrail(keep={keep}): expected 2 or more; one checkpoint is no soup.")
        self.schedule = Schedule(start, None, every, owner=type(self).__name__)
        self.every, self.keep, self.frozen, self.dirpath = every, keep, frozen, dirpath
        self.files: list[str] = []
        self._steps = self._since = 0
        self._fitting = False
        self._names: set[str] | None = None
        self._signal: OptimizerSteps | None = None
        self._trainer: ref[Trainer] | None = None
        self._folder: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the Trainer before it runs: what belongs to a run stays here."""
        return {**self.__dict__, "_signal": None, "_trainer": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        self._fitting = stage == "fit"
        if self._fitting:
            check_strategy(trainer, type(self).__name__, "it keeps the weights of a model in shards")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit unless this one goes on with it, and follow the optimizers."""
        if trainer.fast_dev_run:
            return
        if not trainable(pl_module):
            raise UnsupportedSetup(
                f"CheckpointTrail: {type(pl_module).__name__} has no trainable parameter, so its weights would all be "
                "the same. Set requires_grad before fit."
            )
        self._names = None
        resumed = trainer.ckpt_path is not None
        if not resumed:
            self.files, self._steps, self._since = [], 0, 0
        known = [self._folder / _name("*")] if resumed and self._folder else []
        folder = folder_of_fit(trainer, type(self).__name__, "trail", _name("*"), self.dirpath, resumed, known)
        self._folder = folder.absolute()
        check_writable_on_rank_zero(
            trainer,
            self._folder / _name(self.every),
            owner=type(self).__name__,
            source="It is the dirpath of CheckpointTrail, or in the folder of the run.",
            instead="Give CheckpointTrail a local dirpath.",
        )
        moved = [str(self._folder / Path(file).name) for file in self.files]
        self.files = [there if os.path.exists(there) else was for was, there in zip(self.files, moved, strict=True)]
        if trainer.is_global_zero:
            self._tell_of_lost_files()
            if any(slot.tensor.dtype.itemsize < 4 for slot in trainable(pl_module)):
                rank_zero_warn(
                    "CheckpointTrail: the weights are trained in 16 bits, whose rounding a soup with coefficients of "
                    "both signs amplifies. Train with precision='bf16-mixed' or '16-mixed', which keep 32 bits."
                )
        self.files = [file for file in self.files if os.path.exists(file)]
        self._signal, self._trainer = OptimizerSteps.of(trainer), ref(trainer)
        self._signal.listen(self, self._after_step, phase="observe")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say before training that the trail will be short, now that its length is known."""
        if trainer.fast_dev_run:
            return
        self.schedule.check(trainer, "nothing would ever be kept")
        planned, whole = planned_time(trainer), planned_time(trainer, self.schedule.start.unit)
        if planned is None or not whole:
            return
        count = len(self.files) + int((planned * (1 - self.schedule.start.value / whole) - self._since) // self.every)
        if count < 2:
            raise UnsupportedSetup(
                f"CheckpointTrail(every={self.every}, start={self.schedule.start}): this training of {planned:.0f} "
                f"steps would leave {max(count, 0)} files. Keep weights more often, start earlier or train longer."
            )
        if count < self.keep:
            rank_zero_warn(
                f"CheckpointTrail: about {count} files will be kept, fewer than keep={self.keep}. Keep weights more "
                f"often (every={max(1, self.every * count // self.keep)}) or start earlier."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow optimizers that were made anew."""
        if self._signal is not None:
            self._signal.attach(trainer)

    def _after_step(self, optimizer: int) -> None:
        trainer = self._trainer()
        if optimizer != len(trainer.optimizers) - 1:
            return
        self._steps += 1
        if not self.schedule.open(trainer, self._steps):
            return
        self._since += 1
        if self.schedule.due_at_step(self._since):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        content = weights_of_fit(trainer)
        content["global_step"] = self._steps  # Lightning counts this step after it
        path = self._folder / _name(self._steps)

        def work() -> str:
            refuse_nan(trainer.lightning_module, path)
            content["state_dict"] = self._wide(trainer.lightning_module, content["state_dict"])
            with atomic_path(path) as temporary:
                torch.save(content, temporary)
            return str(path)

        file = on_rank_zero(trainer, work, f"{path} was not written")
        self.files = [*(other for other in self.files if other != file), file]
        while len(self.files) > self.keep:
            oldest = self.files.pop(0)
            if trainer.is_global_zero:
                Path(oldest).unlink(missing_ok=True)

    def _wide(self, module: LightningModule, content: dict[str, Any]) -> dict[str, Any]:
        """What goes into a file, tensors of 16 bits in float32; what is tied in the module is so in the file."""
        left_out = set() if self.frozen else {slot.name for slot in trainable(module, frozen=True)}
        names = clean_names(content, type(module).__name__)
        kept = {raw: value for raw, value in content.items() if names[raw] not in left_out}
        self._tell_of_others(set(kept))
        stored = {raw: MemoryTensor(value) for raw, value in kept.items() if isinstance(value, Tensor)}
        once = {tensor.identity: tensor.tensor() for tensor in stored.values()}
        wide = {identity: _wide(value) for identity, value in once.items()}
        # What is no tensor is extra state (get_extra_state), without which the module would not take the file.
        return {raw: wide[stored[raw].identity] if raw in stored else value for raw, value in kept.items()}

    def _tell_of_others(self, names: set[str]) -> None:
        if self._names not in (None, names):
            rank_zero_warn(
                f"CheckpointTrail(frozen=False): other parameters are trained from step {self._steps} on "
                f"({min(names ^ self._names)}, …), so the files before and after cannot be combined with one another. "
                "Pass frozen=True, or let the trail start after this step."
            )
        self._names = names

    def _tell_of_lost_files(self) -> None:
        gone = [file for file in self.files if not os.path.exists(file)]
        if gone:
            rank_zero_warn(
                f"CheckpointTrail: {len(gone)} files of the earlier fit are gone ({gone[0]}, …). A training that is "
                "resumed from an older checkpoint finds those deleted that were kept after it; new ones follow."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go; the files stay."""
        if self._signal is not None:
            self._signal.stop(self)
            self._signal = None

    def state_dict(self) -> dict[str, Any]:
        """How far it has come, and its files."""
        folder = None if self._folder is None else str(self._folder)
        return {"steps": self._steps, "since": self._since, "files": list(self.files), "folder": folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files of an interrupted fit; ``test(ckpt_path=…)`` leaves them as they are."""
        if not self._fitting:
            return
        self._steps, self._since = int(state_dict["steps"]), int(state_dict["since"])
        self.files = list(state_dict["files"])
        self._folder = Path(state_dict["folder"]) if state_dict["folder"] else None


def _name(step: int | str) -> str:
    return f"step={step}.ckpt"


def _wide(value: Tensor) -> Tensor:
    """In 32 bits where it has fewer; apart from the module where it lies elsewhere or in fewer bits."""
    narrow = value.is_floating_point() and value.dtype.itemsize < 4
    return value.to("cpu", torch.float32 if narrow else value.dtype)
