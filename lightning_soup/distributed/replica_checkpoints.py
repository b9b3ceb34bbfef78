"""Saving and loading checkpoints that hold every replica: what each rank does, and what rank 0 does last."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_soup.distributed.ranks import Ranks
from lightning_soup.errors import UnreadableCheckpoint, UnwritableOutput
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.replica_folder import (
    MANIFEST_NAME,
    ReplicaFile,
    ReplicaManifest,
    file_digest,
    is_replica_folder,
    replica_file_name,
)

__all__ = ["REPLICA_KEY", "load_replica", "save_replica"]

REPLICA_KEY = "lightning_soup_replica"
"""Where the checkpoint of a replica says which one of how many it is."""


def save_replica(
    checkpoint: Mapping[str, Any], folder: Path, ranks: Ranks, write: Callable[[Mapping[str, Any], Path], None]
) -> None:
    """Write this rank's file, and once all are there the manifest; called on every rank.

    Where ranks are gone, those that take part are the replicas of the checkpoint, numbered anew.

    Args:
        checkpoint: What Lightning saves of this rank.
        folder: The checkpoint, a folder; the same on all ranks.
        ranks: All ranks.
        write: Writes a checkpoint to a path.

    Raises:
        UnwritableOutput: On all ranks, where one cannot write or they are at different steps.
    """
    step = int(checkpoint["global_step"])
    written: list[Path] = []

    def write_mine() -> ReplicaFile:
        if folder.is_file():
            raise UnwritableOutput(f"{folder}: is a file, but a checkpoint of replicas is a folder. Remove the file.")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / replica_file_name(ranks.members.index(ranks.rank), step, _taken(folder))
        with atomic_path(path) as temporary:
            write(checkpoint, temporary)
        written.append(path)
        return ReplicaFile(path.name, path.stat().st_size, file_digest(path), step)

    def finish() -> None:
        if not ranks.first:
            return
        here = [file.name for file in files if not (folder / file.name).is_file()]
        if here:
            raise UnwritableOutput(
                f"{folder}: rank {ranks.rank} does not see {', '.join(here[:4])}, which other ranks have written. "
                "Checkpoints of replicas need a folder that all machines share: set default_root_dir or dirpath."
            )
        ReplicaManifest(folder, step, tuple(files)).write()

    try:
        files = ranks.gather(ranks.agree(write_mine))
        _check_steps(folder, files, ranks)
    except UnwritableOutput:  # on all ranks, so that no manifest will name these files
        for path in written:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty: there is an earlier checkpoint, or another rank's file still
            folder.rmdir()
        raise
    ranks.agree(finish)


def _check_steps(folder: Path, files: Sequence[ReplicaFile], ranks: Ranks) -> None:
    if len({file.step for file in files}) > 1:
        steps = ", ".join(f"rank {rank}: {file.step}" for rank, file in zip(ranks.members, files, strict=True))
        raise UnwritableOutput(
            f"{folder}: the ranks have taken different numbers of optimizer steps ({steps}), and a fit could not go on "
            "from that. Take as many on each, also in manual optimization."
        )


def load_replica(path: Path, ranks: Ranks) -> Path:
    """The file that this rank goes on from; called on every rank.

    A file that is no folder of replicas is that of one model, from which every replica begins.

    Raises:
        UnreadableCheckpoint: On all ranks: the manifest or a file is missing, damaged, of another step, or there are
            more or fewer replicas than ranks.
    """

    def mine() -> Path:
        if not is_replica_folder(path):
            return path
        manifest = ReplicaManifest.read(path)
        if manifest.world_size == len(ranks.members):  # saved by those that take part
            return manifest.checked_path(ranks.members.index(ranks.rank))
        if manifest.world_size != ranks.world_size:
            raise UnreadableCheckpoint(
                f"{path}: holds {manifest.world_size} replicas, but {ranks.world_size} are being trained. Resume with "
                f"as many (devices × num_nodes = {manifest.world_size}); or begin anew from their mean: "
                f"`lightning-soup soup --ingredients {path} --output mean.ckpt`, and give mean.ckpt as ckpt_path."
            )
        return manifest.checked_path(ranks.rank)

    return ranks.agree(mine)


def _taken(folder: Path) -> list[str]:
    """Names of the set that is in place, which stays whole until the next one is."""
    if not (folder / MANIFEST_NAME).is_file():
        return []
    try:
        return [file.name for file in ReplicaManifest.read(folder).files]
    except UnreadableCheckpoint:
        return []
