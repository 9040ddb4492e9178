"""The processes of one ``torchrun``, which share a computation by taking turns on its parts."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

T = TypeVar("T")
# A rank waits for another one's last part, however long that takes. One that fails is noticed at once: its connection closes.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows.

    Attributes:
        rank: 0..size-1.
        size: number of processes.
        local: index of the process on its machine, which chooses its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and that writes what all have made."""
        return self.rank == 0

    def share(self, parts: Sequence[T]) -> list[T]:
        """Every ``size``-th part: this process's turns."""
        return list(parts[self.rank :: self.size])

    def wait(self) -> None:
        """Until every process has come here.

        Raises:
            ConnectionError: another one has ended before; its own message says why.
        """
        if self.size > 1:
            try:
                torch.distributed.barrier()
            except RuntimeError:
                raise ConnectionError(f"rank {self.rank} stops, as another one has") from None

    def device(self, name: str) -> str:
        """The device that ``name`` means for this process: where it leaves the GPU open, each process of a machine has its own."""
        return f"cuda:{self.local}" if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available() else name


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun has started (its environment variables say so), connected while the block runs; else the one process.

    They only wait for each other, through gloo: what they make goes through files.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not torch.distributed.is_available():
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(torch.distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        torch.distributed.destroy_process_group()
