"""Merging PEFT adapters: by their factors, by their products B·A, or into the base model.

Every mode is written as a combination for :func:`.combine`: of the adapters as they are, of one new adapter, or of the
base and what is added to it. So a merged adapter streams, is saved and is cooked again as any other soup.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.adapter_checks import MODES, MergeMode
from lightning_soup.weights.adapters import (
    ADAPTER_FORMAT,
    CONFIG_ENTRY,
    CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
    config_of,
    layers_of,
    pattern_for,
)
from lightning_soup.weights.atomic import atomic_folder
from lightning_soup.weights.combine import combine
from lightning_soup.weights.dense_base import dense_terms
from lightning_soup.weights.low_rank import stack, truncate
from lightning_soup.weights.save import save_combination
from lightning_soup.weights.stored_tensor import MemoryTensor, StoredTensor
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint

METRICS_NAME = "metrics.json"
FOLDER_FILES = (WEIGHTS_NAME, CONFIG_NAME, METRICS_NAME, OLD_WEIGHTS_NAME, "README.md")
_TOLD = 0.1  # share of the merged update, in Frobenius norm, from which on a truncation is told
Row = tuple[float, ...]
Terms = tuple[list[WeightsFile], Row | dict[str, Row]]


@dataclass(frozen=True)
class AdapterMerging:
    """How adapters become one. Heads (``modules_to_save``), biases and DoRA's magnitudes are averaged in every mode.

    Args:
        mode: ``"factor"``: A̅ = Σ wᵢAᵢ and B̅ = Σ wᵢBᵢ, for checkpoints of one run. The others average the products:
            ``"exact"``, all rows and columns stacked (PEFT's ``cat``), of rank Σ rᵢ; ``"svd"``, the best approximation
            of that of one rank; ``"dense"``, added to the base model, so that no adapter remains.
        rank: Of ``"svd"``; the largest of the adapters' own by default.
        base: The base model of ``"dense"``: any checkpoint; of one with an adapter in it, the model without it.

    Raises:
        RecipeError: An unknown mode, a rank without ``"svd"`` or below 1, or ``"dense"`` without a base or a base
            without it.
    """

    mode: MergeMode = "factor"
    rank: int | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"merge={self.mode!r}: expected one of {', '.join(MODES)}.")
        if self.rank is not None and (self.mode != "svd" or self.rank < 1):
            raise RecipeError(f"rank={self.rank}, merge={self.mode!r}: a rank of 1 or more is for merge='svd' only.")
        if (self.base is not None) != (self.mode == "dense"):
            needed = "needs base, a checkpoint of the model that was adapted" if self.base is None else "takes no base"
            raise RecipeError(f"merge={self.mode!r} {needed}. Base and merge='dense' go together.")

    def terms(
        self, adapters: Sequence[WeightsFile], coefficients: Row | dict[str, Row], progress: Progress = silent
    ) -> Terms:
        """What to combine, and with which coefficients, to have the merged weights.

        One adapter with weight 1 alone is itself, bit by bit, in all modes that end in an adapter.

        Args:
            adapters: Opened adapters that :func:`.check_adapters` has let pass.
            coefficients: One number wᵢ for each; by tensor in ``"factor"`` only.
            progress: Shows how far it is, layer by layer.

        Raises:
            RecipeError: Coefficients by tensor in another mode, or none that is not zero.
            IncompatibleIngredients: The base does not fit the adapters.
        """
        if self.mode == "factor":
            return list(adapters), coefficients
        if isinstance(coefficients, dict):
            raise RecipeError(f"merge={self.mode!r} takes one coefficient for each adapter, not one by tensor.")
        used = [(adapter, w) for adapter, w in zip(adapters, coefficients, strict=True) if w != 0.0]
        if not used:
            raise RecipeError("all coefficients are zero: nothing would be left of the adapters.")
        files, weights = [adapter for adapter, _ in used], tuple(w for _, w in used)
        rest = _means(files, weights)
        if self.base is not None:
            return dense_terms(open_checkpoint(self.base), files, weights, rest, progress)
        if weights == (1.0,) and (self.rank is None or {x.rank for x in layers_of(files[0]).values()} == {self.rank}):
            return files, weights
        return [_merged(files, weights, rest, self.mode, self.rank, progress)], (1.0,)


def _means(adapters: Sequence[WeightsFile], weights: Row) -> dict[str, Tensor]:
    """All that is no factor: weighted means. Biases of B are scaled as their products are."""
    layers = [layers_of(adapter) for adapter in adapters]
    products = tuple(name for layer in layers[0].values() for name in (layer.a, layer.b))
    files = [adapter.without(products) for adapter in adapters]
    if not files[0].tensors:
        return {}
    rows: dict[str, Row] = {"*": weights}
    for module, layer in layers[0].items():
        if layer.bias is not None:
            rows[layer.bias] = tuple(w * own[module].scaling for w, own in zip(weights, layers, strict=True))
    found = combine(files, rows)
    assert isinstance(found, dict)
    return found


def _merged(
    adapters: Sequence[WeightsFile],
    weights: Row,
    rest: Mapping[str, Tensor],
    mode: MergeMode,
    rank: int | None,
    progress: Progress,
) -> WeightsFile:
    """A new adapter of scaling 1, whose products are the weighted sums of the others'."""
    tensors: dict[str, StoredTensor] = {name: MemoryTensor(value) for name, value in rest.items()}
    layers = [layers_of(adapter) for adapter in adapters]
    ranks, lost, total = {}, 0.0, 0.0
    for module, first in progress(layers[0].items(), "merging layers", len(layers[0])):
        own = [layer[module] for layer in layers]
        factors = [layer.matrices(adapter) for layer, adapter in zip(own, adapters, strict=True)]
        left, right = stack([(w * s, a, b) for w, (s, a, b) in zip(weights, factors, strict=True)])
        if mode == "svd":
            ranks[module] = rank or max(layer.rank for layer in own)
            left, right, missed, whole = truncate(left, right, ranks[module])
            lost, total = lost + missed, total + whole
        ranks[module] = len(right)
        for name, value in ((first.a, right), (first.b, left)):
            spec = adapters[0].specs[name]
            shape = (len(right), *spec.shape[1:]) if value is right else (spec.shape[0], len(right), *spec.shape[2:])
            tensors[name] = MemoryTensor(value.to(spec.dtype).reshape(shape).contiguous())
    if lost > total * _TOLD**2:
        warnings.warn(
            f"the merged update was cut to rank {max(ranks.values())}, which leaves out {(lost / total) ** 0.5:.0%} of "
            "it (Frobenius norm). Give a larger rank, or merge='exact'.",
            stacklevel=2,
        )
    ordered = {name: tensors[name] for name in adapters[0] if name in tensors}
    metadata = {CONFIG_ENTRY: _config(config_of(adapters[0]), ranks)}
    return WeightsFile(ordered, label=f"{len(adapters)} adapters", format=ADAPTER_FORMAT, metadata=metadata)


def _config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of an adapter with such ranks, and scaling 1 throughout."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {pattern_for(module): rank for module, rank in ranks.items() if rank != common}
    plain = {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": dict(others)}
    return {**config, **plain, "use_rslora": False, "init_lora_weights": True}


def save_adapter(
    adapters: Sequence[WeightsFile],
    coefficients: Row | dict[str, Row],
    folder: str | os.PathLike,
    *,
    provenance: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    progress: Progress = silent,
) -> Path:
    """Combine adapters tensor by tensor into a folder that ``PeftModel.from_pretrained`` loads, atomically.

    Args:
        adapters: Opened adapters with the same tensors; the configuration is that of the first.
        coefficients: As in :func:`.combine`.
        folder: A new folder, or that of an earlier adapter, which is replaced.
        provenance: How it was made; it travels in the header of ``adapter_model.safetensors``.
        metadata: More strings for that header.
        metrics: What is known of it, for ``metrics.json`` beside it.
        accumulate: As in :func:`.combine`.
        progress: Shows how far it is.

    Returns:
        The folder.

    Raises:
        UnwritableOutput: The folder cannot be written, or holds other files.
        LightningSoupError: As in :func:`.combine`.
    """
    config = {**config_of(adapters[0]), "inference_mode": True}
    with atomic_folder(folder, files=FOLDER_FILES) as temporary:
        save_combination(
            adapters,
            coefficients,
            temporary / WEIGHTS_NAME,
            provenance=provenance,
            metadata=metadata,
            accumulate=accumulate,
            progress=progress,
        )
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        if metrics is not None:
            (temporary / METRICS_NAME).write_text(json.dumps(dict(metrics), indent=2) + "\n")
    return Path(folder)
