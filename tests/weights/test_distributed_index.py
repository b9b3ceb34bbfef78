import os
import pickle

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.distributed_index import DistributedIndex
from tests.helpers.distributed import grid, save, write_shards
from tests.helpers.weights import assert_same
from tests.weights.test_inert_pickle import Calls, attacks

WEIGHT = torch.arange(24.0).view(4, 6)


def folder(path, change=None):
    return write_shards(path, {"model.w": (WEIGHT, grid((4, 6), [[1], [2]]))}, change=change)


def entry(index):
    return index.state_dict_metadata["model.w"]


def chunk(start, shape):
    return ChunkStorageMetadata(torch.Size(start), torch.Size(shape))


def places(index):
    return list(index.storage_data.values())


def setting(attribute, value):
    return lambda index: setattr(index, attribute, value)


def test_what_it_says(tmp_path):
    index = DistributedIndex(folder(tmp_path / "a") / ".metadata")
    assert index.names == ["model.w"]
    assert index.keys["model.w"] == ("model", "w")
    spec, shards = index.tensor("model.w")
    assert str(spec) == "float32 [4, 6]"
    assert [(s.start, s.shape, s.file_name) for s in shards] == [
        ((0, 0), (1, 2), "__0_0.distcp"),
        ((0, 2), (1, 4), "__1_0.distcp"),
        ((1, 0), (3, 2), "__0_0.distcp"),
        ((1, 2), (3, 4), "__1_0.distcp"),
    ]


DAMAGES = {
    "no data": (lambda i: i.storage_data.pop(next(iter(i.storage_data))), "in which bytes of which file"),
    "not covered": (lambda i: entry(i).chunks.pop(), "shards for 12 of its 24 elements"),
    "no shards": (lambda i: entry(i).chunks.clear(), "shards for 0 of its 24 elements"),
    "overlap": (
        lambda i: entry(i).chunks.append(chunk([0, 0], [1, 2])),
        r"shards at \[0, 0\] and \[0, 0\] that overlap",
    ),
    "outside": (
        lambda i: setattr(entry(i), "size", torch.Size([4, 5])),
        r"of \[1, 4\] at \[0, 2\], which lies outside",
    ),
    "too few dimensions": (lambda i: setattr(entry(i), "size", torch.Size([24])), "a shard without a place"),
    "larger": (lambda i: setattr(entry(i), "size", torch.Size([4, 7])), "shards for 24 of its 28 elements"),
    "impossible": (lambda i: setattr(entry(i), "size", torch.Size([1 << 40, 6])), "impossibly large"),
    "negative": (lambda i: setattr(entry(i), "size", (-4, -6)), "no element type or shape"),
    "no type": (lambda i: setattr(entry(i), "properties", None), "no element type or shape"),
    "not a list": (lambda i: setattr(entry(i), "chunks", {}), "lists of shards are wrong"),
    "a foreign shard": (lambda i: entry(i).chunks.append(3), "a shard without a place"),
    "negative offset": (lambda i: setattr(places(i)[0], "offset", -5), "in which bytes of which file"),
    "no path": (lambda i: setattr(places(i)[0], "relative_path", 3), "in which bytes of which file"),
    "path": (lambda i: setattr(places(i)[0], "relative_path", "../secret"), r"'\.\./secret' is missing"),
    "absolute": (lambda i: setattr(places(i)[0], "relative_path", "/etc/passwd"), "'/etc/passwd' is missing"),
    "beyond": (lambda i: setattr(places(i)[0], "offset", 1 << 40), "truncated"),
    "zstd": (lambda i: setattr(places(i)[0], "transform_descriptors", ["zstd"]), "compressed or encrypted"),
    "no tensors": (lambda i: i.state_dict_metadata.pop("model.w"), "without tensors"),
    "no entries": (setting("state_dict_metadata", None), "a .*Metadata without state_dict_metadata"),
    "no places": (setting("storage_data", [3]), "a .*Metadata without storage_data"),
    "names": (lambda i: i.state_dict_metadata.update({3: entry(i)}), "a name in it is not a string"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path, name):
    change, message = DAMAGES[name]
    with pytest.raises(UnreadableCheckpoint, match=message) as caught:
        open_checkpoint(folder(tmp_path / "a", change))
    assert str(tmp_path / "a") in str(caught.value)
    assert "ave" in str(caught.value).rsplit(". ", 1)[-1]  # what to do: save it again


def test_keys_that_are_missing_or_strange(tmp_path):
    for keys in (None, {}, {"model.w": ("model", "w", 3)}, {"other": 3}):
        opened = open_checkpoint(folder(tmp_path / "a", setting("planner_data", keys)))
        assert torch.equal(next(iter(opened.values())), WEIGHT)
    assert list(open_checkpoint(folder(tmp_path / "a", setting("planner_data", None)))) == ["w"]


def test_an_older_torch_pickled_properties_of_another_module(tmp_path):
    def change(index):
        entry(index).properties = OldProperties(dtype=torch.float32)
        index.state_dict_metadata["model.h"] = index.state_dict_metadata.pop("model.w")
        index.storage_data = {type(k)("model.h", k.offset, k.index): v for k, v in index.storage_data.items()}
        index.planner_data = {"model.h": ("model", "h")}

    path = folder(tmp_path / "a", change)
    assert b"_shard.sharded_tensor" in (path / ".metadata").read_bytes()
    assert_same(open_checkpoint(path), {"h": WEIGHT})


@pytest.mark.parametrize("attack", attacks("mark"))
def test_nothing_in_it_is_run(tmp_path, attack):
    mark = tmp_path / "mark"
    path = save({"model": {"w": WEIGHT}}, tmp_path / "a")
    (path / ".metadata").write_bytes(b"\x80\x04" + attacks(mark)[attack] + b".")
    with pytest.raises(UnreadableCheckpoint, match=r"\.metadata: .*Copy the whole folder again"):
        open_checkpoint(path)
    assert not mark.exists()


def test_an_attack_among_true_entries_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    evil = Calls(os.system, f"touch {mark}")
    path = folder(tmp_path / "a", lambda i: i.__dict__.update(storage_meta=evil, version=[evil]))
    assert_same(open_checkpoint(path), {"w": WEIGHT})
    path = folder(tmp_path / "b", lambda i: setattr(entry(i), "properties", evil))
    with pytest.raises(UnreadableCheckpoint, match="no element type"):
        open_checkpoint(path)
    path = folder(tmp_path / "c", lambda i: setattr(entry(i), "size", evil))
    with pytest.raises(UnreadableCheckpoint, match="no element type or shape"):
        open_checkpoint(path)
    assert not mark.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists()


def test_one_list_of_shards_for_very_many_tensors_is_refused_at_once(tmp_path):
    def change(index):
        entry(index).chunks *= 20_000
        index.state_dict_metadata |= {f"model.{i}": entry(index) for i in range(2_000)}

    with pytest.raises(UnreadableCheckpoint, match="lists of shards are wrong"):
        open_checkpoint(folder(tmp_path / "a", change))


def test_thousands_of_shards_are_checked_quickly(tmp_path):
    tensor = torch.zeros(2000, 2)
    cuts = [list(range(1, 2000)), []]
    path = write_shards(tmp_path / "a", {"model.w": (tensor, grid(tensor.shape, cuts))})
    assert_same(open_checkpoint(path), {"w": tensor})
