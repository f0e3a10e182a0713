"""How far measurements are: what workers have done of their tasks stands in small files, which a bar adds up."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from leaveout.training.loop import DONE

LOOK = 1.0
"""Seconds between two looks."""


@dataclass
class Progress:
    """A bar over measurements, with the time that is left.

    tasks: how many measurements each one makes, by the name of its folder in `work`
    """

    bar: Any
    work: Path
    tasks: Mapping[str, int]
    finished: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def add(self, n: int) -> None:
        """Counts measurements that are in the bank."""
        self.finished += n
        self.show()

    def show(self) -> None:
        """What is finished, and the parts of what is under way."""
        parts = 0.0
        for name, n in self.tasks.items():
            with contextlib.suppress(OSError, ValueError):  # just removed, or just being written
                parts += n * max((float(file.read_text()) for file in (self.work / name).rglob(DONE)), default=0.0)
        self.bar.n = max(self.bar.n, min(round(self.finished + parts, 1), self.bar.total))
        self.bar.refresh()

    def watch(self) -> None:
        """Shows it again and again."""
        while not self.stopped.wait(LOOK):
            self.show()


@contextmanager
def progress(label: str, work: Path, tasks: Mapping[str, int], shown: bool) -> Iterator[Progress]:
    """A bar that moves while tasks are under way, in whatever process or machine that sees the folder `work`."""
    total = sum(tasks.values())
    with tqdm(total=total, desc=label, unit="run", disable=not shown, file=sys.stderr) as bar:
        told = Progress(bar, work, tasks)
        thread = threading.Thread(target=told.watch, daemon=True, name="progress")
        if shown:
            thread.start()
        try:
            yield told
        finally:
            told.stopped.set()
            if shown:
                thread.join()
