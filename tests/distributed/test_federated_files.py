"""The file of a federated training: a full disk, and tensors that the format lacks."""

import os

import pytest
import torch
from safetensors import SafetensorError

from lightning_soup.distributed import FedAU, federated_files
from lightning_soup.distributed.federated_files import FederatedState, read_state, write_state
from lightning_soup.errors import UnsupportedSetup, UnwritableOutput

STATE = FederatedState(1, {"w": torch.ones(3)})


def test_a_full_disk_leaves_the_state_that_was_there(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_state(tmp_path, STATE, FedAU(2), {})
    monkeypatch.setattr(federated_files, "save_file", full)
    with pytest.raises(UnwritableOutput, match=r"federated\.safetensors: cannot be written .*No space left"):
        write_state(tmp_path, FederatedState(2, {"w": torch.zeros(3)}), FedAU(2), {})
    assert os.listdir(tmp_path) == ["federated.safetensors"]
    found = read_state(tmp_path, FedAU(2), {})
    assert found.round == 1
    assert found.weights["w"].tolist() == [1, 1, 1]


def test_types_that_the_format_lacks_are_named(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"cannot hold tensors of torch\.complex128"):
        write_state(tmp_path, FederatedState(1, {"w": torch.ones(1, dtype=torch.complex128)}), FedAU(1), {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.bool, torch.uint8])
def test_types_layouts_and_views_come_back(tmp_path, dtype):
    base = torch.arange(24).reshape(1, 2, 3, 4).to(dtype)
    given = {
        "a": base.contiguous(memory_format=torch.channels_last),
        "b": base[..., 1:3],
        "tied": base,
        "to this one": base,
        "empty": base[:0],
        "transposed": base.transpose(1, 2),
    }
    write_state(tmp_path, FederatedState(3, given), FedAU(1), {})
    found = read_state(tmp_path, FedAU(1), {}).weights
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in given.items())
    assert found.keys() == given.keys()
