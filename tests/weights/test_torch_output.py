import io
import pickletools
import zipfile

import pytest
import torch

from lightning_soup.weights import open_checkpoint, save_weights
from lightning_soup.weights.stored_tensor import TensorSpec
from lightning_soup.weights.torch_output import SavedTensor, torch_layout
from tests.helpers.weights import assert_same, every_layout, every_type

TENSORS = every_type() | every_layout()


def test_the_pickle_is_torch_s_own(tmp_path):
    weights = {name: tensor.clone().contiguous() for name, tensor in every_type().items() if tensor.numel()}
    buffer = io.BytesIO()
    torch.save({"state_dict": weights}, buffer)
    torch.save({"state_dict": weights}, tmp_path / "like.pt")
    save_weights(weights, tmp_path / "a.pt", like=tmp_path / "like.pt")

    def operations(source):
        with zipfile.ZipFile(source) as archive:
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        skipped = {"BINPUT", "BINGET", "MEMOIZE"}  # the same objects may be remembered under other numbers
        return [(op.name, argument) for op, argument, _ in pickletools.genops(pickled) if op.name not in skipped]

    ours = [item for item in operations(tmp_path / "a.pt") if item[1] != "collections OrderedDict"]
    theirs = [item for item in operations(buffer) if item[1] != "collections OrderedDict"]
    assert {repr(item) for item in theirs} <= {repr(item) for item in ours}


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_it_safely_whole_and_mapped(tmp_path, mapped):
    save_weights(TENSORS, tmp_path / "a.pt")
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped), TENSORS)


def test_the_archive_is_sound(tmp_path):
    save_weights(TENSORS | {"large": torch.randn(700_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None  # compares all checksums
        assert archive.read("archive/byteorder") == b"little"
    for tensor in open_checkpoint(tmp_path / "a.pt").tensors.values():
        assert tensor.offset % 64 == 0


def write_rest(path, layout, tensors):
    with open(path, "wb") as file:
        for position, data in layout.rest(dict.fromkeys((tensor.name for tensor in tensors), 0)):
            file.seek(position)
            file.write(data)


def test_more_tensors_than_a_plain_archive_can_count(tmp_path):
    tensors = [SavedTensor(f"w{i}", str(i), TensorSpec(torch.float32, (0,))) for i in range(70_000)]
    write_rest(tmp_path / "a.pt", torch_layout({"none": 1}, tensors), tensors)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert len(archive.namelist()) == 70_003
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"none": 1}


def test_files_beyond_four_gigabytes(tmp_path):
    """Written with holes instead of zeros, so that it takes no space."""
    spec = TensorSpec(torch.float32, (1100, 1 << 20))
    tensors = [SavedTensor("big", "0", spec), SavedTensor("late", "1", TensorSpec(torch.float32, (2,)))]
    layout = torch_layout({tensor.name: tensor for tensor in tensors}, tensors)
    path = tmp_path / "a.pt"
    write_rest(path, layout, tensors)
    with open(path, "r+b") as file:
        file.seek(layout.offsets["late"])
        file.write(b"\0\0\x80?" * 2)
    assert path.stat().st_size == layout.size > 1 << 32
    assert torch.load(path, weights_only=True, mmap=True)["late"].tolist() == [1, 1]
    opened = open_checkpoint(path)
    assert opened["late"].tolist() == [1, 1]
    assert opened.specs["big"] == spec
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == spec.nbytes
