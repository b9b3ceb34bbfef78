import pytest

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_file import read_sweep_file
from tests.helpers.sweeps import write_yaml

RANDOM = {
    "method": "random",
    "run_cap": 4,
    "parameters": {
        "model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "model.width": {"values": [16, 32, 64, 128]},
    },
}


def settings(tmp_path, content, seed=0):
    return read_sweep_file(write_yaml(tmp_path / "sweep.yaml", content)).settings(seed)


def test_grid_goes_through_the_file_in_order_with_the_last_parameter_fastest(tmp_path):
    parameters = {"z": {"values": [2, 1]}, "fixed": {"value": None}, "a": {"min": 0, "max": 2}}
    found = settings(tmp_path, {"method": "grid", "parameters": parameters})
    assert found == [{"z": z, "fixed": None, "a": a} for z in (2, 1) for a in (0, 1, 2)]
    assert list(found[0]) == ["z", "fixed", "a"]
    assert settings(tmp_path, {"method": "grid", "run_cap": 4, "parameters": parameters}) == found[:4]


def test_random_is_reproducible_from_the_seed(tmp_path):
    first = settings(tmp_path, RANDOM)
    assert len(first) == 4
    assert first == settings(tmp_path, RANDOM)
    assert first != settings(tmp_path, RANDOM, seed=1)
    assert len({setting["model.lr"] for setting in first}) == 4
    # The list is a promise to folders that exist: it must not change between versions.
    assert first[0] == {"model.lr": pytest.approx(6.755479e-03), "model.width": 64}


def test_random_does_not_depend_on_the_cap_or_on_other_parameters(tmp_path):
    few, many = settings(tmp_path, RANDOM), settings(tmp_path, RANDOM | {"run_cap": 20})
    assert many[:4] == few
    more = {"trainer.max_epochs": {"min": 1, "max": 9}, **RANDOM["parameters"]}
    grown = settings(tmp_path, RANDOM | {"parameters": more})
    assert [{**setting, "trainer.max_epochs": 0} for setting in few] == [
        {**setting, "trainer.max_epochs": 0} for setting in grown
    ]


def test_nested_parameters_get_dotted_names(tmp_path):
    nested = {
        "model": {"parameters": {"lr": {"value": 0.1}, "optimizer": {"parameters": {"beta": {"values": [0.9]}}}}},
        "data.batch_size": {"value": 8},
    }
    assert settings(tmp_path, {"method": "grid", "parameters": nested}) == [
        {"model.lr": 0.1, "model.optimizer.beta": 0.9, "data.batch_size": 8}
    ]


def test_keys_of_the_agent_are_accepted(tmp_path):
    agent = {
        "program": "lightning-soup",
        "command": ["lightning-soup", "fit", "--config", "base.yaml", "${args}"],
        "project": "p",
        "entity": "e",
        "description": "d",
        "metric": {"name": "val_acc", "goal": "maximize"},
        "early_terminate": {"type": "hyperband", "min_iter": 3},
    }
    file = read_sweep_file(write_yaml(tmp_path / "vit.yaml", {**agent, **RANDOM}))
    assert file.settings() == settings(tmp_path, RANDOM)
    assert file.name == "vit"
    assert read_sweep_file(write_yaml(tmp_path / "vit.yaml", {**RANDOM, "name": "soup"})).name == "soup"


GOOD = {"lr": {"value": 1}}
WRONG = [
    ({"method": "bayes", "parameters": GOOD}, "method: bayes.*`wandb sweep`"),
    ({"method": "gird", "parameters": GOOD}, "method is 'gird'; expected method: grid or method: random"),
    ({"parameters": GOOD}, "method is None"),
    ({"method": "random", "parameters": GOOD}, "add the number of runs, e.g. run_cap: 8"),
    ({"method": "random", "parameters": GOOD, "run_cap": 0}, "run_cap is 0; expected a whole number"),
    ({"method": "grid", "parameters": GOOD, "run_cap": True}, "run_cap is True"),
    ({"method": "grid", "parameters": GOOD, "runcap": 3}, "no key 'runcap'. Did you mean 'run_cap'"),
    ({"method": "grid"}, "parameters: expected parameters, for example model.lr"),
    ({"method": "grid", "parameters": {}}, "parameters: expected parameters"),
    ({"method": "grid", "parameters": ["lr"]}, "parameters: expected parameters"),
    ({"method": "grid", "parameters": {"lr": 0.1}}, "parameters.lr: expected a mapping such as {value: 0.1}"),
    (
        {"method": "grid", "parameters": {"lr": {"valeus": [1]}}},
        "parameters.lr: .* 'valeus'. Did you mean 'values'",
    ),
    (
        {"method": "grid", "parameters": {"m": {"parameters": {"lr": {"x": 1}}}}},
        "parameters.m.lr: .* no key 'x'",
    ),
    (
        {"method": "grid", "parameters": {"m": {"parameters": GOOD, "value": 1}}},
        "nested parameters and also value",
    ),
    (
        {"method": "grid", "parameters": {"m.lr": {"value": 1}, "m": {"parameters": GOOD}}},
        "m.lr is given twice, dotted and nested",
    ),
    (
        {"method": "grid", "parameters": {"lr": {"min": 0.0, "max": 1.0}}},
        "a grid cannot list the values of uniform",
    ),
    (["method", "grid"], "not a sweep file: expected a mapping from names to values; found a list"),
    (None, "found nothing"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong_files_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(UnsupportedSetup, match=message) as error:
        settings(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"method: [grid", "not YAML: .*line 1"),
        (b"method: grid\nparameters: {lr: {value: \x00}}", "not YAML"),
        (b"\xff\xfe\x00\x01", "cannot be read as a sweep file"),
        (b"just text", "found a str"),
    ],
)
def test_files_that_are_not_yaml(tmp_path, content, message):
    (tmp_path / "sweep.yaml").write_bytes(content)
    with pytest.raises(UnsupportedSetup, match=message):
        read_sweep_file(tmp_path / "sweep.yaml")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"nowhere.yaml: no such sweep file"):
        read_sweep_file(tmp_path / "nowhere.yaml")
    with pytest.raises(UnsupportedSetup, match="cannot be read as a sweep file"):
        read_sweep_file(tmp_path)
