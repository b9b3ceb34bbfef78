"""What ``SparseModelSoup`` refuses before any training."""

import math
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_soup.callbacks.fresh_optimizers import check_settings, first_rates
from lightning_soup.callbacks.live_average import LiveAverage
from lightning_soup.callbacks.model_soup import ModelSoup
from lightning_soup.callbacks.pruning_callback import is_lightnings_average
from lightning_soup.callbacks.retraining import NEED_HISTORY, check_retraining
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.recipes import Recipe, UniformSoup

if TYPE_CHECKING:
    from lightning_soup.callbacks.sparse_soup import SparseModelSoup

OUR_OWN = ("seed", "lr_max", "retrain_epochs")
_AVERAGES = (LiveAverage, ModelSoup)


def check_options(callback: "SparseModelSoup", retrain_epochs: int | None, budget: int | None) -> None:
    """Refuse options without a meaning.

    Raises:
        UnsupportedSetup: There is one.
    """
    counts = {"copies": 1, "dense_epochs": 0, "pretraining_epochs": 1}
    given = {name: getattr(callback, name) for name in counts} | {"retrain_epochs": retrain_epochs, "budget": budget}
    for name, value in given.items():
        if value is None and name not in ("copies", "dense_epochs"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < counts.get(name, 1):
            raise UnsupportedSetup(f"{name}={value!r}: expected {counts.get(name, 1)} or more.")
    check_retraining(callback.schedule, callback.dense_epochs, callback.pretraining_epochs)
    if callback.lr_max is not None and not 0 < callback.lr_max < math.inf:
        raise UnsupportedSetup(f"lr_max={callback.lr_max}: expected more than 0.")
    if (retrain_epochs is None) == (budget is None):
        raise UnsupportedSetup("give retrain_epochs, the length of each retraining, or budget, the epochs in all.")
    if not 0 <= callback.lr_min < math.inf:
        raise UnsupportedSetup(f"lr_min={callback.lr_min}: expected 0 or more.")
    if callback.schedule in NEED_HISTORY and (callback.lr_max is not None or "lr_max" in callback.vary):
        raise UnsupportedSetup(
            f"schedule={callback.schedule!r} repeats learning rates of the dense training, so lr_max has no meaning. "
            "Leave it out, or choose llr or clr."
        )
    if budget is not None and "retrain_epochs" in callback.vary:
        raise UnsupportedSetup("vary: retrain_epochs says how long each copy trains, and so does budget. Give one.")
    if budget is not None:
        left, runs = budget - callback.dense_epochs, callback.cycles * callback.copies
        if left < runs or left % runs:
            raise UnsupportedSetup(
                f"budget={budget}: after {callback.dense_epochs} dense epochs, {left} are left for {callback.cycles} "
                f"cycles of {callback.copies} copies, which must divide by {runs}. Give "
                f"{callback.dense_epochs + runs * max(round(left / runs), 1)}, for example."
            )


def varied(vary: dict[str, list[Any]], copies: int, epochs: int) -> list[int]:
    """How many epochs each copy has.

    Raises:
        UnsupportedSetup: A list of varied values has not one for each copy, or one that has no meaning.
    """
    for name, values in vary.items():
        if isinstance(values, str) or not isinstance(values, Sized) or len(values) != copies:
            raise UnsupportedSetup(f"vary: {name}={values}: expected a list of {copies} values, one for each copy.")
        vary[name] = [value.item() if hasattr(value, "item") else value for value in values]  # plain, for checkpoints
    for name in OUR_OWN:
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in vary.get(name, [])):
            raise UnsupportedSetup(f"vary: {name}={vary[name]}: expected numbers.")
    if any(value % 1 != 0 for value in vary.get("seed", [])):  # of NaN and infinity it is NaN
        raise UnsupportedSetup(f"vary: seed={vary['seed']}: expected whole numbers.")
    if any(not 0 < rate < math.inf for rate in vary.get("lr_max", [])):
        raise UnsupportedSetup(f"vary: lr_max={vary['lr_max']}: expected numbers above 0.")
    each = vary.get("retrain_epochs", [epochs] * copies)
    if any(value % 1 != 0 or value < 1 for value in each):
        raise UnsupportedSetup(f"vary: retrain_epochs={each}: expected whole numbers, 1 or more.")
    return [int(value) for value in each]


def check_trainer(callback: "SparseModelSoup", trainer: Trainer, module: LightningModule) -> None:
    """Refuse a Trainer that would not run the phases, and fill in how long it trains.

    Raises:
        UnsupportedSetup: It would not.
    """
    total = callback.total_epochs
    if trainer.max_steps != -1:
        raise UnsupportedSetup(f"SparseModelSoup counts in epochs: leave max_steps out, and give max_epochs={total}.")
    if trainer.max_epochs == -1:
        trainer.fit_loop.max_epochs = total
    if trainer.max_epochs != total:
        retrained = " + ".join(map(str, callback.retrain_epochs))
        raise UnsupportedSetup(
            f"Trainer(max_epochs={trainer.max_epochs}): SparseModelSoup trains for {total} epochs: "
            f"{callback.dense_epochs} dense and {callback.cycles} cycles × ({retrained}). Give max_epochs={total}, or "
            "-1 to have it filled in."
        )
    if not module.automatic_optimization:
        raise UnsupportedSetup(
            "SparseModelSoup gives each retraining an optimizer and a schedule, which manual optimization keeps to "
            "itself. Use automatic optimization."
        )
    for other in trainer.callbacks:
        kind = type(other).__name__
        if isinstance(other, EarlyStopping):
            raise UnsupportedSetup(
                f"{kind} compares models of different sparsity, and would end the fit before its soup. Remove it."
            )
        if isinstance(other, GradientAccumulationScheduler) and len(set(other.scheduling.values())) > 1:
            raise UnsupportedSetup(
                f"{kind} changes how many steps an epoch has, which the schedules of the retrainings are made of. Give "
                "Trainer(accumulate_grad_batches=…), the same throughout."
            )
        if isinstance(other, BaseFinetuning):
            raise UnsupportedSetup(
                f"{kind} changes the groups and rates of the optimizer by epochs of the fit, but each retraining has "
                "an optimizer and rates of its own. Fine-tune first, and prune in a fit of its own with dense_epochs=0."
            )
        if isinstance(other, _AVERAGES) or is_lightnings_average(other):
            raise UnsupportedSetup(
                f"{kind} would average what belongs to different copies and sparsities. Remove it; the soups of this "
                "callback can be averaged with others afterwards."
            )
        if isinstance(other, ModelCheckpoint) and other.monitor and (callback.dense_epochs or callback.cycles > 1):
            best = "the dense one" if callback.dense_epochs else "one of the first cycle"
            rank_zero_warn(
                f"ModelCheckpoint(monitor={other.monitor!r}) compares models of different sparsity: {best} will be its "
                "best. The soups are in the folder of SparseModelSoup."
            )
    if callback.monitor and not trainer.enable_validation:
        raise UnsupportedSetup(
            f"SparseModelSoup(monitor={callback.monitor!r}) scores copies and soups by a validation metric, but there "
            "is no validation (limit_val_batches=0, no val_dataloader, or no validation_step). Add it, or leave "
            "monitor out and use UniformSoup."
        )
    _check_recipe(callback.recipe, callback.copies)
    if callback.recipe.needs_evaluator and not callback.monitor:
        raise UnsupportedSetup(
            f"{type(callback.recipe).__name__} chooses by a validation metric. Give SparseModelSoup(monitor='val_acc') "
            "and validation data, or use UniformSoup."
        )


def _check_recipe(recipe: Recipe, copies: int) -> None:
    """Refuse what would fail when the first cycle ends, or prune more than the masks say."""
    if recipe.from_init:
        raise UnsupportedSetup(
            f"{type(recipe).__name__} takes the first of its ingredients for the start, but the copies of a cycle are "
            "alike. Use UniformSoup, GreedySoup or LearnedSoup."
        )
    if not isinstance(recipe, UniformSoup) or copies == 1:  # one copy is the soup
        return
    if recipe.reprune:
        raise UnsupportedSetup(
            "UniformSoup(reprune=True) is for networks with different masks, but the copies of a cycle have one, which "
            "their average keeps. Leave reprune out."
        )
    if recipe.weights is not None and len(recipe.weights) != copies:
        raise UnsupportedSetup(
            f"UniformSoup has {len(recipe.weights)} weights, but SparseModelSoup makes copies={copies}. Give one "
            "weight for each copy, or leave weights out."
        )


def check_optimizers(callback: "SparseModelSoup", trainer: Trainer, module: LightningModule) -> None:
    """Refuse to vary what is not there, or has no effect.

    Raises:
        UnsupportedSetup: There is no optimizer or several, or a name is unknown or changes nothing; or ``lr_min`` is
            above the largest rate.
    """
    if len(trainer.optimizers) != 1:
        raise UnsupportedSetup(f"SparseModelSoup needs one optimizer, and there are {len(trainer.optimizers)}.")
    if not trainer.optimizers[0].param_groups:  # Lightning's stand-in
        raise UnsupportedSetup(
            f"SparseModelSoup needs an optimizer, and {type(module).__name__}.configure_optimizers returns none."
        )
    if not max(first_rates(trainer.optimizers[0])) > 0:
        raise UnsupportedSetup(
            "SparseModelSoup scales the learning rates that the module gives its optimizer, and they are 0. Let "
            "configure_optimizers give the largest rate, and leave a warm-up to a schedule."
        )
    highest = callback.vary.get("lr_max", [callback.lr_max or max(first_rates(trainer.optimizers[0]))])
    if callback.schedule == "clr" and callback.lr_min > min(highest):
        raise UnsupportedSetup(
            f"lr_min={callback.lr_min:g} is above the largest rate of a retraining, {min(highest):g}, so clr would "
            "rise to it. Give a smaller lr_min, or a larger lr_max."
        )
    vary = {name: values for name, values in callback.vary.items() if name not in OUR_OWN}
    check_settings(trainer, module, vary, max(callback.retrain_epochs))


def check_beginning(callback: "SparseModelSoup", trainer: Trainer) -> None:
    """Refuse to go on from a checkpoint without the state of the callback where that would be missed.

    Raises:
        UnsupportedSetup: The checkpoint was made without it, after the dense training or with a history that is needed.
    """
    epoch, history = trainer.current_epoch, callback.schedule in NEED_HISTORY
    if epoch <= callback.dense_epochs and not (trainer.global_step and history):
        return
    needs = f"schedule={callback.schedule!r} needs its learning rates" if history else "it cannot tell what was pruned"
    raise UnsupportedSetup(
        f"SparseModelSoup: the checkpoint of epoch {epoch}, step {trainer.global_step}, holds no state of it: it was "
        f"trained without it, and {needs}. Load its weights into the module, and begin a fit of its own without "
        "ckpt_path (dense_epochs=0 prunes them at once)."
    )


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps in an epoch.

    Raises:
        UnsupportedSetup: The training data has no length.
    """
    if math.isinf(trainer.num_training_batches):
        raise UnsupportedSetup(
            "SparseModelSoup's schedules need the length of an epoch, but the training data has none. Give "
            "Trainer(limit_train_batches=…)."
        )
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def warn_of_short_epoch(trainer: Trainer) -> None:
    """Say that the training data ended before the length that schedules are made of, so that they end too high."""
    done, planned = trainer.fit_loop.epoch_loop.batch_progress.current.processed, trainer.num_training_batches
    if done < planned:
        rank_zero_warn(
            f"SparseModelSoup: an epoch had {done} batches, not {planned:g}, so the learning rates of a retraining do "
            f"not reach their end. Give Trainer(limit_train_batches={done}), or data of a length that is true."
        )


def refuse_ended(trainer: Trainer, epochs: int) -> None:
    """A fit in which no phase was entered, as all epochs had been trained before.

    Raises:
        UnsupportedSetup: Always; it says what to do.
    """
    if trainer.ckpt_path is None:
        raise UnsupportedSetup(
            f"SparseModelSoup: this Trainer has trained for all {epochs} epochs before, so nothing was pruned now. "
            "Begin with a new Trainer."
        )
    raise UnsupportedSetup(
        f"SparseModelSoup: with the checkpoint all {epochs} epochs are over, and it holds no state of this callback, "
        "so nothing was pruned. Load its weights into the module, and begin a fit without ckpt_path."
    )
