"""How many threads torch takes for work on weights."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["one_thread", "single_threaded_torch"]


def one_thread(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Run operations on tensors on one thread, if they are on a CPU; see :func:`single_threaded_torch`."""
    on_cpu = len(tensors) > 0 and tensors[0].device.type == "cpu" and torch.get_num_threads() > 1
    return single_threaded_torch() if on_cpu else nullcontext()


class _OneThread:
    """How many are inside :func:`single_threaded_torch`, and torch's own number of threads outside."""

    lock = threading.Lock()
    inside = 0
    outside = 1


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Run torch operations on one thread.

    On small chunks, torch's own threads cost more than they bring, and a hundredfold where another process
    takes a core (each operation then waits a scheduler slice). Threads over chunks do not wait for one
    another.

    torch has one number of threads for the process. So it is remembered when the first of several concurrent
    users comes in, and put back when each leaves.
    """
    with _OneThread.lock:
        if not _OneThread.inside:
            _OneThread.outside = torch.get_num_threads()
        _OneThread.inside += 1
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        with _OneThread.lock:
            _OneThread.inside -= 1
            torch.set_num_threads(_OneThread.outside)
