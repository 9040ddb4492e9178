"""Schedules show what a kernel leaves to chance, and leave a right kernel's results alone."""

import numpy as np
import pytest

SOURCE = r"""
extern "C" __global__ void tickets(int* order, int* next) { order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1); }
extern "C" __global__ void hand_over(int* b, int sync) {                  // the next warp's, and the one before's
  __shared__ volatile int s[128]; int t = threadIdx.x;
  s[t] = 0; __syncthreads(); s[t] = t; if (sync) __syncthreads(); b[t] = 1000 * s[(t + 32) & 127] + s[(t + 96) & 127]; }
extern "C" __global__ void undefined(float* b, int set) {
  float v; if (set) v = 1; else asm volatile("{ .reg .f32 x; add.f32 %0, x, 1.0; }" : "=f"(v)); b[threadIdx.x] = v; }
extern "C" __global__ void early(volatile float* a, float* b) {           // overwrites the source of its copy before it has waited
  __shared__ float s[32]; int t = threadIdx.x;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((unsigned)__cvta_generic_to_shared(&s[t])), "l"(a + t) : "memory");
  a[t] = -1; asm volatile("cp.async.wait_all;" ::: "memory"); b[t] = s[t]; }
extern "C" __global__ void approximate(const float* x, float* y) {
  float v = x[threadIdx.x], r[6];
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r[0]) : "f"(v)); asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r[1]) : "f"(v));
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r[2]) : "f"(v)); asm("lg2.approx.f32 %0, %1;" : "=f"(r[3]) : "f"(v));
  asm("tanh.approx.f32 %0, %1;" : "=f"(r[4]) : "f"(v)); asm("div.full.f32 %0, %1, %2;" : "=f"(r[5]) : "f"(v), "f"(3.f));
  for (int i = 0; i < 6; i++) y[i * blockDim.x + threadIdx.x] = r[i]; }
extern "C" __global__ void divergent(float* b, int sync) {                // reduction by shuffles behind a branch
  int t = threadIdx.x; float v = t; if (t & 1) { v *= 2; for (int i = 0; i < t; i++) v += 1; }
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  b[blockIdx.x * blockDim.x + t] = v; }
"""
SCHEDULES = ["in order", "reversed", "random:1", "random:2"]


@pytest.fixture
def launch(cuda, device):
    module = cuda(SOURCE)

    def run(name, grid, block, n, *arguments, dtype="f4", inputs=(), **options):
        out = device.empty(n, dtype)
        module.launch(name, grid, block, [*inputs, out, *arguments], races="off", **options)
        return out.numpy()

    return run


def test_orders_are_different_orders(launch, device):
    """Tickets by threads of 4 blocks of 4 warps, one of which takes them all at once in order."""
    found = [launch("tickets", 4, 128, 512, device.zeros(1, "i4"), dtype="i4", schedule=s).tolist() for s in SCHEDULES]
    assert all(sorted(order) == list(range(512)) for order in found) and len({tuple(order) for order in found}) == 4
    again = launch("tickets", 4, 128, 512, device.zeros(1, "i4"), dtype="i4", schedule="random:1")
    assert again.tolist() == found[2]


@pytest.mark.parametrize("sync", [0, 1])
def test_a_missing_barrier_shows_in_the_result(sync, launch):
    """In order all threads write before one reads, so that nothing is seen."""
    t = np.arange(128)
    right = 1000 * ((t + 32) % 128) + (t + 96) % 128
    found = [
        (launch("hand_over", 1, 128, 128, sync, dtype="i4", schedule=s) == right).all()
        for s in (*SCHEDULES, *map("random:{}".format, range(3, 8)))
    ]
    assert all(found) if sync else found[0] and not found[1] and not all(found[2:])


def test_threads_that_diverged_meet_at_a_shuffle(launch):
    found = [launch("divergent", 2, 64, 128, 0, schedule=s) for s in SCHEDULES]
    assert all((x == found[0]).all() for x in found)


def test_what_is_undefined_is_garbage(launch):
    assert launch("undefined", 1, 32, 32, 0)[0] == 1  # zero, by chance
    assert np.isnan(launch("undefined", 1, 32, 32, 0, schedule="in order:0")).all()
    bits = [launch("undefined", 1, 32, 32, 1, schedule=f"in order:{seed}").tolist() for seed in (0, 1)]
    assert bits == [[1.0] * 32] * 2


def test_copies_come_late(launch, device):
    a = device.array(np.arange(32, dtype="f4"))
    assert (launch("early", 1, 32, 32, inputs=[a]) == np.arange(32)).all()
    assert (launch("early", 1, 32, 32, inputs=[a], schedule="in order:0") == -1).all()


def test_approximate_results_are_an_ulp_off(launch, device):
    x = device.array(np.concatenate([np.linspace(0.01, 9, 252), [0, np.inf, -0.0, np.nan]]).astype("f4"))
    exact = launch("approximate", 1, 256, (6, 256), inputs=[x])
    found = [
        launch("approximate", 1, 256, (6, 256), inputs=[x], schedule=s) for s in ("in order:1", "reversed:1", "random:1", "in order:2")
    ]
    assert all((y.view("u4") == found[0].view("u4")).all() for y in found[:3])
    assert (found[0] != found[3])[:, :252].any(axis=1).all()
    for y in found:
        off = y.view("i4") - exact.view("i4")
        assert (np.abs(off[:, :252]) <= 1).all() and (off[:, 252:] == 0).all() and (np.abs(y[4, :252]) <= 1).all()
        assert (off[:, :252] == 1).any(axis=1).all() and (off[:, :252] == -1).any(axis=1).all()


def test_the_environment_chooses(launch, device, monkeypatch):
    monkeypatch.setenv("PTXSIM_SCHEDULE", "in order:0")
    assert np.isnan(launch("undefined", 1, 32, 32, 0)).all()
    assert launch("undefined", 1, 32, 32, 0, schedule="in order")[0] == 1
    with pytest.raises(ValueError, match="one of in order, reversed, random.*'backwards'"):
        launch("undefined", 1, 32, 32, 0, schedule="backwards")
