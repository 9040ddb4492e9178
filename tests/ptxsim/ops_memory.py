"""Loads, stores, atomics and cp.async."""

from __future__ import annotations

import numpy as np

from .core import BOOL, DTYPES, U32, UNSIGNED, op
from .group import Group
from .memory import ALLOCATED, GLOBAL_BASE, INITIALISED
from .ops_float import DECODE, ENCODE, is_float
from .program import SIZES, Name, Vec


def space_of(ins):
    for part in ins.op[1:]:
        name = part.split("::")[0]
        if name in ("global", "shared", "local", "param", "const"):
            return name
    return "generic"


def is_strong(ins):
    """volatile counts as weak: it orders nothing, and the hardware promises no more than that it happens."""
    return bool({"relaxed", "acquire", "release"} & set(ins.op))


def with_fences(ins, run):
    """The step of an access with the fences that its .acquire or .release stands for."""
    if not {"acquire", "release", "acq_rel"} & set(ins.op) or "cta" in ins.op:
        return run

    def fenced(m, g):
        if "acquire" not in ins.op:
            m.order.fence(g.index)
        run(m, g)
        if "release" not in ins.op:
            m.order.fence(g.index)

    return fenced


@op("membar", "fence")
def fence(k, ins):
    """Those of the GPU's scope or wider; a narrower one is taken to order nothing."""
    if {"gl", "gpu", "sys"} & set(ins.op) and "proxy" not in ins.op:
        return lambda m, g: m.order.fence(g.index)
    return lambda m, g: None


@op("ld", "ldu")
def ld(k, ins):
    dst, t = ins.args[0], ins.op[-1]
    if DTYPES.get(t) is None or "unified" in ins.op:
        k.unsupported()
    slots = [k.target(d) for d in (dst.items if isinstance(dst, Vec) else [dst])]
    space, base, offset = k.address(ins.args[1], space_of(ins))
    width, signed = SIZES[t], DTYPES[t] if t[0] == "s" else None
    kind = "strong read" if is_strong(ins) else "read"

    def run(m, g):
        for slot, v in zip(slots, m.load(space, m.address_of(base, offset, g), width, len(slots), g, kind)):
            m.put_compact(slot, v.view(signed) if signed else v, g)

    return with_fences(ins, run)


@op("st")
def st(k, ins):
    src, t = ins.args[1], ins.op[-1]
    if DTYPES.get(t) is None or "async" in ins.op:
        k.unsupported()
    width = SIZES[t]
    slots = [k.source(a, UNSIGNED[width]) for a in (src.items if isinstance(src, Vec) else [src])]
    kind = "strong write" if is_strong(ins) else "write"
    space, base, offset = k.address(ins.args[0], space_of(ins))

    def run(m, g):
        m.store(space, m.address_of(base, offset, g), width, [m.value(s, t, g) for s, t in slots], g, kind)

    return with_fences(ins, run)


def _float_sum(t):
    return np.add if t in ("f32", "f64") else lambda a, b: ENCODE[t](DECODE[t](a) + DECODE[t](b))


ATOMIC = {
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda a, b: b,
    "inc": lambda a, b: np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1)),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - a.dtype.type(1)),
}


def atomic_update(view, index, name, t, b, c, need_old):
    """Apply one atomic per lane in thread order; returns the old values when asked."""
    fn = _float_sum(t) if name == "add" and is_float(t) else np.add if name == "add" else ATOMIC.get(name)
    b = np.broadcast_to(b, index.shape)
    if not need_old and isinstance(fn, np.ufunc):
        fn.at(view, index, b)
        return None
    order = np.argsort(index, kind="stable")
    where = index[order]
    first = np.concatenate(([True], where[1:] != where[:-1]))
    start = np.maximum.accumulate(np.where(first, np.arange(len(where)), 0))
    old = np.empty(len(index), view.dtype)
    if name == "add" and not is_float(t):  # exclusive prefix sums, modulo 2**bits
        total = np.cumsum(b[order], dtype=view.dtype) - b[order]
        old[order] = view[where] + (total - total[start])
        np.add.at(view, index, b)
        return old
    rank = np.arange(len(where)) - start
    by_rank = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[by_rank], np.arange(rank.max() + 2))
    for r in range(len(bounds) - 1):
        lanes = order[by_rank[bounds[r] : bounds[r + 1]]]
        held = view[index[lanes]]
        old[lanes] = held
        if name == "cas":
            view[index[lanes]] = np.where(held == b[lanes], np.broadcast_to(c, index.shape)[lanes], held)
        else:
            view[index[lanes]] = fn(held, b[lanes])
    return old


@op("atom", "red")
def atom(k, ins):
    t, returns = ins.op[-1], ins.op[0] == "atom"
    name = next((p for p in ins.op[1:] if p in ATOMIC or p in ("add", "cas")), None)
    args = ins.args[1:] if returns else ins.args
    if name is None or DTYPES.get(t) is None or "async" in ins.op:
        k.unsupported()
    lanes = lambda a: a.items if isinstance(a, Vec) else (a,)
    slots = [k.target(a) for a in lanes(ins.args[0])] if returns else [None] * len(lanes(args[1]))
    space, base, offset = k.address(args[0], space_of(ins))
    sources = [[k.source(a, DTYPES[t]) for a in lanes(v)] for v in args[1 : (3 if name == "cas" else 2)]]
    width = SIZES[t]

    def run(m, g):
        need = [slot is not None and slot in k.read_slots for slot in slots]
        values = [[m.value(*s, g) for s in v] for v in sources]
        address = np.broadcast_to(m.address_of(base, offset, g), g.n)
        old = [np.zeros(g.n, DTYPES[t]) for _ in slots]
        for where, a, sub, chosen in m.resolve(space, address, g):
            mem, flat = m._flat(where, a, width * len(slots), sub, ALLOCATED | INITIALISED)
            m.race(where, flat, width * len(slots), sub, "atomic" if returns else "strong write")
            if where == "shared":
                m.report.shared_atomics += sub.n * len(slots)
            else:
                m.report.global_atomics += sub.n * len(slots)
                for kind in ("load", "store"):
                    m.launch.touched[kind][flat >> 5] = True
            for j in range(len(slots)):  # each element of a vector is atomic by itself
                b, *c = [v[j] if chosen is None or v[j].size == 1 else v[j][chosen] for v in values]
                got = atomic_update(mem.data_as[width].view(DTYPES[t]), flat // width + j, name, t, b, c[0] if c else None, need[j])
                if need[j]:
                    old[j][slice(None) if chosen is None else chosen] = got
        for j, slot in enumerate(slots):
            if need[j]:
                m.put_compact(slot, old[j], g)

    return with_fences(ins, run)


@op("cp")
def cp_async(k, ins):
    """cp.async: the source is read at issue (or with a seed at the wait), the data lands when a wait covers its group.

    Until then the bytes of the destination count as uninitialised.
    """
    if ins.op[:3] == ("cp", "async", "commit_group"):

        def commit(m, g):
            m.commits = m.commits + g.mask

        return commit
    if ins.op[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        pending = ins.args[0].value if ins.op[2] == "wait_group" else 0
        return lambda m, g: land_copies(m, g, pending, ins.op[2] == "wait_all")
    if ins.op[2] not in ("ca", "cg") or "mbarrier" in ins.op or "bulk" in ins.op:
        k.unsupported()
    (_, to, to_offset), (_, source, offset) = k.address(ins.args[0], "shared"), k.address(ins.args[1], "global")
    size = ins.args[2].value
    extra = [a for a in ins.args[3:] if not ("L2::cache_hint" in ins.op and a is ins.args[-1])]
    limit = (
        k.source(
            Name(extra[0].name) if isinstance(extra[0], Name) else extra[0],
            BOOL if isinstance(extra[0], Name) and k.widths[k.slot(extra[0].name)] == 1 else U32,
        )
        if extra
        else None
    )

    def run(m, g):
        address = np.broadcast_to(m.address_of(source, offset, g), g.n)
        wanted = np.full(g.n, size)
        if limit:
            v = m.value(*limit, g)
            wanted = np.broadcast_to(np.where(v, 0, size) if v.dtype is BOOL else np.minimum(v, size).astype(np.int64), g.n)
        space, flat = m._flat("shared", m.address_of(to, to_offset, g), size, g, ALLOCATED)
        rows = np.zeros((g.n, size), np.uint8)
        for count in np.unique(wanted):
            if count == 0:
                continue
            chosen = wanted == count
            sub = g
            if not chosen.all():
                mask = np.zeros(m.total, bool)
                mask[g.index[chosen]] = True
                sub = Group(mask, m.living)
            step = size if count == size else 1
            for j in range(0, count, step):
                mem, there = m._flat("global", address[chosen] + np.uint64(j), step, sub, ALLOCATED | INITIALISED)
                rows[chosen, j : j + step] = mem.read_rows(there, step)
                if j == 0:
                    m.count_global("load", there, int(count), sub)
                if step == size or j % 4 == 0:
                    m.race("global", there, step, sub, "read")
        m.count_shared("store", flat, size, g.index)
        m.race("shared", flat, size, g, "write", rows_changed(space, flat, rows))
        space.state[flat[:, None] + np.arange(size)] = ALLOCATED
        late = None if m.seed is None else (address.view(np.int64) - GLOBAL_BASE, wanted)
        m.copies.append((g.index, m.commits[g.index], flat, rows, late))

    return run


def rows_changed(space, flat, rows):
    """The `changed` test of the race detector for whole rows of bytes."""

    def changed(lanes, others):
        held = space.read_rows(flat[lanes], rows.shape[1]) if others is None else rows[others]
        return (held != rows[lanes]).any(axis=1)

    return changed


def land_copies(m, g, pending, everything):
    if everything:
        m.commits = m.commits + g.mask
    left = []
    for index, number, flat, rows, late in m.copies:
        if late is not None:
            source, wanted = late
            there = np.arange(rows.shape[1]) < wanted[:, None]
            rows[there] = m.device.heap.data[(source[:, None] + np.arange(rows.shape[1]))[there]]
        done = g.mask[index] & (number < m.commits[index] - pending)
        if done.any():
            there, data = flat[done], rows[done]
            m.race("shared", there, data.shape[1], g, "write", rows_changed(m.shared, there, data), index[done])
            m.shared.write_rows(there, data)
        if not done.all():
            keep = ~done
            left.append((index[keep], number[keep], flat[keep], rows[keep], late and tuple(x[keep] for x in late)))
    m.copies = left
