"""How many threads torch takes for work on weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["one_thread"]


@contextmanager
def one_thread(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Run CPU operations on one thread.

    Hundreds of small parallel regions each wait for the scheduler when another process takes a core: 400 ms instead of
    20 for a ViT-B. One thread is as fast as the memory.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not tensors or tensors[0].device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
