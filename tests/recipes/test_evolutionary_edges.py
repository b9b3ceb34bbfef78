"""LCSC at its edges: scores that are no numbers, records of other forms, statistics that are not to be estimated."""

import math

import pytest
import torch
from torch import nn

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import EvolutionarySoup, Ingredient, UniformSoup
from tests.helpers.boring import TinyClassifier, TinyData
from tests.recipes.test_evolutionary import POINTS, Distance, checkpoints, soup_of

# ------------------------------------------------------------------------------------------------------------- scores


class Given(Distance):
    def __init__(self, convert):
        super().__init__((3.0, -1.0))
        self.convert = convert

    def score(self, weights):
        return self.convert(super().score(weights))


def test_a_score_may_be_a_tensor(tmp_path):
    record = str(tmp_path / "search.json")
    soup = soup_of(EvolutionarySoup(budget=20, record=record), Given(torch.tensor))
    assert isinstance(soup.score, float)
    assert soup.score == pytest.approx(soup_of(EvolutionarySoup(budget=20)).score, rel=1e-6)


@pytest.mark.parametrize("convert", [lambda _: None, lambda _: "bad", lambda _: torch.zeros(2)])
def test_a_score_that_is_no_number(convert):
    with pytest.raises(
        RecipeError, match=r"Given gave .* as the score of a candidate on the select split. Expected one"
    ):
        soup_of(EvolutionarySoup(budget=20), Given(convert))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_third_split_without_any_score_does_not_choose(broken, tmp_path):
    class Broken(Distance):
        def score_on(self, weights, split):
            return self.score(weights) if split == "select" else broken

    soup = soup_of(EvolutionarySoup(budget=60), Broken((3.0, -1.0), third=(0.0, 0.0)))
    assert soup.third_score is None
    assert soup.score == max(trial.score for trial in soup.history)
    assert any("finalists has a finite val_loss on the third split, so the searched" in note for note in soup.notes)
    assert not any("which chose" in note for note in soup.notes)
    assert any(trial.reason == "chosen: no finite score on the third split" for trial in soup.history)
    assert not any("third" in trial.values for trial in soup.history)


def test_finalists_without_a_third_score_are_passed_over():
    class Half(Distance):
        def score_on(self, weights, split):
            found = super().score_on(weights, split)
            return found if split == "select" or len(self.seen_third) % 2 else math.nan

    evaluator = Half((3.0, -1.0), third=(0.0, 0.0))
    soup = soup_of(EvolutionarySoup(budget=60), evaluator)
    judged = [trial.values["third"] for trial in soup.history if "third" in trial.values]
    assert len(judged) == (len(evaluator.seen_third) + 1) // 2 >= 2
    assert -soup.third_score == min(judged)


# ------------------------------------------------------------------------------------------------------------- records


def test_a_record_knows_decays_in_any_sequence(tmp_path):
    record = str(tmp_path / "search.json")
    soup_of(EvolutionarySoup(budget=20, decays=(0.0, 0.5), record=record))
    evaluator = Distance((3.0, -1.0))
    soup_of(EvolutionarySoup(budget=30, decays=(0.0, 0.5), record=record), evaluator)
    assert len(evaluator.seen) == 10


def test_a_record_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"is no record of a search \(IsADirectoryError.*Name another file"):
        soup_of(EvolutionarySoup(budget=20, record=str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------ rounding


def test_the_type_of_frozen_tensors_amplifies_nothing(recwarn):
    files = [{"w": torch.tensor(point), "frozen": torch.ones(4, dtype=torch.bfloat16)} for point in POINTS]
    soup = soup_of(EvolutionarySoup(budget=200), files=files)
    assert not any("amplifies" in note for note in soup.notes)
    assert not [w for w in recwarn if "amplifies" in str(w.message)]
    assert any("bfloat16" in n for n in soup_of(EvolutionarySoup(budget=200), files=coarse()).notes)


class Wide(Distance):
    """Has its weights in 32 bits, whatever the files are in."""

    def slot(self):
        return {"w": torch.zeros(8)}


@pytest.mark.parametrize("options", [{}, {"memory": 0.0}, {"memory": 0.0, "local": 1.0}])
def test_candidates_of_coarse_files_are_rounded_to_the_evaluators_own_type(options):
    draw = torch.Generator().manual_seed(0)
    files = checkpoints(*torch.randn(8, 8, generator=draw).tolist(), dtype=torch.bfloat16)
    evaluator = Wide([0.3] * 8)
    with pytest.warns(UserWarning, match="amplifies"):
        soup = EvolutionarySoup(budget=60, **options).cook(files, evaluator)
    for seen, trial in zip(evaluator.seen, soup.history, strict=True):
        exact = sum(trial.values[f"α{k}"] * item.weights["w"].double() for k, item in enumerate(files, 1))
        torch.testing.assert_close(seen.double(), exact, rtol=0, atol=2e-6)


def coarse():
    return checkpoints(*POINTS, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------------- statistics


class TwoNorms(TinyClassifier):
    def __init__(self):
        super().__init__()
        first, second = nn.BatchNorm1d(16), nn.BatchNorm1d(16)
        self.net = nn.Sequential(nn.Linear(8, 16), first, nn.ReLU(), nn.Linear(16, 16), second, nn.Linear(16, 3))


class InstanceNorm(TinyClassifier):
    """Its norm has statistics, but is no BatchNorm."""

    def __init__(self):
        super().__init__()
        norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (4, 4)), norm, nn.Flatten(), nn.Linear(16, 3))


def trained(module, frozen=None):
    torch.manual_seed(0)
    optimizer, found = module.configure_optimizers(), []
    x, y = TinyData().train.tensors
    if frozen is not None:
        frozen.running_mean.fill_(1.0)
        frozen.running_var.fill_(3.0)
        frozen.eval()
    for step in range(1, 31):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.net(x), y).backward()
        optimizer.step()
        if step % 5 == 0:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            found.append(Ingredient(weights, step=step, label=f"step {step}"))
    return found


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_frozen_statistics_stay_beside_those_that_are_estimated_anew(memory):
    module = TwoNorms()
    files = trained(module, frozen=module.net[1])
    evaluator = ModuleEvaluator(TwoNorms(), TinyData(), "val_loss")
    soup = EvolutionarySoup(budget=30, memory=memory).cook(files, evaluator)
    found = soup.weights()
    assert torch.equal(found["net.1.running_mean"], torch.ones(16))
    assert torch.equal(found["net.1.running_var"], torch.full((16,), 3.0))
    assert soup.score == pytest.approx(evaluator.score(found), rel=1e-4)

    x = TinyData().train.tensors[0]
    seen = TwoNorms().eval()
    seen.load_state_dict(found)
    torch.testing.assert_close(found["net.4.running_mean"], seen.net[:4](x).mean(0).detach(), rtol=1e-4, atol=1e-5)


def test_recalibrating_a_soup_leaves_frozen_statistics_alone():
    module = TwoNorms()
    files = trained(module, frozen=module.net[1])
    evaluator = ModuleEvaluator(module, TinyData(), "val_loss")
    plain = UniformSoup().cook(files)
    soup = plain.recalibrated(evaluator)
    found = soup.weights()
    assert torch.equal(found["net.1.running_var"], torch.full((16,), 3.0))
    assert not torch.equal(found["net.4.running_var"], plain.weights()["net.4.running_var"])
    assert soup.score == pytest.approx(evaluator.score(found), rel=1e-6)


def test_statistics_that_nothing_estimates_are_refused():
    files, evaluator = trained(InstanceNorm()), ModuleEvaluator(InstanceNorm(), TinyData(), "val_loss")
    with pytest.raises(
        RecipeError, match=r"'net.2.running_mean' differs between the checkpoints, but is not estimated"
    ):
        EvolutionarySoup(budget=30).cook(files, evaluator)
