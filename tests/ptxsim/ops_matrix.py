"""Matrix instructions: ldmatrix, stmatrix, mma.sync, wmma. `multiply_accumulate` says how a tensor core adds."""

from __future__ import annotations

import numpy as np

from .core import F16, F32, F64, I32, I64, U16, U32, U64, op
from .group import Group
from .memory import ALLOCATED, INITIALISED, BarrierError, from_bfloat16
from .ops_float import DECODE, ENCODE, packed
from .ops_memory import rows_changed, space_of
from .ops_warp import warp_synchronous
from .program import SIZES, Imm, Vec

I16 = np.dtype("i2")


def whole_warps(m, g):
    """Lane numbers (warps, 32) of the group, which must consist of full warps."""
    if g.n != 32 * g.warps:
        raise BarrierError(f"{m.place(m.pc)} needs all 32 lanes of a warp: {m.whereabouts(int(g.index[0]))}")
    return g.index.reshape(-1, 32)


@op("ldmatrix", "stmatrix")
def ldmatrix(k, ins):
    load, count, transposed = (
        ins.op[0] == "ldmatrix",
        int(next(p for p in ins.op if p in ("x1", "x2", "x4"))[1]),
        "trans" in ins.op,
    )
    if "m8n8" not in ins.op or ins.op[-1] != "b16":
        k.unsupported()
    regs, mem = ins.args if load else ins.args[::-1]
    _, base, offset = k.address(mem, "shared")
    regs = regs.items if isinstance(regs, Vec) else [regs]
    slots = [k.target(r) if load else k.source(r, U32)[0] for r in regs]

    def run(m, g):
        warps = whole_warps(m, g)
        address = np.broadcast_to(m.address_of(base, offset, g), g.n).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        lanes = warps[:, : 8 * count].reshape(-1)
        mask = np.zeros(m.total, bool)
        mask[lanes] = True
        sub = Group(mask, m.living, whole=True)
        space, flat = m._flat("shared", address, 16, sub, ALLOCATED | (INITIALISED if load else 0))
        m.count_shared("load" if load else "store", flat, 16, sub.index)
        if load:
            m.race("shared", flat, 16, sub, "read")
            rows = space.read_rows(flat, 16).view(U16).reshape(-1, count, 8, 8)
            if transposed:
                rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
            words = rows.view(U32).reshape(-1, count, 32)
            for j, slot in enumerate(slots):
                m.put_compact(slot, np.ascontiguousarray(words[:, j]).reshape(-1), g)
        else:
            words = np.stack([np.broadcast_to(m.value(s, U32, g), g.n).reshape(-1, 32) for s in slots], axis=1)
            rows = np.ascontiguousarray(words).view(U16).reshape(-1, count, 8, 8)
            if transposed:
                rows = rows.transpose(0, 1, 3, 2)
            rows = np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8)
            m.race("shared", flat, 16, sub, "write", rows_changed(space, flat, rows))
            space.write_rows(flat, rows)

    return warp_synchronous(k, None, run)


def unpack_elements(words, t):
    """(..., 4) b32 registers over the lanes of a quad -> float32 elements, two per register for 16-bit types."""
    if t == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(F32)[..., None]
    halves = np.ascontiguousarray(words).view(U16).reshape(*words.shape, 2)
    return halves.view(F16).astype(F32) if t == "f16" else from_bfloat16(halves)


PRODUCTS_AT_ONCE = {"f16": 8, "bf16": 8, "tf32": 4}
EXTRA_BITS = 1  # that alignment keeps below the last bit of a float32
ZERO, NOT_FINITE = -4096, 8192  # their exponents: the second outweighs the first


def exponents(x):
    """floor(log2 |x|) of float32 numbers, -126 for subnormal ones."""
    exponent = (x.view(U32) >> np.uint32(23)).astype(I16) & np.int16(0xFF)
    exponent = np.where(x == 0, np.int16(ZERO), np.maximum(exponent, np.int16(1)) - np.int16(127))
    return np.where(exponent == 128, np.int16(NOT_FINITE), exponent)


def powers(exponent):
    return (exponent.astype(I64) + 1023 << 52).view(F64)


def multiply_accumulate(left, right, c, kind, half=False):
    """c + left right as the tensor cores of an A100 compute it, c and the result float32.

    Eight products of 16-bit numbers, or four of tf32, are summed with c at a time. Each is exact. All are cut off, toward zero,
    at the same bit: one below the last bit that a float32 of the largest exponent has, where a product's exponent is the sum of
    its factors'. The sum of what is left is exact, and is cut off to 24 bits, toward zero; `half` accumulators (float16 numbers)
    are rounded to nearest instead. So 1 + 2^-25 + ... + 2^-25 is 1, and a long sum of positive numbers comes out low.

    Fasi, Higham, Mikaitis & Pranesh 2021, "Numerical behavior of NVIDIA tensor cores" (PeerJ CS 7:e330), found the alignment,
    the rounding and the extra bit; Khattak & Mikaitis 2025, "Accurate models of NVIDIA tensor cores" (arXiv 2512.07004), the rest,
    compared with the hardware bit by bit. An H100 keeps one bit more and takes twice as many products at a time; sm_90 is
    computed as sm_80 here all the same, which is the less accurate of the two.

    left is (K, 16, n), right (K, n * columns), c (16, n * columns): n products of 16 rows each, side by side.
    """
    columns = right.shape[1] // left.shape[2]
    left, exponent = np.repeat(left, columns, axis=2), np.repeat(exponents(left), columns, axis=2)
    exponent += exponents(right)[:, None]
    for first in range(0, len(left), PRODUCTS_AT_ONCE[kind]):
        block = slice(first, first + PRODUCTS_AT_ONCE[kind])
        c = add_products(left[block], right[block, None], exponent[block], c, half)
    return c


def add_products(left, right, exponent, c, half):
    largest = np.maximum(exponent.max(0), exponents(c))
    # float32 and int32 hold all that is needed unless numbers are tiny (where they are all zero it does not matter) or huge
    ordinary = not np.any((largest > ZERO + 1000) & (largest < -100) | (largest > 120))
    real, integer, smallest = (F32, I32, -126) if ordinary else (F64, I64, -149)
    last = np.maximum(largest - np.int16(23 + EXTRA_BITS), np.int16(smallest))  # exponent of the last bit that is kept
    scale = powers(-last).astype(real)
    with np.errstate(all="ignore"):
        products = left.astype(real) * right  # exact, or below the last bit
        total = np.add.reduce((products * scale).astype(integer), axis=0, dtype=integer)
        total = (total + (c * scale).astype(integer)).astype(F64)
        if not half:
            total = (total.view(U64) & ~np.uint64((1 << 53 - 24) - 1)).view(F64)
        total *= powers(last)
        if not ordinary:  # infinities and NaN as IEEE has them
            plain = products.sum(0) + c
            total = np.where(np.isfinite(plain), total, plain)
        return total.astype(F16).astype(F32) if half else total.astype(F32)


@op("mma")
def mma(k, ins):
    """mma.sync m16n8kK: fragments are gathered to matrices of (K, 16) and (K, 8) for each warp."""
    shape, types = next(p for p in ins.op if p.startswith("m16") or p.startswith("m8")), ins.op[-4:]
    dt, at, bt, ct = types
    depth = {
        ("m16n8k16", "f16"): 16,
        ("m16n8k16", "bf16"): 16,
        ("m16n8k8", "f16"): 8,
        ("m16n8k8", "bf16"): 8,
        ("m16n8k8", "tf32"): 8,
        ("m16n8k4", "tf32"): 4,
    }.get((shape, at))
    orders = [p for p in ins.op if p in ("row", "col")]
    if depth is None or at != bt or dt not in ("f32", "f16") or ct != dt or orders != ["row", "col"]:
        k.unsupported()
    d, a, b, c = [v.items for v in ins.args[:4]]
    slots = [k.target(x) for x in d]
    a, b = ([k.source(x, U32)[0] for x in v] for v in (a, b))
    c = [k.source(x, F32 if ct == "f32" else U32)[0] for x in c]
    per = 1 if at == "tf32" else 2  # elements of a register along K
    flops = 2 * 16 * 8 * depth

    def run(m, g):
        warps = whole_warps(m, g)
        take = lambda slots, dtype=U32: np.stack([np.broadcast_to(m.value(s, dtype, g), g.n) for s in slots]).reshape(len(slots), -1, 8, 4)
        fa, fb = unpack_elements(take(a), at), unpack_elements(take(b), at)  # register, warp, group, quad lane, element
        n = len(warps)
        left = fa.reshape(-1, 2, n, 8, 4, per).transpose(0, 4, 5, 1, 3, 2).reshape(depth, 16, n)
        right = fb.transpose(0, 3, 4, 1, 2).reshape(depth, 8 * n)
        if dt == "f32":
            held = take(c, F32)
        else:  # two columns of a row in a register
            held = packed(np.ascontiguousarray(take(c)).reshape(-1), F16).astype(F32).reshape(2, n, 8, 4, 2).transpose(0, 4, 1, 2, 3)
        held = held.reshape(2, 2, n, 8, 4).transpose(0, 3, 2, 4, 1).reshape(16, 8 * n)  # (row half, column parity, warp, row, quad lane)
        total = multiply_accumulate(left, right, held, at, half=dt == "f16")
        total = total.reshape(2, 8, n, 4, 2).transpose(0, 4, 2, 1, 3).reshape(4, -1)
        m.report.mma_flops += flops * n
        m.report.mma_instructions += n
        for j, slot in enumerate(slots):
            m.put_compact(slot, total[j] if dt == "f32" else ENCODE["f16x2"](total[2 * j : 2 * j + 2].T), g)

    return warp_synchronous(k, None, run)


def wmma_elements(g, t, layout, stride):
    """Byte offsets of the elements a thread holds in a 16x16 wmma fragment: list of (n,) arrays, one per element.

    The layout is opaque in PTX; here element e = row * 16 + column lives in thread e % 32.
    """
    out = []
    for j in range(8):
        row, column = np.divmod((g.index & 31).astype(np.uint64) + np.uint64(32 * j), np.uint64(16))
        out.append((row * stride + column if layout == "row" else column * stride + row) * np.uint64(SIZES[t]))
    return out


@op("wmma")
def wmma(k, ins):
    """wmma.load / store / mma of shape m16n16k16 for f16, bf16 and f32 fragments."""
    if "m16n16k16" not in ins.op:
        k.unsupported()
    if ins.op[1] == "mma":
        return wmma_mma(k, ins)
    load, t = ins.op[1] == "load", ins.op[-1]
    layout = next(p for p in ins.op if p in ("row", "col"))
    regs, mem = ins.args[:2] if load else ins.args[1::-1]
    space, base, offset = k.address(mem, space_of(ins))
    slots = [k.target(r) if load else k.source(r, U32)[0] for r in regs.items]
    stride = k.source(ins.args[2] if len(ins.args) > 2 else Imm("int", 16), U32)
    halves = t != "f32"

    def run(m, g):
        whole_warps(m, g)
        g = Group(g.mask, m.living, g.n, whole=True)
        address = m.address_of(base, offset, g)
        places = [address + o for o in wmma_elements(g, t, layout, m.value(*stride, g).astype(np.uint64))]
        if load:
            values = [m.load(space, a, SIZES[t], 1, g)[0] for a in places]
            if halves:
                values = [values[2 * j].astype(U32) | values[2 * j + 1].astype(U32) << np.uint32(16) for j in range(4)] * (len(slots) // 4)
            for slot, v in zip(slots, values):
                m.put_compact(slot, v, g)
            return
        values = [m.value(s, U32, g) for s in slots]
        if halves:
            values = [(v >> np.uint32(16 * j)).astype(U16) for v in values for j in (0, 1)]
        for a, v in zip(places, values):
            m.store(space, a, SIZES[t], [v], g)

    return warp_synchronous(k, None, run)


def wmma_mma(k, ins):
    """d = a * b + c on wmma fragments; the row/col words describe memory, not fragments, and do not matter here."""
    types = [p for p in ins.op if p in ("f16", "bf16", "f32")]
    dt, at, ct = (types[0], "f16", types[1]) if len(types) == 2 else (types[0], types[1], types[3])
    slots = [k.target(r) for r in ins.args[0].items]
    a, b, c = ([k.source(r, U32)[0] for r in v.items] for v in ins.args[1:4])

    def run(m, g):
        n = len(whole_warps(m, g))

        def matrix(regs, t):
            words = np.stack([np.broadcast_to(m.value(s, U32, g), g.n) for s in regs[: 8 if t == "f32" else 4]], axis=1)
            held = words.view(F32) if t == "f32" else DECODE[t](np.ascontiguousarray(words).view(F16 if t == "f16" else U16))
            return held.reshape(n, 32, 8).transpose(0, 2, 1).reshape(n, 16, 16)

        right, held = matrix(b, at).transpose(1, 0, 2).reshape(16, -1), matrix(c, ct).transpose(1, 0, 2).reshape(16, -1)
        out = multiply_accumulate(np.ascontiguousarray(matrix(a, at).transpose(2, 1, 0)), right, held, at, half=dt == "f16")
        out = out.reshape(16, n, 16).transpose(1, 0, 2)
        m.report.mma_flops += 2 * 16**3 * n
        m.report.mma_instructions += n
        held = out.reshape(n, 8, 32).transpose(0, 2, 1).reshape(n * 32, 8)
        held = np.ascontiguousarray(held if dt == "f32" else held.astype(F16)).view(U32)
        for j, slot in enumerate(slots):
            m.put_compact(slot, np.ascontiguousarray(held[:, j]), g)

    return warp_synchronous(k, None, run)
