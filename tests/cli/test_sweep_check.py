import copy
import re

import pytest

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.sweeps import base_config, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # data of 100 samples


class Splitting(TinyData):
    def __init__(self, seed: int = 0, split_seed: int = 0, seeds: int = 0, batch_size: int = 16) -> None:
        super().__init__(batch_size)


class Strict(TinyClassifier):
    built = 0

    def __init__(self, width: int = 4, layers: list[int] | None = None, lr: float = 0.1) -> None:
        Strict.built += 1
        super().__init__(lr=lr)


@pytest.fixture
def config():
    content = base_config(callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_acc"}}])
    content["model"] = {"class_path": f"{__name__}.Strict", "init_args": {"lr": 0.05}}
    return content


def check(tmp_path, config, *settings):
    return check_settings(write_yaml(tmp_path / "base.yaml", config), tmp_path / "sweep.yaml", settings)[0]


def test_both_ways_to_name_an_option_reach_it_and_nothing_is_built(tmp_path, config):
    setting = {
        "model.lr": 0.2,
        "model.init_args.layers": [1, 2],
        "trainer.max_epochs": 3,
        "trainer.callbacks.monitor": "val_loss",
        "seed_everything": 9,
        "data.noise": 1e-05,
    }
    parsed = check(tmp_path, config, setting, {"model.lr": 7})
    assert parsed.model.init_args.lr == 0.2
    assert parsed.model.init_args.layers == [1, 2]
    assert parsed.trainer.max_epochs == 3
    assert parsed.trainer.callbacks[0].init_args.monitor == "val_loss"
    assert parsed.seed_everything == 9
    assert parsed.data.init_args.noise == 1e-05
    assert Strict.built == 0


def test_the_same_values_as_flags_of_the_wandb_agent(tmp_path, config):
    setting = {"model.lr": 0.00021, "model.layers": [3, 4], "trainer.deterministic": True, "data.batch_size": 8}
    ours = check(tmp_path, config, setting)
    agent = [f"--{name}={value}" for name, value in setting.items()]  # how the agent writes ${args}
    arguments = ["fit", "--config", str(tmp_path / "base.yaml"), *agent]
    config = SoupCLI([*arguments, "--trainer.max_epochs=0", f"--trainer.default_root_dir={tmp_path}"]).config.fit
    for part in ("model", "data"):
        assert config[part] == ours[part]
    assert config.trainer.deterministic is ours.trainer.deterministic is True


WRONG = [  # setting, what is said
    ({"model.lrr": 0.1}, r"there is no option model.lrr in .*base.yaml. Did you mean model.lr\b"),
    ({"model.init_args.lrr": 0.1}, r"there is no option model.init_args.lrr in .*Did you mean model.lr\b"),
    ({"lr": 0.1}, r"there is no option lr in "),
    ({"trainer.max_epoch": 1}, "there is no option trainer.max_epoch in .*Did you mean trainer.max_epochs"),
    ({"trainer.callbacks.monitr": "a"}, "there is no option trainer.callbacks.monitr in "),
    ({"optimiser.lr": 0.1}, "there is no option optimiser.lr in .*Did you mean optimizer"),
    ({"help": "x"}, "there is no option help in "),
    ({"model.lr": "high"}, "model.lr does not take 'high': Expected a <class 'float'>"),
    ({"model.width": 2.5}, "model.width does not take 2.5: Expected a <class 'int'>"),
    ({"model.layers": [1, "a"]}, r"model.layers does not take \[1, 'a'\]: Expected a <class 'int'>"),
    ({"trainer.max_epochs": "many"}, "trainer.max_epochs does not take 'many': Expected a <class 'int'>"),
    ({"model.lr": "x", "data.batchsize": 2}, "model.lr does not take 'x': .*; there is no option data.batchsize"),
    ({"model.lr": 1, "model.init_args.lr": 2}, "model.lr and model.init_args.lr are the same option"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG)
def test_wrong_parameters_are_named_with_the_file(tmp_path, config, setting, message):
    with pytest.raises(UnsupportedSetup, match=message) as error:
        check(tmp_path, config, setting)
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml"))


def test_every_setting_is_checked_not_only_the_first(tmp_path, config):
    with pytest.raises(UnsupportedSetup, match=r"model.width does not take 'wide'"):
        check(tmp_path, config, {"model.width": 1}, {"model.width": "wide"})


UNSUITED = [
    ({"ckpt_path": "old.ckpt"}, "has ckpt_path: old.ckpt.*checkpoint_path"),
    ({"trainer": {"fast_dev_run": True}}, "trainer.fast_dev_run saves no checkpoint"),
    ({"trainer": {"devices": 2}}, "has trainer.devices: 2 .*Set devices: 1"),
    ({"trainer": {"devices": [0, 1]}}, "has trainer.devices"),
    ({"trainer": {"devices": -1}}, "has trainer.devices"),
    ({"trainer": {"num_nodes": 2}}, "num_nodes: 2"),
    ({"trainer": {"devices": "few"}, "model": {"init_args": {"lr": "x"}}}, "not a config for `lightning-soup fit`"),
]


@pytest.mark.parametrize(("change", "message"), UNSUITED)
def test_base_configs_that_do_not_suit_a_sweep(tmp_path, config, change, message):
    changed = copy.deepcopy(config)
    for key, value in change.items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UnsupportedSetup, match=message) as error:
        check(tmp_path, changed, {"seed_everything": 1})
    assert str(error.value).startswith(str(tmp_path / "base.yaml"))


@pytest.mark.parametrize("devices", ["auto", 1, "1", [0]])
def test_one_device_is_fine(tmp_path, config, devices):
    config["trainer"]["devices"] = devices
    check(tmp_path, config, {"seed_everything": 1})


@pytest.fixture
def splitting(config):
    config["data"] = {"class_path": f"{__name__}.Splitting", "init_args": {}}
    return config


@pytest.mark.parametrize("name", ["data.seed", "data.init_args.split_seed"])
def test_a_sweep_over_the_seed_of_the_split_is_warned_of(tmp_path, splitting, name):
    settings = [{name: seed, "data.seeds": 1, "model.lr": 0.1 * (seed + 1)} for seed in range(3)]
    with pytest.warns(UserWarning, match="sweep.yaml: gives the data other seeds") as caught:
        check(tmp_path, splitting, *settings)
    assert [str(found.message).split("(")[1].split(")")[0] for found in caught] == [name]


def test_a_seed_in_a_group_of_options_is_warned_of(tmp_path, splitting):
    with pytest.warns(UserWarning, match=r"\(data.init_args.split_seed\)"):
        check(tmp_path, splitting, *({"data.init_args": {"split_seed": seed, "batch_size": 8}} for seed in (1, 2)))


def test_other_sweeps_are_not_warned_of(tmp_path, splitting):
    # pytest makes an error of every warning
    check(tmp_path, splitting, *({"data.split_seed": 3, "data.seeds": i, "seed_everything": i} for i in range(2)))
    check(tmp_path, splitting, {"data.split_seed": 3})


def test_missing_and_broken_base(tmp_path):
    with pytest.raises(UnsupportedSetup, match=re.escape("none.yaml: no such config for `lightning-soup fit`")):
        check_settings(tmp_path / "none.yaml", tmp_path / "sweep.yaml", [{}])
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "latin.yaml").write_bytes("model: für".encode("latin1"))
    (tmp_path / "list.yaml").write_text("- model")
    (tmp_path / "numbers.yaml").write_text("model: x\n1: y\n")
    for name, message in (
        ("broken.yaml", "not a config for"),
        ("latin.yaml", "not UTF-8 .*Save it as UTF-8"),
        ("list.yaml", "expected a mapping .* found a list"),
        ("numbers.yaml", "has the key 1; expected model, data"),
    ):
        with pytest.raises(UnsupportedSetup, match=rf"{name}: .*{message}"):
            check_settings(tmp_path / name, tmp_path / "sweep.yaml", [{"model.lr": 1}])
