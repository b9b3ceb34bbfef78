"""Masks: what is prunable, how they are applied, counted, and written."""

import math

import open_clip
import pytest
import timm
import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks, prunable


def _masks() -> Masks:
    return Masks({"a": torch.tensor([[True, False, True]]), "b": torch.tensor([[False], [True]])})


class TestPrunable:
    def test_a_vit(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        names = list(prunable(model))
        assert names[0] == "patch_embed.proj.weight"
        assert names[-1] == "head.weight"
        assert len(names) == 2 + 4 * 12
        assert not any(
            "norm" in name or "bias" in name or "embed." in name.replace("patch_embed.", "") for name in names
        )
        assert list(prunable(model, skip_first=True, skip_head=True)) == names[1:-1]

    def test_clip_has_its_attention_and_projections(self) -> None:
        vision = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8}
        text = {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        names = set(prunable(open_clip.model.CLIP(16, vision, text)))
        assert {"visual.proj", "text_projection", "visual.conv1.weight"} <= names
        assert "transformer.resblocks.0.attn.in_proj_weight" in names
        assert not names & {"positional_embedding", "visual.class_embedding", "token_embedding.weight", "logit_scale"}

    def test_tied_weights_come_once(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(2, 2)
                self.second = nn.Linear(2, 2)
                self.second.weight = self.first.weight

        assert list(prunable(Tied())) == ["first.weight"]
        with pytest.raises(UnsupportedSetup, match="nothing in Tied can be pruned"):
            prunable(Tied(), exclude=["second.*"])  # the name that named_parameters does not give

    def test_weights_tied_by_a_view_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        model[1].weight = nn.Parameter(model[0].weight.detach().T)
        with pytest.raises(UnsupportedSetup, match=r"0\.weight and 1\.weight are .* in the same memory"):
            prunable(model)
        assert list(prunable(model, exclude=["1.*"])) == ["0.weight"]
        flat = nn.Parameter(torch.rand(12))
        model[0].weight, model[1].weight = nn.Parameter(flat[:6].view(3, 2)), nn.Parameter(flat[6:].view(2, 3))
        assert len(prunable(model)) == 2

    def test_weights_without_values_have_names(self) -> None:
        with torch.device("meta"):
            assert len(prunable(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == 2

    def test_whole_numbers_are_left_out(self) -> None:
        model = nn.Linear(2, 2)
        model.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        assert list(prunable(model)) == ["weight"]

    @pytest.mark.parametrize(
        "name",
        [
            "encoder.pos_embedding",
            "visual.positional_embedding",
            "cls_token",
            "class_token",
            "class_embedding",
            "reg_token",
            "embeddings.register_tokens",
            "dist_token",
            "mask_token",
            "layers.0.attn.relative_position_bias_table",
            "token_embedding.weight",
            "logit_scale",
        ],
    )
    def test_embeddings_and_tokens_are_no_layers(self, name: str) -> None:
        model = nn.ParameterDict({name.replace(".", "_"): torch.rand(2, 2), "layer": torch.rand(2, 2)})
        assert list(prunable(model)) == ["layer"]

    def test_patterns_are_ones_own(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert list(prunable(model, exclude=["0.*"])) == ["1.weight"]
        model[0] = torch.compile(model[0], backend="eager")
        for name in ("0.weight", "0._orig_mod.weight"):
            assert list(prunable(model, exclude=[name])) == ["1.weight"]
        assert list(prunable(model, exclude=["1.weight"])) == ["0._orig_mod.weight"]

    @pytest.mark.parametrize("options", [{"exclude": ["*"]}, {"skip_first": True, "skip_head": True}], ids=str)
    def test_nothing_prunable(self, options: dict[str, object]) -> None:
        with pytest.raises(UnsupportedSetup, match="nothing in Sequential can be pruned"):
            prunable(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), **options)

    def test_lazy_layers_have_no_shape_yet(self) -> None:
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        with pytest.raises(UnsupportedSetup, match=r"0\.weight has no shape yet.*Run one batch"):
            prunable(model)
        assert list(prunable(model, exclude=["0.*"])) == ["1.weight"]

    @pytest.mark.parametrize(
        "make",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.orthogonal,
            pytest.param(
                nn.utils.weight_norm,
                marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
            ),
        ],
    )
    def test_weights_that_are_computed_would_not_be_zero(self, make) -> None:
        model = nn.Sequential(make(nn.Linear(4, 4)), nn.Linear(4, 2))
        with pytest.raises(UnsupportedSetup, match=r"0\.weight is computed from other parameters.*remove_") as caught:
            prunable(model)
        told = str(caught.value).split("exclude=['")[1].split("'")[0]
        assert list(prunable(model, exclude=["0.weight_*", told])) == ["1.weight"]

    def test_spectral_norm_keeps_zeros(self) -> None:
        model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        [(name, weight)] = prunable(model).items()
        assert name == "parametrizations.weight.original"
        with torch.no_grad():
            weight[0] = 0
        assert not model.weight[0].any()

    def test_a_pattern_is_no_list(self) -> None:
        with pytest.raises(UnsupportedSetup, match=r"expected a list of patterns: \['head\.\*'\]"):
            prunable(nn.Linear(2, 2), exclude="head.*")


class TestApply:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str
    )
    def test_what_is_pruned_is_plus_zero_and_the_rest_untouched(self, dtype: torch.dtype) -> None:
        values = torch.tensor([1.5, math.nan, math.inf, -math.inf, -0.0, -2.0])
        for row in (values, values.flip(0)):
            kept = torch.tensor([True, False, False, False, False, True])
            tensor = row.to(dtype)
            before = tensor.clone().view(torch.uint8).reshape(6, -1)
            Masks({"w": kept}).apply_({"w": tensor})
            after = tensor.view(torch.uint8).reshape(6, -1)
            assert torch.equal(after[kept], before[kept])
            assert not after[~kept].any()

    def test_views_and_parameters(self) -> None:
        whole = torch.ones(3, 2)
        Masks({"w": torch.tensor([[True, False, True], [False, True, True]])}).apply_({"w": whole.T})
        assert torch.equal(whole, torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        layer = nn.Linear(2, 1)
        Masks({"weight": torch.tensor([[False, True]])}).apply_(dict(layer.named_parameters()))
        assert layer.weight[0, 0] == 0
        assert layer.weight.requires_grad

    def test_autograd_sees_the_change(self) -> None:
        weight = torch.ones(2, requires_grad=True)
        result = weight.square().sum()
        Masks({"w": torch.tensor([True, False])}).apply_({"w": weight})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    def test_other_names_are_left_alone(self) -> None:
        tensor = torch.ones(2)
        _masks().apply_({"c": tensor})
        assert torch.equal(tensor, torch.ones(2))


class TestCounts:
    def test_counts(self) -> None:
        masks = _masks()
        assert (masks.pruned, masks.size, masks.sparsity) == (2, 5, 0.4)
        assert repr(masks) == "Masks(2 tensors, 2 of 5 pruned)"
        assert Masks.full({"a": torch.rand(2, 2)}).pruned == 0

    def test_equality(self) -> None:
        assert _masks() == _masks()
        assert _masks() != Masks.full(dict(_masks()))
        assert _masks() != Masks({"a": _masks()["a"]})
        assert _masks() != 1

    def test_other_types_than_bool(self) -> None:
        with pytest.raises(TypeError, match=r"the mask of a is torch\.float32: expected bool"):
            Masks({"a": torch.ones(2)})


class TestFiles:
    @pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
    def test_a_bit_an_element_and_back(self, count: int) -> None:
        mask = torch.rand(count, 3, generator=torch.Generator().manual_seed(count)) < 0.5
        state = Masks({"w": mask}).state()
        assert state["bits"]["w"].numel() == -(-count * 3 // 8)
        assert Masks.from_state(state) == Masks({"w": mask})

    def test_the_safe_loader_reads_them(self, tmp_path) -> None:
        torch.save(_masks().state(), tmp_path / "masks.pt")
        assert Masks.from_state(torch.load(tmp_path / "masks.pt", weights_only=True)) == _masks()

    @pytest.mark.parametrize("damage", [None, torch.ones(1), torch.ones(0).byte(), torch.ones(2).byte(), b"1"], ids=str)
    def test_damage_is_named(self, damage) -> None:
        state = _masks().state()
        state["bits"]["a"] = damage
        with pytest.raises(UnsupportedSetup, match="the mask of a is damaged: expected 1 bytes"):
            Masks.from_state(state)

    def test_other_states(self) -> None:
        for found in ("bits", "shapes", "weights"):
            with pytest.raises(UnsupportedSetup, match=f"expected bits and shapes, found {found}"):
                Masks.from_state({found: {}})

    def test_masks_of_a_large_other_model(self) -> None:
        many = {f"layer{number}": torch.ones(1, 1) for number in range(12)}
        with pytest.raises(UnsupportedSetup, match=r"12 tensors differ: .*layer9: mask missing, weights \(1, 1\). Use"):
            Masks({}).check(many, "the checkpoint")

    def test_masks_of_another_model(self) -> None:
        with pytest.raises(UnsupportedSetup, match=r"(?s)the checkpoint holds the masks of another model.*3 tensors.*"):
            _masks().check({"a": torch.rand(1, 4), "c": torch.rand(1)}, "the checkpoint")
        _masks().check({"a": torch.rand(1, 3), "b": torch.rand(2, 1)}, "the checkpoint")
