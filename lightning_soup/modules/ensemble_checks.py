"""What an ensemble cannot be trained or judged with, told before it is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights.formats import CLASS_NAMES_KEY

if TYPE_CHECKING:
    from lightning_soup.modules.ensemble import AwareNet

__all__ = ["check_fit", "check_kept", "check_labels", "check_positive", "check_trained", "note_normalization"]


def check_fit(module: "AwareNet", trainer: Trainer) -> None:
    """Refuse a fit that could not learn w.

    Raises:
        UnsupportedSetup: Says what to do instead.
    """
    if "true" in str(trainer.precision) and "16" in str(trainer.precision):
        raise UnsupportedSetup(
            f"precision={trainer.precision}: AwareNet mixes predictions in float32, and w would be rounded to 16 bits "
            "at every step. Use precision='bf16-mixed' or '32-true'."
        )
    if not module.hparams.freeze_members:
        return
    if trainer.limit_train_batches == 0:
        raise UnsupportedSetup(
            "limit_train_batches=0, so w would not be learned. Leave it out: with freeze_members=True steps learn from "
            "what the members predict of held-out data, not from training batches."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise UnsupportedSetup(
            f"AwareNet(freeze_members=True) does not work with {type(strategy).__name__}: it learns a few numbers from "
            "predictions, there is nothing to shard. Use one device or strategy='ddp'."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UnsupportedSetup(
            f"precision={trainer.precision}: w is learned by L-BFGS, which gradients that are scaled do not suit. Use "
            "precision='bf16-mixed' or '32-true'; the members predict once, in any case."
        )


def check_trained(module: "AwareNet", untrained: Sequence[str]) -> None:
    """Refuse to weigh guesses.

    Args:
        module: The ensemble.
        untrained: Families whose members have random weights, or random heads.

    Raises:
        UnsupportedSetup: There are such families, and they are frozen.
    """
    if untrained and module.hparams.freeze_members:
        raise UnsupportedSetup(
            f"freeze_members=True, but the members of {', '.join(untrained)} have random weights or heads: nothing "
            "would be learned but how to weigh guesses. Give Family(checkpoints=[…]), or train all with "
            "freeze_members=False."
        )


def note_normalization(module: "AwareNet", datamodule: Any) -> None:
    """Note how the data module normalises images, which may be other than that of the last run.

    Raises:
        UnsupportedSetup: It does not say, and a family wants to know.
    """
    preprocessing = getattr(datamodule, "preprocessing", None)
    for option, attribute in (("data_mean", "mean"), ("data_std", "std")):
        found = getattr(preprocessing, attribute, None)
        if found is not None:
            module.hparams[option] = [float(value) for value in found]
    wanting = [n for n, i in zip(module.family_names, module.inputs, strict=True) if i.mean is not None]
    if wanting and (module.hparams.data_mean is None or module.hparams.data_std is None):
        raise UnsupportedSetup(
            f"Families {', '.join(wanting)} have a normalisation of their own, but that of the data is not known. Give "
            "AwareNet(data_mean=[…], data_std=[…]), what the data module normalises with, or "
            "Family(normalization='data') where the members were trained on such images."
        )


def check_labels(module: "AwareNet", datamodule: Any, orders: Mapping[str, Sequence[str]]) -> None:
    """Make sure that data, members and the ensemble number the classes alike, and note their names.

    Args:
        module: The ensemble.
        datamodule: The data, or None.
        orders: Names of the classes by member file, where it has them.

    Raises:
        UnsupportedSetup: Other classes, or another order.
    """
    hparams = module.hparams
    of_data = getattr(datamodule, CLASS_NAMES_KEY, None)
    classes = getattr(datamodule, "num_classes", None)
    if isinstance(classes, int) and classes != hparams.num_classes:
        raise UnsupportedSetup(
            f"The data has {classes} classes, the ensemble {hparams.num_classes}. Set num_classes={classes}, with "
            "members for these classes."
        )
    known = [names for names in (of_data, *orders.values()) if names is not None]
    if hparams.class_names is None and known:
        hparams.class_names = [str(name) for name in known[0]]
    expected = hparams.class_names
    told = {"the data": of_data, **orders} if expected is not None else {}
    for place, names in told.items():
        if names is not None and [str(name) for name in names] != expected:
            raise UnsupportedSetup(
                f"The classes of {place} are {', '.join(map(str, names))}, in this order; expected "
                f"{', '.join(expected)}. Outputs that mean different classes cannot be averaged: train that member on "
                "folders of the same names, or give AwareNet(class_names=[…])."
            )
    if expected is not None and len(expected) != hparams.num_classes:
        raise UnsupportedSetup(
            f"class_names={expected}: expected {hparams.num_classes} names, one for each output (num_classes)."
        )


def check_positive(module: "AwareNet") -> None:
    """Refuse a positive class that there is not.

    Raises:
        UnsupportedSetup: Says which there are.
    """
    positive, expected = module.hparams.positive, module.hparams.class_names
    if isinstance(positive, str) and positive not in (expected or []):
        raise UnsupportedSetup(
            f"positive={positive!r} is not one of the classes {', '.join(expected or ['(no names are known)'])}. Name "
            "one of them, or give its number."
        )
    classes = module.hparams.num_classes
    if not isinstance(positive, str) and not 0 <= positive < classes:
        raise UnsupportedSetup(f"positive={positive}: expected a class, 0 to {classes - 1}, or its name.")


def check_kept(module: "AwareNet", kept: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another ensemble.

    Raises:
        UnsupportedSetup: Its families, their sizes or its classes are others, or a fit with ``freeze_members`` would go
            on from one without, or the other way round; says which.
    """
    frozen, frozen_then = module.hparams.freeze_members, checkpoint.get("hyper_parameters", {}).get("freeze_members")
    fitting = module._trainer is not None and module.trainer.state.fn == "fit"
    if fitting and frozen_then is not None and frozen_then != frozen:
        raise UnsupportedSetup(
            f"The checkpoint is of a training with freeze_members={frozen_then}, whose optimizer has other parameters. "
            f"Begin a new fit with AwareNet.load_from_checkpoint(path, freeze_members={frozen}), without ckpt_path."
        )
    own = {"families": module.family_names, "sizes": [len(members) for members in module.members]}
    for entry, expected in own.items():
        if entry in kept and list(kept[entry]) != expected:
            raise UnsupportedSetup(
                f"The checkpoint is of an ensemble with the {entry} {list(kept[entry])}, but this one has {expected}. "
                "Build it with the same families, in the same order."
            )
    names, expected = checkpoint.get(CLASS_NAMES_KEY), module.hparams.class_names
    if names is not None and expected is not None and list(names) != list(expected):
        raise UnsupportedSetup(
            f"The checkpoint is of an ensemble for the classes {', '.join(names)}, in this order; this one has "
            f"{', '.join(expected)}. Give AwareNet the same class_names."
        )
