import json
import pickle

import open_clip
import pytest
import timm
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.clip_models import build_clip, clip_tokenizer, read_model_config
from lightning_soup.weights import save_weights
from tests.helpers.clip import COCA, TINY_CLIP, changed, fit_clip, some_images, state, tiny_clip

VISION, TEXT = TINY_CLIP["vision_cfg"], TINY_CLIP["text_cfg"]
CUSTOM = {**TINY_CLIP, "custom_text": True}


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


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({**TINY_CLIP, "vision_cfg": {**VISION, "output_tokens": True}}, "of texts: tuple"),
        ({**CUSTOM, "text_cfg": {**TEXT, "output_tokens": True}}, "of texts: tuple"),
        ({**TINY_CLIP, "vision_cfg": {**VISION, "pool_type": "none"}}, r"\[3, 5, 16\]"),
        ({**TINY_CLIP, "text_cfg": {**TEXT, "pool_type": "none"}}, r"\[3, 12, 16\]"),
        ({**TINY_CLIP, "text_cfg": {**TEXT, "embed_cls": True}}, "Check image_size"),
        ({**TINY_CLIP, "embed_dim": 8, "text_cfg": {**TEXT, "proj_type": "none"}}, r"\[3, 16\]"),
        ({**COCA, "vision_cfg": VISION}, "output_tokens, which CoCa needs in both towers"),
        ({**CUSTOM, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32}}, r"model \(224\)"),
    ],
)
def test_towers_that_give_no_features(config, fault):
    with pytest.raises(UnsupportedSetup, match=rf"do not give features \[B, {config['embed_dim']}\].*{fault}"):
        tiny_clip(model_config=config)


def test_no_weight_of_coca_is_left_as_the_memory_was(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    decoder = tiny_clip(model_config=COCA).model.text_decoder
    assert decoder.text_projection.isfinite().all()


def test_coca_is_a_classifier_whose_decoder_rests():
    model = tiny_clip(model_config=COCA).eval()
    before = state(model)
    with torch.no_grad():
        rows = open_clip.build_zero_shot_classifier(model.model, model.tokenize, model.classnames, model.templates)
        features = model.model.encode_image(some_images(), normalize=True)
        torch.testing.assert_close(model(some_images()), model.model.logit_scale.exp() * features @ rows)
    assert fit_clip(model.train(), max_epochs=12).callback_metrics["val_acc"] > 0.9
    learned = changed(model, before)
    assert {name.split(".")[1] for name in learned} == {"visual", "text"}


def folder_of(tmp_path, name, content, config=TINY_CLIP):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if name:
        (folder / name).write_bytes(content)
    return {"model_config": None, "model_name": f"local-dir:{folder}"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (None, bytes),  # open_clip would go on with random weights
        ("open_clip_model.safetensors", lambda content: content[: len(content) // 2]),
        ("open_clip_pytorch_model.bin", lambda content: b""),
        ("open_clip_pytorch_model.bin", lambda content: b"hello"),
        ("open_clip_pytorch_model.bin", lambda content: pickle.dumps({"state_dict": object()})),
    ],
)
def test_a_folder_without_weights_that_can_be_read(tmp_path, name, damage):
    content = save_weights(tiny_clip(1).model, tmp_path / "own.safetensors").read_bytes()
    options = folder_of(tmp_path, name, damage(content))
    with pytest.raises(UnsupportedSetup, match=r"could not load local-dir:.*give checkpoint_path"):
        tiny_clip(**options)
    model = tiny_clip(**options, checkpoint_path=str(tmp_path / "own.safetensors"))
    assert not changed(model.model, tiny_clip(1).model.state_dict())


@pytest.mark.parametrize(("content", "message"), [("[]", "cannot find it"), ('{"model_cfg": {}}', "got nothing")])
def test_a_folder_without_an_architecture(tmp_path, content, message):
    options = folder_of(tmp_path, None, b"")
    (tmp_path / "folder" / "open_clip_config.json").write_text(content)
    with pytest.raises(UnsupportedSetup, match=message):
        tiny_clip(**options)


def test_the_tokenizer_of_a_folder_is_read_from_it(tmp_path, monkeypatch):
    """Its config names a place on the hub, but the files lie in the folder."""
    read = []
    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", lambda name, **_: read.append(name))
    config = {**TINY_CLIP, "text_cfg": {**TEXT, "hf_tokenizer_name": "owner/name"}}
    name = folder_of(tmp_path, None, b"")["model_name"]
    clip_tokenizer(config, name)
    clip_tokenizer(config, "ViT-B-32")
    assert read == [str(tmp_path / "folder"), "owner/name"]


def test_weights_of_a_tower_are_not_fetched_where_all_come_from_a_file(tmp_path, monkeypatch):
    fetched = []
    build = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, pretrained, **options: fetched.append(pretrained) or build(*args, **options)
    )
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_model_pretrained": True}
    config = {**CUSTOM, "vision_cfg": vision}
    model = tiny_clip(model_config=config)
    assert not model.hparams.model_config["vision_cfg"]["timm_model_pretrained"]  # a checkpoint brings its own
    path = save_weights(model, tmp_path / "start.safetensors")
    tiny_clip(model_config=config, checkpoint_path=str(path))
    assert fetched == [True, False]
