"""The one progress bar: what is done, the last loss, the rate, time elapsed and left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} it/s")


class Bar:
    """Context manager around a rich progress bar on stderr; nothing at all with ``quiet``.

    Where stderr is no terminal there is one line at the end instead, so that logs stay short.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.title, self.quiet = title, quiet
        columns = (
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            _Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self.task = self.progress.add_task(title, total=None, loss="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.progress.stop()
        task = self.progress.tasks[0]
        if not self.quiet and not self.console.is_terminal and kind is None:
            self.console.print(
                f"{self.title}: {int(task.completed)} in {task.elapsed or 0:.1f} s {task.fields['loss']}".rstrip(), highlight=False
            )

    def update(self, done: int, of: int, loss: float | None = None) -> None:
        fields: dict[str, Any] = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self.progress.update(self.task, completed=done, total=of, **fields)
