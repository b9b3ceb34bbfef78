import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_soup.errors import RecipeError, UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.evaluation.evaluator import direction
from lightning_soup.weights import open_checkpoint, save_weights
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer


def weights_of(seed, batch_norm=False):
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in TinyClassifier(batch_norm).state_dict().items()}


def accuracy(weights, dataset):
    module = TinyClassifier()
    module.load_state_dict(weights)
    x, y = dataset.tensors
    return (module.net(x).argmax(1) == y).float().mean().item()


def loss(weights, dataset):
    module = TinyClassifier()
    module.load_state_dict(weights)
    x, y = dataset.tensors
    return nn.functional.cross_entropy(module.net(x), y).item()


@pytest.fixture
def data():
    return TinyData()


def test_score_is_the_logged_metric(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    for seed in (1, 2, 1):
        assert evaluator.score(weights_of(seed)) == pytest.approx(accuracy(weights_of(seed), data.val))


def test_a_smaller_loss_scores_higher(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data, "val_loss", "min")
    score = evaluator.score(weights_of(1))
    assert score == pytest.approx(-loss(weights_of(1), data.val))
    assert evaluator.natural(score) == pytest.approx(loss(weights_of(1), data.val))


def test_a_candidate_written_into_the_slot_is_what_is_scored(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    slot = evaluator.slot()
    for name, value in weights_of(3).items():
        slot[name].copy_(value)
    assert evaluator.score(slot) == pytest.approx(accuracy(weights_of(3), data.val))


def test_files_are_scored_once(data, tmp_path, monkeypatch):
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    file = open_checkpoint(save_weights(weights_of(1), tmp_path / "a.safetensors"))
    first = evaluator.score(file)
    monkeypatch.setattr(evaluator, "_validate", lambda: pytest.fail("scored again"))
    assert evaluator.score(file) == first


def test_the_validation_loader_is_made_once(data):
    made = []
    original = data.val_dataloader
    data.val_dataloader = lambda: made.append(1) or original()
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    for seed in range(3):
        evaluator.score(weights_of(seed))
    list(evaluator.batches(0, 8))
    assert made == [1]
    assert data.val_dataloader() is not data.val_dataloader()  # handed back as it was


def test_unknown_metrics_list_the_logged_ones(data):
    with pytest.raises(RecipeError, match=r"'val_auc' is not logged in validation. Logged: val_acc, val_loss"):
        ModuleEvaluator(TinyClassifier(), data, "val_auc").score(weights_of(1))


def test_a_metric_that_is_nan(data):
    data.val.tensors[0][0, 0] = float("nan")
    with pytest.raises(RecipeError, match="'val_loss' is NaN"):
        ModuleEvaluator(TinyClassifier(), data, "val_loss", "min").score(weights_of(1))


def test_mode_is_checked(data):
    with pytest.raises(RecipeError, match="mode='up'"):
        ModuleEvaluator(TinyClassifier(), data, mode="up")


def test_loss_and_grad_equals_autograd_and_leaves_no_trace(data):
    module = TinyClassifier()
    module.net[0].weight.requires_grad_(False)  # frozen layers take part in a soup all the same
    evaluator = ModuleEvaluator(module, data)
    before = evaluator.score(weights_of(1))
    batch = data.val.tensors
    value, gradient = evaluator.loss_and_grad(weights_of(2), batch)
    reference = TinyClassifier()
    reference.load_state_dict(weights_of(2))
    expected = nn.functional.cross_entropy(reference.net(batch[0]), batch[1])
    expected.backward()
    assert value == pytest.approx(expected.item())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert evaluator.score(weights_of(1)) == before  # the metric did not keep the batch


def test_loss_and_grad_needs_the_loss(data):
    class Silent(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    with pytest.raises(RecipeError, match=r"Silent\.validation_step returned NoneType.*Let it return the loss"):
        ModuleEvaluator(Silent(), data).loss_and_grad(weights_of(1), data.val.tensors)


def test_batches_are_shuffled_by_epoch_and_complete(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data)

    def rows(epoch):
        return torch.cat([x for x, _ in evaluator.batches(epoch, 16)])

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))
    assert torch.equal(rows(0).sort(0).values, data.val.tensors[0].sort(0).values)


def test_head_is_the_layer_whose_output_is_the_logits(data):
    assert ModuleEvaluator(TinyClassifier(), data).head() == ("net.3.weight", "net.3.bias")

    class Cosine(TinyClassifier):
        def predict_step(self, batch, batch_idx):
            return 10 * super().predict_step(batch, batch_idx)

    assert ModuleEvaluator(Cosine(), data).head() == ()


def test_outcomes_of_the_report_split(data):
    outcomes = ModuleEvaluator(TinyClassifier(), data).outcomes(weights_of(1))
    assert list(outcomes) == ["test", "shifted"]
    for name, dataset in zip(("test", "shifted"), data.test, strict=True):
        assert outcomes[name].accuracy == pytest.approx(accuracy(weights_of(1), dataset))


def test_the_third_split_is_the_data_modules(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    with pytest.raises(RecipeError, match="TinyData has no third split"):
        evaluator.outcomes(weights_of(1), "third")
    data.third_dataloader = lambda: DataLoader(data.test[1], 16)
    assert evaluator.outcomes(weights_of(1), "third")["third"].accuracy == pytest.approx(
        accuracy(weights_of(1), data.test[1])
    )


class OneFeature(TinyClassifier):
    """BatchNorm over one input feature, so that its statistics can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 3))


def test_g7_recalibration(data):
    """Batches {1, 3} and {5, 7}: mean 4, variance 2 (mean of unbiased batch variances, not the pooled 6.67)."""
    module = OneFeature()
    x = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    data.train_dataloader = lambda: DataLoader(TensorDataset(x, torch.zeros(4, dtype=torch.long)), 2)
    weights = {name: value.clone() + 1 for name, value in module.state_dict().items()}
    result = ModuleEvaluator(module, data).recalibrate(weights)
    assert result["net.0.running_mean"].item() == pytest.approx(4.0)
    assert result["net.0.running_var"].item() == pytest.approx(2.0)
    assert result["net.0.num_batches_tracked"].item() == 2
    for name, value in module.state_dict().items():
        if name in result:
            assert torch.equal(value, result[name])
        else:
            assert torch.equal(value, weights[name])
    assert module.net[0].momentum == 0.1


def test_g7_entrywise_average_of_statistics():
    from lightning_soup.weights import combine

    a = {
        "running_mean": torch.tensor([0.0]),
        "running_var": torch.tensor([1.0]),
        "num_batches_tracked": torch.tensor(5),
    }
    b = {
        "running_mean": torch.tensor([2.0]),
        "running_var": torch.tensor([1.0]),
        "num_batches_tracked": torch.tensor(3),
    }
    mixed = combine([a, b], [0.5, 0.5])
    assert [mixed[name].item() for name in a] == [1.0, 1.0, 5]


def test_a_data_module_is_set_up_once_and_may_free_its_data(data):
    calls = []

    class Careful(TinyData):
        def setup(self, stage):
            calls.append("setup")

        def teardown(self, stage):
            self.val = None

    evaluator = ModuleEvaluator(TinyClassifier(), Careful())
    for seed in range(3):
        evaluator.score(weights_of(seed))
    assert calls == ["setup"]


def test_a_loader_with_its_own_sampler_is_taken_as_it_is(data):
    some = list(range(0, 60, 3))
    data.val_dataloader = lambda: DataLoader(data.val, 8, sampler=SubsetRandomSampler(some))
    batches = list(ModuleEvaluator(TinyClassifier(), data).batches(0, 16))
    assert sum(len(y) for _, y in batches) == len(some)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_own_loops_run_in_the_trainers_precision(data, precision):
    trainer = quiet_trainer(precision=precision)
    evaluator = ModuleEvaluator(TinyClassifier(), data, trainer=trainer)
    evaluator.score(weights_of(1))
    _, gradient = evaluator.loss_and_grad(weights_of(1), next(iter(evaluator.batches(0, 16))))
    assert set(gradient) == set(weights_of(1))
    assert 0.0 <= evaluator.outcomes(weights_of(1))["test"].accuracy <= 1.0
    assert evaluator.head() == ("net.3.weight", "net.3.bias")


def test_a_module_without_predict_step_is_called_with_the_inputs(data):
    class Forward(TinyClassifier):
        predict_step = LightningModule.predict_step

        def forward(self, x):
            return self.net(x)

    evaluator = ModuleEvaluator(Forward(), data)
    assert evaluator.outcomes(weights_of(1))["test"].accuracy == pytest.approx(accuracy(weights_of(1), data.test[0]))
    assert evaluator.head() == ("net.3.weight", "net.3.bias")


def test_a_module_that_gives_no_logits_is_told(data):
    class Silent(TinyClassifier):
        predict_step = LightningModule.predict_step

    with pytest.raises(RecipeError, match=r"Silent has neither predict_step nor forward.*Add a predict_step"):
        ModuleEvaluator(Silent(), data).outcomes(weights_of(1))


def test_a_module_that_is_built_later_is_not_scored_as_it_happens_to_be(data):
    class Later(TinyClassifier):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            self.net = TinyClassifier().net

    with pytest.raises(UnsupportedSetup, match="Later has no weights yet"):
        ModuleEvaluator(Later(), data).score(weights_of(1))


def test_without_a_data_module():
    with pytest.raises(UnsupportedSetup, match="needs a data module"):
        ModuleEvaluator(TinyClassifier(), None)


def test_the_users_trainer_is_left_as_it_was(data):
    class Logger(TinyClassifier):
        def on_validation_epoch_end(self):
            self.logger.log_metrics({"seen": 1.0})

    seen = []
    logger = CSVLogger("unused")
    logger.log_metrics = lambda *args, **kwargs: seen.append(args)
    trainer = quiet_trainer(logger=logger)
    ModuleEvaluator(Logger(), data, trainer=trainer).score(weights_of(1))
    assert trainer.loggers == [logger]
    assert seen == []
    assert trainer.validate_loop.inference_mode is True


def test_scoring_draws_no_random_numbers_of_the_user(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    candidate = weights_of(1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evaluator.score(candidate)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val_loss", "min"),
        ("val/mse", "min"),
        ("Val-Error", "min"),
        ("val_acc", "max"),
        ("lossless", "max"),
    ],
)
def test_the_direction_of_a_metric_by_its_name(metric, expected):
    assert direction(metric) == expected


def test_a_loss_is_minimised_without_being_told(data):
    evaluator = ModuleEvaluator(TinyClassifier(), data, "val_loss")
    assert evaluator.score(weights_of(1)) == pytest.approx(-loss(weights_of(1), data.val))
