"""Running through all chunks of a combination, on one thread or several."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lightning_soup.progress import Progress
from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.batches import Batch, BatchBuffers, combine_batch
from lightning_soup.weights.chunks import Buffers, Part, combine_chunk
from lightning_soup.weights.data_file import hold

Writer = Callable[[int, Tensor], None]  # is given the first element's number and the values
BatchWriter = Callable[[int, Sequence[Tensor] | None], None]  # the same, with the values of each, if not in place
_Unit = tuple[Part | Batch, Callable[[int, Any], None], int, int]


def stream(
    work: Sequence[tuple[Part, Writer]] | Sequence[tuple[Batch, BatchWriter]], threads: int, progress: Progress
) -> None:
    """Form every chunk of every part and hand it to the part's writer.

    No thread is left running when it returns or raises, so a writer's file can be closed then.

    Args:
        work: Parts, or batches of them, and what takes their values.
        threads: Threads at most. Which thread forms a chunk does not change its bytes.
        progress: Shows how far it is, in chunks.
    """
    sized = [(part, write, part.step, part.spec.numel) for part, write in work]
    count = sum(-(-total // step) for _, _, step, total in sized)
    units = (
        (part, write, start, min(start + step, total))
        for part, write, step, total in sized
        for start in range(0, total, step)
    )
    batched = bool(work) and isinstance(work[0][0], Batch)
    form, buffers = (combine_batch, BatchBuffers()) if batched else (combine_chunk, Buffers())

    def do(unit: _Unit) -> None:
        part, write, start, stop = unit
        # Inference mode is per thread. In it, tensors made in or out of inference mode may both be
        # written to.
        with torch.inference_mode():
            write(start, form(part, start, stop, buffers))

    with ExitStack() as stack:
        stack.enter_context(hold(file for part, _ in work for term in part.terms for file in term.tensor.files))
        stack.enter_context(single_threaded_torch())
        if min(threads, count) <= 1:
            for unit in progress(units, "averaging", count):
                do(unit)
        else:
            done = stack.enter_context(_threads(do, units, min(threads, count)))
            for _ in progress(range(count), "averaging", count):
                error = done.get()
                if error is not None:
                    raise error


@contextmanager
def _threads(
    do: Callable[[_Unit], None],
    units: Iterator[_Unit],
    number: int,
) -> Iterator["SimpleQueue[BaseException | None]"]:
    """Start threads that each take the next unit as soon as they are free, so none waits for a slow one.

    Yields:
        A queue that gets ``None`` for each unit done, or the error that ended a thread.
    """
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    lock, stop = threading.Lock(), threading.Event()

    def take() -> None:
        try:
            while not stop.is_set():
                with lock:
                    unit = next(units, None)
                if unit is None:
                    return
                do(unit)
                done.put(None)
        except BaseException as error:  # also Ctrl-C: it is raised again where the work was asked for
            stop.set()
            done.put(error)

    workers = [threading.Thread(target=take, daemon=True) for _ in range(number)]
    try:
        for worker in workers:
            worker.start()
        yield done
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
