import json

import pytest
import safetensors.torch
import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import combine, open_checkpoint, save_weights
from tests.helpers.weights import assert_same, every_layout

TENSORS = every_layout()


def shards(folder, suffix, index=None):
    folder.mkdir()
    names = [f"model-{i:05d}-of-00003{suffix}" for i in range(3)]
    placed = {name: names[i % 3] for i, name in enumerate(TENSORS)}
    for shard in names:
        part = {name: tensor.contiguous() for name, tensor in TENSORS.items() if placed[name] == shard}
        if suffix == ".safetensors":
            safetensors.torch.save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
    index = folder / (index or f"model{suffix}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return index, placed


@pytest.mark.parametrize(("suffix", "kind"), [(".safetensors", "safetensors shards"), (".bin", "torch shards")])
def test_sharded_folders(tmp_path, suffix, kind):
    shards(tmp_path / "model", suffix)
    opened = open_checkpoint(tmp_path / "model")
    assert_same(opened, TENSORS)
    assert (opened.format, opened.label, opened.path) == (kind, "model", tmp_path / "model")
    assert_same(combine([opened, TENSORS], [0.5, 0.5]), TENSORS)


def test_safetensors_shards_come_before_those_of_other_formats(tmp_path):
    shards(tmp_path / "model", ".safetensors")
    for other in ("flax_model.msgpack.index.json", "a.bin.index.json", "tf_model.h5.index.json"):
        (tmp_path / "model" / other).write_text("{}")
    assert_same(open_checkpoint(tmp_path / "model"), TENSORS)


def test_damaged_shards_are_named(tmp_path):
    index, placed = shards(tmp_path / "model", ".safetensors")
    good = index.read_text()
    for text, message in (
        ("not JSON", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "no 'weight_map'"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "no 'weight_map'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no 'weight_map'"),
        ('{"weight_map": {"a": ".."}}', "no 'weight_map'"),
        ('{"weight_map": {"a": "lost.safetensors"}}', r"lost\.safetensors is missing"),
        (json.dumps({"weight_map": {**placed, "lost": placed["column"]}}), f"'lost' is not in {placed['column']}"),
        ("\xff", "not JSON"),
    ):
        index.write_bytes(text.encode("latin1"))
        with pytest.raises(UnreadableCheckpoint, match=message):
            open_checkpoint(tmp_path / "model")
    index.write_text(good)
    shard = tmp_path / "model" / placed["column"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UnreadableCheckpoint, match=placed["column"]):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_folders(tmp_path, name):
    weights = {
        "base_model.model.q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 2),
    }
    if name.endswith("bin"):
        torch.save(weights, tmp_path / name)
    else:
        safetensors.torch.save_file(weights, tmp_path / name)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    opened = open_checkpoint(tmp_path)
    assert_same(opened, weights)
    assert (opened.format, opened.path) == ("peft adapter", tmp_path)
    assert opened.metadata["adapter_config"] == config
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UnreadableCheckpoint, match=r"adapter_config\.json: not JSON"):
        open_checkpoint(tmp_path)


def test_an_adapter_without_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnreadableCheckpoint, match="without adapter_model"):
        open_checkpoint(tmp_path)


def test_folders_with_one_file_or_a_usual_name(tmp_path):
    save_weights({"w": torch.ones(1)}, tmp_path / "only.safetensors")
    (tmp_path / "README.md").write_text("x")
    assert open_checkpoint(tmp_path).label == "only.safetensors"
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UnreadableCheckpoint, match=r"holds 2 weights files .only\.safetensors, other\.pt."):
        open_checkpoint(tmp_path)
    save_weights({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).label == "model.safetensors"


def test_folders_without_weights(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match=f"{tmp_path}: a folder without weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "sub.ckpt").mkdir()
    with pytest.raises(UnreadableCheckpoint, match="a folder without weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(UnreadableCheckpoint, match=r"no \.metadata"):
        open_checkpoint(tmp_path)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        open_checkpoint(tmp_path)


def test_home_folder_and_artifacts(tmp_path, monkeypatch):
    save_weights({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/a.safetensors")["w"].item() == 1
    monkeypatch.setattr("lightning_soup.weights.opening.fetch_artifact", lambda reference: tmp_path / "a.safetensors")
    assert open_checkpoint("wandb:me/digits/model:v3")["w"].item() == 1


def test_the_program_may_change_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    save_weights({"w": torch.ones(1)}, "a.safetensors")
    torch.save({"w": torch.ones(1)}, "b.pt")
    opened = [open_checkpoint(name) for name in ("a.safetensors", "b.pt")]
    monkeypatch.chdir(tmp_path / "other")
    assert combine(opened, [0.5, 0.5])["w"].item() == 1
    assert [weights["w"].item() for weights in opened] == [1, 1]
    assert [weights.path for weights in opened] == [tmp_path / "a.safetensors", tmp_path / "b.pt"]


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableCheckpoint, match=r"~x\.pt: no such file"):
        open_checkpoint("~x.pt")
    save_weights({"w": torch.ones(1)}, tmp_path / "~x.pt")
    assert open_checkpoint("~x.pt")["w"].item() == 1


def test_paths_that_the_system_refuses(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop", "a symbolic link that leads nowhere"),
        (tmp_path / "loop" / "a.pt", "no such file or folder"),
    ):
        with pytest.raises(UnreadableCheckpoint, match=message):
            open_checkpoint(path)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(UnreadableCheckpoint, match=r"cannot be read \(Permission denied"):
        open_checkpoint(tmp_path)
