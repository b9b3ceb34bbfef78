import json

import pytest
import torch

from lightning_soup.data.image_folder import ImageFolderDataModule
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.images import write_folders

CLASSES = ["analog clock", "bird", "cat", "digital clock", "dog"]


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(("train", "test")):
        write_folders(tmp_path / name, CLASSES, count=2, seed=seed)
    write_folders(tmp_path / "art", ["dog", "bird"], count=2)
    write_folders(tmp_path / "objects", ["clock", "hound", "teapot"], count=3)
    return tmp_path


def opened(root, shifted, shifted_classes):
    data = ImageFolderDataModule(
        str(root), shifted=shifted, shifted_classes=shifted_classes, img_size=16, batch_size=4, num_workers=0
    )
    data.setup("test")
    return data


def targets(data, number):
    return torch.cat([batch[1] for batch in data.test_dataloader()[number]]).tolist()


def mapping(root, content):
    (root / "map.json").write_text(json.dumps(content))
    return str(root / "map.json")


def test_all_classes_compete_unless_said_otherwise(root):
    data = opened(root, ["art"], None)
    assert data.test_classes == {}


def test_own_classes_compete(root):
    data = opened(root, ["art"], {"art": "own"})
    assert data.test_classes == {"art": [[1], [4]]}
    assert targets(data, 1) == [1, 1, 4, 4]
    assert len(targets(data, 0)) == 10


def test_a_folder_can_cover_several_classes_and_others_be_left_out(root):
    path = mapping(root, {"clock": ["analog clock", "digital clock"], "hound": "dog"})
    data = opened(root, {"objectnet": "objects", "art": "art"}, {"objectnet": path})
    assert data.test_classes == {"objectnet": [[0, 3], [4]]}
    assert targets(data, 1) == [0, 0, 0, 4, 4, 4]  # no teapots
    assert targets(data, 2) == [1, 1, 4, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"clock": "analog clock", "lamp": "dog"},
            r"names class folders that .*objects does not have: lamp\. It has: clock",
        ),
        ({"clock": "sundial", "hound": "dog"}, r"no training class is named sundial"),
        ({"clock": "dog", "hound": "dog"}, r"cannot tell the classes apart: it gives dog to two folders"),
        ({"clock": "analog clock"}, r"it names 1 folders"),
        ({"clock": [], "hound": "dog"}, r"gives no class names for 'clock'"),
        (["clock"], r"Expected 'own', or a JSON file such as"),
    ],
)
def test_mappings_that_cannot_work(root, content, message):
    with pytest.raises(UnsupportedSetup, match=message):
        opened(root, ["objects"], {"objects": mapping(root, content)})


def test_files_that_are_none(root):
    with pytest.raises(UnsupportedSetup, match=r"nowhere\.json cannot be read: No such file"):
        opened(root, ["objects"], {"objects": str(root / "nowhere.json")})
    (root / "map.json").write_text("clock: dog")
    with pytest.raises(UnsupportedSetup, match=r"map\.json is not JSON"):
        opened(root, ["objects"], {"objects": str(root / "map.json")})
    (root / "map.json").write_text('{"clock": "dog", "hound": "cat", "clock": "bird"}')
    with pytest.raises(UnsupportedSetup, match=r"map\.json has two entries for clock\. Give them as one list"):
        opened(root, ["objects"], {"objects": str(root / "map.json")})
    with pytest.raises(UnsupportedSetup, match=r"no training class is named clock, hound, teapot \(given by own\)"):
        opened(root, ["objects"], {"objects": "own"})
    with pytest.raises(UnsupportedSetup, match=r"shifted_classes for night, but the shifted sets are: art"):
        opened(root, ["art"], {"night": "own"})
