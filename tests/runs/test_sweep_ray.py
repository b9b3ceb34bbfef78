"""What becomes of a sweep by what Ray says of its tasks; what needs Ray itself is in tests/cli/test_sweep_ray.py."""

from concurrent import futures
from types import SimpleNamespace

import pytest

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.runs import sweep_ray
from lightning_soup.runs.sweep_ray import RayCluster, RayTasks
from lightning_soup.runs.sweep_run import Task


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class RaySystemError(RayError):
    pass


class LocalRayletDiedError(RayError):
    pass


@pytest.fixture
def tasks(tmp_path):
    """The workers, with one task that was started."""
    found = RayTasks(RayCluster(), b"", tmp_path)
    errors = (RayError, RayTaskError, OutOfMemoryError, RaySystemError, LocalRayletDiedError)
    found._ray = SimpleNamespace(exceptions=SimpleNamespace(**{error.__name__: error for error in errors}))
    found.task, found.future = Task(0, tmp_path / "000", {}, 0), futures.Future()
    found._running[found.future] = (found.task, None)
    return found


def test_a_lost_worker_may_be_tried_again(tasks):
    tasks.future.set_exception(RayError("The worker died unexpectedly. Its log: ..."))
    (ended,) = tasks.wait()
    assert (ended.task, ended.died) == (tasks.task, True)
    assert ended.how == "died before it finished (The worker died unexpectedly)"


def test_a_task_that_raised_is_not_tried_again(tasks):
    tasks.future.set_exception(RayTaskError("Traceback:\n...\nTask: TaskID(1) was cancelled."))
    (ended,) = tasks.wait()
    assert not ended.died
    assert ended.how == "ended by Task: TaskID(1) was cancelled"


@pytest.mark.parametrize("error", [LocalRayletDiedError, RaySystemError])
def test_ray_that_can_do_nothing_more_ends_the_sweep(tasks, error):
    """Not as a death, with which all further tasks would end, their retries too."""
    tasks.future.set_exception(error("The task's local raylet died.\n"))
    with pytest.raises(LightningSoupError, match=r"lost: The task's local raylet died\. Finished runs are kept; give"):
        tasks.wait()


def test_a_cluster_that_vanishes_under_a_task_ends_the_sweep(tasks, monkeypatch):
    def feel():
        raise ConnectionError("its head node has not answered")

    monkeypatch.setattr(sweep_ray, "_SECONDS_BETWEEN_LOOKS", 0.01)
    tasks._pulse = SimpleNamespace(feel=feel)
    with pytest.raises(LightningSoupError, match=r"was lost: its head node has not answered\. Finished runs are kept"):
        tasks.wait()


def test_a_node_without_the_folder_of_a_task(tasks):
    tasks.future.set_result("node7")
    with pytest.raises(UnsupportedSetup) as error:
        tasks.wait()
    assert str(error.value).startswith(f"node7: this node of the Ray cluster does not see {tasks.task.folder} as this")
    assert str(error.value).endswith("If another sweep trains the same runs, let that end first.")


@pytest.mark.parametrize("connected", [True, False])
def test_a_lost_connection_is_not_made_anew_to_cancel_what_was_running(tasks, monkeypatch, connected):
    cancelled = []

    def cancel(ref, force):
        cancelled.append(force)
        if force:
            tasks.future.set_result(None)

    monkeypatch.setattr("lightning_soup.runs.sweep_workers.SECONDS_TO_STOP", 0.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tasks._ray.is_initialized, tasks._ray.cancel = lambda: connected, cancel
    tasks.__exit__()
    assert cancelled == ([False, True] if connected else [])
    assert not tasks._running
