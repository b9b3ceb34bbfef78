"""A module on copies: what it computes with, and that it stands on its own tensors again."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup.landscape.wide_copy import on_wide_copies


class Everything(LightningModule):
    """Tied weights, a recurrent layer, statistics, whole numbers, a metric, and a weight by parametrization."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.normed = nn.BatchNorm1d(4)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.accuracy = MulticlassAccuracy(4)
        self.one.bias.requires_grad_(False)

    def forward(self, x):
        x = self.normed(self.parametrized(self.other(self.one(x))))
        return self.recurrent(x[:, None])[0][:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_computes_with_the_copies_and_then_with_its_own(dtype):
    module = Everything().to(dtype)
    module.train()
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {name: value.detach().clone() for name, value in held.items()}
    x = torch.randn(6, 4)
    wanted = Everything()
    wanted.load_state_dict(module.state_dict())
    wanted.to(torch.promote_types(dtype, torch.float32))
    with on_wide_copies(module) as copies:
        assert module.dtype == wanted.dtype
        assert module.other.weight is module.one.weight is copies["one.weight"]
        assert not module.one.bias.requires_grad
        assert "normed.num_batches_tracked" not in copies
        assert not any(name.startswith("accuracy") for name in copies)
        torch.testing.assert_close(module(x.to(wanted.dtype)), wanted(x.to(wanted.dtype)))
        with torch.no_grad():
            for name, value in copies.items():
                value.mul_(0 if name.startswith("recurrent") else 1)
        assert not module(x.to(wanted.dtype)).any()
    now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert list(now) == list(held)
    assert all(now[name] is held[name] and torch.equal(now[name], values[name]) for name in held)
    assert module.dtype == dtype
    module(x.to(dtype))


def test_after_an_error_it_stands_on_its_own():
    module = Everything()
    own = module.one.weight
    with pytest.raises(RuntimeError, match="inside"), on_wide_copies(module):
        raise RuntimeError("inside")
    assert module.one.weight is own
