"""The state of a federated training in one safetensors file, which is replaced as a whole and never unpickled."""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_soup.distributed.federated_average import FederatedAverage
from lightning_soup.distributed.participation_clients import client_names, whole_number
from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint, UnsupportedSetup, UnwritableOutput
from lightning_soup.weights.atomic import atomic_path

__all__ = ["FILE_NAME", "FederatedState", "read_state", "write_state"]

FILE_NAME = "federated.safetensors"
_KEY = "lightning_soup.federated"
_WEIGHTS, _MEMORY = "x/", "Y"


@dataclass(frozen=True)
class FederatedState:
    """Where a federated training is.

    Attributes:
        round: Rounds done.
        weights: x.
        extra: More of the caller's, in plain values.
    """

    round: int
    weights: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def write_state(
    folder: str | os.PathLike,
    state: FederatedState,
    rule: FederatedAverage,
    settings: Mapping[str, Any],
) -> Path:
    """Write a state and that of the server's rule, in one atomic step.

    Args:
        folder: Where the file ``federated.safetensors`` goes.
        state: The state.
        rule: The rule; its remembered updates are written, too.
        settings: What a training that goes on must share, in plain values.

    Returns:
        The file.

    Raises:
        UnwritableOutput: It cannot be written.
        UnsupportedSetup: A tensor is of a type that the format lacks.
    """
    path = Path(folder) / FILE_NAME
    tensors = {f"{_WEIGHTS}{name}": value for name, value in state.weights.items()}
    for number, memory in enumerate(rule.memory.values()):
        tensors |= {f"{_MEMORY}{number}/{name}": value for name, value in memory.items()}
    about = {
        "round": state.round,
        "settings": dict(settings),
        "rule": rule.state_dict(),
        "memory": list(rule.memory),
        "extra": state.extra,
    }
    size = sum(value.nbytes for value in tensors.values())
    with atomic_path(path, size=size) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)  # save_file makes a file that nobody else may read
        try:
            save_file(_apart(tensors), temporary, metadata={_KEY: json.dumps(about)})
        except SafetensorError as error:  # by which it also tells what the system has against it
            raise UnwritableOutput(f"{path}: cannot be written ({error}). Make room, or write elsewhere.") from error
        except KeyError as error:
            raise UnsupportedSetup(
                f"{path}: cannot hold tensors of {error}, which safetensors lacks. Keep the state in memory (no folder)"
                ", or convert them."
            ) from error
        temporary.chmod(mode)
    return path


def read_state(folder: str | os.PathLike, rule: FederatedAverage, settings: Mapping[str, Any]) -> FederatedState | None:
    """Read the state in a folder, and give the rule its own.

    Args:
        folder: The folder.
        rule: The rule; it is changed only where all went well.
        settings: Those of now, to be compared.

    Returns:
        The state, or ``None`` where there is no file.

    Raises:
        UnreadableCheckpoint: The file is damaged, or another one.
        UnsupportedSetup: It belongs to a training with other settings.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        done, theirs = whole_number(about["round"], "round", 0), dict(about["settings"])
        clients, rule_state, extra = client_names(about["memory"], "memory"), dict(about["rule"]), dict(about["extra"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, UnsupportedSetup) as error:
        raise UnreadableCheckpoint(
            f"{path}: is no state of a federated training, or is damaged ({type(error).__name__}: {error}). Give "
            "another folder, or remove the file to start anew."
        ) from error
    ours = json.loads(json.dumps(dict(settings)))
    other = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if other:
        told = "; ".join(f"{name} was {_short(theirs.get(name))}, is {_short(ours.get(name))}" for name in other)
        raise UnsupportedSetup(
            f"{path}: is the state of another training ({told}). Give the settings of that one to go on with it, or "
            "another folder."
        )
    try:
        rule.load_state_dict(rule_state)
    except LightningSoupError as error:
        raise type(error)(f"{path}: {error}") from error
    memories = {client: _under(tensors, f"{_MEMORY}{number}/") for number, client in enumerate(clients)}
    rule.load_memory(memories)
    return FederatedState(done, _under(tensors, _WEIGHTS), extra)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as the format asks for; tied ones are written once each."""
    seen: set[int] = set()
    found = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        found[name] = (
            value.detach().contiguous()
            if place not in seen
            else value.detach().clone(memory_format=torch.contiguous_format)
        )
        seen.add(place)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
