"""Adding the merged update of adapters to the base model that they were trained on, without forming it."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.adapters import PREFIX, LoraLayer, config_of, holds_adapter, layers_of
from lightning_soup.weights.formats import ADAPTER_KEY
from lightning_soup.weights.low_rank import ProductTensor, row_norms, stack
from lightning_soup.weights.stored_tensor import MemoryTensor, StoredTensor, TensorSpec
from lightning_soup.weights.weights_file import WeightsFile

LORA_OPTION = "lora"
"""The hyperparameter of this package's modules that puts an adapter into them."""
Row = tuple[float, ...]


def dense_terms(
    base: WeightsFile,
    adapters: Sequence[WeightsFile],
    weights: Row,
    rest: Mapping[str, Tensor],
    progress: Progress = silent,
) -> tuple[list[WeightsFile], dict[str, Row]]:
    """What to combine for the base model with Σ wᵢ·ΔWᵢ added to it.

    With DoRA, ΔWᵢ = mᵢ·(W + sᵢBᵢAᵢ)/‖W + sᵢBᵢAᵢ‖ − W, row by row.

    Args:
        base: The base model, by any names that end in those of the adapted layers; one with an adapter in it is taken
            without.
        adapters: Opened LoRA adapters of the same layers.
        weights: wᵢ.
        rest: Means of their other tensors: heads and biases, which take the place of the base's.
        progress: Shows how far it is, layer by layer.

    Returns:
        The base and the update, and their coefficients by tensor.

    Raises:
        IncompatibleIngredients: The base lacks a layer, holds all of them twice, has one in another shape or tied to
            what stays as it is, or is quantised.
    """
    base = without_adapter(base)
    layers = [layers_of(adapter) for adapter in adapters]
    prefix = _prefix(base, list(layers[0]), adapters[0])
    kept = {}
    for name, value in rest.items():
        if (target := _target(name)) is not None:
            target = prefix + target
            kept[target] = value.to(base.specs[target].dtype) if target in base else value
    ties = base.ties
    base = base.replaced(kept)
    updates: dict[str, StoredTensor] = {}
    for module, first in progress(layers[0].items(), "merging layers", len(layers[0])):
        name = f"{prefix}{module}.weight"
        own = [layer[module] for layer in layers]
        updates[name] = _update(base.tensors[name], name, adapters, own, weights)
        if first.bias is not None:
            updates[f"{prefix}{module}.bias"] = MemoryTensor(rest[first.bias])
    _check_ties(base, ties, {*kept, *updates})
    missing = [name for name in updates if name not in base]
    if missing:
        raise IncompatibleIngredients(f"{base.label}: has no {missing[0]!r}, to which the adapters add (lora_bias).")
    added = base.replaced({})
    added.tensors |= updates
    added.label = f"the update of {len(adapters)} adapters"
    return [base, added], {"*": (1.0, 0.0), **dict.fromkeys(updates, (1.0, 1.0))}


def without_adapter(checkpoint: WeightsFile) -> WeightsFile:
    """A whole model without the adapter in it, under the names that it had before; one without is returned as it is."""
    if not holds_adapter(checkpoint):
        return checkpoint
    names = {}
    for name in checkpoint:
        before, marked, rest = name.partition(PREFIX)
        if ".lora_" in rest or ".modules_to_save." in rest:
            continue
        names[before + rest.replace(".base_layer.", ".").replace(".original_module.", ".") if marked else name] = name
    metadata = {name: value for name, value in checkpoint.metadata.items() if name != ADAPTER_KEY}
    hparams = checkpoint.mapping_beside("hyper_parameters")
    if LORA_OPTION in hparams:
        metadata["hyper_parameters"] = {**hparams, LORA_OPTION: None}
    return WeightsFile(
        {short: checkpoint.tensors[long] for short, long in names.items()},
        label=checkpoint.label,
        path=checkpoint.path,
        format=checkpoint.format,
        key=checkpoint.key,
        metadata=metadata,
        dropped=checkpoint.dropped,
    )


def _prefix(base: WeightsFile, modules: Sequence[str], adapter: WeightsFile) -> str:
    """What stands before the names of layers in the base's file, such as ``model.``."""
    within = next((module for module in modules if ".base_layer." in module), None)
    if within is not None:
        raise IncompatibleIngredients(
            f"{adapter.label}: adapts {within.partition('.base_layer.')[0]!r}, torch's MultiheadAttention, as a whole, "
            "which cannot be added to the base here. Use merge='factor', 'exact' or 'svd', and PEFT's merge_and_unload."
        )
    ending = f"{modules[0]}.weight"
    found = [name.removesuffix(ending) for name in base if name == ending or name.endswith(f".{ending}")]
    fitting = sorted((p for p in found if all(f"{p}{module}.weight" in base for module in modules)), key=len)
    other = next((prefix for prefix in fitting if not prefix.startswith(fitting[0])), None)
    if other is not None:
        raise IncompatibleIngredients(
            f"{base.label}: holds the layers of {adapter.label} twice, under {fitting[0]!r} and {other!r}. Give a file "
            "with the one model that the adapters were trained on."
        )
    if fitting:
        return fitting[0]
    lacking = next((module for module in modules if not any(n.endswith(f"{module}.weight") for n in base)), modules[0])
    raise IncompatibleIngredients(
        f"{base.label}: is not the base of {adapter.label}: it has no weight of the adapted layer {lacking!r}. Give "
        "the model that the adapters were trained on."
    )


def _check_ties(base: WeightsFile, ties: Sequence[Sequence[str]], changed: Collection[str]) -> None:
    """A model that ties tensors cannot hold the result where only one of them changes."""
    for names in ties:
        own = [name for name in names if name in changed]
        if own and len(own) < len(names):
            raise IncompatibleIngredients(
                f"{base.label}: ties {' and '.join(map(repr, names))}, but the adapters change {own[0]!r} alone: the "
                "merged file would lose that in a model that ties them. Keep the merged adapter (merge='svd' or "
                "'exact'), or give a base that holds them apart."
            )


def _target(name: str) -> str | None:
    """The name in the base of a tensor that an adapter holds beside its factors; None for what it does not have."""
    short = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return None if any(mark in short for mark in (".lora_", ".original_module.", ".modules_to_save.")) else short


def _update(
    weight: StoredTensor, name: str, adapters: Sequence[WeightsFile], layers: Sequence[LoraLayer], weights: Row
) -> ProductTensor:
    spec, config = weight.spec, config_of(adapters[0])
    if not spec.dtype.is_floating_point or spec.dtype.itemsize == 1:
        raise IncompatibleIngredients(
            f"the base's {name!r} is {spec}: it is quantised, and cannot be added to. Give the base in float16, "
            "bfloat16 or float32, or keep the merged adapter (merge='svd' or 'exact')."
        )
    turned = layers[0].is_embedding or bool(config.get("fan_in_fan_out"))
    factors = [layer.matrices(adapter) for layer, adapter in zip(layers, adapters, strict=True)]
    if layers[0].magnitude is None:
        left, right = stack([(w * s, a, b) for w, (s, a, b) in zip(weights, factors, strict=True)])
        left, right = (right.T.contiguous(), left.T.contiguous()) if turned else (left, right)
        _check_shape(spec, name, left, right)
        return ProductTensor(left, right, spec.shape)
    if turned:
        raise IncompatibleIngredients(
            f"{layers[0].module}: DoRA on embeddings and on layers with fan_in_fan_out cannot be added to the base "
            "here. Use merge='factor', 'exact' or 'svd', and PEFT's merge_and_unload."
        )
    scaled, total = [], torch.zeros(spec.shape[0], dtype=torch.float32)
    for adapter, layer, w, factor in zip(adapters, layers, weights, factors, strict=True):
        left, right = stack([factor])
        _check_shape(spec, name, left, right)
        rows = w * adapter[layer.magnitude].flatten().to(left.dtype) / row_norms(weight, left, right)
        scaled.append((1.0, right, rows[:, None] * left))
        total = total + rows
    left, right = stack(scaled)
    return ProductTensor(left, right, spec.shape, (weight, total - sum(weights)))


def _check_shape(spec: TensorSpec, name: str, left: Tensor, right: Tensor) -> None:
    if (spec.shape[0], math.prod(spec.shape[1:])) != (len(left), right.shape[1]):
        raise IncompatibleIngredients(
            f"the base's {name!r} is {spec}, but the adapters change [{len(left)}, {right.shape[1]}]. Give the model "
            "that they were trained on."
        )
