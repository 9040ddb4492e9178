"""Triton kernels compiled offline."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ptxsim import UninitialisedRead  # noqa: E402
from ptxsim.triton_runner import run_triton  # noqa: E402

from .philox import philox_reference  # noqa: E402


@triton.jit
def axpy_noise(x_ptr, o_ptr, a, s, seed, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(o_ptr + at, a * x + s * tl.randn(seed, at), mask=at < n)


@triton.jit
def uniform(o_ptr, seed, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(o_ptr + at, tl.randint(seed, at))


@triton.jit
def softmax(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + c, mask=c < cols, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * cols + c, e / tl.sum(e, 0), mask=c < cols)


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        a = tl.load(a_ptr + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        b = tl.load(b_ptr + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head, rm, rd = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    base = head * T * D
    q = tl.load(q_ptr + base + rm[:, None] * D + rd[None, :])
    m, l, acc = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, D), tl.float32)
    for start in range(0, T, BN):
        rn = start + tl.arange(0, BN)
        k = tl.load(k_ptr + base + rn[:, None] * D + rd[None, :])
        s = tl.dot(q, tl.trans(k)) * scale
        new = tl.maximum(m, tl.max(s, 1))
        p, alpha = tl.exp(s - new[:, None]), tl.exp(m - new)
        l = l * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + base + rn[:, None] * D + rd[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = new
    tl.store(o_ptr + base + rm[:, None] * D + rd[None, :], (acc / l[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def rearrange(x_ptr, scan_ptr, sort_ptr, turned_ptr, column_ptr, row_ptr, where_ptr, bins_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(scan_ptr + r[:, None] * C + c[None, :], tl.cumsum(x, 1))
    tl.store(sort_ptr + r[:, None] * C + c[None, :], tl.sort(x, 1))
    tl.store(turned_ptr + c[:, None] * R + r[None, :], tl.trans(x))
    tl.store(column_ptr + c, tl.sum(x, 0))
    tl.store(row_ptr + r, tl.max(x, 1))
    tl.store(where_ptr + r, tl.argmax(x, 1))
    tl.atomic_add(bins_ptr + (c & 7), tl.sum(x, 0))


@triton.jit
def attention_backward(q, k, v, do, lse, delta, dq, dk, dv, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rn, rd = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, D)
    kk, vv = tl.load(k + rn[:, None] * D + rd[None, :]), tl.load(v + rn[:, None] * D + rd[None, :])
    sum_k, sum_v = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
    for m in range(0, T, BM):
        rm = m + tl.arange(0, BM)
        qq, g = tl.load(q + rm[:, None] * D + rd[None, :]), tl.load(do + rm[:, None] * D + rd[None, :])
        p = tl.exp(tl.dot(qq, tl.trans(kk)) * scale - tl.load(lse + rm)[:, None])
        sum_v += tl.dot(tl.trans(p.to(qq.dtype)), g)
        ds = (p * (tl.dot(g, tl.trans(vv)) - tl.load(delta + rm)[:, None]) * scale).to(qq.dtype)
        sum_k += tl.dot(tl.trans(ds), qq)
        tl.atomic_add(dq + rm[:, None] * D + rd[None, :], tl.dot(ds, kk))
    tl.store(dk + rn[:, None] * D + rd[None, :], sum_k)
    tl.store(dv + rn[:, None] * D + rd[None, :], sum_v)


def test_elementwise_randn():
    n = 5000
    x, o = torch.randn(n), torch.empty(n)
    run_triton(
        axpy_noise,
        triton.cdiv(n, 1024),
        dict(x_ptr=x, o_ptr=o, a=2.0, s=0.5, seed=99, n=n),
        dict(BLOCK=1024),
        uninitialised_outputs=["o_ptr"],
    )
    z = (o - 2 * x) / 0.5
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    again = torch.empty(n)
    run_triton(
        axpy_noise, triton.cdiv(n, 512), dict(x_ptr=torch.zeros(n), o_ptr=again, a=2.0, s=1.0, seed=99, n=n), dict(BLOCK=512), arch=90
    )
    assert torch.allclose(again, z, atol=1e-5)


def test_philox_of_triton():
    o = np.zeros(128, "i4")
    run_triton(uniform, 1, dict(o_ptr=o, seed=1234), dict(BLOCK=128))
    assert (o.view("u4") == [philox_reference((i, 0, 0, 0), (1234, 0))[0] for i in range(128)]).all()


@pytest.mark.parametrize("warps", [1, 4])
def test_softmax(warps):
    x = torch.randn(9, 300).bfloat16()
    y = torch.zeros(9, 300)
    report = run_triton(softmax, 9, dict(x_ptr=x, y_ptr=y, cols=300), dict(BLOCK=512), num_warps=warps)
    assert (y - torch.softmax(x.float(), 1)).abs().max() < 1e-6
    assert report.global_store.unique_bytes == y.numel() * 4 + (-y.numel() * 4) % 32


@pytest.mark.parametrize("arch,tile,stages", [(80, 64, 3), (80, 32, 2), (90, 32, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot(arch, tile, stages, dtype):
    m, n, k = 100, 96, 136
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n)
    report = run_triton(
        matmul,
        (triton.cdiv(m, tile), triton.cdiv(n, tile)),
        dict(a_ptr=a, b_ptr=b, c_ptr=c, M=m, N=n, K=k),
        dict(BM=tile, BN=tile, BK=32),
        num_warps=4 if arch == 80 else 2,
        num_stages=stages,
        arch=arch,
    )
    assert (c - a.float() @ b.float()).abs().max() < 1e-4
    assert report.mma_flops >= 2 * m * n * k


def test_flash_attention():
    heads, t, d = 2, 128, 64
    q, k, v = (torch.randn(heads, t, d).bfloat16() for _ in range(3))
    o = torch.zeros_like(q)
    run_triton(attention, (t // 64, heads), dict(q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=o, T=t, scale=d**-0.5), dict(D=d, BM=64, BN=32))
    want = torch.softmax(q.float() @ k.float().transpose(1, 2) * d**-0.5, -1) @ v.float()
    assert (o.float() - want).abs().max() < 0.02


def test_uninitialised_input_is_found():
    n = 1024
    with pytest.raises(UninitialisedRead, match="x_ptr"):
        run_triton(
            axpy_noise,
            1,
            dict(x_ptr=torch.zeros(n), o_ptr=torch.zeros(n), a=2.0, s=0.5, seed=1, n=n),
            dict(BLOCK=1024),
            uninitialised_outputs=["x_ptr"],
        )


@pytest.mark.slow
@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("arch", [80, 90])
def test_scans_sorts_transposes_atomics(arch, warps):
    r, c = 32, 64
    x = torch.randn(r, c)
    out = [
        torch.zeros(r, c),
        torch.zeros(r, c),
        torch.zeros(c, r),
        torch.zeros(c),
        torch.zeros(r),
        torch.zeros(r, dtype=torch.int32),
        torch.zeros(8),
    ]
    names = ["scan_ptr", "sort_ptr", "turned_ptr", "column_ptr", "row_ptr", "where_ptr", "bins_ptr"]
    run_triton(rearrange, 1, {"x_ptr": x, **dict(zip(names, out))}, dict(R=r, C=c), num_warps=warps, arch=arch)
    assert torch.allclose(out[0], x.cumsum(1), atol=1e-4) and torch.equal(out[1], x.sort(1)[0]) and torch.equal(out[2], x.T)
    assert torch.allclose(out[3], x.sum(0), atol=1e-4) and torch.equal(out[4], x.max(1)[0]) and torch.equal(out[5].long(), x.argmax(1))
    assert torch.allclose(out[6], x.sum(0).view(8, 8).sum(0), atol=1e-4)


@pytest.mark.parametrize("arch", [80, 90])
def test_flash_attention_backward(arch):
    t, d = 64, 64
    q, k, v, do = (torch.randn(t, d).bfloat16() for _ in range(4))
    qf, kf, vf = (x.float().requires_grad_() for x in (q, k, v))
    s = qf @ kf.T / 8
    o = torch.softmax(s, 1) @ vf
    o.backward(do.float())
    grads = [torch.zeros(t, d) for _ in range(3)]
    arguments = dict(
        q=q,
        k=k,
        v=v,
        do=do,
        lse=torch.logsumexp(s, 1).detach(),
        delta=(o * do.float()).sum(1).detach(),
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        T=t,
        scale=0.125,
    )
    run_triton(attention_backward, t // 32, arguments, dict(D=d, BM=32, BN=32), arch=arch)
    for got, want in zip(grads, (qf, kf, vf)):
        assert (got - want.grad).abs().max() < 0.01


def test_in_place_and_misaligned():
    n = 1024
    x = torch.randn(n)
    want = 2 * x
    run_triton(axpy_noise, 1, dict(x_ptr=x, o_ptr=x, a=2.0, s=0.0, seed=1, n=n), dict(BLOCK=1024))
    assert torch.equal(x, want)
    storage = torch.randn(n + 1)
    report = run_triton(axpy_noise, 1, dict(x_ptr=storage[1:], o_ptr=x, a=1.0, s=0.0, seed=1, n=n), dict(BLOCK=1024))
    assert torch.equal(x, storage[1:]) and "ld.global.v4.b32" not in report.opcodes
    with pytest.raises(ValueError, match="overlaps"):
        run_triton(axpy_noise, 1, dict(x_ptr=storage[1:], o_ptr=storage[:-1], a=1.0, s=0.0, seed=1, n=n), dict(BLOCK=1024))


@triton.jit
def scale_shift(x_ptr, o_ptr, a, b, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + at, tl.load(x_ptr + at, mask=at < n) * a + b, mask=at < n)


def test_fusion_can_be_switched_off():
    """Separate multiply and add give NumPy's bits; a fused one does not."""
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(1000).astype(np.float32))
    outputs = {}
    for fused in (True, False):
        o = torch.empty_like(x)
        run_triton(scale_shift, 4, dict(x_ptr=x, o_ptr=o, a=1.1, b=-0.7, n=1000), dict(BLOCK=256), options={"enable_fp_fusion": fused})
        outputs[fused] = o.numpy()
    exact = x.numpy() * np.float32(1.1) + np.float32(-0.7)
    assert (outputs[False] == exact).all() and (outputs[True] != exact).any()
