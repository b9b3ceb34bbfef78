"""Whether PEFT adapters can be merged in a certain way, and if not, why: from names, shapes and configurations."""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from lightning_soup.errors import IncompatibleIngredients, UnreadableCheckpoint
from lightning_soup.weights.adapters import FACTORS_A, RUN_ENTRY, config_of, is_adapter, layers_of
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.geometry import cosines
from lightning_soup.weights.weights_file import WeightsFile

MergeMode = Literal["factor", "exact", "svd", "dense"]
MODES: tuple[MergeMode, ...] = ("factor", "exact", "svd", "dense")
_UNRELATED = 0.5  # cosine between factors A: those of one run lie far above, those drawn anew near 0
_COMPARED = 24  # factors that are sampled, spread over the depth of the network
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_A_PRODUCT = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "target_parameters",
)
_NOT_IN_THE_BASE = ("alora_invocation_tokens", "layer_replication", "trainable_token_indices")


def check_adapters(adapters: Sequence[WeightsFile], mode: MergeMode, one_run: Literal["require", "ignore"]) -> None:
    """Check that adapters can be merged.

    Args:
        adapters: Opened adapters.
        mode: How they are to be merged; see :class:`.AdapterMerging`.
        one_run: Whether ``"factor"`` is refused for adapters whose factors were drawn apart: of those, only the
            products B·A can be averaged.

    Raises:
        IncompatibleIngredients: They are not all adapters, or of different base models, layers, ranks or scalings, or
            of a kind for which the mode would be wrong.
        UnreadableCheckpoint: The tensors of one are not named or shaped as its configuration says.
    """
    for adapter in adapters:
        if not is_adapter(adapter):
            raise IncompatibleIngredients(
                f"{adapter.label}: is {adapter.format}, not an adapter, but the others are. Merge adapters with "
                "adapters only; an adapter into its base with merge='dense'."
            )
        _check_names(adapter)
    _same_setting(adapters)
    if mode == "factor":
        _same_factors(adapters)
        if one_run == "require":
            check_one_run(adapters)
        return
    for adapter in adapters:
        _check_product(adapter, mode)
    _same_layers(adapters)
    factors = [{name for layer in layers_of(adapter).values() for name in layer.factors[:2]} for adapter in adapters]
    rest = [adapter.without(tuple(names)) for adapter, names in zip(adapters, factors, strict=True)]
    if any(file.tensors for file in rest):
        check_compatible(rest)  # heads, biases and magnitudes, which are averaged


def check_one_run(checkpoints: Sequence[WeightsFile]) -> None:
    """Refuse checkpoints with LoRA factors that were drawn apart.

    ΔW = B·A is the same for (B·R, R⁻¹·A), so factors of independent runs are not aligned, and their mean is of no use.
    Adapters that :class:`.MetricsWeightedAveraging` saved know the factors A that they began with; of others, the
    angles between their factors A tell.

    Args:
        checkpoints: Adapters, or whole models with adapters in them.

    Raises:
        IncompatibleIngredients: They are not of one run.
    """
    runs = {file.metadata.get(RUN_ENTRY) for file in checkpoints}
    if len(runs) == 1 and None not in runs:
        return
    why = "began with other factors A" if None not in runs else _angles(checkpoints)
    if why:
        raise IncompatibleIngredients(
            f"{checkpoints[0].label} and the others are adapters of different runs: they {why}. Averaging their "
            "factors would be meaningless; merge the products instead, by MetricsWeightedSoup with merge='exact' or "
            "'svd'. If they are of one run all the same: common_start='ignore' in the recipe, "
            "--recipe.common_start=ignore on the command line."
        )


def _angles(checkpoints: Sequence[WeightsFile]) -> str:
    first = checkpoints[0]
    names = [name for name in first if any(mark in name for mark in FACTORS_A)]
    names = [name for name in names if all(name in file for file in checkpoints)][:: max(1, len(names) // _COMPARED)]
    if not names or len(checkpoints) < 2:
        return ""
    found = cosines(checkpoints, names)
    for i in range(1, len(checkpoints)):
        middle = statistics.median(float(found[name][0, i]) for name in names)
        if middle < _UNRELATED:
            return f"have factors A at a median cosine of {middle:.2f} ({first.label}, {checkpoints[i].label})"
    return ""


def _check_names(adapter: WeightsFile) -> None:
    """Refuse factors under names that PEFT does not load: it would leave them out, and the adapter do nothing."""
    strange = next((name for name in adapter if ".lora_" in name), None)
    if _is_lora(adapter) and strange is not None and not layers_of(adapter):
        raise UnreadableCheckpoint(
            f"{adapter.path or adapter.label}: holds {strange!r}, but nothing that ends in lora_A.weight, as PEFT "
            "names factors on disk. Save it with PeftModel.save_pretrained."
        )


def _is_lora(adapter: WeightsFile) -> bool:
    return str(config_of(adapter).get("peft_type", "LORA")).upper() == "LORA"


def _same_setting(adapters: Sequence[WeightsFile]) -> None:
    """One kind of adapter on one base model."""
    for key, what, cause in (
        ("peft_type", "kinds of adapters", "Merge adapters of one kind."),
        (
            "base_model_name_or_path",
            "base models",
            "An adapter fits its own base only. If it is one under two names or paths, write one of them into every "
            "adapter_config.json.",
        ),
        ("revision", "revisions of the base model", "An adapter fits its own base only."),
        ("use_dora", "uses of DoRA", "Train all with it or all without."),
        ("fan_in_fan_out", "layouts of the base's weights", "They must be of one base model."),
    ):
        values = [config_of(adapter).get(key) or None for adapter in adapters]
        _refuse_differing(adapters, values, what, cause)
    inits = [_init(adapter) for adapter in adapters]
    if any(inits):
        _refuse_differing(adapters, inits, "initialisations that change the base", "They refer to different bases.")


def _same_layers(adapters: Sequence[WeightsFile]) -> None:
    layers = [sorted(layers_of(adapter)) for adapter in adapters]
    for adapter, own in zip(adapters, layers, strict=True):
        apart = sorted(set(own) ^ set(layers[0]))
        if apart:
            shown = ", ".join(apart[:4]) + (" …" if len(apart) > 4 else "")
            raise IncompatibleIngredients(
                f"{adapters[0].label} and {adapter.label} adapt other layers (target_modules): {shown} in one of them "
                "only. Merge adapters with the same targets."
            )
    first = layers_of(adapters[0])
    for adapter in adapters[1:]:
        for module, layer in layers_of(adapter).items():
            for ours, theirs, ranked in ((first[module].a, layer.a, 0), (first[module].b, layer.b, 1)):
                a, b = list(adapters[0].specs[ours].shape), list(adapter.specs[theirs].shape)
                if ours != theirs or a[:ranked] + a[ranked + 1 :] != b[:ranked] + b[ranked + 1 :]:
                    raise IncompatibleIngredients(
                        f"{module}: {ours} is {a} in {adapters[0].label}, {theirs} is {b} in {adapter.label}. The "
                        "adapters are of different base models."
                    )


def _same_factors(adapters: Sequence[WeightsFile]) -> None:
    """Layers, ranks and scalings agree, so that factors can be averaged."""
    _same_layers(adapters)
    per_file = [layers_of(adapter) for adapter in adapters]
    for module in per_file[0]:
        layers = [layers[module] for layers in per_file]
        for values, what in (([x.rank for x in layers], "ranks"), ([x.scaling for x in layers], "scalings alpha/r")):
            instead = "Averaging factors would mis-scale them; use merge='exact' or 'svd'."
            _refuse_differing(adapters, values, f"{what} of {module}", instead)
    check_compatible(adapters)


def _check_product(adapter: WeightsFile, mode: MergeMode) -> None:
    """The update of a layer must be s·B·A on the base that the configuration names."""
    config, init = config_of(adapter), _init(adapter)
    if not _is_lora(adapter) or not layers_of(adapter):
        given = "an adapter without layers of LoRA" if _is_lora(adapter) else config.get("peft_type")
        raise IncompatibleIngredients(
            f"{adapter.label}: merge={mode!r} is for LoRA, this is {given}. Use merge='factor'."
        )
    if init:
        raise IncompatibleIngredients(
            f"{adapter.label}: init_lora_weights={init!r} changes the base when an adapter is made, by its rank, so "
            f"that merge={mode!r} would not fit it. Use merge='factor' for checkpoints of one run, or convert each to "
            "a plain LoRA first (save_pretrained(path_initial_model_for_weight_conversion=…))."
        )
    for key in (*_NOT_A_PRODUCT, *(_NOT_IN_THE_BASE if mode == "dense" else ())):
        if config.get(key):
            raise IncompatibleIngredients(
                f"{adapter.label}: {key}={config[key]!r} makes its update another one than s·B·A of all inputs, so "
                f"merge={mode!r} would be wrong. Use merge='factor' for checkpoints of one run."
            )


def _init(adapter: WeightsFile) -> str | None:
    """The initialisation, if it is one that moves a part of the base into the adapter."""
    init = config_of(adapter).get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(_MOVE_THE_BASE) else None


def _refuse_differing(adapters: Sequence[WeightsFile], values: Sequence[Any], what: str, advice: str) -> None:
    for adapter, value in zip(adapters, values, strict=True):
        if value != values[0]:
            raise IncompatibleIngredients(
                f"the adapters have different {what}: {values[0]} in {adapters[0].label}, {value} in {adapter.label}. "
                f"{advice}"
            )
