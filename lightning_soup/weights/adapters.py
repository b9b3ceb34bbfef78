"""PEFT adapters: which tensors they hold, how their layers are scaled, and finding them inside whole checkpoints.

An adapter is a :class:`.WeightsFile` of the format ``"peft adapter"`` with PEFT's names (``base_model.model.<module>.
lora_A.weight``) and its ``adapter_config`` among the metadata. Only safetensors and JSON are read and written here, so
peft itself is not needed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_soup.errors import NonFiniteWeights, UnreadableCheckpoint
from lightning_soup.weights.formats import ADAPTER_KEY
from lightning_soup.weights.stored_tensor import StoredTensor
from lightning_soup.weights.weights_file import WeightsFile

ADAPTER_FORMAT = "peft adapter"
CONFIG_ENTRY = "adapter_config"
"""Where the metadata of an adapter hold its configuration."""
RUN_ENTRY = "lightning_soup_run"
"""Where the metadata of an adapter hold the digest of the factors A that its training began with."""
WEIGHTS_NAME, OLD_WEIGHTS_NAME = "adapter_model.safetensors", "adapter_model.bin"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
"""How the names of an adapter begin, by PEFT's own convention."""
FACTORS_A = (".lora_A.", ".lora_embedding_A")
"""What is in the names of factors A, on disk and in memory."""

_ENDINGS = (".lora_A.weight", ".lora_embedding_A")


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update ΔW = s·B·A.

    Attributes:
        module: The layer's name in the base model.
        a: Name of the tensor A, ``[r, in]`` (of a convolution ``[r, in, k, k]``, of an embedding ``[r, rows]``).
        b: Name of the tensor B, ``[out, r]``.
        rank: r.
        scaling: s = lora_alpha/r, or lora_alpha/√r with ``use_rslora``.
        bias: Name of B's bias, which ``lora_bias`` adds; it is scaled by s, too.
        magnitude: Name of the magnitudes of DoRA.
    """

    module: str
    a: str
    b: str
    rank: int
    scaling: float
    bias: str | None
    magnitude: str | None

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding, whose update is (B·A)ᵀ."""
        return self.a.endswith("_A")

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the tensors whose product is the update."""
        return (self.a, self.b, *([self.bias] if self.bias else []))

    def matrices(self, adapter: WeightsFile) -> tuple[float, Tensor, Tensor]:
        """s, A ``[r, in]`` and B ``[out, r]`` in an adapter, kernels of convolutions taken as part of ``in``.

        Raises:
            NonFiniteWeights: One holds a NaN or an infinity.
        """
        for name in (self.a, self.b):
            if not adapter[name].isfinite().all():
                raise NonFiniteWeights(
                    f"{adapter.label}: tensor {name!r} ({adapter.specs[name]}) holds NaN or an infinity. Leave this "
                    "checkpoint out or train it again."
                )
        return self.scaling, adapter[self.a].flatten(1), adapter[self.b].flatten(1)


def is_adapter(weights: WeightsFile) -> bool:
    """Whether an opened checkpoint is a PEFT adapter."""
    return weights.format == ADAPTER_FORMAT


def holds_adapter(weights: WeightsFile) -> bool:
    """Whether a checkpoint of a whole model has a LoRA adapter in it, as Lightning saves modules with one."""
    return not is_adapter(weights) and any(mark in name for mark in FACTORS_A for name in weights)


def config_of(adapter: WeightsFile) -> dict[str, Any]:
    """The configuration of an adapter, as it stands in ``adapter_config.json``."""
    return adapter.mapping_beside(CONFIG_ENTRY)


def layers_of(adapter: WeightsFile) -> dict[str, LoraLayer]:
    """The layers of a LoRA adapter, by their names in the base model; none for other kinds of adapters.

    Raises:
        UnreadableCheckpoint: The tensors do not fit the configuration.
    """
    config, where, found = config_of(adapter), str(adapter.path or adapter.label), {}
    for a in adapter:
        ending = next((ending for ending in _ENDINGS if a.endswith(ending)), None)
        if ending is None:
            continue
        stem = a.removesuffix(ending)
        b = stem + ending.replace("_A", "_B")
        module = stem.removeprefix(PREFIX)
        shape = adapter.specs[a].shape
        rank = shape[0] if len(shape) > 1 else 0
        expected = _setting(config, "rank_pattern", "r", module, where)
        if b not in adapter or adapter.specs[b].shape[1:2] != (rank,) or expected != rank:
            raise UnreadableCheckpoint(
                f"{where}: {a!r} is {adapter.specs[a]}, {b!r} is "
                f"{adapter.specs.get(b, 'missing')}, and the adapter_config says rank {expected}. They are not of one "
                "adapter; save it again."
            )
        bias, magnitude = f"{stem}.lora_B.bias", f"{stem}.lora_magnitude_vector"
        alpha = _setting(config, "alpha_pattern", "lora_alpha", module, where)
        found[module] = LoraLayer(
            module,
            a,
            b,
            rank,
            alpha / (rank**0.5 if config.get("use_rslora") else rank),
            bias if bias in adapter else None,
            magnitude if magnitude in adapter else None,
        )
    return found


def _setting(config: Mapping[str, Any], pattern: str, common: str, module: str, where: str) -> float:
    """A layer's rank or alpha: of the first pattern that fits its name, as PEFT looks it up, or the common one."""
    try:
        values = (value for key, value in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        found = next(values, config.get(common, 8))  # PEFT's default of both
    except (AttributeError, re.error) as error:
        raise UnreadableCheckpoint(
            f"{where}: the adapter_config says {pattern}={config[pattern]!r}; expected numbers by patterns of names "
            f"({error}). Save the adapter again."
        ) from error
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise UnreadableCheckpoint(
            f"{where}: the adapter_config says {common}={found!r} of {module!r}; expected a number. Save the adapter "
            "again."
        )
    return found


def pattern_for(module: str) -> str:
    """A key for ``rank_pattern`` and ``alpha_pattern`` that fits this layer only, not others whose names end so."""
    return f"^{re.escape(module)}"


# ---------------------------------------------------------------------------------------------- in whole checkpoints


def adapter_in(checkpoint: WeightsFile, config: Mapping[str, Any] | None = None, name: str = "default") -> WeightsFile:
    """Take the adapter out of a checkpoint of a whole model: the same as PEFT would have saved of that model.

    Args:
        checkpoint: An opened checkpoint of a module with a ``PeftModel`` in it; an adapter is returned as it is.
        config: Its ``adapter_config``; by default what this package's modules and callbacks wrote into the checkpoint.
        name: The adapter's name in the model.

    Returns:
        The adapter; ``original_names`` lead back to the tensors of the checkpoint.

    Raises:
        UnreadableCheckpoint: There is no adapter of that name, or nothing tells its configuration.
    """
    if is_adapter(checkpoint):
        return checkpoint
    where = checkpoint.path or checkpoint.label
    config = config or checkpoint.mapping_beside(ADAPTER_KEY)
    if not config and holds_adapter(checkpoint):
        raise UnreadableCheckpoint(
            f"{where}: does not say how its adapter was configured (alpha, biases), and is no folder with "
            f"{CONFIG_NAME}. Save adapters with MetricsWeightedAveraging or PeftModel.save_pretrained, or pass the "
            "configuration to adapter_in(config=…)."
        )
    names = adapter_names(checkpoint, config, name)
    if not names:
        raise UnreadableCheckpoint(
            f"{where}: holds no adapter {name!r} under {PREFIX!r}, where PEFT's get_peft_model puts one. Name a "
            "checkpoint of a module that holds a PeftModel."
        )
    tensors: dict[str, StoredTensor] = {short: checkpoint.tensors[long] for short, long in names.items()}
    metadata = {CONFIG_ENTRY: dict(config), "global_step": checkpoint.metadata.get("global_step")}
    return WeightsFile(
        tensors,
        label=checkpoint.label,
        path=checkpoint.path,
        format=ADAPTER_FORMAT,
        original_names=names,
        metadata=metadata,
    )


def adapter_names(weights: Mapping[str, Any], config: Mapping[str, Any], name: str = "default") -> dict[str, str]:
    """The tensors of an adapter among those of a whole model: from PEFT's names on disk to those in memory."""
    found, fallback = {}, {}
    for long in weights:
        _, marked, rest = long.partition(PREFIX)
        short = _name_on_disk(rest, name, str(config.get("bias", "none"))) if marked else None
        if short is None:
            continue
        (found if f".{name}" in rest else fallback).setdefault(PREFIX + short, long)
    return {**fallback, **found} if found else {}


def _name_on_disk(rest: str, name: str, bias: str) -> str | None:
    """The name under which PEFT saves a tensor of a wrapped model, None for one that stays with the base model."""
    if f".modules_to_save.{name}." in rest:
        return rest.replace(f".modules_to_save.{name}.", ".")
    if ".modules_to_save." in rest or ".original_module." in rest:
        return None
    if ".lora_" in rest:
        short = re.sub(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)", r"\1", rest)
        return None if short == rest else re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", short)
    if f".token_adapter.trainable_tokens_delta.{name}" in rest:
        return rest.removesuffix(f".{name}")
    if rest.endswith(".base_layer.bias"):
        return rest if bias != "none" else None
    return rest if rest.endswith(".bias") and bias == "all" else None


def plain_config(config: Any) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for a configuration of PEFT: plain values, sets in order.

    Args:
        config: A ``peft.LoraConfig``, or another one with ``to_dict()``.
    """
    content = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
    return {**content, "inference_mode": True}
