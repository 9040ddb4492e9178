"""What orders memory and what does not: each kernel here has a right form, and forms that lack one synchronisation."""

import numpy as np
import pytest

from ptxsim import BarrierError, RaceError

SOURCE = r"""
#define ASM(text) asm volatile(text ::: "memory")
__device__ unsigned smem(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// Between a lane's write and another's read: the warp-wide instruction `what`, and bar.warp.sync where sync.
extern "C" __global__ void exchange(float* b, int what, int sync) {
  __shared__ volatile float s[64]; unsigned t = threadIdx.x, v = t;
  s[t] = t;
  if (what == 0) v = __shfl_xor_sync(~0u, t, 1);
  if (what == 1) v = __ballot_sync(~0u, t & 1);
  if (what == 2) v = __match_any_sync(~0u, t / 2);
  if (what == 3) v = __reduce_add_sync(~0u, t);
  if (what == 4) {
    float d[4];
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%5,%5,%5,%5};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(0), "f"(1.f)); v = d[0]; }
  if (sync) __syncwarp();
  b[t] = s[t ^ 1] + (v == 12345);
}
extern "C" __global__ void rows(unsigned* b, int sync) {                  // lane l writes the row that it gives the address of
  __shared__ __align__(16) uint4 s[32]; unsigned t = threadIdx.x, r;
  s[t] = make_uint4(t, t, t, t);
  if (sync) __syncwarp();
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(smem(&s[t % 8])) : "memory");
  if (sync > 1) __syncwarp();
  if (sync) s[t] = make_uint4(r, r, r, r);
  b[t] = r;
}
extern "C" __global__ void tiles(float* b, int reach) {                   // bar.warp.sync of half a warp each
  __shared__ volatile float s[32]; int t = threadIdx.x; unsigned half = t < 16 ? 0xFFFFu : 0xFFFF0000u;
  s[t] = t; __syncwarp(half); float v = s[t ^ reach]; __syncwarp(half); s[t ^ reach] = v; __syncwarp(half); b[t] = s[t];
}
extern "C" __global__ void neighbours(float* b, int third) {              // warps 0, 1 meet, then 1, 2, then third of them looks at 0's
  __shared__ volatile float s[96]; int t = threadIdx.x, w = t / 32;
  s[t] = t;
  if (w < 2) ASM("bar.sync 1, 64;");
  if (w > 0) ASM("bar.sync 2, 64;");
  b[t] = w == 2 ? s[t - 32 * (third & 3)] : w == 0 ? s[t + 32 * (third >> 2)] : s[t];
}
extern "C" __global__ void ring(float* b, int empty) {                    // producer: warp 0; consumer: warp 1; one place
  __shared__ volatile float s[32]; int t = threadIdx.x & 31;
  for (int i = 0; i < 3; i++) {
    if (threadIdx.x < 32) { if (i > 0 && empty) ASM("bar.sync 2, 64;"); s[t] = 10 * i + t; ASM("bar.arrive 1, 64;"); }
    else { ASM("bar.sync 1, 64;"); b[32 * i + t] = s[31 - t]; if (i < 2 && empty) ASM("bar.arrive 2, 64;"); }
  }
}
extern "C" __global__ void stage(const float* a, float* b, int sync) {
  __shared__ volatile float s[64]; int t = threadIdx.x;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(smem((void*)&s[t])), "l"(a + t) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (sync == 1) __syncwarp();
  if (sync == 2) __syncthreads();
  b[t] = s[t ^ 1] + s[t ^ 32];
}
extern "C" __global__ void through_global(volatile float* b, float* c, int sync) {
  int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  b[i] = t; if (sync) __syncthreads(); c[i] = b[i ^ 32];
}
extern "C" __global__ void shared_word(volatile float* b, int own, int value) { b[own ? blockIdx.x : 0] = value ? 7 : blockIdx.x; }
extern "C" __global__ void in_place(volatile float* b) { int i = blockIdx.x * blockDim.x + threadIdx.x; b[i] = b[i + 1] + 1; }
extern "C" __global__ void total(const float* a, volatile float* part, unsigned* count, float* sum, int before, int after) {
  __shared__ bool last;
  if (threadIdx.x < 2) part[2 * blockIdx.x + threadIdx.x] = a[2 * blockIdx.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (before == 1) __threadfence();
    if (before == 2) __threadfence_block();
    last = atomicAdd(count, 1) == gridDim.x - 1;
    if (after) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 33) { float v = 0; for (int i = 0; i < 2 * gridDim.x; i++) v += part[i]; *sum = v; }
}
extern "C" __global__ void half_a_warp(float* b) {
  if (threadIdx.x % 32 < 16) ASM("barrier.sync 1, 32;"); else ASM("barrier.sync 2, 32;"); b[threadIdx.x] = 1; }
"""


@pytest.fixture
def launch(cuda, device):
    """launch(kernel, grid, block, number of outputs, further arguments ...) gives the output."""
    module = cuda(SOURCE)

    def run(name, grid, block, n, *arguments, dtype="f4", inputs=(), **options):
        out = device.empty(n, dtype)
        module.launch(name, grid, block, [*inputs, out, *arguments], **options)
        return out.numpy(check=False)

    return run


def races(launch, *arguments, match="no barrier", **options):
    with pytest.raises(RaceError, match=match):
        launch(*arguments, **options)


@pytest.mark.parametrize("what", range(6), ids=["shfl", "vote", "match", "redux", "mma", "nothing"])
def test_warp_wide_instructions_order_no_memory(what, launch):
    races(launch, "exchange", 1, 64, 64, what, 0, match="shared-memory race")
    assert (launch("exchange", 1, 64, 64, what, 1) == np.arange(64) ^ 1).all()


def test_ldmatrix_reads_what_all_lanes_have_written(launch):
    races(launch, "rows", 1, 32, 32, 0, match="read of 16 bytes", dtype="u4")
    races(launch, "rows", 1, 32, 32, 1, match="write of 16 bytes", dtype="u4")
    assert (launch("rows", 1, 32, 32, 2, dtype="u4") == np.arange(32) // 4).all()


def test_a_part_of_a_warp_is_ordered_by_itself(launch):
    assert (launch("tiles", 1, 32, 32, 15) == np.arange(32)).all()
    races(launch, "tiles", 1, 32, 32, 16)


def test_a_barrier_of_some_warps_orders_them_and_what_they_know(launch):
    t = np.arange(96)
    for back, there in ((1, t - 32), (2, t - 64)):
        assert (launch("neighbours", 1, 96, 96, back) == np.where(t < 64, t, there)).all()
    races(launch, "neighbours", 1, 96, 96, 2 << 2)  # warp 0 has met 1 alone
    with pytest.raises(BarrierError, match="part of a warp"):
        launch("half_a_warp", 1, 64, 64)


def test_bar_arrive_tells_and_does_not_learn(launch):
    assert (launch("ring", 1, 64, 96, 1).reshape(3, 32) == 10 * np.arange(3)[:, None] + np.arange(31, -1, -1)).all()
    races(launch, "ring", 1, 64, 96, 0)


def test_a_wait_for_cp_async_is_the_threads_own(launch, device):
    a = device.array(np.arange(64, dtype="f4"))
    for sync in (0, 1):
        races(launch, "stage", 1, 64, 64, sync, inputs=[a])
    t = np.arange(64)
    assert (launch("stage", 1, 64, 64, 2, inputs=[a]) == (t ^ 1) + (t ^ 32)).all()


def test_global_memory_within_a_block(launch, device):
    race = r"global-memory race: read.*write by thread \d+ of block \(0, 0, 0\)"
    races(launch, "through_global", 3, 64, 192, 0, match=race, inputs=[device.empty(192, "f4")])
    out = launch("through_global", 3, 64, 192, 1, inputs=[device.empty(192, "f4")], batch_threads=128)
    assert (out == np.arange(192) % 64 ^ 32).all()


@pytest.mark.parametrize("batch", [32, 32768])
def test_two_blocks_at_one_word(batch, launch):
    races(launch, "shared_word", 2, 1, 2, 0, 0, match="write by thread 0 of block", batch_threads=batch)
    races(launch, "shared_word", 2, 1, 2, 0, 0, match="write by thread 0 of block", batch_threads=batch, same_value_writes=["global"])
    races(launch, "shared_word", 2, 1, 2, 0, 1, batch_threads=batch)
    races(launch, "shared_word", 2, 1, 2, 0, 1, batch_threads=batch, same_value_writes=["shared"])
    assert launch("shared_word", 2, 1, 2, 0, 1, batch_threads=batch, same_value_writes=["global"])[0] == 7
    assert (launch("shared_word", 2, 1, 2, 1, 0, batch_threads=batch) == [0, 1]).all()


def test_reading_what_another_block_writes(cuda, device):
    module, b = cuda(SOURCE), device.zeros(129, "f4")
    for grid, block in ((2, 1), (1, 64), (1, 2)):
        with pytest.raises(RaceError, match="global-memory race: write"):
            module.launch("in_place", grid, block, [b])
    module.launch("in_place", 1, 1, [b])


@pytest.mark.parametrize("batch", [32, 32768])
def test_fences_and_an_atomic_order_blocks(batch, cuda, device):
    """The last block adds up what all have written: fence, atomic, atomic, fence."""
    module, a = cuda(SOURCE), device.array(np.arange(12, dtype="f4"))

    def total(before, after):
        sum = device.empty(1, "f4")
        module.launch("total", 6, 64, [a, device.empty(12, "f4"), device.zeros(1, "u4"), sum, before, after], batch_threads=2 * batch)
        return sum.numpy()[0]

    assert total(1, 1) == 66
    for before, after in ((0, 1), (1, 0), (2, 1)):
        with pytest.raises(RaceError, match=r"global-memory race: read.*write by thread 0 of block \(0, 0, 0\)"):
            total(before, after)
