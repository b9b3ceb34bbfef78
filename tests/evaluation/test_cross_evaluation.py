import csv

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import AwareNet, cross_evaluate
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData


def loader(seed, one_class=False):
    torch.manual_seed(seed)
    x = torch.randn(50, 8)
    y = (x[:, 0] + 0.5 * torch.randn(50) > 0).long()
    return DataLoader(TensorDataset(x, y * 0 if one_class else y), 16)


def test_every_model_on_every_set(tmp_path):
    torch.manual_seed(0)
    modules = {"A": AwareNet([nn.Linear(8, 2)]), "B": AwareNet([nn.Linear(8, 1)], one_logit=True)}
    data = {"A": loader(1), "B": loader(2)}
    found = cross_evaluate(modules, data)
    for trained, module in modules.items():
        for tested, given in data.items():
            x, y = given.dataset.tensors
            p = module(x)[:, 1].exp().detach()
            scores = found.scores[trained][tested]
            assert scores["auc"] == pytest.approx(roc_auc_score(y, p))
            assert scores["f1"] == pytest.approx(f1_score(y, p > 0.5))
            assert scores["acc"] == pytest.approx(float(((p > 0.5) == y).float().mean()))
    lines = found.markdown().splitlines()
    assert lines[0] == "| trained on | A: auc | A: f1 | B: auc | B: f1 |"
    assert lines[2].startswith(f"| A | {100 * found.scores['A']['A']['auc']:.1f} |")
    assert found.table("nll").row_count == 2
    found.save(tmp_path / "cross.csv")
    rows = list(csv.DictReader((tmp_path / "cross.csv").read_text().splitlines()))
    assert [(row["trained on"], row["tested on"]) for row in rows] == [("A", "A"), ("A", "B"), ("B", "A"), ("B", "B")]
    assert float(rows[1]["nll"]) == pytest.approx(found.scores["A"]["B"]["nll"])


def test_any_module_and_data_modules():
    found = cross_evaluate({"tiny": TinyClassifier()}, {"tiny": TinyData()})
    assert 0 <= found.scores["tiny"]["tiny"]["acc"] <= 1


def test_one_class_only_is_nan_and_a_warning():
    with pytest.warns(UserWarning, match="not defined"):
        found = cross_evaluate({"A": AwareNet([nn.Linear(8, 2)])}, {"one": loader(0, one_class=True)})
    assert found.scores["A"]["one"]["auc"] != found.scores["A"]["one"]["auc"]
    assert "nan" in found.markdown()


def test_nothing_to_evaluate():
    with pytest.raises(UnsupportedSetup, match="one module and one test set"):
        cross_evaluate({}, {})
