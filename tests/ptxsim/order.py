"""Which accesses to memory are ordered before what a thread does next, by PTX's memory consistency model."""

from __future__ import annotations

import numpy as np

U32 = np.dtype(np.uint32)


def ballot(rows):
    """(warps, 32) bool -> per-warp bit mask."""
    return np.packbits(rows, axis=1, bitorder="little").view(U32).reshape(-1)


class Order:
    """What each thread of a batch of CTAs knows of the others' accesses, by a clock that every synchronisation advances.

    Barriers order their participants, bar.warp.sync the lanes that it waits for, and a fence, a strong write, a strong
    read of it and a fence order what lies before the first behind the last. Nothing else does: a shuffle, a vote, mma
    and ldmatrix wait for the lanes of their warp and order no memory.
    """

    def __init__(self, ctas, warps, first_thread, now, messages):
        threads = 32 * warps * ctas
        self.ctas, self.warps, self.now = ctas, warps, now  # warps of a CTA; the clock
        self.first_thread, self.size = first_thread, 32 * warps  # number of lane 0's thread in the grid; threads of a CTA
        self.start = first_thread + np.arange(threads) // self.size * self.size  # the first thread of each lane's CTA
        self.cta = np.zeros(ctas * warps, np.int64)  # per warp: knows all of its CTA's accesses up to this time,
        self.warp = np.zeros(ctas * warps, np.int64)  # and all of its own warp's up to this, the same or later
        self.lane = None  # (threads, 32): and of each lane of its warp, once there was a bar.warp.sync of some lanes
        self.other = None  # (CTAs, warps, warps): and of each warp of its CTA, once there was a barrier of some warps
        self.messages = messages  # address of a strong write -> {(first, last thread): time}
        self.fenced = None  # per lane: time of its last fence, once there was one
        self.heard, self.own = {}, {}  # lane -> ranges not fenced yet, and all that it has acquired
        self.acquired = Acquired(), Acquired()  # the same by CTA and by warp, for those who learn it from a barrier

    # -- barriers
    def barrier(self, mask, alive, arrived=None):
        """The threads of mask, whole warps, pass a barrier. `arrived`: what the warps knew that did not wait (see `arrive`)."""
        part = mask.reshape(self.ctas, self.warps, 32).any(axis=2)
        whole = part.any(axis=1) & ~(alive & ~mask).reshape(self.ctas, -1).any(axis=1)
        if arrived is not None:
            whole[:] = False
        self.warp[part.reshape(-1)] = self.now
        everybody = np.repeat(whole, self.warps)
        self.cta[everybody] = self.warp[everybody] = self.now
        part &= ~whole[:, None]
        if part.any():
            known = self._known_to(part)
            if arrived is not None:
                known = np.maximum(known, arrived)
            self.other = np.where(part[:, :, None], np.maximum(self.other, known[:, None]), self.other)
        self.now += 1

    def arrive(self, mask):
        """What the warps of mask know, (CTAs, warps): to be learned by those who wait at the barrier that they arrive at."""
        known = self._known_to(mask.reshape(self.ctas, self.warps, 32).any(axis=2))
        self.now += 1
        return known

    def _known_to(self, part):
        """Up to when the accesses of each warp are known to some warp of `part` or are its own."""
        if self.other is None:
            self.other = np.zeros((self.ctas, self.warps, self.warps), np.int64)
        known = np.maximum(self.other, self.cta.reshape(self.ctas, self.warps, 1))
        return np.where(part, self.now, np.where(part[:, :, None], known, 0).max(axis=1))

    def warp_barrier(self, mask, members):
        """The threads of mask pass bar.warp.sync, each together with the lanes of its warp that are bits of its `members`."""
        rows = mask.reshape(-1, 32)
        every = (members if members.size == 1 else members.reshape(-1, 32)) == np.uint32(0xFFFFFFFF)
        self.warp[(rows & every).any(axis=1)] = self.now
        rows = rows & ~every
        if rows.any():
            if self.lane is None:
                self.lane = np.zeros((len(mask), 32), np.int64)
            lane, members = self.lane.reshape(-1, 32, 32), np.broadcast_to(members, len(mask)).reshape(-1, 32)
            for some in np.unique(members[rows]):
                here = np.flatnonzero((rows & (members == some)).any(axis=1))[:, None]
                lanes = np.flatnonzero(some >> np.arange(32, dtype=U32) & np.uint32(1))
                known = lane[here, lanes].max(axis=1)
                known[:, lanes] = self.now
                lane[here, lanes] = np.maximum(lane[here, lanes], known[:, None])
        self.now += 1

    # -- release and acquire
    def fence(self, lanes):
        """fence or membar of at least the GPU's scope."""
        if self.fenced is None:
            self.fenced = np.zeros(self.ctas * self.size, np.int64)
        self.fenced[lanes] = self.now
        for lane in set(self.heard) & set(lanes.tolist()):
            heard = self.heard.pop(lane)
            merge(self.own.setdefault(lane, {}), heard)
            for group, size in zip(self.acquired, (self.size, 32)):
                group.add(lane // size, self.now, heard)
        self.now += 1

    def strong(self, space, flat, lanes, kind):
        """Strong accesses, one address a lane: those that write tell what was known at the last fence, those that read learn it."""
        if self.fenced is None and not self.messages:
            return
        for at, lane in zip(flat.tolist(), lanes.tolist()):
            where = at, self.first_thread if space == "shared" else None  # of this batch's shared memory
            if kind != "strong write" and where in self.messages:
                merge(self.heard.setdefault(lane, {}), self.messages[where])
            if kind != "strong read" and self.fenced is not None and self.fenced[lane]:
                self._tell(self.messages.setdefault(where, {}), lane)

    def _tell(self, message, lane):
        time, start, warp = int(self.fenced[lane]), int(self.start[lane]), lane >> 5
        thread = self.first_thread + lane
        for ranges in self._known_by(lane, time):
            merge(message, ranges)
        merge(
            message,
            {
                (thread, thread): time,
                (thread & ~31, thread | 31): min(time, int(self.warp[warp])),
                (start, start + self.size - 1): min(time, int(self.cta[warp])),
            },
        )

    def _known_by(self, lane, time):
        """What `lane` had acquired at `time`, its last fence or later, by itself and from those that it met at barriers."""
        for group, size, met in zip(self.acquired, (self.size, 32), (self.cta, self.warp)):
            yield group.until(lane // size, min(time, int(met[lane >> 5])))
        yield self.own.get(lane, {})

    # -- questions
    def unseen(self, lanes, time):
        """Bits of the lanes of each thread's own warp whose accesses at `time` are not ordered before it."""
        own = np.uint32(1) << (lanes & 31).astype(U32)
        bits = np.where(time > self.warp[lanes >> 5], ~own, np.uint32(0))
        return bits if self.lane is None else bits & ballot(self.lane[lanes] < time[:, None])

    def sees_warp(self, lanes, warp, time):
        """Whether accesses at `time` by another warp of the CTA, its number there, are ordered before each thread."""
        seen = time <= self.cta[lanes >> 5]
        if self.other is not None:
            seen |= time <= self.other.reshape(-1, self.warps)[lanes >> 5, warp]
        return seen

    def has_acquired(self, lanes, thread, time):
        """Whether an access at `time` by `thread` of the grid reaches each lane by fences and strong accesses."""
        seen = np.zeros(len(lanes), bool)
        for i, (lane, other, at) in enumerate(zip(*(np.broadcast_to(x, len(lanes)).tolist() for x in (lanes, thread, time)))):
            first = other // self.size * self.size
            ranges = (other, other), (other & ~31, other | 31), (first, first + self.size - 1)
            seen[i] = any(known.get(r, -1) >= at for known in self._known_by(lane, self.now) for r in ranges)
        return seen


class Acquired:
    """What the threads of each group have acquired, in the order of time: (first, last thread) -> time."""

    def __init__(self):
        self.events, self.merged = {}, {}  # group -> [(time, ranges)]; group -> (how many of them, all of those merged)

    def __bool__(self):
        return bool(self.events)

    def add(self, group, time, ranges):
        self.events.setdefault(group, []).append((time, ranges))

    def until(self, group, time):
        events = self.events.get(group, ())
        count, merged = self.merged.get(group, (0, {}))
        if count and events[count - 1][0] > time:  # of an earlier time than was asked for before: rare
            count, merged = 0, {}
        while count < len(events) and events[count][0] <= time:
            merge(merged, events[count][1])
            count += 1
        self.merged[group] = count, merged
        return merged


def merge(known, others):
    """The later of the two times of each range."""
    for threads, until in others.items():
        if known.get(threads, -1) < until:
            known[threads] = until
