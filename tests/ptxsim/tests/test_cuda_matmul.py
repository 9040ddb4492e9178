"""CUDA C++ kernels that multiply matrices, by tensor cores and without, against NumPy."""

import numpy as np
import pytest

from ptxsim import RaceError, UninitialisedRead, from_bfloat16, to_bfloat16

MMA = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#ifndef KIND
#define KIND "bf16"
#endif
__device__ unsigned smem(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void ldsm4(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem(p))); }
__device__ void ldsm4t(unsigned (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem(p))); }
__device__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(smem(to)), "l"(from) : "memory"); }
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
    if (k0 + 32 < K) { fetch(s ^ 1, k0 + 32); asm volatile("cp.async.wait_group 1;" ::: "memory"); }
    else asm volatile("cp.async.wait_all;" ::: "memory");
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
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
    : "r"(a[l / 4 * 8 + l % 4]), "r"(a[(l / 4 + 8) * 8 + l % 4]), "r"(a[l / 4 * 8 + l % 4 + 4]), "r"(a[(l / 4 + 8) * 8 + l % 4 + 4]),
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
  wmma::fragment<wmma::matrix_a, 16, 16, 16, KIND, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, KIND, wmma::col_major> fb;
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
    a, b = to(rng.standard_normal((16, 48)).astype("f4")), to(rng.standard_normal((16, 48)).astype("f4"))
    c = rng.standard_normal((16, 16)).astype("f4")
    out = device.empty((16, 16), "f4")
    module.launch("tile", 1, 32, [device.array(a), device.array(b), device.array(c), out, 48])
    assert np.abs(out.numpy().T - (back(a).astype("f8") @ back(b).astype("f8").T + 2 * c)).max() < 1e-5


SGEMM = r"""
extern "C" __global__ void sgemm(const float* A, const float* B, float* C, int M, int N, int K) {
  __shared__ float a[32][33], b[32][33];
  int x = threadIdx.x, y = threadIdx.y, r = blockIdx.y * 32 + y, c = blockIdx.x * 32 + x;
  float acc[4] = {};
  for (int k = 0; k < K; k += 32) {
    for (int j = 0; j < 32; j += 8) {
      a[y + j][x] = r + j < M && k + x < K ? A[(r + j) * K + k + x] : 0;
      b[y + j][x] = k + y + j < K && c < N ? B[(k + y + j) * N + c] : 0; }
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
