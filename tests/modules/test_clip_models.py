import json

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.clip_models import build_clip, clip_tokenizer, read_model_config
from tests.helpers.clip import TINY_CLIP, tiny_clip


def test_architectures_from_a_file_a_mapping_and_open_clip_config(tmp_path):
    path = tmp_path / "tiny.json"
    for content in (TINY_CLIP, {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}):
        path.write_text(json.dumps(content))
        assert read_model_config("ViT-B-32", str(path)) == TINY_CLIP
        assert read_model_config("ViT-B-32", content) == TINY_CLIP
    assert read_model_config("ViT-B-32", None)["vision_cfg"]["patch_size"] == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("embed_dim: 64", r"tiny\.json' is not JSON: Expecting value"),
        ("[1]", r"expected an architecture with embed_dim, vision_cfg, text_cfg; got list"),
        ('{"embed_dim": 64, "vision_cfg": {}}', r"got embed_dim, vision_cfg\. For example \{embed_dim: 64"),
        ("{}", r"got nothing"),
    ],
)
def test_files_that_are_no_architecture(tmp_path, content, message):
    (tmp_path / "tiny.json").write_text(content)
    with pytest.raises(UnsupportedSetup, match=message):
        read_model_config("ViT-B-32", str(tmp_path / "tiny.json"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"none\.json' cannot be read: No such file or directory"):
        read_model_config("ViT-B-32", str(tmp_path / "none.json"))
    with pytest.raises(UnsupportedSetup, match=r"cannot be read"):
        read_model_config("ViT-B-32", str(tmp_path))


def test_unknown_names_and_tags():
    with pytest.raises(UnsupportedSetup, match=r"open_clip has no model of this name\. Closest names: .*ViT-B-32"):
        read_model_config("ViT-B-33", None)
    with pytest.raises(
        UnsupportedSetup, match=r"'opneai': open_clip has no such weights of ViT-B-32\. It has: openai, "
    ):
        tiny_clip(model_config=None, model_name="ViT-B/32", pretrained="opneai")
    with pytest.raises(UnsupportedSetup, match=r"open_clip cannot find it"):
        read_model_config("local-dir:/nowhere/at/all", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"layers": 1, "width": 16, "patchsize": 4}}, r"could not build .*'patchsize'"),
        ({"text_cfg": {"width": 16, "heads": 3, "layers": 1}}, r"could not build"),
        ({"vision_cfg": {**TINY_CLIP["vision_cfg"], "head_width": 0}}, r"could not build"),
        ({"embed_dims": 4}, r"embed_dims"),
    ],
)
def test_architectures_that_cannot_be_built(changes, message):
    with pytest.raises(UnsupportedSetup, match=message):
        build_clip({**TINY_CLIP, **changes})


def test_the_architecture_is_left_as_it_was_given():
    config = {**TINY_CLIP, "custom_text": True}
    model = build_clip(config)
    assert config["custom_text"]
    assert hasattr(model, "text")
    assert model.text.token_embedding.weight.shape == (49408, 16)


def test_models_with_a_text_tower_of_their_own_and_resnets():
    custom = tiny_clip(model_config={**TINY_CLIP, "custom_text": True}, train="both").eval()
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    cnn = tiny_clip(model_config={**TINY_CLIP, "vision_cfg": resnet}, train="image").eval()
    with torch.no_grad():
        assert custom(torch.rand(2, 3, 8, 8)).shape == (2, 3)
        assert cnn(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    frozen = {name for name, parameter in custom.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.logit_scale"}


def test_a_frozen_image_tower_keeps_its_batch_statistics():
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    model = tiny_clip(model_config={**TINY_CLIP, "vision_cfg": resnet}, train="head")
    before = {name: value.clone() for name, value in model.model.named_buffers()}
    model.train()
    model.training_loss((torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])))
    assert all(torch.equal(value, before[name]) for name, value in model.model.named_buffers())
    assert model.model.visual.training


def test_tokens_have_the_length_of_the_text_tower():
    tokens = clip_tokenizer(TINY_CLIP)(["a cat", "a dog with a very long name " * 3])
    assert tokens.shape == (2, 12)
    assert tokens.dtype == torch.long
    assert tokens[1, -1] == tokens.max()  # cut, but ended
    with pytest.raises(UnsupportedSetup, match=r"vocab_size=100: open_clip's tokenizer makes 49408 different tokens"):
        clip_tokenizer({**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], "vocab_size": 100}})


def test_names_that_are_cut_to_the_same_tokens():
    long = "the very long name of a class that nobody could ever remember number "
    with pytest.raises(UnsupportedSetup, match=r"become the same tokens.*cut after 12 tokens"):
        tiny_clip(train="image", classnames=[long + "one", long + "two"])


def test_a_tokenizer_that_is_not_there():
    text = {**TINY_CLIP["text_cfg"], "hf_tokenizer_name": "/nowhere/at/all"}
    with pytest.raises(UnsupportedSetup, match=r"The tokenizer '/nowhere/at/all' .* cannot be loaded"):
        clip_tokenizer({**TINY_CLIP, "text_cfg": text})
