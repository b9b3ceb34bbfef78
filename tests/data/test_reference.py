from itertools import chain, islice

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_soup.data.reference import FolderImages, Reference, ReferenceFiles, read_texts
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.ids import without_addresses

TEXTS = ["a cat", "a dog"]


def numbered(count, start=0):
    """Images ``[1, 2, 2]`` that are told apart by their value."""
    return torch.arange(start, start + count).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def numbers(batch):
    return batch[:, 0, 0, 0].int().tolist()


def take(reference, count, **options):
    return [numbers(batch) for batch in islice(reference.batches(**options), count)]


# ---------------------------------------------------------------------------------------------------- sets with numbers


def test_batches_have_no_end_and_each_pass_has_every_image_once():
    batches = take(Reference(numbered(20), TEXTS, batch_size=6), 10)
    assert [len(batch) for batch in batches] == [6] * 10  # no shorter one where a pass ends
    order = list(chain(*batches))
    passes = [order[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


@pytest.mark.parametrize("start", [0, 1, 3, 4, 17])
def test_resuming_goes_on_where_it_was(start):
    reference = Reference(numbered(20), TEXTS, batch_size=6)
    assert take(reference, 5, start=start) == take(reference, start + 5)[start:]


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_resuming_goes_on_in_iterables_too(start):
    reference = Reference(Stream(7), TEXTS, batch_size=3)
    assert take(reference, 4, start=start) == take(reference, start + 4)[start:]


def test_a_batch_larger_than_the_set_takes_images_again():
    (batch,) = take(Reference(numbered(3), TEXTS, batch_size=7), 1)
    assert len(batch) == 7
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_ranks_and_seeds_have_orders_of_their_own():
    reference, other = (Reference(numbered(20), TEXTS, batch_size=6, seed=seed) for seed in (0, 1))
    orders = [*(take(reference, 8, rank=rank) for rank in range(4)), *(take(other, 8, rank=rank) for rank in range(4))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert take(reference, 8, rank=2) == orders[2]


def test_the_runs_random_stream_is_neither_used_nor_moved():
    reference = Reference(numbered(20), TEXTS, batch_size=6)
    expected = take(reference, 5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert take(reference, 5) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_give_the_same_batches():
    assert take(Reference(numbered(20), TEXTS, 6, num_workers=1), 4) == take(Reference(numbered(20), TEXTS, 6), 4)


@pytest.mark.parametrize(
    "images",
    [numbered(5), list(numbered(5)), TensorDataset(numbered(5), torch.arange(5)), [(x, "label") for x in numbered(5)]],
    ids=["tensor", "list", "pairs", "list of pairs"],
)
def test_of_pairs_the_image_is_taken(images):
    assert sorted(take(Reference(images, TEXTS, batch_size=5), 1)[0]) == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------- anything iterable


class Stream(IterableDataset):
    """Images one at a time, as often as asked."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(numbered(self.count))


def test_single_images_are_batched_in_their_own_order():
    assert take(Reference(Stream(7), TEXTS, batch_size=3), 5) == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2], [3, 4, 5]]


def test_batches_stay_as_they_are():
    loader = DataLoader(TensorDataset(numbered(7), torch.arange(7)), batch_size=4)
    assert take(Reference(loader, TEXTS, batch_size=2), 4) == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [4, 5, 6]]


def test_a_set_that_has_numbers_but_is_a_stream_is_gone_through():
    class Sized(Stream):
        def __len__(self):
            return self.count

        def __getitem__(self, index):
            raise AssertionError("a stream has no numbers")

    assert take(Reference(Sized(4), TEXTS, batch_size=4), 2) == [[0, 1, 2, 3]] * 2


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_what_can_be_gone_through_once_is_refused():
    with pytest.raises(UnsupportedSetup, match="a generator, which can be gone through once"):
        Reference((image for image in numbered(5)), TEXTS)
    with pytest.raises(UnsupportedSetup, match="list_iterator, which can be gone through once"):
        Reference(iter(list(numbered(5))), TEXTS)


@pytest.mark.parametrize(
    "images", [[], torch.zeros(0, 3, 2, 2), TensorDataset(torch.zeros(0, 3, 2, 2))], ids=without_addresses
)
def test_no_images_are_refused_at_once(images):
    with pytest.raises(UnsupportedSetup, match=f"no images: {type(images).__name__} is empty"):
        Reference(images, TEXTS)


def test_an_empty_stream_is_an_error_and_no_endless_loop():
    with pytest.raises(UnsupportedSetup, match="no images: Stream is empty"):
        next(Reference(Stream(0), TEXTS).batches())


def test_texts_must_be_words():
    with pytest.raises(UnsupportedSetup, match="no texts"):
        Reference(numbered(5), [])
    with pytest.raises(UnsupportedSetup, match="a text 3; expected words"):
        Reference(numbered(5), ["a cat", 3])
    assert Reference(numbered(5), (text for text in TEXTS)).texts == TEXTS


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (["cat.png"] * 4, "str"),
        (torch.zeros(4, 2), r"\[2\]"),
        ([()] * 4, "tuple"),
        ([{"image": 1}] * 4, "dict"),
    ],
)
def test_what_is_no_image_is_named(images, found):
    with pytest.raises(UnsupportedSetup, match=rf"A reference image is {found}; expected a tensor \[C, H, W\]"):
        next(Reference(images, TEXTS).batches())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(UnsupportedSetup, match="expected batch_size ≥ 1 and num_workers ≥ 0"):
        Reference(numbered(5), TEXTS, **options)


# ---------------------------------------------------------------------------------------------------------------- files


def write(path, colour, mode="RGB", size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four images in folders of folders, a grey one and a transparent one among them, and something else."""
    write(tmp_path / "images" / "b.png", (0, 255, 0))
    write(tmp_path / "images" / "a" / "x.PNG", (255, 0, 0))
    write(tmp_path / "images" / "a" / "deep" / "y.jpg", 128, mode="L")
    write(tmp_path / "images" / "c.png", (0, 0, 255, 10), mode="RGBA")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "texts.txt").write_text("a cat\n\n  a dog \n")
    return tmp_path


def test_folder_images_are_all_below_sorted_and_in_colour(folder):
    seen = FolderImages(str(folder / "images"), lambda image: (image.mode, image.getpixel((0, 0))))
    assert [path.name for path in seen.paths] == ["y.jpg", "x.PNG", "b.png", "c.png"]
    found = [seen[i] for i in range(len(seen))]
    assert [mode for mode, _ in found] == ["RGB"] * 4
    assert [pixel for _, pixel in found] == [(128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_folder_that_is_not_there_or_has_no_images_is_refused(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"nowhere is no folder\. Give a folder with images \(\.jpg"):
        FolderImages(str(tmp_path / "nowhere"), None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(UnsupportedSetup, match="empty has no images in it"):
        FolderImages(str(tmp_path / "empty"), None)


def test_reference_files_have_the_size_and_colours_asked_for(folder):
    options = {"img_size": 6, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "batch_size": 4, "num_workers": 0}
    reference = ReferenceFiles(str(folder / "images"), str(folder / "texts.txt"), **options)
    assert reference.texts == TEXTS
    batch = next(reference.batches())
    assert batch.shape == (4, 3, 6, 6)
    colours = sorted(tuple(round(v, 1) for v in image[:, 3, 3].tolist()) for image in batch)
    assert colours == [(-2, -2, 2), (-2, 2, -2), (0, 0, 0), (2, -2, -2)]


def test_reference_files_take_what_a_model_expects(folder):
    options = {"model_name": "test_vit.r160_in1k", "batch_size": 4}
    reference = ReferenceFiles(str(folder / "images"), str(folder / "texts.txt"), **options)
    assert reference.num_workers == 4
    assert reference.images[0].shape == (3, 160, 160)


def test_reference_files_are_cropped_as_asked_for(folder):
    def crop(**options):
        files = ReferenceFiles(str(folder / "images"), str(folder / "texts.txt"), img_size=8, **options)
        return next(step.size for step in files.images.transform.transforms if type(step).__name__ == "Resize")

    assert (crop(crop_pct=1.0), crop(crop_pct=0.5)) == (8, 16)


def test_reference_files_need_a_size(folder):
    with pytest.raises(UnsupportedSetup, match="Neither model_name nor img_size is given"):
        ReferenceFiles(str(folder / "images"), str(folder / "texts.txt"))


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.txt", "a cat\r\n\n \n  a dog  \nnaïve 犬", ["a cat", "a dog", "naïve 犬"]),
        ("t.csv", 'id,caption\n1,a cat\n2,"a dog, asleep"\n3,\n4\n', ["a cat", "a dog, asleep"]),
        ("t.csv", 'caption\n"two\nlines"\n', ["two\nlines"]),
        ("t.tsv", "a cat\thttp:1\na dog, asleep\thttp:2\n\thttp:3\n", ["a cat", "a dog, asleep"]),
        ("captions", 'a "quoted" cat\n', ['a "quoted" cat']),
        ("empty.txt", "", []),
    ],
)  # fmt: skip
def test_texts_are_read_from_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(str(tmp_path / name)) == expected


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts.txt").write_text("a cat\n")
    assert read_texts("~/texts.txt") == ["a cat"]
    assert Reference(numbered(2), "~/texts.txt").texts == ["a cat"]


def test_imagenet_stands_for_its_thousand_classes():
    texts = read_texts("imagenet")
    assert len(texts) == 1000
    assert texts[0] == "a photo of a tench."


def test_no_such_file_and_no_such_column_say_what_is_expected(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"there is no file .*nowhere\.txt.*or 'imagenet'"):
        read_texts(str(tmp_path / "nowhere.txt"))
    (tmp_path / "t.csv").write_text("id,title\n1,a cat\n")
    with pytest.raises(UnsupportedSetup, match="has the columns id, title; expected caption"):
        read_texts(str(tmp_path / "t.csv"))
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(UnsupportedSetup, match="has the columns none; expected caption"):
        read_texts(str(tmp_path / "none.csv"))


def test_a_file_without_texts_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(UnsupportedSetup, match="no texts"):
        Reference(numbered(5), str(tmp_path / "blank.txt"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("marked.csv", "\ufeffcaption,id\na dog,1\n", ["a dog"]),
        ("marked.txt", "\ufeffa dog\na cat\u2028at night\n", ["a dog", "a cat\u2028at night"]),
        ("LOUD.CSV", 'caption\n"a dog,\nasleep"\n', ["a dog,\nasleep"]),
        ("LOUD.TSV", "a dog\thttp://x\n", ["a dog"]),
    ],
)
def test_files_as_office_programs_write_them(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(str(tmp_path / name)) == expected


def test_texts_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UnsupportedSetup, match=r"old\.txt cannot be read as UTF-8"):
        read_texts(str(tmp_path / "old.txt"))


def test_a_folder_is_no_image(tmp_path):
    (tmp_path / "set.png").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "set.png" / "a.png")
    assert [path.name for path in FolderImages(str(tmp_path), None).paths] == ["a.png"]
