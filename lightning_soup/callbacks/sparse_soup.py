"""SparseModelSoup: prune, retrain copies, average them, and again, within one fit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_soup.callbacks import sparse_soup_checks as checks
from lightning_soup.callbacks.fresh_optimizers import make_optimizers_anew, options_of, seed_epoch
from lightning_soup.callbacks.model_soup_checks import WatchedMetric, check_loss, check_writable_on_rank_zero
from lightning_soup.callbacks.pruning_callback import PruningCallback
from lightning_soup.callbacks.retraining import Plan, RetrainingSchedule
from lightning_soup.callbacks.retraining_rates import RATES_STATE, RetrainingRates
from lightning_soup.callbacks.sparse_soup_cooking import Cooking
from lightning_soup.callbacks.sparse_soup_files import CycleFiles, copy_of, folder_of, soup_of, start_of
from lightning_soup.callbacks.sparse_soup_replicas import on_replicas, plan_of_replica, take_over
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.evaluator import direction
from lightning_soup.layers.pruning import Rounding, check_selection, cycle_amounts
from lightning_soup.recipes import Ingredient, Recipe, Soup, UniformSoup
from lightning_soup.runs.tracking import log_soup


class SparseModelSoup(PruningCallback):
    """SMS: prune, retrain several copies from the same pruned weights, average them, and begin the next cycle there.

    All within one ``Trainer.fit``, whose epochs it shares out: first ``dense_epochs`` as without it, then for each
    cycle every copy in turn. Copies of a cycle have one mask, so their average is as sparse as they are, and lies
    where they lie. When the fit ends the module holds the soup of the last cycle. ``max_epochs`` must be
    :attr:`total_epochs`; −1 is filled in.

    Each retraining begins with a new optimizer, a learning-rate schedule of its own (the module's schedules are
    followed in the dense training only, which they see as the whole), and random numbers that depend on the seed,
    cycle and copy alone. It is resumable from any checkpoint, with the same options (but ``recipe``, ``monitor``,
    ``mode``, ``dirpath`` and ``keep_copies``); the files of the cycles in ``dirpath`` belong to it. A
    loader with a generator of its own goes on drawing from that, and a gradient scaler keeps its scale. BatchNorm
    statistics are estimated anew before every evaluation and for every soup, but where they are frozen: in layers that
    are in evaluation mode during training.

    Selection uses the validation data, on which no copy trains. Metrics of different phases are those of models of
    different sparsity: a ``ModelCheckpoint`` with ``monitor`` would find the dense model best. Let it keep all files,
    or the last one to resume from; the soups are saved in any case. ``EarlyStopping`` is refused.

    Gradients are masked before clipping, weights and moments after each step; see :class:`.SparsityMask`.

    With ``ReplicaStrategy(data="full")`` and as many devices as copies, the copies of a cycle are trained side by side,
    each by a process; :attr:`total_epochs` is that of one of them. The soups are those of one device.

    Args:
        sparsity: S, the share of the prunable weights that is pruned in the end. Each cycle prunes the same share of
            the survivors: ``1 − (1 − S)^(1/n)``.
        cycles: n.
        copies: m. One copy is iterative magnitude pruning (IMP); with ``retrain_epochs`` m times as long, it costs what
            m copies do.
        retrain_epochs: Epochs of each copy.
        dense_epochs: Epochs before the first pruning; 0: the weights that the fit begins with are pruned at once.
        recipe: How copies are combined: :class:`.UniformSoup` or another recipe, such as :class:`.GreedySoup`.
        vary: What differs between copies, a list of m values each: ``seed``, ``lr_max``, ``retrain_epochs``, a
            hyperparameter of the module that its ``configure_optimizers`` reads (``weight_decay``), or an option of its
            optimizer. By default the seed alone.
        schedule: Learning rate of each retraining: see :func:`.retraining_rate`. ``llr``: linear to 0. ``allr``: the
            same, lower where little was pruned. ``clr``: cosine. ``slr``, ``lrw``, ``ft``: from the dense training.
        lr_max: The largest rate; None: that of the dense training, or of the optimizer that the module makes. Groups of
            parameters keep their ratios to it.
        lr_min: Where ``clr`` ends.
        pretraining_epochs: How long the given weights were trained, for ``allr`` without dense epochs.
        budget: Epochs in all, from which ``retrain_epochs`` follows (BIMP).
        selection: What is pruned first; see :func:`.prune_`.
        rounding: ``direct``: the count of each cycle is that of its sparsity, rounded once. ``compound``: as torch's
            pruning, of the survivors.
        exclude: Patterns of parameters that are not pruned; None: embeddings, tokens and temperatures.
        skip_first: Leave out the input layer: the first by order of registration; refused where that does not tell.
        skip_head: Leave out the last layer, likewise.
        seed: Of the first copy; the others count on.
        monitor: A metric that validation logs, by which copies and soups are scored.
        mode: ``"max"`` or ``"min"``; by default ``"min"`` for losses and errors.
        dirpath: Folder of starts, copies and soups; by default ``sparse_soup`` in the run's folder, beside its
            checkpoints. A resumed fit looks for files that were moved there too.
        keep_copies: Leave the copies and starts there when the fit ends.

    Attributes:
        soup: The :class:`.Soup` of the last cycle that has ended.
        records: For each cycle its sparsity, the scores of its copies and of its soup.

    Raises:
        UnsupportedSetup: Before training: ``max_epochs`` is not the total (which is named), an option has no meaning,
            nothing is prunable, the checkpoint is of a fit with other options or without this callback, or a callback
            or strategy cannot go with it.

    Source: Zimmer et al., Sparse Model Soups, ICLR 2024 (arXiv 2306.16788). The released code runs each copy as a job
    of its own, and takes the mask of the last.
    """

    replicas = True

    def __init__(
        self,
        sparsity: float,
        cycles: int = 3,
        copies: int = 3,
        retrain_epochs: int | None = None,
        dense_epochs: int = 0,
        recipe: Recipe | None = None,
        vary: dict[str, list[Any]] | None = None,
        schedule: RetrainingSchedule = "llr",
        lr_max: float | None = None,
        lr_min: float = 0.0,
        pretraining_epochs: int | None = None,
        budget: int | None = None,
        selection: str = "global",
        rounding: Rounding = "direct",
        exclude: Sequence[str] | None = None,
        skip_first: bool = False,
        skip_head: bool = False,
        seed: int = 0,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        dirpath: str | None = None,
        keep_copies: bool = True,
    ) -> None:
        self._amounts = cycle_amounts(sparsity, cycles, rounding)
        super().__init__(sparsity, selection, exclude, skip_first, skip_head, seed)
        if check_selection(selection) and cycles != 1:
            raise UnsupportedSetup(f"selection={selection!r} prunes at once. Give cycles=1.")
        self.cycles, self.copies, self.rounding = cycles, copies, rounding
        self.dense_epochs, self.pretraining_epochs = dense_epochs, pretraining_epochs
        self.schedule, self.lr_max, self.lr_min = schedule, None if lr_max is None else float(lr_max), float(lr_min)
        self.vary: dict[str, list[Any]] = dict(vary or {})
        checks.check_options(self, retrain_epochs, budget)
        each = retrain_epochs or (budget - dense_epochs) // (cycles * copies)
        self.retrain_epochs = checks.varied(self.vary, copies, each)
        self.plan = Plan.of(dense_epochs, cycles, self.retrain_epochs)
        self.recipe = recipe or UniformSoup()
        self.monitor, self.mode = monitor, mode or direction(monitor or "")
        self.dirpath, self.keep_copies = dirpath, keep_copies
        self._forget()

    @property
    def total_epochs(self) -> int:
        """What ``max_epochs`` must be."""
        return self.plan.epochs

    def _forget(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._phase = -1  # the index in the plan of what the module is; its length when all is done
        trained, varied = self.dense_epochs or self.pretraining_epochs, self.vary.get("lr_max")
        self._rates = RetrainingRates(self.schedule, self.lr_max, self.lr_min, trained, varied)
        self._entered: int | None = None
        self._watched = WatchedMetric("SparseModelSoup")
        self.soup: Soup | None = None
        self._known_files: dict[str, list[str]] = {}
        self._first_options: list[dict[str, Any]] = []

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and fill in ``max_epochs``."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            if on_replicas(trainer):
                take_over(self, trainer)
                self.plan = plan_of_replica(self.dense_epochs, self.cycles, self.retrain_epochs, trainer.global_rank)
            if not trainer.fast_dev_run:
                checks.check_trainer(self, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the dense training see itself as the whole, and go on with the files of a checkpoint."""
        if self._resumed is None:
            self._pruned = None  # masks of an earlier fit are not gone on with
        super().on_fit_start(trainer, pl_module)
        if trainer.fast_dev_run:
            return
        checks.check_optimizers(self, trainer, pl_module)
        self._first_options = options_of(trainer.optimizers[0])
        folder = folder_of(trainer, self.dirpath, self._resumed is not None, self._known_files)
        self._files = CycleFiles(folder, self._known_files)
        told = "SparseModelSoup", "It is the dirpath of SparseModelSoup.", "Give SparseModelSoup a local dirpath."
        check_writable_on_rank_zero(trainer, self._files.path(soup_of(self.cycles)), *told)
        if self._phase < len(self.plan) and self.plan[max(self._phase, 0)].cycle == 0:
            # Lightning loads what a checkpoint has of them after this hook.
            make_optimizers_anew(trainer, self.dense_epochs, schedules=True)
        else:
            trainer.strategy.lr_scheduler_configs = []

    def _options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _FIXED}
        side_by_side = {"side_by_side": True} if self.plan.side_by_side(self.copies) else {}
        return {**super()._options(), **own, "seed": int(self.seed), "vary": self.vary, **side_by_side}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of an epoch, and what a checkpoint goes on from, are known now."""
        super().on_train_start(trainer, pl_module)
        if trainer.fast_dev_run:
            return
        if trainer.fit_loop.restarted_on_epoch_start:
            # Saved while phases changed: Lightning would take the epoch before for this one, and train nothing.
            trainer.fit_loop.epoch_loop.restarting = False
        checks.steps_per_epoch(trainer)
        if self._resumed is None:
            checks.check_beginning(self, trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say in the sanity check that a recipe lacks the loss it learns from."""
        if self.copies > 1 and trainer.state.fn == "fit" and not trainer.fast_dev_run:
            check_loss(self.recipe, pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say at the first validation, not after the first cycle, that the metric is not logged."""
        if self.monitor and trainer.state.fn == "fit" and not trainer.fast_dev_run:
            self._watched.look(trainer, self.monitor, f"copies and soups are scored by {self.monitor!r}")

    # ------------------------------------------------------------------------------------------------ during training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on to the next copy or cycle, if it is its turn."""
        self._enter(trainer, pl_module, begun=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same where a fit is resumed within an epoch, or at the last batch of one."""
        self._enter(trainer, pl_module, begun=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the data ended before its length."""
        if not trainer.fast_dev_run and not trainer.should_stop:
            checks.warn_of_short_epoch(trainer)

    def _enter(self, trainer: Trainer, module: LightningModule, begun: bool) -> None:
        epoch = trainer.current_epoch
        if epoch == self._entered or trainer.fast_dev_run:
            return
        self._entered, index = epoch, self.plan.index_at(epoch)
        if index != self._phase:
            with self._whole(module):
                self._finish(trainer, module)
                self._begin(trainer, module, index)
        phase = self.plan[index]
        if phase.cycle:
            seeds = self.vary.get("seed", range(self.seed, self.seed + self.copies))
            number = (int(seeds[phase.copy]) * self.cycles + phase.cycle) * 10_007 + epoch - phase.first_epoch
            seed_epoch(trainer, number, begun)

    @contextmanager
    def _whole(self, module: LightningModule) -> Iterator[None]:
        """Undo a change of phases that is interrupted, so that what is saved then (on_exception) can be resumed."""
        kept = {name: deepcopy(getattr(self, name)) for name in (*_STATE.values(), "_rates")}
        try:
            with self._pruned.whole(module):
                yield
        except BaseException:
            self.__dict__.update(kept)
            raise

    def _begin(self, trainer: Trainer, module: LightningModule, index: int) -> None:
        phase = self.plan[index]
        self._phase, self._rates.step = index, 0
        if not phase.cycle:
            return
        if self.plan[index - 1].cycle != phase.cycle or index == 0:
            self._prune(trainer, module, phase.cycle)
        else:
            self._files.load(start_of(phase.cycle), module)
        own = {name: values[phase.copy] for name, values in self.vary.items() if name not in checks.OUR_OWN}
        make_optimizers_anew(trainer, phase.epochs, schedules=False, settings=own, first=self._first_options)
        self._rates.begin(trainer.optimizers[0], phase, checks.steps_per_epoch(trainer))
        self._pruned.mask_weights()
        rank_zero_info(f"SparseModelSoup: {phase}, {self.sparsity_reached:.2%} pruned, {phase.epochs} epochs.")

    def _prune(self, trainer: Trainer, module: LightningModule, cycle: int) -> None:
        pruned, (amount, of) = self._pruned, self._amounts[cycle - 1]
        before, norm = pruned.masks, pruned.norm()
        pruned.prune(trainer, amount, self.selection, of, self.seed)
        drop = max(1 - (pruned.norm() / norm) ** 2, 0.0) ** 0.5 if norm else 0.0
        share = (pruned.masks.pruned - before.pruned) / max(before.size - before.pruned, 1)
        self._rates.pruned(trainer.optimizers[0], drop, share)
        self._files.write(trainer, start_of(cycle))

    def _after_step(self, trainer: Trainer, optimizer: int) -> None:
        super()._after_step(trainer, optimizer)
        if not trainer.fast_dev_run:
            phase = self.plan[self._phase]
            self._rates.stepped(trainer.optimizers[optimizer], phase, checks.steps_per_epoch(trainer))

    # --------------------------------------------------------------------------------------------------- copies, soups

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cook the last soup, and leave it in the module."""
        if trainer.fast_dev_run:
            return
        if trainer.fit_loop.epoch_progress.current.processed < self.total_epochs:
            rank_zero_warn(
                f"SparseModelSoup: training stopped in {self.plan[max(self._phase, 0)]}, before epoch "
                f"{self.total_epochs}. The module holds what it was then; resume from a checkpoint to go on."
            )
            return
        if self._phase < 0:
            checks.refuse_ended(trainer, self.total_epochs)
        with self._whole(pl_module):
            self._finish(trainer, pl_module)
        self._phase = len(self.plan)
        if not self.keep_copies:
            self._files.remove(trainer, [name for name in self._files.state() if not name.endswith("soup")])

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the copy that has been trained; after the last of a cycle, cook."""
        if not 0 <= self._phase < len(self.plan) or not self.plan[self._phase].cycle:
            return
        phase = self.plan[self._phase]
        if on_replicas(trainer):
            self._files.write_each(trainer, [copy_of(phase.cycle, copy) for copy in range(self.copies)])
        else:
            self._files.write(trainer, copy_of(phase.cycle, phase.copy))
        if phase.last:
            self._cook(trainer, module, phase.cycle)

    def _cook(self, trainer: Trainer, module: LightningModule, cycle: int) -> None:
        names = [copy_of(cycle, copy) for copy in range(self.copies)]
        copies = [Ingredient(self._files.open(name), label=name) for name in names]
        cooking = Cooking(self.recipe, self.monitor, self.mode)
        self.soup, scores = cooking.soup_of(trainer, module, copies, self._pruned)
        self._files.write_soup(trainer, soup_of(cycle), self.soup)
        self._record(trainer, cycle, scores)

    def _record(self, trainer: Trainer, cycle: int, scores: list[float]) -> None:
        record = {"cycle": cycle, "sparsity": self.sparsity_reached, "copies": scores, "soup": self.soup.natural_score}
        self.records = [*(one for one in self.records if one["cycle"] != cycle), record]
        told = ""
        if self.monitor:
            told = f"{self.monitor} {record['soup']:.4f}, its copies {', '.join(f'{score:.4f}' for score in scores)}"
            values = {"sparse_soup/sparsity": record["sparsity"], f"sparse_soup/{self.monitor}": record["soup"]}
            values |= {f"sparse_soup/copy_{i}": score for i, score in enumerate(scores, start=1)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        path = self._files.path(soup_of(cycle))
        if cycle == self.cycles:
            log_soup(trainer.loggers, self.soup, path)
        self._files.write_report(trainer, self.masks, self.records, self.monitor or "")
        rank_zero_info(f"SparseModelSoup: soup of cycle {cycle}, {record['sparsity']:.2%} pruned, in {path}. {told}")

    # ---------------------------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """The masks, what the module is, and where the files are."""
        found = {key: getattr(self, name) for key, name in _STATE.items()}
        files = self._files.state() if hasattr(self, "_files") else self._known_files
        return {**super().state_dict(), **found, **self._rates.state(), "files": files}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._check_state(state_dict, (*_STATE, *RATES_STATE, "files"))
        super().load_state_dict(dict(state_dict))
        for key, name in _STATE.items():
            setattr(self, name, state_dict[key])
        self._rates.restore(state_dict)
        self._known_files = dict(state_dict["files"])


_FIXED = (
    "sparsity",
    "cycles",
    "copies",
    "retrain_epochs",
    "dense_epochs",
    "pretraining_epochs",
    "schedule",
    "lr_max",
    "lr_min",
    "rounding",
)
_STATE = {"records": "records", "phase": "_phase"}  # what a checkpoint calls it, and the attribute
