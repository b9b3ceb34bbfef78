import math
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lightning_soup.runs.figures_zoo as figures_zoo
from lightning_soup.runs.zoo import Zoo, ZooCell
from lightning_soup.runs.zoo_file import Axis, ZooFile


def zoo_of(temperatures, loads, value=0.5, option="data.batch_size"):
    file = ZooFile(
        Path("zoo.yaml"), Axis(option, tuple(temperatures)), Axis("model.model_args.embed_dim", tuple(loads))
    )
    figures = {"train_loss": value, "val_acc": value, "trace": 100 * value, "delta_epochs": value}
    shared = {"mc": -value, "line": -value, "cka": value, "delta_seeds": -value}
    cells = tuple(ZooCell(hot, load, (figures,), shared, "IV-B") for hot in temperatures for load in loads)
    return Zoo(Path("."), file, cells, None, (), ())


@pytest.fixture
def drawn(monkeypatch):
    """The figures, by name."""
    found = {}

    @contextmanager
    def kept(width, height, pictures, name, caption):
        found[name] = Figure(figsize=(width, height), layout="constrained")
        yield found[name]
        FigureCanvasAgg(found[name]).draw()

    monkeypatch.setattr(figures_zoo, "new_figure", kept)
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def boxes(figure, artists):
    return [artist.get_window_extent(figure.canvas.get_renderer()) for artist in artists]


@pytest.mark.parametrize("count", [1, 8])
def test_no_text_lies_on_another_or_outside(drawn, count):
    sizes = [2**i for i in range(3, 3 + count)]
    figures_zoo.zoo_pictures(zoo_of(sizes, sizes, 12.345))
    (axes,) = drawn["phases"].axes
    for label, box in zip("xy", boxes(drawn["phases"], [axes.xaxis.label, axes.yaxis.label]), strict=True):
        assert getattr(box, f"{label}0") >= 0
        assert getattr(box, f"{label}1") <= getattr(drawn["phases"].bbox, f"{label}1")
    for axes in drawn["measures"].axes:
        row = boxes(drawn["measures"], axes.texts[:count])
        assert all(left.x1 <= right.x0 for left, right in pairwise(row))


def test_values_of_any_kind_are_told_apart(drawn):
    kinds = [{"class_path": "torch.optim.SGD"}, {"class_path": "torch.optim.AdamW"}]
    figures_zoo.zoo_pictures(zoo_of(kinds, ["adam", None, [1, 2], 0.001, 0.123456789, True]))
    (axes,) = drawn["phases"].axes
    assert len({label.get_text() for label in axes.get_yticklabels()}) == 2
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["adam", "null", "[1, 2]", "0.001", "0.123457", "True"]


def test_an_option_too_long_for_its_side_is_named_by_its_last_part(drawn):
    figures_zoo.zoo_pictures(zoo_of([8], [16], option="model.init_args.optimizer.init_args.weight_decay"))
    assert drawn["phases"].axes[0].get_ylabel() == "temperature: weight_decay"


@pytest.mark.parametrize(("value", "told"), [(math.nan, "–"), (0.996, "100"), (0.5, "50")])
def test_cells_say_what_they_are(drawn, value, told):
    figures_zoo.zoo_pictures(zoo_of([8, 16], [16, 32], value))
    (panel,) = [axes for axes in drawn["measures"].axes if "accuracy" in axes.get_title()]
    assert texts(panel) == [told] * 4
