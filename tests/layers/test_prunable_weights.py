"""What is prunable."""

import open_clip
import pytest
import timm
import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.prunable_weights import prunable


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
            "embeddings.position_embeddings",
            "cls_token",
            "class_token",
            "class_embedding",
            "reg_token",
            "embeddings.register_tokens",
            "dist_token",
            "mask_token",
            "layers.0.attn.relative_position_bias_table",
            "blocks.0.attn.rel_pos_h",
            "stages.2.1.self_attn.pos_emb",
            "patch_pos",
            "token_embedding.weight",
            "logit_scale",
        ],
    )
    def test_embeddings_and_tokens_are_no_layers(self, name: str) -> None:
        model = nn.ParameterDict({name.replace(".", "_"): torch.rand(2, 2), "layer": torch.rand(2, 2)})
        assert list(prunable(model)) == ["layer"]

    def test_layers_that_compute_positions_are_layers(self) -> None:
        model = nn.ModuleDict({"rel_pos": nn.Linear(2, 2), "pos_proj": nn.Linear(2, 2), "pos_emb": nn.Linear(2, 2)})
        assert len(prunable(model)) == 3

    def test_embeddings_are_known_by_their_type(self) -> None:
        model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "[bag]": nn.EmbeddingBag(5, 4), "layer": nn.Linear(4, 5)})
        assert list(prunable(model)) == ["layer.weight"]
        assert list(prunable(model, exclude=["layer.*"])) == ["wte.weight", "[bag].weight"]
        assert list(prunable(nn.Sequential(torch.compile(model["wte"]), model["layer"]))) == ["1.weight"]
        model["layer"].weight = model["wte"].weight  # a tied head is the embedding
        with pytest.raises(UnsupportedSetup, match="nothing in ModuleDict can be pruned"):
            prunable(model)

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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"skip_first": True}, "skip_first: by order of registration it would be 0.text_projection"),
            ({"skip_head": True}, r"would be 0.transformer.resblocks.0.mlp.c_proj.weight, but 0.text_projection comes"),
        ],
        ids=str,
    )
    def test_the_order_of_clip_does_not_tell_first_and_last(self, options: dict[str, bool], message: str) -> None:
        vision = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8}
        text = {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        model = nn.Sequential(open_clip.model.CLIP(16, vision, text))
        with pytest.raises(UnsupportedSetup, match=f"{message}.*Name what to leave out"):
            prunable(model, **options)
        model.append(nn.Linear(16, 3))  # a head after both towers
        assert "1.weight" not in prunable(model, skip_head=True)

    def test_attention_uses_its_parameters_in_order(self) -> None:
        model = nn.MultiheadAttention(4, 2)
        assert list(prunable(model, skip_first=True)) == ["out_proj.weight"]
        assert list(prunable(model, skip_head=True)) == ["in_proj_weight"]

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
