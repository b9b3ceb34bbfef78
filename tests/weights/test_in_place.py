import copy

import pytest
import torch
from torch import nn

from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights, UnsupportedSetup
from lightning_soup.weights import combine, open_checkpoint, save_weights
from tests.helpers.weights import assert_same, bits, every_layout


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.output = nn.Linear(4, 6, bias=False)
        if tied:
            self.output.weight = self.embedding.weight


def nets(count, tied=False):
    torch.manual_seed(1)
    return [Net(tied) for _ in range(count)]


def snapshot(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_a_module_is_written_in_place():
    a, b, target = nets(3)
    expected = combine([a, b], [0.25, 0.75])
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in target.named_parameters()}
    returned = combine([a, b], [0.25, 0.75], target)
    assert_same(target.state_dict(), expected)
    assert_same(returned, expected)
    for name, parameter in target.named_parameters():
        assert parameter is parameters[name][0]
        assert parameter.data_ptr() == parameters[name][1]
        assert parameter.requires_grad
    assert target.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_mapping_of_any_layout_is_written_in_place():
    a, target = every_layout(), every_layout()
    for tensors in (a, target):
        tensors["expanded"] = tensors["expanded"].clone()
        tensors["view.front"] = tensors["view.front"].clone()  # it shares memory with view.back
        tensors["view.back"] = tensors["view.back"].clone()
        tensors["column"] = tensors["column"].clone()
    for tensor in target.values():
        tensor.fill_(7)
    around = target["block"]._base.clone()
    combine([a, a], [0.5, 0.25], target)
    assert_same(target, combine([a, a], [0.5, 0.25]))
    changed = target["block"]._base != around
    assert changed.sum() == target["block"].numel()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_module_may_be_one_of_those_that_are_added(tied, threads):
    a, b = nets(2, tied)
    a.output.weight.data = a.output.weight.data.t().contiguous().t()  # not row-major
    expected = combine([copy.deepcopy(a), b], [0.5, -2.0])
    combine([a, b], [0.5, -2.0], a, threads=threads)
    assert_same(a.state_dict(), expected)


def test_the_type_of_the_target_decides():
    half = [{"w": torch.tensor([0.1, 60000.0]).half()} for _ in range(2)]
    target = {"w": torch.zeros(2)}
    combine(half, [1.0, 1.0], target)
    assert target["w"].tolist() == [2 * half[0]["w"][0].item(), 120000.0]  # would overflow float16
    wide = [{"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}]
    combine(wide, [1.0], target)
    assert target["w"].tolist() == [1, 2]
    with pytest.raises(NonFiniteWeights, match=r"overflows torch\.float32"):
        combine([{"w": torch.tensor([1e300, 0], dtype=torch.float64)}], [1.0], target)
    counter = {"n": torch.tensor(0, dtype=torch.int32)}
    combine([{"n": torch.tensor(5)}], [1.0], counter)
    assert counter["n"].item() == 5


# ---------------------------------------------------------------------------------------------------------------- ties


def test_tied_ingredients_into_a_tied_and_an_untied_module():
    a, b = nets(2, tied=True)
    expected = combine([a, b], [0.5, 0.5])
    tied, untied = Net(tied=True), Net()
    for target in (tied, untied):
        combine([a, b], [0.5, 0.5], target)
        assert_same(target.state_dict(), expected)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight is not untied.embedding.weight


def test_equal_but_untied_ingredients_into_a_tied_module():
    """As files of writers that do not know ties: both names, the same values."""
    a, b = nets(2, tied=True)
    copies = [snapshot(net) for net in (a, b)]
    target = Net(tied=True)
    combine(copies, [0.5, 0.5], target)
    assert_same(target.state_dict(), combine([a, b], [0.5, 0.5]))


def test_a_tied_module_that_is_added_to_an_untied_file_is_not_changed_twice():
    a, b = nets(2, tied=True)
    expected = combine([snapshot(a), snapshot(b)], [0.5, 3.0])
    combine([a, snapshot(b)], [0.5, 3.0], a)
    assert_same(a.state_dict(), expected)


def test_different_values_for_one_tied_tensor_are_refused_and_nothing_of_it_is_written():
    a, b = nets(2)
    target = Net(tied=True)
    before = snapshot(target)
    with pytest.raises(IncompatibleIngredients, match="are one tensor, but the ingredients hold two"):
        combine([a, b], [0.5, 0.5], target)
    assert_same(target.state_dict(), before)


def test_views_of_one_buffer_that_are_read_across_each_other():
    flat = torch.arange(10.0)
    target, crossed = {"a": flat[:5], "b": flat[5:]}, {"a": flat[5:], "b": flat[:5]}
    combine([crossed], [2.0], target)
    assert flat.tolist() == [10, 12, 14, 16, 18, 0, 2, 4, 6, 8]


def test_a_matrix_and_its_own_transpose():
    matrix = torch.randn(600, 600)
    expected = matrix + matrix.t()
    combine([{"w": matrix}, {"w": matrix.t()}], [1.0, 1.0], {"w": matrix})
    assert torch.equal(matrix, expected)


# ----------------------------------------------------------------------------------------------- modules of all kinds


def test_a_module_with_a_compiled_part():
    a, b = nets(2)
    expected = combine([a, b], [0.5, 0.5])
    target = Net()
    target.output = torch.compile(target.output, backend="eager")
    combine([a, b], [0.5, 0.5], target)
    assert bits(target.output.weight) == bits(expected["output.weight"])
    whole = torch.compile(Net(), backend="eager")
    combine([a, b], [0.5, 0.5], whole)
    assert_same(whole._orig_mod.state_dict(), expected)


def test_tensors_made_in_inference_mode_and_results_usable_for_training():
    a, b = nets(2)
    with torch.inference_mode():
        target = Net()
        found = combine([a, b], [0.5, 0.5])
    combine([a, b], [0.5, 0.5], target)
    assert_same(target.state_dict(), found)
    normal = Net()
    with torch.inference_mode():
        combine([a, b], [0.5, 0.5], normal, threads=2)
    assert_same(normal.state_dict(), found)
    nn.Parameter(found["output.weight"]).square().sum().backward()
    normal.output(torch.ones(1, 4)).sum().backward()


def test_autograd_notices_that_weights_changed_under_it():
    a, b = nets(2)
    x = torch.ones(1, 4, requires_grad=True)
    loss = a.output(x).square().sum()
    combine([a, b], [0.5, 0.5], a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_written_in_place(tmp_path):
    save_weights({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    model = {"w": torch.ones(2)}
    with pytest.raises(UnsupportedSetup, match="opened for reading"):
        combine([model], [1.0], open_checkpoint(tmp_path / "a.safetensors"))
    with pytest.raises(UnsupportedSetup, match="expanded view"):
        combine([model], [1.0], {"w": torch.ones(1).expand(2)})

    class Copies(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}

    with pytest.raises(UnsupportedSetup, match="gives a copy of 'weight'"):
        combine([nn.Linear(2, 2)], [1.0], Copies(2, 2))
    with pytest.raises(IncompatibleIngredients, match="weight"):
        combine([nn.Linear(2, 3)], [1.0], nn.Linear(2, 4))


def test_an_opened_module_can_be_the_target():
    a, b, target = nets(3)
    combine([a, b], [0.5, 0.5], open_checkpoint(target))
    assert_same(target.state_dict(), combine([a, b], [0.5, 0.5]))
