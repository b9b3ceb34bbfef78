"""Texts become tokens: what is learned of them, how they are padded and divided, and files that cannot be."""

import pytest
import torch

from lightning_soup.data.texts import TextDataModule
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.texts import LETTERS, sums, write_lines, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:builtin type")
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def letters(text):
    return [3 + LETTERS.index(letter) for letter in text]


def batch_of(tmp_path, tokenizer, lines, **options):
    path = write_lines(tmp_path / "train.jsonl", lines)
    data = TextDataModule(str(path), tokenizer, val=str(path), **options)
    data.setup("fit")
    return next(iter(data.val_dataloader()))


def test_of_a_prompt_nothing_is_learned(tmp_path, tokenizer):
    batch = batch_of(tmp_path, tokenizer, [{"prompt": "3+4=", "completion": "7"}, {"text": "ab"}])
    assert batch["input_ids"].tolist() == [[BOS, *letters("3+4=7"), EOS], [BOS, *letters("ab"), EOS, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    first = [-100] * 5 + [*letters("7"), EOS]
    assert batch["labels"].tolist() == [first, [BOS, *letters("ab"), EOS, -100, -100, -100]]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_long_texts_are_cut_and_those_with_nothing_left_are_left_out(tmp_path, tokenizer):
    lines = [{"text": "abcdefgh"}, {"prompt": "12345678", "completion": "9"}, {"prompt": "1", "completion": "2"}]
    with pytest.warns(UserWarning, match=r"1 of 3 texts are left out, .* first max_length=5 tokens"):
        batch = batch_of(tmp_path, tokenizer, lines, max_length=5)
    assert batch["input_ids"].tolist() == [[BOS, *letters("abcd")], [BOS, *letters("12"), EOS, EOS]]
    assert batch["labels"][1].tolist() == [-100, -100, *letters("2"), EOS, -100]


def test_a_pad_token_of_its_own(tmp_path):
    folder = str(write_tokenizer(tmp_path / "tokenizer", pad_token="<unk>"))
    batch = batch_of(tmp_path, folder, [{"text": "abc"}, {"text": "a"}])
    assert batch["input_ids"][1].tolist() == [BOS, *letters("a"), EOS, 0, 0]


def test_plain_lines_and_odd_separators(tmp_path, tokenizer):
    path = tmp_path / "train.txt"
    path.write_bytes("ab\r\n\n  \nc\u2028d\n".encode())
    data = TextDataModule(str(path), tokenizer, val=str(path))
    data.setup("validate")
    found = next(iter(data.val_dataloader()))["input_ids"].tolist()
    assert found == [[BOS, *letters("ab"), EOS, EOS], [BOS, *letters("c"), 0, *letters("d"), EOS]]


@pytest.mark.parametrize(("name", "line"), [("train.txt", "ab"), ("train.jsonl", '{"text": "ab"}')])
def test_a_mark_of_the_encoding_is_no_text(tmp_path, tokenizer, name, line):
    path = tmp_path / name
    path.write_text(f"{line}\n", encoding="utf-8-sig")
    data = TextDataModule(str(path), tokenizer, val=str(path))
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["input_ids"].tolist() == [[BOS, *letters("ab"), EOS]]


def test_a_share_is_held_out_by_the_seed(tmp_path, tokenizer):
    path = write_lines(tmp_path / "train.jsonl", [{"text": letter} for letter in LETTERS[:20]])

    def parts(**options):
        data = TextDataModule(str(path), tokenizer, val_fraction=0.25, batch_size=20, **options)
        data.setup("fit")
        data.setup("fit")
        loaders = data.train_dataloader(), data.val_dataloader()
        return [sorted(next(iter(loader))["input_ids"][:, 1].tolist()) for loader in loaders]

    train, held_out = parts()
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == sorted(letters(LETTERS[:20]))
    assert parts() == [train, held_out]
    assert parts(seed=1)[1] != held_out


def test_test_texts(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", sums(4))
    data = TextDataModule(str(path), tokenizer, test=str(path), batch_size=4)
    data.setup("test")
    assert len(next(iter(data.test_dataloader()))["labels"]) == 4
    with pytest.raises(UnsupportedSetup, match="no test texts"):
        TextDataModule(str(path), tokenizer).test_dataloader()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no lines"),
        (b" \n\n", "has no lines"),
        (b'{"text": "a"}\n\ntext\n', r"line 3: is no JSON .*Name the file .txt"),
        (b'{"text": "a"}\n{"prompt": "a"}\n', r"line 2: expected .*found .*prompt"),
        (b"[1]\n", "line 1: expected"),
        (b'{"text": 3}\n', "line 1: expected"),
        (b"\xff\xfe\n", "cannot be read as text"),
        (b'{"prompt": "abcdefghi", "completion": "a"}\n', r"no text has anything to learn within max_length=4"),
        (b'{"text": "a"}\n', "val_fraction: A split of 1 samples at fraction 0.1 .* Give val, more texts"),
        (b'{"text": "a"}\n' * 4, "val_fraction: A split of 4 samples at fraction 0.1 .* Give val, more texts"),
        (b'{"text": "a"}\n{"prompt": "\\ud83d", "completion": "a"}\n', "line 2: holds half a character"),
    ],
)
def test_files_that_cannot_be(tmp_path, tokenizer, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UnsupportedSetup, match=rf"a\.jsonl.*{message}"):
        TextDataModule(str(tmp_path / "a.jsonl"), tokenizer, max_length=4).setup("fit")


def test_what_else_cannot_be(tmp_path, tokenizer):
    with pytest.raises(UnsupportedSetup, match=r"nowhere.jsonl: cannot be read"):
        TextDataModule(str(tmp_path / "nowhere.jsonl"), tokenizer).setup("fit")
    path = write_lines(tmp_path / "a.jsonl", sums(4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedSetup, match=r"tokenizer=.*empty.*finds no tokenizer"):
        TextDataModule(str(path), str(tmp_path / "empty")).setup("fit")
    for options in ({"batch_size": 0}, {"num_workers": -1}, {"max_length": 1}, {"val_fraction": 1.0}):
        with pytest.raises(UnsupportedSetup, match=next(iter(options))):
            TextDataModule(str(path), tokenizer, **options)
