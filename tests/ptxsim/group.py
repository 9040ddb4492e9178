"""A set of threads that execute together."""

from __future__ import annotations

import numpy as np


class Group:
    """Threads that execute together. `full`: all living threads; `all`: every lane of the batch; `whole`: warps that access
    memory as one."""

    __slots__ = ("_index", "all", "full", "mask", "n", "sparse", "warps", "whole")

    def __init__(self, mask, alive, n=None, whole=False):
        self.mask, self.whole = mask, whole
        self.n = int(np.count_nonzero(mask)) if n is None else n
        self.full = self.n == alive
        self.all = self.n == len(mask)
        self.sparse = self.n * 8 < len(mask)
        words = mask.view(np.uint64)
        self.warps = int(np.count_nonzero(words[0::4] | words[1::4] | words[2::4] | words[3::4]))
        self._index = None

    @property
    def index(self):
        """Lane numbers of the active threads, ascending."""
        if self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index
