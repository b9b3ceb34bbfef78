"""Manifests of checkpoints of replicas that are not what was written."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_soup import gather_ingredients, open_checkpoint
from lightning_soup.errors import UnreadableCheckpoint


def _entry(rank: int, **changed: Any) -> dict[str, Any]:
    return {"name": f"replica-{rank}-step-1.ckpt", "size": 3, "digest": "xxh3-128:0", "step": 1, **changed}


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        ([_entry(0), _entry(0)], "two ranks have the same file"),
        ([_entry(0), _entry(0, name="../replica-0-step-1.ckpt")], "is no file of a replica"),
        ([_entry(0, name="replica-0-step-" + "1" * 5000 + ".ckpt")], "is no file of a replica"),
        ([_entry(0, name="replicas.json")], "is no file of a replica"),
        ([], "entries of other types, or none"),
        ([_entry(0, step=2)], "is of step 2"),
        ([_entry(0)], "is missing, the replica of rank 0"),
    ],
)
def test_odd_manifests_are_refused_by_all_who_read_them(
    tmp_path: Path, replicas: list[dict[str, Any]], message: str
) -> None:
    content = {"format": "lightning_soup replicas 1", "step": 1, "world_size": 2, "replicas": replicas}
    (tmp_path / "replicas.json").write_text(json.dumps(content))
    for read in (open_checkpoint, lambda path: open_checkpoint(path, which="0"), gather_ingredients):
        with pytest.raises(UnreadableCheckpoint, match=message):
            read(tmp_path)
