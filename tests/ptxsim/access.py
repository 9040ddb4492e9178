"""The memory path of the machine: address windows, checked loads and stores, race checks and traffic counters."""

from __future__ import annotations

import warnings

import numpy as np

from .core import UNSIGNED
from .group import Group
from .memory import (
    ALLOCATED,
    INITIALISED,
    LOCAL_BASE,
    PARAM_BASE,
    SHARED_BASE,
    AccessError,
    MemoryFault,
    RaceError,
    UninitialisedRead,
)
from .races import CTA, STRONG, THREAD, WARP

WINDOWS = {SHARED_BASE >> 40: ("shared", SHARED_BASE), LOCAL_BASE >> 40: ("local", LOCAL_BASE), PARAM_BASE >> 40: ("param", PARAM_BASE)}


def _distinct(keys):
    """Sorted, each once; most come sorted."""
    step = np.diff(keys)
    if len(step) and step.min() < 0:
        keys.sort()
        step = np.diff(keys)
    return keys[np.concatenate(([True], step != 0))]


class Access:
    """Mixed into Machine, which owns the spaces, the registers and the report."""

    def address_of(self, slot, offset, g):
        a = self.regs[slot]
        if a.size != 1 and not g.all:
            a = a[g.index]
        if a.dtype.itemsize != 8:
            a = a.view(np.uint32).astype(np.uint64)
        a = a.view(np.uint64)
        return a + np.uint64(offset & 0xFFFFFFFFFFFFFFFF) if offset else a

    def resolve(self, space, address, g):
        """Split a generic access by window: [(space, address, group, selection or None)]."""
        if space != "generic":
            return [(space, address, g, None)]
        window = address >> np.uint64(40)
        out = []
        for w in [window[0]] if (window == window[0]).all() else np.unique(window):
            name, base = WINDOWS.get(int(w), ("global", 0))
            if address.size == 1 or (window == w).all():
                return [(name, address - np.uint64(base), g, None)]
            chosen = window == w
            mask = np.zeros(self.total, bool)
            mask[g.index[chosen]] = True
            out.append((name, address[chosen] - np.uint64(base), Group(mask, self.living), chosen))
        return out

    def _flat(self, space, address, nbytes, g, need):
        """Checked flat offsets in a space; raises the public error for a bad lane."""
        mem = self.spaces[space]
        instance = None
        if space == "shared" and self.ctas > 1:
            instance = self.cta[g.index]
        elif space == "local":
            instance = g.index
        if address.size == 1 and space in ("shared", "local"):
            address = np.broadcast_to(address, g.n).copy()
        try:
            flat = mem.locate(address, instance, nbytes)
            mem.require(flat, address, nbytes, need)
        except AccessError as error:
            self._access_error(error, space, address, nbytes, g, need)
            flat = mem.locate(address, instance, nbytes)
        return mem, flat

    def _access_error(self, error, space, address, nbytes, g, need):
        mode = self.launch.uninitialised
        if error.kind == "uninitialised" and mode == "ignore":
            return
        thread = int(g.index[error.lane])
        verb = "read" if need & INITIALISED else "write"
        near = ""
        if space in ("global", "const"):
            near = "; " + self.device.nearest(error.address)
        elif space == "shared":
            blocks = self.kernel.shared_blocks + [(self.launch.dynamic_base, self.launch.shared_bytes, "dynamic")]
            near = "; shared variables: " + ", ".join(f"{name} [{start}, {start + size})" for start, size, name in blocks)
        text = f"{error.kind} {space} {verb} of {nbytes} bytes at {error.address:#x} by {self.whereabouts(thread)}{near}"
        if error.kind != "uninitialised":
            raise MemoryFault(text)
        if mode == "error":
            raise UninitialisedRead(text)
        if self.pc not in self.launch.warned:
            self.launch.warned.add(self.pc)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def load(self, space, address, width, lanes, g, kind="read"):
        """`lanes` vector elements of `width` bytes for every active thread: compact unsigned arrays."""
        parts = self.resolve(space, address, g)
        if parts[0][3] is None:
            return self._load(parts[0][0], parts[0][1], width, lanes, g, kind)
        out = [np.zeros(g.n, UNSIGNED[width]) for _ in range(lanes)]
        for name, a, sub, chosen in parts:
            for whole, piece in zip(out, self._load(name, a, width, lanes, sub, kind)):
                whole[chosen] = piece
        return out

    def _load(self, space, address, width, lanes, g, kind):
        nbytes = width * lanes
        mem, flat = self._flat(space, address, nbytes, g, ALLOCATED | INITIALISED)
        if space == "global":
            self.count_global("load", flat, nbytes, g)
        elif space == "shared":
            self.count_shared("load", flat, nbytes, g.index)
        elif space == "local":
            self.report.local_requests += g.warps
        self.race(space, flat, nbytes, g, kind)
        return [mem.gather(flat + k * width if k else flat, width) for k in range(lanes)]

    def store(self, space, address, width, values, g, kind="write"):
        for name, a, sub, chosen in self.resolve(space, address, g):
            picked = values if chosen is None else [v if v.size == 1 else v[chosen] for v in values]
            self._store(name, a, width, picked, sub, kind)

    def _store(self, space, address, width, values, g, kind):
        nbytes = width * len(values)
        if space in ("const", "param"):
            raise MemoryFault(f"write to {space} memory by {self.whereabouts(int(g.index[0]))}")
        mem, flat = self._flat(space, address, nbytes, g, ALLOCATED)
        if space == "global":
            self.count_global("store", flat, nbytes, g)
        elif space == "shared":
            self.count_shared("store", flat, nbytes, g.index)
        elif space == "local":
            self.report.local_requests += g.warps

        def changed(lanes, others):
            differ, where = np.zeros(len(lanes), bool), np.broadcast_to(flat, g.n)
            for k, v in enumerate(values):
                v = np.broadcast_to(v, g.n)
                held = mem.gather(where[lanes] + k * width, width) if others is None else v[others]
                differ |= held != v[lanes]
            return differ

        self.race(space, flat, nbytes, g, kind, changed)
        if flat.size == 1 and g.n > 1:
            values = [v[-1:] for v in values]  # the last thread wins
        for k, v in enumerate(values):
            mem.scatter(flat + k * width if k else flat, width, v)

    def race(self, space, flat, nbytes, g, kind, changed=None, index=None):
        """Tell the race detector of one access per lane; see `RaceDetector.access`."""
        if space not in self.races:
            return
        index = g.index if index is None else index
        if flat.size != len(index):
            flat = np.broadcast_to(flat, len(index))
        if space not in self.launch.same_value_writes:
            changed = None
        found = self.races[space].access(self.order, flat, nbytes, index, self.pc, kind, g.whole, changed)
        if kind in STRONG:
            self.order.strong(space, flat, index, kind)
        if found:
            at, other, thread, distance, pc = found
            text = (
                f"{space}-memory race: {kind} of {nbytes} bytes at {self.address_in(space, int(flat[at])):#x} by "
                f"{self.whereabouts(int(index[at]))} and {other} by {self.who_is(thread, distance)} at {self.place(int(pc))} "
                f"with no barrier between"
            )
            if self.launch.races == "error":
                raise RaceError(text)
            if self.pc not in self.launch.warned:
                self.launch.warned.add(self.pc)
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def address_in(self, space, flat):
        return flat % self.spaces[space].size + self.spaces[space].base

    def who_is(self, thread, distance):
        """A thread of the grid, or the warp, CTA or grid of which it and others accessed the same bytes."""
        cta, who = thread // self.padded - self.first, thread % self.padded
        block = f" of block {self.cta_coordinates(cta)}"
        return (
            f"thread {who}{block}"
            if distance == THREAD
            else f"threads of warp {who // 32}{block}"
            if distance == WARP
            else f"several warps{block}"
            if distance == CTA
            else "threads of several blocks"
        )

    def count_global(self, kind, flat, nbytes, g, index=None):
        traffic = getattr(self.report, "global_" + kind)
        touched = self.launch.touched[kind]
        traffic.requests += g.warps
        traffic.bytes_requested += g.n * nbytes
        traffic.bytes_by_width[nbytes] = traffic.bytes_by_width.get(nbytes, 0) + g.n * nbytes
        sector = flat >> 5
        touched[sector] = True
        if flat.size == 1:
            traffic.sectors += g.warps
            traffic.ideal_sectors += g.warps * -(-nbytes // 32)
            return
        warp = (g.index if index is None else index) >> 5
        traffic.sectors += len(_distinct((warp << 40) + sector))
        lanes = np.bincount(_distinct((warp - warp.min() << 44) + flat) >> 44)  # with addresses of their own, of each warp
        traffic.ideal_sectors += int((-(-lanes * nbytes // 32)).sum())

    def count_shared(self, kind, flat, nbytes, index):
        """Wavefronts: distinct words of each phase (32, 16 or 8 lanes for 4, 8 or 16 bytes) in the fullest bank."""
        traffic = getattr(self.report, "shared_" + kind)
        words = max(nbytes // 4, 1)
        phase = index // (32 // words)
        word = flat >> 2
        if words > 1:
            phase = np.repeat(phase, words)
            word = (word[:, None] + np.arange(words)).reshape(-1)
        keys = (phase << 32) + word
        step = np.diff(keys)
        if len(step) and step.min() <= 0:
            if step.min() < 0:
                keys.sort()
                step = np.diff(keys)
            keys = keys[np.concatenate(([True], step != 0))]
        phase, bank = keys >> 32, keys & 31
        low = phase[0]
        depth = np.bincount((phase - low) * 32 + bank)
        depth = np.pad(depth, (0, -len(depth) % 32)).reshape(-1, 32).max(axis=1)
        warps = index >> 5
        traffic.requests += 1 + int(np.count_nonzero(np.diff(warps)))
        traffic.wavefronts += int(depth.sum())
        traffic.ideal_wavefronts += int(np.count_nonzero(depth))
