"""Whether checkpoints can be added, and if not, why: checked from headers alone, before any data is read."""

from collections.abc import Iterable, Sequence

import torch

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.weights.stored_tensor import TensorSpec
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

_SHOWN = 10
_HEADS = ("head", "fc", "classifier", "heads", "classif", "last_linear", "logits")


def check_compatible(checkpoints: Iterable[Source | WeightsFile]) -> None:
    """Check that all checkpoints hold the same tensor names, shapes and kinds.

    Kinds are floating, complex, integer and bool. Floating types may differ in width: a float16 file can be
    averaged with float32 ones.

    Args:
        checkpoints: What :func:`.open_checkpoint` opens.

    Raises:
        IncompatibleIngredients: They differ. The message lists at most ten tensors, each with file, shape and
            type, and the likely cause.
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    problems: list[str] = []
    causes: list[str] = []
    for other in opened[1:]:
        _compare(opened[0], other, problems, causes)
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f"… and {len(problems) - _SHOWN} more")
        cause = "".join(f"\nLikely cause: {cause}" for cause in dict.fromkeys(causes))
        raise IncompatibleIngredients(
            f"these checkpoints cannot be averaged, {len(problems)} tensors differ:\n  " + "\n  ".join(shown) + cause
        )


def kind(dtype: torch.dtype) -> str:
    """The kind of arithmetic that a dtype allows: floating, complex, bool or integer."""
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "integer"


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a classifier head, by the names that libraries give it."""
    return any(part in _HEADS for part in name.split("."))


def _compare(first: WeightsFile, other: WeightsFile, problems: list[str], causes: list[str]) -> None:
    a, b = first.specs, other.specs
    missing, extra = [n for n in a if n not in b], [n for n in b if n not in a]
    problems += [f"{name}: {a[name]} in {first.label}, missing in {other.label}" for name in missing]
    problems += [f"{name}: missing in {first.label}, {b[name]} in {other.label}" for name in extra]
    differing = [n for n in a if n in b and (a[n].shape != b[n].shape or kind(a[n].dtype) != kind(b[n].dtype))]
    problems += [f"{name}: {a[name]} in {first.label}, {b[name]} in {other.label}" for name in differing]
    if missing or extra:
        causes.append(_why_names(first, other, missing, extra))
    elif differing:
        causes.append(_why_shapes(a, b, differing))


def _why_names(first: WeightsFile, other: WeightsFile, missing: Sequence[str], extra: Sequence[str]) -> str:
    adapters = [w.label for w in (first, other) if any("lora_" in name for name in w.specs)]
    if len(adapters) == 1:
        return f"{adapters[0]} is an adapter, the other a full model. Merge the adapter into its base first."
    for long, short, names in ((other, first, extra), (first, other, missing)):
        prefix = _common_prefix(short.specs, names)
        if prefix:
            return (
                f"the names in {long.label} begin with {prefix!r}: it was saved from a module that wraps the "
                f"model of {short.label}. Save both from the same module."
            )
    if all(is_head(name) for name in (*missing, *extra)):
        long, short = (first, other) if missing else (other, first)
        return (
            f"{long.label} has a classifier head, {short.label} has none: it was made without, or its head is built "
            "from class names (head='text'). Make all in one way; or cook from the files alone, and give the soup to "
            "such a model as checkpoint_path."
        )
    if len(missing) == len(first.specs) or len(extra) == len(other.specs):
        return "another architecture: the two have no tensor in common."
    return (
        f"another architecture or depth, or parts saved in one file only ({len(first.specs)} tensors in "
        f"{first.label}, {len(other.specs)} in {other.label}). All ingredients must come from one model "
        "definition."
    )


def _common_prefix(short_names: Iterable[str], long_names: Sequence[str]) -> str | None:
    names = set(short_names)
    for long in long_names[:1]:
        parts = long.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut]) + "."
            if {prefix + name for name in names} <= set(long_names):
                return prefix
    return None


def _why_shapes(a: dict[str, TensorSpec], b: dict[str, TensorSpec], differing: Sequence[str]) -> str:
    def rows_only(name: str) -> bool:
        return bool(a[name].shape) and bool(b[name].shape) and a[name].shape[1:] == b[name].shape[1:]

    if all(a[name].shape == b[name].shape for name in differing):
        return "other element types (integer against floating): a quantised file beside a full one."
    if all(rows_only(name) for name in differing):
        rows = a[differing[0]].shape[0], b[differing[0]].shape[0]
        if all(is_head(name) for name in differing):
            return f"another number of classes ({rows[0]} against {rows[1]}). Train all on one label set."
        if any("embed" in name or "token" in name or "lm_head" in name for name in differing):
            return f"the tokenizer was resized ({rows[0]} against {rows[1]} rows). Use one vocabulary for all."
    if all("pos_embed" in name or "position" in name for name in differing):
        return (
            "another image size: the position embeddings differ. Give the model the file's img_size, or train all "
            "ingredients at one resolution, or average them by LengthAverage, which resamples."
        )
    return "another architecture or width. All ingredients must come from one model definition."
