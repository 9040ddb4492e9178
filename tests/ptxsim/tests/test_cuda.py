"""Whole CUDA C++ kernels against NumPy."""

import math

import numpy as np
import pytest

from ptxsim import RaceError, UninitialisedRead, from_bfloat16, to_bfloat16

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
__device__ __noinline__ Bin bin_of(float x, float scale, float* extra) { Bin b; b.which = (int)floorf(x * scale) & 15; b.weight = x; *extra = x * 2; return b; }
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
  atomicAdd(h + (i & 3), __floats2half2_rn(1.f, 0.5f)); atomicAdd(b + (i & 3), __floats2bfloat162_rn(1.f, 0.5f)); atomicAdd(one, __float2bfloat16(1.f));
  atomicAdd(d, 1.5); atomicMax(top, i); seen[i] = atomicExch(cell, (float)(i + 1));
}""",
        arch=arch,
    )
    h, b, one, d, top, cell = (device.zeros(*a) for a in ((8, "f2"), (8, "u2"), (2, "u2"), (1, "f8"), (1, "i4"), (1, "f4")))
    seen = device.empty(96, "f4")
    module.launch("add_all", 1, 96, [h, b, one, d, top, seen, cell], races="off")  # that loop reads by a plain load first
    assert (
        h.numpy().tolist() == [24, 12] * 4
        and from_bfloat16(b.numpy()).tolist() == [24, 12] * 4
        and from_bfloat16(one.numpy()).tolist() == [96, 0]
    )
    assert d.numpy() == 144 and top.numpy() == 95 and sorted([*seen.numpy(), *cell.numpy()]) == list(range(97))


PHILOX = r"""
struct Key { unsigned x, y; };
__device__ uint4 philox(uint4 c, Key k) {
  for (int r = 0; r < 10; r++) {
    unsigned h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x, h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
    c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0); k.x += 0x9E3779B9u; k.y += 0xBB67AE85u; }
  return c; }
extern "C" __global__ void raw(const uint4* c, const uint2* k, uint4* out) { int i = threadIdx.x; Key key = {k[i].x, k[i].y}; out[i] = philox(c[i], key); }
extern "C" __global__ void normal(float4* out, const float4* x, float a, float s, unsigned long long seed, int n4) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n4) return;
  Key key = {(unsigned)seed, (unsigned)(seed >> 32)};
  uint4 r = philox(make_uint4(i, 0, 0, 0), key);
  float4 z; float u, v, m, sn, cs;
  u = (r.x + 1.0f) * 2.3283064365386963e-10f; v = r.y * 2.3283064365386963e-10f; m = sqrtf(-2.f * logf(u)); sincosf(6.2831853f * v, &sn, &cs); z.x = m * cs; z.y = m * sn;
  u = (r.z + 1.0f) * 2.3283064365386963e-10f; v = r.w * 2.3283064365386963e-10f; m = sqrtf(-2.f * logf(u)); sincosf(6.2831853f * v, &sn, &cs); z.z = m * cs; z.w = m * sn;
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
            np.exp(w),
            np.log(w),
            np.sin(w),
            np.cos(w),
            1 / np.sqrt(w),
            np.sqrt(w),
            np.tanh(w),
            np.vectorize(math.erf)(w),
            np.log1p(w),
            np.expm1(w),
            0.5 * np.vectorize(math.erfc)(-w / math.sqrt(2)),
            np.exp(w),
            np.log(w),
        ]
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


MMA = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#ifndef KIND
#define KIND "bf16"
#endif
__device__ unsigned smem(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void ldsm4(unsigned (&r)[4], const void* p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem(p))); }
__device__ void ldsm4t(unsigned (&r)[4], const void* p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem(p))); }
__device__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
__device__ void copy16(void* to, const void* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(smem(to)), "l"(from) : "memory"); }
// C (M,N) = A (M,K) B (K,N): 64x64 tiles, K steps of 32, two-stage cp.async pipeline, 4 warps of 32x32.
extern "C" __global__ void matmul(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  __shared__ __align__(16) unsigned short sa[2][64][40], sb[2][32][72];
  int t = threadIdx.x, w = t / 32, l = t % 32, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, wm = (w / 2) * 32, wn = (w % 2) * 32;
  float c[2][4][4] = {};
  auto fetch = [&](int s, int k0) {
    for (int i = t; i < 256; i += 128) copy16(&sa[s][i / 4][i % 4 * 8], A + (m0 + i / 4) * K + k0 + i % 4 * 8);
    for (int i = t; i < 256; i += 128) copy16(&sb[s][i / 8][i % 8 * 8], B + (k0 + i / 8) * N + n0 + i % 8 * 8);
    asm volatile("cp.async.commit_group;" ::: "memory"); };
  fetch(0, 0);
  for (int k0 = 0, s = 0; k0 < K; k0 += 32, s ^= 1) {
    if (k0 + 32 < K) { fetch(s ^ 1, k0 + 32); asm volatile("cp.async.wait_group 1;" ::: "memory"); } else asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    for (int k = 0; k < 32; k += 16) {
      unsigned a[2][4], b[2][4];
      for (int i = 0; i < 2; i++) ldsm4(a[i], &sa[s][wm + 16 * i + l % 16][k + l / 16 * 8]);
      for (int j = 0; j < 2; j++) ldsm4t(b[j], &sb[s][k + l % 16][wn + 16 * j + l / 16 * 8]);
      for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) mma(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; i++) for (int j = 0; j < 4; j++) for (int e = 0; e < 4; e++)
    C[(m0 + wm + 16 * i + l / 4 + e / 2 * 8) * N + n0 + wn + 8 * j + l % 4 * 2 + e % 2] = c[i][j][e];
}
extern "C" __global__ void one_k8(const unsigned* a, const unsigned* b, float* c) {
  int l = threadIdx.x; float d[4];
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[l / 4 * 8 + l % 4]), "r"(a[(l / 4 + 8) * 8 + l % 4]), "r"(a[l / 4 * 8 + l % 4 + 4]), "r"(a[(l / 4 + 8) * 8 + l % 4 + 4]),
      "r"(b[l % 4 * 8 + l / 4]), "r"(b[(l % 4 + 4) * 8 + l / 4]), "f"(1.f));
  for (int e = 0; e < 4; e++) c[(l / 4 + e / 2 * 8) * 8 + l % 4 * 2 + e % 2] = d[e];
}"""


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_pipeline(cuda, device, rng, kind):
    module = cuda(MMA, flags=[f'-DKIND="{kind}"'])
    m, n, k = 128, 192, 160
    a, b = rng.standard_normal((m, k)).astype("f4"), rng.standard_normal((k, n)).astype("f4")
    to, back = (
        (to_bfloat16, from_bfloat16) if kind == "bf16" else (lambda x: x.astype("f2").view("u2"), lambda x: x.view("f2").astype("f4"))
    )
    out = device.empty((m, n), "f4")
    report = module.launch("matmul", (n // 64, m // 64), 128, [device.array(to(a)), device.array(to(b)), out, m, n, k])
    want = back(to(a)).astype("f8") @ back(to(b)).astype("f8")
    assert np.abs(out.numpy() - want).max() < 1e-4
    assert report.mma_flops == 2 * m * n * k
    assert report.shared_load.conflict_degree == 1.0  # rows padded by 16 bytes


def test_mma_without_wait_is_caught(cuda, device, rng):
    module = cuda(MMA.replace("cp.async.wait_group 1;", "// no wait"))
    with pytest.raises(UninitialisedRead):
        module.launch(
            "matmul", 1, 128, [device.zeros((64, 64), "u2"), device.zeros((64, 64), "u2"), device.empty((64, 64), "f4"), 64, 64, 64]
        )


def test_mma_tf32(cuda, device, rng):
    a, b = rng.standard_normal((16, 8)).astype("f4"), rng.standard_normal((8, 8)).astype("f4")
    out = device.empty((16, 8), "f4")
    cuda(MMA).launch("one_k8", 1, 32, [device.array(a), device.array(b), out])
    cut = lambda x: (x.view("u4") & 0xFFFFE000).view("f4").astype("f8")
    assert np.abs(out.numpy() - (cut(a) @ cut(b) + 1)).max() < 1e-5


@pytest.mark.parametrize("kind", ["__half", "__nv_bfloat16"])
def test_wmma(cuda, device, rng, kind):
    module = cuda(
        r"""
#include <mma.h>
using namespace nvcuda;
extern "C" __global__ void tile(const KIND* a, const KIND* b, const float* c, float* d, int k) {
  __shared__ __align__(32) KIND s[16 * 24];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, KIND, wmma::row_major> fa; wmma::fragment<wmma::matrix_b, 16, 16, 16, KIND, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> acc; wmma::load_matrix_sync(acc, c, 16, wmma::mem_row_major);
  for (int i = 0; i < acc.num_elements; i++) acc.x[i] *= 2;
  for (int j = 0; j < k; j += 16) {
    for (int i = threadIdx.x; i < 256; i += 32) s[i / 16 * 24 + i % 16] = a[i / 16 * k + j + i % 16];
    __syncwarp(); wmma::load_matrix_sync(fa, s, 24); wmma::load_matrix_sync(fb, b + j, k); wmma::mma_sync(acc, fa, fb, acc); __syncwarp();
  }
  wmma::store_matrix_sync(d, acc, 16, wmma::mem_col_major);
}""".replace("KIND", kind)
    )
    to, back = (
        (to_bfloat16, from_bfloat16) if kind != "__half" else (lambda x: x.astype("f2").view("u2"), lambda x: x.view("f2").astype("f4"))
    )
    a, b, c = (
        to(rng.standard_normal((16, 48)).astype("f4")),
        to(rng.standard_normal((16, 48)).astype("f4")),
        rng.standard_normal((16, 16)).astype("f4"),
    )
    out = device.empty((16, 16), "f4")
    module.launch("tile", 1, 32, [device.array(a), device.array(b), device.array(c), out, 48])
    assert np.abs(out.numpy().T - (back(a).astype("f8") @ back(b).astype("f8").T + 2 * c)).max() < 1e-5


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


SGEMM = r"""
extern "C" __global__ void sgemm(const float* A, const float* B, float* C, int M, int N, int K) {
  __shared__ float a[32][33], b[32][33];
  int x = threadIdx.x, y = threadIdx.y, r = blockIdx.y * 32 + y, c = blockIdx.x * 32 + x;
  float acc[4] = {};
  for (int k = 0; k < K; k += 32) {
    for (int j = 0; j < 32; j += 8) { a[y + j][x] = r + j < M && k + x < K ? A[(r + j) * K + k + x] : 0; b[y + j][x] = k + y + j < K && c < N ? B[(k + y + j) * N + c] : 0; }
    __syncthreads();
    for (int i = 0; i < 32; i++) for (int j = 0; j < 4; j++) acc[j] += a[y + 8 * j][i] * b[i][x];
    __syncthreads();
  }
  for (int j = 0; j < 4; j++) if (r + 8 * j < M && c < N) C[(r + 8 * j) * N + c] = acc[j];
}"""


def test_tiled_matmul_float32(cuda, device, rng):
    module = cuda(SGEMM)
    m, n, k = 70, 90, 50
    a, b = rng.standard_normal((m, k)).astype("f4"), rng.standard_normal((k, n)).astype("f4")
    out = device.empty((m, n), "f4")
    report = module.launch("sgemm", (3, 3), (32, 8), [device.array(a), device.array(b), out, m, n, k])
    assert np.allclose(out.numpy(), a @ b, atol=1e-5)
    assert report.shared_load.conflict_degree == 1.0 and report.opcodes["fma.rn.f32"] > 0


@pytest.mark.parametrize(
    "source,name,grid,block,shape", [(SGEMM, "sgemm", (2, 2), (32, 8), (64, 64, 64)), (MMA, "matmul", (1, 1), 128, (64, 64, 96))]
)
@pytest.mark.parametrize("which", [0, 1])
def test_each_syncthreads_is_needed(cuda, device, rng, source, name, grid, block, shape, which):
    """Leaving out either barrier of a tiled kernel must be reported."""
    pieces = source.split("__syncthreads();")
    assert len(pieces) == 3
    module = cuda("__syncthreads();".join(pieces[: which + 1]) + "__syncthreads();".join(pieces[which + 1 :]))
    dtype = "f4" if name == "sgemm" else "u2"
    m, n, k = shape
    with pytest.raises((RaceError, UninitialisedRead)):
        module.launch(
            name, grid, block, [device.zeros((m, k), dtype), device.array(np.ones((k, n), dtype)), device.empty((m, n), "f4"), m, n, k]
        )


GROUP_NORM = r"""
#include <cuda_bf16.h>
// One CTA per (sample, group); x, y: (N, C, H*W) bf16; Welford-free two-pass statistics in float32.
extern "C" __global__ void group_norm_silu(const __nv_bfloat16* x, const float* gamma, const float* beta, __nv_bfloat16* y, float* stats, int C, int G, int HW, float eps) {
  __shared__ float part[2][32];
  int n = blockIdx.x / G, g = blockIdx.x % G, per = C / G, count = per * HW;
  const __nv_bfloat16* px = x + ((long long)n * C + g * per) * HW; __nv_bfloat16* py = y + ((long long)n * C + g * per) * HW;
  float s = 0, q = 0;
  for (int i = threadIdx.x; i < count / 2; i += blockDim.x) { float2 v = __bfloat1622float2(((const __nv_bfloat162*)px)[i]); s += v.x + v.y; q += v.x * v.x + v.y * v.y; }
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
