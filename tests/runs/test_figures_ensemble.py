"""The picture of an ensemble's weights, where it goes, and the line that tells them."""

import io

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_soup.runs.figures_ensemble import draw_weights, told_weights, weights_picture
from tests.helpers.pictures import figures_kept

NAMES = ["resnet18", "vit_tiny_patch16_224", "convnext_nano"]
CURVE = [(1 / 3, 1 / 3, 1 / 3), (0.4, 0.35, 0.25), (0.5, 0.38, 0.12), (0.6, 0.39, 0.01)]


def drawn(history, names=NAMES, **options):
    with figures_kept() as kept:
        picture = weights_picture(history, names, **options)
    assert Image.open(io.BytesIO(picture.png)).size[0] > 300
    return picture, kept[0]


def test_how_the_weights_came_about_and_the_end_as_bars():
    picture, figure = drawn(CURVE)
    assert picture.name == "family_weights"
    lines, bars = figure.axes
    assert [list(line.get_ydata()) for line in lines.lines] == [list(values) for values in zip(*CURVE, strict=True)]
    assert [text.get_text() for text in lines.get_legend().get_texts()] == NAMES
    assert [bar.get_width() for bar in bars.patches] == list(CURVE[-1])
    assert [label.get_text() for label in bars.get_yticklabels()] == NAMES
    assert {"0.600", "0.390", "0.010", "all alike"} <= {text.get_text() for text in bars.texts}


def test_a_start_and_an_end_are_no_curve():
    _, figure = drawn([CURVE[0], CURVE[-1]], name="w")
    [bars] = figure.axes
    assert [bar.get_width() for bar in bars.patches] == list(CURVE[-1])


def test_a_number_beside_a_long_bar_stays_inside():
    _, figure = drawn([(0.5, 0.5), (0.97, 0.03)], ["a", "b"])
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert texts["0.970"].get_ha() == "right"
    assert texts["0.030"].get_ha() == "left"


def test_many_families_are_told_apart():
    names = [f"family {i}" for i in range(14)]
    _, figure = drawn([[1 / 14] * 14] * 5, names)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == names
    assert len({(line.get_color(), line.get_marker()) for line in lines[:6]}) == 6


def test_into_the_folder_of_the_run(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path, "runs", version=3), enable_progress_bar=False)
    path = draw_weights(CURVE, NAMES, trainer, "family_weights")
    assert path == tmp_path / "runs" / "version_3" / "family_weights.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["family_weights.png"]


def test_a_run_that_keeps_nothing_gets_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert draw_weights(CURVE, NAMES, trainer, "family_weights") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("path", "end"), [(None, "0.400"), ("x/w.png", "0.400 (x/w.png)")])
def test_the_line_that_tells_them(path, end):
    assert told_weights("AwareNet", {"a": 0.6, "b": 0.4}, path) == f"AwareNet: α = a 0.600, b {end}"
