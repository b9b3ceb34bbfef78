import json
import os

import pytest
import torch
from safetensors.torch import load_file

from lightning_soup.errors import IncompatibleIngredients, UnwritableOutput
from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.save import check_output, save_combination
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.memory import extra_memory
from tests.helpers.trainers import quiet_trainer
from tests.helpers.weights import assert_same, every_layout, every_type

TENSORS = every_type() | every_layout()
TORCH = pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])


def load(path):
    """With torch's own safe loader."""
    return torch.load(path, weights_only=True)


@TORCH
def test_torch_files_open_with_the_safe_loader_and_with_ours(tmp_path, suffix):
    path = save_weights(TENSORS, tmp_path / f"a{suffix}", provenance={"recipe": "x"})
    assert path == tmp_path / f"a{suffix}"
    content = load(path)
    assert_same(content["state_dict"] if suffix == ".ckpt" else content, TENSORS)
    assert_same(open_checkpoint(path), TENSORS)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_a_combination_is_saved_as_if_it_were_combined_first(tmp_path, suffix):
    models = [{"w": torch.randn(300, 400), "n": torch.arange(3)} for _ in range(3)]
    torch.save({"model": models[1]}, tmp_path / "like.pth")
    for like in (None, tmp_path / "like.pth"):
        save_weights(combine(models, [0.5, 0.25, 0.25]), tmp_path / f"a{suffix}", like=like, provenance={"x": 1})
        save_combination(models, [0.5, 0.25, 0.25], tmp_path / f"b{suffix}", like=like, provenance={"x": 1})
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory as Linux tells it")
@pytest.mark.parametrize("suffix", [pytest.param(".ckpt", marks=pytest.mark.slow), ".safetensors"])
def test_no_model_is_held_in_memory(tmp_path, suffix):
    size = 64 << 20
    for i in range(2):
        save_weights({f"w{n}": torch.full((size // 16,), float(i)) for n in range(4)}, tmp_path / f"{i}.pt")
    assert extra_memory(tmp_path, ["0.pt", "1.pt"], f"soup{suffix}") < size / 4
    assert open_checkpoint(tmp_path / f"soup{suffix}")["w3"].unique().tolist() == [0.5]


def test_equal_content_gives_equal_bytes_whatever_the_name(tmp_path):
    for suffix in (".pt", ".ckpt", ".safetensors"):
        weights = {"w": torch.arange(9.0), "b": torch.ones(2)}
        a, b = (save_weights(weights, tmp_path / f"{name}{suffix}", provenance={"x": 1}) for name in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_tied_tensors_are_written_once_in_torch_files(tmp_path):
    weight = torch.randn(100, 100)
    save_weights({"a": weight, "b": weight}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 50_000
    content = load(tmp_path / "a.pt")
    assert content["a"].data_ptr() == content["b"].data_ptr()
    assert open_checkpoint(tmp_path / "a.pt").ties == (("a", "b"),)


def test_a_view_does_not_take_its_storage_along(tmp_path):
    save_weights({"w": torch.randn(100_000)[:3]}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 3000


def test_a_file_in_another_format_is_a_conversion(tmp_path):
    save_weights({"_orig_mod.w": torch.ones(3)}, tmp_path / "a.pt")
    save_weights(tmp_path / "a.pt", tmp_path / "b.safetensors")
    save_weights(tmp_path / "b.safetensors", tmp_path / "c.ckpt")
    assert_same(load_file(tmp_path / "b.safetensors"), {"w": torch.ones(3)})
    assert open_checkpoint(tmp_path / "c.ckpt").format == "lightning"


# ---------------------------------------------------------------------------------------------------------------- like


@pytest.fixture
def trained(tmp_path):
    module = TinyClassifier(batch_norm=True, lr=0.03)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    return tmp_path / "trained.ckpt", module


def test_a_lightning_checkpoint_stays_loadable(tmp_path, trained):
    path, module = trained
    doubled = {name: tensor * 2 for name, tensor in module.state_dict().items()}
    save_weights(doubled, tmp_path / "soup.ckpt", like=path, provenance={"recipe": "UniformSoup()"})
    loaded = TinyClassifier.load_from_checkpoint(tmp_path / "soup.ckpt")
    assert_same(loaded.state_dict(), doubled)
    assert (loaded.hparams.lr, loaded.hparams.batch_norm) == (0.03, True)
    quiet_trainer().validate(loaded, datamodule=TinyData(), verbose=False)
    content = load(tmp_path / "soup.ckpt")
    assert "optimizer_states" not in content
    assert (tmp_path / "soup.ckpt").stat().st_size < path.stat().st_size


def test_a_checkpoint_without_a_model_to_follow_is_a_minimal_lightning_one(tmp_path, trained):
    _, module = trained
    save_weights(module, tmp_path / "soup.ckpt")
    loaded = TinyClassifier.load_from_checkpoint(tmp_path / "soup.ckpt", batch_norm=True)
    assert_same(loaded.state_dict(), module.state_dict())


class Optimiser:
    def __init__(self):
        self.rate = 3


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`:UserWarning")
def test_hyperparameters_that_are_not_plain_are_named_in_a_warning(tmp_path):
    content = {
        "pytorch-lightning_version": "2.4.0",
        "epoch": 2,
        "global_step": 30,
        "state_dict": {"w": torch.ones(2)},
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "optimiser": Optimiser(), "nested": {"fine": [1, (2, 3)], "bad": Optimiser()}},
        "callbacks": {"Timer": Optimiser()},
    }
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(
        UserWarning, match=r"a\.ckpt: left out .*: hyper_parameters\.optimiser, hyper_parameters\.nested\.bad"
    ):
        save_weights({"w": torch.zeros(2)}, tmp_path / "b.ckpt", like=tmp_path / "a.ckpt")
    saved = load(tmp_path / "b.ckpt")
    assert saved["hyper_parameters"] == {"lr": 0.1, "nested": {"fine": [1, (2, 3)]}}
    assert (saved["epoch"], saved["global_step"], saved["hparams_name"]) == (2, 30, "kwargs")
    assert set(saved) == {*content, "state_dict"} - {"callbacks"}
    save_weights({"w": torch.zeros(2)}, tmp_path / "b.pt", like=tmp_path / "b.ckpt")  # nothing left out: no warning


def test_the_key_and_the_original_names_are_kept(tmp_path):
    content = {"model": {"module._orig_mod.w": torch.ones(2), "module._orig_mod.b": torch.ones(1)}, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    weights = {"w": torch.zeros(2), "b": torch.zeros(1)}
    save_weights(weights, tmp_path / "b.pth", like=tmp_path / "a.pth", provenance={"recipe": "x"})
    saved = load(tmp_path / "b.pth")
    assert list(saved["model"]) == ["module._orig_mod.w", "module._orig_mod.b"]
    assert set(saved) == {"model", "lightning_soup"}
    opened = open_checkpoint(tmp_path / "b.pth")
    assert_same(opened, weights)
    assert opened.provenance == {"recipe": "x"}
    torch.save(content["model"], tmp_path / "bare.pth")
    save_weights(weights, tmp_path / "c.pth", like=tmp_path / "bare.pth")
    assert list(load(tmp_path / "c.pth")) == ["module._orig_mod.w", "module._orig_mod.b"]


def test_like_of_another_model_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(IncompatibleIngredients, match="missing in"):
        save_weights({"x": torch.ones(2)}, tmp_path / "b.ckpt", like=tmp_path / "a.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["soup", "soup.txt", "soup.h5", "soup.SAFETENSORS"])
def test_unknown_suffixes(tmp_path, name):
    with pytest.raises(UnwritableOutput, match=r"unknown suffix .* Expected \.safetensors"):
        save_weights({"w": torch.ones(1)}, tmp_path / name)


def test_an_output_is_checked_before_any_work(tmp_path):
    for suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        check_output(tmp_path / f"soup{suffix}")
    for path in ("soup.txt", "soup", str(tmp_path), tmp_path / "file" / "soup.ckpt"):
        (tmp_path / "file").touch()
        with pytest.raises(UnwritableOutput):
            check_output(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_saving_does_not_judge(tmp_path, suffix):
    odd = torch.tensor([0x7FC00123, 0x7F800000, 0x00000001, -0x80000000], dtype=torch.int32).view(torch.float32)
    weights = {"w": odd, "h": torch.tensor([torch.nan, -torch.inf]).half()}  # a NaN with a payload, the smallest number
    assert_same(open_checkpoint(save_weights(weights, tmp_path / f"a{suffix}")), weights)


@TORCH
@pytest.mark.parametrize("after", [0, 1000, 400_000, 800_000])  # the first data, the second, the directory
def test_a_disk_that_fills_up_while_a_torch_file_is_written(tmp_path, suffix, after, monkeypatch):
    original, written = os.pwrite, []

    def full(descriptor, data, offset):
        written.append(len(data))
        if sum(written) > after:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UnwritableOutput, match=f"a{suffix}: cannot be written .the disk is full."):
        save_weights({"w": torch.randn(100_000), "v": torch.randn(100_000)}, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


@TORCH
def test_torch_files_that_cannot_be_written(tmp_path, suffix):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnwritableOutput, match="cannot be written"):
        save_weights({"w": torch.ones(1)}, tmp_path / "file" / f"a{suffix}")


def test_provenance_is_plain_json(tmp_path):
    path = save_weights({"w": torch.ones(1)}, tmp_path / "a.safetensors", provenance={"b": 1, "a": [None, True, 0.5]})
    assert json.loads(open_checkpoint(path).metadata["lightning_soup"]) == {"a": [None, True, 0.5], "b": 1}
