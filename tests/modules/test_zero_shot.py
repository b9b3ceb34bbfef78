import pytest
import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.zero_shot import (
    evaluating,
    fill,
    mean_embeddings,
    read_classnames,
    read_templates,
    zero_shot_head,
)

A, B = [[3.0, 4.0], [4.0, 3.0]], [[1.0, 0.0], [-6.0, 8.0]]


class Table(nn.Module):
    """A text tower that looks its texts up; dropout shows whether it is in evaluation mode."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.calls: list[int] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        return nn.functional.dropout(self.rows[tokens[:, 0]], 0.9, self.training)


def table(rows):
    model = Table(torch.tensor(rows, dtype=torch.float64).flatten(0, 1))
    return model, lambda texts: torch.tensor([[int(text)] for text in texts])


def test_g5_zero_shot_head():
    model, tokenize = table([A, B])
    # class names are the first digit of their two texts, templates add the second
    tokenize_pairs = {"A0": "0", "A1": "1", "B0": "2", "B1": "3"}
    rows = zero_shot_head(model, lambda texts: tokenize([tokenize_pairs[t] for t in texts]), ["A", "B"], ["{}0", "{}1"])
    head = 100 * rows.detach()
    expected = torch.tensor(
        [[70.71067811865476, 70.71067811865476], [44.721359549995796, 89.44271909999159]], dtype=torch.float64
    )
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-12)
    image = nn.functional.normalize(torch.tensor([2.0, 0.0], dtype=torch.float64), dim=0)
    torch.testing.assert_close(head @ image, expected[:, 0], rtol=0, atol=1e-12)
    wrong = 100 * nn.functional.normalize(torch.tensor(B, dtype=torch.float64).mean(0), dim=0)
    assert wrong.tolist() == pytest.approx([-52.999894, 84.799830], abs=1e-6)  # of texts not normalised: the trap


def test_many_classes_are_encoded_in_parts_of_whole_classes(monkeypatch):
    monkeypatch.setattr("lightning_soup.modules.zero_shot._TEXTS_AT_ONCE", 5)
    torch.manual_seed(0)
    rows = torch.randn(7, 2, 4).tolist()
    model, tokenize = table(rows)
    names = [str(i) for i in range(7)]
    head = zero_shot_head(
        model, lambda texts: tokenize([str(2 * int(t[1:]) + int(t[0])) for t in texts]), names, ["0{}", "1{}"]
    )
    torch.testing.assert_close(head.detach(), mean_embeddings(torch.tensor(rows, dtype=torch.float64)))
    assert model.calls == [4, 4, 4, 2]
    assert model.training  # left as it was
    head.sum().backward()
    assert model.rows.grad is not None


def test_the_model_is_left_as_it_was_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()

    def use():
        with evaluating(model):
            assert not any(part.training for part in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert [part.training for part in model.modules()] == [True, True, False, False]


@pytest.mark.parametrize(("name", "count"), [("openai", 80), ("simple", 7)])
def test_templates_of_open_clip(name, count):
    templates = read_templates(name)
    assert len(templates) == count
    assert all(template.count("{}") == 1 for template in templates)
    assert "itap of a {}." in templates


def test_own_templates():
    assert read_templates("a photo of a {}.") == ["a photo of a {}."]
    assert read_templates(["a {}", "the {}"]) == ["a {}", "the {}"]
    assert fill(["cat", "{dog}"], ["a {}", "{} {}"]) == ["a cat", "cat cat", "a {dog}", "{dog} {dog}"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("imagenet", r"templates='imagenet': expected 'openai', 'simple', or sentences with \{\}"),
        (["a {}", "a photo"], r"The template 'a photo' has no \{\}: it would be the same sentence for every class"),
        ([], r"templates is empty\. Give at least one sentence"),
        ([7], r"The template 7 has no \{\}"),
    ],
)
def test_templates_that_cannot_work(templates, message):
    with pytest.raises(UnsupportedSetup, match=message):
        read_templates(templates)


def test_class_names_from_files_and_folders(tmp_path):
    (tmp_path / "names.txt").write_text("great white shark\n crane (bird) \n\n", encoding="utf-8")
    assert read_classnames(str(tmp_path / "names.txt")) == ["great white shark", "crane (bird)"]
    for name in ("polar_bear", "ant"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert read_classnames(str(tmp_path / "train")) == ["ant", "polar bear"]
    assert read_classnames(("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("classnames", "message"),
    [
        ([], r"classnames: expected the names of at least two classes, got 0 \(none\)"),
        (["cat"], r"got 1 \(cat\)"),
        (["cat", " "], r"the name of class 1 is ' '"),
        (["cat", 3], r"the name of class 1 is 3"),
        ({"cat", "dog"}, r"classnames is a set\. Expected a list"),
        ("cat, dog", r"classnames='cat, dog': there is no such file"),
    ],
)
def test_class_names_that_cannot_work(classnames, message):
    with pytest.raises(UnsupportedSetup, match=message):
        read_classnames(classnames)


def test_classes_of_one_name_are_pointed_out():
    with pytest.warns(UserWarning, match=r"several classes have one name \(crane\)"):
        assert read_classnames(["crane", "dog", "crane"]) == ["crane", "dog", "crane"]


def test_the_names_of_imagenet():
    names = read_classnames("imagenet")  # two of them come twice in the list of CLIP's authors
    assert len(names) == 1000
    assert names[:2] == ["tench", "goldfish"]


def test_an_empty_file_of_class_names(tmp_path):
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(UnsupportedSetup, match=r"names\.txt: expected the names of at least two classes, got 0"):
        read_classnames(str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(UnsupportedSetup, match=r"names\.txt: the name of class 1 is ''"):
        read_classnames(str(tmp_path / "names.txt"))


def test_classes_that_become_the_same_tokens():
    model, _ = table([A, B])
    with pytest.raises(UnsupportedSetup, match=r"The classes 'a' and 'b' become the same tokens.*cut after 1 tokens"):
        zero_shot_head(model, lambda texts: torch.zeros(len(texts), 1, dtype=torch.long), ["a", "b"], ["{}"])
    with pytest.raises(UnsupportedSetup, match="no class names"):
        zero_shot_head(model, lambda texts: None, [], ["{}"])


def test_files_of_class_names_from_other_editors(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcafé\r\ndog\r\n".encode())
    assert read_classnames(str(path)) == ["café", "dog"]
    path.write_bytes("café\ndog\n".encode("latin-1"))
    with pytest.raises(UnsupportedSetup, match=r"names\.txt is not UTF-8 \(invalid continuation byte at byte 3\)"):
        read_classnames(str(path))
