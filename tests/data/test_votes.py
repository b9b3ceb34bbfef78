"""Tables of votes: what is read, and what is refused, with the row."""

import pytest

from lightning_soup.data.votes import Votes, read_votes
from lightning_soup.errors import UnsupportedSetup


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    path = write(tmp_path / "v.csv", "when,task,worker,label\n1,10,u,cat\n2,9,u,dog\n3,9,v, dog \n")
    votes = read_votes(path)
    assert votes.items == ("9", "10")  # numbers in their order
    assert votes.classes == ("cat", "dog")
    assert votes.counts.tolist() == [[0, 2], [1, 0]]
    assert read_votes(path, ["dog", "fish", "cat"]).counts.tolist() == [[2, 0, 0], [0, 0, 1]]
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + b"task,worker,label\na,u,0\na,v,1\n")
    assert read_votes(marked).items == ("a",)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"task": [3, 3, 4], "worker": ["u", "v", "u"], "label": [0, 1, 1]})
    parquet.write_table(table, tmp_path / "v.parquet")
    assert read_votes(tmp_path / "v.parquet").counts.tolist() == [[1, 1], [0, 1]]
    write(tmp_path / "bad.parquet", "no")
    with pytest.raises(UnsupportedSetup, match=r"bad\.parquet: is no parquet file"):
        read_votes(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column task, worker, label; found none"),
        ("task,worker\na,u\n", "has no column label; found task, worker"),
        ("task,worker,label\n", r"has no votes; expected rows with task, worker, label"),
        ("task,worker,label\na,u,0\na,u,1\n", r"vote 2: 'u' votes on 'a' a second time \('0', then '1'\)"),
        ("task,worker,label\na,u,0\nb,u,\n", r"vote 2: \('b', 'u', ''\) has an empty field"),
        ("task,worker,label\na,u,0\nb,u,0\n", r"the classes are \['0'\]; expected two or more"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(UnsupportedSetup, match=message):
        read_votes(write(tmp_path / "v.csv", text))


def test_labels_outside_the_classes(tmp_path):
    path = write(tmp_path / "v.csv", "task,worker,label\na,u,cat\na,v,dgo\n")
    with pytest.raises(UnsupportedSetup, match=r"v\.csv, vote 2: the label 'dgo' is none of the classes cat, dog"):
        read_votes(path, ["cat", "dog"])
    with pytest.raises(UnsupportedSetup, match="all different"):
        Votes.of([("a", "u", 0)], classes=["0", "0"])


def test_no_file(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"none\.csv: cannot be read as a table of votes"):
        read_votes(tmp_path / "none.csv")
