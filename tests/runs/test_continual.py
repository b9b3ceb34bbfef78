import csv
import io
import json

import pytest
from PIL import Image

from lightning_soup.errors import LightningSoupError, UnsupportedSetup, UnwritableOutput
from lightning_soup.runs.continual import run_continual
from lightning_soup.runs.sweep_run import Trained

NAMES = ["red", "green", "blue"]


class World:
    """Trainings that append their name to a file of 'weights', and a judge that reads it. Remembers what was asked."""

    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at = folder, stop_at
        self.trained, self.judged, self.seeds = [], [], []
        self.start_file = folder.parent / "start.txt"
        self.start_file.write_text("start")

    def start(self):
        return self.start_file

    def train(self, name, start, folder, seed):
        self._stop(("train", name))
        self.trained.append((name, start.read_text()))
        self.seeds.append(seed)
        path = folder / "checkpoints" / "end.txt"
        path.parent.mkdir()
        path.write_text(f"{start.read_text()} {name}")
        return Trained({"train_loss": 0.5}, path)

    def judge(self, name, checkpoint):
        self._stop(("judge", name, checkpoint.read_text()))
        self.judged.append((name, checkpoint.read_text()))
        words = checkpoint.read_text().split()
        return 0.9 if name == words[-1] else 0.7 if name in words else 0.5 - 0.1 * (len(words) - 1)

    def _stop(self, what):
        if what == self.stop_at:
            raise KeyboardInterrupt

    def run(self, names=NAMES, **options):
        return run_continual(names, self.start, self.train, self.judge, self.folder, **options)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "run")


def test_each_task_starts_from_the_one_before_and_all_are_judged_after_each(world):
    result = world.run(seed=4)
    assert world.trained == [("red", "start"), ("green", "start red"), ("blue", "start red green")]
    assert world.seeds == [4, 5, 6]
    rows = ["start", "start red", "start red green", "start red green blue"]
    assert world.judged == [(name, row) for row in rows for name in NAMES]
    assert result.zero_shot == {"red": 50.0, "green": 50.0, "blue": 50.0}
    assert result.matrix["green"] == pytest.approx({"red": 70.0, "green": 90.0, "blue": 30.0})
    assert result.metrics.transfer == pytest.approx((40 + 35) / 2)
    assert result.metrics.last == pytest.approx((70 + 70 + 90) / 3)
    assert result.zero_shot_metrics.transfer == pytest.approx(50)
    assert result.checkpoints["blue"].read_text() == rows[-1]


def test_what_is_written(world):
    result = world.run(notes={"templates": {"red": ["{}"]}})
    table = list(csv.reader(io.StringIO((world.folder / "matrix.csv").read_text())))
    assert table[0] == ["accuracy, %", *NAMES]
    assert table[1] == ["zero-shot", "50.0000", "50.0000", "50.0000"]
    assert table[2][:2] == ["after red", "90.0000"]
    assert len(table) == 5
    content = json.loads((world.folder / "continual.json").read_text())
    assert content["metrics"]["order"] == NAMES
    assert content["metrics"]["rows_used_of_each_column"]["transfer"] == {"green": ["red"], "blue": ["red", "green"]}
    assert content["metrics"]["transfer"] == pytest.approx(result.metrics.transfer)
    assert content["zero_shot_metrics"] == {"transfer": 50.0, "average": 50.0, "last": 50.0}
    assert content["notes"] == {"templates": {"red": ["{}"]}}
    for name in ("heatmap", "curves", "metrics"):
        with Image.open(world.folder / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200


STOPS = [("judge", "green", "start"), ("train", "green"), ("judge", "blue", "start red"), ("train", "blue")]


@pytest.mark.parametrize("stop_at", STOPS, ids=str)
def test_nothing_that_is_finished_is_repeated_after_a_kill(tmp_path, stop_at):
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole" / "run")
    expected = whole.run()
    first = World(tmp_path / "run", stop_at)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = World(tmp_path / "run")
    result = second.run()
    assert first.trained + second.trained == whole.trained
    assert first.judged + second.judged == whole.judged
    assert (result.matrix, result.zero_shot) == (expected.matrix, expected.zero_shot)
    third = World(tmp_path / "run")
    assert third.run().matrix == expected.matrix
    assert third.trained == third.judged == []


def test_a_half_written_table_of_cells_is_measured_again(world):
    world.run()
    (world.folder / "01-green" / "accuracies.json").write_text('{"red": 70.0, "gr')
    again = World(world.folder)
    again.run()
    assert again.judged == [(name, "start red green") for name in NAMES]
    assert again.trained == []


def test_tasks_after_one_that_is_lost_are_trained_again(world):
    result = world.run()
    result.checkpoints["green"].unlink()
    again = World(world.folder)
    again.run()
    assert again.trained == world.trained[1:]
    assert len(again.judged) == 6


def test_another_order_is_refused(world):
    world.run()
    again = World(world.folder)
    with pytest.raises(UnsupportedSetup, match=r"tasks red, green, blue; now the order is green, red, blue"):
        again.run(["green", "red", "blue"])
    with pytest.raises(UnsupportedSetup, match="now the order is red, green"):
        again.run(["red", "green"])
    assert again.trained == again.judged == []


@pytest.mark.parametrize(("options", "what"), [({"seed": 1}, "another seed"), ({"fingerprint": "b"}, "another config")])
def test_other_settings_are_refused(world, options, what):
    world.run(fingerprint="a")
    with pytest.raises(UnsupportedSetup, match=what):
        World(world.folder).run(**{"fingerprint": "a", **options})


def test_a_folder_with_another_record_is_refused(world):
    world.folder.mkdir()
    (world.folder / "order.json").write_text("[1")
    with pytest.raises(UnsupportedSetup, match="not the record of a continual run"):
        world.run()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        (["a", "b", "a"], "collide: a"),
        (["A b", "a-b"], "collide: A b, a-b"),
        (["a", ".."], "a, .."),
    ],
)
def test_names_that_collide(world, names, message):
    with pytest.raises(UnsupportedSetup, match=message):
        world.run(names)
    assert not world.folder.exists()


def test_a_training_that_fails_is_told_and_tried_again(world):
    def broken(name, start, folder, seed):
        if name == "green":
            raise ValueError("no green today")
        return World.train(world, name, start, folder, seed)

    with pytest.raises(LightningSoupError, match=r"'green' failed: ValueError: no green today.*01-green/error.txt"):
        run_continual(NAMES, world.start, broken, world.judge, world.folder)
    again = World(world.folder)
    again.run()
    assert [name for name, _ in again.trained] == ["green", "blue"]


def test_one_task(world):
    result = world.run(["red"])
    assert result.metrics.last == pytest.approx(90)
    assert json.loads((world.folder / "continual.json").read_text())["metrics"]["transfer"] is None


def test_a_folder_that_cannot_be_written(world):
    world.folder.write_text("a file")
    with pytest.raises(UnwritableOutput):
        world.run()


def test_progress_counts_everything(world):
    seen = []

    def progress(items, description, total=None):
        seen.append(total)
        for item in items:
            seen.append(item)
            yield item

    world.run(progress=progress)
    assert seen[0] == len(seen) - 1 == 15


def test_names_that_trackers_take_for_one_are_refused(world):
    with pytest.raises(UnsupportedSetup, match="collide: a b, a_b"):
        world.run(["a b", "a_b"])


def test_a_record_of_something_else(world):
    world.folder.mkdir()
    (world.folder / "order.json").write_text('{"order": 5}')
    with pytest.raises(UnsupportedSetup, match="holds a run of the tasks"):
        world.run()


def test_two_processes_in_one_folder(world):
    class Other(World):
        def train(self, name, start, folder, seed):
            with pytest.raises(UnsupportedSetup, match="another process is working in this folder"):
                world.run()
            return super().train(name, start, folder, seed)

    Other(world.folder).run()
    assert world.trained == []
    world.run()
