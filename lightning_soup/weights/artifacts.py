"""Checkpoints that lie at Weights & Biases: ``wandb:entity/project/artifact:version``."""

import re
from pathlib import Path

from lightning_soup.errors import UnreadableCheckpoint

__all__ = ["fetch_artifact"]

_REFERENCE = re.compile(r"wandb:(?P<path>[^/:]+/[^/:]+/(?P<name>[^/:]+):[^/:]+)")


def fetch_artifact(reference: str, root: str | Path | None = None) -> Path:
    """Download an artifact and find the checkpoint in it.

    Files that are there already are not downloaded again.

    Args:
        reference: ``wandb:entity/project/artifact:version``; the version is a number (``v3``) or an alias
            (``best``). An alias may mean other weights tomorrow; a soup's provenance keeps the digest of what
            it got.
        root: Folder under which the artifact gets a folder of its own; by default W&B's (``./artifacts``, or
            ``$WANDB_ARTIFACT_DIR``).

    Returns:
        The one weights file of the artifact, or the folder of a sharded checkpoint or adapter.

    Raises:
        UnreadableCheckpoint: Not such a reference; it cannot be downloaded; or it holds no weights, or
            several.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UnreadableCheckpoint(
            f"{reference}: not a reference to a W&B artifact. Expected "
            f"wandb:entity/project/artifact:version, such as wandb:my-team/digits/model-1a2b3c4d:v0."
        )
    import wandb

    try:
        artifact = wandb.Api().artifact(match["path"])
        target = None if root is None else str(Path(root) / f"{match['name']}-{artifact.version}")
        folder = Path(artifact.download(root=target))
    except Exception as error:  # wandb raises many kinds: no key, no network, no such artifact, no permission
        raise UnreadableCheckpoint(
            f"{reference}: cannot be downloaded ({type(error).__name__}: {error}). Check the reference, the "
            f"network and `wandb login`; or download it elsewhere (`wandb artifact get {match['path']}`) and "
            f"give the path."
        ) from error
    return _checkpoint_in(folder, reference)


def _checkpoint_in(folder: Path, reference: str) -> Path:
    from lightning_soup.weights.formats import WEIGHT_SUFFIXES  # the formats open references, too

    marks = ("*.index.json", "adapter_config.json")
    wholes = sorted({path.parent for mark in marks for path in folder.rglob(mark)})
    if len(wholes) == 1:
        return wholes[0]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix in WEIGHT_SUFFIXES]
    if len(weights) == 1:
        return weights[0]
    shown = ", ".join(str(path.relative_to(folder)) for path in (weights or files)[:10])
    if weights:
        raise UnreadableCheckpoint(
            f"{reference}: holds {len(weights)} weights files ({shown}). They lie in {folder}: give the path "
            f"of the one you mean."
        )
    raise UnreadableCheckpoint(
        f"{reference}: holds no weights ({shown or 'it is empty'}). Expected a file ending in "
        f"{', '.join(WEIGHT_SUFFIXES)}."
    )
