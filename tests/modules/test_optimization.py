import itertools
import math

import pytest
import timm
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.optimization import parameter_groups, warmup_cosine, warmup_steps


def tiny_vit(depth=3):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=16, depth=depth, num_heads=2, num_classes=5
    )


def test_schedule_rises_linearly_and_falls_as_half_a_cosine():
    factors = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[12] == pytest.approx(0.5)
    assert factors[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[20] == pytest.approx(0)
    assert all(before > after for before, after in itertools.pairwise(factors[4:]))
    assert warmup_cosine(25, 4, 20) == pytest.approx(0)  # a step too many does not rise again


def test_schedule_at_its_ends():
    assert warmup_cosine(0, 0, 10) == 1.0
    assert warmup_cosine(5, 5, 5) == 1.0  # all of it warm-up: no division by zero
    assert [warmup_cosine(step, 2, math.inf) for step in (0, 1, 2, 10**9)] == [0.5, 1.0, 1.0, 1.0]


def test_warmup_is_a_number_of_steps_or_a_fraction():
    assert warmup_steps(30, 100) == 30
    assert warmup_steps(0.3, 100) == 30
    assert warmup_steps(30, math.inf) == 30
    with pytest.raises(UnsupportedSetup, match="max_steps, or give warmup as a number of steps"):
        warmup_steps(0.1, math.inf)


def decays(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_only_matrices_have_weight_decay(layer_decay):
    model = tiny_vit()
    found = decays(parameter_groups(model, 1e-3, 0.1, layer_decay), model)
    spared = {name for name, decay in found.items() if decay == 0}
    expected = {name for name, p in model.named_parameters() if p.ndim < 2} | {"pos_embed", "cls_token"}
    assert spared == expected
    assert {found[name] for name in found.keys() - spared} == {0.1}


def test_rates_fall_from_the_head_to_the_patches():
    model = tiny_vit(depth=3)
    groups = parameter_groups(model, 1e-3, 0.1, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    # The head is layer 4, the blocks 3 to 1 (the last norm goes with block 3), the patch embedding layer 0.
    assert rates["head.weight"] == rates["head.bias"] == 1e-3
    assert rates["norm.bias"] == pytest.approx(0.5e-3)
    for block in range(3):
        for part in ("attn.qkv.weight", "norm1.weight", "mlp.fc2.bias"):
            assert rates[f"blocks.{block}.{part}"] == pytest.approx(1e-3 * 0.5 ** (3 - block))
    assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == pytest.approx(1e-3 * 0.5**4)


def test_the_schedule_scales_every_layer_alike():
    model = tiny_vit()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1, 0.5), lr=1e-3)
    before = [group["lr"] for group in optimizer.param_groups]
    assert len(set(before)) == 5
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 4, 20))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * rate for rate in before])


def test_frozen_parameters_are_left_out():
    model = tiny_vit()
    model.patch_embed.requires_grad_(False)
    for layer_decay in (None, 0.5):
        groups = parameter_groups(model, 1e-3, 0.1, layer_decay)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 2


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_a_compiled_model_or_part_has_the_same_groups(layer_decay):
    def settings(model):
        names = {id(value): name.replace("_orig_mod.", "") for name, value in model.named_parameters()}
        groups = parameter_groups(model, 1e-3, 0.1, layer_decay)
        return {names[id(p)]: (g["weight_decay"], g.get("lr")) for g in groups for p in g["params"]}

    expected = settings(tiny_vit())
    assert expected["pos_embed"][0] == 0
    assert settings(torch.compile(tiny_vit(), backend="eager")) == expected


def test_a_compiled_part_keeps_what_has_no_decay():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.compile(tiny_vit(), backend="eager")

        def no_weight_decay(self):
            return {"part.pos_embed"}

    pair = Pair()
    decayed = {id(p) for g in parameter_groups(pair, 1e-3, 0.1, None) if g["weight_decay"] > 0 for p in g["params"]}
    assert id(pair.part.pos_embed) not in decayed
    assert id(pair.part.head.weight) in decayed
