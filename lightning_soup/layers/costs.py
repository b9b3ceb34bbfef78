"""What masks save: weights, bytes and multiplications of each layer."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_soup.layers.masks import Masks, masked_parameters, pruned_in

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerCost", "cost_table", "layer_costs", "write_costs"]


@dataclass(frozen=True)
class LayerCost:
    """What one parameter costs, dense and pruned.

    Attributes:
        name: Of the parameter.
        weights: N_l: how many it has.
        kept: How many are not pruned.
        dense_bytes: As it is stored.
        sparse_bytes: The kept values, and a bit for each weight that tells which they are.
        flops: That it takes part in, in one forward pass, dense: two for each multiplication with its addition.
        kept_flops: The same without what is multiplied by zero. Fewer in time only where the hardware skips them: for
            whole rows that are taken out, or 2:4.
    """

    name: str
    weights: int
    kept: int
    dense_bytes: int
    sparse_bytes: int
    flops: int
    kept_flops: int


def layer_costs(module: nn.Module, masks: Masks, *inputs: Any) -> list[LayerCost]:
    """What each masked parameter costs, with and without what is pruned.

    Args:
        module: The network.
        masks: Its masks.
        inputs: What one forward pass takes, such as a batch of one image; without any, no operations are counted.

    Raises:
        UnsupportedSetup: They are masks of another model.
    """
    parameters = masked_parameters(module, masks)
    flops = _flops(module, parameters, inputs) if inputs else dict.fromkeys(parameters, 0)
    found = []
    for name, mask in masks.items():
        weight, pruned = parameters[name], pruned_in(mask)
        kept, size = mask.numel() - pruned, weight.element_size()
        layer = flops[name]
        found.append(
            LayerCost(
                name=name,
                weights=mask.numel(),
                kept=kept,
                dense_bytes=mask.numel() * size,
                sparse_bytes=kept * size + -(-mask.numel() // 8),
                flops=layer,
                kept_flops=round(layer * kept / max(mask.numel(), 1)),
            )
        )
    return found


def _flops(module: nn.Module, parameters: Mapping[str, Tensor], inputs: Sequence[Any]) -> dict[str, int]:
    """Operations that each parameter takes part in, in evaluation mode."""
    modes = [(part, part.training) for part in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that nobody counts
    module.eval()
    try:
        with _Counter(parameters) as counter, torch.no_grad():
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in modes:
            part.training = training
    return counter.flops


class _Counter(TorchDispatchMode):
    """Counts by the memory that a product reads: attention uses weights of layers that it does not call."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items()}
        self.flops = dict.fromkeys(parameters, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            for argument in args:
                name = self._names.get(argument.untyped_storage().data_ptr()) if isinstance(argument, Tensor) else None
                if name is not None:
                    self.flops[name] += count(*args, **(kwargs or {}), out_val=out)
        return out


def write_costs(costs: Sequence[LayerCost], path: Path) -> None:
    """Write the costs as comma-separated values, one line a parameter."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(LayerCost)])
        writer.writeheader()
        writer.writerows(map(asdict, costs))


def cost_table(costs: Sequence[LayerCost]) -> "Table":
    """The costs as a rich table, with their sum."""
    from rich.table import Table

    total = LayerCost(
        "all", *(sum(getattr(c, f) for c in costs) for f in [field.name for field in fields(LayerCost)][1:])
    )
    table = Table(title="What pruning leaves")
    for column in ("parameter", "weights", "kept", "dense, MB", "pruned, MB", "MFLOPs", "kept MFLOPs"):
        table.add_column(column, justify="left" if column == "parameter" else "right", overflow="fold")
    for cost in [*costs, total]:
        table.add_row(
            cost.name,
            f"{cost.weights:,}",
            f"{cost.kept / max(cost.weights, 1):.1%}",
            f"{cost.dense_bytes / 1e6:.2f}",
            f"{cost.sparse_bytes / 1e6:.2f}",
            f"{cost.flops / 1e6:,.1f}",
            f"{cost.kept_flops / 1e6:,.1f}",
        )
    return table
