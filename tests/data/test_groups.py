from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lightning_soup.data.groups import check_apart, check_pattern, group_keys, group_parts
from lightning_soup.data.image_folder import ImageFolderDataModule
from lightning_soup.errors import UnsupportedSetup

SMALL = {"img_size": 8, "batch_size": 4, "num_workers": 0}


def write_videos(root: Path, part: str, videos: dict[str, list[str]], frames: int = 5) -> Path:
    """``root/part/<class>/<video>/<frame>.png``."""
    for label, names in videos.items():
        for name in names:
            folder = root / part / label / name
            folder.mkdir(parents=True)
            for number in range(frames):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def root(tmp_path):
    write_videos(tmp_path, "train", {"fake": [f"f{i}" for i in range(10)], "real": [f"r{i}" for i in range(10)]})
    return write_videos(tmp_path, "test", {"fake": ["f90"], "real": ["r90"]})


def videos(view):
    return {Path(view.images.samples[i][0]).parent.name for i in view.indices}


def test_frames_of_one_video_are_held_out_together(root):
    data = ImageFolderDataModule(str(root), val_fraction=0.2, groups="^([^/]+)/", **SMALL)
    data.setup("fit")
    train, val = videos(data._train), videos(data._val)
    assert not train & val
    assert train | val == {f"{kind}{i}" for kind in "fr" for i in range(10)}
    assert Counter(name[0] for name in val) == {"f": 2, "r": 2}  # each class by itself
    assert (len(data._train), len(data._val)) == (80, 20)
    again = ImageFolderDataModule(str(root), val_fraction=0.2, groups="^([^/]+)/", seed=1, **SMALL)
    again.setup("fit")
    assert videos(again._val) != val
    data.setup("test")
    assert len(data._tests[0]) == 10


def test_without_groups_frames_are_scattered(root):
    data = ImageFolderDataModule(str(root), val_fraction=0.2, **SMALL)
    data.setup("fit")
    assert videos(data._train) & videos(data._val)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_video_in_two_folders_is_refused(root, stage):
    other = "val" if stage == "fit" else "test"
    if other == "val":
        write_videos(root, "val", {"fake": ["f3"], "real": ["r77"]})
    else:
        write_videos(root, "test", {"fake": ["f3"]})
    data = ImageFolderDataModule(str(root), groups="^([^/]+)/", **SMALL)
    with pytest.raises(UnsupportedSetup, match=rf"Images of f3 are in .*train and in .*{other}"):
        data.setup(stage)
    ImageFolderDataModule(str(root), **SMALL).setup(stage)


def test_keys_from_names_of_files():
    paths = ["/set/real/017_1.png", "/set/fake/017_044/2.png", "/set/fake/9_1.png"]
    assert group_keys(paths, Path("/set"), "^([0-9]+)_") == ["017", "017", "9"]


def test_parts_come_close_to_the_fraction():
    keys = [f"a{i}" for i in range(20) for _ in range(1 + i)] + [f"b{i}" for i in range(4) for _ in range(10)]
    targets = [0] * 210 + [1] * 40
    rest, held_out = group_parts(keys, targets, 0.25, seed=3)
    assert sorted(rest + held_out) == list(range(250))
    assert not {keys[i] for i in rest} & {keys[i] for i in held_out}
    shares = Counter(targets[i] for i in held_out)
    assert 40 <= shares[0] <= 65
    assert shares[1] == 10
    assert group_parts(keys, targets, 0.25, seed=3) == (rest, held_out)


def test_one_group_of_a_class_cannot_be_split():
    with pytest.raises(UnsupportedSetup, match=r"Class number 1 has images of one group only \(c\)"):
        group_parts(["a", "b", "c", "c"], [0, 0, 1, 1], 0.5, 0)


@pytest.mark.parametrize("seed", range(6))
def test_one_huge_group_is_trained_on(seed):
    keys = ["huge"] * 500 + [f"v{i // 10}" for i in range(50)]
    assert len(group_parts(keys, [0] * 550, 0.08, seed)[1]) == 40
    assert group_parts(["huge"] * 500 + ["small"] * 10, [0] * 510, 0.1, seed)[1] == list(range(500, 510))


def test_a_class_that_would_be_on_one_side_only():
    keys = ["a"] * 10 + ["b"] * 11
    with pytest.raises(UnsupportedSetup, match="All images of class number 1 would be trained on"):
        group_parts(keys, [0] * 16 + [1] * 5, 0.1, 0)


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular expression"), ("video", "round brackets")])
def test_patterns_that_cannot_be(tmp_path, pattern, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ImageFolderDataModule(str(tmp_path), groups=pattern, **SMALL)
    with pytest.raises(UnsupportedSetup, match=message):
        check_pattern(pattern)


def test_a_pattern_that_finds_nothing():
    with pytest.raises(UnsupportedSetup, match=r"finds nothing in x\.png"):
        group_keys(["/set/real/x.png"], Path("/set"), "^([0-9]+)")


def test_sets_apart():
    check_apart({"a": ["1", "2"], "b": ["3"], "c": []})
    with pytest.raises(UnsupportedSetup, match="Images of 1, 2, 3, 4, 5 and 2 more are in a and in b"):
        check_apart({"a": list("1234567"), "b": list("7654321")})
