"""Checkpoints of several replicas of one model: a folder with a file for each and a manifest, which is written last.

A file's name holds the step, so a new set of files lies beside the old one until the manifest, replaced in one move,
names the new one. A reader finds the old set or the new one, whole, whenever writing was interrupted.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.atomic import atomic_path

__all__ = ["MANIFEST_NAME", "ReplicaFile", "ReplicaManifest", "file_digest", "is_replica_folder", "replica_file_name"]

MANIFEST_NAME = "replicas.json"
_FORMAT = "lightning_soup replicas 1"
_READ = 1 << 22
_LONGEST = 100  # characters of a file's name
_OURS = re.compile(r"replica-\d+-step-\d+(-[0-9a-f]+)?\.ckpt")


@dataclass(frozen=True)
class ReplicaFile:
    """The file of one replica.

    Attributes:
        name: File name in the folder.
        size: Bytes.
        digest: XXH3 (128 bits) of the bytes. It finds damage; it is no signature.
        step: ``global_step`` of the replica.
    """

    name: str
    size: int
    digest: str
    step: int


@dataclass(frozen=True)
class ReplicaManifest:
    """Which files make up a checkpoint of replicas.

    Attributes:
        folder: The folder.
        step: ``global_step``, the same for all.
        files: One per rank, in the order of ranks.
    """

    folder: Path
    step: int
    files: tuple[ReplicaFile, ...]

    @property
    def world_size(self) -> int:
        """How many replicas there are."""
        return len(self.files)

    @classmethod
    def read(cls, folder: Path) -> "ReplicaManifest":
        """Read the manifest of a folder.

        Raises:
            UnreadableCheckpoint: It is missing or damaged, or its files are of different steps.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UnreadableCheckpoint(
                f"{folder}: holds no {MANIFEST_NAME}, which is written last. Saving was interrupted before there was "
                "a first complete checkpoint, or this is no checkpoint of replicas."
            )
        try:
            content: Any = json.loads(path.read_bytes())
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}")
            files = tuple(ReplicaFile(**entry) for entry in content["replicas"])
            step = content["step"]
            plain = all(
                isinstance(f.name, str) and isinstance(f.digest, str) and isinstance(f.size, int) for f in files
            )
            if not files or not isinstance(step, int) or not plain:
                raise ValueError("entries of other types, or none")
            if len({file.name for file in files}) < len(files):
                raise ValueError("two ranks have the same file")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UnreadableCheckpoint(f"{path}: damaged ({error}). Take an earlier checkpoint.") from error
        for rank, file in enumerate(files):
            if not _OURS.fullmatch(file.name) or len(file.name) > _LONGEST:
                raise UnreadableCheckpoint(f"{path}: names {file.name[:80]!r}, which is no file of a replica.")
            if file.step != step:
                raise UnreadableCheckpoint(
                    f"{path}: is of step {step}, but the file of rank {rank} ({file.name}) is of step {file.step}. "
                    "Replicas of different steps cannot be resumed together: take an earlier checkpoint."
                )
        return cls(folder, step, files)

    def write(self) -> None:
        """Put the manifest in place; files of earlier sets are removed afterwards."""
        entries = [asdict(file) for file in self.files]
        content = {"format": _FORMAT, "step": self.step, "world_size": self.world_size, "replicas": entries}
        with atomic_path(self.folder / MANIFEST_NAME) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        named = {file.name for file in self.files}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)

    def path(self, rank: int) -> Path:
        """The file of a rank.

        Raises:
            UnreadableCheckpoint: There is no such rank, or its file is missing or has another size.
        """
        if not 0 <= rank < self.world_size:
            raise UnreadableCheckpoint(
                f"{self.folder}: has the replicas 0 to {self.world_size - 1}, but {rank} is asked for."
            )
        file = self.files[rank]
        path = self.folder / file.name
        if not path.is_file():
            raise UnreadableCheckpoint(
                f"{path}: is missing, the replica of rank {rank}. All files of the folder must be in one place (a "
                "file system that all machines share); copy it there, or take an earlier checkpoint."
            )
        if path.stat().st_size != file.size:
            raise UnreadableCheckpoint(
                f"{path}: has {path.stat().st_size} bytes where {MANIFEST_NAME} says {file.size}; the replica of rank "
                f"{rank} is damaged. Take an earlier checkpoint."
            )
        return path

    def checked_path(self, rank: int) -> Path:
        """The file of a rank, its content compared with the manifest.

        Raises:
            UnreadableCheckpoint: As :meth:`path`, or its bytes are others.
        """
        path = self.path(rank)
        if file_digest(path) != self.files[rank].digest:
            raise UnreadableCheckpoint(
                f"{path}: its bytes are not those that were written; the replica of rank {rank} is damaged. Take an "
                "earlier checkpoint."
            )
        return path


def is_replica_folder(path: Path) -> bool:
    """Whether a path is a checkpoint of replicas, be it an incomplete one."""
    return path.is_dir() and ((path / MANIFEST_NAME).is_file() or any(map(_is_ours, path.iterdir())))


def replica_file_name(rank: int, step: int, taken: Sequence[str] = ()) -> str:
    """Name of a rank's file; another one than those of the set that is in place."""
    name, again = f"replica-{rank}-step-{step}.ckpt", 0
    while name in taken:
        again += 1
        name = f"replica-{rank}-step-{step}-{again:x}.ckpt"
    return name


def file_digest(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ):
            hasher.update(block)
    return f"xxh3-128:{hasher.hexdigest()}"


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None
