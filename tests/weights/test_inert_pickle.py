"""Nothing in a file is ever run. Each attack would leave a file behind if it were."""

import argparse
import os
import pickle
import sys
import types

import pytest
import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.inert_pickle import Placeholder, load_inert, pickle_end
from lightning_soup.weights.torch_records import BUILDERS
from tests.helpers.weights import assert_same, every_type, with_pickle

# Opcodes by hand, since a pickler would refuse to write most of these.


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def called(function, *arguments):
    return (named(function) if isinstance(function, str) else function) + b"(" + b"".join(arguments) + b"tR"


def attacks(mark):
    shell, code = text(f"touch {mark}"), text(f"open({str(mark)!r}, 'w').close()")
    partial = called("functools.partial", named("posix.system"), shell)
    inner = pickle.dumps(Calls(os.system, f"touch {mark}"), 0).decode()
    load = called("_codecs.encode", text(inner), text("latin1"))
    return {
        "os.system": called("posix.system", shell),
        "nt spelling": called("os.system", shell),
        "subprocess": called("subprocess.call", b"(", text("touch"), text(str(mark)), b"l"),
        "eval": called("builtins.eval", code),
        "eval of python 2": called("__builtin__.eval", code),
        "exec": called("builtins.exec", code),
        "open": called("builtins.open", text(str(mark)), text("w")),
        "mkdir": called("os.mkdir", text(str(mark))),
        "getattr": called(
            called("builtins.getattr", called("importlib.import_module", text("os")), text("system")), shell
        ),
        "partial": called(partial),
        "methodcaller": called(
            called("operator.methodcaller", text("system"), shell), called("builtins.__import__", text("os"))
        ),
        "map": called("builtins.list", called("builtins.map", named("os.system"), b"(", shell, b"l")),
        "pickle.loads": called("_pickle.loads", load),
        "load from bytes": called("torch.storage._load_from_bytes", load),
        "instance": b"(" + shell + b"iposix\nsystem\n",
        "object": b"(" + named("posix.system") + shell + b"o",
        "new": named("subprocess.Popen") + b"(" + text(f"touch {mark}") + b"t\x81",
        "attributes": called("types.SimpleNamespace") + b"}" + text("x") + called("posix.system", shell) + b"sb",
        "stack global": text("posix") + text("system") + b"\x93(" + shell + b"tR",
        "dotted name": text("functools") + text("partial.__call__") + b"\x93(" + partial + b"tR",
    }


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("attack", attacks("mark"))
def test_the_interpreter_runs_it_and_we_do_not(tmp_path, attack):
    mark = tmp_path / "mark"
    stream = attacks(mark)[attack]
    hparams = b"}(" + text("lr") + b"K\x05" + text("x") + stream + b"u"
    content = b"\x80\x04}(" + text("hyper_parameters") + hparams + text("state_dict") + b"}u."
    with pytest.raises(UnreadableCheckpoint, match="no weights found"):
        open_checkpoint(with_pickle(tmp_path / "a.ckpt", content))
    with pytest.raises(UnreadableCheckpoint, match="holds one object"):
        open_checkpoint(with_pickle(tmp_path / "a.ckpt", b"\x80\x04" + stream + b"."))
    assert not mark.exists()
    if attack not in ("new", "load from bytes", "dotted name"):  # those need more than this to succeed
        found = pickle.loads(b"\x80\x02" + stream + b".")
        getattr(found, "close", bool)()
        assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hyperparameters_that_attack_do_not_keep_the_weights_from_opening(tmp_path, zipped):
    mark = tmp_path / "mark"
    attack = Calls(os.system, f"touch {mark}")
    weights = every_type()
    hparams = {"lr": 0.5, "evil": attack, "nested": [{"deep": attack}]}
    content = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights,
        "hyper_parameters": hparams,
        "optimizer_states": [attack],
        "callbacks": {"Evil": attack},
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(tmp_path / "a.ckpt")
    assert_same(dict(opened), weights)
    assert not mark.exists()
    assert opened.metadata["hyper_parameters"] == {"lr": 0.5, "nested": [{}]}
    assert set(opened.dropped) == {"hyper_parameters.evil", "hyper_parameters.nested[0].deep", "callbacks.Evil"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_that_attacks_is_refused(tmp_path, zipped):
    mark = tmp_path / "mark"
    torch.save(
        {"w": torch.ones(2), "x": Calls(os.system, f"touch {mark}")},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UnreadableCheckpoint, match=r"'x' is a posix\.system"):
        open_checkpoint(tmp_path / "a.pt")
    assert not mark.exists()


def test_torch_load_is_not_used(tmp_path, monkeypatch):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("torch.load", "torch.jit.load", "torch.serialization._load", "pickle.load", "pickle.loads"):
        monkeypatch.setattr(name, None)
    assert open_checkpoint(tmp_path / "a.pt")["w"].tolist() == open_checkpoint(tmp_path / "b.pt")["w"].tolist()


def test_classes_that_cannot_be_imported_any_more(tmp_path):
    gone = types.ModuleType("gone_project")

    class Config(argparse.Namespace):
        pass

    class Schedule(list):
        pass

    class Settings(dict):
        pass

    for kind in (Config, Schedule, Settings):
        kind.__module__, kind.__qualname__ = "gone_project", kind.__name__
        setattr(gone, kind.__name__, kind)
    sys.modules["gone_project"] = gone
    try:
        hparams = {"config": Config(lr=1), "schedule": Schedule([1, 2]), "settings": Settings(depth=3), "epochs": 5}
        content = {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {"w": torch.ones(2)},
            "hyper_parameters": hparams,
        }
        torch.save(content, tmp_path / "a.ckpt")
    finally:
        del sys.modules["gone_project"]
    opened = open_checkpoint(tmp_path / "a.ckpt")
    assert opened.metadata["hyper_parameters"] == {"settings": {"depth": 3}, "epochs": 5}
    assert opened.dropped == ("hyper_parameters.config", "hyper_parameters.schedule")


def test_a_pickle_cannot_change_what_later_files_mean(tmp_path):
    """BUILD sets attributes of any object that the pickle has met: here it would make float32 files read as float64."""
    honest = tmp_path / "honest.pt"
    torch.save({"w": torch.ones(4)}, honest)
    targets = [
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nfloat32\n",
        b"cbuiltins\ncomplex\n",
        b"cnumpy\ndtype\n",
    ]
    states = [
        b"}X\x05\0\0\0dtypectorch\nfloat64\ns",
        b"N}X\x05\0\0\0dtypectorch\nfloat64\ns\x86",
        b"N}X\x09\0\0\0_functionccollections\nOrderedDict\ns\x86",
    ]
    for target in targets:
        for state in states:
            path = with_pickle(tmp_path / "evil.pt", b"\x80\x02" + target + state + b"b.")
            with pytest.raises(UnreadableCheckpoint):
                open_checkpoint(path)
            assert open_checkpoint(honest)["w"].tolist() == [1, 1, 1, 1]


def test_sizes_that_lie_lead_to_no_allocation(tmp_path):
    """Each stream makes the interpreter's own unpickler allocate gigabytes, or fail in its own way."""
    for stream in (
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of 2**32 entries
        b"\x80\x02]p4294967295\n.",
        b"\x80\x04B\xff\xff\xff\x7fabc.",  # bytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00abc.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00abc.",  # bytearray
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # text
        b"\x80\x02\x8b\xff\xff\xff\x7fabc.",  # integer
        b"\x80\x02T\xff\xff\xff\xffabc.",  # negative size
        b"\x80\x02]",  # no end
        b"\x80\x02cabc",  # no line end
        b"\xff.",
        b"",
    ):
        with pytest.raises(pickle.UnpicklingError):
            pickle_end(stream)
        with pytest.raises(UnreadableCheckpoint):
            open_checkpoint(with_pickle(tmp_path / "a.pt", stream))


@pytest.mark.parametrize("protocol", range(6))
def test_the_end_of_true_pickles_is_found(protocol):
    value = {"a": [1, 2.5, None, True, "ü" * 300, b"\0" * 300, 10**30, -5, (1, 2), {3}, 1 + 2j], "b": {"c": range(3)}}
    value["many"] = [[i] for i in range(400)]  # more than 256 objects need long memo indices
    stream = pickle.dumps(value, protocol)
    assert pickle_end(b"xx" + stream + b"rest", 2) == len(stream) + 2
    found = load_inert(stream, BUILDERS, lambda pid: pid)
    assert found["a"][:9] == value["a"][:9]
    assert found["many"] == value["many"]


def test_placeholders_do_nothing():
    placeholder = Placeholder(1, a=2)
    assert placeholder() is placeholder
    placeholder.append(1)
    placeholder.extend([1])
    placeholder.add(1)
    assert placeholder == placeholder
    assert placeholder != Placeholder()
    assert {placeholder: 1}
    assert not placeholder
