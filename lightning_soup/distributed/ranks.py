"""The processes of a training: what they tell each other, and which of them does not answer any more."""

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_soup.distributed.meeting import Meeting
from lightning_soup.errors import LightningSoupError, ReplicaLost

__all__ = ["Ranks"]

T = TypeVar("T")
_CHUNK = 1 << 22  # elements in a message of a mean
_POST_EVERY = 1.0  # seconds
_KEY = "lightning_soup"


@dataclass
class _World:
    """What outlasts a run of a Trainer: the next one in these processes has the same ranks, and the same store."""

    members: tuple[int, ...]
    group: Any = None  # all
    met: int = 0  # how often all have met
    used: list[str] = field(default_factory=list)  # keys of the store that this rank takes away again


_worlds: "WeakKeyDictionary[Any, _World]" = WeakKeyDictionary()  # by store


class Ranks:
    """The ranks that take part, and what they do together.

    Everything but :meth:`exchange` is called on all of them, in one order.

    Args:
        rank: This rank.
        world_size: How many there are in the beginning.
        timeout: Seconds until one that does not answer is an error.
        patience: Seconds for which peers wait for each other in an exchange, and take it without those that do not
            come; ranks that died are then left out of everything. None: that is an error.
        device: Where small messages lie.

    Attributes:
        messages: Point-to-point messages sent so far.
        bytes_sent: Bytes in them.
    """

    def __init__(
        self, rank: int, world_size: int, timeout: float, patience: float | None = None, device: Any = "cpu"
    ) -> None:
        self.rank, self.world_size, self.timeout, self.patience = rank, world_size, timeout, patience
        self.device = torch.device(device)
        self.messages = self.bytes_sent = 0
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        self._world = _World(tuple(range(world_size)))
        if self._store is not None:
            self._world = _worlds.setdefault(self._store, self._world)
        self.listeners: list[Callable[[], None]] = []  # called when ranks have been lost
        self._posted = 0.0

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks that take part; those that are gone are left out, also in later runs of these processes."""
        return self._world.members

    @property
    def group(self) -> Any:
        """The process group of the members; None: the first one."""
        return self._world.group

    @property
    def first(self) -> bool:
        """Whether this rank is the first of those that take part."""
        return self.rank == self.members[0]

    @property
    def alone(self) -> bool:
        """Whether nobody else takes part."""
        return len(self.members) == 1

    # -------------------------------------------------------------------------------------------------- who is there

    def post(self, step: int) -> None:
        """Say that this rank takes this step; at most once a second."""
        now = time.monotonic()
        if self._store is None or now - self._posted < _POST_EVERY:
            return
        self._posted = now
        with suppress(Exception):  # a store that is gone is told of where it is needed
            self._store.set(f"{_KEY}/at/{self.rank}", f"{step} {time.time():.1f}")

    def told(self) -> str:
        """How far each rank has come, as far as is known; those behind first."""
        found: list[tuple[int, int, float]] = []
        try:
            for rank in range(self.world_size):
                if self._store.check([f"{_KEY}/at/{rank}"]):
                    step, when = self._store.get(f"{_KEY}/at/{rank}").decode().split()
                    found.append((int(step), rank, float(when)))
        except Exception:
            return "Rank 0, which holds the store that all meet at, does not answer either."
        if not found:
            return "No rank has taken a step yet."
        now = time.time()
        lines = [f"rank {rank} at step {step}, {max(now - when, 0):.0f} s ago" for step, rank, when in sorted(found)]
        return f"Last seen: {'; '.join(lines)}."

    def lose(self, ranks: Iterable[int]) -> None:
        """Tell all that these are gone."""
        for rank in ranks:
            self._store.set(f"{_KEY}/gone/{rank}", "1")

    def gone(self, ranks: Collection[int]) -> list[int]:
        """Those of some ranks of which somebody has told that they are gone."""
        return [rank for rank in ranks if self._store.check([f"{_KEY}/gone/{rank}"])]

    def meet(self, key: str, groups: Sequence[Sequence[int]], patience: float) -> list[list[int]]:
        """Of each of several groups that this rank is in, those that come in this many seconds; see :class:`.Meeting`.

        Raises:
            ReplicaLost: The store does not answer.
        """
        keys = [f"{_KEY}/{key}/{'-'.join(map(str, ranks))}" for ranks in groups]
        self._world.used += [one for one, ranks in zip(keys, groups, strict=True) if self.rank == min(ranks)]
        try:
            meetings = [Meeting(self._store, one, self.rank, ranks) for one, ranks in zip(keys, groups, strict=True)]
            deadline = time.monotonic() + patience
            return [meeting.wait(deadline, self.gone) for meeting in meetings]
        except RuntimeError as error:
            raise self._lost("meeting the others", error) from error

    def assemble(self) -> None:
        """Find out who still takes part, where the others go on without those that are gone.

        Raises:
            ReplicaLost: The others have gone on without this rank, or the store does not answer.
        """
        if self.patience is None or self.alone:
            return
        self._world.met += 1
        over, self._world.used = self._world.used, []
        found = tuple(self.meet(f"all/{self._world.met}", [self.members], self.timeout)[0])
        for key in over:  # those that have come here have done with all earlier meetings
            self._store.delete_key(key)
        if found == self.members:
            return
        if not found:
            raise ReplicaLost(
                f"rank {self.rank} came more than {self.timeout:g} s late, and the others went on without it."
            )
        lost = sorted(set(self.members) - set(found))
        self.lose(lost)
        self._world.members = found
        warnings.warn(f"rank {', '.join(map(str, lost))} is gone: {len(found)} replicas go on.", stacklevel=2)
        with self.named("going on without those that are gone"):
            self._world.group = dist.new_group(list(found), use_local_synchronization=True)
        for listener in self.listeners:
            listener()

    @contextmanager
    def named(self, what: str, peers: Sequence[int] = ()) -> Iterator[None]:
        """Turn a failure of the process group into a message that names who did not answer.

        Raises:
            ReplicaLost: The block failed in torch.distributed.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LightningSoupError) or not _from_group(error):
                raise
            raise self._lost(what, error, peers) from error

    def _lost(self, what: str, error: RuntimeError, peers: Sequence[int] = ()) -> ReplicaLost:
        whom = f" with rank {', '.join(map(str, peers))}" if peers else ""
        lines = str(error).strip().splitlines()
        return ReplicaLost(
            f"rank {self.rank}: {what}{whom} failed: a process has died, or did not answer within {self.timeout:g} s "
            f"({lines[0] if lines else type(error).__name__}). {self.told()} Look at the output of the rank that is "
            "behind, and resume all from the last checkpoint."
        )

    # ------------------------------------------------------------------------------------------------ all ranks at once

    def wait(self, what: str) -> None:
        """Wait for all."""
        self.assemble()
        if not self.alone:
            with self.named(f"waiting for all ranks ({what})"):
                dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """A small plain value of every rank, in the order of ranks, on every rank."""
        self.assemble()
        if self.alone:
            return [value]
        found: list[Any] = [None] * len(self.members)
        with self.named("gathering a value from all ranks"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """Do something on every rank that may fail on some, and raise on all then, so that none waits for another.

        Raises:
            LightningSoupError: What a rank raised, the first one's where there are several.
        """
        result, error = None, None
        try:
            result = work()
        except LightningSoupError as caught:
            error = caught
        except OSError as caught:
            error = LightningSoupError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
        told = self.gather(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        for rank, problem in zip(self.members, told, strict=True):
            if problem is not None:
                raise problem[0](f"on rank {rank}: {problem[1]}")
        return result

    @torch.no_grad()
    def send_from(self, source: int, tensor: Tensor) -> Tensor:
        """A tensor of one rank, on all; those of the others tell its shape and type."""
        wire = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=wire, device=tensor.device)  # whatever the tensor's memory format
        sent = tensor.to(wire).contiguous() if source == self.rank else empty
        if not self.alone:
            with self.named("waiting for weights", [source]):
                dist.broadcast(sent, source, group=self.group)
        return sent.to(tensor.dtype)

    def object_from(self, source: int, value: T) -> T:
        """A plain object of one rank, on all."""
        self.assemble()
        held = [value]
        if not self.alone:
            with self.named("waiting for a value", [source]):
                dist.broadcast_object_list(held, source, group=self.group)
        return held[0]

    @torch.no_grad()
    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all ranks, added in the order of ranks, so that all have the same bits.

        Floating tensors are added in float32, or float64 where they are so, and rounded once; of others the largest is
        taken, as of counters.
        """
        for tensor in tensors:
            exact = not tensor.is_floating_point() and not tensor.is_complex()
            wide = torch.int64 if exact else torch.promote_types(tensor.dtype, torch.float32)
            flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            wide = wide.to_real() if wide.is_complex else wide
            values = flat.detach().reshape(-1).to(wide, copy=True)
            for start in range(0, values.numel(), _CHUNK):
                pieces = self._pieces(values[start : start + _CHUNK])
                share = 1 if exact else 1 / len(pieces)  # as a combination with equal coefficients does it
                total = pieces[0] * share
                for piece in pieces[1:]:
                    total = torch.maximum(total, piece) if exact else total.add_(piece, alpha=share)
                values[start : start + _CHUNK] = total
            flat.copy_(values.view(flat.shape))

    def _pieces(self, piece: Tensor) -> list[Tensor]:
        if self.alone:
            return [piece]
        sent = self._wire(piece.contiguous())
        everyone = [torch.empty_like(sent) for _ in self.members]
        with self.named("averaging over all ranks"):
            dist.all_gather(everyone, sent, group=self.group)
        return [other.to(piece.device) for other in everyone]

    def _wire(self, tensor: Tensor) -> Tensor:
        """What is sent of a tensor: gloo reads the host's memory."""
        return tensor.cpu() if tensor.is_cuda and dist.get_backend(self.group) == "gloo" else tensor

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks."""
        if not self.alone:
            with self.named("summing over all ranks"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> float:
        """√(mean over replicas and elements of (mean − θ)²): how far the replicas lie apart."""
        squares, count = torch.zeros((), dtype=torch.float64), 0
        for tensor in tensors:
            tensor = tensor.detach()
            flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                piece = flat[start : start + _CHUNK].double()
                mean = self.sum_(piece.clone()) / len(self.members)
                squares += (piece - mean).square().sum().cpu()
                count += piece.numel()
        return float(sum(self.gather(float(squares))) / max(count * len(self.members), 1)) ** 0.5

    # ------------------------------------------------------------------------------------------------------ some peers

    @torch.no_grad()
    def exchange(self, message: Tensor, peers: Sequence[int], key: str = "") -> dict[int, Tensor]:
        """Send a message to each peer and get one of the same size from each; nobody else waits.

        Args:
            message: A vector.
            peers: Ranks whose peer this one is.
            key: Of this exchange, another one for each.

        Returns:
            The messages by peer; with patience, of those that came and stayed.

        Raises:
            ReplicaLost: Without patience, a peer has died or did not answer in time.
        """
        if self.patience is not None and peers:
            pairs = [sorted((self.rank, peer)) for peer in peers]
            met = self.meet(f"pairs/{key}", pairs, self.patience)
            peers = [peer for peer, present in zip(peers, met, strict=True) if peer in present]
        sent = self._wire(message)
        received = {peer: torch.empty_like(sent) for peer in peers}
        works: dict[int, list[Any]] = {peer: [] for peer in peers}
        broken = {}
        for peer in peers:
            try:
                ops = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received[peer], peer)]
                works[peer] = dist.batch_isend_irecv(ops)
            except RuntimeError as error:
                broken[peer] = error
        for peer, pending in works.items():
            try:
                for work in pending:
                    work.wait()
            except RuntimeError as error:
                broken[peer] = error
        for peer, error in broken.items():
            if self.patience is None or not _from_group(error):
                raise self._lost("exchanging weights", error, [peer]) from error
            received.pop(peer)
            self.lose([peer])
            warnings.warn(f"rank {peer} died while rank {self.rank}, which goes on, met it.", stacklevel=2)
        self.messages += len(received)
        self.bytes_sent += len(received) * message.numel() * message.element_size()
        return {peer: other.to(message.device) for peer, other in received.items()}


def _from_group(error: RuntimeError) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "dist", "socket", "recv", "broken pipe")
    return any(word in text for word in words)
