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

# Between two meetings lies a whole share of the work: the default of half an hour would end a long run. A dead fellow is noticed at once.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows.

    Attributes:
        rank: 0..size-1.
        size: number of processes.
        local: index of the process on its machine, which chooses its GPU.
        group: through which they wait for each other; None for the default one of torch.distributed.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: torch.distributed.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and that writes what all have made."""
        return self.rank == 0

    def share_missing(self, look: Callable[[int], list[range]], batch: int) -> list[range]:
        """This process's ranges of what is missing. All look before any of them adds something, or they would not see the same.

        Args:
            look: called as look(size), gives the missing items in ranges of at most ``size``.
            batch: at most so many items in a range; fewer where some process would else have nothing to do.
        """
        total = sum(map(len, look(batch)))
        parts = look(max(1, min(batch, math.ceil(total / self.size))))
        self.wait()
        return parts[self.rank :: self.size]

    def device(self, name: str) -> str:
        """The device that ``name`` means for this process: where it leaves the GPU open, each process of a machine has its own."""
        return f"cuda:{self.local}" if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available() else name

    def wait(self) -> None:
        """Until every process has come here."""
        self.agree(True)

    def agree(self, well: bool) -> bool:
        """Until every process has come here; whether all of them are well.

        Raises:
            ConnectionError: another one has ended before; its own message says why.
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
        """The first process acts while the others wait.

        Raises:
            SystemExit: in the others where the action fails, so that the first alone says why.
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
    """The ranks that torchrun has started (its environment variables say so), connected while the block runs; else the one process.

    They only wait for each other, through gloo: what they make goes through files.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not torch.distributed.is_available():
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo")
    try:
        # A group of its own, for the patience is not for finding each other: a process whose torchrun is gone must give up.
        group: Any = torch.distributed.new_group(timeout=_PATIENCE)  # it is a group, as every process is in it
        yield Ranks(torch.distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), group)
    finally:
        torch.distributed.destroy_process_group()
