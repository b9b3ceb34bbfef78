"""What the averages over time refuse or warn of, before anything is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_soup.errors import UnsupportedSetup

if TYPE_CHECKING:
    from lightning_soup.callbacks.live_average import LiveAverage

Stage = Literal["validate", "test", "predict"]
STAGES: tuple[Stage, ...] = ("validate", "test", "predict")


def check_options(
    owner: str,
    name: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    buffers: str,
    recalibrate_batches: int,
    evaluate_on: Sequence[str],
    leave: str | None,
) -> None:
    """Refuse options of a :class:`.LiveAverage` that have no meaning.

    Raises:
        UnsupportedSetup: One has none.
    """
    if not name or any(character in name for character in "/\\'\""):
        raise UnsupportedSetup(f"{owner}(name={name!r}): expected a name without slashes and quotes.")
    if name in ("average", "raw"):
        raise UnsupportedSetup(f"{owner}(name={name!r}): open_checkpoint gives this word a meaning of its own.")
    if unknown := [stage for stage in evaluate_on if stage not in STAGES]:
        raise UnsupportedSetup(f"{owner}(evaluate_on={unknown}): expected some of {', '.join(STAGES)}.")
    if buffers not in ("copy", "average", "recalibrate"):
        raise UnsupportedSetup(f"{owner}(buffers={buffers!r}): expected 'copy', 'average' or 'recalibrate'.")
    if leave not in (None, "average", "live"):
        raise UnsupportedSetup(f"{owner}(leave={leave!r}): expected 'average' or 'live'.")
    if recalibrate_batches < 1:
        raise UnsupportedSetup(f"{owner}(recalibrate_batches={recalibrate_batches}): expected 1 or more.")
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise UnsupportedSetup(f"{owner}({option}={patterns!r}): expected a list of patterns: [{patterns!r}].")


def check_surroundings(trainer: Trainer, rule: "LiveAverage", averages: Sequence["LiveAverage"]) -> None:
    """Refuse what an average cannot stand beside in a Trainer, and say where it would be lost.

    Args:
        trainer: The Trainer.
        rule: The average.
        averages: All averages in the Trainer.

    Raises:
        UnsupportedSetup: Another average wants the module at the same time, or a callback exchanges parameters.
    """
    owner = type(rule).__name__
    for what, claiming in (
        ("evaluate_on=[]", [average.name for average in averages if average.evaluate_on]),
        ("leave='live'", [average.name for average in averages if average.leave == "average"]),
    ):
        if len(claiming) > 1:
            raise UnsupportedSetup(
                f"the module can hold one average at a time, but {' and '.join(claiming)} ask for it. Give all but "
                f"one {what}; files hold each under its name all the same."
            )
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):
        raise UnsupportedSetup(
            f"{owner} does not work with ModelPruning, which exchanges parameters in training (weight for weight_orig "
            "and a mask), so that there is nothing to average. Use SparsityMask, or prune the module before fit."
        )
    ends = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    if ends and rule.leave == "live" and {"test", "predict"} & set(rule.evaluate_on):
        rank_zero_warn(
            f"{rule.name}: the processes of this strategy end with the fit, and the average with them. After it, "
            "the module has its live weights, and tests are of those. Give leave='average', or test a file of the "
            "fit (ckpt_path)."
        )
