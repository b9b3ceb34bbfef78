"""Training at several image sizes."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import resized
from lightning_soup.modules import ImageClassifier
from lightning_soup.modules.train_sizes import TrainSizes
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

SHAPE = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
MIXER = {"model_name": "mixer_s32_224", "model_args": None, "img_size": None}
VIT = {"model_name": "vit_tiny_patch16_224", "num_classes": 3, "img_size": 16, "in_chans": 1, "model_args": SHAPE}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def loader(count=24):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(count, 1, 16, 16), torch.arange(count) % 3), 6)


def seen(module):
    """The shapes that the model is given in training."""
    found = []
    module.model.register_forward_hook(lambda m, i, _: found.append(tuple(i[0].shape)) if m.training else None)
    return found


def classifier(**options):
    seed_everything(0, verbose=False)
    return ImageClassifier(**{**VIT, "train_sizes": [12, 16, 20], "lr": 1e-2, "warmup": 0, **options})


def test_each_step_has_the_size_of_its_number():
    module = classifier()
    shapes = seen(module)
    quiet_trainer(max_epochs=5).fit(module, loader())
    sizes = TrainSizes([12, 16, 20])
    assert shapes == [(6, 1, *sizes.at(step)) for step in range(20)]
    assert len(set(shapes)) == 3
    assert module.model.pos_embed.shape == (1, 17, 8)  # on the grid of img_size


def test_one_step_is_the_plain_one_on_resized_images():
    module, reference = classifier(), classifier()
    images, labels = next(iter(loader()))
    size = TrainSizes([12, 16, 20]).at(0)
    loss = torch.nn.functional.cross_entropy(reference(resized(images, size)), labels)
    torch.testing.assert_close(module.training_loss((images, labels)), loss)


def test_sizes_do_not_change_within_an_accumulation():
    module = classifier()
    shapes = seen(module)
    quiet_trainer(max_epochs=3, accumulate_grad_batches=2).fit(module, loader())
    assert all(shapes[i] == shapes[i + 1] for i in range(0, len(shapes), 2))


def test_a_budget_bounds_the_tokens_of_a_step():
    images, labels = torch.rand(12, 1, 16, 16), torch.arange(12)
    for budget, expected in ((None, 12), (1.0, 7), (0.5, 3), (100.0, 12), (1e-6, 1)):
        found, kept = TrainSizes([20], budget)((images, labels), 0)  # ⌊12 · budget · 16²/20²⌋
        assert len(found) == len(kept) == expected
        assert torch.equal(kept, labels[:expected])
    assert len(TrainSizes([8], 1.0)((images, labels), 0)[0]) == 12  # never more than there are


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_resuming_is_bit_exact(tmp_path, options):
    def fit(**more):
        module = classifier()
        kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(
            max_epochs=4,
            callbacks=[kept],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            limit_val_batches=0,
            **options,
        )
        trainer.fit(module, loader(), **more)
        return module.state_dict()

    reference, resumed = fit(), fit(ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert all(torch.equal(value, resumed[name]) for name, value in reference.items())


def _on_a_rank():
    torch.set_num_threads(1)
    module = classifier()
    shapes = seen(module)
    quiet_trainer(max_epochs=3, devices=2, strategy="ddp").fit(module, loader())
    return shapes


def test_two_ranks_have_the_same_size_in_every_step():
    first, second = run_on_two_ranks(_on_a_rank)
    assert first == second
    assert len({shape[-1] for shape in first}) > 1


def test_networks_with_convolutions_need_nothing():
    module = ImageClassifier("test_byobnet", 3, in_chans=1, train_sizes=[32, 48])
    shapes = seen(module)
    quiet_trainer(max_epochs=1).fit(module, loader())
    assert {shape[-1] for shape in shapes} <= {32, 48}


def test_a_checkpoint_is_one_of_any_size(tmp_path):
    module = classifier()
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt").eval()
    for side in (12, 16, 28):
        images = torch.rand(2, 1, side, side)
        assert torch.equal(loaded(images), module.eval()(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sizes": []}, "train_sizes is empty"),
        ({"train_sizes": [0, 16]}, "1 pixel or more"),
        ({"train_sizes": [16, 18]}, "cannot take images of 18×18: its patches are 4×4. Choose"),
        ({"token_budget": 0.0}, "token_budget=0.0"),
        ({"token_budget": 1.0, "train_sizes": None}, "token_budget=1.0 is for train_sizes"),
        ({"model_args": {**SHAPE, "dynamic_img_size": False}}, "one image size at a time"),
        (
            {"model_name": "mixer_s32_224", "model_args": None, "img_size": None, "train_sizes": [192]},
            "cannot take images",
        ),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        classifier(**options)
