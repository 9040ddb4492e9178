"""Integer arithmetic, logic and bit manipulation."""

from __future__ import annotations

import numpy as np

from .core import DTYPES, F64, HANDLERS, I32, I64, U32, U64, UNSIGNED, emit, op
from .program import SIZES, Imm


def double_width(dtype):
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def high_product(a, b):
    """Upper half of a*b."""
    if a.itemsize < 8:
        return (a.astype(double_width(a.dtype)) * b >> a.dtype.type(8 * a.itemsize)).astype(a.dtype)
    x, y, low, s = a.view(U64), b.view(U64), np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> s, y & low, y >> s
    middle = x1 * y0 + (x0 * y0 >> s)
    high = x1 * y1 + (middle >> s) + ((middle & low) + x0 * y1 >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


PRODUCT = {"lo": np.multiply, "hi": high_product, "wide": lambda a, b: a.astype(double_width(a.dtype)) * b}


def integer_mul(k, ins):
    return emit(k, ins.args[0], [(a, ins.op[-1]) for a in ins.args[1:]], PRODUCT[ins.op[1]])


def carry_slot(k):
    if not hasattr(k, "carry"):
        k.carry = k.new_slot(4)
    return k.carry


def with_carry(k, dst, sources, fn, uses, sets):
    """add.cc/addc/madc...: fn(*sources, carry) -> (result, new carry) with carry as 0 or 1 in the operand type."""
    d, slot = k.target(dst), carry_slot(k)
    plan = [k.source(a, DTYPES[t]) for a, t in sources]

    def run(m, g):
        args = [m.value(s, t, g) for s, t in plan]
        c = m.value(slot, U32, g) if uses else np.zeros(1, U32)
        r, out = fn(*args, c.astype(args[-1].dtype))
        m.put_compact(d, r, g)
        if sets:
            m.put_compact(slot, out.astype(U32), g)

    return run


def add_carry(a, b, c):
    s = a + b
    r = s + c
    return r, (s < a) | (r < s)


def unsigned(t):
    return "u" + t[1:]


def integer_add(k, ins, sign):
    t, args = ins.op[-1], ins.args
    if "cc" in ins.op:
        return carry_add(k, ins, False, sign)
    fn = np.add if sign > 0 else np.subtract
    if "sat" in ins.op:
        limits = np.iinfo(I32)
        fn = lambda a, b: np.clip(a.astype(I64) + sign * b.astype(I64), limits.min, limits.max).astype(I32)
    if DTYPES.get(t) is None:
        k.unsupported()
    return emit(k, args[0], [(a, t) for a in args[1:]], fn)


def carry_add(k, ins, uses, sign):
    """sub is a + ~b + 1; its borrow flag is the inverted carry."""
    t = unsigned(ins.op[-1])
    one = lambda c: c.dtype.type(1)
    fn = add_carry if sign > 0 else lambda a, b, c: (lambda r: (r[0], ~r[1]))(add_carry(a, ~b, one(c) - c))
    return with_carry(k, ins.args[0], [(a, t) for a in ins.args[1:]], fn, uses, "cc" in ins.op)


HANDLERS["addc"] = lambda k, ins: carry_add(k, ins, True, 1)
HANDLERS["subc"] = lambda k, ins: carry_add(k, ins, True, -1)


def integer_mad(k, ins, uses=False):
    half, t, args = ins.op[1], ins.op[-1], ins.args
    product = PRODUCT[half]
    if uses or "cc" in ins.op:
        fn = lambda a, b, c, carry: add_carry(product(a, b).view(c.dtype), c, carry)
        return with_carry(k, args[0], [(args[1], t), (args[2], t), (args[3], unsigned(t))], fn, uses, "cc" in ins.op)
    wide = {"wide": f"{t[0]}{16 * SIZES[t]}"}.get(half, t)
    return emit(k, args[0], [(args[1], t), (args[2], t), (args[3], wide)], lambda a, b, c: product(a, b) + c)


HANDLERS["madc"] = lambda k, ins: integer_mad(k, ins, True)


@op("mul24", "mad24")
def mul24(k, ins):
    t = ins.op[-1]
    cut = lambda x: (x << x.dtype.type(8)) >> x.dtype.type(8)
    shift = 0 if ins.op[1] == "lo" else 16
    product = lambda a, b: (cut(a).astype(double_width(a.dtype)) * cut(b) >> a.dtype.type(shift)).astype(a.dtype)
    return emit(k, ins.args[0], [(a, t) for a in ins.args[1:]], lambda a, b, *c: product(a, b) + c[0] if c else product(a, b))


@op("sad")
def sad(k, ins):
    return emit(k, ins.args[0], [(a, ins.op[-1]) for a in ins.args[1:]], lambda a, b, c: np.where(a < b, b - a, a - b) + c)


def _logic(bits, preds):
    def build(k, ins):
        t = ins.op[-1]
        return emit(k, ins.args[0], [(a, t) for a in ins.args[1:]], preds if t == "pred" else bits)

    return build


HANDLERS["and"] = _logic(np.bitwise_and, np.logical_and)
HANDLERS["or"] = _logic(np.bitwise_or, np.logical_or)
HANDLERS["xor"] = _logic(np.bitwise_xor, np.logical_xor)
HANDLERS["not"] = _logic(np.invert, np.logical_not)
HANDLERS["cnot"] = _logic(lambda x: (x == 0).astype(x.dtype), None)


@op("shl", "shr")
def shift(k, ins):
    t, ufunc = ins.op[-1], np.left_shift if ins.op[0] == "shl" else np.right_shift
    bits = 8 * SIZES[t]
    if isinstance(ins.args[2], Imm) and 0 <= ins.args[2].value < bits:
        return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], t)], ufunc)
    last = np.uint32(bits - 1)

    def fn(a, b):  # amounts beyond the width act like the width
        r = ufunc(a, np.minimum(b, last).astype(a.dtype))
        return r if a.dtype.kind == "i" and ufunc is np.right_shift else np.where(b > last, a.dtype.type(0), r)

    return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], "u32")], fn)


@op("shf")
def shf(k, ins):
    left, wrap = ins.op[1] == "l", ins.op[2] == "wrap"

    def fn(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(U64)
        both = (b.astype(U64) << np.uint64(32)) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(U32)

    return emit(k, ins.args[0], [(a, "u32") for a in ins.args[1:]], fn)


@op("lop3")
def lop3(k, ins):
    if len(ins.args) != 5 or ins.op[-1] != "b32":
        k.unsupported()
    table = ins.args[4].value
    invert = bin(table).count("1") > 4
    terms = [j for j in range(8) if ((table ^ (0xFF if invert else 0)) >> j) & 1]

    def fn(a, b, c):
        if table == 0x96:
            return a ^ b ^ c
        out = np.zeros(1, U32)
        for j in terms:
            out = out | (a if j & 4 else ~a) & (b if j & 2 else ~b) & (c if j & 1 else ~c)
        return ~out if invert else out

    return emit(k, ins.args[0], [(a, "u32") for a in ins.args[1:4]], fn)


@op("prmt")
def prmt(k, ins):
    if ins.op != ("prmt", "b32"):
        k.unsupported("mode")

    def fn(a, b, c):
        both, out = (b.astype(U64) << np.uint64(32)) | a, np.zeros(1, U32)
        for j in range(4):
            selector = (c >> np.uint32(4 * j)) & np.uint32(15)
            byte = (both >> (selector & np.uint32(7)).astype(U64) * np.uint64(8)).astype(U32) & np.uint32(255)
            byte = np.where(selector & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
            out = out | byte << np.uint32(8 * j)
        return out

    return emit(k, ins.args[0], [(a, "u32") for a in ins.args[1:]], fn)


@op("bfe")
def bfe(k, ins):
    t = ins.op[-1]

    def fn(a, position, length):
        position, length = (
            np.minimum(position & np.uint32(255), np.uint32(63)),
            np.minimum(length & np.uint32(255), np.uint32(64)),
        )
        wide = a.astype(double_width(a.dtype) if a.itemsize < 8 else a.dtype)
        kind = wide.dtype
        moved = wide >> position.astype(kind)
        rest = np.where(length == 0, 0, 64 - length.astype(I64)).astype(kind)  # sign- or zero-extend `length` bits
        return np.where(length == 0, kind.type(0), (moved << rest) >> rest).astype(a.dtype)

    return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], "u32"), (ins.args[3], "u32")], fn)


@op("bfi")
def bfi(k, ins):
    t = ins.op[-1]

    def fn(a, b, position, length):
        p = np.minimum(position & np.uint32(255), np.uint32(63)).astype(U64)
        n = np.minimum(length & np.uint32(255), np.uint32(64)).astype(U64)
        ones = np.where(n >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))
        mask = np.where((position & np.uint32(255)) > 63, np.uint64(0), ones << p)
        return ((b.astype(U64) & ~mask) | (a.astype(U64) << p) & mask).astype(a.dtype)

    return emit(k, ins.args[0], [(ins.args[1], t), (ins.args[2], t), (ins.args[3], "u32"), (ins.args[4], "u32")], fn)


def bit_length(x):
    """Index of the highest set bit plus one; 0 for 0. Unsigned input."""
    if x.itemsize == 8:
        high = (x >> np.uint64(32)).astype(U32)
        return np.where(high != 0, bit_length(high) + np.uint32(32), bit_length(x.astype(U32)))
    return np.frexp(x.astype(F64))[1].astype(U32)


@op("clz", "bfind")
def clz(k, ins):
    t = ins.op[-1]
    bits = np.uint32(8 * SIZES[t])
    if ins.op[0] == "clz":
        return emit(k, ins.args[0], [(ins.args[1], unsigned(t))], lambda x: bits - bit_length(x))

    def fn(x):
        if x.dtype.kind == "i":
            x = np.where(x < 0, ~x, x).view(UNSIGNED[x.itemsize])
        n = bit_length(x)
        return np.where(n == 0, np.uint32(0xFFFFFFFF), bits - n if "shiftamt" in ins.op else n - np.uint32(1))

    return emit(k, ins.args[0], [(ins.args[1], t)], fn)


@op("popc")
def popc(k, ins):
    return emit(k, ins.args[0], [(ins.args[1], ins.op[-1])], lambda x: np.bitwise_count(x).astype(U32))


@op("dp4a")
def dp4a(k, ins):
    """Dot product of four bytes added to c; the two type suffixes give the signedness of a and b."""
    kinds = [np.dtype("i1" if t[0] == "s" else "u1") for t in ins.op[1:3]]

    def fn(a, b, c):
        x, y = (v.view(kind).reshape(-1, 4).astype(I32) for v, kind in zip((a, b), kinds))
        return (x * y).sum(axis=1, dtype=I32).view(U32) + c

    return emit(k, ins.args[0], [(a, "u32") for a in ins.args[1:]], fn)


@op("brev")
def brev(k, ins):
    def fn(x):
        n, one = 8 * x.itemsize, x.dtype.type
        for step in (1, 2, 4):
            mask = one(sum(((1 << step) - 1) << j for j in range(0, n, 2 * step)))
            x = ((x >> one(step)) & mask) | ((x & mask) << one(step))
        return x.byteswap()

    return emit(k, ins.args[0], [(ins.args[1], ins.op[-1])], fn)
