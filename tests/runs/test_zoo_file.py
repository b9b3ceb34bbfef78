import pytest

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape import Thresholds
from lightning_soup.runs.zoo_file import Measures, read_zoo_file
from tests.helpers.sweeps import write_yaml

GRID = {"temperature": {"data.batch_size": [8, 48]}, "load": {"model.width": [3, 8, 32]}}


def read(tmp_path, **section):
    return read_zoo_file(write_yaml(tmp_path / "zoo.yaml", {"model": {}, "zoo": {**GRID, **section}}))


def test_the_grid(tmp_path):
    file = read(tmp_path, seeds=[4, 2], measures={"samples": 50}, thresholds={"trace": 7, "sharp_by": "loss"})
    assert file.temperature.option == "data.batch_size"
    assert file.load.name == "width"
    assert file.cells[:4] == [
        {"data.batch_size": 8, "model.width": 3},
        {"data.batch_size": 8, "model.width": 8},
        {"data.batch_size": 8, "model.width": 32},
        {"data.batch_size": 48, "model.width": 3},
    ]
    assert len(file.settings) == 12
    assert file.settings[:2] == [{**file.cells[0], "seed_everything": 4}, {**file.cells[0], "seed_everything": 2}]
    assert file.measures == Measures(samples=50)
    assert file.thresholds == Thresholds(trace=7, sharp_by="loss")


def test_defaults(tmp_path):
    file = read(tmp_path)
    assert (file.seeds, file.measures, file.thresholds) == ((0, 1, 2), Measures(), None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"temperatur": {}}, r"zoo has no option 'temperatur'. Did you mean 'temperature'"),
        ({"load": None}, r"zoo.load is None; expected one option of the config and a list"),
        ({"load": {"model.width": 3}}, r"zoo.load is .*expected one option"),
        ({"load": {"model.width": []}}, r"zoo.load is .*expected one option"),
        ({"load": {"model.width": [1], "model.depth": [1]}}, r"zoo.load is .*expected one option"),
        ({"load": {"model.width": [3, 3]}}, r"zoo.load lists a value of model.width twice"),
        ({"load": {"data.batch_size": [3]}}, r"temperature and zoo.load are both data.batch_size"),
        (
            {"load": {"seed_everything": [4, 5]}},
            r"zoo.load is seed_everything, which differs within a cell; give",
        ),
        ({"measures": {"metric": 3}}, r"zoo.measures.metric is 3; expected the name of a metric"),
        ({"thresholds": {"mc": "high"}}, r"mc='high'.*expected finite numbers"),
        ({"seeds": 0}, r"zoo.seeds is 0; expected how many"),
        ({"seeds": [1, 1]}, r"zoo.seeds is \[1, 1\]; expected how many"),
        ({"seeds": True}, r"zoo.seeds is True"),
        ({"seeds": [-1]}, r"zoo.seeds is \[-1\]"),
        ({"measures": 3}, r"zoo.measures is 3; expected a mapping"),
        ({"measures": {"sample": 3}}, r"zoo.measures has no option 'sample'. Did you mean 'samples'"),
        ({"measures": {"samples": 2}}, r"zoo.measures.samples is 2; expected a whole number from 4 on"),
        ({"measures": {"probes": "many"}}, r"zoo.measures.probes is 'many'"),
        ({"measures": {"curve_lr": 0}}, r"zoo.measures.curve_lr is 0; expected a number above 0"),
        ({"thresholds": {"trac": 3}}, r"zoo.thresholds has no option 'trac'. Did you mean 'trace'"),
    ],
)
def test_wrong_sections(tmp_path, section, message):
    with pytest.raises(UnsupportedSetup, match=message):
        read(tmp_path, **section)


def test_no_section(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"zoo.yaml: there is no section zoo.*names the grid"):
        read_zoo_file(write_yaml(tmp_path / "zoo.yaml", {"model": {}}))
