"""LoRA adapters in a model, by peft: how they are put in, and found again."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.weights.adapters import plain_config

__all__ = ["LoRA", "add_lora", "config_in", "peft_model_in"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates ΔW = s·B·A of some layers; the model itself is frozen, but for its head.

    Args:
        r: Rank of the updates.
        alpha: The scaling s is alpha/r, or alpha/√r with ``rslora``.
        targets: Ends of the names of the layers: of timm's ViTs ``qkv``, ``proj``, ``fc1`` and ``fc2``.
        dropout: Before A, in training.
        rslora: Scale by alpha/√r (Kalajdzievski 2023).
        dora: Train magnitude and direction apart (DoRA, Liu et al. 2024).
        heads: Layers that are trained as a whole and saved with the adapter; None: the model's own classifier.

    Raises:
        UnsupportedSetup: A value is out of range.

    Source: Hu et al., LoRA, ICLR 2022 (arXiv 2106.09685).
    """

    r: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("qkv",)
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    heads: Sequence[str] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        if not whole or self.r < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise UnsupportedSetup(
                f"LoRA(r={self.r}, alpha={self.alpha}, dropout={self.dropout}): expected a whole r of 1 or more, a "
                "finite alpha above 0 and dropout in [0, 1)."
            )
        if isinstance(self.targets, str) or not self.targets:
            raise UnsupportedSetup(f"LoRA(targets={self.targets!r}): expected a list of names of layers: ['qkv'].")
        if isinstance(self.heads, str):
            raise UnsupportedSetup(f"LoRA(heads={self.heads!r}): expected a list of names of layers: ['head'].")

    def plain(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}


def add_lora(
    model: nn.Module, lora: LoRA, heads: Sequence[str] = (), task: Literal["CAUSAL_LM"] | None = None
) -> nn.Module:
    """Put adapters into a model and freeze the rest.

    Args:
        model: The model.
        lora: The options.
        heads: Its classifier layers, which are trained as a whole unless the options name others.
        task: Of a transformers model, for the adapter's own loader (``AutoPeftModelForCausalLM``).

    Returns:
        A ``PeftModel`` around the model.

    Raises:
        UnsupportedSetup: There are no such layers, or peft cannot adapt them.
        MissingExtra: peft is not installed.
    """
    peft = import_extra("peft", "llm")
    heads = list(heads if lora.heads is None else lora.heads)
    names = [name for name, _ in model.named_modules()]
    unknown = [head for head in heads if not any(name.endswith(head) for name in names)]
    if unknown:  # peft would leave them out, and the model without a trained head
        raise UnsupportedSetup(
            f"LoRA(heads={heads}): {type(model).__name__} has no layer {unknown[0]!r}. Name its own, or none: heads=[]."
        )
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
        task_type=task,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=heads or None,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UnsupportedSetup(f"peft cannot adapt {type(model).__name__} with {lora}: {error}") from error


def peft_model_in(module: nn.Module) -> nn.Module | None:
    """The ``PeftModel`` in a module, or the module itself if it is one; None where there is none."""
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)  # without the package there is no adapter
    return None if kind is None else next((part for part in module.modules() if isinstance(part, kind)), None)


def config_in(module: nn.Module) -> dict[str, Any] | None:
    """The ``adapter_config`` of the active adapter in a module; None where there is none.

    Raises:
        UnsupportedSetup: There are several adapters, or the one has another name than ``default``.
    """
    model = peft_model_in(module)
    if model is None:
        return None
    if list(model.peft_config) != ["default"]:
        raise UnsupportedSetup(
            f"the model holds the adapters {', '.join(model.peft_config)}; expected one, named 'default', as "
            "get_peft_model makes it."
        )
    return plain_config(model.peft_config["default"])
