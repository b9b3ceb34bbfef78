"""The sweep command on Ray itself; what needs no cluster is in test_sweep_engine.py and tests/runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonargparse import auto_cli

from lightning_soup.cli.sweep import sweep
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.weights import open_checkpoint
from tests.helpers.sweeps import base_config, is_running, write_yaml

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves pipes to its processes open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MODULE = """
import os
import signal
import time
from pathlib import Path

from tests.helpers.boring import TinyClassifier


class Mine(TinyClassifier):
    '''Appends a line to `starts` for each training; diverges, dies once or waits by its learning rate.'''

    def on_fit_start(self):
        with open("starts", "a") as file:
            file.write(f"{self.hparams.lr} {os.getpid()}\\n")
        print("threads:", os.environ["OMP_NUM_THREADS"])
        if self.hparams.lr == 5.0:
            raise FloatingPointError("the loss is NaN; lower the learning rate")
        if self.hparams.lr == 6.0 and Path("starts").read_text().count("6.0 ") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hparams.lr == 7.0:
            time.sleep(300)
"""

MAIN = "from lightning_soup.cli.main import main; main()"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Give the command in a folder whose module the config names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    (tmp_path / "own_model.py").write_text(MODULE)
    base = base_config(max_epochs=1)
    base["model"] = {"class_path": "own_model.Mine"}
    write_yaml(tmp_path / "base.yaml", base)

    def run(*arguments, rates):
        write_yaml(tmp_path / "sweep.yaml", {"method": "grid", "parameters": {"model.lr": {"values": rates}}})
        return auto_cli(sweep, args=["base.yaml", "sweep.yaml", *arguments])

    return run


def starts():
    return [(float(lr), int(pid)) for lr, pid in map(str.split, Path("starts").read_text().splitlines())]


def weights(run):
    return {name: tensor.clone() for name, tensor in open_checkpoint(run.checkpoint).items()}


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_cluster_of_its_own(command, tmp_path, capfd):
    """Begun on this machine, gone on with on Ray: the same bits, records, failures and folders as in sequence."""
    rates = [0.01, 5.0, 6.0, 0.05]
    command("--folder=mixed", rates=rates[:1])
    with pytest.warns(UserWarning, match="002-.*: the process died before it finished .*; retry 1 of 1"):
        mixed = command("--folder=mixed", "--engine=ray", "--retries=1", rates=rates)
    assert (
        f"failed: {mixed.failed[0].folder} (model.lr=5): FloatingPointError: the loss is NaN" in capfd.readouterr().err
    )
    assert not ray.is_initialized()
    trained = [lr for lr, _ in starts()]
    assert sorted(trained) == sorted([0.01, 5.0, 6.0, 6.0, 0.05])  # a death is tried again, an error is not
    assert len({pid for _, pid in starts()} | {os.getpid()}) == 5
    here = command("--folder=here", rates=rates)
    assert [run.folder.name for run in mixed.runs] == [run.folder.name for run in here.runs]
    assert [run.index for run in mixed.finished] == [run.index for run in here.finished] == [0, 2, 3]
    for ours, theirs in zip(here.finished, mixed.finished, strict=True):
        a, b = weights(ours), weights(theirs)
        assert a
        assert all((a[name] == b[name]).all() for name in a)
        assert (ours.folder / "run.json").read_text() == (theirs.folder / "run.json").read_text()
    for run in mixed.runs[1:]:
        assert "threads: 1" in (run.folder / "log.txt").read_text()
    assert {path.name for run in mixed.finished[1:] for path in run.folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "log.txt",
        "run.json",
    }
    assert "FloatingPointError" in (mixed.failed[0].folder / "error.txt").read_text()
    before = len(starts())
    with pytest.raises(UnsupportedSetup, match=r"num_cpus is 1 and num_gpus is 1; expected what this machine has"):
        command("--folder=other", "--engine=ray", "--num_gpus=1", rates=[0.01])
    assert len(starts()) == before
    assert list((tmp_path / "other").iterdir()) == []
    assert not ray.is_initialized()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_command(command, tmp_path, stop):
    command(rates=[0.01])
    write_yaml(
        tmp_path / "sweep.yaml", {"method": "grid", "parameters": {"model.lr": {"values": [0.01, 7.0, 7.0, 7.0]}}}
    )
    (tmp_path / "starts").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sweep", "base.yaml", "sweep.yaml", "--engine=ray"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "starts").exists())
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert b"nothing half-written was left" in errors
    wait_for(lambda: not any(is_running(pid) for _, pid in starts()))
    assert [path.name[:3] for path in (tmp_path / "runs" / "sweep").iterdir()] == ["000"]


def test_a_cluster_that_vanishes(command, tmp_path):
    """Ray would end the command itself, with half-written runs left behind."""
    command(rates=[0.01])
    write_yaml(tmp_path / "sweep.yaml", {"method": "grid", "parameters": {"model.lr": {"values": [0.01, 7.0]}}})
    (tmp_path / "starts").unlink()
    soon = "from lightning_soup.runs import ray_cluster; ray_cluster._SECONDS_OF_SILENCE = 3.0; "
    process = subprocess.Popen(
        [sys.executable, "-c", soon + MAIN, "sweep", "base.yaml", "sweep.yaml", "--engine=ray"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "starts").exists())
    (head,) = (pid for pid in children(process.pid) if Path(f"/proc/{pid}/comm").read_text().strip() == "gcs_server")
    os.kill(head, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"the connection to the Ray cluster was lost: its head node at" in errors
    wait_for(lambda: not any(is_running(pid) for _, pid in starts()))
    assert [path.name[:3] for path in (tmp_path / "runs" / "sweep").iterdir()] == ["000"]


def children(pid):
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_a_cluster_that_exists(command, tmp_path, monkeypatch):
    """It is found, its nodes are looked at first, and it is left running."""
    from ray.cluster_utils import Cluster

    monkeypatch.chdir("/")  # workers start where Ray was started, and are sent where the command is given
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        monkeypatch.chdir(tmp_path)
        first = command("--engine=ray", f"--address={cluster.address}", rates=[0.01])
        assert command("--engine=ray", f"--address={cluster.address}", rates=[0.01, 0.05]).runs[:1] == first.runs
        assert [lr for lr, _ in starts()] == [0.01, 0.05]
        monkeypatch.setattr("lightning_soup.cli.sweep.fingerprint", own_process)
        with pytest.raises(UnsupportedSetup, match=r"has another version of the config.*folder.*engine local"):
            command("--engine=ray", f"--address={cluster.address}", "--folder=other", rates=[0.01])
        assert list((tmp_path / "other").iterdir()) == []
        assert len(cluster.list_all_nodes()) == 1
    finally:
        cluster.shutdown()


def own_process(*_):
    """In place of a fingerprint: other files on every machine."""
    return str(os.getpid())
