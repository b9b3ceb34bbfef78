import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers import convert_to_dense, use_experts
from lightning_soup.layers.conversion import dense_state, experts_of
from tests.helpers.transformer import Block, TinyTransformer


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], value) for name, value in expected.items())


# --------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_networks_are_left_alone():
    module = TinyTransformer()
    module.net[2].requires_grad_(False)
    assert use_experts(module, init="independent") == ["net.4.mlp"]
    assert isinstance(module.net[2].mlp, nn.Sequential)
    module = TinyTransformer().requires_grad_(False)
    with pytest.raises(UnsupportedSetup, match=r"all of these .* are frozen \(net\.2\.mlp, net\.4\.mlp\)"):
        use_experts(module)
    assert not experts_of(module)


def test_what_is_frozen_in_a_network_is_not_drawn_anew():
    module = TinyTransformer()
    module.net[1].mlp[0].requires_grad_(False)
    use_experts(module, layers=[0], init="independent")
    first, *others = module.net[1].mlp.experts
    assert all(torch.equal(other[0].weight, first[0].weight) for other in others)
    assert not any(torch.equal(other[2].weight, first[2].weight) for other in others)
    assert not any(expert[0].weight.requires_grad for expert in others)


def test_modes_are_kept():
    module = TinyTransformer()
    for number, block in enumerate(module.net[1:5]):
        block.mlp = nn.Sequential(*block.mlp, nn.Dropout(0.5))
        block.mlp.train(number < 2)
        block.mlp[3].eval()
    use_experts(module, layers="all")
    layers = list(experts_of(module).values())
    assert [layer.training for layer in layers] == [True, True, False, False]
    assert not any(expert[3].training for layer in layers for expert in layer.experts)
    convert_to_dense(module)
    assert [block.mlp.training for block in module.net[1:5]] == [True, True, False, False]
    assert not any(block.mlp[3].training for block in module.net[1:5])


# ---------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_of_a_network_see_all_tokens_and_come_back_to_it():
    block, seen = Block(), []
    block.mlp.register_forward_hook(lambda module, args, out: seen.append((type(module).__name__, tuple(out.shape))))
    handle = block.mlp.register_forward_hook(lambda module, args, kwargs, out: out * 0, with_kwargs=True)
    block.mlp.register_full_backward_hook(lambda module, inputs, outputs: seen.append(tuple(outputs[0].shape)))
    model = nn.ModuleList([block])
    x = torch.randn(2, 7, 8, requires_grad=True)
    use_experts(model, layers="all")
    assert not seen  # finding it has told nobody
    torch.testing.assert_close(block(x), x)
    block(x).sum().backward()
    torch.testing.assert_close(block.eval()(x), x)
    assert seen == [("RandomUniformMoE", (2, 7, 8))] * 2 + [(2, 7, 8), ("RandomUniformMoE", (2, 7, 8))]
    handle.remove()
    assert not torch.equal(block(x), x)
    convert_to_dense(model)
    seen.clear()
    block(x).sum().backward()
    assert seen == [("Sequential", (2, 7, 8)), (2, 7, 8)]


class Collector:
    """Keeps what it sees, tensors with a graph among it, which cannot be copied."""

    def __init__(self):
        self.seen = []

    def hook(self, module, args, out):
        self.seen.append(out)


def test_hooks_inside_a_network_are_called_for_every_expert_until_they_are_removed():
    block, collector = Block(), Collector()
    handle = block.mlp[0].register_forward_hook(collector.hook)
    block(torch.randn(2, 7, 8))
    use_experts(nn.ModuleList([block]), layers="all")
    collector.seen.clear()
    block(torch.randn(2, 7, 8))
    assert [len(out) for out in collector.seen] == [4, 4, 3, 3]
    handle.remove()
    block(torch.randn(2, 7, 8))
    assert len(collector.seen) == 4


def test_pruned_and_parametrized_networks():
    block = Block()
    prune.random_unstructured(block.mlp[0], "weight", amount=0.5)
    parametrizations.weight_norm(block.mlp[2])
    model, x = nn.ModuleList([block]), torch.randn(2, 7, 8)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, block(x)
    use_experts(model, layers="all")
    torch.testing.assert_close(block(x), expected)
    block(x).sum().backward()
    convert_to_dense(model)
    assert same(model.state_dict(), before)
    torch.testing.assert_close(block(x), expected)


# -------------------------------------------------------------------------------------------------------------- buffers


class Scaled(nn.Sequential):
    """Gathers a mean of its tokens in training, as a network with statistics does."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean.copy_(x.detach().reshape(-1, 8).mean(0))
            self.seen += 1
        return super().forward(x - self.mean)


def test_buffers_are_averaged_alike_in_evaluation_in_the_end_and_in_files():
    block = Block()
    block.mlp = Scaled(*block.mlp)
    model, x = nn.ModuleList([block]), torch.randn(2, 7, 8)
    use_experts(model, layers="all")
    block(x)
    means = torch.stack([expert.mean for expert in block.mlp.experts])
    assert not torch.equal(means[0], means[1])
    file = dense_state(model.state_dict(), ["0.mlp"])
    evaluated = block.eval()(x)
    convert_to_dense(model)
    torch.testing.assert_close(block.mlp.mean, means.mean(0))
    assert same(file, model.state_dict())
    assert torch.equal(block(x), evaluated)
    assert block.mlp.seen == 1
