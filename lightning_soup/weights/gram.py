"""Inner products between all pairs of checkpoints, from one pass over their files."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.progress import Progress, silent
from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.chunks import CHUNK_BYTES
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.data_file import hold
from lightning_soup.weights.stored_tensor import Scratch
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Gram", "gram"]


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
    tied = {name for names in opened[0].ties for name in names[1:]}
    names = [n for n, s in opened[0].specs.items() if s.dtype.is_floating_point and s.numel and n not in tied]
    count = len(opened)
    step = max(CHUNK_BYTES // (4 * (count + 1)), 4096)  # all rows of a chunk stay in the processor's cache
    sums = {name: torch.zeros(count + 1, count + 1, dtype=torch.float64) for name in names}
    broken: set[tuple[int, str]] = set()
    buffers, lock = _Buffers(count + 1, step), threading.Lock()

    def without_infinities(rows: Tensor, name: str, first: int, stop: int) -> list[int]:
        """Infinities that all share, such as a mask's, are no difference; which checkpoints have others, or a NaN."""
        wrong = []
        origin = rows[0].clone()
        rows[0].nan_to_num_(0.0, 0.0, 0.0)
        for i, file in enumerate(opened, 1):
            chunk = file.tensors[name].read(first, stop, buffers.chunk)[0].to(rows.dtype)
            rows[i].masked_fill_(chunk == origin, 0.0)
            if not rows[i].isfinite().all() or not (chunk.isfinite() | (chunk == origin)).all():
                wrong.append(i - 1)
                rows[i] = 0.0
        return wrong

    def do(unit: tuple[str, int]) -> None:
        name, first = unit
        stop = min(first + step, opened[0].specs[name].numel)
        wide = any(file.specs[name].dtype == torch.float64 for file in opened)
        with torch.inference_mode():
            rows = buffers.rows(stop - first, wide)  # θ_0, and the differences
            rows[0].copy_(base.tensors[name].read(first, stop, buffers.chunk)[0])
            for i, file in enumerate(opened, 1):
                chunk, _ = file.tensors[name].read(first, stop, buffers.chunk)
                if file is base:
                    rows[i].zero_()
                else:
                    torch.sub(chunk.to(rows.dtype), rows[0], out=rows[i])
            found = (rows @ rows.T).double()
            wrong = []
            if not found.isfinite().all():
                wrong = without_infinities(rows, name, first, stop)
                found = (rows @ rows.T).double()
        with lock:
            sums[name] += found
            broken.update((i, name) for i in wrong)

    units = [(name, first) for name in names for first in range(0, opened[0].specs[name].numel, step)]
    workers = min(threads or torch.get_num_threads(), len(units))
    with (
        hold(
            f for file in {id(o): o for o in (base, *opened)}.values() for t in file.tensors.values() for f in t.files
        ),
        single_threaded_torch(),
    ):
        if workers <= 1:
            for unit in progress(units, "comparing", len(units)):
                do(unit)
        else:
            with ThreadPoolExecutor(workers) as pool:
                for _ in progress(pool.map(do, units), "comparing", len(units)):
                    pass
    products = {name: found[1:, 1:].clone() for name, found in sums.items()}
    squares = {name: found[0, 0] + 2 * found[0, 1:] + found.diagonal()[1:] for name, found in sums.items()}
    return Gram(products, squares, start is not None, tuple(sorted(broken)))


class _Buffers(threading.local):
    """Of one thread: θ_0 and the differences of all checkpoints, and chunks as they are read."""

    def __init__(self, count: int, step: int) -> None:
        self.chunk = Scratch(8 * step)
        self._count, self._step = count, step
        self._rows: dict[bool, Tensor] = {}

    def rows(self, length: int, wide: bool) -> Tensor:
        """``[K + 1, length]``."""
        if wide not in self._rows:
            dtype = torch.float64 if wide else torch.float32
            self._rows[wide] = torch.empty(self._count, self._step, dtype=dtype)
        return self._rows[wide][:, :length]
