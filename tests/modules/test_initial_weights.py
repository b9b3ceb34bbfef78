import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_soup.errors import NonFiniteWeights, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.modules.initial_weights import load_initial_weights


def tiny_vit(num_classes=5, **options):
    options = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **options)


def assert_equal(model, state, but=()):
    own = model.state_dict()
    for name in own:
        assert torch.equal(own[name], state[name].to(own[name].dtype)) is (name not in but), name


@pytest.fixture
def state():
    """Trained weights: nothing is as it was initialised."""
    return {name: torch.randn_like(value) for name, value in tiny_vit().state_dict().items()}


def prefixed(state):
    return {f"model.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["raw", "raw_half", "wrapped", "safetensors", "lightning"])
def test_formats(tmp_path, state, kind):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.ckpt")
    if kind == "safetensors":
        save_file(prefixed(state), path)
    else:
        content = {
            "raw": lambda: state,
            "raw_half": lambda: {name: value.half() for name, value in state.items()},
            "wrapped": lambda: {"model": {f"module.{name}": value for name, value in state.items()}},
            "lightning": lambda: {"state_dict": prefixed(state), "pytorch-lightning_version": "2.5.0", "epoch": 1},
        }[kind]()
        torch.save(content, path)
    model = tiny_vit()
    load_initial_weights(model, path)
    if kind == "raw_half":
        assert next(model.parameters()).dtype == torch.float32
        state = {name: value.half() for name, value in state.items()}
    assert_equal(model, state)


def test_a_head_of_other_classes(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    model = tiny_vit(num_classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedSetup) as raised:
        load_initial_weights(model, tmp_path / "x.pt")
    assert "has a head for 5 classes (head.weight: (5, 16)), but the model one for 7 ((7, 16))" in str(raised.value)
    assert "reset_head=True" in str(raised.value)
    assert "num_classes=5" in str(raised.value)
    assert_equal(model, before)  # nothing was loaded by half
    load_initial_weights(model, tmp_path / "x.pt", reset_head=True)
    expected = {**state, "head.weight": before["head.weight"], "head.bias": before["head.bias"]}
    assert_equal(model, expected)


def test_reset_head_where_the_classes_agree_and_where_there_is_no_head(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    torch.save({name: value for name, value in state.items() if not name.startswith("head.")}, tmp_path / "y.pt")
    for path in (tmp_path / "x.pt", tmp_path / "y.pt"):
        model = tiny_vit()
        load_initial_weights(model, path, reset_head=True)
        assert_equal(model, state, but=("head.weight", "head.bias"))


def test_other_architectures_are_listed_tensor_by_tensor(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UnsupportedSetup) as raised:
        load_initial_weights(tiny_vit(img_size=35, depth=1), tmp_path / "x.pt")
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("x.pt does not fit the model, 13 tensors disagree:")
    assert lines[1] == "  pos_embed: shape (1, 17, 16), expected (1, 26, 16)"
    assert lines[2] == "  blocks.1.attn.proj.bias: not in the model"
    assert len(lines) == 13
    assert lines[-2] == "  and 3 more"
    assert "model_args" in lines[-1]
    del state["cls_token"]
    torch.save(state, tmp_path / "y.pt")
    with pytest.raises(UnsupportedSetup, match="cls_token: not in the file"):
        load_initial_weights(tiny_vit(), tmp_path / "y.pt")


def test_old_files_without_batch_counters(tmp_path):
    model = timm.create_model("resnet18", num_classes=3)
    state = {name: torch.randn_like(value.float()) for name, value in model.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pt")
    load_initial_weights(model, tmp_path / "x.pt")
    assert torch.equal(model.bn1.running_mean, state["bn1.running_mean"])


def test_unreadable_files(tmp_path):
    with pytest.raises(UnreadableCheckpoint):
        load_initial_weights(tiny_vit(), tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_training_that_diverged(value, tmp_path):
    broken = nn.Linear(2, 2).state_dict()
    broken["bias"][1] = value
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in broken.items()}}, tmp_path / "broken.ckpt")
    model = nn.Linear(2, 2)
    before = model.bias.clone()
    with pytest.raises(NonFiniteWeights, match=r"broken\.ckpt: model\.bias holds NaN or an infinity"):
        load_initial_weights(model, tmp_path / "broken.ckpt")
    assert torch.equal(model.bias, before)


def test_infinities_of_a_mask_are_no_damage(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    model.mask.zero_()
    load_initial_weights(model, tmp_path / "masked.pt")
    assert model.mask[0, 1] == float("-inf")
