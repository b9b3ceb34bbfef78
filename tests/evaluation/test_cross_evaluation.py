import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import AwareNet, Family, cross_evaluate
from lightning_soup.errors import RecipeError, UnsupportedSetup
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


class Named(LightningDataModule):
    def __init__(self, *class_names):
        super().__init__()
        self.class_names = class_names

    def test_dataloader(self):
        return loader(1)


def test_classes_in_another_order_are_refused():
    module = AwareNet([nn.Linear(8, 2)], class_names=["fake", "real"])
    cross_evaluate({"A": module}, {"B": Named("fake", "real")})
    with pytest.raises(
        UnsupportedSetup, match="classes of the data are real, fake, in this order; expected fake, real"
    ):
        cross_evaluate({"A": module}, {"B": Named("real", "fake")})


def test_each_set_has_its_normalisation():
    """A set that is normalised otherwise gives what the same images give without."""
    module = AwareNet(
        [Family(modules=[nn.Sequential(nn.Flatten(), nn.Linear(8, 2))], mean=[0.5], std=[2.0])], in_chans=1
    )
    x, y = loader(1).dataset.tensors

    def scores(mean, std):
        data = Named("a", "b")
        data.preprocessing = SimpleNamespace(mean=mean, std=std)
        images = ((x - mean[0]) / std[0]).view(-1, 1, 2, 4)
        data.test_dataloader = lambda: DataLoader(TensorDataset(images, y), 16)
        return cross_evaluate({"A": module}, {"B": data}).scores["A"]["B"]

    assert scores([0.5], [2.0]) == pytest.approx(scores([-1.0], [0.5]), abs=1e-6)
    assert module.hparams.data_mean is None  # as before


@pytest.mark.parametrize("positive", [-1, 2, "fake"])
def test_a_positive_class_that_there_is_not(positive):
    with pytest.raises(UnsupportedSetup, match=rf"positive={positive!r}: expected a class, 0 to 1"):
        cross_evaluate({"A": AwareNet([nn.Linear(8, 2)])}, {"B": loader(1)}, positive=positive)


def test_data_that_cannot_be_evaluated_on():
    module = AwareNet([nn.Linear(8, 2)])
    with pytest.raises(UnsupportedSetup, match="data module of B has no test data"):
        cross_evaluate({"A": module}, {"B": LightningDataModule()})
    with pytest.raises(RecipeError, match=r"batches \(inputs, targets\) of tensors, got dict"):
        cross_evaluate({"A": module}, {"B": DataLoader([{"x": torch.zeros(8)}])})


def test_nothing_to_evaluate():
    with pytest.raises(UnsupportedSetup, match="one module and one test set"):
        cross_evaluate({}, {})
