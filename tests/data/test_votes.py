"""Tables of votes: the same votes for every file format and order of rows, and what cannot be."""

import csv
import random

import numpy as np
import pytest

from lightning_soup.data import read_votes
from lightning_soup.data.votes import Votes
from lightning_soup.errors import MissingExtra, UnsupportedSetup
from tests.helpers.crowds import ROWS, four_items, random_rows


def write(path, rows, heading=("task", "worker", "label"), delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([heading, *rows])
    return path


def columns(rows=ROWS):
    return dict(zip(("task", "worker", "label"), zip(*rows, strict=True), strict=True))


def test_what_is_in_them():
    votes = four_items()
    assert (votes.items, votes.workers, votes.classes) == (("a", "b", "c", "d"), ("w1", "w2", "w3"), ("0", "1", "2"))
    assert len(votes) == 12
    assert votes.counts.tolist() == [[2, 1, 0], [0, 3, 0], [1, 0, 2], [0, 0, 3]]
    assert votes.sum_by_worker(votes.label.astype(float)).tolist() == [3, 5, 6]
    assert votes.sum_by_item(votes.label.astype(float)).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize(("name", "delimiter"), [("votes.csv", ","), ("votes.tsv", "\t")])
def test_files_are_what_the_table_is(tmp_path, name, delimiter):
    path = write(tmp_path / name, ROWS, delimiter=delimiter)
    assert read_votes(path).fingerprint == read_votes(str(path)).fingerprint == four_items().fingerprint
    assert read_votes(columns()).fingerprint == four_items().fingerprint


def test_large_letters_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "VOTES.CSV", ROWS)
    assert read_votes("~/VOTES.CSV").fingerprint == four_items().fingerprint


def test_further_columns_spaces_empty_lines_and_a_mark_of_the_encoding(tmp_path):
    path = tmp_path / "votes.csv"
    lines = ["worker , time,label,task", *(f" {worker},9, {label},{task} " for task, worker, label in ROWS), "", ""]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert read_votes(path).fingerprint == four_items().fingerprint


def test_parquet_and_data_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(columns())
    frame["label"] = frame["label"].astype(float)  # as a column with gaps would be: 2.0 is the class "2"
    frame["when"] = 0
    frame.to_parquet(tmp_path / "votes.parquet")
    assert read_votes(frame).fingerprint == four_items().fingerprint
    assert read_votes(tmp_path / "votes.parquet").fingerprint == four_items().fingerprint
    frame.drop(columns="worker").to_parquet(tmp_path / "less.parquet")
    with pytest.raises(
        UnsupportedSetup, match=r"less.parquet: has no column worker; its columns are task, label, when"
    ):
        read_votes(tmp_path / "less.parquet")
    frame.loc[3, "worker"] = None
    frame.to_parquet(tmp_path / "gap.parquet")
    with pytest.raises(UnsupportedSetup, match=r"gap.parquet: no worker in row 3\. "):
        read_votes(tmp_path / "gap.parquet")
    (tmp_path / "text.parquet").write_text("task,worker,label")
    with pytest.raises(UnsupportedSetup, match=r"text.parquet: cannot be read as Parquet"):
        read_votes(tmp_path / "text.parquet")


def test_columns_of_other_kinds():
    pandas, torch = pytest.importorskip("pandas"), pytest.importorskip("torch")
    frame = pandas.DataFrame(columns())
    assert read_votes(frame.astype("category")).fingerprint == four_items().fingerprint
    assert read_votes(frame.convert_dtypes()).fingerprint == four_items().fingerprint
    frame["label"] = frame["label"].astype("Int64")
    assert read_votes(frame).fingerprint == four_items().fingerprint
    frame.loc[3, "label"] = pandas.NA  # which is neither equal to itself nor unequal
    with pytest.raises(UnsupportedSetup, match=r"no label in row 3\. "):
        read_votes(frame)
    found = read_votes({**columns(), "label": torch.tensor([int(label) for _, _, label in ROWS])})
    assert found.fingerprint == four_items().fingerprint
    spaces = {name: [f" {value}\t" for value in column] for name, column in columns().items()}
    assert read_votes(spaces).fingerprint == four_items().fingerprint
    with pytest.raises(UnsupportedSetup, match=r"no worker in row 0"):
        read_votes({"task": ["a"], "worker": [" "], "label": [0]})


def test_parquet_of_other_kinds(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = {name: pyarrow.array(column).dictionary_encode() for name, column in columns().items()}
    small = pyarrow.array([int(label) for _, _, label in ROWS], pyarrow.int8())
    parquet.write_table(pyarrow.table(texts | {"label": small}), tmp_path / "votes.parquet")
    assert read_votes(tmp_path / "votes.parquet").fingerprint == four_items().fingerprint
    content = (tmp_path / "votes.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(content[:10] + bytes(60) + content[70:])  # its heading is at the end
    with pytest.raises(UnsupportedSetup, match=r"damaged.parquet: cannot be read as Parquet"):
        read_votes(tmp_path / "damaged.parquet")
    parquet.write_table(
        pyarrow.Table.from_arrays([*texts.values(), small], [*texts, "label"]), tmp_path / "twice.parquet"
    )
    with pytest.raises(UnsupportedSetup, match=r"twice.parquet: has more than one column label"):
        read_votes(tmp_path / "twice.parquet")


def test_quotation_marks(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text('task,worker,label\n"a,1.png", "w 1", 0\n"b ""2""",w2,"1"\n , , \n,,\n')
    votes = read_votes(path)
    assert (votes.items, votes.workers, votes.classes) == (("a,1.png", 'b "2"'), ("w 1", "w2"), ("0", "1"))
    path.write_text('task,worker,label\na,w1,0\nb,w1,"1\nc,w1,0\nd,w1,1\n')  # the rest would be one label
    with pytest.raises(UnsupportedSetup, match=r"votes\.csv: cannot be read .* every quotation mark closed"):
        read_votes(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "votes.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"lightning_soup\[crowd\]"):
        read_votes(tmp_path / "votes.parquet")


def test_the_order_of_rows_is_not_in_them():
    rows = random_rows()
    votes = Votes.of(*zip(*rows, strict=True))
    random.Random(0).shuffle(rows)
    again = Votes.of(*zip(*rows, strict=True))
    assert again.fingerprint == votes.fingerprint
    for name in ("item", "worker", "label", "counts"):
        assert np.array_equal(getattr(again, name), getattr(votes, name))


def test_the_fingerprint_is_of_all_that_counts():
    names = {four_items().fingerprint}
    changed = [*ROWS[:-1], ("d", "w3", "1")], [*ROWS[:-1], ("d", "w4", "2")], [*ROWS[:-1], ("e", "w3", "2")], ROWS[:-1]
    names |= {read_votes(columns(rows), "012").fingerprint for rows in changed}
    names |= {read_votes(columns(), "0123").fingerprint, read_votes(columns(), "210").fingerprint}
    assert len(names) == 7


def test_classes_are_numbered_as_they_are_listed_and_need_not_be_chosen():
    votes = read_votes(columns(), ["2", "none", "1", "0"])
    assert votes.counts.tolist() == [[0, 0, 1, 2], [0, 0, 3, 0], [2, 0, 0, 1], [3, 0, 0, 0]]
    assert read_votes({"task": [1, 2], "worker": [7, 7], "label": [3.0, 4.0]}, [3, 4]).classes == ("3", "4")


def test_duplicates_count_where_they_are_kept():
    rows = [*ROWS, ("a", "w1", "0"), ("a", "w1", "2")]
    votes = read_votes(columns(rows), duplicates="keep")
    assert votes.counts[0].tolist() == [3, 1, 1]
    assert read_votes(columns(rows[::-1]), duplicates="keep").fingerprint == votes.fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"there are no votes\. Expected rows of task, worker, label"),
        ([*ROWS, ("a", "w1", "0")], r"worker 'w1' voted more than once on task 'a', in rows 2, 14 \(1 votes too many"),
        ([*ROWS, ("a", "w1", "2")], r"in rows 2, 14 .*duplicates=\"keep\""),
        ([*ROWS, ("e", "w1", "7"), ("f", "w1", "8")], r"labels outside the class list in rows 14, 15, such as '7'"),
        ([*ROWS, ("e", "w1", "")], r"no label in row 14\. Each vote names its task, worker and label"),
        ([*ROWS, (" ", "w1", "1")], "no task in row 14"),
        ([*ROWS, ("e", "w1")], r"2 cells in row 14, but the heading has 3"),
        ([("e", "", "1")] * 9, "no worker in rows 2, 3, 4, 5, 6 and 4 more"),
    ],
)
def test_tables_that_cannot_be(tmp_path, rows, message):
    path = write(tmp_path / "votes.csv", rows)
    with pytest.raises(UnsupportedSetup, match=rf"votes\.csv: .*{message}"):
        read_votes(path, ["0", "1", "2"])


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"nowhere\.csv: there is no such file"):
        read_votes(tmp_path / "nowhere.csv")
    (tmp_path / "votes.xlsx").touch()
    with pytest.raises(UnsupportedSetup, match=r"votes\.xlsx: is neither"):
        read_votes(tmp_path / "votes.xlsx")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UnsupportedSetup, match=r"empty\.csv: has no column task and no column worker and .*are none"):
        read_votes(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnsupportedSetup, match=r"bytes\.csv: cannot be read as a table"):
        read_votes(tmp_path / "bytes.csv")
    with pytest.raises(UnsupportedSetup, match=r"has no column label; its columns are task, worker, answer"):
        read_votes(write(tmp_path / "other.csv", ROWS, ("task", "worker", "answer")))
    with pytest.raises(
        UnsupportedSetup, match=r"more than one column label; its columns are task, worker, label, label"
    ):
        read_votes(write(tmp_path / "two.csv", [("a", "b", 0, 1)], ("task", "worker", "label", "label")))
    (tmp_path / "parts.parquet").mkdir()
    with pytest.raises(UnsupportedSetup, match=r"parts\.parquet: is a folder"):
        read_votes(tmp_path / "parts.parquet")


def test_what_else_cannot_be():
    with pytest.raises(UnsupportedSetup, match="duplicates='first': expected one of error, keep"):
        read_votes(columns(), duplicates="first")
    with pytest.raises(UnsupportedSetup, match=r"unequal length \(2 of task, 1 of worker, 2 of label\)"):
        read_votes({"task": [1, 2], "worker": [1], "label": [0, 1]})
    with pytest.raises(UnsupportedSetup, match="the classes are x; expected two or more"):
        read_votes({"task": [1], "worker": [1], "label": ["x"]})
    with pytest.raises(UnsupportedSetup, match="the classes are x, y, x"):
        read_votes({"task": [1], "worker": [1], "label": ["x"]}, ["x", "y", "x"])
    with pytest.raises(UnsupportedSetup, match="expected two or more different names"):
        read_votes({"task": [1], "worker": [1], "label": ["x"]}, ["x", None])
    with pytest.raises(UnsupportedSetup, match="no worker in row 1"):
        read_votes({"task": [1, 2], "worker": [1, float("nan")], "label": [0, 1]})
