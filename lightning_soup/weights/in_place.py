"""Writing a combination into tensors that exist: a module's, or those of a mapping."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_soup.errors import IncompatibleIngredients, RecipeError, UnsupportedSetup
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.batches import Batch
from lightning_soup.weights.chunks import Part
from lightning_soup.weights.stored_tensor import MemoryTensor, scatter
from lightning_soup.weights.streaming import BatchWriter, Writer, stream
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint


def open_target(out: nn.Module | Mapping[str, Tensor]) -> WeightsFile:
    """Open a module or mapping whose tensors can be written to.

    Raises:
        UnsupportedSetup: Its tensors are files, copies, or expanded views, which cannot be.
    """
    target = open_checkpoint(out)
    for name, tensor in target.tensors.items():
        if not isinstance(tensor, MemoryTensor):
            raise UnsupportedSetup(f"{target.label}: is a file, opened for reading. Give a path to write to.")
        if any(n > 1 and s == 0 for n, s in zip(tensor.spec.shape, tensor.value.stride(), strict=True)):
            raise UnsupportedSetup(
                f"{target.label}: {name!r} is an expanded view, whose elements share memory. Clone it before writing."
            )
    if isinstance(out, nn.Module):
        own = {_memory(tensor) for tensor in (*out.parameters(), *out.buffers())}
        for name, tensor in target.tensors.items():
            if tensor.spec.numel and _memory(tensor.tensor()) not in own:
                raise UnsupportedSetup(
                    f"{target.label}: its state_dict() gives a copy of {name!r}, so writing would not reach "
                    "the module. Combine to a dictionary and load that."
                )
    return target


def combine_in_place(parts: Sequence[Part], target: WeightsFile, threads: int, progress: Progress) -> None:
    """Form the parts in the tensors of the target, which may be among those that are added.

    Raises:
        IncompatibleIngredients: Tensors are tied in the target that the ingredients hold apart, with other
            values.
    """
    work = _one_name_each(parts, target)
    entangled = _entangled(work, target)
    if entangled:
        _combine_apart([work[number] for number in sorted(entangled)], target, threads)
    free = [pair for number, pair in enumerate(work) if number not in entangled]
    stream([(part, tensor_writer(target[name])) for part, name in free], threads, progress)


def new_tensors(parts: Sequence[Part]) -> dict[tuple[str, ...], Tensor]:
    """Make a tensor for each part, by its names; usable for training even if made in inference mode."""
    with torch.inference_mode(False):
        return {part.names: torch.empty(part.spec.shape, dtype=part.spec.dtype, device="cpu") for part in parts}


def tensor_writer(target: Tensor) -> Writer:
    """Give a writer into a tensor of any layout on any device."""
    if not target.is_contiguous():
        return lambda start, values: scatter(values, target, start)
    flat = target.view(-1)

    def write(start: int, values: Tensor) -> None:
        flat[start : start + len(values)].copy_(values)

    return write


def as_matrix(rows: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie beside one another in one storage as rows ``[B, elements]``; ``None`` where they do not."""
    first, count = rows[0], rows[0].numel()
    gaps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(rows)}
    alike = all(row.is_contiguous() and row.dtype == first.dtype and row.numel() == count for row in rows)
    one = len({row.untyped_storage().data_ptr() for row in rows}) == 1 and first.device.type == "cpu"
    if not (alike and one and count and len(gaps) < 2 and min(gaps, default=count) >= count):
        return None
    return first.as_strided((len(rows), count), (max(gaps, default=count), 1))


def batch_writer(targets: Sequence[Tensor]) -> BatchWriter:
    """Give a writer of one tensor of several results, each into a tensor of its own."""
    writers = [tensor_writer(target) for target in targets]

    def write(start: int, values: Sequence[Tensor] | None) -> None:
        if values is None:
            return
        for writer, row in zip(writers, values, strict=True):
            writer(start, row)

    return write


def check_apart(batches: Sequence[Batch], targets: Sequence[WeightsFile]) -> None:
    """Refuse mappings for several combinations in which one tensor would be written over by another, or not at all.

    Raises:
        RecipeError: They differ in type, tie other tensors than the checkpoints, or share memory.
    """
    spans = []
    for batch in batches:
        name, *tied = batch.parts[0].names
        if len({part.spec for part in batch.parts}) > 1:
            raise RecipeError(f"combine_many: {name!r} is of different types in the mappings. Make them alike.")
        for target in targets:
            written = target.tensors[name]
            apart = [other for other in tied if target.tensors[other].identity != written.identity]
            if apart:
                raise RecipeError(
                    f"combine_many: {name!r} and {apart[0]!r} are one tensor in the checkpoints, but two in a mapping. "
                    "Give mappings that tie them too, such as the result of an earlier call."
                )
            spans.append(_Span(*_memory_span(written.tensor()), 0, name, True))
        read = [term.tensor.value for term in batch.terms if isinstance(term.tensor, MemoryTensor)]
        spans += [_Span(*_memory_span(value), 0, name, False) for value in read]
    end, written_to, device = 0, 0, ""
    for span in sorted((span for span in spans if span.end > span.begin), key=lambda span: span[:3]):
        if span.device != device:
            end, written_to, device = 0, 0, span.device
        if span.begin < (end if span.writes else written_to):
            raise RecipeError(
                f"combine_many: {span.identity!r} shares its memory with another tensor of the mappings or of the "
                "checkpoints, which would be written over. Give mappings of tensors that are apart."
            )
        end, written_to = max(end, span.end), max(written_to, span.end if span.writes else 0)


def _one_name_each(parts: Sequence[Part], target: WeightsFile) -> list[tuple[Part, str]]:
    """Each part with the names of the tensors that it fills: one name for those tied in the target too."""
    found = []
    for part in parts:
        by_memory = {target.tensors[name].identity: name for name in part.names}
        found += [(part, name) for name in by_memory.values()]
    return found


def _entangled(work: Sequence[tuple[Part, str]], target: WeightsFile) -> set[int]:
    """The numbers of those pairs where writing one tensor would change what another reads or writes."""
    spans = []
    for number, (part, name) in enumerate(work):
        written = target.tensors[name]
        spans.append(_Span(*_memory_span(written.tensor()), number, written.identity, True))
        for term in part.terms:
            if isinstance(term.tensor, MemoryTensor):
                span = _memory_span(term.tensor.value)
                spans.append(_Span(*span, number, term.tensor.identity, False))
    found: set[int] = set()
    near: list[_Span] = []
    for span in sorted((span for span in spans if span.end > span.begin), key=lambda span: span[:3]):
        near = [other for other in near if other.device == span.device and other.end > span.begin]
        for other in near:
            # A tensor that is written where it is read is read first, chunk by chunk: that is safe.
            same = other.number == span.number and other.identity == span.identity
            if (other.writes or span.writes) and not same:
                found |= {other.number, span.number}
        near.append(span)
    return found


class _Span(NamedTuple):
    """The memory of a tensor that a part reads or writes."""

    device: str
    begin: int
    end: int
    number: int
    identity: Hashable
    writes: bool


def _memory_span(tensor: Tensor) -> tuple[str, int, int]:
    """The device, first and last byte of a tensor's memory."""
    if not tensor.numel():
        return str(tensor.device), 0, 0
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _combine_apart(work: Sequence[tuple[Part, str]], target: WeightsFile, threads: int) -> None:
    """Form parts in new tensors, and copy them when all are known."""
    parts = list({id(part): part for part, _ in work}.values())
    results = new_tensors(parts)
    stream([(part, tensor_writer(results[part.names])) for part in parts], threads, silent)
    first: dict[Hashable, Part] = {}
    for part, name in work:
        other = first.setdefault(target.tensors[name].identity, part)
        if not _same_values(results[other.names], results[part.names]):
            raise IncompatibleIngredients(
                f"{target.label}: {other.names[0]!r} and {name!r} are one tensor, but the ingredients hold "
                "two different ones. Save them from a module that ties them too, or combine into one that "
                "does not."
            )
    with torch.inference_mode():
        for part, name in work:
            target[name].copy_(results[part.names])


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def _memory(tensor: Tensor) -> tuple[object, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
