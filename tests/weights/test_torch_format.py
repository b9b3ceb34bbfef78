import io
import struct
import zipfile

import pytest
import torch
from torch import nn

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.weights import assert_same, every_layout, every_type, with_pickle

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@LAYOUTS
def test_every_type_is_read(tmp_path, zipped):
    tensors = every_type()
    opened = open_checkpoint(saved(tensors, tmp_path / "a.pt", zipped))
    assert opened.format == "torch"
    assert_same(dict(opened), tensors)


@LAYOUTS
def test_every_layout_is_read_mapped_and_in_chunks(tmp_path, zipped):
    tensors = every_layout()
    opened = open_checkpoint(saved(tensors, tmp_path / "a.pt", zipped))
    assert_same(dict(opened), tensors)
    assert_same(combine([opened], [1.0]), tensors)
    assert_same(combine([opened, tensors], [0.5, 0.5]), tensors)


@LAYOUTS
def test_parameters_buffers_and_tensors_with_attributes(tmp_path, zipped):
    parameter = nn.Parameter(torch.randn(3, 2))
    marked = torch.randn(4)
    marked.note = "kept by torch.save"
    tensors = {"parameter": parameter, "marked": marked, "buffer": nn.Buffer(torch.randn(2)), "frozen": torch.ones(2)}
    opened = open_checkpoint(saved(tensors, tmp_path / "a.pt", zipped))
    assert_same(dict(opened), tensors)
    assert not any(tensor.requires_grad for tensor in opened.values())


@LAYOUTS
def test_ties_are_seen(tmp_path, zipped):
    weight = torch.randn(3, 2)
    content = {"a": weight, "b": weight, "c": weight.clone(), "t": weight.t()}
    assert open_checkpoint(saved(content, tmp_path / "a.pt", zipped)).ties == (("a", "b"),)


@LAYOUTS
def test_a_file_of_gigabytes_would_not_be_read(tmp_path, zipped, monkeypatch):
    path = saved({"w": torch.zeros(1 << 20)}, tmp_path / "a.pt", zipped)
    read = []
    original = __import__("os").preadv
    monkeypatch.setattr("os.preadv", lambda fd, buffers, at: read.append(len(buffers[0])) or original(fd, buffers, at))
    assert open_checkpoint(path).specs["w"].numel == 1 << 20
    assert sum(read) < 1000


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    content = {"state_dict": {"w": torch.ones(3)}, "note": "x" * 300, "list": [1, 2], "set": {1}, "bytes": b"\x00\xff"}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    opened = open_checkpoint(tmp_path / "a.pt")
    assert opened["w"].tolist() == [1, 1, 1]
    assert opened.metadata == {"note": "x" * 300, "list": [1, 2], "bytes": b"\x00\xff"}
    assert opened.dropped == ("set",)


def test_torch_script_archives_open_as_tensors(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2)))
    torch.jit.script(module).save(str(tmp_path / "a.pt"))
    opened = open_checkpoint(tmp_path / "a.pt")
    assert opened.format == "torchscript"
    assert_same(dict(opened), module.state_dict())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("what", ["sparse", "quantised", "conjugate", "negated", "numpy"])
def test_what_is_not_a_plain_tensor_is_refused_by_name(tmp_path, what):
    values = torch.randn(3, 3, dtype=torch.complex64)
    odd = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        "conjugate": lambda: values.conj(),
        "negated": lambda: torch._neg_view(values.real),
        "numpy": lambda: torch.ones(3).numpy(),
    }[what]
    path = saved({"odd.weight": odd(), "w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(UnreadableCheckpoint, match=r"odd\.weight"):
        open_checkpoint(path)


def test_extra_state_beside_tensors_is_left_out(tmp_path):
    content = {"w": torch.ones(2), "layer._extra_state": io.BytesIO(b"x"), "scale": 0.5}
    opened = open_checkpoint(saved(content, tmp_path / "a.pt"))
    assert sorted(opened) == ["w"]
    assert opened.dropped == ("layer._extra_state", "scale")


@LAYOUTS
def test_truncated_at_any_byte(tmp_path, zipped):
    path = saved(
        {"state_dict": {"a": torch.randn(20), "b": torch.randn(3, 3)}, "epoch": 3}, tmp_path / "a.ckpt", zipped
    )
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(UnreadableCheckpoint, match=str(path)):
            open_checkpoint(path)


def test_a_file_from_a_big_endian_machine_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    saved({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(UnreadableCheckpoint, match="big-endian"):
        open_checkpoint(path)
    legacy = saved({"w": torch.ones(3)}, tmp_path / "b.pt", zipped=False)
    data = legacy.read_bytes()
    at = data.index(b"little_endian")
    legacy.write_bytes(data[:at] + data[at:].replace(b"\x88", b"\x89", 1))  # True becomes False
    with pytest.raises(UnreadableCheckpoint, match="big-endian"):
        open_checkpoint(legacy)


def test_a_compressed_archive_is_refused(tmp_path):
    path = saved({"w": torch.zeros(3000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for squeezed in ("data/0", "data.pkl"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                method = zipfile.ZIP_DEFLATED if name.endswith(squeezed) else zipfile.ZIP_STORED
                archive.writestr(name, data, method)
        with pytest.raises(UnreadableCheckpoint, match=r"(storage '0' is|a) compressed or damaged"):
            open_checkpoint(path)


def test_a_local_header_that_lies(tmp_path):
    path = saved({"w": torch.arange(9.0)}, tmp_path / "a.pt")
    whole = path.read_bytes()
    at = whole.index(b"a/data/0") - 30
    for damage in (b"XXXX", whole[at : at + 26] + b"\xff\xff", whole[at : at + 28] + b"\xff\xff"):
        path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        with pytest.raises(UnreadableCheckpoint, match="storage '0' is damaged"):
            open_checkpoint(path)


def test_zip64_archives_are_read(tmp_path):
    path = tmp_path / "a.pt"
    saved({"w": torch.arange(5.0)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                entry.write(data)
    assert open_checkpoint(path)["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("weights/model.safetensors", b"x")
    with pytest.raises(UnreadableCheckpoint, match=r"no data\.pkl.*model\.safetensors"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_missing_storage_is_named(tmp_path):
    path = saved({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if not name.endswith("data/1"):
                archive.writestr(name, data)
    with pytest.raises(UnreadableCheckpoint, match="storage '1' is missing"):
        open_checkpoint(path)


def tensor_pickle(offset=0, shape=(3,), stride=(1,), count=3, dtype="FloatStorage"):
    """The pickle of {"w": tensor} with what a damaged file may say of the tensor."""

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n" + dtype.encode() + b"\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number(count)
    arguments = b"(" + storage + b"tQ" + number(offset) + numbers(shape) + numbers(stride) + b"\x89}t"
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_the_hand_made_pickle_is_a_true_one(tmp_path):
    assert open_checkpoint(with_pickle(tmp_path / "a.pt", tensor_pickle()))["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (4,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"stride": (1 << 62,)},
        {"shape": (-3,)},
        {"shape": (3, 1)},
        {"shape": (1 << 40,), "stride": (0,)},
        {"shape": (1 << 62, 1 << 62, 0), "stride": (1, 1, 1)},
        {"shape": (1,) * 65, "stride": (1,) * 65},
        {"dtype": "DoubleStorage"},
        {"dtype": "NoStorage"},
    ],
    ids=str,
)
def test_tensors_that_lie_are_refused(tmp_path, lie):
    with pytest.raises(UnreadableCheckpoint):
        open_checkpoint(with_pickle(tmp_path / "a.pt", tensor_pickle(**lie)))


def test_an_old_file_whose_storages_lie(tmp_path):
    path = saved({"w": torch.ones(5)}, tmp_path / "a.pt", zipped=False)
    data = path.read_bytes()
    for count in (4, 6, -1, 1 << 62):
        path.write_bytes(data[:-28] + struct.pack("<q", count) + data[-20:])
        with pytest.raises(UnreadableCheckpoint):
            open_checkpoint(path)
    path.write_bytes(data[:-28] + struct.pack("<q", 5) + data[-20:])
    assert open_checkpoint(path)["w"].tolist() == [1] * 5
