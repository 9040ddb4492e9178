"""The processes of one ``torchrun``, which share a computation by taking turns on its parts."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

# Processes wait for each other until a whole share of the work is done: PyTorch's limit of half an hour would end a long run. A process
# that has died is noticed at once all the same.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process, and its place among those of the same torchrun.

    Attributes:
        rank: 0..size-1.
        size: number of processes.
        local: index of the process on its machine, which chooses its GPU.
        group: the process group with which they wait for each other; None for the default one of torch.distributed.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: torch.distributed.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True for the one process that prints, and that writes the files made from all processes' results."""
        return self.rank == 0

    def share_missing(self, look: Callable[[int], list[range]], batch: int) -> list[range]:
        """This process's share of the missing items. All processes look before any of them goes on, so that all see the same.

        Args:
            look: called as look(size), returns the missing items in ranges of at most ``size``.
            batch: largest number of items in a range. Ranges are smaller if some process would have nothing to do otherwise.

        Returns:
            Every ``size``-th range, from the ``rank``-th on.
        """
        total = sum(map(len, look(batch)))
        parts = look(max(1, min(batch, math.ceil(total / self.size))))
        self.wait()
        return parts[self.rank :: self.size]

    def device(self, name: str) -> str:
        """The device that ``name`` means for this process. If it does not name a GPU ("auto", "cuda"), each process gets its own."""
        return f"cuda:{self.local}" if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available() else name

    def wait(self) -> None:
        """Waits until every process has come here."""
        self.agree(True)

    def agree(self, well: bool) -> bool:
        """Waits until every process has come here. True if all of them passed True.

        Raises:
            ConnectionError: another process has ended; its own message says why.
        """
        if self.size == 1:
            return well
        flag = torch.tensor(int(well), device="cpu")
        try:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=self.group)
        except RuntimeError:
            raise ConnectionError(f"rank {self.rank} stops, as another one has") from None
        return bool(flag)

    def lead(self, action: Callable[[], object]) -> None:
        """Calls ``action`` in the first process, while the others wait.

        Raises:
            SystemExit: in the other processes, if the action has raised in the first: only that one prints the reason.
        """
        if not self.first:
            if not self.agree(True):
                raise SystemExit(2)
            return
        try:
            action()
        except Exception:
            self.agree(False)
            raise
        self.agree(True)


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started, connected while the block runs; without torchrun, the one process.

    torchrun's environment variables say which it is. The processes use gloo, and only to wait for each other: results are exchanged
    through files.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not torch.distributed.is_available():
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo")
    try:
        # The long limit is for this group only. While the processes look for each other the default holds: one whose torchrun has
        # died must give up.
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available() and local < torch.cuda.device_count():
            torch.cuda.set_device(local)  # what asks for "cuda", and not for this process's device by name, must not crowd the first GPU
        group: Any = torch.distributed.new_group(timeout=_PATIENCE)  # it is a group, as every process is in it
        yield Ranks(torch.distributed.get_rank(), size, local, group)
    finally:
        torch.distributed.destroy_process_group()
