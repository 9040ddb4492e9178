"""Comparison, selection, moves and address conversion."""

from __future__ import annotations

import numpy as np

from .core import DTYPES, F32, U32, U64, UNSIGNED, emit, op
from .memory import LOCAL_BASE, PARAM_BASE, SHARED_BASE
from .ops_float import DECODE, ENCODE, flush, is_float
from .program import SIZES, Name, Pair, Vec

COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "neu": np.not_equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(ins, t, decode=True):
    """Function (a, b) -> bool array for the compare operator of setp or set."""
    fn = np.not_equal if ins.op[1] == "ne" and not is_float(t) else COMPARE[ins.op[1]]
    if not is_float(t):
        return fn
    clean = flush if "ftz" in ins.op and t == "f32" else DECODE[t]
    return lambda a, b: fn(clean(a), clean(b))


@op("setp")
def setp(k, ins):
    t, combine = ins.op[-1], COMBINE.get(ins.op[2])
    compare = comparison(ins, t)
    sources = [(a, t) for a in ins.args[1:3]] + [(a, "pred") for a in ins.args[3:]]
    if isinstance(ins.args[0], Pair):
        dsts = [ins.args[0].first, ins.args[0].second]
        if t.endswith("x2"):  # one predicate per half
            split = lambda r, *c: tuple(np.ascontiguousarray(combine(r[:, j], *c) if c else r[:, j]) for j in (0, 1))
            return emit(k, dsts, sources, lambda a, b, *c: split(compare(a, b), *c))
        both = (
            (lambda a, b, c: (combine(compare(a, b), c), combine(~compare(a, b), c)))
            if combine
            else (lambda a, b: (compare(a, b), ~compare(a, b)))
        )
        return emit(k, dsts, sources, both)
    return emit(k, ins.args[0], sources, (lambda a, b, c: combine(compare(a, b), c)) if combine else compare)


@op("set")
def set_(k, ins):
    dt, t = ins.op[-2:]
    compare, combine = comparison(ins, t), COMBINE.get(ins.op[2])
    sources = [(a, t) for a in ins.args[1:3]] + [(a, "pred") for a in ins.args[3:]]

    def fn(a, b, *c):
        r = compare(a, b)
        if c:
            r = combine(r, c[0][:, None] if r.ndim == 2 else c[0])
        if is_float(dt):
            return ENCODE[dt](r.astype(F32))
        if r.ndim == 2:
            return np.where(r, np.uint16(0xFFFF), np.uint16(0)).reshape(-1).view(U32)
        return np.where(r, DTYPES[dt].type(-1 if dt[0] == "s" else (1 << 8 * SIZES[dt]) - 1), DTYPES[dt].type(0))

    return emit(k, ins.args[0], sources, fn)


@op("selp")
def selp(k, ins):
    t = ins.op[-1]
    return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], t), (ins.args[3], "pred")], lambda a, b, p: np.where(p, a, b))


@op("slct")
def slct(k, ins):
    t, ct = ins.op[-2:]
    return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], t), (ins.args[3], ct)], lambda a, b, c: np.where(c >= 0, a, b))


@op("mov")
def mov(k, ins):
    t, (dst, src) = ins.op[-1], ins.args
    if isinstance(src, Name) and src.name in (
        "%clock",
        "%clock64",
        "%clock_hi",
        "%globaltimer",
        "%globaltimer_lo",
        "%globaltimer_hi",
    ):
        slot = k.target(dst)  # an instruction count stands for time
        return lambda m, g: m.put_compact(slot, np.array([0 if src.name.endswith("_hi") else sum(m.launch.warps_at)], U64), g)
    if isinstance(dst, Vec):  # unpack
        n = len(dst.items)
        part = UNSIGNED[SIZES[t] // n]
        return emit(k, dst.items, [(src, t)], lambda x: tuple(np.ascontiguousarray(x.view(part).reshape(-1, n)[:, j]) for j in range(n)))
    if isinstance(src, Vec):  # pack
        n = len(src.items)
        if SIZES[t] // n not in UNSIGNED or SIZES[t] > 8:
            k.unsupported()
        part = f"u{8 * SIZES[t] // n}"
        whole = UNSIGNED[SIZES[t]]

        def join(*parts):
            out = parts[0].astype(whole)
            for j, p in enumerate(parts[1:], 1):
                out = out | p.astype(whole) << whole.type(j * 8 * p.itemsize)
            return out

        return emit(k, dst, [(a, part) for a in src.items], join)
    return emit(k, dst, [(src, t)], lambda x: x)


@op("cvta")
def cvta(k, ins):
    space = next((p.split("::")[0] for p in ins.op if p.split("::")[0] in ("global", "shared", "local", "const", "param")), None)
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}.get(space, 0)
    dst, src = ins.args
    if isinstance(src, Name) and k.slot(src.name) is None and not src.name.startswith("%"):
        found = k._variable(src.name, ins.scope, k.instance)
        if space == "param" and found and found[0] == "local":
            base = LOCAL_BASE
    sign = np.uint64((-base if "to" in ins.op else base) & 0xFFFFFFFFFFFFFFFF)
    if ins.op[-1] != "u64":
        k.unsupported("32-bit generic addresses")
    return emit(k, dst, [(src, "u64")], lambda x: x + sign)


@op("isspacep")
def isspacep(k, ins):
    window = {"shared": SHARED_BASE >> 40, "local": LOCAL_BASE >> 40, "param": PARAM_BASE >> 40}.get(ins.op[1].split("::")[0])
    if ins.op[1] == "const":
        k.unsupported()
    return emit(
        k,
        ins.args[0],
        [(ins.args[1], "u64")],
        lambda x: (x >> np.uint64(40) == np.uint64(window)) if window else x >> np.uint64(40) > np.uint64(3),
    )


@op("mapa")
def mapa(k, ins):
    """Without clusters rank 0 is the CTA itself."""
    return emit(k, ins.args[0], [(ins.args[1], ins.op[-1])], lambda x: x)


@op("createpolicy")
def createpolicy(k, ins):
    slot = k.target(ins.args[0])
    return lambda m, g: m.put_compact(slot, np.zeros(1, U64), g)


@op(
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "nanosleep",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
)
def no_operation(k, ins):
    return lambda m, g: None
