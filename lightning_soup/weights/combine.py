"""The kernel: the only place in the package that adds weights.

θ = Σᵢ cᵢ·θᵢ is formed a chunk at a time: the chunk of each checkpoint is read into a small buffer and added to an
accumulator that never leaves the processor's cache, then written to its place. So memory does not grow with the number
or the size of the checkpoints, and the cost stays near that of reading the bytes once.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights, RecipeError
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.coefficients import Coefficients, coefficient_rows
from lightning_soup.weights.compatibility import check_compatible, kind
from lightning_soup.weights.safetensors_format import layout
from lightning_soup.weights.stored_tensor import StoredTensor, TensorSpec
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

CHUNK_BYTES = 1 << 19  # of the accumulator; with two buffers beside it, this fits a 2 MiB level-2 cache
_HEAD_BYTES = 64  # compared before a whole chunk is, to see whether all ingredients hold the same values
_HELD_FILES = 128  # more files than this are opened anew for each read


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

    - Floating tensors are accumulated in float32 (float64 where an ingredient has it) and rounded once, to the type of
      the first ingredient or of ``out``. Values that all ingredients share stay exactly as they are when the
      coefficients add up to 1 (frozen layers), and infinities that all share stay in any case (attention masks).
    - Ingredients with coefficient 0 are not read: the endpoints of an interpolation are bit-exact copies.
    - Integer and bool tensors must be equal in all ingredients; ``num_batches_tracked`` becomes the largest.
    - Tied tensors are computed once and stay tied.

    Args:
        checkpoints: What :func:`.open_checkpoint` opens.
        coefficients: One number per checkpoint (any finite number, they need not add up to 1), or a mapping from tensor
            names or patterns to such rows; see :func:`.coefficient_rows`.
        out: ``None`` for a new dictionary; a path for a safetensors file, written without holding more than a few
            chunks in memory; a module or mapping whose tensors are overwritten in place.
        accumulate: Type of the accumulator for tensors up to 32 bits. float32 is within 3 units in the last place for 8
            ingredients; float64 makes the result almost independent of their order.
        metadata: Strings for the header of the safetensors file.
        threads: Threads over chunks, at most; torch's own number when ``None``. The result does not depend on it.
        progress: Shows how far it is.

    Returns:
        The dictionary (also when it was ``out``), or the opened file.

    Raises:
        IncompatibleIngredients: Names, shapes or kinds differ, or an integer tensor does.
        NonFiniteWeights: An ingredient with a coefficient other than 0 holds a NaN or an infinity, or the sum overflows.
        RecipeError: The coefficients do not fit.
        UnwritableOutput: The path cannot be written.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
        >>> combine([a, b], [0.5, 0.5])
        {'w': tensor([2., 0.])}
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    if not opened:
        raise RecipeError("no checkpoints to combine.")
    check_compatible(opened)
    parts = _plan(opened, coefficients, accumulate)
    threads = torch.get_num_threads() if threads is None else threads
    if out is None:
        found = {part.names: torch.empty(part.spec.shape, dtype=part.spec.dtype) for part in parts}
        _run([(part, _tensor_writer(found[part.names])) for part in parts], threads, progress)
        result = {name: tensor for names, tensor in found.items() for name in names}
        return {name: result[name] for name in opened[0]}
    if isinstance(out, (str, os.PathLike)):
        return _combine_to_file(parts, Path(out), metadata or {}, threads, progress)
    target = open_checkpoint(out)
    check_compatible([opened[0], target])
    writers = [(part, _tensor_writer(target[name])) for part in parts for name in part.names]
    _run(writers, threads, progress)
    return dict(target)


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of the result (under several names where it is tied) and what it is made of."""

    names: tuple[str, ...]
    spec: TensorSpec
    sources: tuple[tuple[StoredTensor, float, str], ...]  # tensor, coefficient, label of its checkpoint
    accumulator: torch.dtype

    @property
    def step(self) -> int:
        """Elements of a chunk."""
        widest = max(source.spec.dtype.itemsize for source, _, _ in self.sources)
        return CHUNK_BYTES // max(widest, self.accumulator.itemsize)


def _plan(opened: Sequence[WeightsFile], coefficients: Coefficients, accumulate: str) -> list[_Part]:
    if accumulate not in ("float32", "float64"):
        raise RecipeError(f"accumulate={accumulate!r}: expected 'float32' or 'float64'.")
    rows = coefficient_rows(opened[0].tensors, coefficients, len(opened))
    wide = getattr(torch, accumulate)
    parts: dict[tuple[object, ...], list[str]] = {}
    for name in opened[0].tensors:  # tied in every ingredient means tied in the result
        parts.setdefault(tuple(file.tensors[name].identity for file in opened), []).append(name)
    planned = []
    for names in map(tuple, parts.values()):
        row = rows[names[0]]
        if any(rows[name] != row for name in names):
            raise RecipeError(f"the tied tensors {', '.join(names)} share one storage, so they need the same coefficients.")
        sources = tuple(
            (file.tensors[names[0]], c, file.label) for file, c in zip(opened, row, strict=True) if c != 0.0
        )
        spec = opened[0].tensors[names[0]].spec
        accumulator = spec.dtype
        if kind(spec.dtype) == "floating":
            accumulator = torch.float64 if any(s.spec.dtype == torch.float64 for s, _, _ in sources) else wide
        planned.append(_Part(names, spec, sources, accumulator))
    return planned


# ---------------------------------------------------------------------------------------------------------- one chunk


class _Buffers(threading.local):
    """Buffers of one thread: the first ingredient's chunk, the next one's, a wider copy of it, and the sum."""

    def __init__(self) -> None:
        self.first, self.next, self.wide, self.sum = (torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(4))


def _chunk(part: _Part, start: int, stop: int, buffers: _Buffers) -> Tensor:
    """Elements ``start`` to ``stop`` of the combination, in the type of the result or wider."""
    floating = part.spec.dtype.is_floating_point or part.spec.dtype.is_complex
    (source, coefficient, label), *others = part.sources
    first = source.read(start, stop, buffers.first)
    first_bytes = first.view(torch.uint8)
    head = bytes(first_bytes[:_HEAD_BYTES].numpy().data)
    total = None
    if floating and (others or coefficient != 1.0):
        total = buffers.sum.view(part.accumulator)[: stop - start]
        if first.dtype == total.dtype:
            torch.mul(first, coefficient, out=total)
        else:
            total.copy_(first).mul_(coefficient)
    equal = True
    for other, coefficient_i, label_i in others:
        chunk = other.read(start, stop, buffers.next)
        equal = equal and _same_bytes(chunk, first_bytes, head)
        if total is not None:
            if chunk.dtype != total.dtype:
                chunk = buffers.wide.view(part.accumulator)[: stop - start].copy_(chunk)
            total.add_(chunk, alpha=coefficient_i)
        elif not equal:
            first = _merge_integers(part, first, chunk, label, label_i)
            first_bytes = first.view(torch.uint8)
            equal = True
    if total is None:
        return _checked(part, first, start, stop) if floating else first
    summing = abs(sum(c for _, c, _ in part.sources) - 1.0) < 1e-6
    if equal and (summing or not torch.isfinite(total.sum())):
        return _checked(part, first, start, stop)
    return _checked(part, total, start, stop, shared=False)


def _same_bytes(chunk: Tensor, first_bytes: Tensor, head: bytes) -> bool:
    chunk_bytes = chunk.view(torch.uint8)
    if len(chunk_bytes) != len(first_bytes) or bytes(chunk_bytes[:_HEAD_BYTES].numpy().data) != head:
        return False
    return torch.equal(chunk_bytes, first_bytes)


def _merge_integers(part: _Part, a: Tensor, b: Tensor, label_a: str, label_b: str) -> Tensor:
    if part.names[0].endswith("num_batches_tracked"):
        return torch.maximum(a, b)
    raise IncompatibleIngredients(
        f"the {kind(part.spec.dtype)} tensor {part.names[0]!r} ({part.spec}) differs between {label_a} and {label_b}. "
        "Such values cannot be averaged; give all ingredients the same ones, or leave the tensor out of the files."
    )


def _checked(part: _Part, values: Tensor, start: int, stop: int, *, shared: bool = True) -> Tensor:
    """Refuse what is not finite. ``shared``: equal in all ingredients, so infinities are a mask and may stay."""
    if values.dtype != part.spec.dtype:
        values = values.to(part.spec.dtype)
    probe = values if values.dtype.itemsize >= 4 else values.float()
    if torch.isfinite(probe.sum()) or bool(torch.isfinite(probe).all()):
        return values
    if shared and not torch.isnan(probe).any():
        return values
    where = f"tensor {part.names[0]!r} ({part.spec})"
    for source, _, label in part.sources:
        chunk = source.tensor().reshape(-1)[start:stop].cpu().to(part.accumulator)
        if not torch.isfinite(chunk).all():
            what = "NaN" if torch.isnan(chunk).any() else "an infinity"
            raise NonFiniteWeights(f"{label}: {where} holds {what}. Leave this checkpoint out or train it again.")
    raise NonFiniteWeights(
        f"{where}: the combination overflows {part.spec.dtype} although every ingredient is finite. "
        "Use smaller coefficients or float32 ingredients."
    )


# ------------------------------------------------------------------------------------------------------- all of them

_Writer = Callable[[int, Tensor], None]


def _run(work: Sequence[tuple[_Part, _Writer]], threads: int, progress: Progress) -> None:
    units = [
        (part, write, start, min(start + part.step, part.spec.numel))
        for part, write in work
        for start in range(0, part.spec.numel, part.step)
    ]
    buffers = _Buffers()

    def do(unit: tuple[_Part, _Writer, int, int]) -> None:
        part, write, start, stop = unit
        write(start, _chunk(part, start, stop, buffers))

    files = {id(s.file): s.file for part, _ in work for s, _, _ in part.sources if s.file is not None}
    with ExitStack() as stack:
        for file in list(files.values())[:_HELD_FILES]:
            stack.enter_context(file.held())
        stack.enter_context(single_threaded_torch())
        if threads <= 1 or len(units) == 1:
            for unit in progress(units, "averaging"):
                do(unit)
        else:
            pool = stack.enter_context(ThreadPool(min(threads, len(units) or 1)))
            for _ in progress(pool.imap_unordered(do, units, chunksize=4), "averaging", len(units)):
                pass


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Run torch operations on one thread.

    On small chunks, torch's own threads cost more than they bring, and a hundredfold where another process takes a core
    (each operation then waits a scheduler slice). Threads over chunks do not wait for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _tensor_writer(target: Tensor) -> _Writer:
    if target.is_contiguous():
        flat = target.view(-1)

        def write(start: int, values: Tensor) -> None:
            with torch.no_grad():
                flat[start : start + len(values)].copy_(values)

        return write

    def write_strided(start: int, values: Tensor) -> None:
        index = torch.arange(start, start + len(values), device=target.device)
        with torch.no_grad():
            target[torch.unravel_index(index, target.shape)] = values.to(target)

    return write_strided


def _combine_to_file(
    parts: Sequence[_Part], path: Path, metadata: Mapping[str, str], threads: int, progress: Progress
) -> WeightsFile:
    ties = {name: part.names[0] for part in parts for name in part.names[1:]}
    header, offsets, size = layout({part.names[0]: part.spec for part in parts}, {**metadata, **ties})
    with atomic_path(path, size=size) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY)
        try:
            os.pwrite(descriptor, header, 0)
            _run([(part, _file_writer(descriptor, offsets[part.names[0]])) for part in parts], threads, progress)
            os.truncate(descriptor, size)
        finally:
            os.close(descriptor)
    return open_checkpoint(path)


def _file_writer(descriptor: int, offset: int) -> _Writer:
    def write(start: int, values: Tensor) -> None:
        data = values.contiguous().view(torch.uint8).numpy().data
        position = offset + start * values.dtype.itemsize
        while len(data):
            count = os.pwrite(descriptor, data, position)
            data, position = data[count:], position + count

    return write
