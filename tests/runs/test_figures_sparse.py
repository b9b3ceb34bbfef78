"""The picture of a sparse soup."""

import io

import pytest
import torch
from PIL import Image

from lightning_soup.errors import UnwritableOutput
from lightning_soup.runs.figures_sparse import curves_of, sparse_picture

MASKS = {f"blocks.{i}.mlp.fc1.weight": torch.arange(12).reshape(3, 4) < i for i in range(12)}
RECORDS = [
    {"cycle": 1, "sparsity": 0.5, "copies": [0.8, 0.9], "soup": 0.9},
    {"cycle": 2, "sparsity": 0.75, "copies": [0.7, 0.7], "soup": 0.8},
]


def test_curves():
    curves = curves_of(RECORDS)
    assert curves["soup"] == [(0.5, 0.9, 0.0), (0.75, 0.8, 0.0)]
    assert curves["mean copy"][0][1] == pytest.approx(0.85)
    assert list(curves_of([{**RECORDS[0], "copies": [0.8]}])) == ["one copy"]
    assert curves_of([{**RECORDS[0], "copies": [], "soup": None}]) == {}


@pytest.mark.parametrize("curves", [{}, curves_of(RECORDS), {"SMS": [(0.5, 0.9, 0.1), (0.9, 0.8, 0.1)]}], ids=len)
def test_a_picture(curves, tmp_path):
    path = sparse_picture(curves, MASKS, "val_acc", tmp_path / "x.png")
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.size[0] > 600
    assert len(image.convert("RGB").getcolors(1 << 24)) > 5


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(UnwritableOutput, match="is a folder"):
        sparse_picture({}, MASKS, "val_acc", tmp_path)
