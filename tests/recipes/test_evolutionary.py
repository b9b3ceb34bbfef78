"""LCSC: the method's golden cases, its guarantees, its third split, resuming, and what it refuses or tells."""

import json
import math
from dataclasses import fields

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation import Evaluator, ModuleEvaluator
from lightning_soup.recipes import EvolutionarySoup, Ingredient, recook
from lightning_soup.recipes.parts import blocks_of
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml

POINTS = [(0.0, 0.0), (2.0, 0.0), (0.0, 1.0)]


def checkpoints(*vectors, dtype=torch.float32):
    return [
        Ingredient({"w": torch.tensor(v, dtype=dtype)}, step=10 * i, label=f"step {10 * i}")
        for i, v in enumerate(vectors)
    ]


class Distance(Evaluator):
    """−‖w − target‖², with a slot as a module has one, and a third split whose target is another."""

    metric, mode = "val_loss", "min"

    def __init__(self, target, third=None):
        self.target = torch.tensor(target, dtype=torch.float64)
        self.third = None if third is None else torch.tensor(third, dtype=torch.float64)
        self.seen, self.seen_third = [], []

    def score(self, weights):
        self.seen.append(weights["w"].clone())
        return -float((weights["w"].double() - self.target).square().sum())

    def splits(self):
        return ("select",) if self.third is None else ("select", "third")

    def score_on(self, weights, split):
        if split == "select":
            return self.score(weights)
        self.seen_third.append(weights["w"].clone())
        return -float((weights["w"].double() - self.third).square().sum())


def soup_of(recipe, evaluator=None, files=None):
    return recipe.cook(files or checkpoints(*POINTS), evaluator or Distance((3.0, -1.0)))


# ------------------------------------------------------------------------------------------------- the exact optimum


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_optimum_is_found_outside_of_all_averages(seed):
    soup = soup_of(EvolutionarySoup(budget=1000, seed=seed))
    assert -soup.score < 1e-3
    assert len(soup.history) == 1000
    uniform = soup.history[6]
    assert (uniform.label, -uniform.score) == ("uniform", pytest.approx(65 / 9, rel=1e-6))
    assert -soup.history[0].score == 13  # the last checkpoint
    assert min(soup.coefficients) < 0


def test_cma_finds_it_sooner():
    soup = soup_of(EvolutionarySoup("cma", budget=200))
    assert -soup.score < 1e-4
    assert soup.coefficients == pytest.approx((0.5, 1.5, -1.0), abs=1e-2)


@pytest.mark.parametrize("options", [{}, {"strategy": "cma"}, {"memory": 0.0}, {"local": 0.5, "memory": 0.0}])
@pytest.mark.parametrize("by", ["model", "block"])
def test_guarantees(options, by):
    evaluator = Distance((3.0, -1.0))
    files = checkpoints(*POINTS, (1.0, 1.0), (0.5, -0.5), (0.1, 0.2))
    soup = soup_of(EvolutionarySoup(budget=103, by=by, **options), evaluator, files)
    assert len(evaluator.seen) == 103  # exactly the budget
    assert len(soup.history) == 103
    best = [trial.score for trial in soup.history if trial.kept]
    assert best == sorted(best)
    assert soup.score == max(trial.score for trial in soup.history) >= max(t.score for t in soup.history[:7])
    for trial in soup.history:
        assert abs(sum(trial.values[f"α{k}"] for k in range(1, 7)) - 1) <= 1e-9
        assert trial.values["amplification"] >= 1 - 1e-9
    assert soup.score == pytest.approx(Distance((3.0, -1.0)).score(soup.weights()), abs=1e-5)
    again = soup_of(EvolutionarySoup(budget=103, by=by, **options), Distance((3.0, -1.0)), files)
    assert again.history == soup.history
    other = soup_of(EvolutionarySoup(budget=103, by=by, seed=1, **options), Distance((3.0, -1.0)), files)
    assert other.history != soup.history


def test_the_start_is_in_the_order_of_the_steps():
    files = [Ingredient({"w": torch.tensor([float(s)])}, step=s, label=str(s)) for s in (30, 10, 20)]
    soup = EvolutionarySoup(budget=7, decays=[0.0, 0.5]).cook(files, Distance((30.0,)))
    assert soup.history[0].label == "the last checkpoint"
    assert [soup.history[0].values[f"α{k}"] for k in (1, 2, 3)] == [1, 0, 0]
    assert [soup.history[1].values[f"α{k}"] for k in (1, 2, 3)] == [0.5, 0.25, 0.25]
    assert soup.history[1].label == "EMA, d = 0.5"


def test_generations_formed_together_are_what_is_formed_alone():
    files = checkpoints(*[torch.randn(5, generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)])
    target = (0.3, -2.0, 1.0, 0.0, 0.5)
    together, alone = Distance(target), Distance(target)
    soup_of(EvolutionarySoup(budget=60, generation=8), together, files)
    soup_of(EvolutionarySoup(budget=60, generation=8, memory=0.0), alone, files)
    for a, b in zip(together.seen[:15], alone.seen[:15], strict=True):  # later rounding may choose other parents
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_ridge_keeps_coefficients_near_the_best_start():
    def far(ridge):
        soup = soup_of(EvolutionarySoup(budget=300, ridge=ridge))
        start = max(soup.history[:7], key=lambda trial: trial.score)
        return sum((a - start.values[f"α{k}"]) ** 2 for k, a in enumerate(soup.coefficients, 1))

    assert far(5.0) < 0.5 * far(0.0)
    assert far(1e6) == 0  # the start itself


# ------------------------------------------------------------------------------------------------------- third split


def test_the_third_split_chooses_among_the_best_on_the_way():
    evaluator = Distance((3.0, -1.0), third=(1.2, 0.0))
    soup = soup_of(EvolutionarySoup(budget=300, finalists=6), evaluator)
    assert len(evaluator.seen) == 300
    judged = [trial for trial in soup.history if "third" in trial.values]
    assert len(judged) == len(evaluator.seen_third) == 6
    assert all(trial.kept for trial in judged)
    chosen = next(trial for trial in soup.history if trial.reason.startswith("chosen"))
    assert chosen.values["third"] == min(trial.values["third"] for trial in judged) == -soup.third_score
    assert soup.score == chosen.score < max(trial.score for trial in soup.history)
    assert any("on the third split, which chose" in note for note in soup.notes)


def test_without_a_third_split_the_search_says_what_its_score_is_worth():
    soup = soup_of(EvolutionarySoup(budget=20))
    assert any("no estimate of how good the soup is" in note for note in soup.notes)
    assert soup.third_score is None
    ignored = soup_of(EvolutionarySoup(budget=20, third="ignore"), Distance((3.0, -1.0), third=(0.0, 0.0)))
    assert ignored.third_score is None
    with pytest.raises(RecipeError, match="there is no third split to choose on"):
        soup_of(EvolutionarySoup(third="require"))


class ThirdData(TinyData):
    def third_dataloader(self):
        return DataLoader(self.test[0], 16)


def test_the_third_split_of_a_data_module_is_judged_by_its_validation_step():
    torch.manual_seed(0)
    module, data = TinyClassifier(), ThirdData()
    evaluator = ModuleEvaluator(module, data, "val_loss")
    assert evaluator.splits() == ("select", "third")
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    x, y = data.test[0].tensors
    expected = torch.nn.functional.cross_entropy(module.net(x), y).item()
    assert evaluator.score_on(weights, "third") == pytest.approx(-expected, rel=1e-5)
    x, y = data.val.tensors
    expected = torch.nn.functional.cross_entropy(module.net(x), y).item()
    assert evaluator.score_on(weights, "select") == pytest.approx(-expected, rel=1e-5)
    assert ModuleEvaluator(module, TinyData(), "val_loss").splits() == ("select",)

    class Empty(TinyData):
        def third_dataloader(self):
            return []

    assert ModuleEvaluator(module, Empty(), "val_loss").splits() == ("select",)
    with pytest.raises(RecipeError, match="Empty has no third split"):
        ModuleEvaluator(module, Empty(), "val_loss").score_on(weights, "third")


# ---------------------------------------------------------------------------------------------------------- networks


def trained(batch_norm=False, count=6):
    torch.manual_seed(0)
    module, data = TinyClassifier(batch_norm), TinyData()
    optimizer, found = module.configure_optimizers(), []
    x, y = data.train.tensors
    for step in range(1, 5 * count + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module.net(x), y).backward()
        optimizer.step()
        if step % 5 == 0:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            found.append(Ingredient(weights, step=step, label=f"step {step}"))
    return TinyClassifier(batch_norm), data, found


def test_the_file_is_cooked_again_to_the_same_bytes(tmp_path):
    module, data, files = trained()
    paths = []
    for item in files:
        paths.append(tmp_path / f"{item.label}.ckpt")
        torch.save({"state_dict": dict(item.weights)}, paths[-1])
    soup = EvolutionarySoup(budget=40).cook(paths, ModuleEvaluator(module, data, "val_loss"))
    path = soup.save(tmp_path / "soup.safetensors")
    assert recook(path).read_bytes() == path.read_bytes()
    score = ModuleEvaluator(module, data, "val_loss").score(open_checkpoint(path))
    assert score == pytest.approx(soup.score, rel=1e-6)


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_statistics_of_batchnorm_are_estimated_anew_for_each_candidate(memory):
    module, data, files = trained(batch_norm=True)
    evaluator = ModuleEvaluator(module, data, "val_loss")
    soup = EvolutionarySoup(budget=30, memory=memory).cook(files, evaluator)
    found = soup.weights()
    assert float(found["net.1.running_var"].min()) >= 0
    mixed = combine([item.weights for item in files], [1 / 6] * 6)
    assert not torch.equal(found["net.1.running_var"], mixed["net.1.running_var"])
    weights = {name: value.clone() for name, value in found.items()}
    weights.update(evaluator.recalibrate(weights))
    torch.testing.assert_close(found["net.1.running_mean"], weights["net.1.running_mean"], rtol=1e-4, atol=1e-5)
    assert soup.score == pytest.approx(evaluator.score(found), rel=1e-4)


def test_a_negative_variance_is_never_stored():
    files = [
        {"bn.running_var": torch.tensor([0.5]), "bn.running_mean": torch.zeros(1)},
        {"bn.running_var": torch.tensor([1.4]), "bn.running_mean": torch.zeros(1)},
    ]

    class NoData(Distance):
        def score(self, weights):
            raise AssertionError("not reached")

    with pytest.raises(RecipeError, match="NoData cannot recalibrate BatchNorm statistics"):
        EvolutionarySoup(budget=7).cook(files, NoData((0.0,)))


def test_frozen_tensors_come_out_as_they_are():
    frozen = torch.randn(4, generator=torch.Generator().manual_seed(1))
    files = [{"w": torch.tensor(point), "frozen": frozen.clone()} for point in POINTS]
    soup = soup_of(EvolutionarySoup(budget=50), files=files)
    assert torch.equal(soup.weights()["frozen"], frozen)


def test_blocks():
    weights = open_checkpoint(
        {
            "model.patch.weight": torch.ones(1),
            "model.layers.0.a.weight": torch.ones(1),
            "model.layers.0.b.bias": torch.ones(1),
            "model.layers.1.a.weight": torch.ones(1),
            "model.head.weight": torch.ones(1),
            "cls_token": torch.ones(1),
        }
    )
    assert list(blocks_of(weights).values()) == [0, 1, 1, 2, 3, 4]


def test_coefficients_by_block_reach_what_one_per_checkpoint_cannot():
    files = [{"a.0.w": torch.tensor([x]), "a.1.w": torch.tensor([y])} for x, y in [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)]]

    class Two(Distance):
        def score(self, weights):
            return super().score({"w": torch.cat([weights["a.0.w"], weights["a.1.w"]])})

    one = soup_of(EvolutionarySoup(budget=300), Two((3.0, -1.0)), files)
    blocks = soup_of(EvolutionarySoup(budget=300, by="block", strategy="cma"), Two((3.0, -1.0)), files)
    assert -one.score == pytest.approx(8, abs=0.1)
    assert -blocks.score < 0.1
    assert set(blocks.coefficients) == {"a.0.w", "a.1.w"}


# ---------------------------------------------------------------------------------------------------- interruptions


class Interrupted(Distance):
    def __init__(self, after):
        super().__init__((3.0, -1.0))
        self.after = after

    def score(self, weights):
        if len(self.seen) == self.after:
            raise KeyboardInterrupt
        return super().score(weights)


@pytest.mark.parametrize("options", [{}, {"strategy": "cma"}, {"local": 0.5, "memory": 0.0}])
@pytest.mark.parametrize("after", [3, 7, 30, 33])
def test_a_search_goes_on_from_its_record_and_evaluates_nothing_twice(tmp_path, options, after):
    record = str(tmp_path / "search.json")
    whole = soup_of(EvolutionarySoup(budget=60, **options))
    first = Interrupted(after)
    with pytest.raises(KeyboardInterrupt):
        soup_of(EvolutionarySoup(budget=60, record=record, **options), first)
    assert len(json.loads((tmp_path / "search.json").read_text())["tried"]) == after
    second = Distance((3.0, -1.0))
    soup = soup_of(EvolutionarySoup(budget=60, record=record, **options), second)
    assert len(first.seen) + len(second.seen) == 60
    assert soup.history == whole.history
    assert soup.coefficients == whole.coefficients


def test_a_record_serves_a_larger_budget(tmp_path):
    record = str(tmp_path / "search.json")
    short = soup_of(EvolutionarySoup(budget=47, record=record))
    evaluator = Distance((3.0, -1.0))
    longer = soup_of(EvolutionarySoup(budget=90, record=record), evaluator)
    assert len(evaluator.seen) == 43
    assert [trial.score for trial in longer.history[:47]] == [trial.score for trial in short.history]
    assert longer.history == soup_of(EvolutionarySoup(budget=90)).history


def test_where_it_was_recorded_is_no_part_of_its_name(tmp_path):
    recipe = EvolutionarySoup(budget=40, memory=0.0, record=str(tmp_path / "search.json"))
    assert str(recipe) == "EvolutionarySoup(budget=40)"


def test_a_record_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.json"
    soup_of(EvolutionarySoup(budget=20, record=str(path)))
    for options in ({"seed": 1}, {"sigma": 0.2}, {"by": "block"}):
        with pytest.raises(RecipeError, match=f"search.json: is the record of another search.*{next(iter(options))}"):
            soup_of(EvolutionarySoup(budget=20, record=str(path), **options))
    with pytest.raises(RecipeError, match=r"another search .ingredients was 3 values, is 3 values"):
        soup_of(EvolutionarySoup(budget=20, record=str(path)), files=checkpoints(*POINTS[::-1]))
    content = json.loads(path.read_text())
    content["tried"][9]["coefficients"][0][0] += 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="its candidates are not those of this search"):
        soup_of(EvolutionarySoup(budget=20, record=str(path)))
    for text in ("{", "[]", '{"tried": 3}', '{"tried": [{}]}'):
        path.write_text(text)
        with pytest.raises(RecipeError, match=r"search\.json: is no record of a search"):
            soup_of(EvolutionarySoup(budget=20, record=str(path)))


# ---------------------------------------------------------------------------------------------- what goes wrong


class Sometimes(Distance):
    """Every third candidate has no score."""

    def score(self, weights):
        found = super().score(weights)
        return [found, math.nan, -math.inf][len(self.seen) % 3]


def test_candidates_without_a_score_are_passed_over_and_counted():
    soup = soup_of(EvolutionarySoup(budget=90), Sometimes((3.0, -1.0)))
    assert math.isfinite(soup.score)
    missing = [trial for trial in soup.history if trial.score is None]
    assert len(missing) == 60
    assert not any(trial.kept for trial in missing)
    assert any("60 of 90 candidates scored NaN or infinity" in note for note in soup.notes)


def test_a_record_keeps_candidates_without_a_score(tmp_path):
    record = str(tmp_path / "search.json")
    whole = soup_of(EvolutionarySoup(budget=60, record=record), Sometimes((3.0, -1.0)))
    again = soup_of(EvolutionarySoup(budget=60, record=record), Interrupted(0))
    assert again.history == whole.history


def test_no_start_vector_with_a_score():
    class Broken(Distance):
        def score(self, weights):
            super().score(weights)
            return math.nan

    evaluator = Broken((0.0, 0.0))
    with pytest.raises(RecipeError, match="none of the 7 start vectors of the search has a finite score"):
        soup_of(EvolutionarySoup(budget=50), evaluator)
    assert len(evaluator.seen) == 7


def test_a_nan_of_a_module_is_passed_over():
    _, data, files = trained()
    first = [float(item.weights["net.0.weight"].flatten()[0]) for item in files]
    limit = sum(first) / len(first) + 1e-4

    class Logged(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            loss = torch.nn.functional.cross_entropy(self.net(x), y)
            broken = float(self.net[0].weight.flatten()[0]) > limit
            self.log("val_loss", loss * math.nan if broken else loss)

    soup = EvolutionarySoup(budget=40).cook(files, ModuleEvaluator(Logged(), data, "val_loss"))
    assert any(trial.score is None for trial in soup.history)
    assert math.isfinite(soup.score)


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_amplified_rounding_is_told(dtype, told, recwarn):
    soup = soup_of(EvolutionarySoup(budget=200), files=checkpoints(*POINTS, dtype=dtype))
    notes = [note for note in soup.notes if "amplifies the rounding errors" in note]
    assert bool(notes) == told
    assert bool([w for w in recwarn if "amplifies" in str(w.message)]) == told
    if told:
        assert "bfloat16" in notes[0]


@pytest.mark.parametrize(
    ("storage", "expected"), [(torch.float64, 1.004), (torch.float16, 1.005859375), (torch.bfloat16, 1.0)]
)
def test_amplification_of_what_files_round(storage, expected):
    files = [{"w": torch.tensor([x], dtype=torch.float64).to(storage).double()} for x in (1.001, 1.0004)]
    assert combine(files, (6, -5), accumulate="float64")["w"].item() == pytest.approx(expected, abs=1e-12)


def test_a_plateau_is_told():
    class Accuracy(Distance):
        metric, mode = "val_acc", "max"

        def score(self, weights):
            super().score(weights)
            return float(weights["w"][0] > 0)

    soup = soup_of(EvolutionarySoup(budget=40), Accuracy((0.0, 0.0)))
    assert any("on a plateau" in note for note in soup.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "grid"}, "expected 'evolution' or 'cma'"),
        ({"budget": 6}, "a whole number, 7 or more, one for each start vector"),
        ({"population": 1}, "a whole number, 2 or more"),
        ({"generation": 0}, "a whole number, 1 or more"),
        ({"strategy": "cma", "generation": 1}, "for 'cma' 2"),
        ({"decays": [0.5, 0.3]}, "rising"),
        ({"decays": [1.0]}, "0 ≤ d < 1"),
        ({"decays": []}, "at least one"),
        ({"sigma": 0.0}, "more than 0"),
        ({"sigma": math.nan}, "more than 0"),
        ({"mutation": 1.5}, "from 0 to 1"),
        ({"ridge": -1.0}, "0 or more"),
        ({"third": "maybe"}, "'auto', 'require' or 'ignore'"),
        ({"finalists": 0}, "1 or more"),
        ({"budget": 60.0}, "a whole number"),
        ({"seed": 0.5}, "a whole number"),
        ({"memory": math.inf}, "0 GB or more, not infinity"),
        ({"memory": -1.0}, "0 GB or more"),
        ({"by": "tensor"}, "'model' or 'block'"),
    ],
)
def test_options_that_cannot_be(options, message):
    name = list(options)[-1]
    with pytest.raises(RecipeError, match=rf"EvolutionarySoup\({name}=.*{message}"):
        EvolutionarySoup(**options)  # before there is a checkpoint: a fit should not train first


def test_ingredients_that_cannot_be():
    with pytest.raises(RecipeError, match="needs three checkpoints or more"):
        soup_of(EvolutionarySoup("cma"), files=checkpoints((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(RecipeError, match=r"EvolutionarySoup.* needs"):
        EvolutionarySoup().cook(checkpoints(*POINTS))


def test_two_checkpoints_that_are_the_same():
    files = checkpoints((1.0, 0.0), (1.0, 0.0))
    with pytest.warns(UserWarning, match="hold"), pytest.raises(RecipeError, match="all 2 checkpoints hold the same"):
        soup_of(EvolutionarySoup(budget=20), files=files)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_every_option_is_reachable_from_yaml(tmp_path):
    options = {
        "strategy": "cma",
        "budget": 50,
        "population": 5,
        "generation": 4,
        "decays": [0.0, 0.5],
        "sigma": 0.2,
        "mutation": 0.3,
        "crossover": 0.4,
        "local": 0.1,
        "by": "block",
        "ridge": 0.5,
        "third": "ignore",
        "finalists": 3,
        "memory": 1.0,
        "seed": 7,
        "record": "search.json",
        "common_start": "ignore",
    }
    assert set(options) == {option.name for option in fields(EvolutionarySoup)}
    given = {"recipe": {"class_path": "lightning_soup.recipes.EvolutionarySoup", "init_args": options}, "trail": True}
    for built in through_yaml(TinyClassifier, "lightning_soup.callbacks.ModelSoup", given, tmp_path):
        assert built.recipe == EvolutionarySoup(**options)
        assert built.trail
