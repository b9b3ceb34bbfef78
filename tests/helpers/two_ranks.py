"""Run a function on gloo ranks: forked processes that Lightning takes for ranks launched from outside."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run_on_two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ranks 0 and 1; inside, ``Trainer(accelerator="cpu", devices=2, strategy="ddp")``."""
    return run_on_ranks(2, function, *args, timeout=timeout)


def run_on_ranks(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0, may_die: bool = False
) -> list[Any]:
    """Call ``function(*args)`` on ranks 0 to ``count`` − 1.

    Args:
        count: How many.
        function: The function.
        args: Its arguments.
        timeout: Seconds for each.
        may_die: A rank that raises or is killed is no failure of the test: its result is its traceback, or None.

    Returns:
        What each rank returned (picklable).

    Raises:
        AssertionError: A rank raised (its traceback is in the message), died, or did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(count)]
    ranks = []
    for rank in range(count):
        process = context.Process(target=_rank, args=(rank, port, pipes, function, args), daemon=True)
        process.start()
        ranks.append(process)
    for _, sender in pipes:
        sender.close()  # so that a receiver sees the end of a rank that was killed
    results = []
    try:
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout), f"rank {rank} did not end within {timeout:.0f} s"
            try:
                result, error = pickle.loads(receiver.recv_bytes())
            except EOFError:
                result, error = None, None if may_die else "it was killed"
            assert may_die or error is None, f"rank {rank} raised:\n{error}"
            results.append(error if error is not None else result)
    finally:
        for process in ranks:
            process.kill() if process.is_alive() and len(results) < count else process.join(timeout)
    return results


def _rank(
    rank: int,
    port: int,
    pipes: list[tuple[Connection, Connection]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    for other, (receiver, sender) in enumerate(pipes):
        receiver.close()
        if other != rank:
            sender.close()
    pipe = pipes[rank][1]
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank
    try:
        answer = function(*args), None
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))  # by value: a tensor in shared memory would go with this process
