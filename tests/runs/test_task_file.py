import pytest
import yaml

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.task_file import read_task_file

TASKS = {"birds": {"data.root": "birds"}, "cars": {"data.root": "cars", "model.lr": 0.1}, 7: {}}


@pytest.fixture
def written(tmp_path):
    def write(section=None, **config):
        path = tmp_path / "tasks.yaml"
        content = {**config, **({} if section is None else {"continual": section})}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_what_is_left_out(written):
    file = read_task_file(written({"tasks": TASKS}))
    assert file.tasks == {"birds": {"data.root": "birds"}, "cars": {"data.root": "cars", "model.lr": 0.1}, "7": {}}
    assert file.ordered(None) == ("birds", "cars", "7")
    assert (file.pretrain, file.wise_ft, file.metric, file.seed) == (None, 1.0, "test_acc", 0)


def test_everything(written):
    section = {
        "tasks": TASKS,
        "orders": {"I": ["cars", "birds"], 2: [7]},
        "order": "I",
        "pretrain": {"trainer.max_steps": 3},
        "wise_ft": 0.8,
        "metric": "test_f1",
    }
    file = read_task_file(written(section, seed_everything=5))
    assert file.ordered(None) == ("cars", "birds")
    assert file.ordered("2") == ("7",)
    assert file.ordered("birds") == ("birds",)
    assert file.ordered(["7", "cars"]) == ("7", "cars")
    assert file.pretrain == {"trainer.max_steps": 3}
    assert (file.wise_ft, file.metric, file.seed) == (0.8, "test_f1", 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "there is no section continual"),
        ([1], "or it is no mapping"),
        ({"task": TASKS}, r"no option 'task'. Did you mean 'tasks'\?"),
        ({"tasks": TASKS, "zzz": 1}, "no option 'zzz'. Known: metric, order, orders, pretrain, tasks, wise_ft"),
        ({}, "continual.tasks is None; expected one task or more"),
        ({"tasks": ["birds"]}, r"continual.tasks is \['birds'\]"),
        ({"tasks": {"birds": "data"}}, "continual.tasks.birds is 'data'; expected options"),
        ({"tasks": {"birds": {1: 2}}}, "continual.tasks.birds is"),
        ({"tasks": TASKS, "pretrain": [1]}, "continual.pretrain is"),
        ({"tasks": TASKS, "orders": ["birds"]}, "continual.orders is"),
        ({"tasks": TASKS, "orders": {"I": ["bird"]}}, "no task bird in continual. Tasks: birds, cars, 7"),
        ({"tasks": TASKS, "order": "II"}, "no task II in continual"),
        ({"tasks": TASKS, "order": []}, r"\[\] is no order of tasks"),
        ({"tasks": TASKS, "order": ["cars", "birds", "cars"]}, "names cars twice"),
        ({"tasks": TASKS, "wise_ft": 0}, "wise_ft is 0; expected"),
        ({"tasks": TASKS, "wise_ft": 1.5}, "wise_ft is 1.5"),
        ({"tasks": TASKS, "wise_ft": "much"}, "wise_ft is 'much'"),
    ],
)
def test_what_is_wrong_is_named(written, section, message):
    path = written(section)
    with pytest.raises(UnsupportedSetup, match=message) as error:
        read_task_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("seed", [False, "three", 1.5])
def test_a_seed_that_is_no_number(written, seed):
    with pytest.raises(UnsupportedSetup, match="seed_everything is"):
        read_task_file(written({"tasks": TASKS}, seed_everything=seed))


def test_an_order_from_outside_that_is_unknown(written):
    file = read_task_file(written({"tasks": TASKS, "orders": {"I": ["cars"]}}))
    with pytest.raises(UnsupportedSetup, match=r"no task boats in continual. Tasks: birds, cars, 7. Orders: I."):
        file.ordered(["cars", "boats"])
