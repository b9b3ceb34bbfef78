"""PEFT adapters: by hand, in float64, and by peft itself on a small network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_soup.modules.lora import LoRA, add_lora
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.adapters import PREFIX, layers_of
from lightning_soup.weights.low_rank import stack
from tests.helpers.boring import TinyClassifier


def write_adapter(
    folder: Path, layers: Mapping[str, tuple[Any, Any]], tensors: Mapping[str, Tensor] | None = None, **config: Any
) -> Path:
    """A folder as PEFT writes it, with factors A and B by layer; ``r`` and ``lora_alpha`` fit the first."""
    content = {}
    for module, (a, b) in layers.items():
        a, b = (torch.as_tensor(x, dtype=torch.float64) if not isinstance(x, Tensor) else x for x in (a, b))
        content |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    content |= {PREFIX + name: value for name, value in (tensors or {}).items()}
    rank = len(next(iter(content.values())))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(layers), **config}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous().clone() for name, value in content.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def updates(adapter: Any) -> dict[str, Tensor]:
    """ΔW = s·B·A of every layer, dense, in float64."""
    opened = open_checkpoint(adapter)
    found = {}
    for module, layer in layers_of(opened).items():
        s, a, b = layer.matrices(opened)
        left, right = stack([(s, a.double(), b.double())])
        found[module] = left @ right
    return found


class Network(nn.Module):
    """An embedding, two linear layers with BatchNorm between them, a convolution, and a head of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.second = nn.Linear(32, 5, bias=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, 3]`` of tokens ``[B]``."""
        x = torch.relu(self.norm(self.first(self.embed(tokens))))
        x = torch.relu(self.conv(x[:, None]).flatten(1))
        return self.head(torch.relu(self.second(x)))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"first": 3, "second": 1}, "alpha_pattern": {"second": 5}},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "head": {"modules_to_save": ["head", "norm"]},
    "embedding and convolution": {"target_modules": ["embed", "first", "conv"]},
}


def trained(variant: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network with an adapter by peft, whose every trained tensor is away from where it began.

    The base is the same for all seeds, and so are the factors A that training began with.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], **VARIANTS[variant]}
    model = get_peft_model(Network(), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


class TinyLoRA(TinyClassifier):
    """The tiny classifier with rank-2 adapters on its first layer, and the last one trained as a whole."""

    def __init__(self, batch_norm: bool = False, lr: float = 0.05, dora: bool = False) -> None:
        super().__init__(batch_norm, lr)
        lora = LoRA(r=2, alpha=4, targets=["0"], heads=["3"], dora=dora)
        self.net = add_lora(self.net, lora)
