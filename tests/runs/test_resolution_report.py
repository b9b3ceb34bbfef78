"""What a search over sizes is told as: the table, the picture, the files, and which sizes meet the test data."""

import io
import json
import math

import pytest
from PIL import Image
from rich.console import Console

from lightning_soup.errors import UnwritableOutput
from lightning_soup.evaluation.resolution_table import Resolution, ResolutionChoice, SizeScore
from lightning_soup.runs.resolution_report import (
    log_resolution,
    resolution_picture,
    resolution_table,
    test_scores,
    write_resolution,
)
from tests.helpers.pictures import figures_kept

test_scores.__test__ = False  # pytest would take it for a test
SIZES = [Resolution((20, 20)), Resolution((24, 24)), Resolution((28, 36))]
SMALL, TRAIN, LARGE = SIZES


def score(metric, tokens, error=0.01):
    return SizeScore(metric, error, tokens, tokens / 1e4, 200)


def choice(tasks=("digits",), chosen=None, metric="accuracy"):
    row = {LARGE: score(0.91, 63), SMALL: score(0.8, 25, math.nan), TRAIN: score(0.85, 36)}
    chosen = chosen or dict.fromkeys(tasks, LARGE)
    return ResolutionChoice(dict.fromkeys(tasks, row), chosen, TRAIN, "keep_train", metric, "val")


def text_of(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def rows_of(table):
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


# --------------------------------------------------------------------------------------------------------- the table


def test_a_row_for_each_candidate_from_few_tokens_to_many():
    table = resolution_table(choice())
    assert rows_of(table) == [
        ["digits", "20", "80.0", "25", "2.50", ""],
        ["digits", "24", "85.0 ± 1.0", "36", "3.60", "training"],
        ["digits", "28×36", "91.0 ± 1.0", "63", "6.30", "chosen"],
    ]
    assert "accuracy on val, rule keep_train" in text_of(table)


def test_a_loss_is_no_share_and_test_sets_follow():
    found = choice(metric="nll")
    table = resolution_table(found, {"digits": {TRAIN: score(0.5, 36, math.nan), LARGE: score(0.25, 63, math.nan)}})
    assert rows_of(table)[-2:] == [
        ["digits (test)", "24", "0.5000", "36", "3.60", "training"],
        ["digits (test)", "28×36", "0.2500", "63", "6.30", "chosen"],
    ]


# -------------------------------------------------------------------------------------------------------- the picture


def drawn(found):
    with figures_kept() as kept:
        picture = resolution_picture(found)
    assert Image.open(io.BytesIO(picture.png)).size[0] > 600
    return kept[0].axes


def test_metric_with_its_error_and_cost():
    left, right, tokens = drawn(choice())
    [container] = left.containers
    line, _, [bars] = container.lines
    assert list(line.get_ydata()) == [80.0, 85.0, 91.0]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[80.0, 80.0], [84.0, 86.0], [90.0, 92.0]]
    [ring] = [line for line in left.lines if line.get_markersize() == 13]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == (["28×36"], [91.0])
    assert list(right.lines[0].get_ydata()) == pytest.approx([2.5, 3.6, 6.3])
    assert list(tokens.lines[0].get_ydata()) == [25, 36, 63]
    assert any(list(line.get_xdata()) == ["24", "24"] for line in left.lines)  # that of training


def test_as_many_tasks_as_there_are():
    tasks = [f"task {i}" for i in range(9)]
    left, right, _ = drawn(choice(tasks))
    assert [container.get_label() for container in left.containers] == tasks
    assert [text.get_text() for text in left.get_legend().get_texts()] == tasks
    assert len(right.lines) == 9
    assert sum(line.get_markersize() == 13 for line in left.lines) == 9


def test_bounds_of_the_area_are_candidates_too():
    bounds = Resolution(bounds=(400, 900))
    found = ResolutionChoice(
        {"digits": {bounds: score(0.8, 30), TRAIN: score(0.7, 36)}},
        {"digits": bounds},
        TRAIN,
        "best",
        "accuracy",
        "val",
    )
    left, *_ = drawn(found)
    assert [label.get_text() for label in left.get_xticklabels()] == ["400–900 px²", "24"]


# ----------------------------------------------------------------------------------------------------------- test data


class Counted:
    """Stands for the search: one score a task and size, and how often it was asked."""

    def __init__(self, *tasks):
        self.tasks, self.asked = tasks, []

    def evaluate(self, module, data, candidate, trainer):
        assert trainer == "the trainer"  # whose precision counts
        self.asked.append(candidate)
        return {task: score(SIZES.index(candidate) / 10, 1) for task in self.tasks}


def test_the_test_sets_meet_the_chosen_size_and_that_of_training_only():
    search = Counted("test", "shifted")
    tested = test_scores(search, choice(), None, None, "the trainer")
    assert search.asked == [TRAIN, LARGE]
    assert {task: list(row) for task, row in tested.items()} == {"test": [TRAIN, LARGE], "shifted": [TRAIN, LARGE]}


def test_training_size_that_is_chosen_is_measured_once():
    search = Counted("test")
    test_scores(search, choice(chosen={"digits": TRAIN}), None, None, "the trainer")
    assert search.asked == [TRAIN]


def test_each_task_has_its_own_choice():
    search = Counted("a", "b", "other")
    tested = test_scores(search, choice(("a", "b"), {"a": SMALL, "b": LARGE}), None, None, "the trainer")
    assert sorted(map(str, search.asked)) == sorted(map(str, SIZES))
    assert list(tested["a"]) == [TRAIN, SMALL]
    assert list(tested["b"]) == [TRAIN, LARGE]
    assert list(tested["other"]) == [TRAIN]  # which had no choice


# ----------------------------------------------------------------------------------------------------------- the files


def test_files(tmp_path):
    tested = {"test": {TRAIN: score(0.7, 36), LARGE: score(0.9, 63)}}
    assert write_resolution(choice(), tested, tmp_path) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {"resolution.json", "resolution.png"}
    held = json.loads((tmp_path / "resolution.json").read_text())
    assert held["chosen"] == {"digits": "28×36"}
    assert held["scores"]["digits"]["24"]["metric"] == 0.85
    assert held["test"] == {"test": {"24": {"metric": 0.7, "images": 200}, "28×36": {"metric": 0.9, "images": 200}}}
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableOutput):
        write_resolution(choice(), {}, tmp_path / "file")


class Heard:
    def __init__(self):
        self.values, self.saved = {}, 0

    def log_metrics(self, values):
        self.values |= values

    def save(self):
        self.saved += 1


def test_every_logger_hears_of_every_size():
    heard = Heard()
    log_resolution([heard], choice(), {"test": {TRAIN: score(0.7, 36)}})
    assert heard.values == {
        "resolution/digits/28×36": 0.91,
        "resolution/digits/20": 0.8,
        "resolution/digits/24": 0.85,
        "resolution/test/test/24": 0.7,
    }
    assert heard.saved == 1
