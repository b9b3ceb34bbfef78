"""The kernel: the only place in the package that adds weights.

θ = Σᵢ cᵢ·θᵢ is formed a chunk at a time: the chunk of each checkpoint is read into a small buffer and added
to an accumulator that never leaves the processor's cache, then written to its place. So memory does not grow
with the number or the size of the checkpoints, and the cost stays near that of reading the bytes once.

This file plans (which tensors, which coefficients, which types); :mod:`.chunks` does the arithmetic, :mod:`.batches`
that of several combinations at once, :mod:`.streaming` runs through the chunks, :mod:`.file_output` writes into
files, :mod:`.in_place` into modules.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import RecipeError, UnwritableOutput
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.batches import Batch
from lightning_soup.weights.chunks import Part, Term
from lightning_soup.weights.coefficients import Coefficients, coefficient_rows
from lightning_soup.weights.compatibility import check_compatible, kind
from lightning_soup.weights.file_output import Layout, write_parts
from lightning_soup.weights.in_place import (
    as_matrix,
    batch_writer,
    check_apart,
    combine_in_place,
    new_tensors,
    open_target,
    tensor_writer,
)
from lightning_soup.weights.safetensors_format import layout
from lightning_soup.weights.stored_tensor import TensorSpec
from lightning_soup.weights.streaming import stream
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint


def combine(
    checkpoints: Sequence[Source | WeightsFile],
    coefficients: Coefficients,
    out: str | os.PathLike | nn.Module | Mapping[str, Tensor] | None = None,
    *,
    accumulate: Literal["float32", "float64"] = "float32",
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor] | WeightsFile:
    """Form θ = Σᵢ cᵢ·θᵢ.

    - Floating tensors are accumulated in float32 (float64 where an input or the result is) and rounded once, to
      the type of the first ingredient or of ``out``. Values that all ingredients share stay exactly as they
      are when the coefficients add up to 1 (frozen layers), and infinities that all share stay in any case
      (attention masks).
    - Ingredients with coefficient 0 are not read: the endpoints of an interpolation are bit-exact copies.
    - What is zero in all ingredients stays exactly zero: networks that were pruned with one mask keep it. With
      different masks the result is less sparse than any of them, which recipes refuse (:class:`.UniformSoup` can prune
      it again).
    - Integer and bool tensors must be equal in all ingredients; ``num_batches_tracked`` becomes the largest.
    - Tied tensors are computed once and stay tied.

    Args:
        checkpoints: What :func:`.open_checkpoint` opens.
        coefficients: One number per checkpoint (any finite number, they need not add up to 1), or a mapping
            from tensor names or patterns to such rows; see :func:`.coefficient_rows`.
        out: ``None`` for a new dictionary; a path for a safetensors file, written without holding more than a
            few chunks in memory; a module or mapping whose tensors are overwritten in place (they may be among
            those that are added; an error on the way leaves some of them overwritten).
        accumulate: Type of the accumulator for tensors up to 32 bits. float32 is within 3 units in the last
            place for 8 ingredients; float64 makes the result almost independent of their order.
        metadata: Strings for the header of the safetensors file.
        threads: Threads over chunks, at most; torch's own number when ``None``. The result does not depend on
            it.
        progress: Shows how far it is.

    Returns:
        The dictionary (also when it was ``out``), or the opened file.

    Raises:
        IncompatibleIngredients: Names, shapes or kinds differ, or an integer tensor does.
        NonFiniteWeights: An ingredient with a coefficient other than 0 holds a NaN or an infinity, or the sum
            overflows.
        RecipeError: The coefficients do not fit.
        UnsupportedSetup: The tensors of ``out`` cannot be written in place.
        UnwritableOutput: The path cannot be written, or does not end in ``.safetensors``.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
        >>> combine([a, b], [0.5, 0.5])
        {'w': tensor([2., 0.])}
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise RecipeError(f"threads={threads}: expected at least 1, or None for torch's own number.")
    to_file = isinstance(out, (str, os.PathLike))
    if to_file and Path(out).suffix != ".safetensors":
        raise UnwritableOutput(
            f"{out}: combine writes safetensors. Name the file so, or use weights.save.save_combination."
        )
    target = None if out is None or to_file else open_target(out)
    if target is None:
        opened, parts = plan_combination(checkpoints, coefficients, accumulate)
    else:
        opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
        held = _under_stored_names(target, opened)
        opened, parts = plan_combination(opened, coefficients, accumulate, held)
        combine_in_place(parts, held, threads, progress)
        return dict(target)
    if out is not None:
        write_parts(parts, Path(out), safetensors_layout(parts, metadata or {}), threads, progress)
        return open_checkpoint(out)
    return _combine_to_memory(parts, list(opened[0]), threads, progress)


def combine_many(
    checkpoints: Sequence[Source | WeightsFile],
    coefficients: Sequence[Coefficients],
    out: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    like: Source | WeightsFile | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    threads: int | None = None,
    progress: Progress = silent,
) -> list[dict[str, Tensor]]:
    """Form several combinations of the same checkpoints, reading each checkpoint once for all of them.

    Every result is that of :func:`combine` within the rounding of the accumulator, whose order of adding differs; what
    all ingredients share stays exactly as it is here, too, and the same is refused.

    Args:
        checkpoints: K checkpoints; as in :func:`combine`.
        coefficients: B times what :func:`combine` takes.
        out: B mappings to write into, such as the result of an earlier call, of the same types. They share no memory
            with one another or with the checkpoints, and have the checkpoints' ties. New ones by default: so many
            models are held in memory.
        like: Of which types new results are; those of the first checkpoint by default.
        accumulate: As in :func:`combine`.
        threads: As in :func:`combine`.
        progress: As in :func:`combine`.

    Returns:
        The B combinations.

    Raises:
        LightningSoupError: As in :func:`combine`; also where ``out`` is of another number, of different types, or
            where its tensors share memory.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
        >>> combine_many([a, b], [[0.5, 0.5], [2, -1]])
        [{'w': tensor([2., 0.])}, {'w': tensor([-1.,  6.])}]
    """
    if not coefficients:
        return []
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    if out is not None and len(out) != len(coefficients):
        raise RecipeError(f"combine_many: {len(coefficients)} combinations, but {len(out)} mappings to write into.")
    targets = [] if out is None else [open_target(target) for target in out]
    given = targets or [None if like is None else open_checkpoint(like)] * len(coefficients)
    plans = [
        plan_combination(opened, row, accumulate, target)[1] for row, target in zip(coefficients, given, strict=True)
    ]
    batches = [Batch(parts) for parts in zip(*plans, strict=True)]
    if out is None:
        out = _new_rows(batches, len(plans), list(opened[0]))
        places = [[row[batch.parts[0].names[0]] for row in out] for batch in batches]
    else:
        check_apart(batches, targets)
        places = [[target[batch.parts[0].names[0]] for target in targets] for batch in batches]
    work = [
        (replace(batch, place=as_matrix(tensors)), batch_writer(tensors))
        for batch, tensors in zip(batches, places, strict=True)
    ]
    stream(work, torch.get_num_threads() if threads is None else threads, progress)
    return [dict(row) for row in out]


def _new_rows(batches: Sequence[Batch], count: int, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """New tensors for several results; each tensor's lie beside one another, so that a product can be formed there."""
    with torch.inference_mode(False):
        stacks = [torch.empty(count, *b.spec.shape, dtype=b.spec.dtype, device="cpu") for b in batches]
    found = []
    for row in range(count):
        by_name = {name: s[row] for b, s in zip(batches, stacks, strict=True) for name in b.parts[0].names}
        found.append({name: by_name[name] for name in names})
    return found


def plan_combination(
    checkpoints: Sequence[Source | WeightsFile],
    coefficients: Coefficients,
    accumulate: str,
    target: WeightsFile | None = None,
) -> tuple[list[WeightsFile], list[Part]]:
    """Check checkpoints and coefficients, and plan the parts of the result.

    Args:
        checkpoints: As in :func:`combine`.
        coefficients: As in :func:`combine`.
        accumulate: As in :func:`combine`.
        target: Where the result goes, if its types are to be those of the result and not the first checkpoint's.

    Returns:
        The opened checkpoints, and the parts.
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    if not opened:
        raise RecipeError("no checkpoints to combine. Give at least one.")
    if accumulate not in ("float32", "float64"):
        raise RecipeError(f"accumulate={accumulate!r}: expected 'float32' or 'float64'.")
    check_compatible(opened if target is None else [*opened, target])
    return opened, _plan(opened, coefficients, accumulate, (opened[0] if target is None else target).specs)


def _under_stored_names(target: WeightsFile, opened: Sequence[WeightsFile]) -> WeightsFile:
    """The target without those names of its tied tensors that no checkpoint has: some files hold such a tensor once."""
    stored = set().union(*opened)
    lacking = {name for tied in target.ties if stored.intersection(tied) for name in tied if name not in stored}
    return target.only([name for name in target if name not in lacking])


def plan_copy(weights: WeightsFile) -> list[Part]:
    """Plan a copy of weights bit by bit, NaN included: saving does not judge."""
    return [replace(part, checked=False) for part in _plan([weights], [1.0], "float32", weights.specs)]


def safetensors_layout(parts: Sequence[Part], metadata: Mapping[str, str]) -> Layout:
    """Where the parts lie in a safetensors file: tied tensors once, with the other names in the metadata."""
    ties = {name: part.names[0] for part in parts for name in part.names[1:]}
    header, offsets, size = layout({part.names[0]: part.spec for part in parts}, {"format": "pt", **metadata, **ties})
    return Layout(offsets, size, lambda _: [(0, header)])


def _plan(
    opened: Sequence[WeightsFile],
    coefficients: Coefficients,
    accumulate: str,
    specs: Mapping[str, TensorSpec],
) -> list[Part]:
    rows = coefficient_rows(opened[0].tensors, coefficients, len(opened))
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in opened[0].tensors:  # tied in every ingredient means tied in the result
        groups.setdefault(tuple(file.tensors[name].identity for file in opened), []).append(name)
    parts = []
    for names in map(tuple, groups.values()):
        row = rows[names[0]]
        if any(rows[name] != row for name in names):
            raise RecipeError(
                f"the tied tensors {', '.join(names)} share one storage, so they need the same coefficients."
            )
        terms = tuple(
            Term(file.tensors[names[0]], c, file.label, place)
            for place, (file, c) in enumerate(zip(opened, row, strict=True))
            if c != 0.0
        )
        parts.append(Part(names, specs[names[0]], terms, _accumulator(terms, specs[names[0]].dtype, accumulate)))
    return parts


def _accumulator(terms: Sequence[Term], result: torch.dtype, accumulate: str) -> torch.dtype:
    dtypes = {result, *(term.tensor.spec.dtype for term in terms)}
    wide = accumulate == "float64" or bool(dtypes & {torch.float64, torch.complex128})
    if kind(terms[0].tensor.spec.dtype) == "complex":
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def _combine_to_memory(
    parts: Sequence[Part], names: Sequence[str], threads: int, progress: Progress
) -> dict[str, Tensor]:
    found = new_tensors(parts)
    stream([(part, tensor_writer(found[part.names])) for part in parts], threads, progress)
    result = {name: tensor for names, tensor in found.items() for name in names}
    return {name: result[name] for name in names}
