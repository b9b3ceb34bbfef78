"""Stand-ins for trainings, light enough to be spawned in a test, and base configs for real ones."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from lightning_soup.runs.sweep_run import Trained


def fake_training(setting, folder, seed, calls=None):
    """Do what the setting says, and append a line to `calls` for every start.

    `do`: finish (default), fail, interrupt, exit, die (by SIGKILL), hang, or hang and refuse to be stopped.
    """
    if calls is not None:
        line = {"seed": seed, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        if "torch" in sys.modules:
            line["torch threads"] = sys.modules["torch"].get_num_threads()
        with open(calls, "a") as file:
            file.write(json.dumps(line) + "\n")
    print("training", setting)
    checkpoint = folder / "checkpoints" / "weights.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text(f"{setting} {seed}")
    match setting.get("do", "finish"):
        case "fail":
            raise RuntimeError("the loss became NaN\nin epoch 3")
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            sys.exit(7)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(60)
        case "hang on":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / "deaf").touch()
            time.sleep(60)
        case "wait for the deaf":
            while not list(folder.parent.glob("*/deaf")):
                time.sleep(0.01)
    return Trained({"val_acc": seed / 10}, checkpoint)


def starts(calls):
    """The lines that `fake_training` wrote."""
    return [json.loads(line) for line in Path(calls).read_text().splitlines()] if Path(calls).exists() else []


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def base_config(model=None, data=None, **trainer):
    """A config of half a second for `lightning-soup fit`."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {
        "model": {"class_path": "tests.helpers.boring.TinyClassifier", "init_args": model or {}},
        "data": {"class_path": "tests.helpers.boring.TinyData", "init_args": data or {}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", **quiet, **trainer},
    }
