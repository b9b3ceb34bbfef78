"""Connecting to a Ray cluster, or starting one, with errors that say what was wrong with the address or the cluster."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from lightning_soup.errors import MissingExtra, UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.runs.sweep_processes import cores

__all__ = ["ADDRESSES", "Pulse", "connected", "enough_room", "is_address"]

ADDRESSES = "auto, HOST:PORT or ray://HOST:PORT (none for a cluster on this machine)"
_HOST = re.compile(r"(ray://)?(?P<host>\[[^\]]+\]|[^:/\s]+):(?P<port>\d{1,5})")
_SECONDS_TO_ANSWER = 10.0
_SECONDS_OF_SILENCE = 30.0  # the end of the trainings takes up to 20 more, and Ray ends the program after 60
_OBJECT_STORE = 100 * 2**20  # bytes; nothing large goes through it, and by default Ray takes a third of the memory


def is_address(text: str) -> bool:
    """Whether this can be the address of a cluster that exists."""
    return text == "auto" or _HOST.fullmatch(text) is not None


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[ModuleType]:
    """Give the module `ray`, connected to a cluster.

    Args:
        address: What :func:`is_address` accepts; None starts a cluster on this machine for the time of the block.

    Raises:
        MissingExtra: Ray, or the part of it that an address ray:// takes, is not installed.
        UnsupportedSetup: Nothing answers at the address, or not with a cluster that fits this Ray and Python.
    """
    ray = import_extra("ray", "ray")
    if ray.is_initialized():
        raise UnsupportedSetup(
            "Ray runs in this program already; a sweep connects by itself. Call ray.shutdown() first."
        )
    if address is not None:
        _refuse_silence(address)
    try:
        with _own_signals(), _no_usage_report():
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if address is None:
                options |= {"num_cpus": cores(), "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
            try:
                ray.init(address or "local", **options)
            except (
                *(ConnectionError, ValueError, RuntimeError, ImportError, TimeoutError),
                ray.exceptions.RayError,  # a token for authentication that is missing or wrong
            ) as error:
                raise _refusal(address, error) from error
        yield ray
    finally:
        with _own_signals():
            ray.shutdown()


class Pulse:
    """Notices that a cluster has vanished before Ray does, which then ends this program on the spot.

    Args:
        ray: The module, connected. Of a connection by ray:// nothing is asked: that one raises errors.
    """

    def __init__(self, ray: ModuleType) -> None:
        address = "" if ray.util.client.ray.is_connected() else ray.get_runtime_context().gcs_address
        self._host, _, self._port = address.rpartition(":")
        self._silent_since: float | None = None

    def feel(self) -> None:
        """Ask the head node whether it is there; to be called again and again.

        Raises:
            ConnectionError: It has not answered for a while. Shorter than that, it may be starting anew.
        """
        if not self._host:
            return
        now = time.monotonic()
        try:
            socket.create_connection((self._host.strip("[]"), int(self._port)), timeout=_SECONDS_TO_ANSWER).close()
            self._silent_since = None
        except OSError as error:
            self._silent_since = now if self._silent_since is None else self._silent_since
            if time.monotonic() - self._silent_since >= _SECONDS_OF_SILENCE:
                raise ConnectionError(
                    f"its head node at {self._host}:{self._port} has not answered for {_SECONDS_OF_SILENCE:g} seconds "
                    f"({error.strerror or error})"
                ) from error


def enough_room(
    ray: ModuleType, address: str | None, num_cpus: float, num_gpus: float | None
) -> tuple[Sequence[Mapping[str, Any]], float]:
    """Find the nodes on which a training can run.

    Returns:
        Ray's descriptions of the nodes, and the GPUs of a training, decided where `num_gpus` is None.

    Raises:
        UnsupportedSetup: No node has as much.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if num_gpus is None:
        num_gpus = 1 if any(_amount(node, "GPU") for node in nodes) else 0
    enough = [node for node in nodes if _amount(node, "CPU") >= num_cpus and _amount(node, "GPU") >= num_gpus]
    if not enough:
        have = "; ".join(
            f"{node['NodeManagerHostname']} with {_amount(node, 'CPU'):g} and {_amount(node, 'GPU'):g}"
            for node in nodes
        )
        where = f"a node of the cluster at {address}" if address else "this machine"
        raise UnsupportedSetup(
            f"num_cpus is {num_cpus:g} and num_gpus is {num_gpus:g}; expected what {where} has: "
            f"{have or 'none is alive'}. Ask for less, or add a node."
        )
    return enough, num_gpus


def _amount(node: Mapping[str, Any], resource: str) -> float:
    return node["Resources"].get(resource, 0)


def _refuse_silence(address: str) -> None:
    """Ask the port first: Ray itself tries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    if found := _HOST.fullmatch(address):
        try:
            port = int(found["port"])
            socket.create_connection((found["host"].strip("[]"), port), timeout=_SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            raise _refusal(address, error) from error


def _refusal(address: str | None, error: Exception) -> Exception:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "ray[client]" in reason:
        return MissingExtra(f'address is {address}, which takes more than Ray itself: pip install "ray[client]"')
    if address is None:
        return UnsupportedSetup(f"Ray could not start a cluster on this machine: {reason}")
    return UnsupportedSetup(
        f"address is {address!r}, where no Ray cluster can be reached: {reason.rstrip('.')}. Expected {ADDRESSES}. "
        "Start one with `ray start --head`, with this version of Ray and Python; `ray status` shows whether it runs. "
        "One with authentication, which Ray turns on by itself where ~/.ray/auth_token exists, wants "
        "RAY_AUTH_MODE=token and its token in that file or in RAY_AUTH_TOKEN."
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's exits without letting go of what is half-written."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _no_usage_report() -> Iterator[None]:
    """A cluster that is started on the side sends nobody a report, unless the user has said that it may."""
    name = "RAY_USAGE_STATS_ENABLED"
    told = os.environ.get(name)
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if told is None:
            os.environ.pop(name, None)
