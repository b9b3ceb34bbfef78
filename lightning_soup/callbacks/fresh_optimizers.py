"""Optimizers made anew within a fit, their learning rates, and the random numbers of an epoch."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim import Optimizer

from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import have_one_model
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.settings import set_hyperparameters, set_optimizer_options


def make_optimizers_anew(
    trainer: Trainer,
    epochs: int,
    schedules: bool,
    settings: Mapping[str, Any] | None = None,
    first: list[dict[str, Any]] | None = None,
) -> None:
    """Ask the module for its optimizers once more, as at the beginning of a fit.

    Args:
        trainer: The Trainer, in ``fit``.
        epochs: How long the module is told that training is, for its schedules.
        schedules: Whether its learning-rate schedules are followed.
        settings: Hyperparameters of the module that are other ones while it is asked, or options of the optimizer.
        first: The options that the optimizer had at the beginning of the fit (:func:`options_of`), for a module that
            has made it once and gives the same one again, as LightningCLI's ``--optimizer`` does.
    """
    strategy, before = trainer.strategy, list(trainer.optimizers)
    with _seen_by_the_module(trainer, epochs, settings or {}) as left:
        strategy.setup_optimizers(trainer)
    _optimizers_to_device(strategy.optimizers, strategy.root_device)
    for optimizer in strategy.optimizers:
        again = any(optimizer is other for other in before)
        if again and first is not None:
            optimizer.state.clear()
            _restore_options(optimizer, first)
        set_optimizer_options(
            optimizer, {n: v for n, v in (settings or {}).items() if n in optimizer.defaults} if again else left
        )
    if not schedules:
        strategy.lr_scheduler_configs = []
    OptimizerSteps.of(trainer)  # listens to the new ones from now on


@contextmanager
def _seen_by_the_module(trainer: Trainer, epochs: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Let a module see another length of training and other hyperparameters; gives those that it does not have."""
    module, hparams, whole = trainer.lightning_module, trainer.lightning_module.hparams, trainer.fit_loop.max_epochs
    own = {name: hparams[name] for name in settings if name in hparams}
    attributes = {name: getattr(module, name) for name in settings if hasattr(module, name)}
    trainer.fit_loop.max_epochs = epochs
    try:
        yield set_hyperparameters(module, settings)
    finally:
        trainer.fit_loop.max_epochs = whole
        hparams.update(own)
        for name, value in attributes.items():
            setattr(module, name, value)


def check_settings(trainer: Trainer, module: LightningModule, vary: Mapping[str, Sequence[Any]], epochs: int) -> None:
    """Refuse to vary what neither the module nor its optimizer has, or what changes nothing.

    Args:
        trainer: The Trainer, in ``fit``.
        module: Its module.
        vary: For each name the values of the copies.
        epochs: How long a retraining is.

    Raises:
        UnsupportedSetup: There is such a name, or a value with which no optimizer can be made.
    """
    optimizer = trainer.optimizers[0]
    for name, values in vary.items():
        known = [one for one in module.hparams if not one.startswith("_")]  # without what LightningCLI adds
        if name not in module.hparams and not hasattr(module, name) and name not in optimizer.defaults:
            raise UnsupportedSetup(
                f"vary: {type(module).__name__} has no hyperparameter {name!r}, and {type(optimizer).__name__} no such "
                f"option. The module has {', '.join(known) or 'none (save_hyperparameters)'}; the optimizer "
                f"{', '.join(optimizer.defaults)}; and there are seed, lr_max and retrain_epochs."
            )
        if all(value == values[0] for value in values):
            continue
        try:
            made = [_made_under(trainer, module, epochs, {name: value}) for value in values]
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedSetup(
                f"vary: {name}={list(values)}: no optimizer can be made with these ({type(error).__name__}: {error}). "
                f"Give values that {type(module).__name__}.configure_optimizers and its optimizer take."
            ) from error
        if any(rates != made[0][0] for rates, _ in made):
            raise UnsupportedSetup(
                f"vary: {name}={list(values)} changes learning rates, which the schedule of each retraining sets. Vary "
                "lr_max, the largest of them, instead."
            )
        if all(options == made[0][1] for _, options in made):
            raise UnsupportedSetup(
                f"vary: {name}={list(values)} changes nothing: only what {type(module).__name__}.configure_optimizers "
                "reads, or an option of the optimizer, can differ between copies."
            )


def _made_under(
    trainer: Trainer, module: LightningModule, epochs: int, settings: dict[str, Any]
) -> tuple[list[float], str]:
    """The largest rates of the optimizer that a module makes, and all of its options."""
    with _seen_by_the_module(trainer, epochs, settings) as left:
        optimizer = _init_optimizers_and_lr_schedulers(module)[0][0]
    kept = options_of(optimizer)
    set_optimizer_options(optimizer, settings if optimizer in trainer.optimizers else left)
    found = first_rates(optimizer), f"{type(optimizer)} {options_of(optimizer)}"
    _restore_options(optimizer, kept)
    return found


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group."""
    return [_copied({n: value for n, value in group.items() if n != "params"}) for group in optimizer.param_groups]


def _restore_options(optimizer: Optimizer, options: list[dict[str, Any]]) -> None:
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        group.update(_copied(kept))


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def first_rates(optimizer: Optimizer) -> list[float]:
    """The largest rate of each group as it was given, before any schedule; OneCycleLR is given it, and starts lower."""
    groups = optimizer.param_groups
    return [float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in groups]


def set_rate(optimizer: Optimizer, rate: float, ratios: list[float]) -> None:
    """Give each group its ratio of a rate."""
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate * ratio)
        else:
            group["lr"] = rate * ratio


def seed_epoch(trainer: Trainer, seed: int, begun: bool) -> None:
    """Make an epoch's order and random numbers depend on the seed alone, so that a resumed fit draws them again alike.

    Args:
        trainer: The Trainer, in ``on_train_epoch_start``.
        seed: The seed; of replicas, each its own.
        begun: Whether the epoch has begun in another process: its order is drawn already.
    """
    seed += 1_000_003 * trainer.global_rank if have_one_model(trainer) else 0
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    loop = trainer.fit_loop
    # Lightning draws the order of an epoch after this hook, but for the first epoch of a run before it.
    if not begun and (trainer.current_epoch == 0 or loop.is_resuming):
        iter(loop._data_fetcher)
