"""Workers of a sweep that need no processes."""

import os

from lightning_soup.runs.sweep_run import attempt
from lightning_soup.runs.sweep_workers import Ended


class Stack:
    """Workers in this process: what was started last ends first. Some die, so many times each, half-way."""

    def __init__(self, dying=(), interrupted_after=99):
        self.dying, self.left = dict(dying), interrupted_after
        self.made, self.ended, self.found, self.open = 0, [], [], False

    def __call__(self, train, folder, tasks):
        self.made += 1
        self.train, self.started = train, []
        return self

    def __enter__(self):
        self.open = True
        return self

    def __exit__(self, *error):
        self.open = False

    def has_place(self):
        return len(self.started) < 2

    def start(self, task):
        assert self.open
        self.found.append(os.listdir(task.folder))
        self.started.append(task)

    def wait(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        task = self.started.pop()
        self.ended.append(task.index)
        if self.dying.get(task.index, 0):
            self.dying[task.index] -= 1
            (task.folder / "checkpoints").mkdir()
            return [Ended(task, "was lost")]
        attempt(task, self.train)
        return [Ended(task, "ended")]
