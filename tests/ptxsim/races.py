"""The race detector: who read and wrote each granule of shared and global memory, and which of it is not ordered."""

from __future__ import annotations

import numpy as np

from .order import U32

EVERY_LANE = np.int64(0xFFFFFFFF)
THREAD, WARP, CTA, GRID = range(4)  # how far apart the threads are that a record stands for
READS, STRONG = {"read", "strong read"}, {"strong read", "strong write", "atomic"}


class SharedMarks:
    """One kind of access to shared memory: of each granule and warp, when last and by which lanes.

    An access that is ordered behind earlier ones takes their place: who is ordered behind it is so behind them too.
    """

    def __init__(self, granules, order):
        self.when = np.zeros((granules, order.warps), np.int64)  # time << 32 | bits of the lanes
        self.latest, self.who = np.zeros(granules, np.int64), np.zeros(granules, np.int64)  # over all warps
        self.pc = np.zeros(granules, np.int32)

    def unordered(self, order, q, lanes, whole):
        """Which of the accesses to granules q by `lanes` are not ordered behind those recorded of other threads.

        whole: the warp accesses them as one, so that each of its lanes must be.
        """
        doubt = np.flatnonzero(self.latest[q] > order.cta[lanes >> 5])
        if not len(doubt):
            return doubt
        lanes = lanes[doubt]
        record, warp = self.when[q[doubt]], lanes >> 5
        time, own = record >> 32, (np.arange(len(doubt)), warp % order.warps)
        bad = (record != 0) & ~order.sees_warp(lanes[:, None], np.arange(order.warps), time)
        mine = time[own]
        unseen = np.where(mine > order.warp[warp], EVERY_LANE, 0) if whole else order.unseen(lanes, mine)
        bad[own] = record[own] & unseen != 0
        return doubt[bad.any(axis=1)]

    def mark(self, order, q, lanes, whole, pc):
        """Record an access per lane. Returns those that another lane's to the same granule took the place of."""
        at, flat = q * order.warps + (lanes >> 5) % order.warps, self.when.reshape(-1)
        bits = EVERY_LANE if whole else np.int64(1) << (lanes & 31)
        old = flat[at]
        keep = np.flatnonzero(old >> 32 > order.warp[lanes >> 5])
        new = np.int64(order.now << 32) | np.broadcast_to(bits, len(q))
        if len(keep):
            new[keep] |= old[keep] & order.unseen(lanes[keep], old[keep] >> 32)
        flat[at] = new
        self.latest[q], self.who[q], self.pc[q] = order.now, lanes, pc
        lost = np.flatnonzero(self.who[q] != lanes)
        if len(lost):
            np.bitwise_or.at(flat, at[lost], new[lost])
        return lost

    def thread(self, order, q):
        """(the last accessor's thread in the grid, how far apart all are)."""
        return order.first_thread + int(self.who[q]), THREAD


class GlobalMarks:
    """One kind of access to global memory: of each granule the last thread, and how far apart the threads are that
    accessed it with nothing between that orders them."""

    def __init__(self, granules, order):
        self.record = np.zeros(granules, np.int64)  # time << 34 | distance << 32 | thread of the grid
        self.pc = np.zeros(granules, np.int32)

    def unordered(self, order, q, lanes, whole):
        record = self.record[q]
        if not record.any():
            return record[:0]
        thread = record & EVERY_LANE
        foreign = ((thread - order.start[lanes]).view(np.uint64) >= np.uint64(order.size)) & (record != 0)
        doubt = np.flatnonzero(foreign | (record >> 34 > order.cta[lanes >> 5]))
        if not len(doubt):
            return doubt
        lanes, record, thread, foreign = lanes[doubt], record[doubt], thread[doubt], foreign[doubt]
        time, distance, me = record >> 34, record >> 32 & 3, lanes + order.first_thread
        near = thread >> 5 == me >> 5
        unseen = np.where(time > order.warp[lanes >> 5], U32.type(EVERY_LANE), U32.type(0)) if whole else order.unseen(lanes, time)
        seen = ~foreign & ~near & (distance <= WARP) & order.sees_warp(lanes, np.where(foreign, 0, (thread >> 5) % order.warps), time)
        bit = unseen >> (thread & 31).astype(U32) & np.uint32(1)
        seen |= near & (((distance == THREAD) & (bit == 0)) | ((distance == WARP) & (unseen == 0)))
        if order.own:
            seen |= (distance == THREAD) & order.has_acquired(lanes, thread, time)
        return doubt[~seen]

    def mark(self, order, q, lanes, whole, pc):
        me, old = lanes + order.first_thread, self.record[q]
        keep = np.flatnonzero(old >> 34 > 0)
        new = np.int64(order.now << 34 | (WARP if whole else THREAD) << 32) | me
        if len(keep):
            far = self._distance(order, old[keep], me[keep], lanes[keep])
            time, warp = old[keep] >> 34, lanes[keep] >> 5
            far[(far <= CTA) & (time <= order.cta[warp]) | (far <= WARP) & (time <= order.warp[warp])] = THREAD
            new[keep] |= np.maximum(far, new[keep] >> 32 & 3) << 32
        self.record[q], self.pc[q] = new, pc
        lost = np.flatnonzero(self.record[q] != new)
        if len(lost):
            at = q[lost]
            winner = self.record[at]
            far = np.maximum(self._distance(order, winner, me[lost], lanes[lost]), new[lost] >> 32 & 3)
            np.maximum.at(self.record, at, np.int64(order.now << 34) | far << 32 | winner & EVERY_LANE)
        return lost

    @staticmethod
    def _distance(order, record, me, lanes):
        """How far apart the threads of a record and the thread `me` are."""
        thread = record & EVERY_LANE
        far = np.full(len(me), GRID)
        far[(thread - order.start[lanes]).view(np.uint64) < np.uint64(order.size)] = CTA
        far[thread >> 5 == me >> 5] = WARP
        far[thread == me] = THREAD
        return np.maximum(far, record >> 32 & 3)

    def thread(self, order, q):
        record = int(self.record[q])
        return record & 0xFFFFFFFF, record >> 32 & 3


class RaceDetector:
    """Races in one space: accesses to one granule by different threads, one of them a write and not both strong, that
    nothing orders. Granules are as wide as the kernel's narrowest access, so that none is accessed in part."""

    def __init__(self, marks, nbytes, granule):
        self.make, self.granules, self.granule, self.marks = marks, nbytes // granule, granule, {}

    def access(self, order, flat, nbytes, lanes, pc, kind, whole, changed):
        """Check and record one access per lane; kind is 'read', 'write', 'strong read', 'strong write' or 'atomic'.

        changed(lanes, others): where writes of what is there already are allowed, tells which accesses write something
        else than memory holds (others None) or than the accesses `others` write; else None. Returns None or
        (number of the access, the other kind, granule, thread of the grid, how far apart they are, pc).
        """
        for k in range(max(nbytes // self.granule, 1)):
            q = flat // self.granule + k
            for other, marks in self.marks.items():
                if {kind, other} <= READS or {kind, other} <= STRONG:
                    continue
                bad = marks.unordered(order, q, lanes, whole)
                if len(bad) and kind == other and changed:
                    bad = bad[changed(bad, None)]
                if len(bad):
                    at = q[bad[0]]
                    return bad[0], other, *marks.thread(order, at), marks.pc[at]
            if kind not in self.marks:
                self.marks[kind] = self.make(self.granules, order)
            lost = self.marks[kind].mark(order, q, lanes, whole, pc)
            if kind == "write" and len(lost):
                if changed:
                    unique, last = np.unique(q[::-1], return_index=True)
                    winners = len(q) - 1 - last[np.searchsorted(unique, q[lost])]
                    lost = lost[changed(lost, winners)]
                if len(lost):
                    return lost[0], "write", self.marks[kind].thread(order, q[lost[0]])[0], THREAD, pc
        return None
