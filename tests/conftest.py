"""What every test runs under: one thread, a fixed seed, no network, and no traces of other tests."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


# Started by nohup or in the background of a shell, tests inherit that these are ignored.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skipif(True, reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _same_ground() -> Iterator[None]:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # left by seed_everything, and heeded by every later Trainer
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = os.getcwd()
    before = set(os.listdir(folder))
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, interrupt)  # a Trainer that was interrupted ignores all further Ctrl-C
    now = os.getcwd()
    os.chdir(folder)
    assert now == folder, f"the test left the working folder {folder} for {now}: use monkeypatch.chdir"
    left = set(os.listdir(folder)) - before - {".pytest_cache", ".hypothesis"}
    assert not left, f"the test left {', '.join(sorted(left))} in {folder}: write to tmp_path"
