import torch

from lightning_soup.weights.inert_pickle import Placeholder
from lightning_soup.weights.plain_values import plain_values


def test_plain_values_are_kept_and_the_rest_is_named():
    content = {
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.99), "net": Placeholder(), "names": ["a", None, {1}]},
        "dtype": torch.float32,
        "optimizer_states": [{"big": Placeholder()}],
        5: {6: True},
    }
    plain, dropped = plain_values(content)
    assert plain == {
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.99), "names": ["a", None]},
        5: {6: True},
    }
    assert dropped == ["hyper_parameters.net", "hyper_parameters.names[2]", "dtype"]


def test_a_filled_placeholder_is_a_dictionary():
    placeholder = Placeholder()
    placeholder["lr"] = 0.1
    assert plain_values({"hparams": placeholder}) == ({"hparams": {"lr": 0.1}}, [])
    assert type(plain_values({"hparams": placeholder})[0]["hparams"]) is dict


def test_structures_that_hold_themselves_end():
    loop = {"a": 1}
    loop["self"] = loop
    ring = [2]
    ring.append(ring)
    plain, dropped = plain_values({"loop": loop, "ring": ring})
    assert plain == {"loop": {"a": 1}, "ring": [2]}
    assert dropped == ["loop.self", "ring[1]"]


def test_depth_and_repetition_are_bounded():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    plain, dropped = plain_values({"deep": deep})
    assert len(dropped) == 1
    assert dropped[0].startswith("deep[0][0]")
    laughs = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    plain, dropped = plain_values({"laughs": laughs, "few": laughs[0][0], "lr": 0.1})
    assert len(repr(plain)) < 2_000_000
    assert dropped
    assert plain["lr"] == 0.1


def test_what_stands_in_many_places_stays_shared_and_is_kept():
    shared = list(range(1000))
    plain, dropped = plain_values({"a": [shared] * 50, "b": {"c": shared}})
    assert plain == {"a": [shared] * 50, "b": {"c": shared}}
    assert plain["a"][0] is plain["a"][49] is plain["b"]["c"]
    assert not dropped
