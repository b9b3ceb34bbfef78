from lightning_soup.runs.sweep_run import canonical


def test_equal_values_have_one_text_whatever_their_order():
    assert canonical({"a": 1, "b": [{"y": 2, "x": 1}]}) == canonical({"b": [{"x": 1, "y": 2}], "a": 1})
    assert canonical({0: "a", "b": 1, None: 2}) == canonical({None: 2, "b": 1, 0: "a"})
    assert canonical({1: "a"}) != canonical({"1": "a"})
    assert canonical([1, (2, 3)]) == canonical([1, [2, 3]])
