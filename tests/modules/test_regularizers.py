"""What a fine-tune is held to: the penalties by hand, the soup behind them, resume, ranks, compile, and refusals."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader

from lightning_soup.callbacks import ExpertsWeightAveraging
from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.modules import L2SP, CLIPClassifier, ImageClassifier, ReferenceKL
from lightning_soup.weights import open_checkpoint, save_weights
from tests.helpers.clip import ROWS, TINY_CLIP, RowData, tiny_clip
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks
from tests.modules.test_classifier import TINY, Shapes


def fit(model, data=None, *callbacks, **options):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=[*callbacks], **{"max_epochs": 2, **options})
    trainer.fit(model, datamodule=data or Shapes())
    return trainer


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """Two fine-tunes of one start, as Lightning checkpoints, and the start."""
    folder = tmp_path_factory.mktemp("earlier")
    torch.manual_seed(5)
    start = ImageClassifier(**TINY)
    save_weights(start, folder / "start.safetensors")
    for name, lr in (("a", 3e-3), ("b", 6e-3)):
        model = ImageClassifier(**{**TINY, "lr": lr}, checkpoint_path=str(folder / "start.safetensors"))
        fit(model, max_epochs=1).save_checkpoint(folder / f"{name}.ckpt")
    return folder


def files(earlier):
    return [str(earlier / "a.ckpt"), str(earlier / "b.ckpt")]


def tuned(earlier, regularizer, **options):
    return ImageClassifier(
        **{**TINY, **options}, checkpoint_path=str(earlier / "start.safetensors"), regularizer=regularizer
    )


def soup_of(earlier, share=0.5):
    a, b = (open_checkpoint(file) for file in files(earlier))
    found = ImageClassifier(**TINY)
    found.load_state_dict({name: share * a[name] + (1 - share) * b[name] for name in a})
    return found.eval()


def batch():
    return next(iter(DataLoader(Shapes().train, 16)))


def prepared(model):
    model.regularizer.prepare(model)
    model.regularizer.place(model)
    return model


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reference_kl_is_that_to_the_soup(earlier, temperature):
    regularizer = ReferenceKL(files(earlier), [0.75, 0.25], weight=0.6, temperature=temperature)
    model = prepared(tuned(earlier, regularizer)).train()
    images, targets = batch()
    logits, reference = model(images), soup_of(earlier, 0.75)(images)
    p, q = ((z / temperature).log_softmax(1) for z in (logits, reference))
    expected = F.cross_entropy(logits, targets) + 0.6 * temperature**2 * F.kl_div(
        q, p, reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(model.training_loss((images, targets)), expected)


def test_a_soup_of_oneself_costs_nothing(earlier):
    regularizer = ReferenceKL([str(earlier / "start.safetensors")], weight=5.0)
    model = prepared(tuned(earlier, regularizer))
    images, targets = batch()
    loss = model.training_loss((images, targets))
    torch.testing.assert_close(loss, F.cross_entropy(model(images), targets))
    plain = torch.autograd.grad(F.cross_entropy(model(images), targets), list(model.parameters()))
    for found, expected in zip(torch.autograd.grad(loss, list(model.parameters())), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_l2sp_by_hand(earlier):
    regularizer = L2SP(weight=0.3, weight_head=0.2)
    model = prepared(tuned(earlier, regularizer))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):
            value.add_(0.01 * (number + 1))
    images, targets = batch()
    own = dict(model.named_parameters())
    head = {name for name in own if name.startswith("model.head.")}
    assert len(head) == 2
    expected = F.cross_entropy(model(images), targets)
    expected = expected + 0.15 * sum(((own[n] - start[n]) ** 2).sum() for n in own if n not in head)
    expected = expected + 0.1 * sum((own[n] ** 2).sum() for n in head)
    torch.testing.assert_close(model.training_loss((images, targets)), expected)


def test_l2sp_to_a_soup(earlier):
    model = prepared(tuned(earlier, L2SP(weight=2.0, checkpoints=files(earlier))))
    own, soup = dict(model.named_parameters()), dict(soup_of(earlier).named_parameters())
    images, targets = batch()
    expected = F.cross_entropy(model(images), targets) + sum(((own[n] - soup[n]) ** 2).sum() for n in own)
    torch.testing.assert_close(model.training_loss((images, targets)), expected)


def test_mixup_shows_both_the_same_images(earlier):
    model = prepared(tuned(earlier, ReferenceKL(files(earlier)), mixup=0.5))
    images, targets = batch()
    seen = []
    twin = model.regularizer._twin
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    twin.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.training_loss((images, targets))
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], images)


def test_it_holds(earlier):
    """The more weight, the nearer the predictions stay; what is held is neither trained nor saved."""
    distances = []
    images = batch()[0]
    for weight in (0.0, 1.0, 50.0):
        model = tuned(earlier, ReferenceKL(files(earlier), weight=weight), lr=1e-2)
        trainer = fit(model, max_epochs=4)
        assert not any("twin" in name or "regularizer" in name for name in model.state_dict())
        assert trainer.callback_metrics["train_reference_kl"] >= 0
        with torch.no_grad():
            p, q = (net.eval()(images).log_softmax(1) for net in (model, soup_of(earlier)))
        distances.append(F.kl_div(q, p, reduction="batchmean", log_target=True).item())
    assert distances[0] > 2 * distances[1] > 2 * distances[2]


def test_without_weight_the_training_is_the_plain_one(earlier):
    plain, held = tuned(earlier, None), tuned(earlier, ReferenceKL(files(earlier), weight=0.0))
    fit(plain)
    fit(held)
    for name, value in plain.state_dict().items():
        assert torch.equal(held.state_dict()[name], value)


REGULARIZERS = {
    "kl": lambda earlier: ReferenceKL(files(earlier), weight=0.5),
    "l2sp": lambda earlier: L2SP(weight=0.5),
    "l2sp soup": lambda earlier: L2SP(weight=0.5, weight_head=0.1, checkpoints=files(earlier)),
}


class InOrder(Shapes):
    def train_dataloader(self):
        return DataLoader(self.train, 8)


class Saves(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_resuming_is_bit_exact(earlier, tmp_path, kind):
    whole, resumed = (tuned(earlier, REGULARIZERS[kind](earlier)) for _ in range(2))
    fit(whole, InOrder(), Saves(tmp_path / "x.ckpt"))
    quiet_trainer(max_epochs=2).fit(resumed, datamodule=InOrder(), ckpt_path=tmp_path / "x.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_resuming_with_something_else_is_refused(earlier, tmp_path):
    fit(tuned(earlier, ReferenceKL(files(earlier))), InOrder(), Saves(tmp_path / "x.ckpt"))
    for other in (None, ReferenceKL(files(earlier)[:1]), L2SP()):
        model = tuned(earlier, other)
        trainer = quiet_trainer(max_epochs=2)
        with pytest.raises(UnsupportedSetup, match="was trained with the regularizer"):
            trainer.fit(model, datamodule=InOrder(), ckpt_path=tmp_path / "x.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt")  # needs nothing but its file
    assert loaded.regularizer is None
    quiet_trainer().test(loaded, Shapes(), verbose=False)


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_a_module_that_was_trained_already_is_resumed(earlier, tmp_path, kind):
    """As in a notebook: θ_0 is not what the module is by then."""
    whole, again = (tuned(earlier, REGULARIZERS[kind](earlier)) for _ in range(2))
    fit(whole, InOrder(), Saves(tmp_path / "x.ckpt"))
    fit(again, InOrder(), max_epochs=2)
    quiet_trainer(max_epochs=2).fit(again, datamodule=InOrder(), ckpt_path=tmp_path / "x.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class HandsOn(ImageClassifier):
    """Its hyperparameters are those of its base, too."""

    def __init__(self, more=1, **options):
        super().__init__(**options)


class KeepsToItself(ImageClassifier):
    def __init__(self, size):
        super().__init__(**TINY)
        del self.hparams["size"]


def test_subclasses(earlier):
    found = prepared(HandsOn(**TINY, regularizer=ReferenceKL(files(earlier))))
    for name, value in soup_of(earlier).state_dict().items():
        torch.testing.assert_close(found.regularizer._twin.state_dict()[name], value)
    found = KeepsToItself(3)
    found.regularizer = ReferenceKL(files(earlier))
    with pytest.raises(UnsupportedSetup, match=r"KeepsToItself\(\*\*hparams\) fails: .*'size'.*save_hyperparameters"):
        prepared(found)


def _on_a_rank(regularizer, earlier):
    model = tuned(earlier, REGULARIZERS[regularizer](earlier))
    fit(model, devices=2, strategy="ddp")
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["kl", "l2sp"])
def test_two_ranks(earlier, kind):
    first, second = run_on_two_ranks(partial(_on_a_rank, kind), earlier)
    for name, value in first.items():
        assert (value == second[name]).all(), name


@pytest.mark.parametrize("kind", REGULARIZERS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(earlier, kind, precision):
    trainer = fit(tuned(earlier, REGULARIZERS[kind](earlier)), precision=precision, max_epochs=1)
    assert trainer.callback_metrics["val_loss"].isfinite()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, tracing a log call
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "l2sp"])
def test_compiled_modules(earlier, kind):
    plain, compiled = (tuned(earlier, REGULARIZERS[kind](earlier)) for _ in range(2))
    fit(plain, max_epochs=1)
    fit(torch.compile(compiled, backend="eager"), max_epochs=1)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_accumulated_batches(earlier):
    trainer = fit(tuned(earlier, ReferenceKL(files(earlier))), accumulate_grad_batches=3, max_epochs=1)
    assert trainer.global_step == 2


def test_adapters_are_held_by_what_they_predict(earlier):
    model = tuned(earlier, ReferenceKL(files(earlier)), lora={"r": 2, "targets": ["qkv"]})
    trainer = fit(model, max_epochs=1)
    assert trainer.callback_metrics["train_reference_kl"].isfinite()


def test_experts(earlier):
    """What they predict can be held, and each of them to its start; a plain soup has no weights for them."""
    experts = {"num_experts": 2, "layers": "all"}
    for regularizer in (ReferenceKL(files(earlier)), L2SP()):
        trainer = fit(tuned(earlier, regularizer), None, ExpertsWeightAveraging(**experts), max_epochs=1)
        assert trainer.callback_metrics["train_loss"].isfinite()
    with pytest.raises(UnsupportedSetup, match=r"L2SP: \d+ parameters that are trained are not in the checkpoints"):
        fit(tuned(earlier, L2SP(checkpoints=files(earlier))), None, ExpertsWeightAveraging(**experts), max_epochs=1)


# ----------------------------------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("head", ["text", "trained"])
def test_clip(tmp_path, head):
    train = "both" if head == "text" else "image"
    for seed, name in enumerate("ab"):
        model = tiny_clip(train=train, head=head)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        save_weights(model, tmp_path / f"{name}.safetensors")
    both = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    model = tiny_clip(train=train, head=head, regularizer=ReferenceKL(both, weight=0.5))
    trainer = fit(model, RowData(), max_epochs=1)
    assert trainer.callback_metrics["train_reference_kl"] > 0
    a, b = (open_checkpoint(file) for file in both)
    held = {name.removeprefix("model."): value for name, value in model.regularizer._twin.state_dict().items()}
    for name in a:
        if "logit" not in name:
            torch.testing.assert_close(held[name.removeprefix("model.")], 0.5 * a[name] + 0.5 * b[name])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert CLIPClassifier.load_from_checkpoint(tmp_path / "x.ckpt").regularizer is None


def test_clip_with_names_from_the_data(tmp_path):
    save_weights(tiny_clip(), tmp_path / "a.safetensors")
    model = CLIPClassifier(
        model_config=TINY_CLIP, templates=["a {}"], regularizer=ReferenceKL([str(tmp_path / "a.safetensors")])
    )
    trainer = fit(model, RowData(), max_epochs=1)
    assert trainer.callback_metrics["train_reference_kl"].isfinite()
    assert model.regularizer._twin.classnames == ROWS


# ------------------------------------------------------------------------------------------------------ YAML, bad input


def test_from_yaml(earlier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text(
        f"""
trainer: {{max_epochs: 1, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false,
  enable_model_summary: false, log_every_n_steps: 1}}
model:
  class_path: lightning_soup.modules.ImageClassifier
  init_args:
    model_name: {TINY["model_name"]}
    img_size: 8
    in_chans: 1
    num_classes: 3
    model_args: {TINY["model_args"]}
    checkpoint_path: {earlier / "start.safetensors"}
    regularizer:
      class_path: lightning_soup.modules.ReferenceKL
      init_args: {{checkpoints: {files(earlier)}, coefficients: [0.5, 0.5], weight: 0.3, temperature: 2.0}}
data: {{class_path: tests.modules.test_classifier.Shapes}}
"""
    )
    cli = SoupCLI(["fit", "--config", str(tmp_path / "given.yaml")])
    assert cli.model.regularizer.temperature == 2.0
    assert cli.trainer.callback_metrics["train_reference_kl"].isfinite()
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt")


def test_bad_input(earlier, tmp_path):
    for make, message in (
        (lambda: ReferenceKL(["a"], weight=-1.0), "expected a weight of 0 or more"),
        (lambda: ReferenceKL(["a"], temperature=0.0), "temperature above 0"),
        (lambda: ReferenceKL("a.ckpt"), "expected a list"),
        (lambda: ReferenceKL(["a"], [0.5]), "with the sum 1"),
        (lambda: ReferenceKL(["a"], weight=float("nan")), "expected a weight of 0 or more"),
        (lambda: L2SP(weight=-0.1), "expected 0 or more"),
        (lambda: L2SP(weight_head=float("inf")), "expected 0 or more"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            make()
    torch.manual_seed(0)
    other = ImageClassifier(**{**TINY, "num_classes": 4})
    save_weights(other, tmp_path / "four.safetensors")
    with pytest.raises(UnsupportedSetup, match=r"four\.safetensors has a head for 4 classes.*Expected num_classes=4"):
        fit(tuned(earlier, ReferenceKL([str(tmp_path / "four.safetensors")])))
    broken = {name: value.clone() for name, value in soup_of(earlier).state_dict().items()}
    broken["model.head.bias"][0] = float("nan")
    save_weights(broken, tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteWeights, match=r"nan\.safetensors"):
        fit(tuned(earlier, ReferenceKL([str(tmp_path / "nan.safetensors")])))
    with pytest.raises(UnsupportedSetup, match="adapters or experts"):
        fit(tuned(earlier, L2SP(checkpoints=files(earlier)), lora={"r": 2, "targets": ["qkv"], "heads": []}))
