"""What the scripts print to: a console that outlives its reader, a bar; lines where there is no terminal."""

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

PAUSE = 60.0  # seconds between the lines of a count


class Screen(Console):
    """A console that falls silent where whoever reads it closes the pipe, as `head` does; the work goes on.

    Letters that it cannot show, such as the bytes of a name that is no Unicode, are shown as escapes.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__()

    def on_broken_pipe(self) -> None:
        """Print to nowhere from here on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


class Bar(Progress):
    """A bar that counts images; where there is no terminal a line a minute, for a job may take hours."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        bar = console.is_terminal and not quiet
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not bar, auto_refresh=bar,
        )  # fmt: skip
        self.silent, self.said = bar or quiet, time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """So many images more."""
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **what: Any) -> None:
        """So many images in all, as `completed`."""
        super().update(task_id, **what)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if not self.silent and now - self.said >= PAUSE:
            task, self.said = self.tasks[self.task_ids.index(task_id)], now
            of = "" if task.total is None else f" of {task.total:,.0f}"
            say(self.console, f"{task.description}: {task.completed:,.0f}{of}")


def progress(
    console: Console, name: str, steps: int, *, quiet: bool = False
) -> tuple[Progress, Callable[[int, dict[str, float]], None]]:
    """A bar with step, rate, time left and loss terms; a line every tenth of the way where there is no terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
        TextColumn("step {task.completed}/{task.total}, {task.fields[rate]}"), TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"), console=console, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(f"{name:9}", total=steps, rate="", terms="")
    marks = {max(1, steps * tenth // 10) for tenth in range(1, 11)}

    def report(step: int, values: dict[str, float]) -> None:
        terms = " ".join(f"{key} {value:#.3g}" for key, value in values.items() if value)
        speed = bar.tasks[0].speed
        bar.update(task, completed=step, rate=f"{speed:.1f} steps/s" if speed else "", terms=terms)
        reached = {mark for mark in marks if mark <= step}
        if reached and not quiet and not console.is_terminal:
            console.print(f"{name}: step {step}/{steps}, {terms}", soft_wrap=True)
        marks.difference_update(reached)

    return bar, report
