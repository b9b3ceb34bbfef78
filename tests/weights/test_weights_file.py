import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import WeightsFile, open_checkpoint, save_weights
from lightning_soup.weights.weights_file import PROVENANCE_KEY, clean_names
from tests.helpers.weights import assert_same, bits, every_layout, every_type


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)


def test_a_module_a_mapping_and_a_file_open_alike(tmp_path):
    net = Net()
    save_weights(net, tmp_path / "net.safetensors")
    opened = [open_checkpoint(source) for source in (net, net.state_dict(), tmp_path / "net.safetensors")]
    for weights in opened:
        assert_same(dict(weights), net.state_dict())
        assert weights.digest() == opened[0].digest()
        assert weights.num_parameters == 4 * 3 + 3 + 4 * 3 + 3 * 2 + 2
    assert [weights.label for weights in opened] == ["Net", "weights in memory (9 tensors)", "net.safetensors"]
    assert [weights.format for weights in opened] == ["memory", "memory", "safetensors"]
    assert opened[2].path == tmp_path / "net.safetensors"
    assert open_checkpoint(opened[2]) is opened[2]
    assert repr(opened[2]) == f"WeightsFile('{tmp_path}/net.safetensors', safetensors, 9 tensors)"


def test_it_is_a_read_only_mapping(tmp_path):
    weights = open_checkpoint({"a": torch.ones(2), "b": torch.zeros(1)})
    assert list(weights) == ["a", "b"]
    assert len(weights) == 2
    assert "a" in weights
    with pytest.raises(KeyError):
        weights["c"]
    with pytest.raises(TypeError):
        weights["a"] = torch.ones(2)


# ------------------------------------------------------------------------------------------------------------ prefixes


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("w", "w"),
        ("module.w", "w"),
        ("_orig_mod.w", "w"),
        ("module._orig_mod.w", "w"),
        ("_orig_mod.module.w", "w"),
        ("module.module.w", "w"),
        ("net._orig_mod.layer.w", "net.layer.w"),
        ("net.module.w", "net.module.w"),
    ],
)
def test_wrapper_prefixes_are_removed_and_remembered(name, short):
    weights = open_checkpoint({name: torch.ones(1)})
    assert list(weights) == [short]
    assert weights.original_names == {short: name}


def test_module_stays_where_it_is_not_a_wrapper():
    names = ["module.w", "other.w"]
    assert clean_names(names, "x") == {name: name for name in names}


def test_a_prefix_on_some_names_only_may_not_hide_a_tensor():
    with pytest.raises(UnreadableCheckpoint, match="with and without a wrapper prefix"):
        open_checkpoint({"w": torch.ones(1), "_orig_mod.w": torch.ones(1)})


@pytest.mark.slow
def test_compiled_modules_have_the_names_of_plain_ones():
    net = Net()
    names = list(net.state_dict())
    assert list(open_checkpoint(torch.compile(net, backend="eager"))) == names
    net.head = torch.compile(net.head, backend="eager")
    assert list(open_checkpoint(net)) == names


# ---------------------------------------------------------------------------------------------------------------- ties


def test_ties_in_memory_and_number_of_parameters():
    net = Net()
    net.head2 = net.head
    weights = open_checkpoint(net)
    assert weights.ties == (("head.weight", "head2.weight"), ("head.bias", "head2.bias"))
    assert weights.num_parameters == open_checkpoint(Net()).num_parameters


# -------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_does_not_depend_on_format_layout_or_order(tmp_path):
    tensors = {n: t for n, t in (every_type() | every_layout()).items() if t.dtype != torch.complex128}
    expected = open_checkpoint(tensors).digest()
    assert expected.startswith("xxh3-128:")
    save_weights(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": dict(reversed(tensors.items())), "epoch": 3}, tmp_path / "c.ckpt")
    for name in ("a.safetensors", "a.pt", "b.pt", "c.ckpt"):
        assert open_checkpoint(tmp_path / name).digest() == expected
    assert open_checkpoint({name: tensor.clone() for name, tensor in tensors.items()}).digest() == expected


@given(st.data())
def test_the_digest_sees_any_byte_name_type_and_shape(data):
    tensors = {"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.int8), "c": torch.zeros((), dtype=torch.float16)}
    original = open_checkpoint(tensors).digest()
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = bytearray(bits(tensors[name]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    changed = torch.frombuffer(raw, dtype=tensors[name].dtype).view(tensors[name].shape)
    assert open_checkpoint(tensors | {name: changed}).digest() != original
    for other in (
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(3, 2, dtype=torch.int32)},
        {"d": torch.zeros(0)},
    ):
        assert open_checkpoint(tensors | other).digest() != original
    renamed = {{"a": "x"}.get(key, key): tensor for key, tensor in tensors.items()}
    assert open_checkpoint(renamed).digest() != original


def test_the_digest_of_a_large_tensor_covers_its_end():
    tensor = torch.zeros(600_000)
    before = open_checkpoint({"w": tensor}).digest()
    tensor[-1] = 1
    assert open_checkpoint({"w": tensor}).digest() != before


def test_weights_in_memory_are_hashed_anew():
    tensor = torch.zeros(3)
    weights = open_checkpoint({"w": tensor})
    before = weights.digest()
    tensor += 1
    assert weights.digest() != before


# --------------------------------------------------------------------------------------------- what cannot be opened


def test_wrong_sources_say_what_was_expected():
    for source, message in (
        ({}, "got an empty one"),
        ({"a": 3}, "'a' is a int; expected a mapping from names to tensors"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "'b' is a dict"),
        ({0: torch.ones(1)}, "0 is not a string"),
        ({"a": torch.ones(1, device="meta")}, "meta device"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        (nn.LazyLinear(3), "no shape yet"),
    ):
        with pytest.raises(UnreadableCheckpoint, match=message):
            open_checkpoint(source)
    with pytest.raises(TypeError):
        open_checkpoint(3)
    with pytest.raises(ValueError, match="expected 'average', 'raw', the name"):
        open_checkpoint({"a": torch.ones(1)}, which="")


def test_extra_state_of_modules_is_left_out():
    class Extra(Net):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    assert sorted(open_checkpoint(Extra())) == sorted(Net().state_dict())


# ---------------------------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin"])
def test_provenance_travels_in_every_format(tmp_path, suffix):
    record = {"recipe": "UniformSoup()", "coefficients": [0.5, 0.5], "scores": {"val_acc": 0.25}, "text": "ü\n"}
    path = save_weights({"w": torch.ones(2)}, tmp_path / f"soup{suffix}", provenance=record)
    opened = open_checkpoint(path)
    assert opened.provenance == record
    assert opened["w"].tolist() == [1, 1]
    assert open_checkpoint(save_weights({"w": torch.ones(2)}, path)).provenance is None


def test_damaged_provenance_is_told():
    tensors = open_checkpoint({"w": torch.ones(1)}).tensors
    for text in ("{", "[" * 100_000):
        with pytest.raises(UnreadableCheckpoint, match="provenance is damaged"):
            _ = WeightsFile(tensors, label="x", metadata={PROVENANCE_KEY: text}).provenance
    for value in (json.dumps([1]), 3):
        assert WeightsFile(tensors, label="x", metadata={PROVENANCE_KEY: value}).provenance is None


def test_opened_files_can_be_copied_and_sent_to_other_processes(tmp_path):
    path = save_weights(Net(), tmp_path / "net.ckpt")
    weights = open_checkpoint(path)
    dict(weights)
    for other in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert_same(other, weights)
        assert other.digest() == weights.digest()


def test_tensors_of_a_file_may_be_used_like_others(tmp_path):
    save_weights(Net(), tmp_path / "net.safetensors")
    weights = open_checkpoint(tmp_path / "net.safetensors")
    net = Net()
    net.load_state_dict(dict(weights))
    assert_same(net.state_dict(), weights)
    clone = copy.deepcopy(weights["body.weight"])
    assert clone.untyped_storage().nbytes() == clone.numel() * 4
    (weights["body.weight"] + 1).sum()
    parameter = nn.Parameter(weights["body.weight"].clone())
    (parameter * 2).sum().backward()
    assert parameter.grad is not None
