"""Run a function on two gloo ranks: forked processes that Lightning takes for ranks launched from outside."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run_on_two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ranks 0 and 1; inside, ``Trainer(accelerator="cpu", devices=2, strategy="ddp")``.

    Returns:
        What each rank returned (picklable).

    Raises:
        AssertionError: A rank raised (its traceback is in the message), or did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, port, pipes[rank][1], function, args), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    results = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout), f"rank {rank} did not end within {timeout:.0f} s"
            result, error = receiver.recv()
            assert error is None, f"rank {rank} raised:\n{error}"
            results.append(result)
    finally:
        for process in ranks:
            process.kill() if process.is_alive() and len(results) < 2 else process.join(timeout)
    return results


def _rank(rank: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    try:
        pipe.send((function(*args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
