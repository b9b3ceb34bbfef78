import json
import struct

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from lightning_soup.errors import UnreadableCheckpoint, UnwritableOutput
from lightning_soup.weights import open_checkpoint, save_weights
from tests.helpers.weights import assert_same, every_layout, every_type

TENSORS = {name: tensor for name, tensor in every_type().items() if tensor.dtype != torch.complex128}

DATA = struct.pack("<4f", 1, 2, 3, 4)


def file_of(path, header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_files_of_the_safetensors_package_are_read(tmp_path):
    tensors = TENSORS
    save_file(tensors, tmp_path / "a.safetensors", metadata={"author": "me"})
    opened = open_checkpoint(tmp_path / "a.safetensors")
    assert_same(dict(opened), tensors)
    assert opened.format == "safetensors"
    assert opened.metadata["author"] == "me"
    assert {name: spec.shape for name, spec in opened.specs.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


def test_the_safetensors_package_reads_our_files(tmp_path):
    tensors = TENSORS | every_layout()
    save_weights(tensors, tmp_path / "a.safetensors")
    assert_same(load_file(tmp_path / "a.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which transformers demands


def test_data_is_aligned_and_bytes_do_not_depend_on_the_order_of_names(tmp_path):
    tensors = TENSORS
    save_weights(tensors, tmp_path / "a.safetensors")
    save_weights(dict(reversed(tensors.items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for stored in open_checkpoint(tmp_path / "a.safetensors").tensors.values():
        assert stored.offset % stored.spec.dtype.itemsize == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def test_tied_tensors_are_written_once_and_read_under_all_names(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_weights(Tied(), ours)
    save_model(Tied(), str(theirs))
    for path in (ours, theirs):
        with safetensors.safe_open(path, "pt") as file:
            assert len(file.keys()) == 1
        opened = open_checkpoint(path)
        assert sorted(opened) == ["embedding.weight", "output.weight"]
        assert opened.ties == (("embedding.weight", "output.weight"),) or opened.ties == (
            ("output.weight", "embedding.weight"),
        )
        assert opened.num_parameters == 15


def test_load_model_of_the_safetensors_package_takes_our_tied_file(tmp_path):
    saved, loaded = Tied(), Tied()
    save_weights(saved, tmp_path / "tied.safetensors")
    load_model(loaded, str(tmp_path / "tied.safetensors"))
    assert torch.equal(loaded.output.weight, saved.output.weight)


def test_an_empty_header_list_or_scalar_file(tmp_path):
    save_file({"scalar": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path / "a.safetensors")["scalar"].item() == 3.0
    with pytest.raises(UnreadableCheckpoint, match="holds no tensors"):
        open_checkpoint(file_of(tmp_path / "b.safetensors", {}, b""))


LIES = {
    "longer than the file": ({"w": entry()}, DATA, 10**7, "truncated"),
    "too long to be true": ({"w": entry()}, DATA, 1 << 62, "not a checkpoint"),
    "data missing": ({"w": entry()}, DATA[:-1], None, "truncated"),
    "data left over": ({"w": entry()}, DATA + b"x", None, "the tensors end at byte"),
    "more shape than bytes": ({"w": entry(shape=(5,))}, DATA, None, "does not describe the data"),
    "less shape than bytes": ({"w": entry(shape=(3,))}, DATA, None, "does not describe the data"),
    "end before begin": ({"w": entry(offsets=(16, 0))}, DATA, None, "does not describe the data"),
    "negative offset": ({"w": entry(offsets=(-16, 0))}, DATA, None, "damaged"),
    "negative shape": ({"w": entry(shape=(-2, -2))}, DATA, None, "damaged"),
    "offset beyond the file": ({"w": entry(offsets=(1600, 1616))}, DATA, None, "truncated"),
    "huge offset": ({"w": entry(offsets=(1 << 63, (1 << 63) + 16))}, DATA, None, "damaged"),
    "huge shape": ({"w": entry(shape=(1 << 40, 1 << 40, 0), offsets=(0, 0))}, b"", None, "damaged"),
    "hole": ({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(8, 16))}, DATA, None, "hole"),
    "overlap": ({"a": entry(), "b": entry(shape=(2,), offsets=(8, 16))}, DATA, None, "overlapping"),
    "unknown type": ({"w": entry(dtype="F4")}, DATA, None, "element type 'F4'"),
    "type is a list": ({"w": entry(dtype=["F32"])}, DATA, None, "damaged"),
    "float in shape": ({"w": entry(shape=(4.0,))}, DATA, None, "damaged"),
    "string in offsets": ({"w": entry(offsets=("0", "16"))}, DATA, None, "damaged"),
    "bool in shape": ({"w": entry(shape=(True, 4))}, DATA, None, "damaged"),
    "three offsets": ({"w": entry(offsets=(0, 8, 16))}, DATA, None, "damaged"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [4]}}, DATA, None, "damaged"),
    "entry is a number": ({"w": 3}, DATA, None, "damaged"),
    "metadata is a list": ({"__metadata__": [1], "w": entry()}, DATA, None, "damaged"),
    "not JSON": (b"{" + b"x" * 60, DATA, None, "damaged"),
    "deeply nested": (b'{"a":' * 50_000, DATA, None, "damaged"),
    "infinite number": (b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}', DATA, None, "damaged"),
    "a long number": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 9999 + b"]}}", DATA, None, "damaged"),
    "invalid UTF-8": (b'{"\xff\xfe":3}', DATA, None, "damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
    header, data, length, message = LIES[lie]
    path = file_of(tmp_path / "lie.safetensors", header, data, length)
    with pytest.raises(UnreadableCheckpoint, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_metadata_that_names_no_tensor_is_not_a_tie(tmp_path):
    save_file({"pt": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"other": "v", "format": "pt", "pt": "pt"})
    assert sorted(open_checkpoint(tmp_path / "a.safetensors")) == ["pt"]


def test_a_type_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(UnwritableOutput, match=r"complex128.*\.pt"):
        save_weights({"w": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.bool]), st.lists(st.integers(0, 4))),
        min_size=1,
        max_size=6,
    )
)
def test_any_names_and_shapes_survive(tmp_path_factory, shapes):
    tensors = {name: torch.ones(shape[:5], dtype=dtype) for name, (dtype, shape) in shapes.items()}
    folder = tmp_path_factory.mktemp("any")
    save_weights(tensors, folder / "a.safetensors")
    assert_same(load_file(folder / "a.safetensors"), dict(open_checkpoint(folder / "a.safetensors")))
    save_file(tensors, folder / "b.safetensors")
    assert_same(dict(open_checkpoint(folder / "b.safetensors")), dict(open_checkpoint(tensors)))
