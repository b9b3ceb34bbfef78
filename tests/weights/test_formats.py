import os
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.formats import _script_tensors
from lightning_soup.weights.inert_pickle import Placeholder
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer
from tests.helpers.weights import assert_same, every_layout

# ------------------------------------------------------------------------------------------------ where the weights are


@pytest.mark.parametrize(
    "key",
    [
        "state_dict",
        "model_state_dict",
        "model",
        "module",
        "params",
        "net",
        "state_dict_ema",
        "model_ema",
        "ema_state_dict",
        "ema",
    ],
)
@pytest.mark.parametrize("which", ["average", "raw"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_under_any_usual_key(tmp_path, key, which, zipped):
    tensors = every_layout()
    content = {"epoch": 3, key: tensors, "optimizer": {"state": {0: {"step": torch.ones(3)}}}, "args": {"lr": 0.1}}
    content["step"] = torch.tensor(7)  # a tensor at the top is no state dict where weights stand under a key
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(tmp_path / "a.pth", which=which)
    assert_same(dict(opened), tensors)
    assert (opened.key, opened.format) == (key, "torch")
    assert opened.metadata == {"epoch": 3, "args": {"lr": 0.1}, "step": 7}


def test_timm_files_open_as_the_average_unless_asked_for_the_raw_weights(tmp_path):
    raw, average = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    content = {"epoch": 9, "arch": "vit", "state_dict": raw, "state_dict_ema": average, "optimizer": {}, "metric": 0.5}
    torch.save(content, tmp_path / "last.pth.tar")
    assert_same(open_checkpoint(tmp_path / "last.pth.tar"), average)
    assert_same(open_checkpoint(tmp_path / "last.pth.tar", which="raw"), raw)
    assert open_checkpoint(tmp_path / "last.pth.tar", which="raw").key == "state_dict"


def test_lightning_checkpoints(tmp_path):
    module = TinyClassifier(batch_norm=True, lr=0.03)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    opened = open_checkpoint(tmp_path / "last.ckpt")
    assert_same(opened, module.state_dict())
    assert (opened.format, opened.key, opened.label) == ("lightning", "state_dict", "last.ckpt")
    assert opened.metadata["hyper_parameters"] == {"batch_norm": True, "lr": 0.03}
    assert (opened.metadata["epoch"], opened.metadata["global_step"]) == (1, 6)
    assert opened.metadata["callbacks"] == {}
    assert not opened.dropped


def test_lightning_averages_open_as_the_average_or_raw(tmp_path):
    module = TinyClassifier()
    trainer = quiet_trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    live = {}

    class Save(TinyClassifier):
        def on_train_epoch_end(self):
            live.update({name: value.clone() for name, value in self.state_dict().items()})
            self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    module = Save()
    trainer.fit(module, datamodule=TinyData())
    opened = open_checkpoint(tmp_path / "last.ckpt", which="raw")
    assert opened.key == "current_model_state"
    assert_same(opened, live)
    average = open_checkpoint(tmp_path / "last.ckpt")
    assert average.key == "state_dict"
    assert set(average) == set(live)
    assert not torch.equal(average["net.0.weight"], live["net.0.weight"])
    expected = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(average, expected)


def test_averaged_model_state_dicts(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = AveragedModel(net)
    average.update_parameters(net)
    torch.save(average.state_dict(), tmp_path / "swa.pt")
    opened = open_checkpoint(tmp_path / "swa.pt")
    assert_same(opened, net.state_dict())
    assert opened.original_names["0.weight"] == "module.0.weight"


def test_a_counter_named_like_that_of_averaged_model_stays_elsewhere(tmp_path):
    torch.save({"n_averaged": torch.tensor(3), "w": torch.ones(1)}, tmp_path / "a.pt")
    assert sorted(open_checkpoint(tmp_path / "a.pt")) == ["n_averaged", "w"]


def test_hyperparameters_drawn_with_numpy_are_numbers(tmp_path):
    hparams = {
        "lr": np.float64(0.25),
        "width": np.int64(7),
        "flag": np.bool_(True),
        "half": np.float16(0.5),
        "array": np.ones(3),
        "text": np.str_("a"),
        "score": torch.tensor(0.5),
        "curve": torch.ones(3),
        "shape": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
    }
    for protocol in (2, 5):
        content = {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": hparams}
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
        opened = open_checkpoint(tmp_path / "a.ckpt")
        expected = {
            "lr": 0.25,
            "width": 7,
            "flag": True,
            "half": 0.5,
            "score": 0.5,
            "shape": (2, 3),
            "device": "cuda:1",
        }
        assert opened.metadata["hyper_parameters"] == expected
        assert [type(value) for value in opened.metadata["hyper_parameters"].values()][:3] == [float, int, bool]
        assert set(opened.dropped) == {f"hyper_parameters.{name}" for name in ("array", "text", "curve", "dtype")}


def test_a_module_tree_that_holds_itself_ends():
    root = Placeholder()
    root.state = {"left": root, "right": root}
    assert _script_tensors(root) == {}


# ----------------------------------------------------------------------------------------------- what is no checkpoint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"", "empty .0 bytes."),
        ("a.safetensors", b"", "empty .0 bytes."),
        ("a.ckpt", b"hello, this is a text file\n" * 9, "not a checkpoint .it begins with b'hello"),
        ("a.ckpt", b"x", "not a checkpoint"),
        ("a.safetensors", b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        ("a.safetensors", b"  \n<html lang='en'>", "web page"),
        ("a.safetensors", b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        ("a.pt", b"\x80\x04K\x03.", "a pickle, but not one of torch.save"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        ("a.pt", b"storages\0" + bytes(40) + b"ustar" + bytes(60), "2018"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0", "not a checkpoint"),
        ("a.pt", b"PK\x03\x04" + bytes(60), "damaged or truncated"),
        ("a.json", b'{"weights": []}', "not a checkpoint"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], r"holds one object \(list\).*state_dict"),
        (torch.ones(1), r"holds one object \(Tensor\)"),
        (nn.Linear(2, 2), r"holds one object \(torch\.nn\.modules\.linear\.Linear\)"),
        ({"model": nn.Linear(2, 2)}, r"'model' is a whole object \(torch\.nn\.modules\.linear\.Linear\)"),
        ({"epoch": 3, "encoder": {"w": torch.ones(1)}}, r"no weights found\. It holds 'epoch' \(int\), 'encoder'"),
        ({"state_dict": {}}, "no weights found"),
        ({}, "no weights found. It holds nothing"),
        ({"state_dict": {0: torch.ones(1)}}, "a tensor is named 0"),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UnreadableCheckpoint, match=message):
        open_checkpoint(tmp_path / "a.pt")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(UnreadableCheckpoint, match="not a pattern"):
        open_checkpoint(str(tmp_path / "*.ckpt"))
    with pytest.raises(UnreadableCheckpoint, match="File name too long"):
        open_checkpoint(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.ckpt")
    found = []

    def read():
        with pytest.raises(UnreadableCheckpoint) as caught:
            open_checkpoint(tmp_path / "pipe.ckpt")
        found.append(str(caught.value))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)  # opening a pipe would wait for its writer for ever
    assert "a pipe or device" in found[0]


def test_a_file_without_permission(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")

    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.pt"))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        open_checkpoint(tmp_path / "a.pt")
