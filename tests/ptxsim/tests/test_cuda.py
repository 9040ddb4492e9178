"""Whole CUDA C++ kernels against NumPy."""

import math

import numpy as np
import pytest

from ptxsim import from_bfloat16, to_bfloat16

from .philox import philox_reference


def test_vectorised_strided(cuda, device, rng):
    module = cuda(r"""
extern "C" __global__ void transpose4(const float4* a, float* b, int rows, int cols4) {
  int c = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;
  if (c >= cols4) return;
  float4 v = a[r * cols4 + c];
  b[(4 * c + 0) * rows + r] = v.x; b[(4 * c + 1) * rows + r] = v.y; b[(4 * c + 2) * rows + r] = v.z; b[(4 * c + 3) * rows + r] = v.w;
}""")
    x = rng.standard_normal((37, 204)).astype("f4")
    out = device.empty((204, 37), "f4")
    module.launch("transpose4", (2, 37), 32, [device.array(x), out, 37, 51])
    assert (out.numpy() == x.T).all()


@pytest.mark.parametrize("block", [32, 128, 320, 1024])
def test_block_reduction(cuda, device, rng, block):
    module = cuda(r"""
extern "C" __global__ void row_sum(const float* a, float* out, int n) {
  __shared__ float s[32]; extern __shared__ float dyn[];
  float v = 0; for (int i = threadIdx.x; i < n; i += blockDim.x) v += a[blockIdx.x * n + i];
  dyn[threadIdx.x] = v; __syncthreads(); v = dyn[blockDim.x - 1 - threadIdx.x];
  for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
  if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0.f;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
  }
}""")
    x = rng.standard_normal((11, 777)).astype("f4")
    out = device.empty(11, "f4")
    module.launch("row_sum", 11, block, [device.array(x), out, 777], shared_bytes=4 * block)
    assert np.allclose(out.numpy(), x.sum(1), atol=1e-4)


def test_shared_memory_histogram_and_device_function(cuda, device, rng):
    module = cuda(r"""
struct Bin { int which; float weight; };
__device__ __noinline__ Bin bin_of(float x, float scale, float* extra) {
  Bin b; b.which = (int)floorf(x * scale) & 15; b.weight = x; *extra = x * 2; return b; }
__device__ __noinline__ int collatz(int n) { int k = 0; while (n != 1) { n = n % 2 ? 3 * n + 1 : n / 2; k++; } return k; }
extern "C" __global__ void histogram(const float* x, int n, unsigned* counts, float* sums, int* steps) {
  __shared__ unsigned c[16]; __shared__ float s[16];
  if (threadIdx.x < 16) { c[threadIdx.x] = 0; s[threadIdx.x] = 0; }
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float extra; Bin b = bin_of(x[i], 16.f, &extra);
    atomicAdd(&c[b.which], 1u); atomicAdd(&s[b.which], b.weight + extra);
    steps[i] = collatz(i + 1);
  }
  __syncthreads();
  if (threadIdx.x < 16) { atomicAdd(counts + threadIdx.x, c[threadIdx.x]); atomicAdd(sums + threadIdx.x, s[threadIdx.x]); }
}
extern "C" __global__ void tickets(int* order, int* next, int* low, unsigned long long* wide, int* cas) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  order[i] = atomicAdd(next, 3); atomicMin(low, 1000 - i); atomicAdd(wide, 1ull << 33); atomicCAS(cas, 0, i + 1);
}""")
    x = rng.random(3000).astype("f4")
    counts, sums, steps = device.zeros(16, "u4"), device.zeros(16, "f4"), device.empty(3000, "i4")
    report = module.launch("histogram", 4, 128, [device.array(x), 3000, counts, sums, steps])
    which = (x * 16).astype(int)
    assert (counts.numpy() == np.bincount(which, minlength=16)).all()
    assert np.allclose(sums.numpy(), np.bincount(which, 3 * x.astype("f8")), rtol=1e-4)
    assert report.shared_atomics == 6000 and report.global_atomics == 128

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert steps.numpy()[:200].tolist() == [collatz(n + 1) for n in range(200)]
    order, cells = device.empty(512, "i4"), [device.zeros(1, t) for t in ("i4", "i4", "u8", "i4")]
    module.launch("tickets", 4, 128, [order, *cells])
    assert sorted(order.numpy()) == list(range(0, 1536, 3)) and [int(c.numpy()[0]) for c in cells] == [1536, 0, 512 << 33, 1]


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_atomics_on_every_type(cuda, device, arch):
    """sm_75 has no bf16 atomics: nvcc emits a compare-and-swap loop."""
    module = cuda(
        r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void add_all(__half2* h, __nv_bfloat162* b, __nv_bfloat16* one, double* d, int* top, float* seen, float* cell) {
  int i = threadIdx.x;
  atomicAdd(h + (i & 3), __floats2half2_rn(1.f, 0.5f)); atomicAdd(b + (i & 3), __floats2bfloat162_rn(1.f, 0.5f));
  atomicAdd(one, __float2bfloat16(1.f)); atomicAdd(d, 1.5); atomicMax(top, i); seen[i] = atomicExch(cell, (float)(i + 1));
}""",
        arch=arch,
    )
    h, b, one, d, top, cell = (device.zeros(*a) for a in ((8, "f2"), (8, "u2"), (2, "u2"), (1, "f8"), (1, "i4"), (1, "f4")))
    seen = device.empty(96, "f4")
    module.launch("add_all", 1, 96, [h, b, one, d, top, seen, cell], races="off")  # that loop reads by a plain load first
    assert h.numpy().tolist() == from_bfloat16(b.numpy()).tolist() == [24, 12] * 4 and from_bfloat16(one.numpy()).tolist() == [96, 0]
    assert d.numpy() == 144 and top.numpy() == 95 and sorted([*seen.numpy(), *cell.numpy()]) == list(range(97))


PHILOX = r"""
struct Key { unsigned x, y; };
__device__ uint4 philox(uint4 c, Key k) {
  for (int r = 0; r < 10; r++) {
    unsigned h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x, h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
    c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0); k.x += 0x9E3779B9u; k.y += 0xBB67AE85u; }
  return c; }
extern "C" __global__ void raw(const uint4* c, const uint2* k, uint4* out) {
  int i = threadIdx.x; Key key = {k[i].x, k[i].y}; out[i] = philox(c[i], key); }
extern "C" __global__ void normal(float4* out, const float4* x, float a, float s, unsigned long long seed, int n4) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n4) return;
  Key key = {(unsigned)seed, (unsigned)(seed >> 32)};
  uint4 r = philox(make_uint4(i, 0, 0, 0), key);
  float4 z; float u, v, m, sn, cs;
  u = (r.x + 1.0f) * 2.3283064365386963e-10f; v = r.y * 2.3283064365386963e-10f; m = sqrtf(-2.f * logf(u));
  sincosf(6.2831853f * v, &sn, &cs); z.x = m * cs; z.y = m * sn;
  u = (r.z + 1.0f) * 2.3283064365386963e-10f; v = r.w * 2.3283064365386963e-10f; m = sqrtf(-2.f * logf(u));
  sincosf(6.2831853f * v, &sn, &cs); z.z = m * cs; z.w = m * sn;
  float4 t = x[i];
  out[i] = make_float4(a * t.x + s * z.x, a * t.y + s * z.y, a * t.z + s * z.z, a * t.w + s * z.w);
}"""


def test_philox_known_answers(cuda, device, rng):
    counters = rng.integers(0, 1 << 32, (32, 4), dtype="u4")
    keys = rng.integers(0, 1 << 32, (32, 2), dtype="u4")
    counters[0], keys[0] = 0, 0
    counters[1], keys[1] = 0xFFFFFFFF, 0xFFFFFFFF
    counters[2], keys[2] = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    out = device.empty((32, 4), "u4")
    cuda(PHILOX).launch("raw", 1, 32, [device.array(counters), device.array(keys), out])
    assert out.numpy()[:3].tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]  # Random123 known answers
    assert out.numpy().tolist() == [philox_reference(c, k) for c, k in zip(counters, keys)]


def test_box_muller_elementwise(cuda, device, rng):
    n4 = 1000
    x = rng.standard_normal((n4, 4)).astype("f4")
    out = device.empty((n4, 4), "f4")
    cuda(PHILOX).launch("normal", 8, 128, [out, device.array(x), 0.9, 0.1, (7 << 32) + 5, n4])
    r = np.array([philox_reference((i, 0, 0, 0), (5, 7)) for i in range(n4)], "f8")
    m = np.sqrt(-2 * np.log((r[:, ::2] + 1) / 2**32))
    z = np.stack([m * np.cos(2 * np.pi * r[:, 1::2] / 2**32), m * np.sin(2 * np.pi * r[:, 1::2] / 2**32)], -1).reshape(n4, 4)
    assert np.abs(out.numpy() - (0.9 * x + 0.1 * z)).max() < 2e-5


def test_math_library(cuda, device, rng):
    names = ["expf", "logf", "sinf", "cosf", "rsqrtf", "sqrtf", "tanhf", "erff", "log1pf", "expm1f", "normcdff", "__expf", "__logf"]
    body = "".join(f"y[{j} * n + i] = {f}(x[i]);" for j, f in enumerate(names))
    module = cuda(
        f'extern "C" __global__ void all(const float* x, float* y, int n) {{ int i = blockIdx.x * blockDim.x + threadIdx.x; {body} }}'
    )
    x = np.concatenate([rng.uniform(1e-3, 20, 960), [1e5, 3e6, 1e-30, 0.0] * 16]).astype("f4")
    out = device.empty((len(names), 1024), "f4")
    module.launch("all", 8, 128, [device.array(x), out, 1024])
    w = x.astype("f8")
    with np.errstate(all="ignore"):
        want = [
            np.exp(w), np.log(w), np.sin(w), np.cos(w), 1 / np.sqrt(w), np.sqrt(w), np.tanh(w), np.vectorize(math.erf)(w), np.log1p(w),
            np.expm1(w), 0.5 * np.vectorize(math.erfc)(-w / math.sqrt(2)), np.exp(w), np.log(w),
        ]  # fmt: skip
        want = [v.astype("f4") for v in want]
    for name, got, ref in zip(names, out.numpy(), want):
        finite = np.isfinite(ref)
        loose = 3e-5 if name.startswith("__") else 3e-7
        assert (got[~finite] == ref[~finite]).all(), name
        assert np.allclose(got[finite], ref[finite], rtol=loose, atol=1e-7), (name, np.abs(got - ref)[finite].max())


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_half_kernels(cuda, device, rng, arch):
    module = cuda(
        r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void mixed(const __half* h, const __nv_bfloat16* b, __half* ho, __nv_bfloat16* bo, float* fo) {
  int i = threadIdx.x;
  __half2 x = ((const __half2*)h)[i]; __nv_bfloat162 y = ((const __nv_bfloat162*)b)[i];
  ((__half2*)ho)[i] = __hfma2(x, x, __float2half2_rn(0.5f)); ((__nv_bfloat162*)bo)[i] = __hmax2(__hmul2(y, y), __hneg2(y));
  float2 f = __half22float2(x), g = __bfloat1622float2(y);
  fo[2 * i] = f.x + g.y; fo[2 * i + 1] = __half2float(hexp(x.y)) + (__hgt(y.x, y.y) ? 1.f : 0.f);
}""",
        arch=arch,
    )
    h, b = rng.standard_normal(128).astype("f2"), to_bfloat16(rng.standard_normal(128))
    ho, bo, fo = device.empty(128, "f2"), device.empty(128, "u2"), device.empty(128, "f4")
    module.launch("mixed", 1, 64, [device.array(h), device.array(b), ho, bo, fo])
    w, g = h.astype("f8"), from_bfloat16(b)
    assert (ho.numpy() == (w * w + 0.5).astype("f2")).all()
    assert (bo.numpy() == to_bfloat16(np.maximum(from_bfloat16(to_bfloat16(g * g)), -g))).all()
    assert (fo.numpy()[::2] == h[::2].astype("f4") + g[1::2]).all()
    assert np.allclose(fo.numpy()[1::2], np.exp(w[1::2]) + (g[::2] > g[1::2]), rtol=2e-3)


def test_cooperative_groups(cuda, device, rng):
    """Tiles of a warp use several member masks side by side."""
    module = cuda(r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;
extern "C" __global__ void tiles(const float* x, float* sums, int* most, int* odd) {
  auto block = cg::this_thread_block(); auto warp = cg::tiled_partition<32>(block); auto quad = cg::tiled_partition<4>(warp);
  __shared__ float part[32];
  float v = cg::reduce(warp, x[blockIdx.x * block.size() + block.thread_rank()], cg::plus<float>());
  if (warp.thread_rank() == 0) part[warp.meta_group_rank()] = v;
  block.sync();
  if (warp.meta_group_rank() == 0) {
    v = cg::reduce(warp, warp.thread_rank() < warp.meta_group_size() ? part[warp.thread_rank()] : 0.f, cg::plus<float>());
    if (warp.thread_rank() == 0) sums[blockIdx.x] = v;
  }
  most[block.thread_rank()] = cg::reduce(quad, (int)(threadIdx.x * 7 % 13), cg::greater<int>());
  odd[block.thread_rank()] = quad.ballot(threadIdx.x * 7 % 13 > 6);
}""")
    x = rng.standard_normal((3, 96)).astype("f4")
    sums, most, odd = device.empty(3, "f4"), device.empty(96, "i4"), device.empty(96, "i4")
    module.launch("tiles", 3, 96, [device.array(x), sums, most, odd], same_value_writes=["global"])
    assert np.allclose(sums.numpy(), x.sum(1), atol=1e-5)
    k = (np.arange(96) * 7 % 13).reshape(-1, 4)
    assert (most.numpy().reshape(-1, 4) == k.max(1, keepdims=True)).all()
    assert (odd.numpy().reshape(-1, 4) == ((k > 6) << np.arange(4)).sum(1, keepdims=True)).all()


GROUP_NORM = r"""
#include <cuda_bf16.h>
// One CTA per (sample, group); x, y: (N, C, H*W) bf16; Welford-free two-pass statistics in float32.
extern "C" __global__ void group_norm_silu(
    const __nv_bfloat16* x, const float* gamma, const float* beta, __nv_bfloat16* y, float* stats, int C, int G, int HW, float eps) {
  __shared__ float part[2][32];
  int n = blockIdx.x / G, g = blockIdx.x % G, per = C / G, count = per * HW;
  const __nv_bfloat16* px = x + ((long long)n * C + g * per) * HW; __nv_bfloat16* py = y + ((long long)n * C + g * per) * HW;
  float s = 0, q = 0;
  for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
    float2 v = __bfloat1622float2(((const __nv_bfloat162*)px)[i]); s += v.x + v.y; q += v.x * v.x + v.y * v.y; }
  for (int o = 16; o; o >>= 1) { s += __shfl_xor_sync(~0u, s, o); q += __shfl_xor_sync(~0u, q, o); }
  if (threadIdx.x % 32 == 0) { part[0][threadIdx.x / 32] = s; part[1][threadIdx.x / 32] = q; }
  __syncthreads();
  s = q = 0; for (int i = 0; i < blockDim.x / 32; i++) { s += part[0][i]; q += part[1][i]; }
  float mean = s / count, rstd = rsqrtf(fmaxf(q / count - mean * mean, 0.f) + eps);
  if (threadIdx.x == 0) { stats[2 * blockIdx.x] = mean; stats[2 * blockIdx.x + 1] = rstd; }
  for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
    int c = g * per + 2 * i / HW; float2 v = __bfloat1622float2(((const __nv_bfloat162*)px)[i]);
    float a = (v.x - mean) * rstd * gamma[c] + beta[c], b = (v.y - mean) * rstd * gamma[c] + beta[c];
    ((__nv_bfloat162*)py)[i] = __floats2bfloat162_rn(a / (1.f + expf(-a)), b / (1.f + expf(-b)));
  }
}"""


def test_group_norm_silu(cuda, device, rng):
    module = cuda(GROUP_NORM)
    n, c, h, g = 2, 64, 16, 32
    x = to_bfloat16(rng.standard_normal((n, c, h * h)) * 2 + 1)
    gamma, beta = rng.standard_normal((2, c)).astype("f4")
    y, stats = device.empty((n, c, h * h), "u2"), device.empty((n * g, 2), "f4")
    report = module.launch(
        "group_norm_silu", n * g, 128, [device.array(x), device.array(gamma), device.array(beta), y, stats, c, g, h * h, 1e-5]
    )
    w = from_bfloat16(x).astype("f8").reshape(n, g, -1)
    mean, rstd = w.mean(-1, keepdims=True), 1 / np.sqrt(w.var(-1, keepdims=True) + 1e-5)
    z = ((w - mean) * rstd).reshape(n, c, -1) * gamma[:, None] + beta[:, None]
    want = z / (1 + np.exp(-z))
    assert np.abs(from_bfloat16(y.numpy()) - want).max() < 0.04
    assert np.allclose(stats.numpy()[:, 0], mean.ravel(), atol=1e-5)
    assert report.global_load.unique_bytes == x.nbytes + gamma.nbytes + beta.nbytes
    assert report.global_store.unique_bytes == x.nbytes + stats.nbytes
