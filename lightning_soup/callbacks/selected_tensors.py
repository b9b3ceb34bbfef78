"""Which tensors of a module an average is made of, and which optimizer moves each."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchmetrics import Metric

from lightning_soup.callbacks.averaged_tensors import Slot
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.weights.weights_file import clean_names


def select(
    module: LightningModule, include: Sequence[str], exclude: Sequence[str], buffers: bool, owner: str
) -> list[Slot]:
    """Find the tensors to average: trainable parameters, and buffers if asked for, that the patterns admit.

    Args:
        module: The module.
        include: Patterns (``visual.*``) of which one must match; none admits all.
        exclude: Patterns of which none may match.
        buffers: Also the floating-point buffers that are saved, those of metrics excepted.
        owner: Name for messages.

    Raises:
        UnsupportedSetup: Nothing is left, a pattern matches nothing, or a parameter cannot be averaged.
    """
    slots = trainable(module)
    if buffers:
        found = {n: b for n, b in saved_buffers(module).items() if b.is_floating_point()}
        floats = {n: b for n, b in found.items() if nn.parameter.is_lazy(b) or b.isfinite().all()}
        slots += [_slot(module, n, n.replace("_orig_mod.", ""), b, True) for n, b in floats.items()]
    frozen = [name.replace("_orig_mod.", "") for name, p in module.named_parameters() if not p.requires_grad]
    names = [*(slot.name for slot in slots), *frozen]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):  # frozen ones, too, which may be unfrozen later
                raise UnsupportedSetup(
                    f"{owner}({option}=[{pattern!r}]): no trainable tensor matches. There are {_some(names)}. "
                    "Patterns match whole names: 'head.*', '*.weight'."
                )
    kept = [slot for slot in slots if _admitted(slot.name, include, exclude)]
    if not any(not slot.is_buffer for slot in kept):
        raise UnsupportedSetup(
            f"{owner}: {type(module).__name__} has no trainable parameter left to average"
            + (f" (include={list(include)}, exclude={list(exclude)})." if include or exclude else ".")
            + " Build parameters in __init__ or configure_model, and set requires_grad before fit."
        )
    for slot in kept:
        if nn.parameter.is_lazy(slot.found_in(module)):  # a parameter or a buffer
            raise UnsupportedSetup(f"{owner}: {slot.name} has no shape yet (a lazy module). Run one batch through it.")
        if is_traceable_wrapper_subclass(slot.tensor) and not isinstance(slot.tensor, DTensor):
            raise UnsupportedSetup(
                f"{owner}: {slot.name} is a {type(slot.tensor).__name__}, held in parts that cannot be averaged. "
                f"Leave it out with exclude=[{slot.name!r}]."
            )
    return kept


def trainable(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), frozen: bool = False
) -> list[Slot]:
    """The floating-point parameters with ``requires_grad`` that the patterns admit; tied ones once; or frozen ones."""
    numbers = [(n, p) for n, p in module.named_parameters() if p.is_floating_point() or p.is_complex()]
    found = [(name, parameter) for name, parameter in numbers if parameter.requires_grad != frozen]
    names = clean_names([name for name, _ in found], type(module).__name__)
    slots = [_slot(module, raw, names[raw], tensor, False) for raw, tensor in found]
    return [slot for slot in slots if _admitted(slot.name, include, exclude)]


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; those of torchmetrics are counts and no weights."""
    metrics = {id(part) for owner in module.modules() if isinstance(owner, Metric) for part in owner.modules()}
    found: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules():
        if id(owner) in metrics:
            continue
        for key, value in owner._buffers.items():
            if value is not None and key not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{key}" if prefix else key] = value
    return found


def by_optimizer(slots: Sequence[Slot], optimizers: Sequence[Optimizer]) -> dict[int, list[Slot]]:
    """Sort tensors by the last optimizer that moves them; those that none moves, and buffers, go to the first used."""
    owner = {id(p): i for i, opt in enumerate(optimizers) for group in opt.param_groups for p in group["params"]}
    used = sorted({owner[id(slot.tensor)] for slot in slots if id(slot.tensor) in owner})
    first = used[0] if used else 0
    sorted_: dict[int, list[Slot]] = {index: [] for index in used or [0]}
    for slot in slots:
        sorted_[owner.get(id(slot.tensor), first)].append(slot)
    return sorted_


def without_infinite(slots: Sequence[Slot], owner: str) -> tuple[list[Slot], list[str]]:
    """Leave out tensors with constant infinities, whose average would be NaN; they stay as they are in the module.

    Raises:
        NonFiniteWeights: A tensor holds NaN.
    """
    kept, left = [], []
    for slot in slots:
        if slot.local.sum().isfinite() or slot.local.isfinite().all():
            kept.append(slot)
            continue
        if slot.local.isnan().any():
            raise NonFiniteWeights(
                f"{owner}: {slot.name} holds NaN when averaging begins, so training has diverged. Lower the learning "
                "rate, or start from other weights."
            )
        left.append(slot.name)
    return kept, left


def _slot(module: nn.Module, raw: str, name: str, tensor: Tensor, is_buffer: bool) -> Slot:
    prefix, _, key = raw.rpartition(".")
    shape = torch.Size() if nn.parameter.is_lazy(tensor) else tensor.shape
    return Slot(name.replace("_orig_mod.", ""), prefix, module.get_submodule(prefix), key, is_buffer, shape)


def _admitted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
