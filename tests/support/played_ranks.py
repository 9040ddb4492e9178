"""The ranks of a torchrun, played by the threads of one process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ddpm_fast.io.ranks import Ranks


@dataclass(frozen=True)
class Played(Ranks):
    """A rank that is a thread of this process."""

    meeting: threading.Barrier | None = None
    words: list | None = None

    def agree(self, well):
        self.words[self.rank] = well
        self.meeting.wait(20)
        result = all(self.words)
        self.meeting.wait(20)
        return result


def play(size, act):
    """What each rank's ``act(rank)`` raised, or None."""
    meeting, words, outcome = threading.Barrier(size), [True] * size, [None] * size

    def run(rank):
        try:
            act(Played(rank, size, rank, meeting=meeting, words=words))
        except BaseException as error:
            outcome[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcome
