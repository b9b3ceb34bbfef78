import copy

import pytest
import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.recipes import UniformSoup
from lightning_soup.recipes.provenance import provenance_of
from lightning_soup.weights import open_checkpoint, save_weights
from lightning_soup.weights.soup_record import check_record

WHERE = "soup.pt"


@pytest.fixture
def record(tmp_path):
    files = [save_weights({"w": torch.full((2,), float(i))}, tmp_path / f"{i}.pt") for i in range(2)]
    return provenance_of(UniformSoup().cook(files), tmp_path)


def test_what_is_written_is_in_order(record):
    check_record(record, WHERE)
    check_record({**record, "coefficients": {"w*": [0.5, 0.5]}, "later": 1}, WHERE)
    check_record({"recipe": 3}, WHERE)  # somebody else's


@pytest.mark.parametrize(
    "name", ["shares", "accumulate", "coefficients", "history", "notes", "mode", "score", "metric"]
)
def test_missing_entries(record, name):
    del record[name]
    with pytest.raises(UnreadableCheckpoint, match=f"soup.pt: its provenance is damaged: '{name}' is missing"):
        check_record(record, WHERE)


@pytest.mark.parametrize("name", ["source", "digest", "label", "metrics"])
def test_missing_entries_of_an_ingredient(record, name):
    del record["ingredients"][1][name]
    with pytest.raises(UnreadableCheckpoint, match=f"'ingredients' entry 2 '{name}' is missing"):
        check_record(record, WHERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": [1.0]}, "'shares' has 1 numbers for 2 ingredients"),
        ({"shares": ["a", "b"]}, "'shares' entry 1 is 'a', expected a number"),
        ({"shares": [True, False]}, "expected a number"),
        ({"coefficients": {"w": [1]}}, "'w' has 1 numbers"),
        ({"coefficients": 3}, "'coefficients' is 3, expected a list"),
        ({"accumulate": "int8"}, "'accumulate' is 'int8', expected one of float32, float64"),
        ({"ingredients": {}}, "'ingredients' is {}, expected a list"),
        ({"ingredients": []}, "'shares' has 2 numbers for 0"),
        ({"ingredients": [1, 2]}, "entry 1 is 1, expected a mapping"),
        ({"score": "high"}, "'score' is 'high', expected a number"),
        ({"history": [{"label": "a", "kept": 7, "reason": ""}]}, "'kept' is 7"),
        ({"notes": "x" * 100}, "…, expected a list"),
    ],
)
def test_wrong_entries(record, change, message):
    with pytest.raises(UnreadableCheckpoint, match=message.replace("{", "[{]")):
        check_record({**copy.deepcopy(record), **change}, WHERE)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_record_leaves_the_weights_usable(tmp_path, record, suffix):
    del record["shares"]
    path = save_weights({"w": torch.ones(2)}, tmp_path / f"soup{suffix}", provenance=record)
    with pytest.raises(UnreadableCheckpoint, match="save_weights"):
        _ = open_checkpoint(path).provenance
    again = save_weights(path, tmp_path / f"again{suffix}")
    assert open_checkpoint(again).provenance is None
