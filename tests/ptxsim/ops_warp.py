"""Warp-wide operations: shuffles, votes, matches, reductions."""

from __future__ import annotations

import numpy as np

from .core import BOOL, DTYPES, I32, U32, UNSIGNED, fetch, op
from .group import Group
from .memory import BarrierError
from .ops_float import is_float
from .order import ballot
from .program import SIZES, Imm, Name, Pair


def warp_synchronous(k, member, run):
    """Wrap `run` so that it sees only threads whose member masks have wholly arrived. member None: the whole warp."""
    slot, _ = k.source(member if member is not None else Imm("int", 0xFFFFFFFF), U32)
    pc = k.pc

    def step(m, g):
        members = fetch(m.regs[slot], U32)
        now = m.warp_group(g, members)
        if now.n and members.size > 1 and (rows_of(members, m) != members[::32, None])[now.mask.reshape(-1, 32)].any():
            for one in np.unique(members[now.mask]):  # several member masks side by side in a warp
                run(m, Group(now.mask & (members == one), m.living))
        elif now is g:
            return run(m, g)
        elif now.n:
            run(m, now)
        if now is g:
            return None
        late = m.parked.get(pc)
        rest = (m.group.mask if late is None else m.group.mask & ~late) | now.mask
        if rest.any():
            m.enqueue(pc + 1, rest)
        return -1

    return step


def rows_of(x, m):
    """Register as (warps, 32)."""
    return np.broadcast_to(x, m.total).reshape(-1, 32)


@op("shfl")
def shfl(k, ins):
    if ins.op[1] != "sync":
        k.unsupported("only shfl.sync")
    mode, d = ins.op[2], ins.args[0]
    dsts = [d.first, d.second] if isinstance(d, Pair) else [d]
    slots = [k.target(x) for x in dsts]
    a, b, c = (k.source(x, U32)[0] for x in ins.args[1:4])

    def run(m, g):
        lane = (m.lanes & 31).astype(U32)
        shift, clamp = fetch(m.regs[b], U32) & np.uint32(31), fetch(m.regs[c], U32)
        segment, bound = (clamp >> np.uint32(8)) & np.uint32(31), clamp & np.uint32(31)
        top = (lane & segment) | (bound & ~segment)
        if mode == "up":
            source = lane.astype(I32) - shift.astype(I32)
            ok = source >= top.astype(I32)
        else:
            source = {"down": lane + shift, "bfly": lane ^ shift, "idx": (lane & segment) | (shift & ~segment)}[mode].astype(I32)
            ok = source <= top.astype(I32)
        origin = (m.lanes - lane) + np.where(ok, source, lane)
        bad = g.mask & ~g.mask[origin]
        if bad.any() and m.launch.shuffle_check:
            thread = int(bad.argmax())
            raise BarrierError(f"shfl.sync reads lane {int(origin[thread]) & 31}, which does not take part: {m.whereabouts(thread)}")
        value = fetch(m.regs[a], U32)
        m.put(slots[0], value if value.size == 1 else value[origin], g)
        if len(slots) > 1:
            m.put(slots[1], np.broadcast_to(ok, m.total), g)

    return warp_synchronous(k, ins.args[4], run)


@op("vote")
def vote(k, ins):
    if ins.op[1] != "sync":
        k.unsupported("only vote.sync")
    slot, mode, negated = k.target(ins.args[0]), ins.op[2], getattr(ins.args[1], "negated", False)
    source = k.source(Name(ins.args[1].name) if isinstance(ins.args[1], Name) else ins.args[1], BOOL)[0]

    def run(m, g):
        active = g.mask.reshape(-1, 32)
        p = (rows_of(m.regs[source], m) != negated) & active
        yes, everyone = p.any(axis=1), (p == active).all(axis=1)
        out = {
            "any": lambda: yes,
            "all": lambda: everyone,
            "uni": lambda: everyone | ~yes,
            "ballot": lambda: ballot(p),
        }[mode]()
        m.put(slot, np.repeat(out, 32), g)

    return warp_synchronous(k, ins.args[2], run)


@op("activemask")
def activemask(k, ins):
    slot = k.target(ins.args[0])
    return lambda m, g: m.put(slot, np.repeat(ballot(g.mask.reshape(-1, 32)), 32), g)


@op("match")
def match(k, ins):
    d, t = ins.args[0], ins.op[-1]
    slots = [k.target(x) for x in ((d.first, d.second) if isinstance(d, Pair) else (d,))]
    source = k.source(ins.args[1], UNSIGNED[SIZES[t]])

    def run(m, g):
        active, x = g.mask.reshape(-1, 32), rows_of(fetch(m.regs[source[0]], source[1]), m)
        same = (x[:, :, None] == x[:, None, :]) & active[:, :, None] & active[:, None, :]
        bits = ballot(same.reshape(-1, 32))
        if ins.op[1] == "all":
            whole = ballot(active).repeat(32)
            agree = bits == whole
            agree = np.repeat((agree.reshape(-1, 32) | ~active).all(axis=1), 32)
            bits = np.where(agree, whole, np.uint32(0))
            if len(slots) > 1:
                m.put(slots[1], agree, g)
        m.put(slots[0], bits, g)

    return warp_synchronous(k, ins.args[2], run)


@op("redux")
def redux(k, ins):
    name, t = ins.op[2], ins.op[-1]
    if is_float(t):
        k.unsupported()
    slot, source = k.target(ins.args[0]), k.source(ins.args[1], DTYPES[t])
    info = np.iinfo(DTYPES[t])
    fn, unit = {
        "add": (np.add, 0),
        "min": (np.minimum, info.max),
        "max": (np.maximum, info.min),
        "and": (np.bitwise_and, info.max),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[name]

    def run(m, g):
        x = np.where(g.mask.reshape(-1, 32), rows_of(fetch(m.regs[source[0]], source[1]), m), source[1].type(unit))
        m.put(slot, np.repeat(fn.reduce(x, axis=1, dtype=source[1]), 32), g)

    return warp_synchronous(k, ins.args[2], run)


@op("elect")
def elect(k, ins):
    slots = [k.target(ins.args[0].first), k.target(ins.args[0].second)]

    def run(m, g):
        leader = g.mask.reshape(-1, 32).argmax(axis=1)
        m.put(slots[0], np.repeat(leader, 32).astype(U32), g)
        m.put(slots[1], (m.lanes & 31) == np.repeat(leader, 32), g)

    return warp_synchronous(k, ins.args[1], run)
