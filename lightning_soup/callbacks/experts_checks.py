"""What ExpertsWeightAveraging refuses: options without a meaning, and setups in which it would go wrong."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_soup.callbacks.model_soup import ModelSoup
from lightning_soup.callbacks.schedule import When, parse_time
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.experts import check_count, check_share_rate

if TYPE_CHECKING:
    from lightning_soup.callbacks.experts_averaging import ExpertsWeightAveraging


def check_options(callback: "ExpertsWeightAveraging", stop_at: When | None) -> None:
    """Refuse options without a meaning."""
    if stop_at is not None and parse_time(stop_at, "ExpertsWeightAveraging(stop_at)").value == 0:
        raise UnsupportedSetup(f"stop_at={stop_at!r}: expected more than 0. share_rate=0 averages nothing.")
    check_count("num_experts", callback.num_experts, 2)
    check_share_rate(callback.share_rate, callback.num_experts)
    if not callable(callback.schedule) and callback.schedule not in ("linear", "constant"):
        raise UnsupportedSetup(
            f"schedule={callback.schedule!r}: expected linear, constant, or a function of step and total."
        )
    if callback.init not in ("copy", "independent"):
        raise UnsupportedSetup(f"init={callback.init!r}: expected copy or independent.")
    if callback.scope not in ("tokens", "positions"):
        raise UnsupportedSetup(f"scope={callback.scope!r}: expected tokens or positions.")
    target = callback.target
    if isinstance(target, str):
        raise UnsupportedSetup(f"target={target!r}: expected a list of patterns: [{target!r}].")
    if target is not None and not all(isinstance(pattern, str) for pattern in target):
        raise UnsupportedSetup(f"target={target!r}: expected a list of patterns, such as ['blocks.*.mlp'].")


def check_others(trainer: Trainer, callback: "ExpertsWeightAveraging") -> None:
    """Refuse callbacks that would take experts for the model that ships."""
    place = trainer.callbacks.index(callback)
    for number, other in enumerate(trainer.callbacks):
        names = {kind.__name__ for kind in type(other).__mro__}
        if "WeightAveraging" in names:
            raise UnsupportedSetup(
                f"{type(other).__name__} of Lightning exchanges the weights in files without telling, so that "
                "the plain model there would not be its average. Use ExponentialAverage of this package."
            )
        if (isinstance(other, ModelSoup) or "StochasticWeightAveraging" in names) and number < place:
            raise UnsupportedSetup(
                f"{type(other).__name__} stands before ExpertsWeightAveraging, so it would see another "
                "model than is trained or ships. List ExpertsWeightAveraging first."
            )


def check_experts(module: LightningModule, layers: Mapping[str, nn.Module], count: int) -> None:
    """Refuse a model without experts, or with another number of them.

    Args:
        module: The module.
        layers: Its layers of experts by path.
        count: N.
    """
    if not layers:
        raise UnsupportedSetup(
            f"{type(module).__name__} has no experts. Where the model is built in configure_model, call "
            "lightning_soup.layers.use_experts(self, num_experts=…) at its end."
        )
    for name, layer in layers.items():
        if len(layer.experts) != count:
            raise UnsupportedSetup(
                f"{name} has {len(layer.experts)} experts, but num_experts={count}. Give the same number, or begin "
                "with a plain model."
            )


def owner_of(trainer: Trainer, layers: Mapping[str, nn.Module]) -> int:
    """The index of the optimizer that moves the experts: one for all, or they would not be of one age.

    Raises:
        UnsupportedSetup: A trained parameter of an expert has no optimizer, or they have several.
    """
    owners = [{id(p) for group in opt.param_groups for p in group["params"]} for opt in trainer.optimizers]
    found: set[int] = set()
    for name, layer in layers.items():
        for key, parameter in layer.experts.named_parameters(prefix="experts"):
            if not parameter.requires_grad:
                continue
            index = next((i for i, owned in enumerate(owners) if id(parameter) in owned), None)
            if index is None:
                raise UnsupportedSetup(
                    f"{name}.{key} is a parameter that no optimizer owns: the optimizer was made before the "
                    "experts. Make it in configure_optimizers, of self.parameters()."
                )
            found.add(index)
    if len(found) > 1:
        raise UnsupportedSetup("the experts are spread over several optimizers. Let one own all of them.")
    return found.pop() if found else 0
