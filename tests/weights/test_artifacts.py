"""References to W&B artifacts, against a stand-in for wandb.Api: no network, no key."""

from pathlib import Path

import pytest
import torch
import wandb
from safetensors.torch import save_file

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.artifacts import fetch_artifact
from lightning_soup.weights.weights_file import open_checkpoint

REFERENCE = "wandb:my team/digits/model-1a2b:best"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves the files it is given; remembers what it was asked for."""

    class Server:
        files: tuple[str, ...] = ("model.ckpt",)
        asked: str | None = None
        version = "v3"
        root: str | None = None

        def artifact(self, name):
            self.asked = name
            return self

        def download(self, root=None):
            self.root = root
            folder = Path(root or tmp_path / "artifacts" / "model-1a2b:v3")
            for name in self.files:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".safetensors":
                    save_file({"w": torch.arange(3.0)}, path)
                else:
                    path.write_text("content")
            return str(folder)

    made = Server()
    monkeypatch.setattr(wandb, "Api", lambda: made)
    return made


def test_the_weights_file_is_found(server, tmp_path):
    server.files = ("config.yaml", "nested/model.ckpt", "README.md")
    assert fetch_artifact(REFERENCE) == tmp_path / "artifacts" / "model-1a2b:v3" / "nested" / "model.ckpt"
    assert server.asked == "my team/digits/model-1a2b:best"
    assert server.root is None  # W&B's own folder


def test_each_artifact_has_its_own_folder_under_root(server, tmp_path):
    path = fetch_artifact(REFERENCE, tmp_path / "ingredients")
    assert path == tmp_path / "ingredients" / "model-1a2b-v3" / "model.ckpt"  # the version behind the alias


@pytest.mark.parametrize("mark", ["model.safetensors.index.json", "adapter_config.json"])
def test_a_checkpoint_of_many_files_is_its_folder(server, tmp_path, mark):
    server.files = (f"export/{mark}", "export/a.safetensors", "export/b.safetensors")
    assert fetch_artifact(REFERENCE, tmp_path) == tmp_path / "model-1a2b-v3" / "export"


def test_open_checkpoint_takes_references(server):
    server.files = ("soup.safetensors",)
    assert open_checkpoint(REFERENCE)["w"].tolist() == [0.0, 1.0, 2.0]


def test_several_weights_files_are_named(server):
    server.files = ("best.ckpt", "sub/last.ckpt")
    with pytest.raises(
        UnreadableCheckpoint, match=r"holds 2 weights files \(best\.ckpt, sub/last\.ckpt\).*path of the one"
    ):
        fetch_artifact(REFERENCE)


def test_no_weights_files(server):
    server.files = ("table.json",)
    with pytest.raises(
        UnreadableCheckpoint, match=r"holds no weights \(table\.json\)\. Expected a file ending in \.safe"
    ):
        fetch_artifact(REFERENCE)


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.UsageError("No API key configured."),
        wandb.errors.CommError("could not find artifact"),
        ConnectionError("Name or service not known"),
    ],
)
def test_no_key_no_network_no_artifact(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UnreadableCheckpoint) as caught:
        fetch_artifact(REFERENCE)
    message = str(caught.value)
    assert message.startswith(f"{REFERENCE}: cannot be downloaded ({type(error).__name__}: {error})")
    assert "`wandb login`" in message
    assert "`wandb artifact get my team/digits/model-1a2b:best`" in message


@pytest.mark.parametrize(
    "reference",
    [
        "wandb:",
        "wandb:model:v0",
        "wandb:digits/model:v0",
        "wandb:team/digits/model",
        "wandb:a/b/c/d:v0",
        "wandb:a/b/c:v0/d.ckpt",
        "team/digits/m:v0",
    ],
)
def test_what_is_no_reference_is_refused_before_anything_is_asked(server, reference):
    with pytest.raises(UnreadableCheckpoint, match="Expected wandb:entity/project/artifact:version"):
        fetch_artifact(reference)
    assert server.asked is None
