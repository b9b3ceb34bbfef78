"""Inner products between all pairs of checkpoints, from one pass over their files."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.progress import Progress, silent
from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.data_file import hold
from lightning_soup.weights.stored_tensor import Scratch
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Gram", "gram"]

_ROWS_BYTES = 4 << 20  # of all rows of a chunk; smaller ones cost more in calls (8 ViT-B: 1 MiB 1.2 times as much)
_BLOCK = 4  # rows of a product of matrices; half of all products are the other half's mirror image
_LENGTH = 16384  # elements that are added up in float32; what comes of that, in float64


@dataclass(frozen=True)
class Gram:
    """⟨θ_i − θ_0, θ_j − θ_0⟩ of K checkpoints, tensor by tensor.

    Differences are taken before products: fine-tunes of one model are so near to each other that the products of the
    weights themselves would hold nothing but rounding of their distances.

    Attributes:
        products: By name of a floating tensor, ``[K, K]`` in float64. Tied tensors stand under one name.
        squares: By name, ‖θ_i‖², ``[K]`` in float64.
        from_start: Whether θ_0 is what they all started from; else it is the first checkpoint.
        broken: Checkpoint and tensor wherever there is a NaN, or an infinity that θ_0 does not have.
    """

    products: dict[str, Tensor]
    squares: dict[str, Tensor]
    from_start: bool
    broken: tuple[tuple[int, str], ...]

    @property
    def total(self) -> Tensor:
        """The products over all tensors, ``[K, K]``."""
        return torch.stack(list(self.products.values())).sum(0)


def gram(
    checkpoints: Sequence[Source | WeightsFile],
    start: Source | WeightsFile | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Gram:
    """Read each checkpoint once, chunk by chunk, and multiply all pairs.

    Args:
        checkpoints: K checkpoints with the same tensors.
        start: θ_0, what they all started from; None: the first of them.
        threads: Threads over chunks, at most; torch's own number when None.
        progress: Shows how far it is.

    Raises:
        IncompatibleIngredients: Their tensors differ.
    """
    opened = [open_checkpoint(item) for item in checkpoints]
    base = opened[0] if start is None else open_checkpoint(start)
    check_compatible([base, *opened])
    specs = opened[0].specs
    tied = {name for names in opened[0].ties for name in names[1:]}
    names = [n for n, s in specs.items() if s.dtype.is_floating_point and s.numel and n not in tied]
    places = [i for i, file in enumerate(opened) if file is not base]  # θ_0's own difference is 0
    held = [base.tensors, *(opened[i].tensors for i in places)]  # of each row
    count = len(held)
    wide = {name: any(tensors[name].spec.dtype == torch.float64 for tensors in held) for name in names}
    step = max(_ROWS_BYTES // (4 * count), 4096)
    sums = {name: torch.zeros(count, count, dtype=torch.float64) for name in names}
    broken: set[tuple[int, str]] = set()
    buffers, lock = _Buffers(count, step), threading.Lock()

    def without_infinities(rows: Tensor, name: str, first: int) -> list[int]:
        """Infinities that all share, such as a mask's, are no difference; which checkpoints have others, or a NaN."""
        origin = rows[0].clone()
        rows[0].nan_to_num_(0.0, 0.0, 0.0)
        wrong = []
        for place, row, tensors in zip(places, rows[1:], held[1:], strict=True):
            tensors[name].copy(first, row, buffers.chunk)
            bad = row.isnan() | ((row.isinf() | origin.isinf()) & (row != origin))
            if start is not None:
                bad |= origin.isnan()
            if bad.any():
                wrong.append(place)
                row.zero_()
            else:
                row.sub_(rows[0]).masked_fill_(origin.isinf(), 0.0)
        if start is None and origin.isnan().any():
            wrong.append(0)
        return wrong

    def do(unit: tuple[str, int]) -> None:
        name, first = unit
        length = min(step, specs[name].numel - first)
        with torch.inference_mode():
            rows = buffers.rows(length, wide[name])  # θ_0, and the differences of the others
            for number, (row, tensors) in enumerate(zip(rows, held, strict=True)):
                stored = tensors[name]
                stored.copy(first, row, buffers.scratch(number, wide[name], stored.spec.dtype == rows.dtype))
            rows[1:].sub_(rows[0])
            found = _products(rows)
            wrong = []
            if not found.isfinite().all():
                wrong = without_infinities(rows, name, first)
                found = _products(rows)
        with lock:
            sums[name] += found
            broken.update((place, name) for place in wrong)

    units = [(name, first) for name in names for first in range(0, specs[name].numel, step)]
    workers = min(threads or torch.get_num_threads(), len(units))
    with (
        hold(file for tensors in held for name in names for file in tensors[name].files),
        single_threaded_torch(),
    ):
        if workers <= 1:
            for unit in progress(units, "comparing", len(units)):
                do(unit)
        else:
            with ThreadPoolExecutor(workers) as pool:
                for _ in progress(pool.map(do, units), "comparing", len(units)):
                    pass
    at = torch.tensor(places, dtype=torch.int64)
    products = {name: torch.zeros(len(opened), len(opened), dtype=torch.float64) for name in names}
    squares = {}
    for name, found in sums.items():
        products[name][at[:, None], at] = found[1:, 1:]
        squares[name] = found[0, 0].repeat(len(opened))
        squares[name][at] += 2 * found[0, 1:] + found.diagonal()[1:]
    return Gram(products, squares, start is not None, tuple(sorted(broken)))


def _products(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` in float64, from products of short pieces in the type of the rows."""
    count = len(rows)
    total = torch.zeros(count, count, dtype=torch.float64)
    found = rows.new_zeros(count, count)
    for piece in rows.split(_LENGTH, 1):
        for first in range(0, count, _BLOCK):  # of each block with itself and those after it
            torch.mm(piece[first : first + _BLOCK], piece[first:].T, out=found[first : first + _BLOCK, first:])
        total += found
    return total.triu() + total.triu(1).T


class _Buffers(threading.local):
    """Of one thread: θ_0 and the differences of all others, and a chunk that is read before it is converted."""

    def __init__(self, count: int, step: int) -> None:
        self.chunk = Scratch(8 * step)
        self._count, self._step = count, step
        self._rows: dict[bool, tuple[Tensor, list[Scratch]]] = {}

    def _made(self, wide: bool) -> tuple[Tensor, list[Scratch]]:
        if wide not in self._rows:
            made = torch.empty(self._count, self._step, dtype=torch.float64 if wide else torch.float32)
            self._rows[wide] = made, [Scratch(row.view(torch.uint8)) for row in made]
        return self._rows[wide]

    def rows(self, length: int, wide: bool) -> Tensor:
        """``[K + 1, length]``."""
        return self._made(wide)[0][:, :length]

    def scratch(self, number: int, wide: bool, same: bool) -> Scratch:
        """What a row is read into: itself if that needs no conversion."""
        return self._made(wide)[1][number] if same else self.chunk
